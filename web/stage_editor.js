// The stage editor of PixelFlow's nodes: steps, shift and guidance of every stage as bars to drag, and where the steps
// fall. What the widgets hold is read in Python (nodes/stage_editor.py), which also says what is wrong with it.
import { app } from '../../scripts/app.js'
import { ask, idle, linked, loaderOf, make, mount, on, remember, set, text, values } from './lib.mjs'

const HEIGHTS = { PixStack_PixelFlowSigmas: 158, PixStack_PixelFlowSampler: 96, PixStack_PixelFlowSample: 104 } // pixels
const LEAST_TOP = { steps: 20, shift: 4, guidance: 8 } // of what a full bar stands for

app.registerExtension({
  name: 'PixStack.StageEditor',
  nodeCreated(node) {
    const type = node.constructor.comfyClass ?? node.type
    if (type in HEIGHTS && on('StageEditor')) editor(node, type)
  }
})

function editor(node, type) {
  const presets = make('div', { class: 'presets' })
  const rows = make('div', { class: 'rows' })
  const marks = make('div', { class: 'marks' })
  const said = make('p', { class: 'said' })
  const element = make('div', { class: 'pixstack-stages' }, presets, rows, marks, said)
  let answer = { stages: 0, rows: [], presets: [] }, turn = 0, tops = null, focus = null // tops: fixed while dragging

  function paint() {
    const { stages, total, error, cfg } = answer
    presets.replaceChildren(...answer.presets.map((one) => {
      const button = make('button', { type: 'button', title: text(`stages.presetTip.${one.name}`) }, text(`stages.preset.${one.name}`))
      button.addEventListener('click', () => {
        set(node, one.set)
        remember()
      })
      return button
    }))
    const kept = rows.contains(document.activeElement) ? focus : null // bars are made anew
    rows.replaceChildren(...answer.rows.map((row) => rowOf(row, stages)))
    marks.replaceChildren(...(answer.marks ?? []).flatMap((own, stage) => own.map((at) =>
      make('i', { style: `left: ${(at * 100).toFixed(2)}%`, class: stage % 2 ? 'odd' : 'even' }))))
    marks.title = text('stages.marks')
    marks.hidden = !answer.marks
    said.className = `said ${error ? 'error' : 'note'}`
    said.textContent = said.title = error ?? (total ? text('stages.total', { n: total }) : cfg ? text('stages.cfg', { cfg }) : '')
    said.toggleAttribute('role', false)
    if (error) said.setAttribute('role', 'alert')
    if (kept) rows.querySelector(`[data-row="${kept[0]}"][data-stage="${kept[1]}"]`)?.focus({ preventScroll: true })
  }

  function rowOf(row, stages) {
    const top = tops?.[row.name] ?? topOf(row)
    const bars = row.values.map((value, stage) => {
      const used = !answer.marks || answer.marks[stage]?.length
      const bar = make('div', {
        class: `stage-bar${used ? '' : ' unused'}${row.faint ? ' pale' : ''}`, tabindex: 0, role: 'slider',
        'data-row': row.name, 'data-stage': stage, 'aria-valuenow': value, 'aria-valuemin': row.least,
        'aria-label': text('stages.stage', { name: text(`stages.${row.name}`), stage }), title: text('stages.tip')
      }, make('div', { style: `height: ${Math.min(100, (100 * value) / top)}%` }), make('span', {}, short(value)))
      bar.addEventListener('pointerdown', (event) => down(event, row, stage, bar))
      bar.addEventListener('keydown', (event) => key(event, row, stage, stages))
      bar.addEventListener('keyup', (event) => STEPS[event.key] && remember())
      bar.addEventListener('focus', () => { focus = [row.name, stage] })
      return bar
    })
    return make('div', { class: 'row' }, make('label', {}, text(`stages.${row.name}`)), ...bars)
  }

  /** Write a stage's number into the node's own input: one number where all stages have the same. */
  function change(row, stage, value, all) {
    const rounded = Math.max(row.least, Math.round(value / row.by) * row.by)
    const exact = Number(rounded.toFixed(2))
    row.values = row.values.map((old, i) => (all || !row.list || i === stage ? exact : old))
    row.faint = false
    const same = !row.always_list && row.values.every((one) => one === row.values[0])
    set(node, { [row.input]: !row.list ? exact : same ? short(exact) : row.values.map(short).join(', '), ...row.also })
    paint()
  }

  function down(event, row, stage, bar) {
    if (event.button) return
    event.preventDefault()
    const box = bar.getBoundingClientRect()
    tops = Object.fromEntries(answer.rows.map((one) => [one.name, topOf(one)]))
    bar.focus({ preventScroll: true })
    const current = () => answer.rows.find((one) => one.name === row.name) ?? row
    const move = (now) => change(current(), stage, ((box.bottom - now.clientY) / box.height) * tops[row.name], now.shiftKey)
    const end = () => {
      for (const [name, listener] of listeners) window.removeEventListener(name, listener, true)
      tops = null
      remember()
      paint()
    }
    const listeners = [['pointermove', move], ['pointerup', end], ['pointercancel', end]]
    for (const [name, listener] of listeners) window.addEventListener(name, listener, true) // bars are made anew
    move(event)
  }

  function key(event, row, stage, stages) {
    const [x, y] = STEPS[event.key] ?? []
    if (x == null) return
    event.preventDefault()
    event.stopPropagation()
    if (y) return change(row, stage, row.values[stage] + y * row.by, event.shiftKey)
    focus = [row.name, Math.min(Math.max(stage + x, 0), stages - 1)]
    paint()
  }

  async function draw(state) {
    const mine = ++turn
    const now = await ask('stages', state).catch((error) => ({ ...answer, error: error.message }))
    if (mine !== turn) return
    answer = now
    paint()
  }

  mount(node, 'pixstack_stages', element, {
    height: HEIGHTS[type],
    draw,
    hidden: () => idle(node),
    state: () => ({
      node: type,
      values: values(node, node.widgets.map((widget) => widget.name)
        .filter((name) => !/^(pixstack_|\$)/.test(name))), // of elements, ours and the frontend's
      linked: (node.inputs ?? []).map((input) => input.name).filter((name) => linked(node, name)),
      model: loaderOf(node)
    })
  })
}

const STEPS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }

const topOf = (row) => Math.max(LEAST_TOP[row.name], 1.25 * Math.max(...row.values))
const short = (value) => String(Number(value.toFixed(2)))
