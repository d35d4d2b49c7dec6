import os from 'node:os'
import {
  applyRotary,
  attention,
  attentionBackward,
  attentionMass,
  type Grid,
  kernels,
  openDevice,
  type Tensor,
  windowLayout,
} from 'p2r-kernels'
import { describe, expect, test } from 'vitest'
import { golden } from './golden.js'
import {
  type Backend,
  cpuPaths,
  expectClose,
  expectGradient,
  expectRefusal,
  type Float,
  floats,
  onEveryBackend,
  Random,
  recorded,
  relativeL2,
  rounded,
  roundoff,
} from './harness.js'

interface Inputs {
  q: ArrayLike<number>
  k: ArrayLike<number>
  v: ArrayLike<number>
  cu: ArrayLike<number>
  heads: number
  d: number
  scale: number
}

// Everything about one attention from its definition, in float64, a query at a time.
function oracle({ q, k, v, cu, heads, d, scale }: Inputs, dOut: ArrayLike<number> = []) {
  const tokens = cu[cu.length - 1]!
  const of = (n: number) => new Float64Array(n)
  const [out, dq, dk, dv] = [of(q.length), of(q.length), of(q.length), of(q.length)]
  const [lse, mass] = [of(heads * tokens), of(heads * tokens)]
  const dot = (x: ArrayLike<number>, i: number, y: ArrayLike<number>, j: number) => {
    let sum = 0
    for (let c = 0; c < d; c++) sum += x[i + c]! * y[j + c]!
    return sum
  }
  for (let s = 1; s < cu.length; s++)
    for (let h = 0; h < heads; h++) {
      const keys = Array.from({ length: cu[s]! - cu[s - 1]! }, (_, i) => cu[s - 1]! + i)
      for (const query of keys) {
        const row = (query * heads + h) * d
        const logits = keys.map((key) => scale * dot(q, row, k, (key * heads + h) * d))
        const top = logits.reduce((m, x) => Math.max(m, x), -Infinity)
        const sum = logits.reduce((total, x) => total + Math.exp(x - top), 0)
        lse[h * tokens + query] = top + Math.log(sum)
        const p = logits.map((x) => Math.exp(x - top) / sum)
        keys.forEach((key, i) => {
          mass[h * tokens + key]! += p[i]!
          for (let c = 0; c < d; c++) out[row + c]! += p[i]! * v[(key * heads + h) * d + c]!
        })
        if (dOut.length === 0) continue
        const delta = dot(dOut, row, out, row)
        keys.forEach((key, i) => {
          const at = (key * heads + h) * d
          const ds = p[i]! * (dot(dOut, row, v, at) - delta) * scale
          for (let c = 0; c < d; c++) {
            dv[at + c]! += p[i]! * dOut[row + c]!
            dk[at + c]! += ds * q[row + c]!
            dq[row + c]! += ds * k[at + c]!
          }
        })
      }
    }
  return { out, lse, mass, dq, dk, dv }
}

function lengthsToCu(lengths: readonly number[]): number[] {
  let end = 0
  return [0, ...lengths.map((n) => (end += n))]
}

interface Case {
  d: number
  heads: number
  lengths: number[]
  scale?: number
}
// Every head dimension that a kernel is made for, and others; many short sequences, for small tiles,
// and longer ones, for large tiles; several tiles, whole and ragged.
const cases: Case[] = [
  { d: 8, heads: 1, lengths: [1] },
  { d: 16, heads: 3, lengths: [5, 64, 0, 1, 33] },
  { d: 64, heads: 2, lengths: [65, 1, 64] },
  { d: 64, heads: 1, lengths: [3, 200] },
  { d: 72, heads: 1, lengths: [0, 7, 97, 0], scale: -0.2 },
  { d: 72, heads: 3, lengths: [64, 60, 1] },
  { d: 80, heads: 2, lengths: [16, 24] },
  { d: 80, heads: 1, lengths: [110, 70] },
  { d: 88, heads: 1, lengths: [20, 70] },
  { d: 104, heads: 2, lengths: [33, 20], scale: 0 },
  { d: 128, heads: 1, lengths: [40, 90] },
  // Several steps and several tiles, of either size, of the Hopper kernels, ragged and not.
  { d: 64, heads: 1, lengths: [260, 0, 1] },
  { d: 72, heads: 1, lengths: [1, 258] },
  { d: 80, heads: 1, lengths: [193] },
  { d: 128, heads: 1, lengths: [129, 128] },
]
const title = (c: Case) => `D ${c.d}, ${c.heads} heads of ${c.lengths}${c.scale ? ', scaled' : ''}`

function random(c: Case, dtype: Float, seed = 1) {
  const cu = lengthsToCu(c.lengths)
  const n = cu.at(-1)! * c.heads * c.d
  const r = new Random(seed)
  const make = () => rounded(r.normals(n), dtype)
  const [q, k, v, dOut] = [make(), make(), make(), make()]
  const scale = c.scale ?? 1 / Math.sqrt(c.d)
  return { q, k, v, dOut, cu, heads: c.heads, d: c.d, scale }
}
type Data = ReturnType<typeof random>

function upload({ device }: Pick<Backend, 'device'>, x: Data, dtype: Float) {
  const shape = [x.cu.at(-1)!, x.heads, x.d]
  const put = (values: Float32Array) => device.tensor(values, shape, dtype)
  return { q: put(x.q), k: put(x.k), v: put(x.v), dOut: put(x.dOut) }
}

// [T, H, D] three times to [T, 3, H, D].
function pack(q: Float32Array, k: Float32Array, v: Float32Array, inner: number): Float32Array {
  const out = new Float32Array(3 * q.length)
  for (let t = 0; t * inner < q.length; t++)
    [q, k, v].forEach((x, i) => {
      out.set(x.subarray(t * inner, (t + 1) * inner), (3 * t + i) * inner)
    })
  return out
}

function rotaryTables(b: Backend, tokens: number, d: number) {
  const angles = new Random(9).normals((tokens * d) / 2, 3)
  const table = (f: (x: number) => number) =>
    b.device.tensor(
      Float32Array.from({ length: tokens * d }, (_, i) =>
        f(angles[Math.floor(i / d) * (d / 2) + (i % (d / 2))]!),
      ),
      [tokens, d],
    )
  return { cos: table(Math.cos), sin: table(Math.sin) }
}

