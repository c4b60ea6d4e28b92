// The size picker of canvas nodes: the sizes that a model was trained on, to scale, and what the chosen one costs. Every
// number comes from Python (nodes/picker.py); this draws it, and sets the node's own widgets.
import { app } from '../../scripts/app.js'
import { ask, idle, linked, loaderOf, make, mount, on, origin, remember, set, svg, text, values } from './lib.mjs'

const CANVASES = ['PixStack_PixArtCanvas', 'PixStack_PixArtReferenceCanvas', 'PixStack_PixelFlowCanvas',
  'PixStack_UltraPixelCanvas']
const HEIGHT = 124 // pixels of the widget
const NEAR = 0.03 // of the drawing: what a free size snaps to

app.registerExtension({
  name: 'PixStack.SizePicker',
  nodeCreated(node) {
    if (CANVASES.includes(node.constructor.comfyClass ?? node.type) && on('SizePicker')) picker(node)
  }
})

function picker(node) {
  const plot = svg('svg', { class: 'plot', viewBox: '0 0 100 100', tabindex: 0, role: 'slider' })
  const about = make('div', { class: 'about' })
  const element = make('div', { class: 'pixstack-size' }, plot, about)
  let answer = {}, turn = 0, over = null, extent = 0 // extent: what stays as it is while dragging

  function paint() {
    plot.replaceChildren(...drawing(answer, over, extent || answer.extent))
    about.replaceChildren(...words(answer))
    const [width, height] = answer.size ?? []
    plot.setAttribute('aria-label', text('size.label'))
    plot.setAttribute('aria-valuetext', width ? text('size.pixels', { width, height }) : '')
    plot.classList.toggle('still', !chooses(answer))
  }

  async function draw(state) {
    const mine = ++turn
    const said = await ask('canvas', state).catch((error) => ({ error: error.message }))
    if (mine !== turn) return
    const { width, height } = state.values
    answer = said.error ? { ...said, size: width && height ? [width, height] : null, wrong: true } : said
    paint()
  }

  /** Take the size nearest to a place in the drawing, in pixels of the picture. */
  function take([x, y]) {
    const one = nearest(answer, [x, y], extent || answer.extent)
    if (!one) return
    over = null
    set(node, one.set)
    answer = { ...answer, size: one.size, wrong: false, error: null }
    paint() // at once; what it costs comes a moment later
  }

  const place = (event) => {
    const box = plot.getBoundingClientRect()
    const scale = (extent || answer.extent) / box.width
    return [(event.clientX - box.left) * scale, (box.bottom - event.clientY) * scale]
  }
  plot.addEventListener('pointerdown', (event) => {
    if (event.button || !chooses(answer)) return
    event.preventDefault()
    plot.focus({ preventScroll: true })
    plot.setPointerCapture(event.pointerId)
    extent = answer.extent
    take(place(event))
  })
  plot.addEventListener('pointermove', (event) => {
    if (!chooses(answer)) return
    if (extent) return take(place(event))
    over = nearest(answer, place(event), answer.extent)
    paint()
  })
  for (const end of ['pointerup', 'pointercancel'])
    plot.addEventListener(end, () => {
      if (!extent) return
      extent = 0
      remember()
      paint()
    })
  plot.addEventListener('pointerleave', () => {
    over = null
    paint()
  })
  plot.addEventListener('keydown', (event) => {
    const [x, y] = STEPS[event.key] ?? []
    if (x == null || !chooses(answer)) return
    event.preventDefault()
    event.stopPropagation()
    const { free, size } = answer
    const by = free && free.multiple * (event.shiftKey ? 8 : 1)
    const one = free ? { set: {}, size: size && [size[0] + x * by, size[1] + y * by] } : beside(answer, x - y)
    if (!one?.size) return
    if (free) {
      one.size = one.size.map((edge) => Math.min(Math.max(edge, free.least), free.most))
      one.set = { width: one.size[0], height: one.size[1] }
    }
    set(node, one.set)
    answer = { ...answer, size: one.size }
    paint()
  })
  plot.addEventListener('keyup', (event) => STEPS[event.key] && remember())

  mount(node, 'pixstack_size', element, {
    height: HEIGHT,
    draw,
    hidden: () => idle(node),
    state: () => ({
      node: node.constructor.comfyClass ?? node.type,
      values: values(node, node.widgets.map((widget) => widget.name)
        .filter((name) => !/^(pixstack_|\$)/.test(name))), // of elements, ours and the frontend's
      linked: (node.inputs ?? []).map((input) => input.name).filter((name) => linked(node, name)),
      model: loaderOf(node),
      image: picture(node)
    })
  })
}

const STEPS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }

