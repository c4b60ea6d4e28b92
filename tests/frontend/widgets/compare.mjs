// The slider of 'Compare Pictures', and the film strip of 'PixelFlow Sample'.
import assert from 'node:assert/strict'
import { build, fit, run } from '../page.mjs'

const NODE = 'PixStack_ComparePictures'

const example = (picture, pos) => ({ type: 'PixStack_ExamplePicture', values: { picture }, pos })
const part = (page) => page.locator('.compare .board').getAttribute('aria-valuenow').then(Number)

async function two(page, size = [380, 420]) {
  await build(page, [example('lion', [0, 0]), example('lion_hed', [0, 160]), { type: NODE, pos: [320, 0], size }],
    [[0, 0, 2, 'image_a'], [1, 0, 2, 'image_b']])
}

export async function two_pictures_lie_under_a_slider({ page, shot }) {
  await two(page)
  assert.match(await page.locator('.compare').innerText(), /Run/)
  await run(page)
  await page.waitForFunction(() => [...document.querySelectorAll('.compare .picture img')].every((one) => one.naturalWidth === 128))
  assert.equal(await part(page), 50)
  const pos = () => page.evaluate((type) => [...window.app.graph._nodes.find((one) => one.type === type).pos], NODE)
  const still = await pos()
  const box = await page.locator('.compare .picture').boundingBox()
  assert.ok(box.width > 200 && Math.abs(box.width - box.height) < 2, `the picture is ${box.width} x ${box.height}`)
  await page.mouse.move(box.x + box.width / 2, box.y + box.height / 2)
  await page.mouse.down()
  await page.mouse.move(box.x + box.width * 0.6, box.y + box.height / 3)
  await page.mouse.move(box.x + box.width * 0.25, box.y + box.height / 3)
  await page.mouse.up()
  assert.equal(await part(page), 25)
  await page.mouse.move(box.x + box.width * 0.9, box.y + box.height / 2)
  assert.equal(await part(page), 25, 'it follows only what is held down')
  await shot('slider')
  assert.deepEqual(await pos(), still, 'the node stays where it is')
}

export async function keys_move_the_slider_and_not_the_node({ page }) {
  await two(page)
  await run(page)
  await page.locator('.compare .board').focus()
  for (const key of ['ArrowRight', 'ArrowRight', 'Shift+ArrowLeft']) await page.keyboard.press(key)
  assert.equal(await part(page), 42)
  await page.keyboard.press('End')
  assert.equal(await part(page), 100)
  await page.keyboard.press('Home')
  assert.equal(await part(page), 0)
}

export async function batches_are_compared_pair_by_pair({ page, shot }) {
  await build(page, [example('lion', [0, 0]), example('rose', [0, 130]), example('mushroom', [0, 260]),
    { type: 'ImageBatch', pos: [320, 130] }, { type: NODE, pos: [560, 0], size: [380, 420] }],
  [[1, 0, 3, 'image1'], [2, 0, 3, 'image2'], [0, 0, 4, 'image_a'], [3, 0, 4, 'image_b']])
  await run(page)
  const sources = () => page.locator('.compare .picture img').evaluateAll((all) => all.map((one) => one.src))
  const [first, lion] = await sources()
  assert.match(await page.locator('.compare .pager').innerText(), /1 of 2/)
  await page.locator('.compare .pager button').last().click()
  const [second, again] = await sources()
  assert.ok(first !== second && lion === again, 'the shorter batch begins again')
  await page.locator('.compare .board').focus()
  await page.keyboard.press('PageDown')
  assert.deepEqual(await sources(), [first, lion])
  await shot('batch')
}

export async function no_preview_of_cores_stands_below_the_slider({ page, renderer }) {
  await two(page)
  await run(page)
  await fit(page)
  await page.waitForTimeout(300)
  const seen = await page.evaluate(([type, renderer]) => {
    const node = window.app.graph._nodes.find((one) => one.type === type)
    if (renderer === 'classic') return node.widgets.filter((one) => one.name.startsWith('$$')).length
    const own = document.querySelector(`[data-node-id="${node.id}"]`)
    return [...own.querySelectorAll('img')].filter((one) => !one.closest('.compare') && one.getBoundingClientRect().height).length
  }, [NODE, renderer])
  assert.equal(seen, 0)
}

export async function the_film_strip_comes_with_the_first_run({ page, renderer, shot }) {
  await build(page, [
    { type: 'PixStack_PixelFlowLoader', values: { model_name: 'pixelflow_emoji_64.safetensors' }, pos: [0, 0] },
    { type: 'PixStack_PixelFlowTextEncoderLoader', values: { encoder_name: 'pixelflow_emoji_t5.safetensors' }, pos: [0, 200] },
    { type: 'CLIPTextEncode', values: { text: 'red heart' }, pos: [360, 200], size: [300, 120] },
    { type: 'PixStack_PixelFlowCanvas', pos: [360, 0], values: { batch_size: 2 } },
    { type: 'PixStack_PixelFlowSample', values: { steps: 1, cfg: 1, seed: Math.floor(Math.random() * 1e9) }, pos: [720, 0], size: [320, 400] },
    { type: 'PreviewImage', pos: [1100, 0] }],
  [[0, 0, 3, 'model'], [0, 0, 4, 'model'], [1, 0, 2, 'clip'], [2, 0, 4, 'positive'], [2, 0, 4, 'negative'],
    [3, 0, 4, 'latent'], [4, 1, 5, 'images']])
  const height = () => page.evaluate(() => window.app.graph._nodes.find((one) => one.type === 'PixStack_PixelFlowSample').size[1])
  const before = await height()
  assert.equal(await page.locator('.film').isVisible(), false)
  await run(page)
  await page.waitForFunction(() => document.querySelector('.film img')?.naturalWidth === 776)
  assert.deepEqual(await page.locator('.film .sizes span').allInnerTexts(), ['16 × 16', '32 × 32', '64 × 64'])
  if (renderer === 'classic') assert.ok(await height() > before + 60, `${before}, then ${await height()} pixels high`)
  const source = () => page.locator('.film img').getAttribute('src')
  const first = await source()
  await page.locator('.film .pager button').last().click()
  assert.notEqual(await source(), first)
  await shot('film')
}