// These take f32 and are f32 throughout between inputs and outputs, but that the CPU's rounds P and dS to
// bf16 for its products where it has AVX512-BF16. The others, on tensor cores, round them to the inputs'
// type, f16 or bf16.
const exact = ['tiled', 'plain']
// 'wgmma', which alone takes `deterministic: false` at its word.
const wgmmaTakes = (dtype: Float, d: number) => dtype !== 'f32' && [64, 72, 80, 128].includes(d)
const kernelsFor = (b: Backend, dtype: Float, d: number) =>
  kernels('attention', b.device).filter(
    (name) =>
      (dtype !== 'f32' || exact.includes(name)) && (name !== 'wgmma' || wgmmaTakes(dtype, d)),
  )
const rounds = (dtype: Float, kernel?: string) =>
  dtype !== 'f32' &&
  (kernel === undefined || !exact.includes(kernel) || (kernel === 'tiled' && dtype === 'bf16'))

// A logit is a sum of D products of normal numbers, scaled to about 1 and reaching some 6: in f32 it
// is off by a few ulps of that, some 1e-6, and so is the weight it makes, relatively. The outputs
// are averages of values up to 4 and their gradients sums of some ten such terms; then comes the
// rounding to the type. Where weights are rounded, the largest of a row is 1 and exact, and so no
// more than half of an average of values up to 4 is off by a roundoff. Without a kernel: of any.
const forwardBound = (dtype: Float, kernel?: string) => ({
  absolute: 1e-5 + (rounds(dtype, kernel) ? 2 * roundoff[dtype] : 0),
  relative: roundoff[dtype] * 1.01,
})
// The gradient's delta holds the rounding of `out` to the type, of D entries of up to 4, through the
// whole of a row of weights; the rounding of P and dS comes to as much.
const backwardBound = (dtype: Float, kernel?: string) => ({
  absolute: 2e-5 + (dtype === 'f32' ? 0 : rounds(dtype, kernel) ? 4 : 2) * roundoff[dtype],
  relative: roundoff[dtype] * 1.01,
})
// What the twin may do for a case of several large tiles (test/harness.ts).
const tilesWork = 2 ** 25

