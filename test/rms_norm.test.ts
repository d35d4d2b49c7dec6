import { add, openDevice, rmsNorm, rmsNormBackward } from 'p2r-kernels'
import { describe, expect, test } from 'vitest'
import { golden } from './golden.js'
import {
  cpuPaths,
  expectClose,
  expectGradient,
  expectRefusal,
  floats,
  onEveryBackend,
  Random,
  recorded,
  relativeL2,
  rounded,
  roundoff,
} from './harness.js'

type Numbers = ArrayLike<number>

function oracle(x: Numbers, w: Numbers, rows: number, c: number, eps = 1e-6) {
  const out = new Float64Array(rows * c)
  const rstd = new Float64Array(rows)
  for (let r = 0; r < rows; r++) {
    let squares = 0
    for (let i = 0; i < c; i++) squares += x[r * c + i]! ** 2
    rstd[r] = 1 / Math.sqrt((c ? squares / c : 0) + eps)
    for (let i = 0; i < c; i++) out[r * c + i] = x[r * c + i]! * rstd[r]! * w[i]!
  }
  return { out, rstd }
}

function oracleBackward(d: Numbers, x: Numbers, w: Numbers, rows: number, c: number) {
  const { rstd } = oracle(x, w, rows, c)
  const dX = new Float64Array(rows * c)
  const dWeight = new Float64Array(c)
  for (let r = 0; r < rows; r++) {
    const at = r * c
    let mean = 0
    for (let i = 0; i < c; i++) mean += (d[at + i]! * w[i]! * x[at + i]!) / c
    for (let i = 0; i < c; i++) {
      dX[at + i] = rstd[r]! * (d[at + i]! * w[i]! - x[at + i]! * rstd[r]! ** 2 * mean)
      dWeight[i]! += d[at + i]! * x[at + i]! * rstd[r]!
    }
  }
  return { dX, dWeight }
}

// Rows of queries (128), of the models (2048), rows that a block takes and a warp takes, and tails.
const sizes = [
  [1, 1],
  [5, 7],
  [37, 128],
  [3, 2048],
  [2, 1027],
  [1100, 33],
  [0, 8],
] as const

