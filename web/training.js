// The trainer's monitor in a tab of the sidebar, and its exports in the graph. Off until the setting says otherwise;
// nodes/host/training/ says who may use it.
import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { make, ready, remember, text } from './lib.mjs'
import { add } from './nodes.mjs'

const TAB = 'pixstack-training', ENABLED = 'PixStack.Training', RUNS = 'PixStack.TrainingRuns', ROUTES = '/pixstack/training'
let place, frame

app.registerExtension({
  name: 'PixStack.Training',
  settings: [
    {
      id: ENABLED, name: 'Show training runs in the sidebar', type: 'boolean', defaultValue: false,
      category: ['PixStack', 'Training', 'Enabled'],
      tooltip: 'Starts the trainer\'s monitor with the tab. Only for a ComfyUI that other machines cannot reach.',
      onChange: (value) => switched(value === true)
    },
    {
      id: RUNS, name: 'Folder of the runs', type: 'text', defaultValue: '', category: ['PixStack', 'Training', 'Runs'],
      tooltip: 'Where the trainer writes its runs; empty: the folder runs of PixStack. Taken up when the tab is opened.'
    }
  ],
  async setup() {
    window.addEventListener('message', (event) => {
      const { pixstack, folder, name } = event.data ?? {}
      if (event.source === frame?.contentWindow && event.origin === location.origin && pixstack === 'use') use(folder, name)
    })
  }
})

let registered = false
async function switched(wanted) {
  await ready
  if (wanted === registered) return
  registered = wanted
  if (!wanted) {
    app.extensionManager.unregisterSidebarTab(TAB)
    frame = undefined
    return api.fetchApi(`${ROUTES}/close`, { method: 'POST' })
  }
  app.extensionManager.registerSidebarTab({
    id: TAB, icon: 'pi pi-chart-line', title: text('training.title'), tooltip: text('training.tooltip'), type: 'custom',
    render(element) {
      place = element
      place.style.height = '100%'
      open()
    }
  })
}

async function open() {
  const shown = place
  const note = (words, ...more) =>
    shown.replaceChildren(make('div', { style: 'padding: 1rem; white-space: pre-wrap; overflow-wrap: anywhere' }, words, ...more))
  frame = undefined
  note(text('training.starting'))
  try {
    const answer = await api.fetchApi(`${ROUTES}/open`, { method: 'POST' })
    if (!answer.ok) throw new Error((await answer.text()) || answer.statusText)
    const { address } = await answer.json()
    frame = make('iframe', {
      src: api.apiURL(address), title: text('training.title'), sandbox: 'allow-scripts allow-same-origin allow-modals',
      style: 'border: 0; width: 100%; height: 100%; display: block'
    })
    const themed = frame
    themed.addEventListener('load', () => {
      if (themed.contentDocument) themed.contentDocument.documentElement.dataset.theme = isDark(shown) ? 'dark' : 'light'
    })
    shown.replaceChildren(frame)
  } catch (error) {
    const again = make('button', { type: 'button', style: 'display: block; margin-top: 1rem; padding: .3rem .8rem' }, text('training.again'))
    again.addEventListener('click', open)
    note(error.message, again)
  }
}

/** Whether what is written on an element is bright. */
function isDark(element) {
  const context = make('canvas', { width: 1, height: 1 }).getContext('2d')
  context.fillStyle = getComputedStyle(element).color
  context.fillRect(0, 0, 1, 1)
  return context.getImageData(0, 0, 1, 1).data[1] > 127
}

/** Put an exported file into the graph. */
async function use(folder, name) {
  const say = (severity, summary, detail) => app.extensionManager.toast.add({ severity, summary, detail, life: 15000 })
  try {
    const answer = await api.fetchApi(`${ROUTES}/loader?${new URLSearchParams({ folder, name })}`)
    if (!answer.ok) throw new Error(await answer.text())
    const { node: type } = await answer.json()
    await app.refreshComboInNodes()
    const { node, tied } = add(type, name)
    remember()
    app.canvas.selectNode?.(node)
    app.canvas.centerOnNode?.(node)
    say('success', text('training.used', { file: name, node: node.getTitle() }), text(tied ? 'training.tied' : 'training.untied'))
  } catch (error) {
    say('error', text('training.unused', { file: name }), error.message)
  }
}
