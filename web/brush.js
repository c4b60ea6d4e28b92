// 'Paint Conditions': a brush in four colours over the hints. It writes strokes into the node's text, and nothing else;
// the masks are drawn from that in Python.
import { app } from '../../scripts/app.js'
import { linked, make, mount, on, remember, set, text, toggle, widgetOf } from './lib.mjs'
import { address, before, follow, insteadOfPreview, keys, outputOf, shownBy, within } from './pictures.mjs'
import { added, COLOURS, draw, GRID, LARGEST, onGrid, read, simplified, without } from './strokes.mjs'

const HEIGHT = 330
const SIDE = 1024 // pixels of the longer side of what is painted on
const SIZES = [5, 8, 12, 18, 26, 38, 55, 80, 115, 165, 240, 350, 500, 700, LARGEST]

app.registerExtension({
  name: 'PixStack.PaintConditions',
  settings: [toggle('PaintConditions', 'Brush on Paint Conditions', 'Masks painted on the node, over the hints.')],
  nodeCreated(node) {
    if (node.comfyClass === 'PixStack_PaintConditions' && on('PaintConditions')) brush(node)
  }
})

function brush(node) {
  const now = { colour: 1, size: 80, at: [0.5, 0.5], ratio: 1, stroke: undefined }
  let strokes = '', undone = [], cleared = [] // texts that undo would bring back beyond taking strokes off

  // The page

  const button = (label, press, attributes = {}) => {
    const one = make('button', { type: 'button', ...attributes }, label)
    one.addEventListener('click', press)
    return one
  }
  const choose = (colour) => {
    now.colour = colour
    shown.redraw()
  }
  const colours = COLOURS.map((colour, i) =>
    button(`${i + 1}`, () => choose(i + 1), { class: 'colour', style: `--colour: ${colour}` }))
  const eraser = button('', () => choose(0), { class: 'icon eraser' })
  const size = make('input', { type: 'range', min: '0', max: String(SIZES.length - 1), step: '1' })
  const back = button('↶', () => undo(), { class: 'icon' }), again = button('↷', () => redo(), { class: 'icon' })
  const empty = button('', () => clear())
  const tools = make('div', { class: 'bar' }, make('span', { class: 'group' }, ...colours, eraser), size,
    make('span', { class: 'group' }, back, again), empty)
  const hint = make('img', { draggable: 'false', alt: '' }), canvas = make('canvas')
  const ring = make('div', { class: 'ring' })
  const picture = make('div', { class: 'picture checker' }, hint, canvas, ring)
  const board = make('div', { class: 'board', tabindex: '0', role: 'application' }, picture)
  const note = make('div', { class: 'faint note', 'aria-live': 'polite' })
  const element = make('div', { class: 'paint roomy' }, tools, board, note)
  insteadOfPreview(node, element)
  const context = canvas.getContext('2d')
  size.value = SIZES.indexOf(now.size)
  size.addEventListener('input', () => {
    now.size = SIZES[size.value]
    shown.redraw()
  })
  hint.addEventListener('load', () => shown.redraw())
  hint.addEventListener('error', () => hint.removeAttribute('src'))

  // What is painted

  const locked = () => linked(node, 'strokes')
  const say = (words = '') => { note.textContent = words }

  function write(value) {
    strokes = value
    set(node, { strokes: value })
    remember()
    shown.redraw()
  }

  function add(stroke) {
    const points = simplified(stroke.points, Math.max(3, stroke.size * 0.06))
    const longer = added(strokes, { ...stroke, points })
    if (longer === undefined) {
      shown.redraw()
      return say(text('paint.full'))
    }
    undone = []
    write(longer)
  }

  function undo() {
    if (!strokes.trim() && !cleared.length || locked()) return
    undone.push(strokes)
    write(strokes.trim() ? without(strokes) : cleared.pop())
  }

  function redo() {
    if (!undone.length || locked()) return
    const value = undone.pop()
    if (!value.trim()) cleared.push(strokes)
    write(value)
  }

  function clear() {
    if (!strokes.trim() || locked()) return
    cleared.push(strokes)
    undone = []
    write('')
  }

  // Painting with a pointer

  const ringAt = ([x, y]) => {
    now.at = [x, y]
    ring.style.left = `${100 * x}%`
    ring.style.top = `${100 * y}%`
    ring.style.width = `${now.size / 10 * Math.min(1, 1 / now.ratio)}%`
    ring.style.borderColor = COLOURS[now.colour - 1] ?? '#fff'
  }
  const extend = (places) => {
    for (const place of places) {
      const [x, y] = onGrid(place), last = now.stroke.points.at(-1)
      if (!last || last[0] !== x || last[1] !== y) now.stroke.points.push([x, y])
    }
    paintAll()
  }
  const coalesced = (event) => {
    const all = event.getCoalescedEvents?.() ?? []
    return (all.length ? all : [event]).map((one) => within(picture, one))
  }
  follow(picture, {
    down(event) {
      if (locked()) return false
      board.focus({ preventScroll: true })
      say()
      ringAt(within(picture, event))
      now.stroke = { colour: now.colour, size: now.size, points: [] }
      extend([now.at])
    },
    move: (event) => extend(coalesced(event)),
    up() {
      const { stroke } = now
      now.stroke = undefined
      add(stroke)
    },
    cancel() {
      now.stroke = undefined
      paintAll()
    }
  })
  picture.addEventListener('pointermove', (event) => {
    ring.hidden = false
    ringAt(within(picture, event))
  })
  picture.addEventListener('pointerleave', () => { ring.hidden = document.activeElement !== board })
  board.addEventListener('focus', () => { ring.hidden = false })
  board.addEventListener('blur', () => { ring.hidden = true })
  ring.hidden = true

  // With the keyboard

  const resize = (by) => {
    size.value = Math.min(SIZES.length - 1, Math.max(0, Number(size.value) + by))
    size.dispatchEvent(new Event('input'))
  }
  const go = (dx, dy, painting) => {
    const step = 0.02, from = now.at
    ringAt([from[0] + step * dx, from[1] + step * dy].map((value) => Math.min(1, Math.max(0, value))))
    if (painting && !locked()) add({ colour: now.colour, size: now.size, points: [onGrid(from), onGrid(now.at)] })
  }
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }
  keys(board, (event) => {
    const key = event.key.toLowerCase()
    if (event.ctrlKey || event.metaKey) {
      if (key === 'z' && !event.shiftKey) undo()
      else if (key === 'y' || key === 'z') redo()
      else return false
      return true
    }
    if (event.altKey) return false
    if (arrows[event.key]) go(...arrows[event.key], event.shiftKey)
    else if (/^[1-4]$/.test(key)) choose(Number(key))
    else if (key === 'e' || key === '0') choose(0)
    else if (key === '[') resize(-1)
    else if (key === ']') resize(1)
    else if (key === ' ') locked() || add({ colour: now.colour, size: now.size, points: [onGrid(now.at)] })
    else if (key === 'delete' || key === 'backspace') clear()
    else return false
    return true
  })
  keys(size, (event) => {
    const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key]
    if (by) resize(by)
    return !!by
  })

  // Drawing

  function paintAll() {
    const painted = read(strokes) ?? []
    context.globalCompositeOperation = 'source-over'
    context.clearRect(0, 0, canvas.width, canvas.height)
    for (const one of now.stroke ? [...painted, now.stroke] : painted) draw(context, one)
  }

  const hints = () => {
    const kept = outputOf(node).pixstack_paint?.[0]?.hints ?? {}
    return COLOURS.map((_, i) => {
      const origin = before(node, `hint_${i + 1}`)
      return origin && (shownBy(origin.node) ?? (kept[`hint_${i + 1}`] && address(kept[`hint_${i + 1}`])) ?? '')
    })
  }

  const shown = mount(node, 'paint', element, {
    height: HEIGHT,
    hidden: () => ['strokes', ...(hints().some((one) => one !== undefined) ? ['width', 'height'] : [])],
    state: () => ({
      strokes: widgetOf(node, 'strokes').value ?? '', hints: hints(), locked: locked(),
      size: [widgetOf(node, 'width').value, widgetOf(node, 'height').value],
      sizes: outputOf(node).pixstack_paint?.[0]?.size
    }),
    draw(state) {
      if (state.strokes !== strokes) { // by the canvas's undo, or another workflow
        strokes = state.strokes
        undone = []
        cleared = []
      }
      const source = state.hints[Math.max(0, now.colour - 1)] || state.hints.find(Boolean)
      if (source && hint.src !== new URL(source, location).href) hint.src = source
      if (!source) hint.removeAttribute('src')
      const connected = state.hints.some((one) => one !== undefined)
      const natural = hint.getAttribute('src') && hint.naturalWidth ? [hint.naturalWidth, hint.naturalHeight] : undefined
      const [width, height] = (connected && (natural ?? state.sizes)) || state.size
      const ratio = now.ratio = width / height || 1
      picture.style.setProperty('--ratio', ratio)
      const pixels = ratio > 1 ? [SIDE, Math.max(1, Math.round(SIDE / ratio))] : [Math.max(1, Math.round(SIDE * ratio)), SIDE]
      if (canvas.width !== pixels[0]) canvas.width = pixels[0]
      if (canvas.height !== pixels[1]) canvas.height = pixels[1]
      paintAll()
      ringAt(now.at)

      const wrong = read(strokes) === undefined
      for (const [i, one] of [...colours, eraser].entries()) one.setAttribute('aria-pressed', now.colour === (i + 1) % 5)
      colours.forEach((one, i) => { one.title = text('paint.colour', { number: i + 1 }) })
      for (const [one, key] of [[eraser, 'eraser'], [back, 'undo'], [again, 'redo'], [size, 'size']]) {
        one.title = text(`paint.${key}`)
        one.setAttribute('aria-label', one.title)
      }
      eraser.textContent = '⌫'
      empty.textContent = text('paint.clear')
      board.setAttribute('aria-label', text('paint.board'))
      back.disabled = state.locked || !strokes.trim() && !cleared.length
      again.disabled = state.locked || !undone.length
      empty.disabled = state.locked || !strokes.trim()
      element.classList[state.locked ? 'add' : 'remove']('locked')
      if (state.locked) say(text('paint.linked'))
      else if (wrong) say(text('paint.wrong'))
      else if (connected && !source) say(text('paint.run'))
      else if (note.textContent !== text('paint.full')) say(connected ? '' : text('paint.unconnected'))
    }
  })
}
