// Opens workflows in the real frontend, asks it for the API format of each, queues those that say so, takes pictures.
// node run.mjs ADDRESS JOBS.json    jobs: [{name, workflow, queue, screenshot}]; the answer on stdout is JSON.
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { chromium } from 'playwright-core'

const [address, jobsPath] = process.argv.slice(2)
const jobs = JSON.parse(fs.readFileSync(jobsPath))
const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'pixstack-chromium-'))
const browser = await chromium.launchPersistentContext(profile, {
  executablePath: process.env.CHROMIUM,
  headless: true,
  viewport: { width: 1600, height: 900 },
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage']
})

const errors = []
const answer = { errors, workflows: {} }
try {
  const page = browser.pages()[0] ?? (await browser.newPage())
  page.setDefaultTimeout(180000) // two busy cores take their time
  page.setDefaultNavigationTimeout(180000)
  page.on('pageerror', (error) => errors.push(`page: ${error.stack ?? error.message}`))
  page.on('console', (message) => {
    const from = message.location().url ?? ''
    if (message.type() === 'error') errors.push(`console: ${message.text()} (${from})`)
  })
  await page.goto(address, { waitUntil: 'domcontentloaded' })
  const all = jobs.flatMap((job) => job.workflow.nodes.map((node) => node.type))
  const kinds = [...new Set(all)].filter((kind) => !['Note', 'MarkdownNote'].includes(kind))
  await page.waitForFunction(
    (kinds) => window.app?.graph && kinds.every((kind) => window.LiteGraph?.registered_node_types?.[kind]),
    kinds
  )
  await page.waitForFunction(() => !document.querySelector('.p-progressspinner'))
  answer.frontend = await page.evaluate(() => window.__COMFYUI_FRONTEND_VERSION__)
  for (const job of jobs) answer.workflows[job.name] = await open(page, job)
} finally {
  await browser.close()
  fs.rmSync(profile, { recursive: true, force: true })
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

async function fit(page) {
  await page.evaluate(() => {
    const { canvas, graph } = window.app
    const boxes = graph._nodes.map((node) => [node.pos[0], node.pos[1] - 30, node.pos[0] + node.size[0], node.pos[1] + node.size[1]])
    const left = Math.min(...boxes.map((b) => b[0])), top = Math.min(...boxes.map((b) => b[1]))
    const right = Math.max(...boxes.map((b) => b[2])), bottom = Math.max(...boxes.map((b) => b[3]))
    const scale = Math.min(1400 / (right - left), 700 / (bottom - top), 1)
    canvas.ds.scale = scale
    canvas.ds.offset = [100 / scale - left, 160 / scale - top]
    canvas.setDirty(true, true)
  })
  await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))))
  await page.waitForTimeout(100) // toasts and dialogs come a moment later
}