onEveryBackend('rmsNorm', (b) => {
  const u = roundoff.f32
  for (const dtype of floats)
    for (const [rows, c] of sizes) {
      const random = new Random(rows + c)
      const x = rounded(random.normals(rows * c, 3), dtype)
      const w = rounded(random.normals(c), dtype)
      const d = rounded(random.normals(rows * c), dtype)
      // The sum of squares has no cancellation: its error is that of the additions in a lane, C / 16
      // at most, which the square root halves; then a few roundings, and one to the type, where f16 has subnormals.
      const relative = (8 + c / 32) * u
      const bound = {
        absolute: dtype === 'f16' ? 2 ** -25 : 1e-30,
        relative: relative + roundoff[dtype],
      }

      test(`${dtype} [${rows}, ${c}]`, async () => {
        const expected = oracle(x, w, rows, c)
        const [tx, tw] = [b.device.tensor(x, [rows, c], dtype), b.device.tensor(w, [c], dtype)]
        using r = recorded(b, `rmsNorm ${dtype} ${rows} ${c}`, bound, () =>
          rmsNorm({ x: tx, weight: tw }),
        )
        expect([r.out.dtype, r.out.shape, r.rstd.shape]).toEqual([dtype, [rows, c], [rows]])
        expect('sum' in r).toBe(false)
        expectClose(await r.out.toFloat32(), expected.out, bound)
        expectClose(await r.rstd.read(), expected.rstd, { relative })
      })

      test(`${dtype} [${rows}, ${c}] with a residual`, async () => {
        const residual = rounded(random.normals(rows * c), dtype)
        const [tx, tw] = [b.device.tensor(x, [rows, c], dtype), b.device.tensor(w, [c], dtype)]
        const y = b.device.tensor(residual, [rows, c], dtype)
        // The sum may differ by a rounding on another backend, where it is near a tie: not in f32 sums
        // of two 16-bit numbers, which all backends round alike.
        using r = recorded(b, `rmsNorm residual ${dtype} ${rows} ${c}`, bound, () =>
          rmsNorm({ x: tx, weight: tw, residual: y }),
        )
        const sum = add({ x: tx, y })
        expect(await r.sum.read()).toEqual(await sum.read())
        const alone = rmsNorm({ x: sum, weight: tw })
        expect(await r.out.read()).toEqual(await alone.out.read())
        expect(await r.rstd.read()).toEqual(await alone.rstd.read())
      })

      test(`${dtype} [${rows}, ${c}] backward`, async () => {
        const rstd = Float32Array.from(oracle(x, w, rows, c).rstd)
        const expected = oracleBackward(d, x, w, rows, c)
        const dSum = rounded(random.normals(rows * c), dtype)
        const tensors = {
          dOut: b.device.tensor(d, [rows, c], dtype),
          x: b.device.tensor(x, [rows, c], dtype),
          weight: b.device.tensor(w, [c], dtype),
          rstd: b.device.tensor(rstd, [rows]),
        }
        // dX is a difference of terms of the size of rstd |dOut weight|, at most some 16 of the largest
        // rstd; the mean has the error of a sum of C terms. dWeight: a sum of `rows` terms.
        const scale = rstd.reduce((m, v) => Math.max(m, v), 1)
        const loose = { absolute: 64 * u * scale * Math.sqrt(c), relative: 8 * u + roundoff[dtype] }
        using r = recorded(
          b,
          `rmsNorm backward ${dtype} ${rows} ${c}`,
          { ...loose, absolute: loose.absolute + 64 * u * Math.sqrt(rows) },
          () => rmsNormBackward(tensors),
        )
        expectClose(await r.dX.toFloat32(), expected.dX, loose)
        const sums = { absolute: 64 * u * Math.sqrt(rows * c), relative: 16 * u }
        expectClose(await r.dWeight.read(), expected.dWeight, sums)
        using both = recorded(
          b,
          `rmsNorm backward residual ${dtype} ${rows} ${c}`,
          { ...loose, absolute: loose.absolute + 64 * u * Math.sqrt(rows) },
          () => rmsNormBackward({ ...tensors, dSum: b.device.tensor(dSum, [rows, c], dtype) }),
        )
        const total = expected.dX.map((v, i) => v + dSum[i]!)
        expectClose(await both.dX.toFloat32(), total, loose)
        expect(await both.dWeight.read()).toEqual(await r.dWeight.read())
      })
    }

  test('the gradient matches finite differences', async () => {
    const [rows, c] = [3, 10]
    const random = new Random(5)
    const [x, d, more] = [1, 2, 3].map(() => random.normals(rows * c)) as [
      Float32Array,
      Float32Array,
      Float32Array,
    ]
    const w = random.normals(c)
    // Of Σ dOut out + Σ dSum sum, where sum is x and the residual together.
    const at = (x: Numbers, w: Numbers) =>
      oracle(x, w, rows, c).out.reduce((s, v, i) => s + v * d[i]! + more[i]! * x[i]!, 0)
    const [tx, weight] = [b.device.tensor(x, [rows, c]), b.device.tensor(w, [c])]
    const { sum, rstd } = rmsNorm({ x: tx, weight, residual: b.device.zeros([rows, c]) })
    const r = rmsNormBackward({
      dOut: b.device.tensor(d, [rows, c]),
      x: sum,
      weight,
      rstd,
      dSum: b.device.tensor(more, [rows, c]),
    })
    // Central differences of step 1e-4 are good to some 1e-8; the gradient is f32.
    const bound = { absolute: 1e-5, relative: 1e-5, entries: 30 }
    expectGradient((v) => at(v, w), x, await r.dX.read(), bound)
    expectGradient((v) => at(x, v), w, await r.dWeight.read(), bound)
  })

  test("a row's result does not depend on the other rows", async () => {
    for (const dtype of floats) {
      const [rows, c] = [70, 200]
      const data = new Random(3).normals(rows * c)
      const x = b.device.tensor(data, [rows, c], dtype)
      const weight = x.slice(0, 1).reshape([c])
      const whole = rmsNorm({ x, weight, residual: x })
      const [out, rstd] = [await whole.out.read(), await whole.rstd.read()]
      for (const [from, to] of [
        [0, 1],
        [13, 14],
        [5, 40],
        [69, 70],
      ] as const) {
        // Views: rows of 200 halves begin between multiples of 16 bytes.
        const part = x.slice(from, to)
        const r = rmsNorm({ x: part, weight, residual: part })
        expect(await r.out.read()).toEqual(out.slice(from * c, to * c))
        expect(await r.rstd.read()).toEqual(rstd.slice(from, to))
      }
    }
  })

  const files = golden('lm_ops')
  const cases = files
    .list('lm_ops/rms_norm/')
    .flatMap((path) => path.match(/^(.*\/)meta\.json$/)?.[1] ?? [])
  test.each(cases)('reference data: %s', async (folder) => {
    const meta = files.json(`${folder}meta.json`)
    const f = (name: string) => files.f32(`${folder}${name}.bin`)
    const shape: number[] = meta.tensors.x.shape
    const c = shape.at(-1)!
    const rowsOf = (x: Float32Array) =>
      Array.from({ length: x.length / c }, (_, r) => x.subarray(r * c, (r + 1) * c))
    const exact = meta.input_rounding === 'bf16' ? (['f32', 'bf16'] as const) : (['f32'] as const)
    for (const dtype of exact) {
      const x = b.device.tensor(f('x'), shape, dtype)
      const weight = b.device.tensor(f('weight'), [c], dtype)
      const r = rmsNorm({ x, weight, eps: meta.eps })
      expect(r.rstd.shape).toEqual(shape.slice(0, -1))
      const back = rmsNormBackward({
        dOut: b.device.tensor(f('dy'), shape, dtype),
        x,
        weight,
        rstd: r.rstd,
      })
      // The gates of the reference data: f32 2e-6 forward and 5e-6 backward; bf16 twice a rounding.
      const other =
        meta.reference_error_of_other_precisions.float32_inside_outputs_rounded_to_bf16_once
      const gates =
        dtype === 'f32'
          ? { y: 2e-6, dx: 5e-6, dweight: 5e-6 }
          : { y: 2 * other.y.rel_l2, dx: 2 * other.dx.rel_l2, dweight: 5e-6 }
      const close = (actual: Float32Array, name: 'y' | 'dx') => {
        // Row by row, since rows differ in scale. The row of zeros is exact.
        const expected = rowsOf(f(name))
        rowsOf(actual).forEach((row, i) => {
          if (expected[i]!.every((v) => v === 0)) expect(row).toEqual(expected[i])
          else expect(relativeL2(row, expected[i]!), `${name} ${i}`).toBeLessThan(gates[name])
        })
      }
      close(await r.out.toFloat32(), 'y')
      close(await back.dX.toFloat32(), 'dx')
      expectClose(await r.rstd.read(), f('rstd'), { relative: 2e-6 })
      expect(relativeL2(await back.dWeight.read(), f('dweight'))).toBeLessThan(gates.dweight)
    }
  })

  test('accepts no columns, eps 0, NaN, infinity and squares beyond f32', async () => {
    const one = b.device.tensor([1, 1], [2])
    const x = b.device.tensor([3, NaN, 3, 4, Infinity, 1, 1e30, 1, 0, 0], [5, 2])
    const { out, rstd } = rmsNorm({ x, weight: one, eps: 0 })
    const got = await out.read()
    expect([...got.subarray(0, 2)]).toEqual([NaN, NaN])
    expectClose(got.subarray(2, 4), [0.6 * Math.SQRT2, 0.8 * Math.SQRT2], { relative: 1e-6 })
    // Infinity times 0, and 0 times infinity.
    expect([...got.subarray(4)]).toEqual([NaN, 0, 0, 0, NaN, NaN])
    expect([...(await rstd.read()).subarray(2)]).toEqual([0, 0, Infinity])
    const flat = rmsNorm({ x: b.device.zeros([2, 0]), weight: b.device.zeros([0]) })
    expect(flat.out.shape).toEqual([2, 0])
    expectClose(await flat.rstd.read(), [1000, 1000], { relative: 1e-6 })
    const none = rmsNormBackward({
      dOut: b.device.zeros([0, 3]),
      x: b.device.zeros([0, 3]),
      weight: b.device.zeros([3]),
      rstd: b.device.zeros([0]),
    })
    expect([...(await none.dWeight.read())]).toEqual([0, 0, 0])
  })

  test('refuses mismatched arguments', () => {
    const x = b.device.zeros([4, 8])
    const weight = b.device.zeros([8])
    const rstd = b.device.zeros([4])
    const call = (a: object) => () => rmsNorm({ x, weight, ...a })
    expectRefusal(call({ x: 1 }), 'ERR_VALUE', 'rmsNorm', /x must be a Tensor/)
    expectRefusal(call({ x: b.device.zeros([]) }), 'ERR_SHAPE', 'rmsNorm', /at least 1 axis/)
    expectRefusal(call({ weight: x }), 'ERR_SHAPE', 'rmsNorm', /\[8\], got \[4, 8\]/)
    expectRefusal(call({ weight: b.device.zeros([8], 'f16') }), 'ERR_DTYPE', 'rmsNorm')
    expectRefusal(call({ x: b.device.zeros([4, 8], 'i32') }), 'ERR_DTYPE', 'rmsNorm')
    expectRefusal(call({ residual: weight }), 'ERR_SHAPE', 'rmsNorm', /residual/)
    expectRefusal(call({ residual: b.device.zeros([4, 8], 'bf16') }), 'ERR_DTYPE', 'rmsNorm')
    expectRefusal(call({ eps: -1 }), 'ERR_VALUE', 'rmsNorm', /eps/)
    const back = (a: object) => () => rmsNormBackward({ dOut: x, x, weight, rstd, ...a })
    expectRefusal(back({ rstd: weight }), 'ERR_SHAPE', 'rmsNormBackward', /\[4\], got \[8\]/)
    expectRefusal(back({ dOut: weight }), 'ERR_SHAPE', 'rmsNormBackward')
    expectRefusal(back({ dSum: weight }), 'ERR_SHAPE', 'rmsNormBackward', /dSum/)
    expectRefusal(back({ dOut: b.device.zeros([4, 8], 'f16') }), 'ERR_DTYPE', 'rmsNormBackward')
  })
})

describe('rmsNormBackward', () => {
  for (const { name, options } of cpuPaths)
    test(`does not depend on the thread count (${name})`, async () => {
      const [rows, c] = [3000, 40]
      const data = new Random(8).normals(rows * c)
      const results: string[] = []
      for (const threads of [1, 2, 5]) {
        using device = openDevice('cpu', { ...options, threads })
        const x = device.tensor(data, [rows, c])
        const weight = device.tensor(data.subarray(0, c), [c])
        const { rstd } = rmsNorm({ x, weight })
        const r = rmsNormBackward({ dOut: x, x, weight, rstd })
        const bytes = Buffer.concat(
          (await Promise.all([rstd.read(), r.dX.read(), r.dWeight.read()])).map((v) =>
            Buffer.from(v.buffer),
          ),
        )
        results.push(bytes.toString('base64'))
      }
      expect(new Set(results).size).toBe(1)
    })
})
