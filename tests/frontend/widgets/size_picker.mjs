// The size picker of canvas nodes, used as a person uses it.
import assert from 'node:assert/strict'
import { drawn, load, one, saved, undo, value } from '../page.mjs'

const PIXART = 'PixStack_PixArtCanvas', FLOW = 'PixStack_PixelFlowCanvas', ULTRA = 'PixStack_UltraPixelCanvas'

/** The picker of a canvas node that is alone, its widgets set as by another extension: without a word. */
async function canvas(page, type, set = {}, size = undefined) {
  await one(page, type, size)
  await page.evaluate(([type, set]) => {
    const node = window.app.graph._nodes.find((one) => one.type === type)
    for (const [name, value] of Object.entries(set)) node.widgets.find((one) => one.name === name).value = value
    node.setDirtyCanvas(true, true)
    window.app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()
  }, [type, set])
  return page.locator('.pixstack-size')
}

const says = (page, words) => page.waitForFunction((words) =>
  document.querySelector('.pixstack-size .about')?.innerText.replaceAll('\u00a0', ' ').includes(words), words)
const all = async (page, type, ...names) => Promise.all(names.map((name) => value(page, type, name)))
const shown = (page) => page.evaluate(() => window.app.graph._nodes[0].widgets.filter((widget) => !widget.hidden)
  .map((widget) => widget.name).filter((name) => !name.startsWith('pixstack')))

/** Where a size stands in the drawing of `extent` pixels, on the screen. */
async function at(picker, [width, height], extent) {
  const box = await picker.locator('.plot').boundingBox()
  return [box.x + (width / extent) * box.width, box.y + box.height - (height / extent) * box.height]
}

export async function dragging_chooses_trained_sizes_and_is_one_step_of_undo({ page, shot }) {
  const picker = await canvas(page, PIXART, { resolution: '1024' })
  await says(page, '1024 × 1024')
  await page.mouse.move(...(await at(picker, [1024, 1024], 2048)))
  await page.mouse.down()
  await page.mouse.move(...(await at(picker, [1200, 800], 2048)))
  await page.mouse.move(...(await at(picker, [1350, 770], 2048)))
  await shot('dragged')
  await page.mouse.up()
  assert.deepEqual(await all(page, PIXART, 'shape', 'width', 'height'), ['16:9', 1344, 768])
  await says(page, '4,032 tokens')
  await undo(page)
  assert.deepEqual(await all(page, PIXART, 'shape', 'width', 'height'), ['1:1', 1024, 1024])
  await says(page, '1024 × 1024')
}

export async function a_size_that_no_menu_names_is_taken_by_example({ page }) {
  const picker = await canvas(page, PIXART, { resolution: '1024' })
  await says(page, '1024 × 1024')
  await page.mouse.click(...(await at(picker, [1088, 960], 2048)))
  assert.deepEqual(await all(page, PIXART, 'shape', 'width', 'height'), ['nearest to width x height', 1088, 960])
  assert.ok((await shown(page)).includes('width'))
  await says(page, '1088 × 960')
}

export async function arrow_keys_make_a_picture_wider_and_taller({ page }) {
  const picker = await canvas(page, PIXART, { resolution: '512' })
  await says(page, '512 × 512')
  await picker.locator('.plot').focus()
  await page.keyboard.press('ArrowRight')
  assert.deepEqual(await all(page, PIXART, 'width', 'height'), [512, 480])
  await says(page, '960 tokens')
  await page.keyboard.press('ArrowUp')
  await page.keyboard.press('ArrowUp')
  assert.deepEqual(await all(page, PIXART, 'width', 'height'), [480, 512])
  await undo(page)
  assert.deepEqual(await all(page, PIXART, 'width', 'height'), [512, 512])
}