onEveryBackend('attention', (b) => {
  for (const c of cases)
    for (const dtype of floats)
      test(`${title(c)}, ${dtype}`, async () => {
        const x = random(c, dtype)
        const expected = oracle(x, x.dOut)
        const { q, k, v, dOut } = upload(b, x, dtype)
        const name = `${title(c)} ${dtype}`
        for (const kernel of kernelsFor(b, dtype, c.d)) {
          const given = {
            q,
            k,
            v,
            cuSeqlens: x.cu,
            ...(c.scale === undefined ? {} : { scale: c.scale }),
          }
          const forward = () => attention({ ...given, kernel })
          const { out, lse } = recorded(
            b,
            `attention ${name}`,
            forwardBound(dtype),
            forward,
            tilesWork,
          )
          expect(out.shape).toEqual(q.shape)
          expect(out.dtype).toBe(dtype)
          expect(lse.shape).toEqual([x.heads, x.cu.at(-1)!])
          expectClose(await out.toFloat32(), expected.out, forwardBound(dtype, kernel))
          expectClose(await lse.read(), expected.lse, { absolute: 1e-5 })

          const massBound = { absolute: 1e-5, relative: 1e-5 }
          const saliency = () => attentionMass({ ...given, lse })
          const mass = recorded(b, `attention mass ${name}`, massBound, saliency, tilesWork)
          expectClose(await mass.read(), expected.mass, massBound)

          const backward = () => attentionBackward({ ...given, dOut, out, lse, kernel })
          const back = recorded(
            b,
            `attention backward ${name}`,
            backwardBound(dtype),
            backward,
            tilesWork,
          )
          const bound = backwardBound(dtype, kernel)
          expectClose(await back.dV.toFloat32(), expected.dv, bound)
          expectClose(await back.dQ.toFloat32(), expected.dq, bound)
          expectClose(await back.dK.toFloat32(), expected.dk, bound)

          // The order of a sum is within the bound, so this one is the same.
          if (!wgmmaTakes(dtype, c.d)) continue
          const loose = recorded(
            b,
            `attention backward in any order ${name}`,
            backwardBound(dtype),
            () => attentionBackward({ ...given, dOut, out, lse, kernel, deterministic: false }),
            tilesWork,
          )
          expectClose(await loose.dV.toFloat32(), expected.dv, bound)
          expectClose(await loose.dQ.toFloat32(), expected.dq, bound)
          expectClose(await loose.dK.toFloat32(), expected.dk, bound)
        }
      })

  // TMA, cp.async and vector loads want multiples of 16 bytes.
  for (const d of [64, 72])
    for (const dtype of floats)
      test(`views that begin at any element, D ${d}, ${dtype}`, async () => {
        const x = random({ d, heads: 2, lengths: [20, 45] }, dtype)
        const expected = oracle(x, x.dOut)
        const view = (values: Float32Array) =>
          b.device
            .tensor(Float32Array.of(0, ...values), [values.length + 1], dtype)
            .slice(1)
            .reshape([65, 2, d])
        const given = { q: view(x.q), k: view(x.k), v: view(x.v), cuSeqlens: x.cu }
        const dOut = view(x.dOut)
        const packed = b.device
          .tensor(Float32Array.of(0, ...pack(x.q, x.k, x.v, 2 * d)), [3 * x.q.length + 1], dtype)
          .slice(1)
          .reshape([65, 3, 2, d])
        const inPacked = { qkv: packed, cuSeqlens: x.cu }
        const name = `D ${d} ${dtype}`
        const massBound = { absolute: 1e-5, relative: 1e-5 }
        for (const kernel of kernelsFor(b, dtype, d)) {
          for (const input of [given, inPacked]) {
            const { out, lse } = recorded(b, `attention views ${name}`, forwardBound(dtype), () =>
              attention({ ...input, kernel }),
            )
            expectClose(await out.toFloat32(), expected.out, forwardBound(dtype, kernel))
            const mass = recorded(b, `attention mass views ${name}`, massBound, () =>
              attentionMass({ ...input, lse }),
            )
            expectClose(await mass.read(), expected.mass, massBound)
          }
          const { out, lse } = attention({ ...given, kernel })
          const outView = view(await out.toFloat32())
          for (const deterministic of [true, false]) {
            const back = recorded(b, `attention backward views ${name}`, backwardBound(dtype), () =>
              attentionBackward({ ...given, dOut, out: outView, lse, kernel, deterministic }),
            )
            const bound = backwardBound(dtype, kernel)
            expectClose(await back.dV.toFloat32(), expected.dv, bound)
            expectClose(await back.dQ.toFloat32(), expected.dq, bound)
            expectClose(await back.dK.toFloat32(), expected.dk, bound)
          }
        }
      })

  // The first is short to the CPU's forward, for its K and V stay in the cache; the others are not.
  for (const [d, tokens, dtype] of [
    [16, 2400, 'f32'],
    ...floats.map((dtype) => [80, 1100, dtype] as const),
  ] as const)
    test(`a long sequence, split among tasks, D ${d}, ${dtype}`, async () => {
      const x = random({ d, heads: 1, lengths: [3, tokens, 1] }, dtype)
      const expected = oracle(x, x.dOut)
      const { q, k, v, dOut } = upload(b, x, dtype)
      const { out, lse } = attention({ q, k, v, cuSeqlens: x.cu })
      expectClose(await out.toFloat32(), expected.out, forwardBound(dtype))
      expectClose(await lse.read(), expected.lse, { absolute: 1e-5 })
      const mass = attentionMass({ q, k, lse, cuSeqlens: x.cu })
      expectClose(await mass.read(), expected.mass, { absolute: 1e-5, relative: 1e-5 })
      const back = attentionBackward({ dOut, q, k, v, out, lse, cuSeqlens: x.cu })
      expectClose(await back.dV.toFloat32(), expected.dv, backwardBound(dtype))
      expectClose(await back.dQ.toFloat32(), expected.dq, backwardBound(dtype))
      expectClose(await back.dK.toFloat32(), expected.dk, backwardBound(dtype))
    })

  const packedCases: (Case & { dtype: Float })[] = [
    ...floats.map((dtype) => ({ d: 72, heads: 2, lengths: [3, 0, 70], dtype })),
    ...[64, 80, 128].map((d) => ({ d, heads: 1, lengths: [3, 0, 130], dtype: 'bf16' as const })),
  ]
  for (const { dtype, ...c } of packedCases)
    test(`packed qkv, with and without rotary, ${title(c)}, ${dtype}`, async () => {
      const x = random(c, dtype, 2)
      const { q, k, v, dOut } = upload(b, x, dtype)
      const [tokens, inner] = [x.cu.at(-1)!, c.heads * c.d]
      const shape = [tokens, 3, c.heads, c.d]
      const qkv = b.device.tensor(pack(x.q, x.k, x.v, inner), shape, dtype)
      const rotary = rotaryTables(b, tokens, c.d)
      const cuSeqlens = x.cu

      for (const [rotated, kernel] of [false, true].flatMap((rotated) =>
        kernelsFor(b, dtype, c.d).map((kernel) => [rotated, kernel] as const),
      )) {
        const name = `packed${rotated ? ' with rotary' : ''}, D ${c.d}, ${dtype}`
        const separate = rotated
          ? { q: applyRotary({ x: q, ...rotary }), k: applyRotary({ x: k, ...rotary }), v }
          : { q, k, v }
        const packed = rotated ? { qkv, rotary } : { qkv }
        const one = recorded(b, `attention ${name}`, forwardBound(dtype), () =>
          attention({ ...packed, cuSeqlens, kernel }),
        )
        const two = attention({ ...separate, cuSeqlens, kernel })
        // The same numbers in the same order, so the same bits.
        expect(await one.out.read()).toEqual(await two.out.read())
        expect(await one.lse.read()).toEqual(await two.lse.read())
        const massOfOne = attentionMass({ ...packed, lse: one.lse, cuSeqlens })
        const massOfTwo = attentionMass({ q: separate.q, k: separate.k, lse: two.lse, cuSeqlens })
        expect(await massOfOne.read()).toEqual(await massOfTwo.read())

        const backward = (deterministic: boolean) =>
          recorded(
            b,
            `attention backward ${deterministic ? '' : 'in any order '}${name}`,
            backwardBound(dtype),
            () => attentionBackward({ ...packed, ...one, dOut, cuSeqlens, kernel, deterministic }),
            tilesWork,
          )
        const { dQkv } = backward(true)
        const loose = backward(false)
        const { dQ, dK, dV } = attentionBackward({ ...separate, ...two, dOut, cuSeqlens, kernel })
        const back = (g: Tensor) =>
          rotated ? applyRotary({ x: g, ...rotary, inverse: true }).toFloat32() : g.toFloat32()
        // Computed separately, the gradient is rounded before the inverse rotation and again after it.
        const expected = pack(await back(dQ), await back(dK), await dV.toFloat32(), inner)
        const twice = rotated ? 3 * roundoff[dtype] : 0
        expectClose(await dQkv.toFloat32(), expected, { absolute: twice, relative: twice })
        // The same factors, rounded before they are summed up.
        expectClose(await loose.dQkv.toFloat32(), await dQkv.toFloat32(), {
          absolute: 2e-5,
          relative: 2 * roundoff[dtype],
        })
      }
    })

  test('the gradient matches finite differences', async () => {
    const c = { d: 8, heads: 2, lengths: [6, 1, 4] }
    const x = random(c, 'f32', 3)
    const { q, k, v, dOut } = upload(b, x, 'f32')
    const { out, lse } = attention({ q, k, v, cuSeqlens: x.cu })
    const back = attentionBackward({ dOut, q, k, v, out, lse, cuSeqlens: x.cu })
    const gradients = { q: back.dQ, k: back.dK, v: back.dV }
    for (const name of ['q', 'k', 'v'] as const)
      expectGradient(
        (at) => oracle({ ...x, [name]: at }).out.reduce((s, o, i) => s + o * x.dOut[i]!, 0),
        x[name],
        await gradients[name].read(),
        { absolute: 1e-5, relative: 1e-5, entries: 176 },
      )
  })

  test('constant values are preserved, and mass sums to the length', async () => {
    const x = random({ d: 24, heads: 2, lengths: [11, 50, 0, 1] }, 'f32', 4)
    const { q, k } = upload(b, x, 'f32')
    const v = b.device.tensor(
      x.v.map((_, i) => i % 24),
      q.shape,
    )
    const { out, lse } = attention({ q, k, v, cuSeqlens: x.cu })
    expectClose(
      await out.read(),
      x.v.map((_, i) => i % 24),
      { relative: 64 * roundoff.f32 },
    )
    const mass = await attentionMass({ q, k, lse, cuSeqlens: x.cu }).read()
    for (let h = 0; h < 2; h++)
      for (let s = 1; s < x.cu.length; s++) {
        const [from, to] = [h * 62 + x.cu[s - 1]!, h * 62 + x.cu[s]!]
        const sum = mass.subarray(from, to).reduce((total, m) => total + m, 0)
        expect(Math.abs(sum - (to - from))).toBeLessThanOrEqual(1e-5 * (to - from))
      }
  })

  for (const dtype of floats)
    test(`sequences are independent, ${dtype}`, async () => {
      // The same sequences in another order give the same bits in that order; one of them is full of
      // NaN and infinities.
      const lengths = [7, 70, 1, 33]
      const order = [2, 0, 3, 1]
      const x = random({ d: 72, heads: 2, lengths }, dtype, 5)
      for (const part of [x.q, x.k, x.v])
        for (let i = 0; i < 32; i++)
          part[(10 + i) * 144 + 4 * i] = [NaN, Infinity, -Infinity][i % 3]!
      const move = (values: Float32Array, width: number) =>
        Float32Array.from(
          order.flatMap((s) => [...values.subarray(x.cu[s]! * width, x.cu[s + 1]! * width)]),
        )
      const y = { ...x, cu: lengthsToCu(order.map((s) => lengths[s]!)) }
      for (const part of ['q', 'k', 'v', 'dOut'] as const) y[part] = move(x[part], 144)

      const run = async (data: Data, kernel: string) => {
        const { q, k, v, dOut } = upload(b, data, dtype)
        const given = { q, k, v, cuSeqlens: data.cu, kernel }
        const { out, lse } = attention(given)
        const { dQ, dK, dV } = attentionBackward({ ...given, dOut, out, lse })
        return Promise.all([out, dQ, dK, dV].map((t) => t.toFloat32()))
      }
      for (const kernel of kernelsFor(b, dtype, 72)) {
        const [straight, moved] = [await run(x, kernel), await run(y, kernel)]
        straight.forEach((values, i) => {
          expect(moved[i]).toEqual(move(values, 144))
          const clean = [...values.subarray(0, 7 * 144), ...values.subarray(77 * 144)]
          expect(clean.every(Number.isFinite)).toBe(true)
          expect(values.subarray(7 * 144, 77 * 144).some(Number.isNaN)).toBe(true)
        })
      }
    })

  for (const dtype of floats)
    test(`an output larger than any cache, ${dtype}`, async () => {
      // 256 tokens again and again, whose output takes more than 40 MB, and by themselves.
      const [heads, d, times] = [2, 80, 512]
      const lengths = [64, 64, 33, 1, 64, 30]
      const x = random({ d, heads, lengths }, dtype, 7)
      const again = (part: Float32Array) => {
        const all = new Float32Array(times * part.length)
        for (let i = 0; i < times; i++) all.set(part, i * part.length)
        return all
      }
      const many = { ...x, cu: lengthsToCu(Array.from({ length: times }, () => lengths).flat()) }
      for (const part of ['q', 'k', 'v', 'dOut'] as const) many[part] = again(x[part])
      const run = async (data: Data) => {
        const { q, k, v } = upload(b, data, dtype)
        const { out, lse } = attention({ q, k, v, cuSeqlens: data.cu })
        const bits = async (t: Tensor) => Buffer.from((await t.toFloat32()).buffer)
        return [await bits(out), await bits(lse)] as const
      }
      const [[once, logs], [all, allLogs]] = [await run(x), await run(many)]
      for (let i = 0; i < times; i++) {
        const at = i * once.length
        expect(all.subarray(at, at + once.length).equals(once)).toBe(true)
        for (let h = 0; h < heads; h++) {
          const log = (h * times + i) * 256 * 4
          const of = logs.subarray(h * 256 * 4, (h + 1) * 256 * 4)
          expect(allLogs.subarray(log, log + of.length).equals(of)).toBe(true)
        }
      }
    })

  // Tiles at a sequence's end reach into the next one.
  for (const d of [64, 72, 80, 128])
    test(`NaN in a neighbouring sequence does not reach the gradients, D ${d}`, async () => {
      const dtype = 'bf16'
      const x = random({ d, heads: 1, lengths: [65, 30, 70] }, dtype, 12)
      for (const part of [x.q, x.k, x.v, x.dOut]) part.fill(NaN, 65 * d, 95 * d)
      const expected = oracle(x, x.dOut)
      const { q, k, v, dOut } = upload(b, x, dtype)
      for (const kernel of kernelsFor(b, dtype, d))
        for (const deterministic of [true, false]) {
          const given = { q, k, v, cuSeqlens: x.cu, kernel }
          const { out, lse } = attention(given)
          const { dQ, dK, dV } = recorded(
            b,
            `attention backward beside NaN, D ${d}${deterministic ? '' : ', in any order'}`,
            backwardBound(dtype),
            () => attentionBackward({ ...given, dOut, out, lse, deterministic }),
            tilesWork,
          )
          const bound = backwardBound(dtype, kernel)
          expectClose(await dQ.toFloat32(), expected.dq, bound)
          expectClose(await dK.toFloat32(), expected.dk, bound)
          expectClose(await dV.toFloat32(), expected.dv, bound)
        }
    })

  test('results over parts of the keys are combined by their lse', async () => {
    // Queries A and B against keys A and B: each half against each half, weighted by its share.
    const [n, heads, d] = [50, 2, 16]
    const x = random({ d, heads, lengths: [2 * n] }, 'f32', 6)
    const half = (values: Float32Array, which: number[]) =>
      Float32Array.from(
        which.flatMap((i) => [...values.subarray(i * n * heads * d, (i + 1) * n * heads * d)]),
      )
    const whole = upload(b, x, 'f32')
    const all = attention({ q: whole.q, k: whole.k, v: whole.v, cuSeqlens: x.cu })
    const split = upload(
      b,
      {
        ...x,
        q: half(x.q, [0, 0, 1, 1]),
        k: half(x.k, [0, 1, 0, 1]),
        v: half(x.v, [0, 1, 0, 1]),
        dOut: half(x.dOut, [0, 0, 1, 1]),
        cu: [0, 4 * n],
      },
      'f32',
    )
    const { q, k, v } = split
    const parts = attention({ q, k, v, cuSeqlens: [0, n, 2 * n, 3 * n, 4 * n] })
    const [out, lse] = [await parts.out.toFloat32(), await parts.lse.read()]
    const merged = new Float64Array(x.q.length)
    const mergedLse = new Float64Array(heads * 2 * n)
    for (let t = 0; t < 2 * n; t++)
      for (let h = 0; h < heads; h++) {
        const places = [0, 1].map((key) => (t < n ? 0 : 2 * n) + key * n + (t % n))
        const weights = places.map((p) => Math.exp(lse[h * 4 * n + p]!))
        const sum = weights[0]! + weights[1]!
        mergedLse[h * 2 * n + t] = Math.log(sum)
        places.forEach((p, i) => {
          for (let c = 0; c < d; c++)
            merged[(t * heads + h) * d + c]! += (weights[i]! / sum) * out[(p * heads + h) * d + c]!
        })
      }
    expectClose(await all.out.toFloat32(), merged, forwardBound('f32'))
    expectClose(await all.lse.read(), mergedLse, { absolute: 1e-5 })
  })

  // 3e38 is beyond f16.
  for (const dtype of ['f32', 'bf16'] as const)
    test(`infinite logits, ${dtype}`, async () => {
      // Products of 3e38 overflow. 250 keys of -inf before 3 of 0; only -inf; one +inf; NaN.
      const d = dtype === 'f32' ? 8 : 64
      const lengths = [253, 2, 2, 2]
      const cu = lengthsToCu(lengths)
      const x = { q: new Float32Array(cu.at(-1)! * d), k: new Float32Array(cu.at(-1)! * d) }
      for (let t = 0; t < cu.at(-1)!; t++) {
        x.q[t * d] = 3e38
        if (t < 250 || t === 253 || t === 254) x.k[t * d] = -3e38
      }
      x.k[255 * d] = 3e38
      x.k[257 * d] = NaN
      const tensor = (data: Float32Array) => b.device.tensor(data, [cu.at(-1)!, 1, d], dtype)
      const v = rounded(new Random(7).normals(x.q.length), dtype)
      const mean = Float64Array.from({ length: d }, (_, c) =>
        [250, 251, 252].reduce((sum, t) => sum + v[t * d + c]! / 3, 0),
      )
      for (const kernel of kernelsFor(b, dtype, d)) {
        const { out, lse } = recorded(
          b,
          `attention without end ${dtype}`,
          forwardBound(dtype),
          () => attention({ q: tensor(x.q), k: tensor(x.k), v: tensor(v), cuSeqlens: cu, kernel }),
          tilesWork,
        )
        const [values, logs] = [await out.toFloat32(), await lse.read()]
        expectClose(values.subarray(0, d), mean, forwardBound(dtype, kernel))
        const ln3 = new Float64Array(253).fill(Math.log(3))
        expectClose(logs.subarray(0, 253), ln3, { absolute: 1e-6 })
        expect(Array.from(logs.subarray(253))).toEqual([-Infinity, -Infinity, NaN, NaN, NaN, NaN])
        expect(values.subarray(253 * d).every(Number.isNaN)).toBe(true)
      }
    })

  // 345 logits from 0 to -86, whose values are as large as their weights are small, and 355 so far
  // below that they have no weight, whatever their values are: in blocks of keys from the largest on,
  // and to the largest, after blocks of none.
  test.for([
    ['falling', -1e4],
    ['rising', -1e4],
    ['rising', -Infinity],
  ] as const)('weights of every size, %s, the least %d', async ([order, lowest]) => {
    const [tokens, d] = [700, 16]
    const x = { q: new Float32Array(tokens * d), k: new Float32Array(tokens * d) }
    const v = new Float32Array(tokens * d)
    const expected = new Float64Array(d)
    let sum = 0
    for (let i = 0; i < tokens; i++) {
      const t = order === 'falling' ? i : tokens - 1 - i
      const logit = i < 345 ? -i / 4 : lowest
      x.q[t * d] = 1
      x.k[t * d] = logit
      sum += Math.exp(logit)
      for (let c = 0; c < d; c++) {
        v[t * d + c] = i < 345 ? (1 + c / d) * Math.exp(-logit) : 1e35
        expected[c]! += Math.exp(logit) * v[t * d + c]!
      }
    }
    const tensor = (data: Float32Array) => b.device.tensor(data, [tokens, 1, d])
    const [q, k, values] = [tensor(x.q), tensor(x.k), tensor(v)]
    for (const kernel of kernelsFor(b, 'f32', d)) {
      const { out, lse } = attention({
        q,
        k,
        v: values,
        cuSeqlens: [0, tokens],
        scale: 1,
        kernel,
      })
      const rows = await out.read()
      const bound = { relative: 2e-5 }
      for (const t of [0, 300, tokens - 1])
        expectClose(
          rows.subarray(t * d, (t + 1) * d),
          expected.map((e) => e / sum),
          bound,
        )
      expectClose(await lse.read(), new Float64Array(tokens).fill(Math.log(sum)), {
        absolute: 1e-6,
      })
    }
  })

  const files = golden('attention')
  for (const path of files.list().filter((p) => p.endsWith('meta.json'))) {
    const meta = files.json(path)
    const types: Float[] = ({ bf16: ['f32', 'bf16'], fp16: ['f32', 'f16'] }[
      meta.input_rounding as string
    ] as Float[] | undefined) ?? ['f32']
    for (const dtype of types)
      test(`reference ${meta.name}, ${dtype}`, async () => {
        const folder = path.slice(0, -'meta.json'.length)
        const read = (name: string) => files.f32(`${folder}${name}.bin`)
        const cuSeqlens = files.i32(`${folder}cu_seqlens.bin`)
        const shape = meta.tensors.q.shape
        const put = (name: string) => b.device.tensor(read(name), shape, dtype)
        const given = {
          q: put('q'),
          k: put('k'),
          v: put('v'),
          cuSeqlens,
          scale: meta.softmax_scale,
        }
        // Twice what an honest computation in the type gets, case by case; lse and mass are f32 in all.
        const errors = meta.reference_error_of_other_precisions
        const own = {
          f32: 'naive_float32',
          bf16: 'sim_bf16_P_dS_and_outputs',
          f16: 'sim_fp16_P_dS_and_outputs',
        }
        for (const kernel of kernelsFor(b, dtype, shape.at(-1)!)) {
          const { out, lse } = attention({ ...given, kernel })
          const mass = attentionMass({ ...given, lse })
          const back = attentionBackward({ ...given, out, lse, dOut: put('dout'), kernel })
          const results = { out, lse, colsum: mass, dq: back.dQ, dk: back.dK, dv: back.dV }
          for (const [name, tensor] of Object.entries(results)) {
            const error = relativeL2(await tensor.toFloat32(), read(name))
            const honest = Math.max(
              errors.naive_float32[name].rel_l2,
              errors[own[dtype]][name].rel_l2,
            )
            expect(error, `${name} by ${kernel}`).toBeLessThanOrEqual(2 * honest)
          }
        }
      })
  }

  // On the CPU's best path and on CUDA: what these are about is sizes and offsets.
  const oncePerBackend = [`cpu ${cpuPaths[0]!.name}`, 'cuda'].includes(b.name)
  test.runIf(oncePerBackend)(
    'a member of 129600 tokens among short ones',
    {
      timeout: 300_000,
    },
    async () => {
      const x = random({ d: 8, heads: 1, lengths: [3, 129_600, 0, 1] }, 'f32', 12)
      const { q, k, v } = upload(b, x, 'f32')
      const { out, lse } = attention({ q, k, v, cuSeqlens: x.cu })
      const [outs, logSums] = [await out.read(), await lse.read()]
      // A query alone: its own row of the definition.
      const [first, end] = [x.cu[1]!, x.cu[2]!]
      for (const query of [first, first + 63, 64_801, end - 1]) {
        const logits = Float64Array.from({ length: end - first }, (_, i) => {
          let sum = 0
          for (let c = 0; c < x.d; c++) sum += x.q[query * x.d + c]! * x.k[(first + i) * x.d + c]!
          return sum * x.scale
        })
        const top = logits.reduce((m, z) => Math.max(m, z), -Infinity)
        const weights = logits.map((z) => Math.exp(z - top))
        const sum = weights.reduce((total, w) => total + w, 0)
        const expected = Array.from({ length: x.d }, (_, c) =>
          weights.reduce((total, w, i) => total + (w / sum) * x.v[(first + i) * x.d + c]!, 0),
        )
        expectClose(outs.subarray(query * x.d, (query + 1) * x.d), expected, forwardBound('f32'))
        expectClose([logSums[query]!], [top + Math.log(sum)], { absolute: 1e-5 })
      }
      const short = oracle({ ...x, q: x.q.subarray(0, first * x.d), cu: [0, first] })
      expectClose(outs.subarray(0, first * x.d), short.out, forwardBound('f32'))
      expect(outs.subarray(end * x.d)).toEqual(x.v.subarray(end * x.d))
    },
  )

  // 2^31 elements and some more in qkv and in its gradient; 12 GB of tensors in all.
  const enough = os.totalmem() > 20e9
  test.runIf(oncePerBackend && enough)(
    'offsets beyond 2^31 elements',
    {
      timeout: 300_000,
    },
    async () => {
      const [heads, d, tokens] = [64, 128, 87_426]
      const inner = heads * d
      expect(tokens * 3 * inner).toBeGreaterThan(2 ** 31)
      using qkv = b.device.zeros([tokens, 3, heads, d], 'f16')
      using dOut = b.device.zeros([tokens, heads, d], 'f16')
      // Two tokens at the end that see each other, behind windows of zeros.
      const x = random({ d, heads, lengths: [2] }, 'f16', 13)
      qkv
        .slice(tokens - 2)
        .copyFrom(b.device.tensor(pack(x.q, x.k, x.v, inner), [2, 3, heads, d], 'f16'))
      dOut.slice(tokens - 2).copyFrom(b.device.tensor(x.dOut, [2, heads, d], 'f16'))
      const cuSeqlens = [...Array((tokens - 2) / 64 + 1).keys()].map((i) => 64 * i)
      cuSeqlens.push(tokens)
      const { out, lse } = attention({ qkv, cuSeqlens })
      const expected = oracle(x, x.dOut)
      const ends = (t: Tensor) => t.slice(tokens - 4).toFloat32()
      const alone = new Float32Array(2 * inner)
      expectClose(await ends(out), [...alone, ...expected.out], forwardBound('f16'))
      const { dQkv } = attentionBackward({ qkv, dOut, out, lse, cuSeqlens })
      const [dq, dk, dv] = [expected.dq, expected.dk, expected.dv].map((g) => Float32Array.from(g))
      const gradient = [...new Float32Array(6 * inner), ...pack(dq!, dk!, dv!, inner)]
      expectClose(await ends(dQkv), gradient, backwardBound('f16'))
      expect(await dQkv.slice(0, 1).toFloat32()).toEqual(new Float32Array(3 * inner))
      for (const t of [out, lse, dQkv]) t.dispose()
    },
  )

  test('accepts empty inputs', async () => {
    for (const shape of [
      [0, 2, 16],
      [3, 0, 16],
    ]) {
      const x = b.device.zeros(shape)
      const cuSeqlens = shape[0] === 0 ? [0, 0, 0] : [0, 3]
      const { out, lse } = attention({ q: x, k: x, v: x, cuSeqlens })
      expect([out.shape, lse.shape]).toEqual([shape, [shape[1], shape[0]]])
      const back = attentionBackward({ dOut: x, q: x, k: x, v: x, out, lse, cuSeqlens })
      expect(back.dK.shape).toEqual(shape)
      expect(attentionMass({ q: x, k: x, lse, cuSeqlens }).shape).toEqual([shape[1], shape[0]])
    }
    const qkv = b.device.zeros([0, 3, 2, 16], 'bf16')
    expect(attention({ qkv, cuSeqlens: [0] }).out.shape).toEqual([0, 2, 16])
    await b.device.synchronize()
  })

  // The second is the longest of its dimension that the CPU's backward takes as one task.
  test.for([
    [4096, 8],
    [1331, 128],
  ] as const)('holds no T x T matrix, %s', async ([tokens, d]) => {
    const x = b.device.tensor(new Random(8).normals(tokens * d), [tokens, 1, d])
    const cuSeqlens = [0, tokens]
    b.device.resetPeak()
    const before = b.device.memory().liveBytes
    const { out, lse } = attention({ q: x, k: x, v: x, cuSeqlens })
    attentionMass({ q: x, k: x, lse, cuSeqlens })
    attentionBackward({ dOut: x, q: x, k: x, v: x, out, lse, cuSeqlens })
    await b.device.synchronize()
    const threads = b.device.info.threads ?? 1
    expect(b.device.memory().peakBytes - before).toBeLessThan(
      threads * 2 ** 22 + 6 * 4 * tokens * d,
    )
  })

  test('deterministic: false takes 4 bytes of workspace per entry of dQ on a GPU, with rotary too', async () => {
    const [tokens, heads, d] = [1024, 2, 64]
    const qkv = b.device.tensor(
      new Random(13).normals(tokens * 3 * heads * d),
      [tokens, 3, heads, d],
      'bf16',
    )
    const rotary = rotaryTables(b, tokens, d)
    const given = { qkv, rotary, cuSeqlens: [0, tokens] }
    const { out, lse } = attention(given)
    await b.device.synchronize()
    b.device.resetPeak()
    const before = b.device.memory().liveBytes
    attentionBackward({ ...given, dOut: out, out, lse, deterministic: false })
    await b.device.synchronize()
    const threads = b.device.info.threads
    const scratch = threads === undefined ? 4 * tokens * heads * (d + 2) : threads * 2 ** 22
    expect(b.device.memory().peakBytes - before).toBeLessThan(scratch + 2 * qkv.size)
  })

  test('runs a kernel by name', async () => {
    const names = kernels('attention', b.device)
    expect(names.length).toBeGreaterThan(0)
    const x = random({ d: 16, heads: 2, lengths: [9, 70] }, 'f32', 10)
    const { q, k, v, dOut } = upload(b, x, 'f32')
    const expected = oracle(x, x.dOut)
    for (const kernel of names) {
      if (!exact.includes(kernel)) {
        const run = () => attention({ q, k, v, cuSeqlens: x.cu, kernel })
        expectRefusal(run, 'ERR_VALUE', 'attention', /kernel must be .* for f32/)
        continue
      }
      const { out, lse } = attention({ q, k, v, cuSeqlens: x.cu, kernel })
      expectClose(await out.toFloat32(), expected.out, forwardBound('f32'))
      for (const deterministic of [true, false]) {
        const given = { dOut, q, k, v, out, lse, cuSeqlens: x.cu, kernel, deterministic }
        const back = attentionBackward(given)
        expectClose(await back.dK.toFloat32(), expected.dk, backwardBound('f32'))
      }
    }
    const unknown = () => attention({ q, k, v, cuSeqlens: x.cu, kernel: 'magic' })
    expectRefusal(unknown, 'ERR_VALUE', 'attention', /kernel must be .*'magic'/)
    expectRefusal(() => kernels('nothing', b.device), 'ERR_VALUE', 'kernels')
    expectRefusal(() => kernels('attention', {} as never), 'ERR_VALUE', 'kernels')
  })

  test('refuses invalid arguments', () => {
    const { device } = b
    const x = device.zeros([6, 2, 16])
    const rotary = { cos: device.zeros([6, 16]), sin: device.zeros([6, 16]) }
    const run = (a: object) => () =>
      attention({ q: x, k: x, v: x, cuSeqlens: [0, 6], ...a } as never)
    const packed = (a: object) => () =>
      attention({ qkv: device.zeros([6, 3, 2, 16]), cuSeqlens: [0, 6], ...a } as never)
    const shaped = (shape: number[]) => {
      const t = device.zeros(shape)
      return { q: t, k: t, v: t, cuSeqlens: [0, shape[0]!] }
    }
    const refused = (f: () => unknown, code: string, message?: RegExp) =>
      expectRefusal(f, code, 'attention', message)

    refused(run({ cuSeqlens: [1, 6] }), 'ERR_VALUE', /must start with 0/)
    refused(run({ cuSeqlens: [0, 4, 3, 6] }), 'ERR_VALUE', /must not decrease/)
    refused(run({ cuSeqlens: [0, 5] }), 'ERR_VALUE', /number of tokens, 6, got 5/)
    refused(run({ cuSeqlens: [] }), 'ERR_VALUE')
    refused(run({ cuSeqlens: [0, 2.5, 6] }), 'ERR_VALUE')
    refused(run({ cuSeqlens: undefined }), 'ERR_VALUE')
    refused(run(shaped([6, 2, 12])), 'ERR_SHAPE', /multiple of 8 from 8 to 128, got 12/)
    refused(run(shaped([6, 2, 136])), 'ERR_SHAPE')
    refused(run(shaped([6, 2, 0])), 'ERR_SHAPE')
    refused(run(shaped([6, 32])), 'ERR_SHAPE')
    refused(run(shaped([2 ** 31, 0, 16])), 'ERR_SHAPE', /at most 2147483647/)
    refused(run({ k: device.zeros([6, 2, 8]) }), 'ERR_SHAPE', /k must have shape/)
    refused(run({ v: device.zeros([6, 2, 16], 'bf16') }), 'ERR_DTYPE', /v must be f32/)
    refused(run({ q: device.zeros([6, 2, 16], 'i32') }), 'ERR_DTYPE')
    refused(run({ q: undefined }), 'ERR_VALUE')
    refused(run({ v: undefined }), 'ERR_VALUE', /v is missing/)
    refused(run({ scale: Number.NaN }), 'ERR_VALUE')
    refused(run({ scale: '1' }), 'ERR_VALUE')
    refused(run({ rotary }), 'ERR_VALUE', /packed/)
    refused(run({ qkv: device.zeros([6, 3, 2, 16]) }), 'ERR_VALUE', /not both/)
    refused(packed({ qkv: device.zeros([6, 2, 2, 16]) }), 'ERR_SHAPE', /\[T, 3, H, D\]/)
    refused(packed({ rotary: { cos: rotary.cos } }), 'ERR_VALUE')
    refused(packed({ rotary: { ...rotary, sin: device.zeros([6, 8]) } }), 'ERR_SHAPE')
    refused(packed({ rotary: { ...rotary, sin: device.zeros([6, 16], 'f16') } }), 'ERR_DTYPE')

    const lse = device.zeros([2, 6])
    const back = (a: object) => () =>
      attentionBackward({
        dOut: x,
        q: x,
        k: x,
        v: x,
        out: x,
        lse,
        cuSeqlens: [0, 6],
        ...a,
      } as never)
    const answers = (f: () => unknown, code: string, message?: RegExp) =>
      expectRefusal(f, code, 'attentionBackward', message)
    answers(back({ lse: device.zeros([6, 2]) }), 'ERR_SHAPE', /lse must have shape \[2, 6\]/)
    answers(back({ dOut: device.zeros([6, 2, 16], 'f16') }), 'ERR_DTYPE', /dOut/)
    answers(back({ out: device.zeros([6, 1, 16]) }), 'ERR_SHAPE', /out/)
    answers(back({ deterministic: 'yes' }), 'ERR_VALUE')
    answers(back({ kernel: 'magic' }), 'ERR_VALUE')
    expectRefusal(
      () => attentionMass({ q: x, k: x, lse: device.zeros([2, 5]), cuSeqlens: [0, 6] }),
      'ERR_SHAPE',
      'attentionMass',
    )
  })
})

