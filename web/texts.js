// What nodes of ours say of their last run (sizes, warnings, what a LoRA changed) stays on them: frontends from 1.5x take
// texts of progress away when the run ends. They are shown again in the frontend's own way, which draws them on a node.
import { api } from '../../scripts/api.js'
import { app } from '../../scripts/app.js'

const said = new Map() // execution id -> {node, text}

/** The node of an execution id, "4" or, inside a subgraph, "7:4", if it is in the open workflow and ours. */
function ours(id) {
  const [first, ...inside] = String(id).split(':')
  let node = (app.rootGraph ?? app.graph)?.getNodeById(Number(first))
  for (const one of inside) node = node?.subgraph?.getNodeById(Number(one))
  return node?.comfyClass?.startsWith('PixStack_') ? node : undefined
}

app.registerExtension({
  name: 'PixStack.Texts',
  setup() {
    let again = false
    api.addEventListener('progress_text', ({ detail }) => {
      const node = detail?.text && !again && ours(detail.nodeId)
      if (node) said.set(String(detail.nodeId), { node, text: detail.text })
    })
    api.addEventListener('executing', ({ detail }) => said.delete(String(detail?.node ?? detail))) // says it anew, or no more
    for (const end of ['execution_success', 'execution_error', 'execution_interrupted'])
      api.addEventListener(end, () => setTimeout(() => { // the frontend first
        again = true
        for (const [id, { node, text }] of said)
          if (ours(id) === node) api.dispatchCustomEvent('progress_text', { nodeId: id, text })
          else said.delete(id) // another workflow is open, or the node is gone
        again = false
      }))
  }
})
