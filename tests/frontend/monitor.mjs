// Opens the trainer's monitor, moves its slider by the keyboard, compares two steps, and presses stop.
// node monitor.mjs ADDRESS SCREENSHOT    the answer on stdout is JSON.
import { chromium } from 'playwright-core'

const [address, screenshot] = process.argv.slice(2)
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM,
  headless: true,
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage']
})
const answer = { errors: [], asked: [] }
try {
  const page = await browser.newPage({ viewport: { width: 1440, height: 1400 } })
  page.setDefaultTimeout(120000) // two busy cores take their time
  page.on('pageerror', (error) => answer.errors.push(error.stack ?? error.message))
  page.on('console', (message) => message.type() === 'error' && answer.errors.push(message.text()))
  page.on('dialog', (dialog) => {
    answer.asked.push(dialog.message())
    dialog.accept()
  })
  const shown = () => page.$$eval('#pictures img', (images) => images.map((image) => image.alt))
  const loaded = () => page.waitForFunction(() =>
    [...document.querySelectorAll('#pictures img')].every((image) => image.complete && image.naturalWidth))
  await page.goto(address)
  await page.waitForSelector('#charts [data-curve=loss] canvas')
  await loaded()
  answer.newest = await shown()
  await page.focus('#step')
  await page.keyboard.press('ArrowLeft')
  answer.before = await shown()
  await page.check('#two')
  answer.two = await shown()
  await loaded()
  answer.curves = await page.$$eval('[data-curve]', (boxes) => boxes.map((box) => box.dataset.curve))
  await page.check('nav input[type=checkbox] >> nth=1')
  await page.check('#differing')
  await page.waitForSelector('#settings tr.differs')
  answer.differs = await page.$$eval('#settings tr.differs', (rows) => rows.map((row) => row.innerText.split('\t')))
  await page.screenshot({ path: screenshot })
  await page.click('[data-order=stop]')
  await page.waitForFunction(() => document.getElementById('said').textContent.includes('saves and ends'))
  answer.disabled = await page.waitForFunction(() => document.querySelector('[data-order=stop]').disabled).then(() => true)
} finally {
  await browser.close()
}
process.stdout.write(JSON.stringify(answer))
