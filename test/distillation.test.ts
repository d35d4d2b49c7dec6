import {
  type Device,
  type DistillationObjective,
  distillation,
  distillationAdvantages,
  distillationBackward,
  grpoStep,
  linear,
  linearDistillation,
  linearDistillationBackward,
  scope,
  type Tensor,
} from 'p2r-kernels'
import { expect, test } from 'vitest'
import {
  expectClose,
  expectGradient,
  expectRefusal,
  type Float,
  floats,
  onEveryBackend,
  Random,
  recorded,
  rounded,
  roundoff,
} from './harness.js'

interface Formula {
  objective: DistillationObjective
  beta?: number
  temperature?: number
}
const formulas: [string, Formula][] = [
  ['reverse_kl', { objective: 'reverse_kl', temperature: 0.7 }],
  ['forward_kl', { objective: 'forward_kl', temperature: 1.5 }],
  ['jsd', { objective: 'jsd', temperature: 0.7 }],
  ['jsd of beta 0.1', { objective: 'jsd', beta: 0.1 }],
]

function softmax(x: Float64Array) {
  const maximum = x.reduce((a, b) => Math.max(a, b), -Infinity)
  const e = x.map((v) => Math.exp(v - maximum))
  const sum = e.reduce((a, b) => a + b, 0)
  return { p: e.map((v) => v / sum), logP: x.map((v) => v - maximum - Math.log(sum)) }
}

// The definition, of one row in float64, with the derivative by the chain rule through p: dD/dp, then the
// Jacobian of the softmax.
function divergenceOf(z: ArrayLike<number>, y: ArrayLike<number>, f: Formula) {
  const t = f.temperature ?? 1
  const student = softmax(Float64Array.from(z, (x) => x / t))
  const teacher = softmax(Float64Array.from(y, (x) => x / t))
  const beta = f.beta ?? 0.5
  const { p, logP } = student
  const { p: q, logP: logQ } = teacher
  const times = (weight: number, x: number) => (weight === 0 ? 0 : weight * x)
  let d = 0
  const dp = new Float64Array(p.length)
  for (let j = 0; j < p.length; j++) {
    if (f.objective === 'reverse_kl') {
      d += times(p[j]!, logP[j]! - logQ[j]!)
      dp[j] = p[j] === 0 ? 0 : logP[j]! - logQ[j]! + 1
    } else if (f.objective === 'forward_kl') {
      d += times(q[j]!, logQ[j]! - logP[j]!)
      dp[j] = p[j] === 0 ? 0 : -q[j]! / p[j]!
    } else {
      const m = beta * q[j]! + (1 - beta) * p[j]!
      if (m === 0) continue
      const logM = Math.log(m)
      d += beta * times(q[j]!, logQ[j]! - logM) + (1 - beta) * times(p[j]!, logP[j]! - logM)
      dp[j] = p[j] === 0 ? 0 : (1 - beta) * (logP[j]! - logM)
    }
  }
  const mean = p.reduce((s, x, j) => s + times(x, dp[j]!), 0)
  return { d, dz: p.map((x, j) => times(x, dp[j]! - mean) / t) }
}

interface Logits {
  n: number
  v: number
  z: Float32Array
  y: Float32Array
}
function logitsOf(n: number, v: number, dtype: Float, seed = 1): Logits {
  const random = new Random(seed + n + v)
  const z = random.normals(n * v, 3)
  // A teacher that agrees in part.
  const y = z.map((x) => 0.7 * x + random.normal(1.5))
  return { n, v, z: rounded(z, dtype), y: rounded(y, dtype) }
}

