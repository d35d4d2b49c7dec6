import { adamW, clipGradNorm, type DType, openDevice, type Tensor } from 'p2r-kernels'
import { describe, expect, test } from 'vitest'
import {
  cpuPaths,
  expectClose,
  expectRefusal,
  type Float,
  floats,
  onEveryBackend,
  Random,
  recorded,
  rounded,
  roundoff,
} from './harness.js'

const u = roundoff.f32
// A tensor of nothing, one element, tails of every width, and more than one block.
const sizes = [48, 0, 1, 129, 20_000]

const betas: readonly [number, number] = [0.9, 0.999]
const defaults = { lr: 0.01, betas, eps: 1e-8, weightDecay: 0.01 }

// torch.optim.AdamW's step in float64, for one parameter; p, m and v change.
function adamStep(
  p: Float64Array,
  g: ArrayLike<number>,
  m: Float64Array,
  v: Float64Array,
  step: number,
  { lr, betas, eps, weightDecay }: typeof defaults,
): void {
  for (let i = 0; i < p.length; i++) {
    p[i]! -= lr * weightDecay * p[i]!
    m[i] = betas[0] * m[i]! + (1 - betas[0]) * g[i]!
    v[i] = betas[1] * v[i]! + (1 - betas[1]) * g[i]! ** 2
    const mean = m[i]! / (1 - betas[0] ** step)
    const square = v[i]! / (1 - betas[1] ** step)
    p[i]! -= (lr * mean) / (Math.sqrt(square) + eps)
  }
}

