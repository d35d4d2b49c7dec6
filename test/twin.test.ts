// The CUDA kernels' own source, run on the CPU over the cases that the other tests recorded; see
// test/twin/README.md. Runs after them (vitest.config.ts).
import { beforeAll, describe, expect, test } from 'vitest'
import { buildTwin, twinProblem, twinRuns } from '../scripts/twin.mjs'

const problem = twinProblem()

describe.skipIf(problem)(`the kernel twin${problem ? ` (skipped: ${problem})` : ''}`, () => {
  beforeAll(() => buildTwin('plain', ['units', 'mutants', 'probe', 'runner']), 1_200_000)
  for (const { title, run } of twinRuns('plain'))
    test(title, { timeout: 600_000 }, () => {
      const { ok, output } = run()
      expect(ok, output.slice(-8000)).toBe(true)
    })
})
