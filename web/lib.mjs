// What PixStack's widgets share: texts, switches, the values of a node's own widgets, and elements on nodes.
// A widget only moves values of inputs that are there without it, so a graph runs the same where no script is loaded.
import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'

// --- Texts -----------------------------------------------------------------------------------------------------------

const texts = { en: {} }
/** Resolves when the texts are there; `text` gives keys until then. */
export const ready = api.fetchApi('/i18n').then((answer) => answer.json()).then((all) => {
  for (const [language, parts] of Object.entries(all)) texts[language] = parts.pixstack ?? {}
}).catch((error) => console.warn('PixStack has no texts for its widgets:', error))

/** The text of "part.key" in the frontend's language, from locales/<language>/main.json; {name} is values.name. */
export function text(key, values = {}) {
  const find = (language) => key.split('.').reduce((part, name) => part?.[name], texts[language])
  const found = find(app.ui.settings.getSettingValue('Comfy.Locale')) ?? find('en') ?? key
  return found.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole)
}

/** What the server answers to `body` on a route of ours; throws a sentence for the user. */
export async function ask(route, body) {
  const answer = await api.fetchApi(`/pixstack/${route}`, {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body)
  }).catch(() => undefined)
  if (!answer?.ok) throw new Error(text('noAnswer'))
  return answer.json()
}

// --- Switches --------------------------------------------------------------------------------------------------------

/** A setting that switches a widget: for `settings` of app.registerExtension. New nodes follow it. */
export const toggle = (id, name, tooltip) =>
  ({ id: `PixStack.${id}`, name, tooltip, type: 'boolean', defaultValue: true, category: ['PixStack', 'Widgets', id] })

export const on = (id) => app.ui.settings.getSettingValue(`PixStack.${id}`) ?? true

// --- Values ----------------------------------------------------------------------------------------------------------

export const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name)

/** Whether another node gives this input: what stands in the widget then counts for nothing. */
export const linked = (node, name) =>
  node.inputs?.some((input) => (input.widget?.name ?? input.name) === name && input.link != null) ?? false

/** The node that a link comes from, through reroutes; undefined where there is none. */
export function origin(node, name) {
  for (let hops = 0; node && hops < 32; hops++) {
    const input = name ? node.inputs?.find((one) => one.name === name) : node.inputs?.[0]
    const link = input?.link != null && (node.graph?.getLink?.(input.link) ?? node.graph?.links?.[input.link])
    node = link ? node.graph.getNodeById(link.origin_id) : undefined
    if (node?.type !== 'Reroute') return node
    name = undefined
  }
}

/** The PixStack loader of the MODEL that a node is given, through LoRAs and whatever else hands a MODEL on: {node, values}. */
export function loaderOf(node, name = 'model') {
  for (let hops = 0; hops < 32; hops++) {
    node = origin(node, name)
    if (!node) return null
    if (/^PixStack_\w+Loader$/.test(node.type) && !node.inputs?.some((input) => input.type === 'MODEL')) {
      const own = (node.widgets ?? []).filter((widget) => !linked(node, widget.name)).map((widget) => widget.name)
      return { node: node.type, values: values(node, own) }
    }
    name = node.inputs?.find((input) => input.type === 'MODEL' && input.link != null)?.name
    if (!name) return null
  }
  return null
}

/** Names of a node's inputs that count for nothing as it stands, by what its schema says (`schema` in nodes/schema.py). */
export function idle(node) {
  const { required, optional } = node.constructor.nodeData?.input ?? {}
  return Object.entries({ ...required, ...optional }).filter(([, spec]) => {
    const { pixstack_counts: counts = {}, pixstack_replaced: replaced = [] } = spec?.[1] ?? {}
    return replaced.some((name) => linked(node, name)) || Object.entries(counts).some(
      ([menu, words]) => !linked(node, menu) && !words.includes(widgetOf(node, menu)?.value))
  }).map(([name]) => name)
}

/** Values of some of a node's widgets, by name; names that it lacks are left out. */
export const values = (node, names) =>
  Object.fromEntries(names.flatMap((name) => {
    const widget = widgetOf(node, name)
    return widget ? [[name, widget.value]] : []
  }))

/** Set widgets as a person would, by name. Call `remember` when a gesture ends, so that it is one step of undo. */
export function set(node, wanted) {
  for (const [name, value] of Object.entries(wanted)) {
    const widget = widgetOf(node, name)
    if (!widget || widget.value === value || linked(node, name)) continue
    widget.value = value
    widget.callback?.(value, app.canvas, node)
  }
  node.setDirtyCanvas?.(true, true)
}

/** What has changed so far is a step that undo takes back, and the workflow is no longer as it was saved. */
export function remember() {
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker
  if (tracker?.captureCanvasState) tracker.captureCanvasState()
  else tracker?.checkState?.()
}

// --- Elements on nodes -----------------------------------------------------------------------------------------------

const POLL = 200 // ms: links, undo, other extensions and nodes before this one change values without a word
const mounted = new Set()
setInterval(() => {
  if (!document.hidden) for (const one of mounted) one.look()
}, POLL)

/**
 * Put an element below the widgets of a node, on LiteGraph's canvas as in Nodes 2.0. It is not saved and not sent.
 * height: pixels, the least in both; it grows with the node. state: () => plain data; `draw(state)` is called when that
 * changes. hidden: () => names of the node's own widgets that do not count now; a linked one is shown all the same.
 */
