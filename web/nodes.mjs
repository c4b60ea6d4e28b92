// Nodes of a graph: which takes a file, and another in a node's place. Nodes 2.0 draw a node as it is when it is added.

/** The menu of a node that lists a file; undefined where none does. */
export const menuWith = (node, file) =>
  node?.widgets?.find((widget) => widget.type === 'combo' && listed(widget).includes(file))

function listed(widget) {
  const values = widget.options?.values
  return (typeof values === 'function' ? values(widget) : Array.isArray(values) ? values : Object.keys(values ?? {}))
}

/** Put a node of another type in a node's place, with this file: links whose types fit stay, and values of the same name. */
export function replace(old, type, file) {
  const { graph } = old
  const node = window.LiteGraph.createNode(type)
  node.pos = [old.pos[0], old.pos[1]]
  if (old.title !== old.constructor.title) node.title = old.title
  for (const name of ['mode', 'color', 'bgcolor']) if (old[name] !== undefined) node[name] = old[name]
  node.setSize([Math.max(old.size[0], node.size[0]), node.size[1]])
  for (const widget of old.widgets ?? []) {
    const own = node.widgets?.find((one) => one.name === widget.name && one.type === widget.type)
    if (own && (own.type !== 'combo' || listed(own).includes(widget.value))) own.value = widget.value
  }
  const menu = menuWith(node, file)
  if (menu) menu.value = file
  const links = linksOf(old)
  graph.add(node)
  graph.remove(old)
  for (const link of links) link(node)
  graph.setDirtyCanvas(true, true)
  return node
}

/** Functions that tie a link of this node to another node, where its type fits. */
function linksOf(old) {
  const { graph } = old, links = []
  const fits = (from, to) => window.LiteGraph.isValidConnection(from, to)
  for (const input of old.inputs ?? []) {
    const link = input.link == null ? null : graph.getLink(input.link)
    if (!link) continue
    const { origin_id, origin_slot, type } = link
    links.push((node) => {
      const free = (one) => one.link == null && fits(type, one.type)
      const slot = [node.inputs.findIndex((one) => one.name === input.name && free(one)),
        input.widget ? -1 : node.inputs.findIndex((one) => !one.widget && free(one))].find((i) => i >= 0)
      if (slot === undefined) return
      if (origin_id === IN) graph.inputNode.slots[origin_slot]?.connect(node.inputs[slot], node)
      else graph.getNodeById(origin_id)?.connect(origin_slot, node, slot)
    })
  }
  for (const output of old.outputs ?? []) {
    const place = old.outputs.filter((one) => one.type === output.type).indexOf(output)
    for (const id of [...(output.links ?? [])]) {
      const { target_id, target_slot, type } = graph.getLink(id) ?? {}
      if (target_id === undefined) continue
      links.push((node) => {
        const fitting = node.outputs.filter((one) => fits(one.type, type === '*' ? output.type : type))
        const slot = node.outputs.indexOf(fitting[place] ?? fitting[0])
        if (slot < 0) return
        if (target_id === OUT) graph.outputNode.slots[target_slot]?.connect(node.outputs[slot], node)
        else node.connect(slot, graph.getNodeById(target_id), target_slot)
      })
    }
  }
  return links
}

const IN = -10, OUT = -20 // what a link inside of a subgraph has for the id of the subgraph's own inputs and outputs

/**
 * Have a file in the graph: in the menu of the selected node of this type, or of the only one that loads without a model
 * before it, else in a new node. A new one that changes a model stands behind the only node that loads one, before all
 * that reads it. Returns {node, tied: whether it is linked}.
 */
export function add(type, file) {
  const { app, LiteGraph } = window
  const graph = app.canvas.graph ?? app.graph, node = LiteGraph.createNode(type)
  if (!node) throw new Error(`ComfyUI has no node ${type}.`)
  const into = node.inputs?.findIndex((input) => input.type === 'MODEL') ?? -1
  const there = graph._nodes.filter((one) => one.type === type)
  const chosen = there.find((one) => app.canvas.selected_nodes?.[one.id]) ?? (into < 0 && there.length === 1 ? there[0] : undefined)
  if (chosen && menuWith(chosen, file)) {
    const menu = menuWith(chosen, file)
    menu.value = file
    menu.callback?.(file, app.canvas, chosen)
    return { node: chosen, tied: chosen.outputs.some((output) => output.links?.length) }
  }
  const menu = menuWith(node, file)
  if (!menu) throw new Error(`${node.title} does not list ${file}.`)
  const source = into < 0 ? undefined : only(graph._nodes.filter((one) => loadsModel(one) && goesWith(one.type, type)))
  const { ds, canvas } = app.canvas, box = canvas.getBoundingClientRect()
  if (source) node.setSize([Math.max(source.size[0], node.size[0]), node.size[1]])
  const middle = [box.width / 2 / ds.scale - ds.offset[0] - node.size[0] / 2, box.height / 2 / ds.scale - ds.offset[1]]
  node.pos = free(graph, node, source ? [source.pos[0], source.pos[1] - node.size[1] - GAP] : middle)
  menu.value = file
  graph.add(node)
  if (source) {
    const slot = source.outputs.findIndex((output) => output.type === 'MODEL')
    const out = node.outputs.findIndex((output) => output.type === 'MODEL')
    const readers = (source.outputs[slot].links ?? []).map((id) => graph.getLink(id)).filter((link) => link.target_id >= 0)
      .map((link) => [link.target_id, link.target_slot])
    source.connect(slot, node, into)
    for (const [id, place] of readers) node.connect(out, graph.getNodeById(id), place)
  }
  graph.setDirtyCanvas(true, true)
  return { node, tied: !!source }
}

const GAP = 90 // a node's title, and what Nodes 2.0 are taller

/** The place for a node, or the nearest above it where no other node lies. */
function free(graph, node, [left, top]) {
  const hides = (one) => one.pos[0] < left + node.size[0] && left < one.pos[0] + one.size[0]
    && one.pos[1] - GAP / 2 < top + node.size[1] && top - GAP / 2 < one.pos[1] + one.size[1]
  for (let one; (one = graph._nodes.find(hides));) top = one.pos[1] - node.size[1] - GAP
  return [left, top]
}

const only = (list) => (list.length === 1 ? list[0] : list.find((one) => window.app.canvas.selected_nodes?.[one.id]))
const loadsModel = (node) => node.outputs?.some((output) => output.type === 'MODEL') && !node.inputs?.some((input) => input.type === 'MODEL')
const goesWith = (loader, lora) => lora !== 'PixStack_PixArtLoraLoader' || loader === 'PixStack_PixArtLoader'
