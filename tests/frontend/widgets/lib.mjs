// What widgets share, on a node without a widget of ours.
import assert from 'node:assert/strict'
import { drawn, one, prompt, saved, undo, value } from '../page.mjs'

const NODE = 'PixStack_PixArtSizeCondition'
const LIB = '/extensions/pixstack/lib.mjs'

/** A button on the node that doubles the width, and hides the height while the width is small. */
async function button(page) {
  await one(page, NODE)
  await page.evaluate(async ([LIB, NODE]) => {
    const lib = await import(LIB)
    const node = window.app.graph._nodes.find((one) => one.type === NODE)
    const element = lib.make('button', { id: 'pixstack-test' })
    element.onclick = () => {
      lib.set(node, { width: lib.widgetOf(node, 'width').value * 2 })
      lib.remember()
    }
    lib.mount(node, 'pixstack_test', element, {
      height: 60,
      state: () => lib.values(node, ['width']),
      draw: ({ width }) => { element.textContent = `width ${width}` },
      hidden: () => ['aspect_ratio', ...(lib.widgetOf(node, 'width').value > 1024 ? [] : ['height'])]
    })
    window.app.canvas.setDirty(true, true)
  }, [LIB, NODE])
  await page.waitForFunction(() => document.getElementById('pixstack-test')?.getBoundingClientRect().height)
  await drawn(page)
  return page.locator('#pixstack-test')
}

const hidden = (page) => page.evaluate((NODE) => window.app.graph._nodes.find((node) => node.type === NODE)
  .widgets.filter((widget) => widget.hidden).map((widget) => widget.name), NODE)

export async function a_gesture_sets_a_widget_and_is_one_step_of_undo({ page }) {
  const element = await button(page)
  await page.evaluate(async (LIB) => (await import(LIB)).remember(), LIB)
  await element.click()
  assert.equal(await value(page, NODE, 'width'), 2048)
  assert.equal(await element.innerText(), 'width 2048')
  await undo(page)
  assert.equal(await value(page, NODE, 'width'), 1024)
}

export async function a_mounted_element_is_neither_saved_nor_sent({ page }) {
  await button(page)
  const [node] = (await saved(page)).nodes
  assert.deepEqual(node.widgets_values, [1024, 1024, 0])
  const [sent] = Object.values(await prompt(page))
  assert.ok(!('pixstack_test' in sent.inputs))
}

export async function what_does_not_count_is_hidden_until_it_does({ page, renderer, shot }) {
  const element = await button(page)
  const rows = (wanted) => page.waitForFunction((wanted) => // a widget looks again a few times a second
    [...document.querySelectorAll('.lg-node-widgets > *')].filter((row) => row.getBoundingClientRect().height > 0).length === wanted,
  wanted)
  const height = async () => (await saved(page)).nodes[0].size[1]
  assert.deepEqual(await hidden(page), ['height', 'aspect_ratio'])
  if (renderer === 'nodes2') await rows(2)
  const before = await height()
  await element.click()
  await drawn(page)
  assert.deepEqual(await hidden(page), ['aspect_ratio'])
  if (renderer === 'nodes2') await rows(3)
  else assert.ok(await height() > before)
  await shot('hidden')
}

export async function a_text_comes_in_the_language_of_the_frontend({ page }) {
  const said = await page.evaluate(async (LIB) => {
    const lib = await import(LIB)
    await lib.ready
    return lib.text('noAnswer')
  }, LIB)
  assert.equal(said, 'ComfyUI does not answer. Is it still running?')
}
