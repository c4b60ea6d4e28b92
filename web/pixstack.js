// PixStack's widgets in the browser: the switches of all of them. Each widget is a file of its own beside this one.
import { app } from '../../scripts/app.js'
import { toggle } from './lib.mjs'

app.registerExtension({
  name: 'PixStack.Widgets',
  settings: [
    toggle('SizePicker', 'Size picker on canvas nodes', 'Sizes drawn to scale, with what they cost.'),
    toggle('StageEditor', 'Stage editor on PixelFlow nodes', 'Steps, shift and guidance of every stage as bars.')
  ]
})