export function mount(node, name, element, { height, state, draw, hidden }) {
  element.classList.add('pixstack')
  element.dataset.pixstack = name
  element.style.minHeight = `${height}px`
  style()
  const widget = node.addDOMWidget(name, name, element, {
    serialize: false, hideOnZoom: false, margin: MARGIN, getMinHeight: () => height + 2 * MARGIN
  })
  widget.serialize = false
  passOn(element)
  const rows = document.createElement('style')
  let last, loaded = false
  const one = {
    look() {
      takePlace(node, name, element)
      if (hidden) hide(node, hidden(), element, rows)
      if (!loaded) return // texts come in a moment
      const now = state()
      const key = JSON.stringify(now)
      if (key === last) return
      last = key
      draw(now)
    },
    redraw() {
      last = undefined
      one.look()
    }
  }
  mounted.add(one)
  ready.then(() => {
    loaded = true
    one.redraw()
  })
  after(node, 'onRemoved', () => mounted.delete(one))
  after(node, 'onConfigure', () => {
    if (hidden) hide(node, hidden(), element, rows, false)
    one.look()
    fitted(node)
  })
  for (const own of node.widgets) if (own !== widget) after(own, 'callback', one.look)
  one.look()
  fitted(node)
  return one
}

const MARGIN = 8

/** Undo makes nodes anew, and Nodes 2.0 go on showing the element of the node before: take its place. */
function takePlace(node, name, element) {
  if (!window.LiteGraph.vueNodesMode || element.isConnected || app.canvas?.graph?.getNodeById(node.id) !== node) return
  document.querySelector(`[data-node-id="${node.id}"] [data-pixstack="${name}"]`)?.replaceWith(element)
}

/** Let a node be as tall as what is on it, at once: a size that came later would be a change to undo. */
function fitted(node) {
  const least = node.computeSize()
  if (node.size[1] < least[1]) node.setSize([node.size[0], least[1]])
}

/** Call `more` whenever a method of an object has run. */
function after(object, method, more) {
  const before = object[method]
  object[method] = function (...given) {
    const answer = before?.apply(this, given)
    more.apply(this, given)
    return answer
  }
}

/** Hide a node's own widgets of these names, and no others. roomy: what is free below them stays free. */
function hide(node, names, element, rows, roomy = true) {
  const wanted = (widget) => names.includes(widget.name) && !linked(node, widget.name)
  const turned = node.widgets.filter((widget) => !widget.element?.dataset.pixstack && !!widget.hidden !== wanted(widget))
  const free = turned.length && node.size[1] - node.computeSize()[1]
  for (const widget of turned) {
    widget.hidden = wanted(widget)
    if (widget.hidden) widget.computeSize = () => [0, -4] // 1.32.9 leaves 4 pixels and more for hidden ones
    else delete widget.computeSize
  }
  hideRows(node, element, rows)
  if (!turned.length) return
  if (roomy) node.setSize([node.size[0], node.computeSize()[1] + Math.max(free, 0)])
  node.setDirtyCanvas?.(true, true)
}

/** Nodes 2.0 keep a list of widgets of their own, and 1.32.9 does not look again: rows are hidden by their place. */
function hideRows(node, element, rows) {
  const list = element.closest('.lg-node-widgets')
  if (!list) return
  const above = node.widgets.slice(0, node.widgets.findIndex((widget) => widget.element === element))
  const drawn = above.filter((widget) => !widget.options?.hidden && !widget.options?.canvasOnly)
  const place = [...list.children].findIndex((row) => row.contains(element))
  const places = drawn.length === place ? drawn.flatMap((widget, i) => (widget.hidden ? [i + 1] : [])) : []
  const css = places.map((i) => `[data-node-id="${node.id}"] .lg-node-widgets > :nth-child(${i}) { display: none }`)
  if (rows.textContent !== css.join('\n')) rows.textContent = css.join('\n')
  if (rows.parentNode !== element) element.append(rows)
}

/** The wheel and the middle button are the canvas's; what a widget does with the left one is not the node's. */
function passOn(element) {
  const forClassic = (name, isCanvas, method) => element.addEventListener(name, (event) => {
    if (!window.LiteGraph.vueNodesMode && isCanvas(event)) {
      if (name === 'wheel') event.preventDefault()
      app.canvas[method](event)
    }
  }, { passive: false })
  forClassic('wheel', () => true, 'processMouseWheel')
  forClassic('pointerdown', (event) => event.button === 1, 'processMouseDown')
  forClassic('pointermove', (event) => event.buttons & 4, 'processMouseMove')
  forClassic('pointerup', (event) => event.button === 1, 'processMouseUp')
  for (const name of ['pointerdown', 'pointermove', 'pointerup'])
    element.addEventListener(name, (event) => {
      if (event.button !== 1 && !(event.buttons & 4)) event.stopPropagation()
    })
}

/** An element: `make('p', {class: 'note'}, 'text', child)`; of SVG with `svg`. */
export const make = (name, attributes = {}, ...children) => build(document.createElement(name), attributes, children)
export const svg = (name, attributes = {}, ...children) =>
  build(document.createElementNS('http://www.w3.org/2000/svg', name), attributes, children)

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value != null) element.setAttribute(name, value)
  element.append(...children.filter((child) => child != null))
  return element
}

let styled = false
function style() {
  if (styled) return
  styled = true
  document.head.append(make('link', { rel: 'stylesheet', href: new URL('pixstack.css', import.meta.url).href }))
}
