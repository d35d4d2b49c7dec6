// Shared by the operations' tests: backends, seeded data, comparison within bounds, recorded cases.
import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { cudaStatus, type Device, type Grid, openDevice } from 'p2r-kernels'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { native } from '../dist/lib/native.js'
import { cases } from '../scripts/twin.mjs'

/** Unit roundoff: half the distance from 1 to the next number of the type. */
export const roundoff = { f32: 2 ** -24, f16: 2 ** -11, bf16: 2 ** -8 } as const
export type Float = keyof typeof roundoff
export const floats: readonly Float[] = ['f32', 'f16', 'bf16']

export interface CpuPath {
  /** 'avx512', 'avx512 without features', ... */
  name: string
  options: {
    simd: 'avx512' | 'avx2' | 'neon' | 'scalar'
    features: { bf16: boolean; vnni: boolean }
  }
}

/** The instruction sets of this CPU, each with its optional features and without them; the best first. */
export const cpuPaths: CpuPath[] = (['avx512', 'avx2', 'neon', 'scalar'] as const).flatMap(
  (simd) => {
    let available: readonly string[]
    try {
      using device = openDevice('cpu', { simd })
      available = device.info.features!
    } catch {
      return []
    }
    const path = (name: string, features: readonly string[]): CpuPath => ({
      name,
      options: {
        simd,
        features: { bf16: features.includes('bf16'), vnni: features.includes('vnni') },
      },
    })
    return [
      path(simd, available),
      ...(available.length ? [path(`${simd} without features`, [])] : []),
    ]
  },
)

export interface Backend {
  device: Device
  /** 'cpu avx512', ..., 'cuda'. */
  name: string
  /** Opens another device of the same kind. */
  open: (options?: { threads?: number }) => Device
}

/**
 * Runs the suite on every CPU path, and on CUDA where there is a device. Without one it is listed as
 * skipped; with REQUIRE_CUDA=1 that is a failure.
 */
export function onEveryBackend(title: string, suite: (backend: Backend) => void): void {
  for (const { name, options } of cpuPaths) {
    describe(`${title} on cpu ${name}`, () =>
      onBackend(`cpu ${name}`, (more) => openDevice('cpu', { ...options, ...more }), suite))
  }
  const cuda = cudaStatus()
  if (cuda.available)
    describe(`${title} on cuda`, () => onBackend('cuda', () => openDevice('cuda'), suite))
  else if (process.env.REQUIRE_CUDA === '1')
    test(`${title} on cuda`, () => expect.fail(`REQUIRE_CUDA=1, but: ${cuda.reason}`))
  else describe.skip(`${title} on cuda (${cuda.reason})`, () => void test('needs a GPU', () => {}))
}

function onBackend(name: string, open: Backend['open'], suite: (backend: Backend) => void): void {
  const backend = { name, open } as Backend
  beforeAll(() => {
    backend.device = open()
  })
  afterAll(() => backend.device.dispose())
  recordEveryTest(backend)
  suite(backend)
}

// ---- Recorded cases ----
//
// The kernel twin (test/twin) runs the CUDA kernels' source on the CPU. Its test cases are calls of these
// tests: native().record makes the addon write the inputs and results of CPU calls into a folder, and
// the twin must reproduce the results within twice the bound given here. Only the best CPU path
// records, since all paths make the same calls.

/**
 * The largest call that is recorded, in multiply-adds and entries (ops/recording.h). The twin takes
 * about 0.1 s for it, and ten times that under a sanitizer.
 */
const maxRecordedWork = 2 ** 21
/** Of each test, besides what `recorded` records: further calls would repeat what the twin has run. */
const maxCallsPerTest = 4
/** For those calls, whose accuracy no test states: loose, but a wrong index or a race exceeds it. */
const defaultBound = { absolute: 2 ** -14, ofLargest: 2 ** -7 }

interface Bound {
  absolute?: number
  relative?: number
  ofLargest?: number
}

const recordsCases = (backend: Backend) => backend.name === `cpu ${cpuPaths[0]!.name}`

function startRecording(name: string, calls: number, bound: Bound, work = maxRecordedWork): void {
  const folder = join(cases, name.replaceAll(/[^\w.-]+/g, '-'))
  mkdirSync(folder, { recursive: true })
  native().record(folder, work, calls, bound.absolute, bound.relative, bound.ofLargest)
}

function stopRecording(): void {
  native().record('')
}

/** Records the first small calls of every test of the suite. */
function recordEveryTest(backend: Backend): void {
  if (!recordsCases(backend)) return
  beforeEach(({ task }) =>
    startRecording(task.fullTestName ?? task.name, maxCallsPerTest, defaultBound),
  )
  afterEach(stopRecording)
}

/**
 * Runs f and records all of its calls of at most `work`. The bound is that of expectClose; the twin is
 * allowed twice as much, because both its result and the CPU's may err.
 */
export function recorded<R>(
  backend: Backend,
  name: string,
  bound: Bound,
  f: () => R,
  work = maxRecordedWork,
): R {
  if (!recordsCases(backend)) return f()
  startRecording(name, Number.MAX_SAFE_INTEGER, bound, work)
  try {
    return f()
  } finally {
    stopRecording()
  }
}

/**
 * Row and column of every patch of grids [t, h, w], in the order of the Qwen-VL towers: frame by frame,
 * blocks of merge x merge patches row by row, and row by row within a block.
 */
