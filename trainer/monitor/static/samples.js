// Sample pictures of a run, with a slider over its steps and a second one to compare with.
import { ask, picture } from './api.js'

const by = (id) => document.getElementById(id)
let run = null, steps = [], titles = []

export function listen() {
  for (const id of ['step', 'other', 'two']) by(id).addEventListener('input', show)
  by('size').addEventListener('input', resize)
}

/** Takes up what a run has drawn until now; a slider that stood at the newest step stays at the newest. */
export async function refresh(name) {
  const found = await ask('samples', { run: name })
  const other = name !== run, newest = other || Number(by('step').value) === steps.length - 1
  const same = !other && JSON.stringify(found.steps) === JSON.stringify(steps)
  ;({ steps, titles } = found)
  run = name
  by('samples').hidden = !steps.length
  if (same || !steps.length) return
  for (const id of ['step', 'other']) by(id).max = steps.length - 1
  if (newest) by('step').value = steps.length - 1
  if (other) by('other').value = 0
  show()
}

function show() {
  const two = by('two').checked, chosen = [steps[by('step').value], ...(two ? [steps[by('other').value]] : [])]
  by('other-step').hidden = !two
  for (const [id, one] of [['step', chosen[0]], ['other', steps[by('other').value]]]) {
    by(`${id}-said`).textContent = said(one.step)
    by(id).setAttribute('aria-valuetext', said(one.step))
  }
  const count = Math.min(...chosen.map((one) => one.count))
  const places = count ? [...Array(count).keys()] : [null]
  const before = [...by('pictures').children]
  by('pictures').replaceChildren(...places.map((index, i) => figure(before[i], index, two ? chosen.toReversed() : chosen)))
  resize()
}

const said = (step) => step ? step.toLocaleString('en') : 'before'

function figure(before, index, chosen) {
  const made = before ?? document.createElement('figure')
  const row = made.querySelector('div') ?? made.appendChild(document.createElement('div'))
  const caption = made.querySelector('figcaption') ?? made.appendChild(document.createElement('figcaption'))
  const title = index === null ? 'all prompts' : titles[index] ?? ''
  while (row.children.length > chosen.length) row.lastChild.remove()
  chosen.forEach(({ step }, i) => {
    const image = row.children[i] ?? row.appendChild(new Image())
    image.onload = resize
    image.alt = `${title}, step ${said(step)}`
    image.title = image.alt
    const address = picture(run, step, index)
    if (image.getAttribute('src') !== address) image.src = address
  })
  caption.textContent = title
  return made
}

function resize() {
  const side = Number(by('size').value)
  for (const image of by('pictures').querySelectorAll('img')) {
    const { naturalWidth, naturalHeight } = image
    if (!naturalWidth) continue
    const whole = image.closest('figure').querySelector('figcaption').textContent === 'all prompts'
    const scale = whole ? 1 : side / Math.max(naturalWidth, naturalHeight)
    image.width = Math.round(naturalWidth * scale)
    image.classList.toggle('tiny', scale >= 3)
    image.closest('figure').querySelector('figcaption').style.maxWidth = `${image.closest('div').childElementCount * image.width}px`
  }
}
