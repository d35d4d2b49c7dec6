// One call of every primitive of cuda/ptx.cuh on a device, against the values that the kernel twin
// gives for it (test/twin/probe.golden): what ties the twin to the hardware.
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { cudaStatus, devices } from 'p2r-kernels'
import { expect, test } from 'vitest'

const root = fileURLToPath(new URL('..', import.meta.url))
const cuda = cudaStatus()
const nvcc = spawnSync('nvcc', ['--version']).status === 0
const problem = cuda.available ? (nvcc ? undefined : 'nvcc was not found.') : cuda.reason

if (problem && process.env.REQUIRE_CUDA !== '1')
  test.skip(`the device's primitives give the twin's values (${problem})`, () => {})
else
  test("the device's primitives give the twin's values", { timeout: 300_000 }, () => {
    expect(problem, 'REQUIRE_CUDA=1').toBeUndefined()
    const folder = mkdtempSync(join(tmpdir(), 'p2r-probe-'))
    try {
      const probe = join(folder, 'probe')
      // sm_80 and Hopper's own machine code, and PTX for what comes later.
      const targets = [
        'arch=compute_80,code=sm_80',
        'arch=compute_90a,code=sm_90a',
        'arch=compute_90,code=compute_90',
      ].flatMap((target) => ['-gencode', target])
      const options = ['-std=c++20', '--expt-relaxed-constexpr', '-I.', ...targets]
      const built = spawnSync('nvcc', [...options, 'test/twin/probe.cu', '-o', probe], {
        cwd: root,
        encoding: 'utf8',
      })
      expect(built.status, built.stderr).toBe(0)
      const golden = readFileSync(join(root, 'test/twin/probe.golden'), 'utf8')
      const { stdout } = spawnSync(probe, { encoding: 'utf8' })
      // It ends at the first instruction that the device lacks: TMA before sm_90, wgmma on any other.
      const major = Number.parseInt(devices()[1]!.computeCapability!, 10)
      const last = major === 9 ? undefined : major < 9 ? /^tma_load/m : /^wgmma/m
      const values = (printed: string) => printed.slice(0, last && golden.search(last))
      expect(values(stdout)).toBe(values(golden))
    } finally {
      rmSync(folder, { recursive: true })
    }
  })