export async function only_what_counts_for_the_chosen_way_is_shown({ page }) {
  await canvas(page, PIXART)
  await says(page, '1024')
  assert.deepEqual(await shown(page), ['resolution', 'shape', 'batch_size'])
  await canvas(page, ULTRA)
  await says(page, '2048')
  assert.deepEqual(await shown(page), ['shape', 'side', 'batch_size'])
  await canvas(page, ULTRA, { shape: 'custom (width, height)', height: 1800 })
  await says(page, '2048 × 1800')
  assert.deepEqual(await shown(page), ['shape', 'width', 'height', 'batch_size'])
}

export async function a_free_size_is_dragged_and_typed_and_warned_about({ page, shot }) {
  const picker = await canvas(page, ULTRA, { shape: 'custom (width, height)', height: 1800 })
  await says(page, '2048 × 1800')
  await page.mouse.move(...(await at(picker, [2048, 1800], 4608)))
  await page.mouse.down()
  await page.mouse.move(...(await at(picker, [4400, 400], 4608)))
  await page.mouse.up()
  const [width, height] = await all(page, ULTRA, 'width', 'height')
  assert.ok(width > 4200 && height < 520 && width % 8 === 0 && height % 8 === 0, `${width} x ${height}`)
  await says(page, 'the training saw up to')
  await shot('warned')
  await picker.locator('.plot').focus()
  await page.keyboard.press('ArrowUp')
  assert.equal(await value(page, ULTRA, 'height'), height + 8)
}

export async function a_wrong_value_is_said_as_the_node_would_and_dragged_right({ page, shot }) {
  const picker = await canvas(page, PIXART, { resolution: '1024', shape: 'exactly width x height', width: 1000 })
  await says(page, '1000x1024 pixels do not fit PixArt')
  await shot('wrong')
  await page.mouse.click(...(await at(picker, [1500, 700], 2048)))
  await says(page, 'tokens')
  const sizes = await all(page, PIXART, 'width', 'height')
  assert.ok(sizes.every((edge) => edge % 16 === 0), `${sizes}`)
}

export async function a_chosen_size_is_saved_and_opened_as_it_was({ page, renderer }) {
  const picker = await canvas(page, PIXART, { resolution: '1024' })
  await says(page, '1024 × 1024')
  await page.mouse.click(...(await at(picker, [704, 1408], 2048)))
  await says(page, '704 × 1408')
  const workflow = await saved(page)
  assert.deepEqual(workflow.nodes[0].widgets_values, ['1024', '1:2', 704, 1408, 1])
  await one(page, ULTRA)
  await load(page, workflow)
  await says(page, '704 × 1408')
  const [node] = (await saved(page)).nodes, [before] = workflow.nodes
  assert.deepEqual(node.widgets_values, before.widgets_values)
  if (renderer === 'classic') assert.deepEqual(node, before) // Nodes 2.0 measure every node anew
}

export async function a_model_decides_before_it_is_loaded({ page, shot }) {
  await one(page, FLOW)
  await says(page, 'Connect a PixelFlow model')
  await page.evaluate((FLOW) => {
    const canvas = window.app.graph._nodes.find((one) => one.type === FLOW)
    const loader = window.LiteGraph.createNode('PixStack_PixelFlowLoader')
    window.app.graph.add(loader)
    loader.pos = [0, 320]
    loader.widgets.find((one) => one.name === 'model_name').value = 'pixelflow_emoji_64.safetensors'
    loader.connect(0, canvas, 0)
  }, FLOW)
  await says(page, '64 × 64')
  await shot('stages')
  await page.evaluate((FLOW) => {
    const canvas = window.app.graph._nodes.find((one) => one.type === FLOW)
    canvas.disconnectInput(0)
  }, FLOW)
  await says(page, 'Connect a PixelFlow model')
}

export async function a_node_without_its_switch_is_as_it_was({ page }) {
  const settings = (on) => page.evaluate((on) => window.app.ui.settings.setSettingValueAsync('PixStack.SizePicker', on), on)
  await settings(false)
  await one(page, PIXART)
  await drawn(page)
  assert.equal(await page.locator('.pixstack-size').count(), 0)
  assert.deepEqual(await shown(page), ['resolution', 'shape', 'width', 'height', 'batch_size'])
  await settings(true)
}
