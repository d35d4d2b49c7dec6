// The CUDA kernels' own source, run on the CPU over the cases that the other tests recorded; see
// test/twin/README.md. Runs after them (vitest.config.ts).

import { execFile } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { beforeAll, describe, expect, test } from 'vitest'
import { found } from '../scripts/addon.mjs'
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

  const library = at('../build/Release/p2r_kernels.node')
  const twin = at('../build/twin/plain/runner')
  const cudaless = found('nvcc') && found('cmake') ? undefined : 'needs nvcc and CMake'
  test.skipIf(cudaless)(
    `has the library's kernels${cudaless ? ` (skipped: ${cudaless})` : ''}`,
    { timeout: 1_200_000 },
    async () => {
      // Where no GPU could run it, this is what first builds the addon for CUDA.
      await promisify(execFile)(process.execPath, [at('../scripts/build.mjs'), '--cuda=on'], {
        maxBuffer: 1 << 26,
      })
      // By name: a template that two files instantiate is in the library twice.
      const names = (file: string) => [...new Set(kernelsIn(file).map(([, name]) => name))].sort()
      expect(names(twin)).toEqual(names(library))
    },
  )
})
