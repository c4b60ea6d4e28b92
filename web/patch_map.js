// 'PixelPonder Map': which condition won which patch, over the hints, step by step, live while sampling.
import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'
import { make, mount, on, text, toggle, values } from './lib.mjs'
import { address, allBefore, keys, outputOf, pager } from './pictures.mjs'

const HEIGHT = 280
const SIDE = 768 // pixels of the longer side of what is drawn
const COLOURS = ['#e69f00', '#56b4e9', '#009e73', '#f0e442', '#d55e00', '#cc79a7', '#0072b2', '#ffffff'] // as in map.py
const maps = new Set() // of nodes: what takes a step while sampling

app.registerExtension({
  name: 'PixStack.PatchMap',
  settings: [toggle('PatchMap', 'Map on PixelPonder Map', 'Who won which patch, step by step, live while sampling.')],
  setup() {
    api.addEventListener('pixstack.map', ({ detail }) => maps.forEach((take) => take(detail)))
  },
  nodeCreated(node) {
    if (node.comfyClass === 'PixStack_PixelPonderMap' && on('PatchMap')) patchMap(node)
  }
})

function patchMap(node) {
  const canvas = make('canvas', { role: 'img' }), picture = make('div', { class: 'picture' }, canvas)
  const board = make('div', { class: 'board' }, picture)
  const step = make('input', { type: 'range', min: '0', step: '1' }), place = make('span', { class: 'faint' })
  const pages = pager((by) => turn(by), () => text('map.earlier'), () => text('map.later'))
  const bar = make('div', { class: 'bar' }, step, place, pages.element)
  const legend = make('div', { class: 'bar legend' }), note = make('div', { class: 'empty' })
  const element = make('div', { class: 'map roomy' }, board, bar, legend, note)
  const context = canvas.getContext('2d'), scratch = document.createElement('canvas').getContext('2d')

  const at = { step: Infinity, picture: 0 } // Infinity: the last one, also while more come
  let live, drawing = 0

  /** A step of a sampling that runs: {node, step, steps, names, rows, columns, tiles}. */
  function take(detail) {
    const id = String(detail.node).split(':').at(-1)
    if (!allBefore(node, 'positive').includes(id)) return
    const same = live && live.total === detail.steps && live.steps.at(-1) < detail.step &&
      String(live.names) === String(detail.names)
    if (!same) live = { ...detail, total: detail.steps, steps: [], tiles: [], hints: hintsFor(detail.names) }
    live.steps.push(detail.step)
    live.tiles.push(detail.tiles)
    shown.redraw()
  }
  maps.add(take)
  const removed = node.onRemoved
  node.onRemoved = function () {
    maps.delete(take)
    return removed?.apply(this, arguments)
  }
  const executed = node.onExecuted
  node.onExecuted = function (output) {
    live = undefined
    return executed?.apply(this, arguments)
  }

  const hintsFor = (names) => {
    const last = outputOf(node).pixstack_map?.[0]
    return last && String(last.names) === String(names) ? last.hints : []
  }
  const turn = (by) => {
    at.picture += by
    shown.redraw()
  }
  step.addEventListener('input', () => {
    at.step = Number(step.value) >= Number(step.max) ? Infinity : Number(step.value)
    shown.redraw()
  })
  keys(step, (event) => {
    const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -5, PageUp: 5,
      Home: -Infinity, End: Infinity }[event.key]
    if (by === undefined) return false
    step.value = Math.min(Number(step.max), Math.max(0, Number(step.value) + by))
    step.dispatchEvent(new Event('input'))
    return true
  })

  const shown = mount(node, 'patch_map', element, {
    height: HEIGHT,
    state: () => ({ map: live ?? outputOf(node).pixstack_map?.[0] ?? null, ...values(node, ['overlay']) }),
    draw({ map, overlay }) {
      note.hidden = !!map
      board.hidden = bar.hidden = legend.hidden = !map
      if (!map) {
        note.textContent = text('map.empty')
        return
      }
      const last = map.steps.length - 1, row = Math.min(at.step, last)
      step.max = String(last)
      step.value = String(row)
      step.hidden = last < 1
      step.setAttribute('aria-label', text('map.step'))
      place.textContent = map.total ? text('map.place', { number: map.steps[row], count: map.total }) : text('map.before')
      const pictures = map === live ? 1 : map.tiles.length
      at.picture = ((at.picture % pictures) + pictures) % pictures
      pages.show(at.picture, pictures, text('map.picture', { number: at.picture + 1, count: pictures }))
      picture.style.setProperty('--ratio', map.columns / map.rows)
      // The tiles of a step are a row of one picture, or, live, a picture of their own.
      const [source, top] = map === live ? [map.tiles[row], 0] : [address(map.tiles[at.picture]), row * map.rows]
      const hints = map.hints.map((of) => of && address(of[at.picture % of.length]))
      paint(map, source, top, hints, overlay ?? 0.5)
    }
  })

  async function paint({ names, rows, columns }, source, top, hints, overlay) {
    const mine = ++drawing
    const [tiles, ...behind] = await Promise.all([source, ...hints].map(loaded))
    if (mine !== drawing) return // another step was chosen while pictures came
    if (!tiles) {
      note.hidden = false
      board.hidden = bar.hidden = legend.hidden = true
      note.textContent = text('pictures.gone')
      return
    }
    const scale = SIDE / Math.max(rows, columns)
    for (const one of [canvas, scratch.canvas]) {
      one.width = Math.round(columns * scale)
      one.height = Math.round(rows * scale)
    }
    const { width, height } = canvas
    context.globalCompositeOperation = 'lighter' // shares of a patch add up to 1 at most
    const shares = names.map((name, k) => {
      const from = [tiles, k * columns, top, columns, rows, 0, 0, width, height]
      const layer = (fill, alpha) => {
        scratch.globalCompositeOperation = 'copy'
        scratch.imageSmoothingEnabled = false
        scratch.drawImage(...from)
        scratch.globalCompositeOperation = 'source-in'
        scratch.imageSmoothingEnabled = true
        fill()
        context.globalAlpha = alpha
        context.drawImage(scratch.canvas, 0, 0)
      }
      const colour = COLOURS[k % COLOURS.length], tint = behind[k] ? overlay : 1
      if (behind[k]) layer(() => scratch.drawImage(behind[k], 0, 0, width, height), 1 - overlay)
      layer(() => {
        scratch.fillStyle = colour
        scratch.fillRect(0, 0, width, height)
      }, tint)
      return share(tiles, k * columns, top, columns, rows)
    })
    context.globalAlpha = 1
    context.globalCompositeOperation = 'source-over'
    legend.replaceChildren(...names.map((name, k) => make('span', { class: 'chip' },
      make('i', { style: `background: ${COLOURS[k % COLOURS.length]}` }),
      `${name} ${Math.round(100 * shares[k])} %`)))
    canvas.setAttribute('aria-label', legend.textContent)
    canvas.dataset.shares = shares.map((one) => one.toFixed(3)).join(' ')
  }
}

/** The mean opacity of a part of a picture. */
function share(image, x, y, width, height) {
  const small = new OffscreenCanvas(width, height).getContext('2d', { willReadFrequently: true })
  small.drawImage(image, x, y, width, height, 0, 0, width, height)
  const { data } = small.getImageData(0, 0, width, height)
  let sum = 0
  for (let i = 3; i < data.length; i += 4) sum += data[i]
  return sum / 255 / (width * height)
}

const pictures = new Map()
/** The image at an address, undefined without one or if it is gone. The last ones are kept. */
function loaded(source) {
  if (!source) return undefined
  if (!pictures.has(source)) {
    pictures.set(source, new Promise((resolve) => {
      const image = new Image()
      image.onload = () => resolve(image)
      image.onerror = () => resolve(undefined)
      image.src = source
    }))
    if (pictures.size > 200) pictures.delete(pictures.keys().next().value)
  }
  return pictures.get(source)
}
