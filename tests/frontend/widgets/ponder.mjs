// The map of 'PixelPonder Map', and the rows of 'PixelPonder Conditions'.
import assert from 'node:assert/strict'
import { build, drawn, load, prompt, run, saved, value } from '../page.mjs'

const NODE = 'PixStack_PixelPonderConditions'

// With a seed of its own each time: what ComfyUI has drawn already it does not send again.
const graph = () => [[
  { type: 'PixStack_FluxLoader', values: { model_name: 'flux_emoji_128.safetensors' }, pos: [0, 0] },
  { type: 'PixStack_PixelFlowTextEncoderLoader', values: { encoder_name: 'pixelflow_emoji_t5.safetensors', type: 'flux' }, pos: [0, 140] },
  { type: 'CLIPTextEncode', values: { text: 'lion' }, pos: [0, 340], size: [300, 100] },
  { type: 'PixStack_PixelPonderLoader', values: { control_net_name: 'pixelponder_emoji.safetensors' }, pos: [0, 500] },
  { type: 'PixStack_ExamplePicture', values: { picture: 'lion' }, pos: [360, 0] },
  { type: 'PixStack_CannyEdges', pos: [360, 120] },
  { type: 'PixStack_ExamplePicture', values: { picture: 'lion_hed' }, pos: [360, 340] },
  { type: NODE, values: { settings: 'canny\nhed' }, pos: [720, 0], size: [360, 320] },
  { type: 'PixStack_PixelPonderApply', values: { strategy: 'accumulate', strength: 1 }, pos: [720, 440] },
  { type: 'EmptySD3LatentImage', values: { width: 128, height: 128 }, pos: [360, 500] },
  { type: 'KSampler', values: { steps: 4, cfg: 1, seed: Math.floor(Math.random() * 1e9) }, pos: [1120, 0] },
  { type: 'PixStack_PixelPonderMap', pos: [1120, 320], size: [340, 460] },
  { type: 'PreviewImage', pos: [1500, 0] }],
[[1, 0, 2, 'clip'], [4, 0, 5, 'image'], [5, 0, 7, 'hints.hint_1'], [2, 0, 8, 'positive'], [2, 0, 8, 'negative'],
  [3, 0, 8, 'control_net'], [7, 0, 8, 'conditions'], [0, 0, 10, 'model'], [8, 0, 10, 'positive'], [8, 1, 10, 'negative'],
  [9, 0, 10, 'latent_image'], [8, 0, 11, 'positive'], [10, 0, 11, 'latent'], [11, 0, 12, 'images']]]

/** Connect the second hint, as a person would when its slot has come. */
async function second(page) {
  await page.waitForFunction((type) => window.app.graph._nodes.find((one) => one.type === type)
    .inputs.some((input) => input.name === 'hints.hint_2'), NODE)
  await page.evaluate((type) => {
    const { graph } = window.app
    const node = graph._nodes.find((one) => one.type === type)
    const hed = graph._nodes.filter((one) => one.type === 'PixStack_ExamplePicture')[1]
    hed.connect(0, node, node.inputs.findIndex((input) => input.name === 'hints.hint_2'))
  }, NODE)
  await drawn(page)
}

const hints = (page) => page.evaluate((type) => window.app.graph._nodes.find((one) => one.type === type)
  .inputs.map((input) => input.name).filter((name) => name.startsWith('hints.')), NODE)

export async function slots_come_when_the_last_is_connected_and_are_saved({ page }) {
  await build(page, ...graph())
  await page.waitForFunction((type) => window.app.graph._nodes.find((one) => one.type === type)
    .inputs.filter((input) => input.name.startsWith('hints.')).length === 2, NODE)
  await second(page)
  await page.waitForTimeout(100)
  assert.deepEqual(await hints(page), ['hints.hint_1', 'hints.hint_2', 'hints.hint_3'])
  const sent = await prompt(page)
  const inputs = Object.values(sent).find((one) => one.class_type === NODE).inputs
  assert.deepEqual([inputs['hints.hint_1'][0], inputs['hints.hint_2'][0]], ['6', '7'])
  await load(page, await saved(page))
  await page.waitForTimeout(300)
  assert.deepEqual(await prompt(page), sent)
  assert.deepEqual(await hints(page), ['hints.hint_1', 'hints.hint_2', 'hints.hint_3'])
}

export async function each_hint_has_a_row_that_writes_its_line({ page, shot }) {
  await build(page, ...graph())
  await second(page)
  const field = (name) => page.locator(`.conditions [data-field="${name}"]`)
  await page.waitForFunction(() => document.querySelectorAll('.conditions select').length === 2)
  assert.equal(await field('kind 2').inputValue(), 'hed')
  await field('kind 2').selectOption('pose')
  await field('strength 2').fill('0.5')
  await field('strength 2').press('Enter')
  await field('end 1').fill('7')
  await field('end 1').press('Enter')
  assert.equal(await value(page, NODE, 'settings'), 'canny\npose strength=0.5', 'a number stays in its range')
  await field('priority 1').fill('3')
  await field('priority 1').press('Tab')
  assert.equal(await value(page, NODE, 'settings'), 'canny priority=3\npose strength=0.5')
  await shot('rows')
}

export async function the_map_follows_the_sampling_and_goes_back({ page, shot }) {
  await build(page, ...graph())
  await second(page)
  await page.evaluate(() => {
    window.steps = []
    window.app.api.addEventListener('pixstack.map', ({ detail }) => window.steps.push(detail.step))
  })
  assert.match(await page.locator('.map .empty').innerText(), /Run/)
  await run(page)
  assert.deepEqual(await page.evaluate(() => window.steps), [1, 2, 3, 4])
  const canvas = page.locator('.map canvas')
  await page.waitForFunction(() => /step 4 of 4/.test(document.querySelector('.map').innerText))
  await page.waitForFunction(() => document.querySelector('.map canvas').dataset.shares)
  const shares = async () => (await canvas.getAttribute('data-shares')).split(' ').map(Number)
  const last = await shares()
  assert.ok(last.length === 2 && Math.abs(last[0] + last[1] - 1) < 0.01, `${last}`)
  assert.match(await page.locator('.map .legend').innerText(), /1 canny \d+ %\s*2 hed \d+ %/)
  await shot('map')
  await page.locator('.map input').focus()
  await page.keyboard.press('Home')
  await drawn(page)
  assert.match(await page.locator('.map').innerText(), /step 1 of 4/)
  await page.keyboard.press('ArrowRight')
  await drawn(page)
  assert.match(await page.locator('.map').innerText(), /step 2 of 4/)
}
