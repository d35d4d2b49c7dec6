// The CUDA kernels' own source, run on the CPU over the cases that the other tests recorded; see
// test/twin/README.md. Runs after them (vitest.config.ts).

import { fileURLToPath } from 'node:url'
import { cudaStatus } from 'p2r-kernels'
import { beforeAll, describe, expect, test } from 'vitest'
import {
  buildTwin,
  kernelsIn,
  kernelsNotLaunched,
  operandsWithoutForm,
  twinProblem,
  twinRuns,
} from '../scripts/twin.mjs'

const at = (path: string) => fileURLToPath(new URL(path, import.meta.url))
const problem = twinProblem()

describe.skipIf(problem)(`the kernel twin${problem ? ` (skipped: ${problem})` : ''}`, () => {
  beforeAll(() => buildTwin('plain'), 1_200_000)
  for (const { title, run, planted } of twinRuns('plain'))
    test(title, { timeout: 600_000, concurrent: planted ?? false }, async ({ expect }) => {
      const { ok, output } = await run()
      expect(ok, output.slice(-8000)).toBe(true)
    })
  test('the recorded cases launch every kernel, in every instantiation', {
    timeout: 600_000,
  }, () => {
    const { all, missing } = kernelsNotLaunched()
    expect(all).toBeGreaterThan(100)
    expect(missing).toEqual([])
  })
  test("every operand that the recorded cases' kernels give to wgmma is a tile of CuTe's", {
    timeout: 600_000,
  }, () => {
    expect(operandsWithoutForm()).toEqual({ unknown: [], unused: [] })
  })

  const { built } = cudaStatus()
  const library = at('../build/Release/p2r_kernels.node')
  const twin = at('../build/twin/plain/runner')
  test.skipIf(!built)(
    `has the library's kernels${built ? '' : ' (skipped: it is built without CUDA)'}`,
    () => {
      // By name: a template that two files instantiate is in the library twice.
      const names = (file: string) => [...new Set(kernelsIn(file).map(([, name]) => name))].sort()
      expect(names(twin)).toEqual(names(library))
    },
  )
})
