// One call of every primitive of cuda/ptx.cuh on a device, against the values that the kernel twin
// gives for it (test/twin/probe.golden), and the layouts of operands against NVIDIA's tables
// (test/golden/hopper.br): what ties the twin to the hardware.
import { spawnSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { cudaStatus, devices } from 'p2r-kernels'
import { expect, test } from 'vitest'
import { compareWithTables } from '../scripts/twin.mjs'

const at = (path: string) => fileURLToPath(new URL(path, import.meta.url))
const { built, available, reason } = cudaStatus()
const probe = at('../build/Release/device_probe')
const run = () => spawnSync(probe, { encoding: 'utf8' })

if (!available && process.env.REQUIRE_CUDA !== '1')
  test.skip(`the device's primitives give the twin's values (${reason})`, () => {})
else
  test("the device's primitives give the twin's values", () => {
    expect(available, `REQUIRE_CUDA=1, but: ${reason}`).toBe(true)
    const golden = readFileSync(at('twin/probe.golden'), 'utf8')
    const { stdout } = run()
    // It ends at the first instruction that the device lacks: TMA before sm_90, wgmma on any other.
    const major = Number.parseInt(devices()[1]!.computeCapability!, 10)
    const last = major === 9 ? undefined : major < 9 ? /^tma_load/m : /^wgmma/m
    const values = (printed: string) => printed.slice(0, last && golden.search(last))
    expect(values(stdout)).toBe(values(golden))
  })

const form = "the device takes the bytes that NVIDIA's tables name"
const hopper = at('../build/Release/device_hopper')
const isHopper = devices()[1]?.computeCapability === '9.0'
if (!isHopper && (!available || process.env.REQUIRE_CUDA !== '1'))
  test.skip(`${form} (${available ? 'they are of compute capability 9.0' : reason})`, () => {})
else
  test.runIf(isHopper)(form, () => {
    const { ok, output, errors } = compareWithTables(hopper)
    expect(ok, output + errors).toBe(true)
  })

test.runIf(built && !available)('without a device device_hopper says so and fails', () => {
  const { ok, output, errors } = compareWithTables(hopper)
  expect(ok).toBe(false)
  expect(output).toBe('')
  expect(errors).toMatch(/CUDA|cuda|driver/)
})

test.runIf(built && !available)('without a device the probe says so and fails', () => {
  const { status, stdout, stderr } = run()
  expect(status).toBeGreaterThan(0)
  expect(stdout).toBe('')
  expect(stderr).toMatch(/CUDA|cuda|driver/)
})
