// Opens workflows in the real frontend, asks it for the API format of each, queues those that say so, takes pictures.
// node run.mjs ADDRESS JOBS.json    jobs: [{name, workflow, queue, screenshot}]; the answer on stdout is JSON.
import fs from 'node:fs'
import { fit, launch, open as openPage } from './page.mjs'

const [address, jobsPath] = process.argv.slice(2)
const jobs = JSON.parse(fs.readFileSync(jobsPath))
const browser = await launch()

const errors = []
const answer = { errors, workflows: {} }
try {
  const all = jobs.flatMap((job) => job.workflow.nodes.map((node) => node.type))
  const kinds = [...new Set(all)].filter((kind) => !['Note', 'MarkdownNote'].includes(kind))
  const page = await openPage(browser, address, { kinds, errors })
  answer.frontend = await page.evaluate(() => window.__COMFYUI_FRONTEND_VERSION__)
  for (const job of jobs) answer.workflows[job.name] = await open(page, job)
} finally {
  await browser.close()
}
process.stdout.write(JSON.stringify(answer))

async function open(page, job) {
  const prompt = await page.evaluate(async (workflow) => {
    window.told = new Set(document.querySelectorAll('.p-toast-message, .p-dialog')) // of the workflow before
    await window.app.loadGraphData(workflow, true, true)
    return (await window.app.graphToPrompt()).output
  }, job.workflow)
  const shown = job.queue ? await queue(page) : {}
  await fit(page)
  await page.screenshot({ path: job.screenshot })
  const alerts = await page.evaluate(() =>
    [...document.querySelectorAll('.p-toast-message, .p-dialog')]
      .filter((element) => !window.told.has(element))
      .map((element) => element.innerText)
  )
  return { prompt, alerts, ...shown }
}

/** Queue what is open as the button does, and wait until its pictures are on their node. */
async function queue(page) {
  return await page.evaluate(async () => {
    const { app } = window
    const done = new Promise((resolve) => {
      for (const event of ['execution_success', 'execution_error', 'execution_interrupted'])
        app.api.addEventListener(event, ({ detail }) => resolve({ event, message: detail?.exception_message ?? '' }))
    })
    await app.queuePrompt(0, 1)
    const late = new Promise((resolve) => setTimeout(() => resolve({ event: 'no answer in 120 s' }), 120000))
    const result = await Promise.race([done, late])
    const save = app.graph._nodes.find((node) => node.type === 'SaveImage')
    for (let i = 0; i < 100 && !save?.imgs?.[0]?.naturalWidth; i++) await new Promise((r) => setTimeout(r, 100))
    const images = (save?.imgs ?? []).map((image) => [image.naturalWidth, image.naturalHeight])
    return { ...result, images, text: document.body.innerText, next: (await app.graphToPrompt()).output }
  })
}