interface Heads {
  n: number
  v: number
  c: number
  ct: number
  hidden: Float32Array
  weight: Float32Array
  bias?: Float32Array
  teacherHidden: Float32Array
  teacherWeight: Float32Array
  teacherBias?: Float32Array
}
function headsOf(c: Case, dtype: Float, teacherType: Float): Heads {
  const random = new Random(c.n + c.v + c.c)
  const of = (n: number, type: Float, scale = 1) => rounded(random.normals(n, scale), type)
  const { n, v, c: width, ct, bias } = c
  return {
    n,
    v,
    c: width,
    ct,
    hidden: of(c.n * c.c, dtype),
    weight: of(c.v * c.c, dtype, 2 / Math.sqrt(c.c)),
    teacherHidden: of(c.n * c.ct, teacherType),
    teacherWeight: of(c.v * c.ct, teacherType, 2 / Math.sqrt(c.ct)),
    ...(bias ? { bias: random.normals(v), teacherBias: random.normals(v) } : {}),
  }
}
function product(
  x: ArrayLike<number>,
  w: ArrayLike<number>,
  b: ArrayLike<number> | undefined,
  h: { n: number; v: number },
) {
  const c = x.length / h.n
  const out = new Float64Array(h.n * h.v)
  for (let i = 0; i < h.n; i++)
    for (let j = 0; j < h.v; j++) {
      let sum = b?.[j] ?? 0
      for (let k = 0; k < c; k++) sum += x[i * c + k]! * w[j * c + k]!
      out[i * h.v + j] = sum
    }
  return out
}
// The definition in float64: the heads' logits, their divergences, and the gradients' sums.
function headOracle(h: Heads, f: Formula, g: ArrayLike<number>, mask?: ArrayLike<number>) {
  const z = product(h.hidden, h.weight, h.bias, h)
  const y = product(h.teacherHidden, h.teacherWeight, h.teacherBias, h)
  const out = {
    divergence: new Float64Array(h.n),
    dHidden: new Float64Array(h.n * h.c),
    dWeight: new Float64Array(h.v * h.c),
    dBias: new Float64Array(h.v),
    /** Of the gradients' sums, the largest Σ of their terms' magnitudes. */
    terms: 0,
  }
  const terms = {
    dHidden: new Float64Array(h.n * h.c),
    dWeight: new Float64Array(h.v * h.c),
    dBias: new Float64Array(h.v),
  }
  for (let i = 0; i < h.n; i++) {
    if (mask && !mask[i]) continue
    const { d, dz } = divergenceOf(
      z.subarray(i * h.v, (i + 1) * h.v),
      y.subarray(i * h.v, (i + 1) * h.v),
      f,
    )
    out.divergence[i] = d
    for (let j = 0; j < h.v && g[i] !== 0; j++) {
      const x = g[i]! * dz[j]!
      out.dBias[j]! += x
      terms.dBias[j]! += Math.abs(x)
      for (let k = 0; k < h.c; k++) {
        const [a, b] = [i * h.c + k, j * h.c + k]
        out.dHidden[a]! += x * h.weight[b]!
        out.dWeight[b]! += x * h.hidden[a]!
        terms.dHidden[a]! += Math.abs(x * h.weight[b]!)
        terms.dWeight[b]! += Math.abs(x * h.hidden[a]!)
      }
    }
  }
  for (const sums of Object.values(terms)) for (const t of sums) out.terms = Math.max(out.terms, t)
  return out
}

// Log-ratios of size 10 or so are off by 1e-6, in the sums and where the two normalizers are subtracted.
const value = { absolute: 1e-5, relative: 1e-6 }
// A gradient is p times a log-ratio, both off by that.
const slope = (dtype: Float) => ({
  absolute: 2e-6,
  ofLargest: 1e-5,
  relative: 1e-5 + roundoff[dtype],
})
// Of heads, logits of size 10 are sums of C products, off by some 1e-6 (test/linear_log_probs.test.ts), and
// the temperature enlarges that.
const forward = { absolute: 3e-5, relative: 1e-5 }
const backward = (dtype: Float) => ({
  absolute: 2e-6,
  ofLargest: 3e-5,
  relative: 1e-5 + roundoff[dtype],
})
// On tensor cores dz is rounded to the type of hidden and weight, so each term of a sum may be off by
// that much of itself.
const onTensorCores = (bound: ReturnType<typeof backward>, dtype: Float, terms: number) =>
  dtype === 'f32' ? bound : { ...bound, absolute: bound.absolute + roundoff[dtype] * terms }

interface Case {
  n: number
  v: number
  c: number
  ct: number
  bias: boolean
}
const cases: Case[] = [
  { n: 1, v: 1, c: 1, ct: 2, bias: false },
  { n: 3, v: 7, c: 5, ct: 3, bias: true },
  { n: 9, v: 1031, c: 17, ct: 40, bias: true },
  { n: 101, v: 130, c: 72, ct: 129, bias: false },
  // Several tiles of tensor cores with ragged ends.
  { n: 139, v: 301, c: 72, ct: 136, bias: true },
]
// Of several tiles of tensor cores, four times.
const work = 2 ** 26

