import {
  type Device,
  type DType,
  linear,
  linearBackward,
  linearLogProbs,
  linearLogProbsBackward,
  linearPolicyLoss,
  openDevice,
  quantize,
  scope,
  type Tensor,
  tokenLogProbs,
} from 'p2r-kernels'
import { expect, test } from 'vitest'
import {
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

const formats = [
  { bits: 8, group: 32 },
  { bits: 8, group: 64 },
  { bits: 4, group: 32 },
  { bits: 4, group: 64 },
] as const
type Format = (typeof formats)[number]
const steps = { 8: 127, 4: 7 } as const

/** To the nearest multiple of `unit`, of two the even one. */
function nearest(x: number, unit: number): number {
  const n = x / unit
  const floor = Math.floor(n)
  const up = n - floor > 0.5 || (n - floor === 0.5 && floor % 2 !== 0)
  return (floor + (up ? 1 : 0)) * unit
}
const toF16 = (x: number): number => rounded([x], 'f16')[0]!

/** The definition of ops/quantize.h: each weight's integer times its scale, and the bound on its error. */
function rounding(w: Float32Array, f: number, c: number, { bits, group }: Format) {
  const largest = steps[bits]
  const values = new Float64Array(f * c)
  const bounds = new Float64Array(f * c)
  for (let j = 0; j < f; j++)
    for (let first = 0; first < c; first += group) {
      const end = Math.min(c, first + group)
      const magnitude = Math.max(...w.subarray(j * c + first, j * c + end).map(Math.abs))
      const scale = toF16(Math.fround(magnitude / largest))
      for (let k = j * c + first; k < j * c + end; k++) {
        const q = scale === 0 ? 0 : nearest(Math.fround(w[k]! / scale), 1)
        values[k] = Math.max(-largest, Math.min(largest, q)) * scale
        bounds[k] = scale / 2 + largest * 2 ** -25
      }
    }
  return { values, bounds }
}

/** The layer of a weight in float64, and the bound on f32 sums in any order. */
function layer(x: Float32Array, w: ArrayLike<number>, b: Float32Array | undefined, c: number) {
  const f = c ? w.length / c : b!.length
  const rows = c ? x.length / c : 0
  const values = new Float64Array(rows * f)
  let largest = 0
  for (let i = 0; i < rows; i++)
    for (let j = 0; j < f; j++) {
      let sum = b ? b[j]! : 0
      let magnitude = Math.abs(sum)
      for (let k = 0; k < c; k++) {
        const p = x[i * c + k]! * w[j * c + k]!
        sum += p
        magnitude += Math.abs(p)
      }
      values[i * f + j] = sum
      largest = Math.max(largest, magnitude)
    }
  // A product is rounded, scaled and rounded again, and takes part in at most c + 1 additions.
  return { values, bound: (c + 4) * roundoff.f32 * largest, largest }
}

const weights = (seed: number, f: number, c: number, dtype: Float) =>
  rounded(new Random(seed).normals(f * c, 1 / Math.sqrt(c + 1)), dtype)

onEveryBackend('quantize', (b) => {
  for (const format of formats)
    for (const dtype of floats)
      test(`${format.bits} bits in groups of ${format.group} of ${dtype}`, async () => {
        for (const [f, c] of [
          [1, 1],
          [16, 64],
          [35, 100],
          [17, 257],
        ] as const) {
          const w = weights(f + c, f, c, dtype)
          // A row of zeros, one of large and one of tiny weights.
          if (f > 3) {
            w.fill(0, c, 2 * c)
            for (let k = 0; k < c; k++) {
              w[2 * c + k] = rounded([w[2 * c + k]! * 1000], dtype)[0]!
              w[3 * c + k] = rounded([w[3 * c + k]! * 2 ** -14], dtype)[0]!
            }
          }
          using weight = b.device.tensor(w, [f, c], dtype)
          const expected = rounding(w, f, c, format)
          const same = { absolute: 0 }
          using q = recorded(
            b,
            `quantize ${f} ${c} ${dtype} ${format.bits} ${format.group}`,
            same,
            () => quantize({ weight, ...format }),
          )
          expect([q.shape, q.bits, q.group]).toEqual([[f, c], format.bits, format.group])
          using back = recorded(
            b,
            `dequantize ${f} ${c} ${format.bits} ${format.group}`,
            same,
            () => q.dequantize(),
          )
          expect([back.dtype, back.shape]).toEqual(['f32', [f, c]])
          const values = await back.read()
          expect(values).toEqual(Float32Array.from(expected.values, (v) => v + 0))
          for (let k = 0; k < w.length; k++)
            expect(Math.abs(values[k]! - w[k]!)).toBeLessThanOrEqual(expected.bounds[k]!)
        }
      })

  const shapes: { rows: number[]; c: number; f: number; bias: 'none' | 'own' | 'f32' }[] = [
    { rows: [], c: 5, f: 3, bias: 'own' },
    { rows: [3, 2], c: 100, f: 35, bias: 'f32' },
    { rows: [13], c: 328, f: 48, bias: 'none' },
    { rows: [16], c: 64, f: 1, bias: 'own' },
    { rows: [40], c: 136, f: 72, bias: 'f32' },
  ]
  for (const format of formats)
    for (const dtype of floats)
      test(`the linear layer, ${format.bits} bits in groups of ${format.group}, ${dtype}`, async () => {
        for (const { rows, c, f, bias: kind } of shapes) {
          const n = rows.reduce((a, d) => a * d, 1)
          const random = new Random(n + c + f)
          const biasType = kind === 'f32' ? 'f32' : dtype
          const x = rounded(random.normals(n * c), dtype)
          const bias = kind === 'none' ? undefined : rounded(random.normals(f), biasType)
          using weight = b.device.tensor(weights(c, f, c, 'f32'), [f, c])
          using q = quantize({ weight, ...format })
          using qw = q.dequantize()
          const expected = layer(x, await qw.read(), bias, c)
          const t = {
            x: b.device.tensor(x, [...rows, c], dtype) as Tensor,
            weight: q,
            ...(bias ? { bias: b.device.tensor(bias, [f], biasType) as Tensor } : {}),
          }
          // On CUDA the weight of many rows is rounded to x's type.
          const last = dtype === 'f32' ? 0 : roundoff[dtype]
          const cuda = n > 16 ? last * expected.largest : 0
          const absolute = expected.bound + (b.name === 'cuda' ? cuda : 0)
          const twin = { absolute: expected.bound + cuda, relative: last }
          const name = `quantized linear ${n} ${c} ${f} ${dtype} ${format.bits} ${format.group}`
          const y = recorded(b, name, twin, () => linear(t))
          expect([y.shape, y.dtype]).toEqual([[...rows, f], dtype])
          expectClose(await y.toFloat32(), expected.values, { absolute, relative: last })
          const exact = recorded(b, `${name} to f32`, twin, () => linear({ ...t, dtype: 'f32' }))
          expect(exact.dtype).toBe('f32')
          expectClose(await exact.toFloat32(), expected.values, { absolute })
        }
      })

  test('a row has the same bits alone, in any batch and by any number of threads', {
    timeout: 120_000,
  }, async () => {
    const random = new Random(5)
    const cpu = b.name.startsWith('cpu')
    const devices = cpu ? [1, 2, 5].map((threads) => b.open({ threads })) : [b.device]
    const total = cpu ? 1200 : 16
    const counts = cpu ? [1, 2, 8, 9, 16, 17, 97, 1025] : [1, 4, 9]
    for (const format of formats)
      for (const dtype of floats) {
        const [c, f] = [random.int(1, 300), random.int(1, 75)]
        const x = rounded(random.normals(total * c), dtype)
        const w = weights(f, f, c, 'bf16')
        const bias = random.normals(f)
        const run = async (device: Device, first: number, n: number) => {
          using rows = device.tensor(x.subarray(first * c, (first + n) * c), [n, c], dtype)
          using weight = device.tensor(w, [f, c], 'bf16')
          using q = quantize({ weight, ...format })
          using v = device.tensor(bias, [f])
          using y = linear({ x: rows as Tensor, weight: q, bias: v, dtype: 'f32' })
          return Buffer.from((await y.read()).buffer)
        }
        const all = await run(b.device, 0, total)
        for (const n of counts) {
          const first = random.int(0, total - n)
          const part = await run(devices[random.int(0, devices.length - 1)]!, first, n)
          expect(part.equals(all.subarray(4 * first * f, 4 * (first + n) * f)), `${n} rows`).toBe(
            true,
          )
        }
      }
    if (cpu) for (const device of devices) device.dispose()
  })

  for (const format of formats)
    for (const dtype of floats)
      test(`log-probabilities of such a head, ${format.bits} bits in groups of ${format.group}, ${dtype}`, async () => {
        for (const [n, v, c, bias] of [
          [5, 331, 70, true],
          [17, 97, 40, false],
          [300, 40, 33, true],
          [2, 9300, 8, false],
        ] as const) {
          const random = new Random(n + v)
          using hidden = b.device.tensor(rounded(random.normals(n * c), dtype), [n, c], dtype)
          using wide = b.device.tensor(random.normals(v * c), [v, c])
          using weight = quantize({ weight: wide, ...format })
          const ids = Array.from({ length: n }, () => random.int(0, v - 1))
          if (n > 5) ids[3] = -100
          using targets = b.device.tensor(Int32Array.from(ids), [n])
          const layer = { weight, ...(bias && { bias: b.device.tensor(random.normals(v), [v]) }) }
          const head = { hidden: hidden as Tensor, targets, temperature: 0.8, ...layer }
          using logits = linear({ x: hidden as Tensor, ...layer, dtype: 'f32' })
          // On CUDA, logits of many rows are those of a weight that was rounded to hidden's type.
          const bound = dtype === 'f32' || n <= 16 ? 1e-4 : 200 * roundoff[dtype]
          for (const extra of [{ entropy: true }, { squaredProbs: true }] as const) {
            const name = `quantized log-probabilities ${n} ${v} ${dtype} ${format.bits} ${format.group}`
            const made = recorded(b, `${name} ${Object.keys(extra)}`, { absolute: bound }, () =>
              linearLogProbs({ ...head, ...extra } as typeof head & { entropy: true }),
            )
            const known = tokenLogProbs({
              ...{ logits, targets, temperature: 0.8 },
              ...(extra as { entropy: true }),
            })
            for (const key of Object.keys(made) as (keyof typeof made)[]) {
              const [one, other] = [made[key] as Tensor, known[key] as Tensor]
              if (!one?.read) continue
              if (b.name.startsWith('cpu')) expect(await one.read()).toEqual(await other.read())
              else expectClose(await one.toFloat32(), await other.toFloat32(), { absolute: bound })
            }
          }
        }
      })

  test('log-probabilities: a target outside of the vocabulary faults, and there is no backward', async () => {
    using weight = quantize({ weight: b.device.zeros([5, 8]), bits: 8 })
    const hidden = b.device.zeros([3, 8])
    const targets = b.device.tensor(Int32Array.of(1, 5, -100), [3])
    const { logProbs } = linearLogProbs({ hidden, weight, targets })
    await expect(logProbs.read()).rejects.toMatchObject({
      code: 'ERR_VALUE',
      op: 'linearLogProbs',
      message: expect.stringMatching(/5/),
    })
    await b.device.synchronize()
    const good = b.device.tensor(Int32Array.of(1, 4, -100), [3])
    const known = linearLogProbs({ hidden, weight, targets: good })
    expectClose(await known.logProbs.read(), [-Math.log(5), -Math.log(5), 0], { absolute: 1e-6 })
    const none = linearLogProbs({
      hidden: b.device.zeros([0, 8]),
      weight,
      targets: b.device.tensor(new Int32Array(0), [0]),
    })
    expect(none.logProbs.shape).toEqual([0])
    const head = { hidden, weight: weight as unknown as Tensor, targets: good }
    const refused = (call: () => unknown, op: string) =>
      expectRefusal(call, 'ERR_VALUE', op, /weight is quantised, and has no gradients/)
    const rows = { stats: known.stats, dLogProbs: b.device.zeros([3]) }
    refused(() => linearLogProbsBackward({ ...head, ...rows }), 'linearLogProbsBackward')
    refused(
      () => linearPolicyLoss({ ...head, advantages: b.device.zeros([1]), cuSeqlens: [0, 3] }),
      'linearPolicyLoss',
    )
    expectRefusal(
      () => linearLogProbs({ hidden: b.device.zeros([3, 7]), weight, targets: good }),
      'ERR_SHAPE',
      'linearLogProbs',
      /hidden's last axis, 7, got \[5, 8\]/,
    )
  })

  test('accepts empty inputs', async () => {
    const z = (...shape: number[]) => b.device.zeros(shape)
    using none = quantize({ weight: z(0, 4), bits: 8 })
    expect(none.dequantize().shape).toEqual([0, 4])
    expect(linear({ x: z(2, 4), weight: none }).shape).toEqual([2, 0])
    using flat = quantize({ weight: z(3, 0), bits: 4 })
    expect(flat.dequantize().shape).toEqual([3, 0])
    using bias = b.device.tensor([1, 2, 3], [3])
    const y = linear({ x: z(2, 0), weight: flat, bias })
    expect(Array.from(await y.read())).toEqual([1, 2, 3, 1, 2, 3])
    using some = quantize({ weight: z(3, 4), bits: 4 })
    expect(linear({ x: z(0, 4), weight: some }).shape).toEqual([0, 3])
    expect(Array.from(await linear({ x: z(1, 4), weight: some }).read())).toEqual([0, 0, 0])
  })

  test('a row of x that is not finite affects its row only', async () => {
    const weight = b.device.tensor(weights(1, 30, 40, 'f32'), [30, 40])
    const x = new Random(2).normals(5 * 40)
    x[3 * 40 + 7] = NaN
    const y = await linear({
      x: b.device.tensor(x, [5, 40]),
      weight: quantize({ weight, bits: 8 }),
    }).read()
    for (let i = 0; i < 5; i++)
      for (let j = 0; j < 30; j++) expect(Number.isNaN(y[i * 30 + j]!)).toBe(i === 3)
  })

  for (const [value, text] of [
    [NaN, 'NaN'],
    [-Infinity, 'infinity'],
    [1e9, '1e\\+09'],
  ] as const)
    test(`a weight of ${value} faults, and takes nothing else with it`, async () => {
      const w = weights(3, 20, 70, 'f32')
      w[18 * 70 + 66] = value
      using weight = b.device.tensor(w, [20, 70])
      using q = quantize({ weight, bits: 4 })
      const fault = {
        code: 'ERR_VALUE',
        op: 'quantize',
        message: expect.stringMatching(new RegExp(`weight\\[18\\] holds ${text}`)),
      }
      await expect(q.dequantize().read()).rejects.toMatchObject(fault)
      using x = b.device.zeros([1, 70])
      await expect(linear({ x, weight: q }).read()).rejects.toMatchObject(fault)
      await b.device.synchronize()
      await b.device.zeros([2]).read()
    })

  test('is disposed, by itself and by a scope', async () => {
    const before = b.device.memory().liveBytes
    using weight = b.device.tensor(weights(1, 64, 64, 'bf16'), [64, 64], 'bf16')
    const live = b.device.memory().liveBytes
    const q = scope(() => {
      quantize({ weight, bits: 8 })
      return quantize({ weight, bits: 4, group: 64 })
    })
    expect(b.device.memory().liveBytes).toBe(live + q.byteLength)
    expect(q.byteLength).toBe((64 * 64) / 2 + 2 * 64)
    q.dispose()
    q.dispose()
    expect(b.device.memory().liveBytes).toBe(live)
    expectRefusal(() => q.dequantize(), 'ERR_DISPOSED', 'dequantize', /dispose/)
    expectRefusal(
      () => linear({ x: b.device.zeros([1, 64]), weight: q }),
      'ERR_DISPOSED',
      'linear',
      /weight/,
    )
    weight.dispose()
    expect(b.device.memory().liveBytes).toBeGreaterThanOrEqual(before)
  })

  test('refuses mismatched arguments', () => {
    const z = (shape: number[], dtype: DType = 'f32'): Tensor => b.device.zeros(shape, dtype)
    const weight = z([3, 4])
    const refused = (a: object, code: string, message: RegExp) =>
      expectRefusal(() => quantize({ weight, bits: 8, ...a }), code, 'quantize', message)
    refused({ weight: 3 }, 'ERR_VALUE', /weight must be a Tensor/)
    refused({ weight: z([3, 4], 'u8') }, 'ERR_DTYPE', /u8/)
    refused({ weight: z([12]) }, 'ERR_SHAPE', /2 axes/)
    refused({ bits: 5 }, 'ERR_VALUE', /bits must be 8 or 4, got 5/)
    refused({ bits: undefined }, 'ERR_VALUE', /bits/)
    refused({ group: 48 }, 'ERR_VALUE', /group must be 32 or 64, got 48/)
    refused({ groups: 32 }, 'ERR_VALUE', /did you mean 'group'/)

    const q = quantize({ weight, bits: 8 })
    const x = z([2, 4])
    const layer = (a: object, code: string, message: RegExp) =>
      expectRefusal(() => linear({ x, weight: q, ...a }), code, 'linear', message)
    layer({ x: z([2, 5]) }, 'ERR_SHAPE', /x's last axis, 5, got \[3, 4\]/)
    layer({ x: z([]) }, 'ERR_SHAPE', /at least 1 axis/)
    layer({ x: z([2, 4], 'i32') }, 'ERR_DTYPE', /i32/)
    layer({ bias: z([4]) }, 'ERR_SHAPE', /\[3\], got \[4\]/)
    layer({ bias: z([3], 'bf16') }, 'ERR_DTYPE', /bias/)
    layer({ dtype: 'f16' }, 'ERR_VALUE', /dtype/)
    using other = openDevice('cpu')
    const foreign = quantize({ weight: other.zeros([3, 4]), bits: 4 })
    layer({ weight: foreign }, 'ERR_DEVICE', /another device/)
    const backward = { dOut: z([2, 3]), x, weight: q as unknown as Tensor }
    expectRefusal(
      () => linearBackward(backward),
      'ERR_VALUE',
      'linearBackward',
      /weight is quantised, and has no gradients/,
    )
  })
})