/** [width, height] of the picture at `image`, where its node shows it. */
function picture(node) {
  const { naturalWidth: width, naturalHeight: height } = origin(node, 'image')?.imgs?.[0] ?? {}
  return width && height ? [width, height] : null
}

const chooses = (answer) => !answer.waits && !!(answer.free || answer.choices?.length) && !answer.fixed

/** The choice whose corner is nearest to a place, or any size there. */
function nearest({ choices = [], free }, [x, y], extent) {
  const far = (one) => Math.hypot(one.size[0] - x, one.size[1] - y)
  const best = choices.reduce((a, b) => (a && far(a) <= far(b) ? a : b), undefined)
  if (!free) return best
  if (best && far(best) < NEAR * extent) return { size: best.size, set: { width: best.size[0], height: best.size[1] } }
  const { multiple, least, most } = free
  const fit = (edge) => Math.min(Math.max(Math.round(edge / multiple) * multiple, least), most)
  const size = [fit(Math.min(x, extent)), fit(Math.min(y, extent))]
  return { size, set: { width: size[0], height: size[1] } }
}

/** The choice that is one step wider (1) or taller (-1) than the size. */
function beside({ choices, size }, step) {
  if (!choices.length) return undefined
  const wide = (one) => Math.log(one[0] / one[1])
  const order = [...choices].sort((a, b) => wide(a.size) - wide(b.size))
  const here = size ? order.reduce((best, one, i) =>
    (Math.abs(wide(one.size) - wide(size)) < Math.abs(wide(order[best].size) - wide(size)) ? i : best), 0) : 0
  return order[Math.min(Math.max(here + step, 0), order.length - 1)]
}

// --- Drawing: every rectangle stands on the lower left corner, so that a size is the place of its upper right one -----

function drawing({ size, choices = [], inner = [], trained, wrong, waits }, over, extent) {
  if (!extent || waits) return [svg('rect', { class: 'frame', x: 0.5, y: 0.5, width: 99, height: 99, rx: 3 })]
  const k = 100 / extent
  const box = ([width, height], of) => svg('rect', { class: of, x: 0, y: 100 - height * k, width: width * k, height: height * k })
  const corner = ([width, height], of, r) => svg('circle', { class: of, cx: width * k, cy: 100 - height * k, r })
  const order = [...choices].sort((a, b) => a.size[0] / a.size[1] - b.size[0] / b.size[1])
  return [
    trained && svg('path', { class: 'trained', d: band(trained, k) }),
    order.length > 1 && svg('polyline', { class: 'line', points: order.map(({ size: [w, h] }) => `${w * k},${100 - h * k}`).join(' ') }),
    over && box(over.size, 'over'),
    size && box(size, wrong ? 'size wrong' : 'size'),
    ...(size ? inner.map((one) => box(one, 'inner')) : []),
    ...order.map((one) => corner(one.size, 'choice', order.length > 20 ? 1 : 1.6)),
    size && corner(size, 'grip', 3),
    svg('path', { class: 'axes', d: 'M0.5 0V99.5H100' })
  ].filter(Boolean)
}

/** The sizes between two areas whose sides are not too unequal, as a path. */
function band({ areas: [least, most], ratio }, k) {
  const turns = Array.from({ length: 33 }, (_, i) => ratio ** (i / 16 - 1))
  const at = (area, turn) => `${(Math.sqrt(area * turn) * k).toFixed(2)} ${(100 - Math.sqrt(area / turn) * k).toFixed(2)}`
  return `M${turns.map((turn) => at(least, turn)).join('L')}L${turns.reverse().map((turn) => at(most, turn)).join('L')}Z`
}

function words({ size, wrong, tokens, memory = [], notes = [], warnings = [], error, waits }) {
  if (waits) {
    const known = ['model', 'image', 'ratio'].includes(waits)
    return [make('p', { class: 'note' }, text(`size.waits.${known ? waits : 'other'}`, { name: waits }))]
  }
  const tip = memory[0]?.[0] === 'step' ? 'size.memoryTip' : 'size.stagesTip'
  return [
    size && !wrong && make('b', {}, text('size.pixels', { width: size[0], height: size[1] })),
    !error && tokens && make('p', {}, text('size.tokens', { n: tokens.toLocaleString() })),
    ...(error ? [] : memory.map(([part, gb]) => make('p', { title: text(tip) }, text(`size.${part}`, { gb: short(gb) })))),
    error && make('p', { class: 'error', role: 'alert' }, error),
    ...(error ? [] : [...warnings.map((said) => make('p', { class: 'warning', title: said }, said)),
      ...notes.map((said) => make('p', { class: 'note', title: said }, said))])
  ].filter(Boolean)
}

const short = (gb) => (gb < 0.1 ? gb.toFixed(2) : gb.toFixed(1))
