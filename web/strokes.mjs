// The text of a painting: what nodes/host/pixelponder/strokes.py reads and says. Nothing here touches the page.
export const COLOURS = ['#e69f00', '#56b4e9', '#009e73', '#f0e442'] // as in the patch map
export const GRID = 4096
export const LARGEST = 1000
export const LONGEST = 65536
export const MOST = 1000

/** Strokes {colour, size, points: [[x, y], ...]} of a text; undefined for one that is no painting. */
export function read(text) {
  if (typeof text !== 'string' || text.length > LONGEST) return
  const parts = text.split(';').filter((part) => part.trim())
  if (parts.length > MOST) return
  const strokes = parts.map(stroke)
  return strokes.includes(undefined) ? undefined : strokes
}

function stroke(part) {
  const words = part.trim().split(/\s+/)
  if (words.length < 4 || words.length % 2 || words.some((word) => !/^-?\d{1,6}$/.test(word))) return
  const [colour, size, ...rest] = words.map(Number)
  if (colour < 0 || colour > COLOURS.length || size < 1 || size > LARGEST) return
  const points = []
  let x = 0, y = 0
  for (let i = 0; i < rest.length; i += 2) points.push([x += rest[i], y += rest[i + 1]])
  if (points.flat().some((value) => value < -GRID || value > 2 * GRID)) return
  return { colour, size, points }
}

export const write = (strokes) => strokes.map(({ colour, size, points }) => {
  const steps = points.map(([x, y], i) => (i ? [x - points[i - 1][0], y - points[i - 1][1]] : [x, y]))
  return [colour, size, ...steps.flat()].join(' ')
}).join('; ')

/** The text with one stroke more; undefined if that is more than a painting may hold. */
export function added(text, one) {
  const longer = text.trim() ? `${text.trim().replace(/;$/, '')}; ${write([one])}` : write([one])
  return longer.length > LONGEST || longer.split(';').length > MOST ? undefined : longer
}

export const without = (text) => write((read(text) ?? []).slice(0, -1))

/** A point of a board, each from 0 to 1, in whole parts of GRID. */
export const onGrid = ([x, y]) =>
  [x, y].map((value) => Math.round(GRID * Math.min(1.5, Math.max(-0.5, value))))

/** The fewest of the points from which none of the others is farther than `most` (Douglas and Peucker). */
export function simplified(points, most) {
  const keep = new Set([0, points.length - 1])
  for (const parts = [[0, points.length - 1]]; parts.length;) {
    const [first, last] = parts.pop()
    let farthest = 0, at
    for (let i = first + 1; i < last; i++) {
      const away = distance(points[i], points[first], points[last])
      if (away > farthest) [farthest, at] = [away, i]
    }
    if (farthest <= most) continue
    keep.add(at)
    parts.push([first, at], [at, last])
  }
  return points.filter((_, i) => keep.has(i))
}

function distance([x, y], [ax, ay], [bx, by]) {
  const dx = bx - ax, dy = by - ay
  const t = dx || dy ? Math.min(1, Math.max(0, ((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy))) : 0
  return Math.hypot(x - ax - t * dx, y - ay - t * dy)
}

/** Draw a stroke on a canvas's context as the masks have it. */
export function draw(context, { colour, size, points }) {
  const { width, height } = context.canvas
  const brush = size / 1000 * Math.min(width, height)
  const at = points.map(([x, y]) => [x * width / GRID, y * height / GRID])
  context.globalCompositeOperation = colour ? 'source-over' : 'destination-out'
  context.fillStyle = context.strokeStyle = COLOURS[colour - 1] ?? '#000'
  context.beginPath()
  if (at.length === 1) {
    context.arc(...at[0], brush / 2, 0, 2 * Math.PI)
    context.fill()
    return
  }
  context.lineCap = context.lineJoin = 'round'
  context.lineWidth = brush
  for (const [i, [x, y]] of at.entries()) i ? context.lineTo(x, y) : context.moveTo(x, y)
  context.stroke()
}
