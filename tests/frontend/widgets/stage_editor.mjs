// The stage editor of PixelFlow's nodes, used as a person uses it.
import assert from 'node:assert/strict'
import { load, one, saved, undo, value } from '../page.mjs'

const SIGMAS = 'PixStack_PixelFlowSigmas', SAMPLER = 'PixStack_PixelFlowSampler', SAMPLE = 'PixStack_PixelFlowSample'

const set = (page, type, wanted) => page.evaluate(([type, wanted]) => {
  const node = window.app.graph._nodes.find((one) => one.type === type)
  for (const [name, value] of Object.entries(wanted)) node.widgets.find((one) => one.name === name).value = value
  node.setDirtyCanvas(true, true)
  window.app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()
}, [type, wanted])
const says = (page, words) => page.waitForFunction((words) =>
  document.querySelector('.pixstack-stages .said')?.textContent.includes(words), words)
const bar = (page, row, stage) => page.locator(`.pixstack-stages [data-row="${row}"][data-stage="${stage}"]`)
const shown = (page, row) => page.$$eval(`.pixstack-stages [data-row="${row}"] span`, (all) => all.map((one) => one.textContent))

/** Drag a bar to a share of its height. */
async function drag(page, row, stage, share) {
  const box = await bar(page, row, stage).boundingBox()
  const x = box.x + box.width / 2
  await page.mouse.move(x, box.y + box.height / 2)
  await page.mouse.down()
  await page.mouse.move(x, box.y + box.height * (1 - share / 2))
  await page.mouse.move(x, box.y + box.height * (1 - share))
  await page.mouse.up()
}

export async function a_dragged_bar_writes_the_steps_of_its_stage_and_is_one_step_of_undo({ page, shot }) {
  await one(page, SIGMAS)
  await says(page, '40 steps')
  await drag(page, 'steps', 0, 0.75)
  assert.equal(await value(page, SIGMAS, 'steps'), '15, 10, 10, 10')
  await says(page, '45 steps')
  await shot('dragged')
  await undo(page)
  assert.equal(await value(page, SIGMAS, 'steps'), '10')
  await says(page, '40 steps')
}

export async function arrow_keys_change_one_stage_and_with_shift_all({ page }) {
  await one(page, SIGMAS)
  await says(page, '40 steps')
  await bar(page, 'shift', 3).focus()
  await page.keyboard.press('ArrowUp')
  assert.equal(await value(page, SIGMAS, 'shift'), '1, 1, 1, 1.1')
  await page.keyboard.press('ArrowLeft')
  await page.keyboard.press('Shift+ArrowUp')
  assert.deepEqual(await shown(page, 'shift'), ['1.1', '1.1', '1.1', '1.1'])
  assert.match(await value(page, SIGMAS, 'shift'), /^1\.1(, 1\.1)*$/)
}

export async function an_error_is_said_on_the_node_and_dragged_away({ page, shot }) {
  await one(page, SIGMAS)
  await set(page, SIGMAS, { steps: '20, x, 5' })
  await says(page, "steps='20, x, 5' is not a number")
  await shot('wrong')
  await drag(page, 'steps', 1, 0.5)
  await says(page, 'steps in all')
  assert.match(await value(page, SIGMAS, 'steps'), /^10(, 10)*$/)
}

export async function a_preset_sets_what_it_names({ page }) {
  await one(page, SAMPLE)
  await says(page, '40 steps')
  await page.click('.pixstack-stages button:text-is("Evaluation")')
  assert.deepEqual([await value(page, SAMPLE, 'steps'), await value(page, SAMPLE, 'cfg')], [30, 2.4])
  await says(page, '120 steps')
  await undo(page)
  assert.equal(await value(page, SAMPLE, 'steps'), 10)
}

export async function the_stages_are_those_of_the_model({ page, shot }) {
  await one(page, SIGMAS)
  await says(page, '40 steps')
  await page.evaluate((SIGMAS) => {
    const node = window.app.graph._nodes.find((one) => one.type === SIGMAS)
    const loader = window.LiteGraph.createNode('PixStack_PixelFlowLoader')
    window.app.graph.add(loader)
    loader.pos = [0, 420]
    loader.widgets.find((one) => one.name === 'model_name').value = 'pixelflow_emoji_64.safetensors'
    loader.connect(0, node, 0)
  }, SIGMAS)
  await says(page, '30 steps')
  await set(page, SIGMAS, { start_stage: 1, steps: '20, 10, 5' })
  await says(page, '15 steps')
  assert.deepEqual(await shown(page, 'steps'), ['20', '10', '5'])
  assert.equal(await page.locator('.pixstack-stages .stage-bar.unused').count(), 2) // of steps and of shift
  await shot('stages')
}

export async function dragging_guidance_makes_it_custom_and_is_saved({ page, shot }) {
  await one(page, SAMPLER)
  await says(page, 'As with a cfg of 4')
  await page.click('.pixstack-stages button:text-is("Scaled")')
  await page.waitForFunction(() => document.querySelector('.pixstack-stages .stage-bar span').textContent === '1')
  await drag(page, 'guidance', 0, 0.25)
  assert.deepEqual([await value(page, SAMPLER, 'guidance'), await value(page, SAMPLER, 'custom_guidance')],
    ['custom', '2, 1.5, 3, 4'])
  await shot('guidance')
  const workflow = await saved(page)
  await one(page, SIGMAS)
  await load(page, workflow)
  await page.waitForFunction(() => document.querySelector('.pixstack-stages .stage-bar span')?.textContent === '2')
  assert.deepEqual((await saved(page)).nodes[0].widgets_values, workflow.nodes[0].widgets_values)
}
