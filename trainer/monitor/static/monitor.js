// The page: which run is shown, what it says of itself, its orders and settings. Asked anew every few seconds.
import { ask, order } from './api.js'
import { colour, draw, shorter } from './charts.js'
import * as exports from './exports.js'
import * as samples from './samples.js'

const EVERY = 3000 // milliseconds
const by = (id) => document.getElementById(id)
const state = { runs: [], shown: null, beside: new Set(), colours: new Map(), drawn: '', settings: '' }

function colourOf(name) {
  if (!state.colours.has(name)) state.colours.set(name, state.colours.size)
  return state.colours.get(name)
}

const chosen = () => [state.shown, ...[...state.beside].filter((name) => name !== state.shown)]

async function refresh() {
  try {
    state.runs = await ask('runs')
    by('connection').textContent = ''
    const names = state.runs.map((run) => run.name)
    for (const name of state.beside) if (!names.includes(name)) state.beside.delete(name)
    if (!names.includes(state.shown)) {
      const wanted = decodeURIComponent(location.hash.slice(1))
      const active = state.runs.find((run) => ['running', 'paused'].includes(run.state))
      state.shown = names.includes(wanted) ? wanted : active?.name ?? names.at(-1) ?? null
    }
    list()
    by('nothing').hidden = state.shown !== null
    by('shown').hidden = state.shown === null
    if (state.shown === null) return
    figures(state.runs.find((run) => run.name === state.shown))
    await Promise.all([curves(), samples.refresh(state.shown), exports.refresh(state.shown), settings()])
  } catch (error) {
    by('connection').textContent = `The monitor does not answer (${error.message}). Trying again.`
  }
}

function list() {
  const places = new Map([...by('runs').children].map((item) => [item.dataset.run, item]))
  for (const run of state.runs) {
    const item = places.get(run.name) ?? entry(run.name)
    places.delete(run.name)
    const [box, button] = item.children
    box.checked = state.beside.has(run.name)
    box.style.visibility = run.name === state.shown ? 'hidden' : 'visible'
    button.setAttribute('aria-current', run.name === state.shown)
    const [dot, name, words] = button.children
    dot.className = `dot ${run.state}`
    name.textContent = run.name
    const loss = run.last.validation_loss ?? run.last.loss
    words.textContent = [run.state, `${run.step.toLocaleString('en')} / ${run.steps.toLocaleString('en')}`, loss == null ? '' : shorter(loss)].filter(Boolean).join(' · ')
    if (!item.isConnected) by('runs').append(item)
  }
  for (const gone of places.values()) gone.remove()
}

function entry(name) {
  const item = document.createElement('li'), box = document.createElement('input'), button = document.createElement('button')
  item.dataset.run = name
  box.type = 'checkbox'
  box.setAttribute('aria-label', `Put ${name} beside the shown run`)
  box.addEventListener('change', () => {
    state.beside[box.checked ? 'add' : 'delete'](name)
    refresh()
  })
  button.type = 'button'
  button.append(document.createElement('i'), document.createElement('b'), document.createElement('small'))
  button.addEventListener('click', () => {
    state.shown = name
    location.hash = encodeURIComponent(name)
    by('said').textContent = ''
    refresh()
  })
  item.append(box, button)
  return item
}

