// Files for ComfyUI from a run's checkpoints. Inside of ComfyUI, its page puts one into the graph.
import { ask, demand } from './api.js'

const by = (id) => document.getElementById(id)
const framed = window.parent !== window
let run = null, shown = ''

export function listen() {
  by('export').addEventListener('click', async () => {
    try {
      await demand('export', { run, step: by('export-step').value })
      await refresh(run)
    } catch (error) {
      by('export-said').textContent = error.message
    }
  })
}

export async function refresh(name) {
  const { steps, files, last } = await ask('exports', { run: name })
  const text = JSON.stringify([name, steps, files, last])
  if (text === shown) return
  shown = text
  by('exports').hidden = !steps.length
  const before = name === run && by('export-step').value, newest = String(steps.at(-1))
  run = name
  by('export-step').replaceChildren(...steps.toReversed().map((step) => new Option(step.toLocaleString('en'), step)))
  by('export-step').value = steps.includes(Number(before)) && before !== false ? before : newest
  by('export').disabled = last.state === 'running'
  by('export-said').textContent = last.run === name ? said(last) : last.state === 'running' ? `${last.run} is being exported.` : ''
  by('export-files').replaceChildren(...files.map(entry))
}

const said = ({ state, step, said }) => ({
  running: `Step ${step.toLocaleString('en')} is being exported. The models that the run stands on are read for it.`,
  done: `Step ${step.toLocaleString('en')} is exported.`, failed: `Step ${step.toLocaleString('en')} could not be exported. ${said}`
})[state] ?? ''

function entry(file) {
  const item = document.createElement('li'), name = document.createElement('code')
  name.textContent = `${file.folder}/${file.name}`
  item.append(name, file.bytes < 1e5 ? ` ${(file.bytes / 1e3).toFixed(1)} kB ` : ` ${(file.bytes / 1e6).toFixed(1)} MB `)
  if (framed) {
    const button = Object.assign(document.createElement('button'), { type: 'button', textContent: 'Use in the graph' })
    button.addEventListener('click', () =>
      window.parent.postMessage({ pixstack: 'use', folder: file.folder, name: file.name }, location.origin))
    item.append(button)
  }
  return item
}
