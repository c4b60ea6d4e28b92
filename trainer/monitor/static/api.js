// Questions to the server. Addresses are relative to the page's, which begins with the token.

export async function ask(what, query = {}) {
  const words = new URLSearchParams()
  for (const [name, value] of Object.entries(query)) for (const one of [value].flat()) words.append(name, one)
  const answer = await fetch(`api/${what}?${words}`)
  if (!answer.ok) throw new Error(await answer.text())
  return answer.json()
}

export async function demand(what, query) {
  const answer = await fetch(`api/${what}?${new URLSearchParams(query)}`, { method: 'POST' })
  if (!answer.ok) throw new Error(await answer.text())
}

export const order = (run, what) => demand('order', { run, order: what })

export function picture(run, step, index) {
  const words = new URLSearchParams({ run, step })
  if (index !== null) words.set('index', index)
  return `api/picture?${words}`
}
