// The brush of 'Paint Conditions'.
import assert from 'node:assert/strict'
import { build, drawn, load, one, prompt, run, saved, undo, value } from '../page.mjs'

const NODE = 'PixStack_PaintConditions'
const SIZE = [400, 560]
const strokes = (page) => value(page, NODE, 'strokes')

/** Drag over the board through places, each from 0 to 1. */
async function drag(page, ...places) {
  const box = await page.locator('.paint .picture').boundingBox()
  const at = ([x, y]) => [box.x + x * box.width, box.y + y * box.height]
  await page.mouse.move(...at(places[0]))
  await page.mouse.down()
  for (const place of places.slice(1)) await page.mouse.move(...at(place), { steps: 8 })
  await page.mouse.up()
  await drawn(page)
}

/** [red, green, blue, alpha] of what is painted at a place of the board. */
const colour = (page, x, y) => page.evaluate(([x, y]) => {
  const canvas = document.querySelector('.paint canvas')
  return [...canvas.getContext('2d').getImageData(Math.floor(x * canvas.width), Math.floor(y * canvas.height), 1, 1).data]
}, [x, y])
const ORANGE = [230, 159, 0, 255], BLUE = [86, 180, 233, 255], NONE = [0, 0, 0, 0]

export async function a_drag_paints_a_stroke_that_is_saved_and_sent({ page, renderer, shot }) {
  await one(page, NODE, SIZE)
  assert.match(await page.locator('.paint .note').innerText(), /Connect hints/)
  await drag(page, [0.25, 0.25], [0.75, 0.25])
  const [stroke] = [await strokes(page)]
  const [kind, size, x, y, dx, dy, ...rest] = stroke.split(' ').map(Number)
  assert.deepEqual([kind, size, rest.length], [1, 80, 0], `a straight line is two points: ${stroke}`)
  for (const [is, wanted] of [[x, 1024], [y, 1024], [dx, 2048], [dy, 0]]) assert.ok(Math.abs(is - wanted) < 20, stroke)
  assert.deepEqual(await colour(page, 0.5, 0.25), ORANGE)
  await page.locator('.paint button.colour').nth(1).click()
  await drag(page, [0.5, 0.1], [0.6, 0.5], [0.4, 0.9])
  assert.deepEqual([await colour(page, 0.54, 0.25), await colour(page, 0.3, 0.25)], [BLUE, ORANGE])
  await shot('painted')
  const all = await strokes(page)
  assert.match(all, /^1 80 [^;]*; 2 80 [^;]*$/)
  assert.equal(Object.values(await prompt(page))[0].inputs.strokes, all)
  const workflow = await saved(page)
  await one(page, 'PixStack_ExamplePicture')
  await load(page, workflow)
  assert.equal(await strokes(page), all)
  assert.deepEqual([await colour(page, 0.3, 0.25), await colour(page, 0.9, 0.9)], [ORANGE, NONE])
  if (renderer === 'classic') assert.deepEqual((await saved(page)).nodes[0].size, workflow.nodes[0].size)
}

export async function erase_undo_redo_and_clear({ page }) {
  await one(page, NODE, SIZE)
  const button = (name) => page.locator('.paint').getByRole('button', { name })
  await drag(page, [0.2, 0.5], [0.8, 0.5])
  await page.locator('.paint .eraser').click()
  await drag(page, [0.5, 0.3], [0.5, 0.7])
  assert.deepEqual([await colour(page, 0.5, 0.5), await colour(page, 0.3, 0.5)], [NONE, ORANGE])
  const both = await strokes(page)
  await button('Undo a stroke').click()
  assert.deepEqual(await colour(page, 0.5, 0.5), ORANGE)
  await button('Redo').click()
  assert.equal(await strokes(page), both)
  await button('Clear').click()
  assert.deepEqual([await strokes(page), await colour(page, 0.3, 0.5)], ['', NONE])
  await button('Undo a stroke').click()
  assert.equal(await strokes(page), both, 'clearing can be undone')
  await undo(page)
  assert.equal(await strokes(page), '', "and the canvas's own undo takes back what was done last")
}

