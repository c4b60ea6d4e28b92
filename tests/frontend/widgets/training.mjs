// The training tab: not there until it is switched on, then a made-up run in it, and its LoRA in the graph.
import assert from 'node:assert/strict'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { drawn, load, shipped, undo } from '../page.mjs'

export const alone = true // settings of the server
const TAB = ':is(.pixstack-training-tab-button, [data-testid=pixstack-training-tab-button])', LORA = 'PixStack_PixArtLoraLoader', FILE = 'first_step4.safetensors'
const MARKUP = '<img src=x onerror="top.taken = true">' // the name of a run
const WORKFLOW = shipped('pixart_emoji')

export async function nothing_is_there_until_the_setting_is_on({ page, address }) {
  await page.waitForSelector('.side-bar-button')
  assert.equal(await page.locator(TAB).count(), 0)
  const answer = await opened(address)
  assert.equal(answer.status, 403)
  assert.match(await answer.text(), /switched off/)
}

export async function a_run_is_shown_and_its_lora_goes_into_the_graph({ page, renderer, address, shot }) {
  const runs = fs.mkdtempSync(path.join(os.tmpdir(), 'pixstack-runs-'))
  for (const name of ['first', MARKUP]) writeRun(path.join(runs, name))
  const [folder] = (await (await fetch(`${address}/internal/folder_paths`)).json()).loras
  const file = path.join(folder, FILE)
  writeLora(file)
  try {
    await settings(address, { 'PixStack.Training': true, 'PixStack.TrainingRuns': runs })
    await load(page, structuredClone(WORKFLOW))
    await page.evaluate(() => window.app.ui.settings.setSettingValueAsync('PixStack.Training', true))
    await page.click(TAB)
    const frame = page.frameLocator('iframe[title=Training]')
    await frame.locator('#runs b').first().waitFor()
    assert.deepEqual((await frame.locator('#runs b').allInnerTexts()).sort(), [MARKUP, 'first'])
    await frame.locator('#runs button', { hasText: 'first' }).click()
    await frame.locator('[data-curve=loss] canvas').waitFor()
    await frame.locator('#exports code').waitFor()
    assert.equal(await frame.locator('#exports code').innerText(), `loras/${FILE}`)
    await shot('shown')
    await frame.locator('text=Use in the graph').click()
    await page.waitForFunction((type) => window.app.graph._nodes.some((node) => node.type === type), LORA)
    await drawn(page)
    const graph = await page.evaluate((type) => {
      const { graph } = window.app, lora = graph._nodes.find((node) => node.type === type)
      const loader = graph.getNodeById(graph.getLink(lora.inputs[0].link).origin_id)
      const read = (node, slot) => node.outputs[slot].links.map((id) => graph.getNodeById(graph.getLink(id).target_id).type)
      return { file: lora.widgets[0].value, loader: loader.type, after: read(loader, 0), readers: read(lora, 0).length }
    }, LORA)
    const { readers, ...rest } = graph
    assert.deepEqual([rest, readers > 0], [{ file: FILE, loader: 'PixStack_PixArtLoader', after: [LORA] }, true])
    await shot('used')
    assert.equal(await page.evaluate(() => window.taken), undefined)
    await undo(page)
    assert.equal(await page.evaluate((type) => window.app.graph._nodes.some((node) => node.type === type), LORA), false)

    const frameAddress = await page.getAttribute('iframe[title=Training]', 'src')
    await page.evaluate(() => window.app.ui.settings.setSettingValueAsync('PixStack.Training', false))
    await page.waitForFunction((tab) => !document.querySelector(tab), TAB)
    await page.waitForFunction(async (address) => (await fetch(address)).status === 404, frameAddress) // it has ended
  } finally {
    await settings(address, { 'PixStack.Training': false, 'PixStack.TrainingRuns': '' })
    fs.rmSync(file)
    fs.rmSync(runs, { recursive: true })
  }
}

/** What the server itself knows of the settings; the page's are its own. */
const settings = (address, some) => fetch(`${address}/api/settings`, { method: 'POST', body: JSON.stringify(some) })

const opened = (address) => fetch(`${address}/api/pixstack/training/open`, { method: 'POST', headers: { Origin: address } })

function writeRun(folder) {
  fs.mkdirSync(path.join(folder, 'checkpoints', '00000004'), { recursive: true })
  fs.writeFileSync(path.join(folder, 'checkpoints', '00000004', 'model.safetensors'), '')
  fs.writeFileSync(path.join(folder, 'config.json'), JSON.stringify({ name: path.basename(folder), steps: 4 }))
  const lines = [1, 2, 3, 4].map((step) => JSON.stringify({ step, loss: 1 / step, validation_loss: 1.1 / step }) + '\n')
  fs.writeFileSync(path.join(folder, 'log.jsonl'), lines.join(''))
}

/** A safetensors file with the keys of a LoRA of PixArt. */
function writeLora(file) {
  const part = (begin, shape) => ({ dtype: 'F32', shape, data_offsets: [begin, begin + 8] })
  const header = Buffer.from(JSON.stringify({
    __metadata__: { 'pixstack.family': 'pixart_lora' },
    'diffusion_model.blocks.0.attn.qkv.lora_A.weight': part(0, [1, 2]),
    'diffusion_model.blocks.0.attn.qkv.lora_B.weight': part(8, [2, 1])
  }))
  const length = Buffer.alloc(8)
  length.writeBigUInt64LE(BigInt(header.length))
  fs.writeFileSync(file, Buffer.concat([length, header, Buffer.alloc(16)]))
}
