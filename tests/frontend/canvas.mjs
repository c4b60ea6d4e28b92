// Workflows on a page of page.mjs: what is drawn where, and what a run would add.
import { drawn } from './page.mjs'

/** Classes of nodes that a workflow needs, those inside its subgraphs too. */
export function kinds(workflow) {
  const subgraphs = workflow.definitions?.subgraphs ?? []
  const own = new Set(['Note', 'MarkdownNote', ...subgraphs.map((subgraph) => subgraph.id)])
  return [workflow, ...subgraphs].flatMap(({ nodes }) => nodes.map((node) => node.type)).filter((kind) => !own.has(kind))
}

/** Opens a workflow as the gallery does, so that the browser chooses what is in view. */
export async function load(page, workflow) {
  await page.evaluate(async (workflow) => {
    window.told = new Set(document.querySelectorAll('.p-toast-message, .p-dialog')) // of the workflow before
    await window.app.loadGraphData(workflow, true, true, null, { openSource: 'template' })
  }, workflow)
  await drawn(page) // the browser chooses what is in view in the next frame
}

/** Toasts and dialogs since the workflow was opened. */
export async function alerts(page) {
  return await page.evaluate(() =>
    [...document.querySelectorAll('.p-toast-message, .p-dialog')]
      .filter((element) => !window.told.has(element))
      .map((element) => element.innerText)
  )
}

/** {nodes: {id: box}, groups: {title: box}, texts: {id: height of a note's text}}; a box is [left, top, width, height] in
 *  units of the graph, a node's with its title. Nodes of HTML are read where they lie in their pane, whose own transform
 *  follows the canvas a few frames late. */
export async function measure(page) {
  for (let before, now, i = 0; ; i++) { // heights of HTML come by and by
    now = await page.evaluate(where)
    if (JSON.stringify(now) === before || i === 20) return now
    before = JSON.stringify(now)
    await drawn(page)
  }
}

function where() {
  const { graph } = window.app
  const nodes = {}, groups = {}, texts = {}
  for (const node of graph._nodes) {
    const element = document.querySelector(`[data-node-id="${node.id}"]`)
    if (!window.LiteGraph.vueNodesMode)
      nodes[node.id] = [node.pos[0], node.pos[1] - 30, node.size[0], node.size[1] + 30]
    else if (element) {
      const { e, f } = new DOMMatrix(getComputedStyle(element).transform)
      nodes[node.id] = [element.offsetLeft + e, element.offsetTop + f, element.offsetWidth, element.offsetHeight]
    }
    const text = (element ?? node.widgets?.[0]?.element)?.querySelector('.comfy-markdown-content, .tiptap')
    const last = text?.lastElementChild
    if (last) texts[node.id] = last.offsetTop + last.offsetHeight - text.firstElementChild.offsetTop
  }
  for (const { title, pos, size } of graph._groups) groups[title] = [pos[0], pos[1], size[0], size[1]]
  return { nodes, groups, texts }
}

/** [left, top] in pixels of the window where the first node or group lies, with what is in view. */
export async function corner(page) {
  return await page.evaluate(() => {
    const { canvas, graph } = window.app
    const { scale, offset } = canvas.ds, { left, top } = canvas.canvas.getBoundingClientRect()
    const at = [...graph._nodes.map(({ pos }) => [pos[0], pos[1] - 30]), ...graph._groups.map(({ pos }) => pos)]
    return [left + scale * (offset[0] + Math.min(...at.map((p) => p[0]))), top + scale * (offset[1] + Math.min(...at.map((p) => p[1])))]
  })
}

/** What a run would leave on the nodes. shown: [{node, pictures, preview, text, texts, output}], each part optional: files
 *  {filename, subfolder, type} of the server's, the side of a square in pixels, a text of progress, the output of a node
 *  that shows texts, more of an output by name. */
export async function pretend(page, shown) {
  await page.evaluate(async (shown) => {
    const { app } = window, { api } = app
    const run = { prompt_id: 'pretended', promptId: 'pretended', jobId: 'pretended' }
    for (const { node, preview, text } of shown) {
      if (preview) {
        const picture = new OffscreenCanvas(preview, preview)
        picture.getContext('2d').fillRect(0, 0, preview, preview)
        const ids = { nodeId: node, displayNodeId: node, parentNodeId: node, realNodeId: node }
        api.dispatchCustomEvent('b_preview_with_metadata', { blob: await picture.convertToBlob(), ...ids, ...run })
      }
      if (text) api.dispatchCustomEvent('progress_text', { nodeId: node, text })
    }
    for (const { node, pictures, texts, output } of shown)
      if (pictures || texts || output)
        api.dispatchCustomEvent('executed', { node, display_node: node, output: { images: pictures, text: texts, ...output }, ...run })
    const seen = ({ node }) => app.graph.getNodeById(Number(node))?.imgs?.[0]?.complete ||
      document.querySelector(`[data-node-id="${node}"] img`)?.complete
    const wanted = shown.filter(({ preview, pictures }) => preview || pictures)
    for (let i = 0; i < 50 && !wanted.every(seen); i++) await new Promise((done) => setTimeout(done, 100)) // are fetched
  }, shown)
  await drawn(page)
}
