// What App mode shows of a template.
import assert from 'node:assert/strict'
import { load, shipped } from '../page.mjs'

export async function a_template_is_a_form_that_draws({ page, shot }) {
  const toggle = () => page.evaluate(() => window.app.extensionManager.command.execute('Comfy.ToggleLinear'))
  const [, minor] = (await page.evaluate(() => window.__COMFYUI_FRONTEND_VERSION__)).split('.').map(Number)
  if (minor < 39) return 'this frontend does not read what App mode is to show'
  await load(page, shipped('pixart_emoji'))
  await toggle()
  try {
    await page.getByText('Skip', { exact: true }).click() // the tour, which the first time brings
    const form = page.getByTestId('linear-widgets')
    await form.getByText('Negative prompt', { exact: true }).waitFor()
    const fields = (await form.innerText()).split('\n').map((line) => line.trim())
    const wanted = ['Prompt', 'Negative prompt', 'resolution', 'shape', 'steps', 'cfg', 'seed']
    assert.deepEqual(fields.filter((line) => wanted.includes(line)), wanted)
    await page.getByRole('button', { name: 'Run', exact: true }).click()
    await page.locator('img[src*="/view?"]:visible').first().waitFor()
    await shot('drawn')
  } finally {
    await toggle()
  }
}
