// Runs programs, one after the other in one process: node run.mjs RESULTS PROGRAM... RESULTS gets a line
// of JSON for each: what it printed, a string for each call of console.log, and its error.
import { appendFileSync } from 'node:fs'
import { pathToFileURL } from 'node:url'
import { format } from 'node:util'
import './redirect.mjs'

const [results, ...programs] = process.argv.slice(2)

for (const program of programs) {
  const printed = []
  console.log = (...values) => printed.push(format(...values))
  let error
  try {
    await import(pathToFileURL(program).href)
  } catch (cause) {
    error = format(cause)
  }
  appendFileSync(results, `${JSON.stringify({ program, printed, error })}\n`)
}
process.exit()
