// Operations over and over with checked results: whether memory grows with the number of calls.
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import * as library from 'p2r-kernels'
import { openDevice, scopeAsync, type Tensor } from 'p2r-kernels'
import { type FunctionName, functions } from './calls.js'
import { Gen } from './gen.js'

export interface Slope {
  name: string
  rounds: number
  /** Bytes in use by the process that each round added, by least squares over the second half. */
  bytesPerRound: number
  /** Bytes that the device held at the end beyond those of the beginning. */
  liveBytes: number
}

export interface SoakOutcome {
  seconds: number
  calls: number
  faults: string[]
}

/** Not calls of an operation: they write files, open devices, or only hand back what they are given. */
const otherwise = new Set<FunctionName>([
  'loadImage',
  'loadMetadata',
  'loadRollouts',
  'loadTensors',
  'openDevice',
  'recordPolicy',
  'saveImage',
  'saveRollouts',
  'saveTensors',
  'scope',
  'scopeAsync',
  'serveModel',
  'devices',
  'cudaStatus',
  'encodeImage',
]) // prettier-ignore
const exported: Readonly<Record<string, unknown>> = library

export const soaked: readonly FunctionName[] = (Object.keys(functions) as FunctionName[]).filter(
  (name) => !otherwise.has(name),
)

/** What a call gives, as text: of tensors their values. */
async function resultOf(name: FunctionName, args: readonly unknown[]): Promise<string> {
  const made: unknown = await (exported[name] as (...a: readonly unknown[]) => unknown)(...args)
  const tensors = (Array.isArray(made) ? made : [made, ...Object.values(made ?? {})]).filter(
    (value): value is Tensor => typeof value === 'object' && value !== null && 'toFloat32' in value,
  )
  const values = await Promise.all(tensors.map(async (tensor) => (await tensor.read()).join()))
  if (typeof made === 'object' && made !== null && 'dispose' in made)
    (made as Disposable & { dispose(): void }).dispose()
  return values.join(';')
}

/** Runs mixed operations for a time; every call is made twice, and gives the same to the bit. */
export async function soak(
  seconds: number,
  seed: number,
  tell: (done: number) => void = () => {},
): Promise<SoakOutcome> {
  const folder = mkdtempSync(join(tmpdir(), 'p2r-soak-'))
  const device = openDevice('cpu')
  const outcome: SoakOutcome = { seconds, calls: 0, faults: [] }
  const until = performance.now() + 1000 * seconds
  const before = device.memory().liveBytes
  for (let round = 0; performance.now() < until; round++) {
    const name = soaked[round % soaked.length]!
    await scopeAsync(async () => {
      // Twice from the same seed, because some operations work in place.
      const [a, b] = [new Gen(device, seed + round, folder), new Gen(device, seed + round, folder)]
      try {
        const first = await resultOf(name, functions[name](a))
        const second = await resultOf(name, functions[name](b))
        if (first !== second)
          outcome.faults.push(`${name}, seed ${seed + round}: another result the second time`)
      } catch (error) {
        outcome.faults.push(`${name}, seed ${seed + round}: ${error}`)
      }
    })
    outcome.calls += 2
    if (round % 50 === 0) tell(1 - (until - performance.now()) / (1000 * seconds))
  }
  await device.synchronize()
  const left = device.memory().liveBytes - before
  if (left !== 0) outcome.faults.push(`${left} bytes stay on the device`)
  device.dispose()
  rmSync(folder, { recursive: true, force: true })
  return outcome
}

/** Rounds of one operation, and what they add to the process's memory. */
export async function slopeOf(name: FunctionName, rounds: number): Promise<Slope> {
  const folder = mkdtempSync(join(tmpdir(), 'p2r-soak-'))
  const device = openDevice('cpu')
  const before = device.memory().liveBytes
  const points: [number, number][] = []
  for (let round = 0; round < rounds; round++) {
    await scopeAsync(async () => {
      await resultOf(name, functions[name](new Gen(device, round % 97, folder)))
    })
    if (round % Math.ceil(rounds / 40) === 0) {
      // Objects' native halves are freed where the event loop turns, which operations without results never wait for.
      await new Promise(setImmediate)
      globalThis.gc?.()
      await new Promise(setImmediate)
      const { rss, heapTotal, heapUsed } = process.memoryUsage()
      // The engine doubles its young generation when it likes: what it holds counts, not its room.
      points.push([round, rss - heapTotal + heapUsed])
    }
  }
  await device.synchronize()
  const liveBytes = device.memory().liveBytes - before
  device.dispose()
  rmSync(folder, { recursive: true, force: true })
  // The first half fills caches, pools and the engine's code.
  const late = points.slice(points.length / 2)
  const mean = (of: readonly number[]): number => of.reduce((s, x) => s + x, 0) / of.length
  const [x, y] = [mean(late.map(([r]) => r)), mean(late.map(([, b]) => b))]
  const [up, down] = [
    late.reduce((s, [r, b]) => s + (r - x) * (b - y), 0),
    late.reduce((s, [r]) => s + (r - x) ** 2, 0),
  ]
  return { name, rounds, bytesPerRound: down ? up / down : 0, liveBytes }
}

if (process.argv[1]?.endsWith('soak.js')) {
  const [name, rounds] = process.argv.slice(2)
  process.stdout.write(JSON.stringify(await slopeOf(name as FunctionName, Number(rounds))))
}
