// Opens workflows in the real frontend: asks it for the API format of each, measures what it draws, queues those that say
// so, takes pictures.
// node run.mjs ADDRESS JOBS.json    the answer on stdout is JSON.
// jobs: [{name, renderer, workflow, shown, queue, opened, rest, after}]
//   renderer        'classic' or 'nodes2'
//   shown           what a run would leave on the nodes (canvas.mjs, pretend); they are measured again with it
//   queue           run it truly, in one step if its pictures are not kept, wait for its pictures, measure again
//   opened, rest, after   files for pictures: as it opens, all of it, all of it after the run
import fs from 'node:fs'
import { alerts, corner, kinds, load, measure, pretend } from './canvas.mjs'
import { drawn, fit, hurry, launch, open, prompt, RENDERERS } from './page.mjs'

const [address, jobsPath] = process.argv.slice(2)
const jobs = JSON.parse(fs.readFileSync(jobsPath))
const answer = { errors: [], jobs: [] }
await Promise.all(RENDERERS.map(async (renderer) => { // each waits for its page most of the time
  const wanted = jobs.filter((job) => job.renderer === renderer)
  if (!wanted.length) return
  const needed = [...new Set(wanted.flatMap((job) => kinds(job.workflow)))]
  const browser = await launch() // of its own: what lies behind another page is not drawn
  try {
    // The minimap lies over the corner; a workflow of the page before would come back over the first one.
    const settings = { 'Comfy.Minimap.Visible': false, 'Comfy.Workflow.Persist': false }
    const page = await open(browser, address, { renderer, settings, errors: answer.errors, kinds: needed })
    answer.frontend = await page.evaluate(() => window.__COMFYUI_FRONTEND_VERSION__)
    for (const job of wanted) answer.jobs.push({ name: job.name, renderer, ...(await work(page, job)) })
  } finally {
    await browser.close()
  }
}))
process.stdout.write(JSON.stringify(answer))

async function work(page, job) {
  await load(page, job.workflow)
  const result = { prompt: await prompt(page), corner: await corner(page) }
  if (job.opened) await picture(page, job.opened)
  Object.assign(result, await measure(page)) // before the view moves: some frontends mistake that for nodes that move
  if (job.rest || job.after || job.shown) await fit(page) // a canvas fetches the pictures of what is in view
  if (job.rest) await picture(page, job.rest)
  if (job.shown) await pretend(page, job.shown)
  if (job.queue && !job.after) await hurry(page)
  if (job.queue) Object.assign(result, await queue(page))
  if (job.shown || job.queue) result.after = (await measure(page)).nodes
  if (job.after) await picture(page, job.after)
  return { ...result, alerts: await alerts(page) }
}

async function picture(page, file) {
  await page.waitForTimeout(300) // pictures come a moment later
  await page.screenshot({ path: file })
}

/** Queue what is open as the button does, and wait until its pictures are on their nodes. */
async function queue(page) {
  const result = await page.evaluate(async () => {
    const { app } = window
    const done = new Promise((resolve) => {
      for (const event of ['execution_success', 'execution_error', 'execution_interrupted'])
        app.api.addEventListener(event, ({ detail }) => resolve({ event, message: detail?.exception_message ?? '' }))
    })
    await app.queuePrompt(0, 1)
    const late = new Promise((resolve) => setTimeout(() => resolve({ event: 'no answer in 300 s' }), 300000))
    const result = await Promise.race([done, late])
    const saves = app.graph._nodes.filter((node) => node.type === 'SaveImage')
    const pictures = (node) => node.imgs?.length ? node.imgs : [...document.querySelectorAll(`[data-node-id="${node.id}"] img`)]
    for (let i = 0; i < 100 && !saves.every((node) => pictures(node)[0]?.naturalWidth); i++)
      await new Promise((resolve) => setTimeout(resolve, 100))
    const images = saves.map((node) => pictures(node)[0]).map((image) => [image?.naturalWidth, image?.naturalHeight])
    return { ...result, images, next: (await app.graphToPrompt()).output }
  })
  await drawn(page)
  return { ...result, text: await page.evaluate(() => document.body.innerText) }
}
