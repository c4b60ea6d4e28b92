// Curves of one or several runs, by uPlot.
/* global uPlot */

const COLOURS = ['#2f6fde', '#e0712c', '#2a9d62', '#b04fc4', '#c9a20c', '#d3486b', '#16a3b8', '#7a6a58']
const MAIN = [['loss', 'Loss'], ['validation_loss', 'Validation loss'], ['learning_rate', 'Learning rate']]
const MORE = [['grad_norm', 'Gradient norm'], ['images_per_second', 'Pictures a second']]
const Z = 1.96 // standard errors to each side that hold 95 %

export const colour = (place) => COLOURS[place % COLOURS.length]
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim()

/** An exponential mean, which begins unbiased. */
export function smoothed(values, share) {
  let sum = 0, weight = 0
  return values.map((value) => {
    if (value === null) return null
    sum = share * sum + (1 - share) * value
    weight = share * weight + (1 - share)
    return sum / weight
  })
}

/** places: the elements for the main curves and for all others. runs: [{name, curves, place}], the shown run first. */
export function draw(places, runs, { smoothing, logarithmic }) {
  const known = new Set(runs.flatMap((run) => Object.keys(run.curves)))
  const others = [...known].filter((name) => name.startsWith('validation_') && !['validation_loss', 'validation_standard_error'].includes(name)).sort()
  const more = [...MORE, ...others.map((name) => [name, name.replace('validation_', 'Validation: ').replaceAll('_', ' ')])]
  for (const [name, { box }] of made) if (!known.has(name)) {
    box.remove()
    made.delete(name)
  }
  for (const [name, title] of [...MAIN, ...more].filter(([name]) => known.has(name))) {
    chart(places[MAIN.some(([main]) => main === name) ? 0 : 1], title, name, runs.filter((run) => run.curves[name]), { smoothing: name === 'loss' ? smoothing : 0, logarithmic: logarithmic && name.includes('loss') })
  }
}

const made = new Map() // curve -> its chart, which takes new points without losing what was zoomed into

function chart(place, title, name, runs, { smoothing, logarithmic }) {
  const tables = [], series = [{ label: 'step' }], bands = []
  const add = (x, y, settings) => {
    tables.push([x, y])
    series.push({ spanGaps: true, points: { show: x.length < 60, size: 5 }, value: (_, v) => v === null ? '–' : shorter(v), ...settings })
    return series.length - 1
  }
  for (const run of runs) {
    const curve = run.curves[name], stroke = colour(run.place), one = runs.length === 1
    const [low, high] = edges(run, name)
    if (low && one) {
      const quiet = { stroke: stroke + '00', width: 0, points: { show: false }, class: 'quiet' }
      const upper = add(curve.x, high, { label: 'high', ...quiet }), lower = add(curve.x, low, { label: 'low', ...quiet })
      bands.push({ series: [upper, lower], fill: stroke + '2e' })
    }
    if (smoothing && one && !low) add(curve.x, curve.y, { label: 'each', stroke: stroke + '55', width: 1, points: { show: false } })
    add(curve.x, smoothing ? smoothed(curve.y, smoothing) : curve.y, { label: one ? 'value' : run.name, stroke, width: 2 })
  }
  const data = uPlot.join(tables), kind = JSON.stringify([series, bands, logarithmic, css('--weak')])
  const before = made.get(name)
  if (before?.kind === kind) {
    const { min, max } = before.plot.scales.x, [x] = before.plot.data
    return before.plot.setData(data, !(min > x[0] || max < x.at(-1)))
  }
  const box = document.createElement('div')
  box.dataset.curve = name
  if (name === 'loss') box.className = 'large'
  before ? before.box.replaceWith(box) : place.append(box)
  const axis = { stroke: css('--weak'), grid: { stroke: css('--grid'), width: 1 }, ticks: { stroke: css('--grid'), width: 1 } }
  const plot = new uPlot({
    title, width: box.clientWidth || 600, height: name === 'loss' ? 280 : 190, series, bands,
    scales: { x: { time: false }, y: { distr: logarithmic ? 3 : 1 } },
    axes: [{ ...axis, values: (_, ticks) => ticks.map(shorter) }, { ...axis, size: 64, values: (_, ticks) => ticks.map((v) => v === null ? '' : shorter(v)) }],
    cursor: { sync: { key: 'steps' }, drag: { x: true, y: false } },
  }, data, box)
  before?.plot.destroy()
  made.set(name, { plot, box, kind })
  new ResizeObserver(() => box.isConnected && box.clientWidth && plot.setSize({ width: box.clientWidth, height: plot.height })).observe(box)
}

/** The band around a curve: the ends of what was thinned out, or the interval of a validation. */
function edges(run, name) {
  const curve = run.curves[name], error = run.curves.validation_standard_error
  if (name === 'validation_loss' && error && error.y.length === curve.y.length)
    return [-Z, Z].map((z) => curve.y.map((value, i) => value === null || error.y[i] === null ? null : value + z * error.y[i]))
  return [curve.low, curve.high]
}

export function shorter(value) {
  if (value === 0) return '0'
  const size = Math.abs(value)
  if (size >= 1e4 && Number.isInteger(value)) return value.toLocaleString('en')
  return size < 1e-3 || size >= 1e6 ? value.toExponential(2).replace('e+', 'e') : String(Number(value.toPrecision(4)))
}