const cpuPathsAndTypes = cpuPaths.flatMap((path) => floats.map((dtype) => ({ ...path, dtype })))
test.for(cpuPathsAndTypes)(
  'the result does not depend on the number of threads on $name, $dtype',
  async (path) => {
    const c = { d: 128, heads: 3, lengths: [40, 1500, 1, 300] }
    const x = random(c, path.dtype, 11)
    const run = async (threads: number) => {
      using device = openDevice('cpu', { ...path.options, threads })
      const { q, k, v, dOut } = upload({ device }, x, path.dtype)
      const { out, lse } = attention({ q, k, v, cuSeqlens: x.cu })
      const mass = attentionMass({ q, k, lse, cuSeqlens: x.cu })
      const { dQ, dK, dV } = attentionBackward({ dOut, q, k, v, out, lse, cuSeqlens: x.cu })
      // As bytes: toEqual would take seconds for so many numbers.
      return Promise.all(
        [out, lse, mass, dQ, dK, dV].map(async (t) => Buffer.from((await t.toFloat32()).buffer)),
      )
    }
    const [three, one] = [await run(3), await run(1)]
    expect(three.map((bytes, i) => bytes.equals(one[i]!))).toEqual(Array(6).fill(true))
  },
)

describe('windowLayout', () => {
  // As the model's code has it: grids of units padded to whole windows, windows cut out of them,
  // padding and empty windows dropped.
  function padded(grids: readonly Grid[], window: number, merge: number) {
    const index: number[] = []
    const cu = [0]
    let first = 0
    for (const [t, h, w] of grids) {
      const [rows, columns] = [h / merge, w / merge]
      const [high, wide] = [rows + window - (rows % window), columns + window - (columns % window)]
      for (let f = 0; f < t; f++)
        for (let i = 0; i < high; i += window)
          for (let j = 0; j < wide; j += window) {
            let count = 0
            for (let r = i; r < i + window; r++)
              for (let c = j; c < j + window; c++) {
                if (r >= rows || c >= columns) continue
                const unit = first + (f * rows + r) * columns + c
                for (let n = 0; n < merge * merge; n++) index.push(unit * merge * merge + n)
                count += merge * merge
              }
            if (count > 0) cu.push(cu.at(-1)! + count)
          }
      first += t * rows * columns
    }
    return { index, cu }
  }

  const layouts: { gridThw: Grid[]; window: number; mergeSize?: number }[] = [
    { gridThw: [[1, 16, 16]], window: 4 },
    {
      gridThw: [
        [1, 14, 22],
        [2, 6, 4],
        [1, 2, 2],
      ],
      window: 4,
    },
    { gridThw: [[1, 9, 6]], window: 2, mergeSize: 3 },
    { gridThw: [[1, 3, 5]], window: 2, mergeSize: 1 },
    { gridThw: [[1, 4, 4]], window: 100 },
    {
      gridThw: [
        [0, 4, 4],
        [1, 0, 4],
      ],
      window: 3,
    },
    { gridThw: [], window: 1 },
  ]
  test.each(layouts)('$gridThw, window $window', (a) => {
    const { index, inverse, cuSeqlens } = windowLayout(a)
    const expected = padded(a.gridThw, a.window, a.mergeSize ?? 2)
    expect(Array.from(index)).toEqual(expected.index)
    expect(Array.from(cuSeqlens)).toEqual(expected.cu)
    expect(Array.from(inverse, (place) => index[place])).toEqual(expected.index.map((_, i) => i))
  })

  test('refuses invalid arguments', () => {
    const run = (a: object) => () => windowLayout({ gridThw: [[1, 4, 4]], window: 2, ...a })
    expectRefusal(run({ window: 0 }), 'ERR_VALUE', 'windowLayout', /window must be/)
    expectRefusal(run({ window: 1.5 }), 'ERR_VALUE', 'windowLayout')
    expectRefusal(run({ mergeSize: 3 }), 'ERR_VALUE', 'windowLayout', /divides/)
    expectRefusal(run({ gridThw: [[1, 4, 4.5]] }), 'ERR_VALUE', 'windowLayout')
    expectRefusal(run({ gridThw: [[2 ** 20, 2 ** 10, 2 ** 10]] }), 'ERR_SHAPE', 'windowLayout')
  })
})
