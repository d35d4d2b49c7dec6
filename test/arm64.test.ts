// The CPU backend with NEON, emulated, over the cases that the other tests recorded for the kernel twin:
// each call gives what it gave here, within its bound. Runs after them (vitest.config.ts).
import { execFile } from 'node:child_process'
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { beforeAll, describe, expect, test } from 'vitest'
import { root } from '../scripts/addon.mjs'
import { folderOf, makeCpuRunner } from '../scripts/prebuild.mjs'
import { emulated, emulationProblem } from './emulated.js'

const problem = process.arch === 'arm64' ? 'this machine is one' : emulationProblem()
const cases = fileURLToPath(new URL('../build/twin/cases', import.meta.url))

describe.skipIf(problem)(`arm64${problem ? ` (skipped: ${problem})` : ''}`, () => {
  beforeAll(() => makeCpuRunner(), 900_000)

  test('NEON gives what was recorded, for every operation', { timeout: 600_000 }, async () => {
    const recorded = existsSync(cases)
      ? readdirSync(cases, { recursive: true, encoding: 'utf8' })
      : []
    const operations = [
      ...readFileSync(join(root, 'ops/ops.def'), 'utf8').matchAll(/^OP\(\w+, (\w+),/gm),
    ].map(([, name]) => name!)
    for (const name of operations)
      expect(
        recorded.some((file) => file.endsWith(`-${name}.case`)),
        `a case of ${name}: run all tests first`,
      ).toBe(true)
    const runner = join(root, folderOf('linux-arm64'), 'cpu_runner')
    const [command, ...args] = emulated(runner, '--jobs', '2', cases)
    const { stdout } = await promisify(execFile)(command, args, { maxBuffer: 1 << 26 }).catch(
      (error: { stdout: string }) => error,
    )
    const count = recorded.filter((file) => file.endsWith('.case')).length
    expect(stdout.slice(-4000)).toBe(`${count} passed, 0 failed\n`)
  })
})