onEveryBackend('optimizer', (b) => {
  for (const dtype of floats)
    for (const clipped of [true, false])
      test(`clipGradNorm ${dtype}, ${clipped ? 'above' : 'below'} the limit`, async () => {
        const random = new Random(1)
        const data = sizes.map((n) => rounded(random.normals(n), dtype))
        const norm = Math.sqrt(data.reduce((s, x) => x.reduce((t, v) => t + v * v, s), 0))
        const maxNorm = clipped ? 1 : 1000
        const factor = Math.min(1, maxNorm / (norm + 1e-6))
        const grads = data.map((x) => b.device.tensor(x, [x.length], dtype))
        const bound = {
          relative: 3 * u + roundoff[dtype],
          absolute: dtype === 'f16' ? 2 ** -25 : 0,
        }
        using before = recorded(b, `clipGradNorm ${dtype} ${clipped}`, bound, () =>
          clipGradNorm({ grads, maxNorm }),
        )
        expect([before.shape, before.dtype]).toEqual([[1], 'f32'])
        expectClose(await before.read(), [norm], { relative: 2 * u })
        for (const [i, x] of data.entries()) {
          const expected = clipped ? Float64Array.from(x, (v) => v * factor) : x
          expectClose(await grads[i]!.toFloat32(), expected, clipped ? bound : {})
        }
      })

  test('clipGradNorm: the norm afterwards is maxNorm; mixed types; Infinity only measures; 0 clears', async () => {
    const random = new Random(2)
    const make = () => [
      b.device.tensor(random.normals(100), [10, 10]),
      b.device.tensor(random.normals(50), [50], 'bf16'),
    ]
    const grads = make()
    clipGradNorm({ grads, maxNorm: 2 })
    // Each bf16 entry may be rounded by 2^-8 of itself.
    expectClose(await clipGradNorm({ grads, maxNorm: Infinity }).read(), [2], { relative: 2 ** -8 })
    clipGradNorm({ grads, maxNorm: 0 })
    expect(await clipGradNorm({ grads, maxNorm: 1 }).read()).toEqual(Float32Array.of(0))
    const huge = b.device.tensor([3e30, 4e30], [2])
    expectClose(await clipGradNorm({ grads: [huge], maxNorm: 5 }).read(), [5e30], { relative: u })
    expectClose(await huge.read(), [3, 4], { relative: 3 * u })
  })

  test('clipGradNorm: non-finite gradients propagate as in torch', async () => {
    const nan = b.device.tensor([1, NaN], [2])
    const one = b.device.tensor([1], [1])
    expect(await clipGradNorm({ grads: [nan, one], maxNorm: 1 }).read()).toEqual(
      Float32Array.of(NaN),
    )
    expect([...(await nan.read()), ...(await one.read())]).toEqual([NaN, NaN, NaN])
    const inf = b.device.tensor([1, Infinity], [2])
    expect(await clipGradNorm({ grads: [inf], maxNorm: 1 }).read()).toEqual(
      Float32Array.of(Infinity),
    )
    expect([...(await inf.read())]).toEqual([0, NaN])
  })

  const types: [Float, Float][] = [
    ['f32', 'f32'],
    ['f16', 'f16'],
    ['bf16', 'bf16'],
    ['f16', 'f32'],
    ['bf16', 'f32'],
  ]
  for (const [dtype, gradType] of types)
    test(`adamW ${dtype}, gradients ${gradType}`, async () => {
      const random = new Random(3)
      const p = sizes.map((n) => Float64Array.from(rounded(random.normals(n), dtype)))
      const m = sizes.map((n) => new Float64Array(n))
      const v = sizes.map((n) => new Float64Array(n))
      const params = p.map((x) => b.device.tensor(x, [x.length], dtype))
      const moments = sizes.map((n) => b.device.zeros([2, n]))
      for (const [step, options] of [
        {},
        { betas: [0.8, 0.95] as const, eps: 1e-6, weightDecay: 0.1, lr: 0.05 },
        { weightDecay: 0 },
        {},
      ].entries()) {
        const g = sizes.map((n) => rounded(random.normals(n, 10 ** -step), gradType))
        const grads = g.map((x) => b.device.tensor(x, [x.length], gradType))
        const settings = { ...defaults, ...options }
        // The oracle starts each step from what the device holds, so the bound is that of one step.
        for (let i = 0; i < p.length; i++) {
          p[i]!.set(await params[i]!.toFloat32())
          adamStep(p[i]!, g[i]!, m[i]!, v[i]!, step + 1, settings)
        }
        const bound = { absolute: 2e-6, relative: 4 * u + roundoff[dtype] }
        recorded(b, `adamW ${dtype} ${gradType} ${step}`, bound, () =>
          adamW({ params, grads, moments, step: step + 1, lr: 0.01, ...options }),
        )
        for (let i = 0; i < p.length; i++) {
          expectClose(await params[i]!.toFloat32(), p[i]!, bound)
          const held = await moments[i]!.read()
          // A few roundings of sums whose terms are at most of size 1 (m) and 4 (v).
          expectClose(held.subarray(0, sizes[i]), m[i]!, { absolute: 4 * u, relative: 8 * u })
          expectClose(held.subarray(sizes[i]), v[i]!, { absolute: 4 * u, relative: 8 * u })
          m[i]!.set(held.subarray(0, sizes[i]))
          v[i]!.set(held.subarray(sizes[i]))
        }
      }
    })

  test('adamW: the first step moves every parameter by lr against its gradient', async () => {
    const params = [b.device.zeros([3])]
    const grads = [b.device.tensor([5, -0.01, 300], [3])]
    const moments = [b.device.zeros([2, 3])]
    adamW({ params, grads, moments, step: 1, lr: 0.5 })
    expectClose(await params[0]!.read(), [-0.5, 0.5, -0.5], { relative: 2e-6 })
  })

  test('adamW: a gradient of 0 applies weight decay only; NaN affects its element only', async () => {
    const params = [b.device.tensor([1, 1], [2])]
    const moments = [b.device.zeros([2, 2])]
    const grads = [b.device.tensor([0, NaN], [2])]
    adamW({ params, grads, moments, step: 1, lr: 0.1, weightDecay: 0.5 })
    const [first, second] = await params[0]!.read()
    expect(first).toBeCloseTo(0.95, 6)
    expect(second).toBeNaN()
  })

  test('adamW: accepts views of one tensor, and empty lists', async () => {
    const all = b.device.tensor([1, 2, 3, 4], [4])
    const grads = [b.device.tensor([1, 1], [2]), b.device.tensor([1, 1], [2])]
    const moments = [b.device.zeros([2, 2]), b.device.zeros([2, 2])]
    adamW({
      params: [all.slice(0, 2), all.slice(2)],
      grads,
      moments,
      step: 1,
      lr: 1,
      weightDecay: 0,
    })
    expectClose(await all.read(), [0, 1, 2, 3], { absolute: 1e-6 })
    adamW({ params: [], grads: [], moments: [], step: 1, lr: 1 })
  })

  test('refuses mismatched arguments', () => {
    const zeros = (shape: number[], dtype: DType = 'f32') => b.device.zeros(shape, dtype) as Tensor
    const x = zeros([4])
    const clip = (a: object) => () => clipGradNorm({ grads: [x], maxNorm: 1, ...a })
    expectRefusal(clip({ grads: [] }), 'ERR_VALUE', 'clipGradNorm', /at least one/)
    expectRefusal(clip({ grads: x }), 'ERR_VALUE', 'clipGradNorm', /array of Tensors/)
    expectRefusal(clip({ grads: [x, 1] }), 'ERR_VALUE', 'clipGradNorm', /grads\[1\]/)
    expectRefusal(clip({ grads: [x, x] }), 'ERR_VALUE', 'clipGradNorm', /share memory/)
    expectRefusal(clip({ grads: [x, x.slice(1, 2)] }), 'ERR_VALUE', 'clipGradNorm', /share memory/)
    expectRefusal(clip({ grads: [zeros([4], 'i32')] }), 'ERR_DTYPE', 'clipGradNorm')
    expectRefusal(clip({ maxNorm: -1 }), 'ERR_VALUE', 'clipGradNorm', /maxNorm/)
    expectRefusal(clip({ maxNorm: NaN }), 'ERR_VALUE', 'clipGradNorm', /maxNorm/)
    const base = { params: [x], grads: [x], moments: [zeros([2, 4])], step: 1, lr: 0.1 }
    const step = (a: object) => () => adamW({ ...base, ...a })
    expectRefusal(step({ grads: [] }), 'ERR_SHAPE', 'adamW', /each of the 1 params/)
    expectRefusal(step({ grads: [zeros([5])] }), 'ERR_SHAPE', 'adamW', /grads\[0\]/)
    expectRefusal(step({ moments: [x] }), 'ERR_SHAPE', 'adamW', /\[2, 4\], got \[4\]/)
    expectRefusal(step({ moments: [zeros([2, 4], 'f16')] }), 'ERR_DTYPE', 'adamW')
    expectRefusal(step({ grads: [zeros([4], 'f16')] }), 'ERR_DTYPE', 'adamW')
    expectRefusal(step({ params: [zeros([4], 'u8')] }), 'ERR_DTYPE', 'adamW')
    expectRefusal(step({ step: 0 }), 'ERR_VALUE', 'adamW', /step/)
    expectRefusal(step({ lr: -1 }), 'ERR_VALUE', 'adamW', /lr/)
    expectRefusal(step({ lr: undefined }), 'ERR_VALUE', 'adamW', /lr/)
    expectRefusal(step({ betas: [0.9, 1] }), 'ERR_VALUE', 'adamW', /betas/)
    expectRefusal(step({ betas: 0.9 }), 'ERR_VALUE', 'adamW', /betas/)
    expectRefusal(step({ eps: -1 }), 'ERR_VALUE', 'adamW', /eps/)
    expectRefusal(step({ params: 'x' }), 'ERR_VALUE', 'adamW', /params/)
    const twice = { params: [x, x], grads: [x, x], moments: [zeros([2, 4]), zeros([2, 4])] }
    expectRefusal(step(twice), 'ERR_VALUE', 'adamW', /share memory/)
  })
})

describe('optimizer', () => {
  for (const { name, options } of cpuPaths)
    test(`does not depend on the thread count (${name})`, async () => {
      const data = new Random(4).normals(150_000)
      const results: string[] = []
      for (const threads of [1, 2, 5]) {
        using device = openDevice('cpu', { ...options, threads })
        const g = device.tensor(data, [150_000])
        const norm = await clipGradNorm({ grads: [g], maxNorm: 1 }).read()
        results.push(`${norm} ${Buffer.from((await g.read()).buffer).toString('base64')}`)
      }
      expect(new Set(results).size).toBe(1)
    })
})