onEveryBackend('distillation', (b) => {
  const here: typeof onTensorCores = (bound, dtype, terms) =>
    b.name === 'cuda' ? onTensorCores(bound, dtype, terms) : bound
  const f32 = (x: ArrayLike<number>): Tensor<'f32'> =>
    b.device.tensor(Float32Array.from(x), [x.length])
  const u8 = (x: ArrayLike<number>): Tensor<'u8'> => b.device.tensor(Uint8Array.from(x), [x.length])
  const logitTensors = (l: Logits, dtype: Float = 'f32', device: Device = b.device) => ({
    logits: device.tensor(l.z, [l.n, l.v], dtype),
    teacherLogits: device.tensor(l.y, [l.n, l.v], dtype),
  })
  const headTensors = (
    h: Heads,
    dtype: Float = 'f32',
    teacherType: Float = dtype,
    device: Device = b.device,
  ) => ({
    hidden: device.tensor(h.hidden, [h.n, h.c], dtype),
    weight: device.tensor(h.weight, [h.v, h.c], dtype),
    teacherHidden: device.tensor(h.teacherHidden, [h.n, h.ct], teacherType),
    teacherWeight: device.tensor(h.teacherWeight, [h.v, h.ct], teacherType),
    ...(h.bias
      ? {
          bias: device.tensor(h.bias, [h.v]),
          teacherBias: device.tensor(h.teacherBias!, [h.v]),
        }
      : {}),
  })
  const expected = (l: Logits, f: Formula, g: ArrayLike<number>) => {
    const d: number[] = []
    const dz: number[] = []
    for (let i = 0; i < l.n; i++) {
      const at = [i * l.v, (i + 1) * l.v] as const
      const row = divergenceOf(l.z.subarray(...at), l.y.subarray(...at), f)
      d.push(row.d)
      dz.push(...Array.from(row.dz, (x) => (g[i] === 0 ? 0 : x * g[i]!)))
    }
    return { d, dz }
  }

  for (const dtype of floats)
    for (const [name, f] of formulas)
      for (const [n, v] of [
        [1, 1],
        [3, 7],
        [5, 1031],
        [2, 9001],
        [40, 64],
      ] as const) {
        const title = `${name} ${dtype} [${n}, ${v}]`
        test(title, async () => {
          const l = logitsOf(n, v, dtype)
          const g = new Random(3).normals(n)
          if (n > 2) g[1] = 0
          const { d, dz } = expected(l, f, g)
          const a = logitTensors(l, dtype)
          using one = recorded(b, `distillation ${title}`, value, () =>
            distillation({ ...a, ...f }),
          )
          expectClose(await one.read(), d, value)
          using both = recorded(b, `distillation backward ${title}`, slope(dtype), () =>
            distillationBackward({ ...a, ...f, dDivergence: f32(g) }),
          )
          expect(await both.divergence.read()).toEqual(await one.read())
          expect(both.dLogits.dtype).toBe(dtype)
          expectClose(await both.dLogits.toFloat32(), dz, slope(dtype))
          const inPlace = distillationBackward({ ...a, ...f, dDivergence: f32(g), inPlace: true })
          expect(await inPlace.dLogits.toFloat32()).toEqual(await both.dLogits.toFloat32())
          expect(await a.logits.toFloat32()).toEqual(await both.dLogits.toFloat32())
          expect(await inPlace.divergence.read()).toEqual(await one.read())
        })
      }

  for (const [name, f] of formulas) {
    test(`${name}: the gradient matches finite differences`, async () => {
      const l = logitsOf(3, 11, 'f32')
      const g = [1.5, -0.5, 2]
      const { dLogits } = distillationBackward({ ...logitTensors(l), ...f, dDivergence: f32(g) })
      expectGradient(
        (z) =>
          g.reduce((s, x, i) => {
            const at = [i * l.v, (i + 1) * l.v] as const
            return s + x * divergenceOf(z.subarray(...at), l.y.subarray(...at), f).d
          }, 0),
        l.z,
        await dLogits.read(),
        { absolute: 3e-6, relative: 1e-5 },
      )
    })

    for (const [dtype, teacherType] of [
      ['f32', 'f32'],
      ['f16', 'f16'],
      ['bf16', 'bf16'],
      ['f32', 'bf16'],
      ['bf16', 'f32'],
    ] as const)
      for (const c of cases) {
        const shape = `[${c.n}, ${c.v}, ${c.c}, ${c.ct}]${c.bias ? ' with biases' : ''}`
        const title = `${name} of heads ${dtype}, ${teacherType} ${shape}`
        test(title, async () => {
          const h = headsOf(c, dtype, teacherType)
          const random = new Random(5)
          const g = random.normals(c.n)
          const mask = Uint8Array.from({ length: c.n }, (_, i) => +(c.n < 4 || i % 5 !== 3))
          if (c.n > 2) g[1] = 0
          const exact = headOracle(h, f, g, mask)
          const a = { ...headTensors(h, dtype, teacherType), ...f, mask: u8(mask) }
          using one = recorded(b, `heads ${title}`, forward, () => linearDistillation(a), work)
          expectClose(await one.read(), exact.divergence, forward)
          const bound = onTensorCores(backward(dtype), dtype, exact.terms)
          using all = recorded(
            b,
            `heads backward ${title}`,
            { ...bound, absolute: bound.absolute + forward.absolute },
            () => linearDistillationBackward({ ...a, dDivergence: f32(g) }),
            work,
          )
          expect(await all.divergence.read()).toEqual(await one.read())
          expect(all.dHidden.dtype).toBe(dtype)
          expectClose(
            await all.dHidden.toFloat32(),
            exact.dHidden,
            here(backward(dtype), dtype, exact.terms),
          )
          const sums = here(backward('f32'), dtype, exact.terms)
          expectClose(await all.dWeight.read(), exact.dWeight, sums)
          expect(all.dBias !== undefined).toBe(c.bias)
          if (all.dBias) expectClose(await all.dBias.read(), exact.dBias, sums)
        })
      }

    test(`${name}: the gradient of heads matches finite differences`, async () => {
      const h = headsOf({ n: 3, v: 13, c: 4, ct: 6, bias: true }, 'f32', 'f32')
      const g = [1.5, -0.5, 2]
      const all = linearDistillationBackward({ ...headTensors(h), ...f, dDivergence: f32(g) })
      const loss = (at: Partial<Record<'hidden' | 'weight' | 'bias', Float64Array>>) =>
        headOracle({ ...h, ...at } as unknown as Heads, f, g).divergence.reduce(
          (s, d, i) => s + g[i]! * d,
          0,
        )
      const bound = { absolute: 5e-6, relative: 1e-5, entries: 60 }
      expectGradient((hidden) => loss({ hidden }), h.hidden, await all.dHidden.read(), bound)
      expectGradient((weight) => loss({ weight }), h.weight, await all.dWeight.read(), bound)
      expectGradient((bias) => loss({ bias }), h.bias!, await all.dBias!.read(), bound)
    })

    test(`${name}: equal heads give exactly 0`, async () => {
      const l = logitsOf(4, 5000, 'f32')
      const a = {
        logits: b.device.tensor(l.z, [4, 5000]),
        teacherLogits: b.device.tensor(l.z, [4, 5000]),
      }
      const dense = distillationBackward({ ...a, ...f, dDivergence: f32([1, 1, 1, 1]) })
      expect(new Set(await dense.divergence.read())).toEqual(new Set([0]))
      expect((await dense.dLogits.read()).every((x) => x === 0)).toBe(true)
      const h = headsOf({ n: 6, v: 200, c: 16, ct: 16, bias: false }, 'f32', 'f32')
      const { hidden, weight } = headTensors(h)
      const all = linearDistillationBackward({
        hidden,
        weight,
        teacherHidden: hidden,
        teacherWeight: weight,
        ...f,
        dDivergence: f32(new Float32Array(6).fill(1)),
      })
      expect(new Set(await all.divergence.read())).toEqual(new Set([0]))
      for (const t of [all.dHidden, all.dWeight])
        expect((await t.read()).every((x) => x === 0)).toBe(true)
    })

    test(`${name}: constants added to the logits change nothing much`, async () => {
      // As far apart as f32's digits of 1000 allow.
      const l = logitsOf(3, 300, 'f32')
      const moved = { ...l, y: l.y.map((x) => x + 1000) }
      const { d } = expected(moved, f, [1, 1, 1])
      const near = { absolute: 3e-4, relative: 1e-5 }
      const a = logitTensors(moved)
      const r = recorded(b, `moved ${name}`, near, () => distillation({ ...a, ...f }))
      expectClose(await r.read(), d, near)
    })

    test(`${name}: columns of -inf`, async () => {
      const none = -Infinity
      const rows: [number[], number[]][] = [
        [
          [1, none, 0.5, 2, none],
          [0, none, 1, 1, none],
        ],
        [
          [1, none, 0.5, 2, 0],
          [0, 0.5, 1, 1, -1],
        ],
        [
          [1, 0, 0.5, 2, 0],
          [0, none, 1, 1, none],
        ],
      ]
      const g = [1, 1, 1]
      const l = {
        n: 3,
        v: 5,
        z: Float32Array.from(rows.flatMap(([z]) => z)),
        y: Float32Array.from(rows.flatMap(([, y]) => y)),
      }
      const { d, dz } = expected(l, f, g)
      const infinite = { reverse_kl: 2, forward_kl: 1, jsd: undefined }[f.objective]
      const dense = recorded(b, `-inf ${name}`, slope('f32'), () =>
        distillationBackward({ ...logitTensors(l), ...f, dDivergence: f32(g) }),
      )
      expectClose(await dense.divergence.read(), d, value)
      expect(
        d.map((x, i) => (x === Infinity ? i : undefined)).filter((x) => x !== undefined),
      ).toEqual(infinite === undefined ? [] : [infinite])
      const slopes = await dense.dLogits.read()
      // reverse_kl has no gradient where it is infinite.
      for (let i = 0; i < 3; i++) {
        const wanted = dz.slice(5 * i, 5 * i + 5)
        if (f.objective === 'reverse_kl' && i === infinite) wanted.fill(NaN)
        if (f.objective === 'forward_kl' && i === infinite) {
          const t = f.temperature ?? 1
          const p = softmax(Float64Array.from(rows[i]![0], (x) => x / t)).p
          const q = softmax(Float64Array.from(rows[i]![1], (x) => x / t)).p
          wanted.splice(0, 5, ...p.map((x, j) => (x - q[j]!) / t))
        }
        expectClose(slopes.subarray(5 * i, 5 * i + 5), wanted, slope('f32'))
      }
    })

    test(`${name}: rows without a softmax are NaN, and skipped ones are not read`, async () => {
      const bad: number[][] = [
        [NaN, 0, 1],
        [Infinity, 0, 1],
        [-Infinity, -Infinity, -Infinity],
      ]
      const good = [0.5, -1, 2]
      const z = [...bad, good, good, good, good, NaN, NaN, NaN].flat()
      const y = [good, good, good, ...bad, good, good].flat()
      const mask = [1, 1, 1, 1, 1, 1, 1, 0]
      const a = {
        logits: b.device.tensor(z, [8, 3]),
        teacherLogits: b.device.tensor(y, [8, 3]),
        mask: u8(mask),
        dDivergence: f32(mask.map(() => 1)),
      }
      const r = recorded(b, `NaN ${name}`, slope('f32'), () => distillationBackward({ ...a, ...f }))
      const none = Array(6).fill(NaN)
      expect(Array.from(await r.divergence.read())).toEqual([...none, 0, 0])
      const dLogits = await r.dLogits.read()
      expect(dLogits.subarray(0, 18).every(Number.isNaN)).toBe(true)
      expect(Array.from(dLogits.subarray(21))).toEqual([0, 0, 0])
    })
  }

  test('equals the divergence of explicit logits, with any number of threads and in any batch', async () => {
    const h = headsOf({ n: 70, v: 700, c: 40, ct: 24, bias: true }, 'f32', 'f32')
    const a = headTensors(h)
    const logits = linear({ x: a.hidden, weight: a.weight, bias: a.bias! })
    const teacherLogits = linear({
      x: a.teacherHidden,
      weight: a.teacherWeight,
      bias: a.teacherBias!,
    })
    const all = await linearDistillation(a).read()
    expectClose(all, await distillation({ logits, teacherLogits }).read(), forward)
    const part = linearDistillation({
      ...a,
      hidden: a.hidden.slice(50, 70),
      teacherHidden: a.teacherHidden.slice(50, 70),
    })
    expect(await part.read()).toEqual(all.slice(50))
    const whole = linearDistillationBackward({ ...a, dDivergence: f32(new Random(1).normals(70)) })
    for (const threads of [1, 3]) {
      using device = b.open({ threads })
      const other = headTensors(h, 'f32', 'f32', device)
      expect(await linearDistillation(other).read()).toEqual(all)
      const dDivergence = device.tensor(new Random(1).normals(70), [70])
      const again = linearDistillationBackward({ ...other, dDivergence })
      for (const key of ['dHidden', 'dWeight', 'dBias', 'divergence'] as const)
        expect(await again[key]!.read()).toEqual(await whole[key]!.read())
    }
  })

  test('more rows than a chunk has', async () => {
    // 16 Mi logits a head are 800 rows of this vocabulary, and no more than 768 rows are packed at once.
    const h = headsOf({ n: 1700, v: 7, c: 3, ct: 2, bias: true }, 'f32', 'f32')
    const g = new Random(2).normals(h.n)
    for (let i = 0; i < h.n; i += 3) g[i] = 0
    const mask = Uint8Array.from(g, (_, i) => +(i % 7 !== 2))
    const exact = headOracle(h, { objective: 'reverse_kl' }, g, mask)
    const all = linearDistillationBackward({
      ...headTensors(h),
      dDivergence: f32(g),
      mask: u8(mask),
    })
    expectClose(await all.divergence.read(), exact.divergence, forward)
    expectClose(await all.dHidden.read(), exact.dHidden, backward('f32'))
    expectClose(await all.dWeight.read(), exact.dWeight, backward('f32'))
    expectClose(await all.dBias!.read(), exact.dBias, backward('f32'))
  })

  test('adds to given gradients, and keeps NaN of rows without a gradient out', async () => {
    const h = headsOf({ n: 5, v: 20, c: 8, ct: 8, bias: true }, 'f32', 'f32')
    h.hidden.fill(NaN, 8, 24) // the rows 1, which is masked, and 2, whose gradient is 0
    const mask = [1, 0, 1, 1, 1]
    const g = [1, 1, 0, 0.5, -1]
    const a = { ...headTensors(h), mask: u8(mask), dDivergence: f32(g) }
    const once = linearDistillationBackward(a)
    expect(Array.from(await once.divergence.read(), Number.isNaN)).toEqual([
      false,
      false,
      true,
      false,
      false,
    ])
    const dWeight = await once.dWeight.read()
    expect(dWeight.some(Number.isNaN)).toBe(false)
    expect(Array.from(await once.dHidden.read()).slice(8, 24)).toEqual(Array(16).fill(0))
    const into = { dWeight: once.dWeight, dBias: once.dBias! }
    const twice = linearDistillationBackward({ ...a, into })
    expectClose(
      await twice.dWeight.read(),
      dWeight.map((x) => 2 * x),
      backward('f32'),
    )
    expect(await once.dWeight.read()).toEqual(await twice.dWeight.read())
  })

  test('a mask value of 2 faults', async () => {
    const l = logitsOf(3, 9, 'f32')
    const h = headsOf({ n: 3, v: 9, c: 8, ct: 8, bias: false }, 'f32', 'f32')
    const mask = u8([1, 2, 1])
    const dDivergence = f32([1, 0, 1])
    const logProbs = f32([-1, -1, -1])
    const calls = {
      distillation: () => distillation({ ...logitTensors(l), mask }),
      distillationBackward: () =>
        distillationBackward({ ...logitTensors(l), mask, dDivergence }).dLogits,
      linearDistillation: () => linearDistillation({ ...headTensors(h), mask }),
      linearDistillationBackward: () =>
        linearDistillationBackward({ ...headTensors(h), mask, dDivergence }).dWeight,
      distillationAdvantages: () =>
        distillationAdvantages({ logProbs, teacherLogProbs: logProbs, cuSeqlens: [0, 3], mask }),
    }
    for (const [op, call] of Object.entries(calls)) {
      const result = recorded(b, `${op} of mask 2`, forward, call)
      const message = expect.stringMatching(/mask\[1\] = 2/)
      await expect(result.read()).rejects.toMatchObject({ code: 'ERR_VALUE', op, message })
      await b.device.synchronize()
    }
  })

  test('empty sizes', async () => {
    const empty = { logits: b.device.zeros([0, 4]), teacherLogits: b.device.zeros([0, 4]) }
    using r = distillationBackward({ ...empty, dDivergence: b.device.zeros([0]) })
    expect([r.divergence.shape, r.dLogits.shape]).toEqual([[0], [0, 4]])
    const flat = { logits: b.device.zeros([2, 0]), teacherLogits: b.device.zeros([2, 0]) }
    expect(Array.from(await distillation(flat).read())).toEqual([NaN, NaN])
    const none = {
      hidden: b.device.zeros([0, 5], 'f16'),
      weight: b.device.zeros([9, 5], 'f16'),
      teacherHidden: b.device.zeros([0, 3], 'f16'),
      teacherWeight: b.device.zeros([9, 3], 'f16'),
    }
    using l = linearDistillationBackward({ ...none, dDivergence: b.device.zeros([0]) })
    expect([l.divergence.shape, l.dHidden.shape]).toEqual([[0], [0, 5]])
    expect(Array.from(await l.dWeight.read())).toEqual(Array(45).fill(0))
    // Without channels the logits are the biases.
    const bare = {
      hidden: b.device.zeros([2, 0]),
      weight: b.device.zeros([3, 0]),
      bias: f32([0, 1, 2]),
      teacherHidden: b.device.zeros([2, 0]),
      teacherWeight: b.device.zeros([3, 0]),
      teacherBias: f32([1, 1, 1]),
    }
    const { d, dz } = divergenceOf([0, 1, 2], [1, 1, 1], { objective: 'reverse_kl' })
    const all = linearDistillationBackward({ ...bare, dDivergence: f32([1, 2]) })
    expectClose(await all.divergence.read(), [d, d], forward)
    expectClose(
      await all.dBias!.read(),
      dz.map((x) => 3 * x),
      backward('f32'),
    )
    using no = distillationAdvantages({
      logProbs: b.device.zeros([0]),
      teacherLogProbs: b.device.zeros([0]),
      cuSeqlens: [0, 0],
    })
    expect(no.shape).toEqual([0])
  })

  test('memory stays bounded', () => {
    const [n, v, c] = [1500, 5000, 64]
    const a = {
      hidden: b.device.zeros([n, c], 'bf16'),
      weight: b.device.zeros([v, c], 'bf16'),
      teacherHidden: b.device.zeros([n, c], 'bf16'),
      teacherWeight: b.device.zeros([v, c], 'bf16'),
    }
    const dDivergence = b.device.zeros([n])
    b.device.resetPeak()
    const before = b.device.memory().peakBytes
    linearDistillationBackward({ ...a, dDivergence }).dispose()
    const MB = 2 ** 20
    const results = n * c * 2 + v * c * 4
    // [N, V] of two heads would be 57 MB; chunks of 768 rows are 30. On the CPU 15 MB and 1 MB a thread too.
    const most =
      b.device.info.backend === 'cpu' ? (30 + 15 + b.device.info.threads!) * MB : 150 * MB
    expect(b.device.memory().peakBytes - before).toBeLessThan(most + results)
    for (const t of [...Object.values(a), dDivergence]) t.dispose()
  })

  const cuSeqlens = [0, 3, 3, 8, 9]
  const logP = [-1, -2, -0.5, -1, -3, -2, -1, -0.1, -4]
  const logQ = [-2, -1, -0.25, -1, -0.5, -4, -1, -7, -3.5]
  const keep = [1, 1, 1, 1, 0, 1, 1, 1, 1]
  for (const options of [
    {},
    { coef: 0.25, clamp: 1.5 },
    { discount: 1 },
    { discount: 0.9, coef: 2, mask: true },
    { discount: 0.5, advantages: [1, 2, 3, 4] },
    { advantages: [1, 2, 3, 4, 5, 6, 7, 8, 9], mask: true, clamp: false as const },
  ])
    test(`advantages of ${JSON.stringify(options)}`, async () => {
      const { advantages, mask, ...numbers } = options as {
        advantages?: number[]
        mask?: boolean
        coef?: number
        discount?: number
        clamp?: number | false
      }
      const wanted = logP.map((_, t) => {
        const i = cuSeqlens.findIndex((end) => t < end) - 1
        if (mask && !keep[t]) return 0
        let sum = 0
        for (let s = t; s < cuSeqlens[i + 1]!; s++) {
          const bound = numbers.clamp || Infinity
          const x = Math.max(-bound, Math.min(bound, logP[s]! - logQ[s]!))
          const weight = (numbers.discount ?? 0) ** (s - t)
          if ((!mask || keep[s]) && weight) sum += weight * x
        }
        const base = advantages?.[advantages.length === 4 ? i : t] ?? 0
        return base - (numbers.coef ?? 1) * sum
      })
      const bound = { absolute: 1e-6, relative: 1e-6 }
      const r = recorded(b, `advantages ${JSON.stringify(options)}`, bound, () =>
        distillationAdvantages({
          logProbs: f32(logP),
          teacherLogProbs: f32(logQ),
          cuSeqlens,
          ...numbers,
          ...(mask ? { mask: u8(keep) } : {}),
          ...(advantages ? { advantages: f32(advantages) } : {}),
        }),
      )
      expectClose(await r.read(), wanted, bound)
    })

  test('advantages of long sequences, and of a teacher without the token', async () => {
    const n = 5000
    const random = new Random(4)
    const [p, q] = [random.normals(n), random.normals(n)]
    const bounds = [0, 4097, n]
    const wanted = new Float64Array(n)
    for (let i = 0; i < 2; i++)
      for (let t = bounds[i + 1]! - 1, later = 0; t >= bounds[i]!; t--) {
        later = p[t]! - q[t]! + 0.99 * later
        wanted[t] = -later
      }
    const a = { logProbs: f32(p), teacherLogProbs: f32(q), cuSeqlens: bounds, discount: 0.99 }
    const bound = { absolute: 1e-5, relative: 1e-6 }
    const r = recorded(b, 'advantages of long sequences', bound, () => distillationAdvantages(a))
    expectClose(await r.read(), wanted, bound)
    const lost = {
      logProbs: f32([-1, -1, -1]),
      teacherLogProbs: f32([-2, -Infinity, -2]),
      cuSeqlens: [0, 3],
    }
    expect(Array.from(await distillationAdvantages(lost).read())).toEqual([-1, -Infinity, -1])
    const clamped = await distillationAdvantages({ ...lost, clamp: 5 }).read()
    expect(Array.from(clamped)).toEqual([-1, -5, -1])
  })

  test('a step of on-policy distillation', async () => {
    const logProbs = f32([-1, -1])
    const advantages = distillationAdvantages({
      logProbs,
      teacherLogProbs: f32([-0.5, -3]),
      cuSeqlens: [0, 2],
    })
    using step = grpoStep({ logProbs, advantages, cuSeqlens: [0, 2] })
    expect(Array.from(await step.dLogProbs.read())).toEqual([-0.25, 1])
  })

  test('refuses invalid arguments', () =>
    scope(() => {
      const dense = { logits: b.device.zeros([3, 7]), teacherLogits: b.device.zeros([3, 7]) }
      const heads = {
        hidden: b.device.zeros([3, 4]),
        weight: b.device.zeros([7, 4]),
        teacherHidden: b.device.zeros([3, 5], 'bf16'),
        teacherWeight: b.device.zeros([7, 5], 'bf16'),
      }
      const dDivergence = b.device.zeros([3])
      const calls = [
        [distillation, dense],
        [distillationBackward, { ...dense, dDivergence }],
        [linearDistillation, heads],
        [linearDistillationBackward, { ...heads, dDivergence }],
      ] as const
      const all = (
        which: typeof calls | (typeof calls)[number][],
        extra: object,
        code: string,
        message: RegExp,
      ) => {
        for (const [call, given] of which)
          expectRefusal(
            () => (call as (x: object) => unknown)({ ...given, ...extra }),
            code,
            call.name,
            message,
          )
      }
      all(calls, { objective: 'kl' }, 'ERR_VALUE', /objective/)
      all(calls, { temperature: 0 }, 'ERR_VALUE', /temperature/)
      all(calls, { beta: 2 }, 'ERR_VALUE', /beta/)
      for (const beta of [0, 1]) all(calls, { objective: 'jsd', beta }, 'ERR_VALUE', /forward_kl/)
      all(calls, { mask: b.device.zeros([2], 'u8') }, 'ERR_SHAPE', /mask/)
      all(calls, { mask: b.device.zeros([3]) }, 'ERR_DTYPE', /mask/)
      all(calls, { betta: 1 }, 'ERR_VALUE', /beta/)
      const ofLogits = calls.slice(0, 2)
      all(ofLogits, { teacherLogits: b.device.zeros([3, 8]) }, 'ERR_SHAPE', /teacherLogits/)
      all(ofLogits, { teacherLogits: b.device.zeros([3, 7], 'f16') }, 'ERR_DTYPE', /teacherLogits/)
      all(ofLogits, { logits: undefined }, 'ERR_VALUE', /logits/)
      const ofHeads = calls.slice(2)
      all(ofHeads, { weight: b.device.zeros([7, 5]) }, 'ERR_SHAPE', /weight/)
      all(ofHeads, { teacherWeight: b.device.zeros([7, 4], 'bf16') }, 'ERR_SHAPE', /teacherWeight/)
      all(ofHeads, { teacherWeight: b.device.zeros([7, 5]) }, 'ERR_DTYPE', /teacherWeight/)
      all(ofHeads, { teacherWeight: b.device.zeros([8, 5], 'bf16') }, 'ERR_SHAPE', /teacherWeight/)
      all(ofHeads, { teacherHidden: b.device.zeros([2, 5], 'bf16') }, 'ERR_SHAPE', /teacherHidden/)
      all(ofHeads, { teacherBias: b.device.zeros([8]) }, 'ERR_SHAPE', /teacherBias/)
      all(ofHeads, { bias: b.device.zeros([7], 'f16') }, 'ERR_DTYPE', /bias/)
      const backwards = [calls[1], calls[3]]
      all(backwards, { dDivergence: b.device.zeros([2]) }, 'ERR_SHAPE', /dDivergence/)
      all(backwards, { dDivergence: undefined }, 'ERR_VALUE', /dDivergence/)
      all([calls[3]], { into: { dWeight: b.device.zeros([7, 5]) } }, 'ERR_SHAPE', /into.dWeight/)
      const tokens = {
        logProbs: b.device.zeros([4]),
        teacherLogProbs: b.device.zeros([4]),
        cuSeqlens: [0, 4],
      }
      const refused = (extra: object, code: string, message: RegExp) =>
        expectRefusal(
          () => distillationAdvantages({ ...tokens, ...extra }),
          code,
          'distillationAdvantages',
          message,
        )
      refused({ teacherLogProbs: b.device.zeros([3]) }, 'ERR_SHAPE', /teacherLogProbs/)
      refused({ cuSeqlens: [0, 3] }, 'ERR_VALUE', /cuSeqlens/)
      refused({ advantages: b.device.zeros([2]) }, 'ERR_SHAPE', /advantages/)
      refused({ advantagesPer: 'token' }, 'ERR_VALUE', /advantagesPer/)
      refused({ coef: -1 }, 'ERR_VALUE', /coef/)
      refused({ discount: 1.5 }, 'ERR_VALUE', /discount/)
      refused({ clamp: 0 }, 'ERR_VALUE', /clamp/)
      refused({ clamp: true }, 'ERR_VALUE', /clamp/)
    }))
})
