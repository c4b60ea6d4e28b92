// Names of files are longer than a help panel is wide. On our pages, which are told by their picture, they may break
// anywhere; without this they are cut off.
import { app } from '../../scripts/app.js'

app.registerExtension({
  name: 'PixStack.HelpPages',
  setup() {
    const style = document.createElement('style')
    style.textContent = ':has(> p > img[src*="/extensions/pixstack/docs/"]) { overflow-wrap: anywhere }'
    document.head.append(style)
  }
})
