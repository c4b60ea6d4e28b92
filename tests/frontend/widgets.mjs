// Runs checks of our widgets, in a Chromium for each renderer.
// node widgets.mjs ADDRESS JOBS.json    jobs: {artifacts, checks: [[script, check, renderer]]}; the answer on stdout is
// JSON: {errors, results: {"script check renderer": "", what failed, or {skipped: why}}}.
//
// A check is an async function that widgets/SCRIPT.mjs exports. It gets ({page, renderer, address, shot}), where
// `shot(name)` leaves a picture in tests/artifacts/; it fails by throwing, and is skipped if it returns why. page.mjs and
// node:assert are its tools. Where a script exports `alone`, no two of its checks run at a time.
import fs from 'node:fs'
import path from 'node:path'
import { drawn, launch, open, RENDERERS } from './page.mjs'

const LIMIT = 300000 // ms for one check

const [address, jobsPath] = process.argv.slice(2)
const { artifacts, checks } = JSON.parse(fs.readFileSync(jobsPath))
const answer = { errors: [], results: {} }
let last = Promise.resolve()
await Promise.all(RENDERERS.map(async (renderer) => { // each waits for its page most of the time
  const wanted = checks.filter((check) => check[2] === renderer)
  if (!wanted.length) return
  const browser = await launch() // of its own: what lies behind another page is not drawn
  try {
    let page
    for (const [script, name] of wanted) {
      page ??= await open(browser, address, { renderer, errors: answer.errors })
      const shot = async (of) => {
        await drawn(page)
        await page.screenshot({ path: path.join(artifacts, `${script}-${of}-${renderer}.png`) })
      }
      const problem = await run(script, name, { page, renderer, address, shot })
      answer.results[`${script} ${name} ${renderer}`] = problem
      if (problem && !problem.skipped) {
        await shot(`failed-${name}`).catch(() => {})
        await page.close() // what a failed check left behind is not the next one's
        page = undefined
      }
    }
  } finally {
    await browser.close()
  }
}))
process.stdout.write(JSON.stringify(answer), () => process.exit(0)) // a check that ran out of time may still wait

async function run(script, name, given) {
  let timer
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no end in ${LIMIT / 1000} s`)), LIMIT)
  })
  let release = () => {}
  try {
    const module = await import(`./widgets/${script}.mjs`)
    if (module.alone) release = await turn()
    const skipped = await Promise.race([module[name](given), late])
    return skipped ? { skipped } : ''
  } catch (error) {
    return error.stack ?? String(error)
  } finally {
    clearTimeout(timer)
    release()
  }
}

/** Waits for the checks that change what the server keeps, of which one runs at a time; gives the way to end it. */
function turn() {
  const before = last
  let release
  last = new Promise((resolve) => { release = resolve })
  return before.then(() => release)
}
