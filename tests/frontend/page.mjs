// ComfyUI's frontend in headless Chromium, for the scripts beside this one.
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { chromium } from 'playwright-core'

export const RENDERERS = ['classic', 'nodes2'] // LiteGraph's canvas; Nodes 2.0

/** A Chromium of its own profile: {newPage(), close()}. */
export async function launch(viewport = { width: 1600, height: 900 }) {
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'pixstack-chromium-'))
  const context = await chromium.launchPersistentContext(profile, {
    executablePath: process.env.CHROMIUM,
    headless: true,
    viewport,
    args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
      '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage']
  })
  return {
    newPage: () => context.newPage(),
    async close() {
      await context.close()
      fs.rmSync(profile, { recursive: true, force: true })
    }
  }
}

/**
 * Open the frontend and wait until it is ready. Settings are the page's own: the server's stay as they are.
 * kinds: node types that must be there. errors: a list that gets what goes wrong in the page.
 */
export async function open(browser, address, { renderer = 'classic', settings = {}, kinds = [], errors = [] } = {}) {
  const page = await browser.newPage()
  page.setDefaultTimeout(180000) // two busy cores take their time
  page.setDefaultNavigationTimeout(180000)
  page.on('pageerror', (error) => errors.push(`page: ${error.stack ?? error.message}`))
  page.on('console', (message) => {
    const from = message.location().url ?? ''
    if (message.type() === 'error') errors.push(`console: ${message.text()} (${from})`)
  })
  await ownSettings(page, { 'Comfy.VueNodes.Enabled': renderer === 'nodes2', ...settings })
  await page.goto(address, { waitUntil: 'domcontentloaded' })
  await page.waitForFunction(
    (kinds) => window.app?.graph && kinds.every((kind) => window.LiteGraph?.registered_node_types?.[kind]),
    kinds.length ? kinds : ['PixStack_PixelFlowCanvas']
  )
  await page.waitForFunction(() => !document.querySelector('.p-progressspinner'))
  return page
}

/** What the page reads and changes of the user's settings stays with it. */
async function ownSettings(page, wanted) {
  const own = { 'Comfy.TutorialCompleted': true, ...wanted }
  await page.route(/^[a-z]+:\/\/[^/]+\/api\/settings(\/|$|\?)/, async (route) => {
    const request = route.request()
    if (request.method() === 'GET') {
      const answer = await route.fetch()
      return route.fulfill({ response: answer, json: { ...(await answer.json()), ...own } })
    }
    const one = new URL(request.url()).pathname.split('/api/settings/')[1]
    Object.assign(own, one ? { [decodeURIComponent(one)]: request.postDataJSON() } : request.postDataJSON())
    return route.fulfill({ status: 200, body: '' })
  })
}

/** Open a workflow of the browser's format, so that undo begins with it, and bring all of it into view. */
export async function load(page, workflow, most = 1) {
  await page.evaluate(async (workflow) => {
    await window.app.loadGraphData(workflow, true, true)
    if (window.LiteGraph.vueNodesMode) {
      const shown = () => window.app.graph._nodes.every((node) => document.querySelector(`[data-node-id="${node.id}"]`))
      for (let i = 0; i < 200 && !shown(); i++) await new Promise((resolve) => setTimeout(resolve, 50))
    }
  }, workflow)
  await fit(page, most)
}

/** The whole graph in view, `most` times as large at most. */
export async function fit(page, most = 1) {
  await page.evaluate((most) => {
    const { canvas, graph } = window.app
    const boxes = graph._nodes.map((node) => [node.pos[0], node.pos[1] - 30, node.pos[0] + node.size[0], node.pos[1] + node.size[1]])
    const left = Math.min(...boxes.map((b) => b[0])), top = Math.min(...boxes.map((b) => b[1]))
    const right = Math.max(...boxes.map((b) => b[2])), bottom = Math.max(...boxes.map((b) => b[3]))
    const scale = Math.min(1400 / (right - left), 700 / (bottom - top), most)
    canvas.ds.scale = scale
    canvas.ds.offset = [100 / scale - left, 160 / scale - top]
    canvas.setDirty(true, true)
  }, most)
  await drawn(page)
}

