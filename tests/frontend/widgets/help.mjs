// The help panel of a node: its page and its picture, in the language of the frontend.
import assert from 'node:assert/strict'
import { one, open } from '../page.mjs'

const NODE = 'PixStack_PixArtCanvas'
const PICTURE = 'img[src*="/extensions/pixstack/docs/PixArtCanvas"]'

/** The panel after a click on the i of a selected node: {title, sections, width of the loaded picture and of its panel}. */
async function panel(page) {
  await one(page, NODE)
  await page.evaluate((NODE) => {
    const { canvas, graph } = window.app
    canvas.selectItems([graph._nodes.find((node) => node.type === NODE)])
    canvas.setDirty(true, true)
  }, NODE)
  await page.locator('[data-testid="info-button"]').dispatchEvent('click')
  await page.waitForFunction((PICTURE) => document.querySelector(PICTURE)?.naturalWidth, PICTURE)
  return await page.evaluate((PICTURE) => {
    const picture = document.querySelector(PICTURE)
    const text = picture.closest('p').parentElement
    const words = (tag) => [...text.querySelectorAll(tag)].map((element) => element.innerText)
    return { title: words('h1')[0], sections: words('h2'), items: words('li').length,
      shown: picture.getBoundingClientRect().width, wide: text.getBoundingClientRect().width,
      overflow: text.scrollWidth - text.clientWidth }
  }, PICTURE)
}

function fits({ shown, wide, overflow, items }) {
  assert.ok(shown > 100 && shown <= wide, `the picture is ${shown} wide in a panel of ${wide}`)
  assert.ok(overflow <= 1, `${overflow} pixels of the page are cut off`)
  assert.ok(items > 10)
}

export async function a_node_explains_itself_with_a_picture({ page, shot }) {
  const found = await panel(page)
  await shot('english')
  assert.equal(found.title, 'PixArt Canvas')
  assert.deepEqual(found.sections.slice(0, 4), ['What goes in', 'What comes out', 'Three things to try', 'Common faults'])
  fits(found)
  await page.locator('[data-testid="info-button"]').dispatchEvent('click') // closes it
}

export async function a_node_explains_itself_in_chinese({ page, renderer, address }) {
  if (renderer !== 'classic') return // the panel is the same
  const chinese = await open(page.context(), address, { settings: { 'Comfy.Locale': 'zh' }, kinds: [NODE] })
  try {
    const found = await panel(chinese)
    assert.equal(found.title, 'PixArt 画布')
    assert.deepEqual(found.sections.slice(0, 4), ['输入', '输出', '试试看', '常见问题'])
    fits(found)
  } finally {
    await chinese.close()
  }
}
