import { layerNorm, layerNormBackward, openDevice } from 'p2r-kernels'
import { describe, expect, test } from 'vitest'
import {
  cpuPaths,
  expectClose,
  expectGradient,
  expectRefusal,
  floats,
  onEveryBackend,
  Random,
  recorded,
  rounded,
  roundoff,
} from './harness.js'

type Numbers = ArrayLike<number>

function oracle(x: Numbers, w: Numbers, b: Numbers, rows: number, c: number, eps = 1e-6) {
  const out = new Float64Array(rows * c)
  const stats = new Float64Array(2 * rows)
  for (let r = 0; r < rows; r++) {
    let mean = 0
    for (let i = 0; i < c; i++) mean += x[r * c + i]! / c
    let variance = 0
    for (let i = 0; i < c; i++) variance += (x[r * c + i]! - mean) ** 2 / c
    const rstd = 1 / Math.sqrt(variance + eps)
    stats.set([mean, rstd], 2 * r)
    for (let i = 0; i < c; i++) out[r * c + i] = (x[r * c + i]! - mean) * rstd * w[i]! + b[i]!
  }
  return { out, stats }
}

function oracleBackward(d: Numbers, x: Numbers, w: Numbers, rows: number, c: number) {
  const { stats } = oracle(x, w, w, rows, c)
  const dX = new Float64Array(rows * c)
  const dWeight = new Float64Array(c)
  const dBias = new Float64Array(c)
  for (let r = 0; r < rows; r++) {
    const [mean, rstd] = [stats[2 * r]!, stats[2 * r + 1]!]
    const hat = (i: number) => (x[r * c + i]! - mean) * rstd
    let meanOfGradient = 0
    let meanOfProduct = 0
    for (let i = 0; i < c; i++) {
      const g = d[r * c + i]! * w[i]!
      meanOfGradient += g / c
      meanOfProduct += (g * hat(i)) / c
      dWeight[i]! += d[r * c + i]! * hat(i)
      dBias[i]! += d[r * c + i]!
    }
    for (let i = 0; i < c; i++)
      dX[r * c + i] = rstd * (d[r * c + i]! * w[i]! - meanOfGradient - hat(i) * meanOfProduct)
  }
  return { dX, dWeight, dBias }
}

// 48 and 1152 are the miniature's and a large encoder's; the others leave tails in every vector.
const sizes = [
  [1, 1],
  [5, 7],
  [37, 48],
  [3, 1152],
  [1100, 33],
  [0, 8],
] as const

