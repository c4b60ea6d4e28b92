// A node has refused a file that another node takes: a card with a button that puts that node in its place.
// nodes/host/common/wrong_file.py describes the event.
import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { make, remember, text, widgetOf } from './lib.mjs'
import { menuWith, replace } from './nodes.mjs'

let card

app.registerExtension({
  name: 'PixStack.WrongFile',
  setup() {
    document.head.append(make('link', { rel: 'stylesheet', href: new URL('wrong_file.css', import.meta.url).href }))
    api.addEventListener('pixstack.wrong_file', ({ detail }) => offer(detail))
    api.addEventListener('execution_start', withdraw)
  },
  afterConfigureGraph: withdraw // another workflow
})

/** Above the frontend's own dialog, which says the same and covers the canvas. */
function offer(about) {
  withdraw()
  const node = located(about.node_id)
  if (!node) return
  const buttons = about.nodes.filter((type) => takes(type, about.file)).map((type) => button(text('wrongFile.use',
    { node: window.LiteGraph.registered_node_types[type].title }), () => change(node, type, about)))
  if (!buttons.length) return
  const close = button('✕', withdraw)
  close.setAttribute('aria-label', text('wrongFile.close'))
  card = make('div', { class: 'pixstack pixstack-offer', role: 'alert' },
    make('span', {}, text('wrongFile.offer', { file: about.file, kind: about.kind })), ...buttons, close)
  document.body.append(card)
}

function button(words, press) {
  const made = make('button', { type: 'button' }, words)
  made.addEventListener('click', press)
  return made
}

function withdraw() {
  card?.remove()
  card = undefined
}

function change(node, type, about) {
  withdraw()
  closeDialog(about.file)
  if (node.graph?.getNodeById(node.id) !== node || widgetOf(node, about.input)?.value !== about.file) return
  const before = node.getTitle(), after = replace(node, type, about.file)
  remember()
  app.canvas.selectNode?.(after)
  app.extensionManager.toast.add({
    severity: 'success', life: 10000,
    summary: text('wrongFile.changed', { before, after: after.getTitle() }), detail: text('wrongFile.next')
  })
}

/** The frontend's dialog about this file, which is dealt with. */
function closeDialog(file) {
  const dialog = [...document.querySelectorAll('.p-dialog')].find((one) => one.innerText.includes(file))
  dialog?.querySelector('.p-dialog-close-button')?.click()
}

const takes = (type, file) =>
  window.LiteGraph.registered_node_types[type] && menuWith(window.LiteGraph.createNode(type), file) !== undefined

/** The node of an id as the executor has it: "5", or "12:5" for the node 5 in the subgraph of the node 12. */
function located(id) {
  let graph = app.rootGraph ?? app.graph, node
  for (const part of String(id).split(':')) {
    node = graph?.getNodeById(part)
    graph = node?.subgraph
  }
  return node
}
