// The closing line of a run: `N passed, N failed, N skipped`, from the file that vitest's JSON
// reporter wrote. Fails when a test failed, when none ran, or when vitest itself did
// (its exit status is the second argument). The third is how many steps beside the tests failed; each
// counts as a failure.
import { readFileSync } from 'node:fs'

const [file, exit, steps = '0'] = process.argv.slice(2)
let results = []
try {
  results = JSON.parse(readFileSync(file, 'utf8')).testResults
} catch {
  console.log('vitest wrote no results.')
}
const count = { passed: 0, failed: 0, skipped: 0 }
for (const { status, assertionResults } of results) {
  for (const { status } of assertionResults)
    count[status === 'passed' || status === 'failed' ? status : 'skipped']++
  // A file that could not be loaded has no tests to show for it.
  if (status === 'failed' && !assertionResults.some((test) => test.status === 'failed'))
    count.failed++
}
// What no test can be blamed for: an unhandled error, a worker that died.
if (Number(exit) !== 0 && count.failed === 0) count.failed = 1
count.failed += Number(steps)
console.log(`${count.passed} passed, ${count.failed} failed, ${count.skipped} skipped`)
process.exit(count.failed > 0 || count.passed === 0 ? 1 : 0)