onEveryBackend('layerNorm', (b) => {
  for (const dtype of floats)
    for (const [rows, c] of sizes) {
      const random = new Random(rows + c)
      const x = rounded(random.normals(rows * c, 3), dtype)
      const w = rounded(random.normals(c), dtype)
      const bias = random.normals(c)
      const d = rounded(random.normals(rows * c), dtype)
      // x̂ is at most sqrt(C) and has the error of the mean and of rstd, a few roundings each, times
      // |weight| of up to 4; then one rounding to the type.
      const u = roundoff.f32
      const bound = { absolute: 64 * u * Math.sqrt(c), relative: 8 * u + roundoff[dtype] }

      test(`${dtype} [${rows}, ${c}]`, async () => {
        const expected = oracle(x, w, bias, rows, c)
        const [tx, tw] = [b.device.tensor(x, [rows, c], dtype), b.device.tensor(w, [c], dtype)]
        using r = recorded(b, `layerNorm ${dtype} ${rows} ${c}`, bound, () =>
          layerNorm({ x: tx, weight: tw, bias: b.device.tensor(bias, [c]) }),
        )
        expectClose(await r.out.toFloat32(), expected.out, bound)
        // With one column the deviation is 0 and rstd 1 / sqrt(eps).
        expectClose(await r.stats.read(), expected.stats, { absolute: 8 * u, relative: 16 * u })
      })

      test(`${dtype} [${rows}, ${c}] backward`, async () => {
        const stats = Float32Array.from(oracle(x, w, w, rows, c).stats)
        const expected = oracleBackward(d, x, w, rows, c)
        const tensors = {
          dOut: b.device.tensor(d, [rows, c], dtype),
          x: b.device.tensor(x, [rows, c], dtype),
          weight: b.device.tensor(w, [c], dtype),
          stats: b.device.tensor(stats, [rows, 2]),
        }
        // dX's terms are of the size of rstd |dOut weight x̂|, and nearly cancel for small C; with one
        // column rstd is 1000. dWeight and dBias are sums of `rows` terms, with slices of 16 or more.
        const scale = stats.reduce((m, v, i) => (i % 2 ? Math.max(m, v) : m), 1)
        const loose = {
          absolute: 256 * u * scale * Math.sqrt(c),
          relative: 16 * u + roundoff[dtype],
        }
        using r = recorded(
          b,
          `layerNorm backward ${dtype} ${rows} ${c}`,
          { ...loose, absolute: loose.absolute + 64 * u * Math.sqrt(rows) },
          () => layerNormBackward(tensors),
        )
        expectClose(await r.dX.toFloat32(), expected.dX, loose)
        const sums = { absolute: 64 * u * Math.sqrt(rows * c), relative: 16 * u }
        expectClose(await r.dWeight.read(), expected.dWeight, sums)
        expectClose(await r.dBias.read(), expected.dBias, sums)
      })
    }

  test('the gradient matches finite differences', async () => {
    const [rows, c] = [3, 10]
    const random = new Random(5)
    const [x, d] = [random.normals(rows * c), random.normals(rows * c)]
    const [w, bias] = [random.normals(c), random.normals(c)]
    const at = (x: Numbers, w: Numbers, bias: Numbers) =>
      oracle(x, w, bias, rows, c).out.reduce((s, v, i) => s + v * d[i]!, 0)
    const [tx, tw] = [b.device.tensor(x, [rows, c]), b.device.tensor(w, [c])]
    const { stats } = layerNorm({ x: tx, weight: tw, bias: b.device.tensor(bias, [c]) })
    const dOut = b.device.tensor(d, [rows, c])
    const r = layerNormBackward({ dOut, x: tx, weight: tw, stats })
    // Central differences of step 1e-4 are good to some 1e-8; the gradient is f32.
    const bound = { absolute: 1e-5, relative: 1e-5, entries: 30 }
    expectGradient((v) => at(v, w, bias), x, await r.dX.read(), bound)
    expectGradient((v) => at(x, v, bias), w, await r.dWeight.read(), bound)
    expectGradient((v) => at(x, w, v), bias, await r.dBias.read(), bound)
  })

  test('is accurate for a mean far from zero', async () => {
    // The deviations of 1e4 + noise are exact in f32 to 2^-10; what is lost beyond that would show.
    const c = 1024
    const x = new Random(6).normals(2 * c).map((v) => 1e4 + v)
    const one = b.device.tensor(new Float32Array(c).fill(1), [c])
    const { out, stats } = layerNorm({
      x: b.device.tensor(x, [2, c]),
      weight: one,
      bias: b.device.zeros([c]),
    })
    const expected = oracle(x, new Float32Array(c).fill(1), new Float32Array(c), 2, c)
    expectClose(await out.read(), expected.out, { absolute: 1e4 * 2 ** -23, relative: 1e-5 })
    expectClose(await stats.read(), expected.stats, { relative: 1e-6 })
  })

  test('accepts a bias of another type, any rank, eps 0 and NaN', async () => {
    const x = rounded(new Random(7).normals(2 * 3 * 8), 'bf16')
    const w = new Float32Array(8).fill(1)
    const weight = b.device.tensor(w, [8], 'bf16')
    const bound = { absolute: 1e-5, relative: roundoff.bf16 + 1e-5 }
    const r = recorded(b, 'layerNorm bias of its type bf16', bound, () =>
      layerNorm({ x: b.device.tensor(x, [2, 3, 8], 'bf16'), weight, bias: weight, eps: 0 }),
    )
    expect([r.out.shape, r.out.dtype, r.stats.shape]).toEqual([[2, 3, 8], 'bf16', [6, 2]])
    expectClose(await r.out.toFloat32(), oracle(x, w, w, 6, 8, 0).out, bound)
    const halves = rounded(x, 'f16')
    const ones = b.device.tensor(w, [8], 'f16')
    const half = { absolute: 1e-5, relative: roundoff.f16 + 1e-5 }
    const f16 = recorded(b, 'layerNorm bias of its type f16', half, () =>
      layerNorm({ x: b.device.tensor(halves, [6, 8], 'f16'), weight: ones, bias: ones, eps: 0 }),
    )
    expectClose(await f16.out.toFloat32(), oracle(halves, w, w, 6, 8, 0).out, half)
    const bad = layerNorm({
      x: b.device.tensor([1, NaN, 1, 2], [2, 2]),
      weight: b.device.tensor([1, 1], [2]),
      bias: b.device.tensor([0, 0], [2]),
    })
    const out = await bad.out.read()
    expect([...out.subarray(0, 2)]).toEqual([NaN, NaN])
    expectClose(out.subarray(2), [-1, 1], { absolute: 1e-5 })
    const flat = layerNorm({
      x: b.device.zeros([2, 0]),
      weight: b.device.zeros([0]),
      bias: b.device.zeros([0]),
    })
    expect(flat.out.shape).toEqual([2, 0])
    expectClose(await flat.stats.read(), [0, 1000, 0, 1000], { relative: 1e-6 })
  })

  test('refuses mismatched arguments', () => {
    const x = b.device.zeros([4, 8])
    const v = b.device.zeros([8])
    const stats = b.device.zeros([4, 2])
    const call = (a: object) => () => layerNorm({ x, weight: v, bias: v, ...a })
    expectRefusal(call({ x: 1 }), 'ERR_VALUE', 'layerNorm', /x must be a Tensor/)
    expectRefusal(
      call({ weight: b.device.zeros([7]) }),
      'ERR_SHAPE',
      'layerNorm',
      /\[8\], got \[7\]/,
    )
    expectRefusal(call({ weight: b.device.zeros([8], 'f16') }), 'ERR_DTYPE', 'layerNorm')
    expectRefusal(call({ bias: b.device.zeros([8], 'bf16') }), 'ERR_DTYPE', 'layerNorm')
    expectRefusal(call({ x: b.device.zeros([4, 8], 'i32') }), 'ERR_DTYPE', 'layerNorm')
    expectRefusal(call({ eps: -1 }), 'ERR_VALUE', 'layerNorm', /eps/)
    const back = (a: object) => () => layerNormBackward({ dOut: x, x, weight: v, stats, ...a })
    expectRefusal(back({ stats: v }), 'ERR_SHAPE', 'layerNormBackward', /\[4, 2\], got \[8\]/)
    expectRefusal(back({ dOut: v }), 'ERR_SHAPE', 'layerNormBackward')
    expectRefusal(back({ dOut: b.device.zeros([4, 8], 'f16') }), 'ERR_DTYPE', 'layerNormBackward')
  })
})

describe('layerNormBackward', () => {
  for (const { name, options } of cpuPaths)
    test(`does not depend on the thread count (${name})`, async () => {
      const [rows, c] = [3000, 40]
      const data = new Random(8).normals(rows * c)
      const results: string[] = []
      for (const threads of [1, 2, 5]) {
        using device = openDevice('cpu', { ...options, threads })
        const x = device.tensor(data, [rows, c])
        const weight = device.tensor(data.subarray(0, c), [c])
        const { stats } = layerNorm({ x, weight, bias: weight })
        const r = layerNormBackward({ dOut: x, x, weight, stats })
        const bytes = Buffer.concat(
          (await Promise.all([r.dX.read(), r.dWeight.read(), r.dBias.read()])).map((v) =>
            Buffer.from(v.buffer),
          ),
        )
        results.push(bytes.toString('base64'))
      }
      expect(new Set(results).size).toBe(1)
    })
})
