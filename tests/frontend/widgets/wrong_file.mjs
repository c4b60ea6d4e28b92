// A loader that refuses another family's file, and the button that changes it.
import assert from 'node:assert/strict'
import { drawn, hurry, load, shipped, undo } from '../page.mjs'

const WRONG = 'PixStack_PixArtLoader', RIGHT = 'PixStack_PixelFlowLoader', FILE = 'pixelflow_emoji_64.safetensors'
const WORKFLOW = shipped('pixelflow_text_to_image')

export async function the_button_changes_the_loader_and_the_graph_runs({ page, renderer, shot }) {
  await load(page, withTheWrongLoader())
  const [place] = await nodes(page, WRONG)
  const refused = await queued(page)
  assert.equal(refused.event, 'execution_error')
  assert.match(refused.message, /is not a PixArt checkpoint.*'Load PixelFlow Model'/s)
  assert.deepEqual(await offered(page), ['Use Load PixelFlow Model', '✕'])
  await shot('offered')
  await page.click('.pixstack-offer >> text=Use Load PixelFlow Model')
  await drawn(page)
  assert.deepEqual([await nodes(page, WRONG), await offered(page)], [[], []])
  const [changed] = await nodes(page, RIGHT)
  assert.deepEqual([changed.file, ...changed.pos.map(Math.round)], [FILE, ...place.pos.map(Math.round)])
  await shot('changed')
  await undo(page)
  assert.equal((await nodes(page, WRONG)).length, 1)
  await page.evaluate(() => window.app.extensionManager.workflow.activeWorkflow.changeTracker.redo())
  await drawn(page)
  await hurry(page)
  const done = await queued(page)
  assert.deepEqual([done.event, done.images > 0], ['execution_success', true])
}

export async function another_file_in_the_menu_leaves_the_node_as_it_is({ page }) {
  await load(page, withTheWrongLoader())
  await tell(page, { kind: 'PixelFlow' })
  await page.evaluate((type) => {
    window.app.graph._nodes.find((one) => one.type === type).widgets[0].value = 'pixart_emoji_128.safetensors'
  }, WRONG)
  await page.click('.pixstack-offer button')
  assert.deepEqual([(await nodes(page, WRONG)).length, await offered(page)], [1, []])
}

export async function a_file_that_no_other_node_lists_is_not_offered({ page }) {
  await load(page, withTheWrongLoader())
  await tell(page, { kind: 'PixelFlow', file: 'not there.safetensors' })
  assert.deepEqual(await offered(page), [])
}

export async function names_are_shown_as_text({ page }) {
  await load(page, withTheWrongLoader())
  const markup = '<img src=x onerror="window.taken = true">'
  await page.evaluate(([type, markup]) => {
    window.app.graph._nodes.find((one) => one.type === type).title = markup
  }, [WRONG, markup])
  await tell(page, { kind: markup })
  assert.ok((await page.innerText('.pixstack-offer')).includes(markup))
  await page.click('.pixstack-offer button')
  await drawn(page)
  assert.equal(await page.evaluate(() => window.taken), undefined)
}

function withTheWrongLoader() {
  const workflow = structuredClone(WORKFLOW)
  const loader = workflow.nodes.find((node) => node.type === RIGHT)
  assert.equal(loader.widgets_values[0], FILE)
  Object.assign(loader, { type: WRONG, inputs: [], widgets_values: [FILE, 'auto', 'auto', 'auto', 'ema', 'default'] })
  delete loader.title
  return workflow
}

/** What came of a press on Run. */
const queued = (page) => page.evaluate(async () => {
  const { app } = window
  const done = new Promise((resolve) => {
    for (const event of ['execution_success', 'execution_error', 'execution_interrupted'])
      app.api.addEventListener(event, ({ detail }) => resolve({ event, message: detail?.exception_message ?? '' }), { once: true })
  })
  await app.queuePrompt(0, 1)
  const refused = Object.values(app.lastNodeErrors ?? {})
  if (refused.length) throw new Error(JSON.stringify(refused))
  const { event, message } = await done
  const save = app.graph._nodes.find((node) => node.type === 'SaveImage')
  return { event, message, images: app.nodeOutputs[save.id]?.images?.length ?? 0 }
})

const nodes = (page, type) => page.evaluate((type) => window.app.graph._nodes.filter((node) => node.type === type)
  .map((node) => ({ id: node.id, pos: [...node.pos], file: node.widgets[0].value })), type)

const offered = (page) => page.$$eval('.pixstack-offer button', (buttons) => buttons.map((button) => button.innerText))

/** What the server says when the loader has refused its file. */
const tell = (page, about) => page.evaluate(([type, right, file, about]) => {
  const { id } = window.app.graph._nodes.find((one) => one.type === type)
  const detail = { prompt_id: '', node_id: String(id), input: 'model_name', file, folder: 'diffusion_models', nodes: [right], ...about }
  window.app.api.dispatchEvent(new CustomEvent('pixstack.wrong_file', { detail }))
}, [WRONG, RIGHT, FILE, about])
