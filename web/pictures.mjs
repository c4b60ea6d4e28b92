// Pictures on nodes: what a run has left for our widgets, and boards that show it.
import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { make } from './lib.mjs'

/** The address of a picture of core's {filename, subfolder, type}, or of one that our nodes keep: [name, sub-folder]. */
export function address(picture) {
  const { filename, subfolder, type } = Array.isArray(picture)
    ? { filename: picture[0], subfolder: picture[1], type: 'temp' } : picture
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder: subfolder ?? '', type: type ?? 'output' })}`)
}

/** What the last run gave a node for the browser, also after the workflow was closed and opened; {} before any. */
export function outputOf(node) {
  const graph = node.graph
  const inside = graph && graph.rootGraph && graph !== graph.rootGraph
  return app.nodeOutputs?.[inside ? `${graph.id}:${node.id}` : node.id] ?? {}
}

/** The node before an input, and the link's slot there; undefined without a link. */
export function before(node, name) {
  const input = node.inputs?.find((one) => one.name === name)
  const link = input?.link == null ? undefined : node.graph?.links?.get?.(input.link) ?? node.graph?.links?.[input.link]
  const origin = link && node.graph.getNodeById(link.origin_id)
  return origin ? { node: origin, slot: link.origin_slot } : undefined
}

/** Ids of a node and of all that is before an input of it, the nearest first. */
export function allBefore(node, name) {
  const found = []
  const first = before(node, name)?.node
  for (const queue = first ? [first] : []; queue.length;) {
    const one = queue.shift()
    if (found.includes(one) || found.length > 200) continue
    found.push(one)
    for (const input of one.inputs ?? []) {
      const origin = before(one, input.name)?.node
      if (origin) queue.push(origin)
    }
  }
  return found.map((one) => String(one.id))
}

/** The first picture that a node shows as core does: of Load Image, Preview Image and the like. */
export function shownBy(node) {
  const image = outputOf(node).images?.[0]
  return image?.filename ? address(image) : undefined
}

/** Let a widget show the pictures of a node's results in place of core's preview below it. */
export function insteadOfPreview(node, element) {
  node.hideOutputImages = true // newer frontends
  node.onDrawBackground = () => {} // which draws the preview on 1.32.9's canvas
  element.classList.add('instead-of-preview') // its Nodes 2.0: see pixstack.css
}

/** Keys are the widget's: the canvas would move, delete or undo nodes. handle(event) => whether it took the key. */
export function keys(element, handle) {
  // The canvas's Ctrl+Z looks before any element can stop it. It leaves alone what is an INPUT or of this type, in frontends
  // from 1.5x what says of itself that it is edited.
  if (!('type' in element)) element.type = 'textarea'
  Object.defineProperty(element, 'isContentEditable', { value: true })
  element.addEventListener('keydown', (event) => {
    if (!handle(event)) return
    event.preventDefault()
    event.stopPropagation()
  })
}

/** '2 of 4' between two arrows: {element, show(index, count)}; turn(by) is called with -1 or 1. */
export function pager(turn, earlier, later) {
  const button = (sign, by) => {
    const one = make('button', { type: 'button' }, sign)
    one.addEventListener('click', () => turn(by))
    return one
  }
  const back = button('‹', -1), on = button('›', 1), place = make('span')
  const element = make('span', { class: 'pager' }, back, place, on)
  return {
    element,
    show(index, count, words) {
      element.hidden = count < 2
      place.textContent = words
      for (const [one, title] of [[back, earlier()], [on, later()]]) {
        one.title = title
        one.setAttribute('aria-label', title)
      }
    }
  }
}

/** Where a pointer is in an element, each from 0 to 1 inside of it. */
export function within(element, event) {
  const box = element.getBoundingClientRect()
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]
}

/** Follow the left button, a finger or a pen from where it is set down on an element until it is lifted. */
export function follow(element, { down, move, up, cancel }) {
  let active
  element.addEventListener('pointerdown', (event) => {
    if (event.button !== 0 || active != null || down(event) === false) return
    active = event.pointerId
    element.setPointerCapture(active)
  })
  element.addEventListener('pointermove', (event) => event.pointerId === active && move(event))
  const end = (then) => (event) => {
    if (event.pointerId !== active) return
    active = undefined
    then?.(event)
  }
  element.addEventListener('pointerup', end(up))
  element.addEventListener('pointercancel', end(cancel ?? up))
}
