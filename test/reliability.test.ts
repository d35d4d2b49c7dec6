// The small form of `npm run reliability`, and that what it counts as a fault is one.
import { execFile } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import * as library from 'p2r-kernels'
import { openDevice, P2RError } from 'p2r-kernels'
import { afterAll, describe, expect, test } from 'vitest'
import { allocationFailures } from '../dist/reliability/allocations.js'
import { functions } from '../dist/reliability/calls.js'
import { outcomeOf } from '../dist/reliability/fuzz.js'
import { Gen } from '../dist/reliability/gen.js'
import type { Results } from '../dist/reliability/report.js'

const main = fileURLToPath(new URL('../dist/reliability/main.js', import.meta.url))
const folder = mkdtempSync(join(tmpdir(), 'p2r-reliability-test-'))
const device = openDevice('cpu')
afterAll(() => {
  device.dispose()
  rmSync(folder, { recursive: true })
})

async function quick(part: string): Promise<Results> {
  const file = join(folder, `${part}.json`)
  await promisify(execFile)(process.execPath, [main, part, '--quick', '--json', file]).catch(
    ({ stdout, stderr }) => expect(`${stdout}${stderr}`).toBe('no faults'),
  )
  return JSON.parse(readFileSync(file, 'utf8'))
}

describe('no faults', () => {
  test('hostile calls', async () => {
    const { fuzz } = await quick('fuzz')
    expect(fuzz).toMatchObject({ calls: 5000, faults: [] })
    expect(Object.keys(fuzz!.byName).length).toBeGreaterThan(130)
    // Neither is nearly everything refused before it is read, nor nothing.
    expect(fuzz!.returned / fuzz!.calls).toBeGreaterThan(0.1)
    expect(fuzz!.refused / fuzz!.calls).toBeGreaterThan(0.3)
  }, 180_000)

  test('native functions', async () => {
    const { native, queue } = await quick('native')
    expect(native).toMatchObject({ inputs: 20_000, faults: [] })
    expect(queue).toMatchObject({ rounds: 200, faults: [] })
  }, 180_000)

  test('broken files', async () => {
    const { files } = await quick('files')
    expect(files).toMatchObject({ mutations: 600, faults: [] })
    for (const kind of [
      'png',
      'bmp',
      'safetensors',
      'rollouts',
      'recording',
      'config',
      'checkpoint',
      'tokenizer',
    ])
      expect(files!.byKind, kind).toHaveProperty(kind)
    expect(files!.refused).toBeGreaterThan(300)
  }, 180_000)

  test('long texts are read in time in proportion to their length', async () => {
    const { text } = await quick('text')
    expect(text!.length).toBeGreaterThan(100)
  }, 180_000)

  test('interrupted writes', async () => {
    const { writers } = await quick('writers')
    expect(writers).toMatchObject({ full: 12, killed: 6, readOnly: 3, faults: [] })
  }, 180_000)

  test('terminated workers', async () => {
    const { workers } = await quick('workers')
    expect(workers).toMatchObject({ terminated: 40, faults: [] })
  }, 180_000)

  test('mixed operations, twice each', async () => {
    const { soak } = await quick('soak')
    expect(soak!.faults).toEqual([])
    expect(soak!.calls).toBeGreaterThan(200)
  }, 180_000)
})

test.skipIf(process.platform !== 'linux')(
  'every seventh allocation of a session fails',
  async () => {
    const at = join(folder, 'allocations')
    const outcome = await allocationFailures({ seed: 1, stride: 7, folder: at })
    expect(outcome.faults).toEqual([])
    expect(outcome.calls).toBeGreaterThan(110)
    expect(outcome.refused).toBeGreaterThan(150)
  },
  60_000,
)

describe('what is a fault', () => {
  const count = { returned: 0, refused: 0 }
  const of = (run: () => unknown) => outcomeOf({ run }, [], device, count)

  test('another error than a P2RError, thrown or rejected with', async () => {
    const wrong = new TypeError('x is not a function')
    expect(
      await of(() => {
        throw wrong
      }),
    ).toMatch(/not a function/) // prettier-ignore
    expect(await of(() => Promise.reject(wrong))).toMatch(/not a function/)
    expect(await of(() => Promise.reject(new P2RError('ERR_VALUE', 'no')))).toBeUndefined()
  })

  test('a tensor that has not what its shape says', async () => {
    const good = device.zeros([2, 3])
    expect(await of(() => good)).toBeUndefined()
    const lying = { shape: [2, 3], size: 7, toFloat32() {}, read: async () => new Float32Array(6) }
    expect(await of(() => lying)).toMatch(/shape 2,3 of 7 elements/)
    expect(await of(() => ({ ...lying, size: 6, read: async () => [] }))).toMatch(/0 elements of 6/)
  })
})

test('the calls that are spoiled are valid ones', async () => {
  // They are of files that the fuzz writes first, of a batch, or of a model.
  const others = new Set([
    'loadMetadata',
    'loadRollouts',
    'loadTensors',
    'saveRollouts',
    'serveModel',
  ])
  const exported: Record<string, unknown> = library
  const refused: string[] = []
  for (const [name, argumentsOf] of Object.entries(functions))
    for (let seed = 0; seed < 10 && !others.has(name); seed++)
      try {
        const f = exported[name] as (...a: readonly unknown[]) => unknown
        const made = await f(...argumentsOf(new Gen(device, seed, folder)))
        if (name === 'openDevice') (made as library.Device).dispose()
      } catch (error) {
        refused.push(`${name}, seed ${seed}: ${error}`)
      }
  expect(refused).toEqual([])
})