/** Wait until what changed is on the screen. */
export async function drawn(page) {
  await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))))
  await page.waitForTimeout(100) // toasts, dialogs and Vue come a moment later
}

/** The open workflow in the API's format. */
export const prompt = (page) => page.evaluate(async () => (await window.app.graphToPrompt()).output)

/** The open workflow as it is saved. */
export const saved = (page) => page.evaluate(() => window.app.graph.serialize())

/** A workflow of one node of this type with its defaults, of the given size if any. */
export async function one(page, type, size, most = 1) {
  const workflow = await page.evaluate(([type, size]) => {
    const graph = new window.app.graph.constructor()
    graph.id = crypto.randomUUID() // newer frontends keep what widgets hold by it
    const node = window.LiteGraph.createNode(type)
    graph.add(node)
    node.pos = [0, 0]
    if (size) node.setSize(size)
    const made = graph.serialize()
    graph.remove(node)
    return made
  }, [type, size])
  await load(page, workflow, most)
}

/** The value of a widget of the first node of a type, as the graph has it. */
export const value = (page, type, name) =>
  page.evaluate(([type, name]) => window.app.graph._nodes.find((node) => node.type === type)
    ?.widgets?.find((widget) => widget.name === name)?.value, [type, name])

/** As few steps of sampling as there can be: where the way of the picture counts, and not the picture. */
export const hurry = (page) => page.evaluate(() => {
  for (const node of window.app.graph._nodes)
    for (const widget of node.widgets ?? []) if (widget.name === 'steps' && typeof widget.value === 'number') widget.value = 1
})

/** One step back, as by Ctrl+Z on the canvas. */
export async function undo(page) {
  await page.evaluate(async () => {
    document.activeElement?.blur?.()
    await window.app.extensionManager.workflow.activeWorkflow.changeTracker.undo()
  })
  await drawn(page)
}

/** A graph of nodes [{type, values, pos, size}] and links [from, slot, to, input name], built as a person would. */
export async function build(page, nodes, links) {
  const workflow = await page.evaluate(([nodes, links]) => {
    const graph = new window.app.graph.constructor()
    graph.id = crypto.randomUUID() // newer frontends keep what widgets hold by it
    const made = nodes.map(({ type, values = {}, pos, size }) => {
      const node = window.LiteGraph.createNode(type)
      graph.add(node)
      node.pos = pos
      if (size) node.setSize(size)
      for (const [name, value] of Object.entries(values)) node.widgets.find((one) => one.name === name).value = value
      return node
    })
    for (const [from, slot, to, name] of links)
      made[from].connect(slot, made[to], made[to].inputs.findIndex((input) => input.name === name))
    return graph.serialize()
  }, [nodes, links])
  await load(page, workflow)
}

/** Run what is open, and wait for its end. */
export async function run(page) {
  const end = await page.evaluate(async () => {
    const { app } = window
    const done = new Promise((resolve) => {
      for (const event of ['execution_success', 'execution_error', 'execution_interrupted'])
        app.api.addEventListener(event, ({ detail }) => resolve(detail?.exception_message ?? event), { once: true })
    })
    await app.queuePrompt(0, 1)
    return await done
  })
  if (end !== 'execution_success') throw new Error(end)
  await drawn(page)
}

/** A shipped workflow by its short name, which stays when the files are numbered anew. */
export function shipped(name) {
  const folder = new URL('../../workflows/', import.meta.url)
  for (const file of fs.readdirSync(folder).filter((file) => file.endsWith('.json'))) {
    const workflow = JSON.parse(fs.readFileSync(new URL(encodeURIComponent(file), folder)))
    if (workflow.extra?.pixstack === name) return workflow
  }
  throw new Error(`No workflow has the short name ${name}.`)
}