export function* mergeBlockOrder(
  grids: readonly Grid[],
  merge: number,
): Generator<{ row: number; column: number; h: number; w: number }> {
  for (const [t, h, w] of grids)
    for (let frame = 0; frame < t; frame++)
      for (let top = 0; top < h; top += merge)
        for (let left = 0; left < w; left += merge)
          for (let row = top; row < top + merge; row++)
            for (let column = left; column < left + merge; column++) yield { row, column, h, w }
}

/** Seeded uniform and normal numbers (Marsaglia's xorshift32; Box and Muller). */
export class Random {
  #state: number
  constructor(seed: number) {
    this.#state = Math.imul(seed + 1, 0x9e3779b1) | 1
    for (let i = 0; i < 8; i++) this.uniform()
  }
  /** In [0, 1). */
  uniform(): number {
    let x = this.#state
    x ^= x << 13
    x ^= x >>> 17
    x ^= x << 5
    this.#state = x
    return (x >>> 0) / 2 ** 32
  }
  int(low: number, high: number): number {
    return low + Math.floor(this.uniform() * (high - low + 1))
  }
  normal(scale = 1): number {
    const radius = Math.sqrt(-2 * Math.log(1 - this.uniform()))
    return scale * radius * Math.cos(2 * Math.PI * this.uniform())
  }
  normals(n: number, scale = 1): Float32Array {
    return Float32Array.from({ length: n }, () => this.normal(scale))
  }
}

/** The values as a tensor of the type holds them. */
export function rounded(x: ArrayLike<number>, dtype: Float): Float32Array {
  if (dtype === 'f32') return Float32Array.from(x)
  return Float32Array.from(x, dtype === 'bf16' ? toBf16 : toF16)
}

function toBf16(x: number): number {
  if (Number.isNaN(x)) return x
  const value = new Float32Array([x])
  const bits = new Uint32Array(value.buffer)
  const lastKept = (bits[0]! >>> 16) & 1
  bits[0] = ((bits[0]! + 0x7fff + lastKept) & 0xffff0000) >>> 0
  return value[0]!
}

function toF16(x: number): number {
  const magnitude = Math.abs(Math.fround(x))
  if (!Number.isFinite(magnitude) || magnitude === 0) return x
  const ulp = magnitude < 2 ** -14 ? 2 ** -24 : 2 ** (Math.floor(Math.log2(magnitude)) - 10)
  const scaled = magnitude / ulp
  let ulps = Math.floor(scaled)
  if (scaled - ulps > 0.5 || (scaled - ulps === 0.5 && ulps % 2 === 1)) ulps++
  return Math.sign(x) * (ulps * ulp > 65504 ? Infinity : ulps * ulp)
}

/** Every entry within absolute + relative * |expected| + ofLargest * the largest |expected|. */
export function expectClose(
  actual: ArrayLike<number>,
  expected: ArrayLike<number>,
  bound: Bound,
): void {
  expect(actual.length).toBe(expected.length)
  let largest = 0
  for (let i = 0; i < expected.length; i++)
    if (Number.isFinite(expected[i]!)) largest = Math.max(largest, Math.abs(expected[i]!))
  const floor = (bound.absolute ?? 0) + (bound.ofLargest ?? 0) * largest
  let worst = -1
  let worstRatio = 0
  for (let i = 0; i < expected.length; i++) {
    const [got, wanted] = [actual[i]!, expected[i]!]
    if (got === wanted || (Number.isNaN(got) && Number.isNaN(wanted))) continue
    const ratio = Math.abs(got - wanted) / (floor + (bound.relative ?? 0) * Math.abs(wanted))
    if (!(ratio <= 1) && !(ratio <= worstRatio)) {
      worst = i
      worstRatio = ratio
    }
  }
  if (worst >= 0)
    expect.fail(
      `[${worst}] is ${actual[worst]}, expected ${expected[worst]}: ${worstRatio.toPrecision(3)} times the bound`,
    )
}

/** ‖actual - expected‖ / ‖expected‖. */
export function relativeL2(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  let difference = 0
  let norm = 0
  for (let i = 0; i < expected.length; i++) {
    difference += (actual[i]! - expected[i]!) ** 2
    norm += expected[i]! ** 2
  }
  return Math.sqrt(difference / norm)
}

/**
 * Central differences of a scalar function at some entries of x, against the given gradient: an
 * independent check on the formula of a backward pass. f is evaluated in float64 by the caller.
 */
export function expectGradient(
  f: (x: Float64Array) => number,
  x: ArrayLike<number>,
  gradient: ArrayLike<number>,
  bound: { absolute: number; relative: number; step?: number; entries?: number },
): void {
  const point = Float64Array.from(x)
  const step = bound.step ?? 1e-4
  const stride = Math.max(1, Math.floor(point.length / (bound.entries ?? 24)))
  for (let i = 0; i < point.length; i += stride) {
    const value = point[i]!
    point[i] = value + step
    const above = f(point)
    point[i] = value - step
    const below = f(point)
    point[i] = value
    const slope = (above - below) / (2 * step)
    expect(
      Math.abs(slope - gradient[i]!),
      `entry ${i}: ${gradient[i]} against a slope of ${slope}`,
    ).toBeLessThanOrEqual(bound.absolute + bound.relative * Math.abs(slope))
  }
}

/** Expects a P2RError with this code, the operation's name and a message that matches. */
export function expectRefusal(f: () => unknown, code: string, op: string, message?: RegExp): void {
  let thrown: unknown
  try {
    f()
  } catch (e) {
    thrown = e
  }
  expect(thrown, 'nothing was thrown').toMatchObject({ name: 'P2RError', code, op })
  if (message) expect((thrown as Error).message).toMatch(message)
}
