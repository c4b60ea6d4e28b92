// 'Compare Pictures': two pictures under one slider. Without this script core shows them as a batch.
import { app } from '../../scripts/app.js'
import { make, mount, on, text, toggle } from './lib.mjs'
import { address, follow, insteadOfPreview, keys, outputOf, pager, within } from './pictures.mjs'

const HEIGHT = 260

app.registerExtension({
  name: 'PixStack.ComparePictures',
  settings: [toggle('ComparePictures', 'Slider on Compare Pictures', 'Two pictures under one slider, instead of a batch.')],
  nodeCreated(node) {
    if (node.comfyClass === 'PixStack_ComparePictures' && on('ComparePictures')) compare(node)
  }
})

function compare(node) {
  const a = make('img', { class: 'a', draggable: 'false', alt: '' }), b = make('img', { draggable: 'false', alt: '' })
  const line = make('div', { class: 'line' })
  const tags = [make('span', { class: 'tag left' }, 'A'), make('span', { class: 'tag right' }, 'B')]
  const picture = make('div', { class: 'picture' }, b, a, line, ...tags)
  const board = make('div', { class: 'board', tabindex: '0', role: 'slider', 'aria-valuemin': '0', 'aria-valuemax': '100' },
    picture)
  const sizes = make('span', { class: 'faint' }), note = make('div', { class: 'empty' })
  const turn = (by) => {
    at.index += by
    shown.redraw()
  }
  const pages = pager(turn, () => text('pictures.earlier'), () => text('pictures.later'))
  const bar = make('div', { class: 'bar' }, pages.element, sizes)
  const element = make('div', { class: 'compare roomy' }, board, bar, note)
  insteadOfPreview(node, element)

  const at = { part: 0.5, index: 0 }
  const place = (part) => {
    at.part = Math.min(1, Math.max(0, part))
    picture.style.setProperty('--at', `${100 * at.part}%`)
    board.setAttribute('aria-valuenow', Math.round(100 * at.part))
    node.imageIndex = at.part < 0.5 ? 1 : 0
    for (const [tag, hidden] of [[tags[0], at.part < 0.06], [tags[1], at.part > 0.94]]) tag.hidden = hidden
  }
  const drag = (event) => place(within(picture, event)[0])
  follow(board, { down: (event) => (board.focus({ preventScroll: true }), drag(event)), move: drag })
  keys(board, (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return false
    const step = event.shiftKey ? 0.1 : 0.01
    if (event.key === 'ArrowLeft') place(at.part - step)
    else if (event.key === 'ArrowRight') place(at.part + step)
    else if (event.key === 'Home') place(0)
    else if (event.key === 'End') place(1)
    else if (event.key === 'PageUp' || event.key === 'ArrowUp') turn(-1)
    else if (event.key === 'PageDown' || event.key === 'ArrowDown') turn(1)
    else return false
    return true
  })

  const about = () => {
    const size = (image) => (image.naturalWidth ? `${image.naturalWidth} × ${image.naturalHeight}` : '')
    const both = [...new Set([a, b].map(size).filter(Boolean))]
    sizes.textContent = both.length < 2 ? both[0] ?? '' : `A ${size(a)}, B ${size(b)}`
    if (a.naturalWidth) picture.style.setProperty('--ratio', a.naturalWidth / a.naturalHeight)
  }
  for (const image of [a, b]) {
    image.addEventListener('load', about)
    image.addEventListener('error', () => say(text('pictures.gone')))
  }
  const say = (words) => {
    note.textContent = words
    note.hidden = !words
    board.hidden = bar.hidden = !!words
  }

  const shown = mount(node, 'compare', element, {
    height: HEIGHT,
    state: () => {
      const { images = [], pixstack_compare: counts } = outputOf(node)
      return counts ? { images, counts: counts.slice(0, 2) } : {}
    },
    draw({ images, counts }) {
      board.setAttribute('aria-label', text('compare.board'))
      if (!counts) return say(text('compare.empty'))
      const count = Math.max(...counts)
      at.index = ((at.index % count) + count) % count
      say('')
      // The frontend's own menu of a picture (open, save, copy) is of the one that takes more of the board.
      const pair = [images[at.index % counts[0]], images[counts[0] + (at.index % counts[1])]].map(address)
      for (const [image, source] of [[a, pair[0]], [b, pair[1]]])
        if (image.src !== new URL(source, location).href) image.src = source
      node.imgs = [a, b]
      pages.show(at.index, count, text('pictures.place', { number: at.index + 1, count }))
      place(at.part)
    }
  })
}
