// Questions to the server. Addresses are relative to the page's, which begins with the token.

export async function ask(what, query = {}) {
  const words = new URLSearchParams()
  for (const [name, value] of Object.entries(query)) for (const one of [value].flat()) words.append(name, one)
  const answer = await fetch(`api/${what}?${words}`)
  if (!answer.ok) throw new Error(await answer.text())
  return answer.json()
}

export async function order(run, what) {
  const answer = await fetch(`api/order?${new URLSearchParams({ run, order: what })}`, { method: 'POST' })
  if (!answer.ok) throw new Error(await answer.text())
}

export function picture(run, step, index) {
  const words = new URLSearchParams({ run, step })
  if (index !== null) words.set('index', index)
  return `api/picture?${words}`
}