function figures(run) {
  const active = ['running', 'paused'].includes(run.state), last = run.last
  by('name').textContent = run.name
  by('state').textContent = run.state
  by('state').className = `state ${run.state}`
  by('progress').max = Math.max(run.steps, 1)
  by('progress').value = run.step
  document.title = `${run.steps ? Math.floor(100 * run.step / run.steps) : 0} % ${run.name} – PixStack monitor`
  const error = last.validation_standard_error
  const rows = {
    Recipe: run.recipe,
    Step: `${run.step.toLocaleString('en')} / ${run.steps.toLocaleString('en')}`,
    Loss: last.loss == null ? null : shorter(last.loss),
    Validation: last.validation_loss == null ? null : shorter(last.validation_loss) + (error == null ? '' : ` ± ${Number((1.96 * error).toPrecision(2))}`),
    'Learning rate': last.learning_rate == null ? null : shorter(last.learning_rate),
    'Pictures a second': last.images_per_second == null ? null : shorter(last.images_per_second),
    'Memory, at most': run.memory == null ? null : `${(run.memory / 2 ** 30).toFixed(1)} GiB`,
    'Time left': run.seconds_left == null ? null : duration(run.seconds_left)
  }
  by('figures').replaceChildren(...Object.entries(rows).filter(([, value]) => value != null).map(([name, value]) => {
    const box = document.createElement('div'), term = document.createElement('dt'), text = document.createElement('dd')
    term.textContent = name
    text.textContent = value
    box.append(term, text)
    return box
  }))
  const paused = run.orders.includes('pause') || run.state === 'paused'
  for (const button of by('orders').children) {
    const what = button.dataset.order
    button.disabled = !active || run.orders.includes(what)
    if (what === 'pause' || what === 'resume') {
      button.dataset.order = paused ? 'resume' : 'pause'
      button.textContent = paused ? 'Resume' : 'Pause'
      button.disabled = !active
    }
  }
}

function duration(seconds) {
  const [days, hours, minutes] = [86400, 3600, 60].map((unit, i, all) => Math.floor((i ? seconds % all[i - 1] : seconds) / unit))
  if (days) return `${days} d ${hours} h`
  if (hours) return `${hours} h ${minutes} min`
  return minutes ? `${minutes} min` : `${Math.round(seconds)} s`
}

const SAID = { sample: 'Samples will be drawn after the step in work.', pause: 'The run waits after the step in work.',
  resume: 'The run goes on.', stop: 'The run saves and ends after the step in work.' }

async function obey({ target }) {
  const what = target.dataset?.order
  if (!what) return
  if (what === 'stop' && !confirm(`Save and end ${state.shown}? The same command goes on from there.`)) return
  try {
    await order(state.shown, what)
    by('said').textContent = SAID[what]
  } catch (error) {
    by('said').textContent = error.message
  }
  refresh()
}

async function curves(anew = false) {
  const names = chosen()
  const found = await Promise.all(names.map((run) => ask('curves', { run, points: 800 })))
  const runs = names.map((name, i) => ({ name, curves: found[i], place: colourOf(name) }))
  const text = JSON.stringify(runs)
  if (!anew && text === state.drawn) return
  state.drawn = text
  draw([by('charts'), by('more')], runs, { smoothing: Number(by('smoothing').value), logarithmic: by('logarithmic').checked })
}

async function settings() {
  const names = chosen(), rows = await ask('settings', { run: names })
  const words = by('search').value.trim().toLowerCase(), only = by('differing').checked
  const text = JSON.stringify([names, rows, words, only])
  if (text === state.settings) return
  state.settings = text
  const head = document.createElement('thead'), body = document.createElement('tbody')
  head.append(row('th', 'setting', names))
  for (const one of rows) {
    const values = one.values.map((value) => value === null ? '–' : typeof value === 'string' ? value : JSON.stringify(value))
    if (only && !one.differs) continue
    if (words && !`${one.name} ${values.join(' ')}`.toLowerCase().includes(words)) continue
    const made = row('td', one.name, values)
    made.classList.toggle('differs', one.differs)
    body.append(made)
  }
  by('settings').replaceChildren(head, body)
  ;[...head.querySelectorAll('th')].slice(1).forEach((cell, i) => names.length > 1 && (cell.style.color = colour(colourOf(names[i]))))
}

function row(kind, name, values) {
  const made = document.createElement('tr'), first = document.createElement('th')
  first.textContent = name
  first.scope = kind === 'th' ? 'col' : 'row'
  made.append(first, ...values.map((value) => Object.assign(document.createElement(kind), { textContent: value })))
  return made
}

by('orders').addEventListener('click', obey)
for (const id of ['smoothing', 'logarithmic']) by(id).addEventListener('input', () => curves(true))
for (const id of ['search', 'differing']) by(id).addEventListener('input', settings)
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => curves(true))
samples.listen()
exports.listen()

async function turn() {
  if (!document.hidden) await refresh()
  setTimeout(turn, EVERY)
}
turn()
