// What the operations' tests share: the backends, seeded data, and comparison within derived bounds.
import { mkdirSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { cudaStatus, type Device, openDevice } from 'p2r-kernels'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { native } from '../dist/lib/native.js'

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

/** The instruction sets of this CPU with what it has beyond them, and without; the best first. */
export const cpuPaths: CpuPath[] = (['avx512', 'avx2', 'neon', 'scalar'] as const).flatMap(
  (simd) => {
    let has: readonly string[]
    try {
      using device = openDevice('cpu', { simd })
      has = device.info.features!
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
    return [path(simd, has), ...(has.length ? [path(`${simd} without features`, [])] : [])]
  },
)

export interface Backend {
  device: Device
  /** 'cpu avx512', ..., 'cuda'. */
  name: string
  /** Another device of the kind. */
  open: (options?: { threads?: number }) => Device
}

/**
 * Runs the suite on every CPU path, and on CUDA where there is a device. Without one it is listed as
 * skipped; with REQUIRE_CUDA=1 that is a failure.
 */
export function onEveryBackend(title: string, suite: (backend: Backend) => void): void {
  for (const { name, options } of cpuPaths) {
    describe(`${title} on cpu ${name}`, () =>
      run(`cpu ${name}`, (more) => openDevice('cpu', { ...options, ...more }), suite))
  }
  const cuda = cudaStatus()
  if (cuda.available)
    describe(`${title} on cuda`, () => run('cuda', () => openDevice('cuda'), suite))
  else if (process.env.REQUIRE_CUDA === '1')
    test(`${title} on cuda`, () => expect.fail(`REQUIRE_CUDA=1, but: ${cuda.reason}`))
  else describe.skip(`${title} on cuda (${cuda.reason})`, () => void test('needs a GPU', () => {}))
}

function run(name: string, open: Backend['open'], suite: (backend: Backend) => void): void {
  const backend = { name, open } as Backend
  beforeAll(() => {
    backend.device = open()
  })
  afterAll(() => backend.device.dispose())
  recordUnasked(backend)
  suite(backend)
}

// ---- Cases for the kernel twin ----

const caseFolder = fileURLToPath(new URL('../build/twin/cases', import.meta.url))
// What a call may do, in multiply-adds and entries (ops/recording.h), to be run by the twin, which takes
// some 0.1 s for it, and ten times that under a sanitizer. As many small calls of each test go in
// unasked; the rest of a test that repeats itself would tell the twin nothing new.
const twinWork = 2 ** 21
const callsUnasked = 4
// How exact such a call is nobody has said: two digits of bf16 still tell any wrong index, race or
// neighbour's value.
const unasked = { absolute: 2 ** -14, ofLargest: 2 ** -7 }

interface Bound {
  absolute?: number
  relative?: number
  ofLargest?: number
}

const recordsCases = (backend: Backend) => backend.name === `cpu ${cpuPaths[0]!.name}`

function record(name: string, calls: number, bound: Bound, work = twinWork): void {
  const folder = `${caseFolder}/${name.replaceAll(/[^\w.-]+/g, '-')}`
  mkdirSync(folder, { recursive: true })
  native().record(folder, work, calls, bound.absolute, bound.relative, bound.ofLargest)
}

/** Every test on the best CPU path writes its first small calls down as cases for the kernel twin. */
function recordUnasked(backend: Backend): void {
  if (!recordsCases(backend)) return
  beforeEach(({ task }) => record(task.fullTestName ?? task.name, callsUnasked, unasked))
  afterEach(() => native().record(''))
}

/**
 * Runs f; on the best CPU path all of its calls that are small enough are written down as cases for
 * the kernel twin, which must reproduce the CPU's results within twice the bound (both sides may
 * err), which means what it means for expectClose. `work` may allow for more.
 */
export function recorded<R>(
  backend: Backend,
  name: string,
  bound: Bound,
  f: () => R,
  work = twinWork,
): R {
  if (!recordsCases(backend)) return f()
  record(name, Number.MAX_SAFE_INTEGER, bound, work)
  try {
    return f()
  } finally {
    native().record('')
  }
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
    const r = Math.sqrt(-2 * Math.log(1 - this.uniform()))
    return scale * r * Math.cos(2 * Math.PI * this.uniform())
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
  const f = new Float32Array([x])
  const u = new Uint32Array(f.buffer)
  const bits = u[0]!
  if (Number.isNaN(x)) return x
  u[0] = ((bits + 0x7fff + ((bits >>> 16) & 1)) & 0xffff0000) >>> 0
  return f[0]!
}

function toF16(x: number): number {
  const a = Math.abs(Math.fround(x))
  if (!Number.isFinite(a) || a === 0) return x
  const ulp = a < 2 ** -14 ? 2 ** -24 : 2 ** (Math.floor(Math.log2(a)) - 10)
  const scaled = a / ulp
  let r = Math.floor(scaled)
  if (scaled - r > 0.5 || (scaled - r === 0.5 && r % 2 === 1)) r++
  return Math.sign(x) * (r * ulp > 65504 ? Infinity : r * ulp)
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
  let worstBy = 0
  for (let i = 0; i < expected.length; i++) {
    const a = actual[i]!
    const e = expected[i]!
    if (Object.is(a, e) || a === e || (Number.isNaN(a) && Number.isNaN(e))) continue
    const by = Math.abs(a - e) / (floor + (bound.relative ?? 0) * Math.abs(e))
    if (!(by <= 1) && !(by <= worstBy)) {
      worst = i
      worstBy = by
    }
  }
  if (worst >= 0)
    expect.fail(
      `[${worst}] is ${actual[worst]}, expected ${expected[worst]}: ${worstBy.toPrecision(3)} times the bound`,
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
  const at = Float64Array.from(x)
  const step = bound.step ?? 1e-4
  const stride = Math.max(1, Math.floor(at.length / (bound.entries ?? 24)))
  for (let i = 0; i < at.length; i += stride) {
    const old = at[i]!
    at[i] = old + step
    const up = f(at)
    at[i] = old - step
    const down = f(at)
    at[i] = old
    const slope = (up - down) / (2 * step)
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