export async function the_keyboard_paints_too({ page }) {
  await one(page, NODE, SIZE)
  await page.locator('.paint .board').focus()
  await page.keyboard.press('2')
  for (const key of ['ArrowRight', 'ArrowRight', 'Space', 'Shift+ArrowDown']) await page.keyboard.press(key)
  assert.match(await strokes(page), /^2 80 2212 2048; 2 80 2212 2048 0 82$/)
  await page.keyboard.press(']')
  await page.keyboard.press('e')
  await page.keyboard.press('Space')
  assert.match(await strokes(page), /; 0 115 2212 2130$/)
  await page.keyboard.press('Control+z')
  await page.keyboard.press('Control+z')
  assert.equal(await strokes(page), '2 80 2212 2048')
  await page.keyboard.press('Control+Shift+z')
  assert.match(await strokes(page), /; 2 80 2212 2048 0 82$/)
  await page.keyboard.press('Delete')
  assert.equal(await strokes(page), '')
  assert.equal((await saved(page)).nodes.length, 1, 'the node is still there')
}

export async function the_masks_of_a_run_are_what_was_painted({ page, shot }) {
  await build(page, [{ type: 'PixStack_ExamplePicture', values: { picture: 'lion' }, pos: [0, 0] },
    { type: 'PixStack_ExamplePicture', values: { picture: 'lion_hed' }, pos: [0, 130] },
    { type: NODE, pos: [320, 0], size: SIZE }, { type: 'MaskPreview', pos: [800, 0], size: [300, 320] }],
  [[0, 0, 2, 'hint_1'], [1, 0, 2, 'hint_2'], [2, 1, 3, 'mask']])
  assert.match(await page.locator('.paint .note').innerText(), /Run once/)
  await page.locator('.paint button.colour').nth(1).click()
  await drag(page, [0.3, 0.3], [0.7, 0.4], [0.4, 0.8])
  await run(page)
  await page.waitForFunction(() => document.querySelector('.paint img')?.naturalWidth === 128)
  const differing = await page.evaluate(async ([type]) => {
    const { app } = window
    const preview = app.graph._nodes.find((one) => one.type === type)
    const file = app.nodeOutputs[preview.id].images[0]
    const image = new Image()
    image.src = app.api.apiURL(`/view?${new URLSearchParams(file)}`)
    await image.decode()
    const pixels = (source) => {
      const context = new OffscreenCanvas(128, 128).getContext('2d')
      context.drawImage(source, 0, 0, 128, 128)
      return context.getImageData(0, 0, 128, 128).data
    }
    const mask = pixels(image), board = pixels(document.querySelector('.paint canvas'))
    let differ = 0, painted = 0
    for (let i = 0; i < mask.length; i += 4) {
      differ += Math.abs(mask[i] - board[i + 3]) > 200
      painted += mask[i] > 128
    }
    return [differ, painted]
  }, ['MaskPreview'])
  assert.ok(differing[1] > 400, `${differing[1]} pixels are painted`)
  assert.ok(differing[0] <= 4, `${differing[0]} pixels differ`)
  const source = () => page.locator('.paint img').getAttribute('src')
  const second = await source()
  await page.locator('.paint button.colour').first().click()
  assert.notEqual(await source(), second, 'each colour has its own hint')
  await shot('hints')
}

export async function a_text_that_is_no_painting_is_said_and_can_be_cleared({ page }) {
  await one(page, NODE, SIZE)
  await page.evaluate((type) => {
    const node = window.app.graph._nodes.find((one) => one.type === type)
    node.widgets.find((one) => one.name === 'strokes').value = '1 20 <b>no</b>'
  }, NODE)
  await page.waitForFunction(() => /cannot be read/.test(document.querySelector('.paint .note').textContent))
  await page.locator('.paint').getByRole('button', { name: 'Clear' }).click()
  assert.equal(await strokes(page), '')
}
