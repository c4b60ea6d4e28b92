// 'PixelPonder Conditions': a row of controls for each hint, which writes the node's settings; and on ComfyUIs without
// growing slots, slots that come when they are needed.
import { app } from '../../scripts/app.js'
import { linked, make, mount, on, remember, set, text, toggle, widgetOf } from './lib.mjs'

const KINDS = ['canny', 'depth', 'hed', 'pose']
const NUMBERS = { // name: usual, least, most, step, as in nodes/pixelponder_regions.py
  strength: [1, 0, 10, 0.05], priority: [0, -100, 100, 1], start: [0, 0, 1, 0.05], end: [1, 0, 1, 0.05]
}
const SLOT = /^(?:hints\.|masks\.)?(hint|mask)_(\d+)$/

app.registerExtension({
  name: 'PixStack.PonderConditions',
  settings: [toggle('PonderConditions', 'Rows on PixelPonder Conditions', 'Kind, strength and the rest of each hint as controls.')],
  nodeCreated(node) {
    if (node.comfyClass !== 'PixStack_PixelPonderConditions') return
    if (!node.inputs?.some((input) => /COMFY_AUTOGROW/.test(input.type)) && fixed(node)) grow(node)
    if (on('PonderConditions')) rows(node)
  }
})

// --- Rows

function rows(node) {
  const table = make('div', { class: 'table' }), note = make('div', { class: 'faint note' })
  const element = make('div', { class: 'conditions' }, table, note)
  let lines = []

  const numbers = () => {
    const connected = (node.inputs ?? []).flatMap((input) => {
      const slot = SLOT.exec(input.name)
      return slot?.[1] === 'hint' && input.link != null ? [Number(slot[2])] : []
    })
    return [...new Set(connected)].sort((a, b) => a - b)
  }
  const write = (number, name, value) => {
    while (lines.length < number) lines.push('')
    const values = { kind: 'canny', ...parsed(lines[number - 1]), [name]: value }
    const words = Object.entries(NUMBERS).flatMap(([key, [usual]]) =>
      values[key] == null || Number(values[key]) === usual ? [] : [`${key}=${values[key]}`])
    lines[number - 1] = [values.kind, ...words].join(' ')
    set(node, { settings: lines.join('\n') })
    remember()
  }

  mount(node, 'conditions', element, {
    height: 96,
    hidden: () => ['settings'],
    state: () => ({ settings: widgetOf(node, 'settings')?.value ?? '', numbers: numbers(), locked: linked(node, 'settings') }),
    draw({ settings, numbers, locked }) {
      lines = settings.split('\n')
      const focus = element.contains(document.activeElement) ? document.activeElement.dataset.field : undefined
      const head = ['', 'kind', ...Object.keys(NUMBERS)].map((name) => make('span', { class: 'faint' }, name && text(`conditions.${name}`)))
      table.replaceChildren(...(numbers.length ? head : []), ...numbers.flatMap((number) => row(number, locked)))
      if (focus) element.querySelector(`[data-field="${focus}"]`)?.focus()
      const wrong = numbers.filter((number) => lines[number - 1]?.trim() && !parsed(lines[number - 1]))
      note.textContent = locked ? text('conditions.linked') : !numbers.length ? text('conditions.empty')
        : wrong.length ? text('conditions.wrong', { number: wrong[0] }) : ''
    }
  })

  function row(number, locked) {
    const values = parsed(lines[number - 1] ?? '') ?? {}
    const field = (name, control) => {
      control.dataset.field = `${name} ${number}`
      control.setAttribute('aria-label', `${text(`conditions.${name}`)} ${number}`)
      control.disabled = locked
      control.addEventListener('change', () => write(number, name, control.value))
      control.addEventListener('keydown', (event) => event.stopPropagation())
      return control
    }
    const kind = make('select', {}, ...(values.kind ? [] : [make('option', { value: '' }, '')]),
      ...KINDS.map((one) => make('option', { value: one }, one)))
    kind.value = values.kind ?? ''
    const inputs = Object.entries(NUMBERS).map(([name, [usual, min, max, step]]) => {
      const input = make('input', { type: 'number', min, max, step })
      input.value = values[name] ?? usual
      input.addEventListener('change', () => { // before the one that writes
        const value = Number(input.value)
        input.value = Number.isFinite(value) && input.value !== '' ? Math.min(max, Math.max(min, value)) : usual
        if (name === 'priority') input.value = Math.round(input.value)
      })
      return field(name, input)
    })
    return [make('span', { class: 'number' }, `${number}`), field('kind', kind), ...inputs]
  }
}

/** {kind, strength, ...} of a line as it stands there, {} for an empty one, undefined for one that is none. */
function parsed(line = '') {
  const [kind, ...words] = line.trim().split(/\s+/)
  if (!kind) return {}
  const values = Object.fromEntries(words.map((word) => word.split('=')))
  const known = Object.entries(values).every(([name, value]) => NUMBERS[name] && value?.trim() && Number.isFinite(Number(value)))
  return KINDS.includes(kind) && known ? { kind, ...values } : undefined
}

// --- Slots, where ComfyUI has no growing ones

const fixed = (node) => node.inputs?.some((input) => input.name === 'hints.hint_2')

/** Take away the pairs of slots after the first free one; they come again, in order, when that is connected. */
function grow(node) {
  const all = node.inputs.filter((input) => SLOT.test(input.name)).map(({ name, type, shape }) => ({ name, type, shape }))
  const numberOf = (name) => Number(SLOT.exec(name)?.[2] ?? 0)
  let busy = false
  const fit = () => {
    if (busy || node.graph?.isLoading) return
    busy = true
    const used = Math.max(0, ...node.inputs.filter((input) => input.link != null).map((input) => numberOf(input.name)))
    const most = used + 1
    for (let i = node.inputs.length - 1; i >= 0; i--)
      if (numberOf(node.inputs[i].name) > most && node.inputs[i].link == null) node.removeInput(i)
    for (const { name, type, shape } of all)
      if (numberOf(name) <= most && !node.inputs.some((input) => input.name === name))
        node.addInput(name, type, { shape })
    for (const input of node.inputs) if (SLOT.test(input.name)) input.label = input.name.split('.')[1]
    // Nodes 2.0 of 1.32.9 look at slots only when a link of a widget changes.
    node.graph?.trigger?.('node:slot-links:changed', { nodeId: node.id, slotType: 1, slotIndex: 0, connected: true })
    busy = false
  }
  const chain = (name) => {
    const before = node[name]
    node[name] = function () {
      const answer = before?.apply(this, arguments)
      setTimeout(fit) // when all links of what is loaded are there
      return answer
    }
  }
  chain('onConnectionsChange')
  chain('onConfigure')
  fit()
}
