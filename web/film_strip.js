// 'PixelFlow Sample': the picture after each stage of the last run, below the node's widgets.
import { app } from '../../scripts/app.js'
import { make, mount, on, text, toggle, widgetOf } from './lib.mjs'
import { address, outputOf, pager } from './pictures.mjs'

const HEIGHT = 130

app.registerExtension({
  name: 'PixStack.FilmStrip',
  settings: [toggle('FilmStrip', 'Film strip on PixelFlow Sample', 'The picture after each stage, when a run is done.')],
  nodeCreated(node) {
    if (node.comfyClass === 'PixStack_PixelFlowSample' && on('FilmStrip')) filmStrip(node)
  }
})

function filmStrip(node) {
  const image = make('img', { draggable: 'false' }), sizes = make('div', { class: 'sizes' })
  const picture = make('div', { class: 'picture' }, image, sizes), frame = make('div', { class: 'board' }, picture)
  const at = { picture: 0 }
  const pages = pager((by) => {
    at.picture += by
    shown.redraw()
  }, () => text('map.earlier'), () => text('map.later'))
  const bar = make('div', { class: 'bar' }, pages.element), note = make('div', { class: 'empty' })
  const element = make('div', { class: 'film' }, frame, bar, note)
  const gone = (yes) => {
    note.hidden = !yes
    note.textContent = text('pictures.gone')
    frame.hidden = yes
  }
  // Only where there is something to show: no node is taller before its first run, nor a saved one when it is opened.
  const show = (yes) => {
    const widget = widgetOf(node, 'film_strip')
    if (!!widget.hidden === !yes) return
    widget.hidden = element.hidden = !yes
    if (yes) delete widget.computeSize
    else widget.computeSize = () => [0, -4]
    const least = node.computeSize()[1]
    if (yes && node.size[1] < least) node.setSize([node.size[0], least])
    node.setDirtyCanvas?.(true, true)
  }
  image.addEventListener('load', () => {
    picture.style.setProperty('--ratio', image.naturalWidth / image.naturalHeight)
    gone(false)
  })
  image.addEventListener('error', () => gone(true))
  const size = [...node.size]
  const shown = mount(node, 'film_strip', element, {
    height: HEIGHT,
    state: () => outputOf(node).pixstack_stages?.[0] ?? null,
    draw(stages) {
      show(!!stages)
      if (!stages) return
      const count = stages.strips.length
      at.picture = ((at.picture % count) + count) % count
      bar.hidden = count < 2
      pages.show(at.picture, count, text('map.picture', { number: at.picture + 1, count }))
      gone(false)
      image.alt = text('film.strip', { count: stages.sizes.length })
      const source = address(stages.strips[at.picture])
      if (image.src !== new URL(source, location).href) image.src = source
      sizes.replaceChildren(...stages.sizes.map(([width, height]) => make('span', {}, make('b', {}, `${width} × ${height}`))))
    }
  })
  node.setSize(size)
}
