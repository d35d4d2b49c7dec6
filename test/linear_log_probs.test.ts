import {
  type Device,
  linear,
  linearLogProbs,
  linearLogProbsBackward,
  linearPolicyLoss,
  type PolicyLossOptions,
  policyLoss,
  sampleTokens,
  scope,
  type Tensor,
  tokenLogProbs,
} from 'p2r-kernels'
import { expect, test } from 'vitest'
import { grpoCases } from './golden.js'
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

interface Head {
  n: number
  v: number
  c: number
  temperature: number
  hidden: Float32Array
  weight: Float32Array
  bias?: Float32Array
  targets: Int32Array
}

function head(n: number, v: number, c: number, dtype: Float, bias: boolean, seed = 1): Head {
  const random = new Random(seed + n + v + c)
  return {
    n,
    v,
    c,
    temperature: seed % 2 ? 0.7 : 1,
    hidden: rounded(random.normals(n * c), dtype),
    weight: rounded(random.normals(v * c, 2 / Math.sqrt(c)), dtype),
    ...(bias ? { bias: random.normals(v) } : {}),
    targets: Int32Array.from({ length: n }, () => random.int(0, v - 1)),
  }
}

// The definition, in float64; skipped rows give 0.
function oracle(h: Head, g?: ArrayLike<number>, e?: ArrayLike<number>) {
  const out = {
    logProbs: new Float64Array(h.n),
    stats: new Float64Array(2 * h.n),
    entropy: new Float64Array(h.n),
    squared: new Float64Array(h.n),
    dHidden: new Float64Array(h.n * h.c),
    dWeight: new Float64Array(h.v * h.c),
    dBias: new Float64Array(h.v),
    /** Of the gradients' sums, the largest Σ of their terms' magnitudes. */
    terms: 0,
  }
  const terms = {
    dHidden: new Float64Array(h.c),
    dWeight: new Float64Array(h.v * h.c),
    dBias: new Float64Array(h.v),
  }
  const x = new Float64Array(h.v)
  for (let i = 0; i < h.n; i++) {
    const target = h.targets[i]!
    if (target === -100) continue
    let maximum = -Infinity
    for (let j = 0; j < h.v; j++) {
      let z = h.bias?.[j] ?? 0
      for (let k = 0; k < h.c; k++) z += h.hidden[i * h.c + k]! * h.weight[j * h.c + k]!
      x[j] = z / h.temperature
      maximum = Math.max(maximum, x[j]!)
    }
    let sum = 0
    let moment = 0
    let squares = 0
    for (const z of x) {
      sum += Math.exp(z - maximum)
      squares += Math.exp(2 * (z - maximum))
      moment += Math.exp(z - maximum) * (z - maximum)
    }
    const logSum = Math.log(sum)
    out.logProbs[i] = x[target]! - maximum - logSum
    out.stats.set([maximum, logSum], 2 * i)
    out.entropy[i] = logSum - moment / sum
    out.squared[i] = squares / sum ** 2
    const dg = g?.[i] ?? 0
    const de = e?.[i] ?? 0
    if (dg === 0 && de === 0) continue
    terms.dHidden.fill(0)
    for (let j = 0; j < h.v; j++) {
      const logP = x[j]! - maximum - logSum
      const p = Math.exp(logP)
      const dz = (dg * (+(j === target) - p) - de * p * (logP + out.entropy[i]!)) / h.temperature
      out.dBias[j]! += dz
      terms.dBias[j]! += Math.abs(dz)
      for (let k = 0; k < h.c; k++) {
        const toHidden = dz * h.weight[j * h.c + k]!
        const toWeight = dz * h.hidden[i * h.c + k]!
        out.dHidden[i * h.c + k]! += toHidden
        out.dWeight[j * h.c + k]! += toWeight
        terms.dHidden[k]! += Math.abs(toHidden)
        terms.dWeight[j * h.c + k]! += Math.abs(toWeight)
      }
    }
    for (const t of terms.dHidden) out.terms = Math.max(out.terms, t)
  }
  for (const sums of [terms.dWeight, terms.dBias])
    for (const t of sums) out.terms = Math.max(out.terms, t)
  return out
}

// A logit of size 10 or less is a sum of C products in f32, off by some 1e-6 at C up to 100 (its terms'
// roundings being random), and the temperature enlarges that; log s adds 1e-6 of itself.
const forward = { absolute: 1e-5, relative: 1e-6 }
// A probability is off by what its exponent is, some 1e-5, and a gradient sums many, of either sign.
const backward = (dtype: Float) => ({ ofLargest: 3e-5, relative: 1e-5 + roundoff[dtype] })
// On tensor cores dz is rounded to the type of hidden and weight, so each term of a sum may be off by
// that much of itself.
const onTensorCores = <B extends object>(bound: B, dtype: Float, terms: number) =>
  dtype === 'f32' ? bound : { ...bound, absolute: roundoff[dtype] * terms }

// Of several tiles of tensor cores, three times.
const work = 2 ** 26

interface Case {
  n: number
  v: number
  c: number
  bias: boolean
}
const cases: Case[] = [
  { n: 3, v: 7, c: 5, bias: true },
  { n: 13, v: 50, c: 1, bias: false },
  { n: 9, v: 1031, c: 17, bias: true },
  { n: 101, v: 130, c: 300, bias: true },
  { n: 2, v: 2500, c: 64, bias: false },
  // Several tiles of tensor cores with ragged ends, more steps of C than a ring has stages; and a span
  // of several tiles.
  { n: 139, v: 301, c: 328, bias: true },
  { n: 2, v: 33_000, c: 8, bias: true },
]

onEveryBackend('linear_log_probs', (b) => {
  const here: typeof onTensorCores = (bound, dtype, terms) =>
    b.name === 'cuda' ? onTensorCores(bound, dtype, terms) : bound
  const f32 = (x: ArrayLike<number>): Tensor => b.device.tensor(Float32Array.from(x), [x.length])
  const i32 = (x: ArrayLike<number>): Tensor => b.device.tensor(Int32Array.from(x), [x.length])
  const tensors = (h: Head, dtype: Float = 'f32', device: Device = b.device) => ({
    hidden: device.tensor(h.hidden, [h.n, h.c], dtype),
    weight: device.tensor(h.weight, [h.v, h.c], dtype),
    targets: device.tensor(h.targets, [h.n]),
    temperature: h.temperature,
    ...(h.bias ? { bias: device.tensor(h.bias, [h.v]) } : {}),
  })
  /** A head with all that the tests of its gradients need: ragged sequences, skipped and masked rows. */
  const batch = (n: number, v: number, c: number, dtype: Float, bias = true) => {
    const h = head(n, v, c, dtype, bias, 5)
    const random = new Random(n)
    for (let i = 0; i < n; i += 5) h.targets[i] = -100
    const exact = oracle(h)
    const near = () => f32(exact.logProbs.map((x) => x + random.normal(0.3)))
    const cuSeqlens = [0, n >> 2, n >> 2, (3 * n) >> 2, n]
    const mask = Uint8Array.from({ length: n }, () => +(random.uniform() < 0.7))
    return {
      h,
      inputs: tensors(h, dtype),
      loss: {
        oldLogProbs: near(),
        refLogProbs: near(),
        importanceWeights: f32(Float32Array.from({ length: n }, () => 2 * random.uniform())),
        advantages: f32(random.normals(4)),
        cuSeqlens,
        mask: b.device.tensor(mask, [n]),
      },
    }
  }

  for (const dtype of floats)
    for (const c of cases) {
      const title = `${dtype} [${c.n}, ${c.v}, ${c.c}]${c.bias ? ' with a bias' : ''}`
      test(title, async () => {
        const h = head(c.n, c.v, c.c, dtype, c.bias)
        if (c.n > 4) h.targets[2] = h.targets[c.n - 1] = -100
        const random = new Random(4)
        const g = random.normals(c.n)
        const e = random.normals(c.n)
        g[1] = e[1] = 0
        const expected = oracle(h, g, e)
        const inputs = tensors(h, dtype)
        using r = recorded(
          b,
          `linear log probs ${title}`,
          forward,
          () => linearLogProbs({ ...inputs, entropy: true }),
          work,
        )
        expectClose(await r.logProbs.read(), expected.logProbs, forward)
        expectClose(await r.stats.read(), expected.stats, forward)
        expectClose(await r.entropy!.read(), expected.entropy, forward)
        using s = recorded(
          b,
          `linear squared probs ${title}`,
          forward,
          () => linearLogProbs({ ...inputs, squaredProbs: true }),
          work,
        )
        // Twice the relative error of a probability, whose exponent is off by `forward`.
        expectClose(await s.squaredProbs.read(), expected.squared, { relative: 4e-5 })
        expect(await s.logProbs.read()).toEqual(await r.logProbs.read())
        expect(await s.stats.read()).toEqual(await r.stats.read())
        const rounded = onTensorCores(backward(dtype), dtype, expected.terms)
        const bound = here(backward(dtype), dtype, expected.terms)
        const upstream = { stats: r.stats, entropy: r.entropy!, dEntropy: f32(e) }
        using d = recorded(
          b,
          `linear log probs backward ${title}`,
          rounded,
          () => linearLogProbsBackward({ ...inputs, ...upstream, dLogProbs: f32(g) }),
          work,
        )
        expectClose(await d.dHidden.toFloat32(), expected.dHidden, bound)
        const sums = here(backward('f32'), dtype, expected.terms)
        expectClose(await d.dWeight.read(), expected.dWeight, sums)
        expect(d.dHidden.dtype).toBe(dtype)
        expect(d.dBias !== undefined).toBe(c.bias)
        if (d.dBias) expectClose(await d.dBias.read(), expected.dBias, sums)
      })
    }

  for (const golden of grpoCases('fused_linear'))
    test(`golden ${golden.group}.${golden.id}`, async () => {
      const { data, shape, dtype } = golden.input('hidden')
      const type = dtype === 'bf16' ? 'bf16' : 'f32'
      const weight = golden.input('weight')
      const { temperature } = golden.params
      const inputs = {
        hidden: b.device.tensor(data as Float32Array, shape, type),
        weight: b.device.tensor(weight.data as Float32Array, weight.shape, type),
        targets: i32(golden.input('labels').values),
        temperature,
      }
      // As the golden's README suggests: for f32, and for bf16 with sums in f32.
      const near = type === 'bf16' ? { absolute: 5e-5 } : { absolute: 2e-5, relative: 2e-6 }
      const record = <R>(name: string, bound: object, f: () => R): R =>
        recorded(b, `golden ${golden.group}.${golden.id} ${name}`, bound, f)
      const r = record('forward', near, () => linearLogProbs({ ...inputs, entropy: true }))
      expectClose(await r.logProbs.read(), golden.output('logp').values, near)
      expectClose(await r.entropy!.read(), golden.output('entropy').values, near)
      const bound =
        type === 'bf16' ? { ofLargest: 1e-4, relative: roundoff.bf16 } : { ofLargest: 2e-5 }
      const { terms } = oracle(
        {
          n: shape[0]!,
          v: weight.shape[0]!,
          c: shape[1]!,
          temperature,
          hidden: Float32Array.from(golden.input('hidden').values),
          weight: Float32Array.from(weight.values),
          targets: Int32Array.from(golden.input('labels').values),
        },
        golden.input('g_logp').values,
        golden.input('g_entropy').values,
      )
      const d = record('backward', onTensorCores(bound, type, terms), () =>
        linearLogProbsBackward({
          ...inputs,
          stats: r.stats,
          dLogProbs: f32(golden.input('g_logp').values),
          entropy: r.entropy!,
          dEntropy: f32(golden.input('g_entropy').values),
        }),
      )
      expectClose(
        await d.dHidden.toFloat32(),
        golden.output('d_hidden').values,
        here(bound, type, terms),
      )
      const { ofLargest } = bound
      expectClose(
        await d.dWeight.read(),
        golden.output('d_weight').values,
        here({ ofLargest }, type, terms),
      )
    })

  test('equals tokenLogProbs of explicit logits', async () => {
    const h = head(21, 700, 40, 'f32', true)
    const { hidden: x, weight, bias, ...rest } = tensors(h)
    const logits = linear({ x, weight, bias: bias! })
    const one = tokenLogProbs({ logits, ...rest, entropy: true })
    const two = linearLogProbs({ hidden: x, weight, bias: bias!, ...rest, entropy: true })
    for (const key of ['logProbs', 'stats', 'entropy'] as const)
      expectClose(await two[key]!.read(), await one[key]!.read(), forward)
  })

  // On the CPU there is one order of sums, of logits in memory and of those that are not.
  test.skipIf(b.name.startsWith('cuda'))(
    'has the bits of tokenLogProbs and sampleTokens of the logits of linear',
    async () => {
      for (const [n, v, c, dtype] of [
        [64, 1000, 40, 'f32'],
        [5, 97, 33, 'bf16'],
        [3, 9300, 64, 'bf16'],
        [2, 151_936, 16, 'bf16'],
        [1, 1, 4, 'f16'],
      ] as const)
        for (const temperature of [1, 0.7]) {
          const h = head(n, v, c, dtype, v === 1000)
          using hidden: Tensor = b.device.tensor(h.hidden, [n, c], dtype)
          using weight: Tensor = b.device.tensor(h.weight, [v, c], dtype)
          const bias = h.bias && b.device.tensor(h.bias, [v])
          using logits = linear({ x: hidden, weight, ...(bias && { bias }), dtype: 'f32' })
          using drawn = sampleTokens({
            logits,
            temperature,
            seeds: h.targets.map((_, row) => row),
            topK: 3,
          })
          const targets = drawn.tokens
          const of = { hidden, weight, ...(bias && { bias }), targets, temperature }
          const same = async (x: Tensor, y: Tensor) =>
            expect(await x.read(), `${n} ${v} ${c} ${dtype} ${temperature}`).toEqual(await y.read())
          for (const extra of [{ entropy: true }, { squaredProbs: true }] as const) {
            const one = linearLogProbs({ ...of, ...extra } as typeof of)
            const other = tokenLogProbs({ logits, targets, temperature, ...extra })
            await same(one.logProbs, other.logProbs)
            await same(one.stats, other.stats)
            const [name] = Object.keys(extra) as ['entropy']
            await same((one as typeof other & { entropy: Tensor })[name], other[name] as Tensor)
            await same(one.logProbs, drawn.logProbs)
          }
        }
    },
  )

  test('the gradient matches finite differences', async () => {
    const h = head(4, 23, 6, 'f32', true)
    h.targets[2] = -100
    const g = [1.5, -0.5, 2, 0.25]
    const e = [-0.7, 0, 1, 0.3]
    const inputs = tensors(h)
    const r = linearLogProbs({ ...inputs, entropy: true })
    const d = linearLogProbsBackward({
      ...inputs,
      stats: r.stats,
      dLogProbs: f32(g),
      entropy: r.entropy!,
      dEntropy: f32(e),
    })
    const value = (at: Partial<Record<'hidden' | 'weight' | 'bias', Float64Array>>): number => {
      const o = oracle({ ...h, ...at } as unknown as Head)
      return o.logProbs.reduce((s, x, i) => s + g[i]! * x + e[i]! * o.entropy[i]!, 0)
    }
    const bound = { absolute: 2e-6, relative: 1e-5, entries: 60 }
    expectGradient((hidden) => value({ hidden }), h.hidden, await d.dHidden.read(), bound)
    expectGradient((weight) => value({ weight }), h.weight, await d.dWeight.read(), bound)
    expectGradient((bias) => value({ bias }), h.bias!, await d.dBias!.read(), bound)
  })

  const objectives: [string, PolicyLossOptions][] = [
    ['ppo', {}],
    ['cispo', { objective: 'cispo', kl: 'k1' }],
    ['sapo', { objective: 'sapo', kl: 'k2', klCoef: 0.2 }],
    ['gpg', { objective: 'gpg', aggregation: 'seq-mean-token-sum' }],
    ['ppo with entropy', { entropyCoef: 0.05, normalizer: 9 }],
  ]
  for (const dtype of floats)
    for (const [title, options] of objectives)
      test(`${dtype} ${title}: equals its three parts`, async () => {
        const { h, inputs, loss } = batch(41, 333, 24, dtype)
        const entropy = !!options.entropyCoef
        const one = linearLogProbs({ ...inputs, entropy })
        const two = policyLoss({
          ...loss,
          ...options,
          logProbs: one.logProbs,
          ...(entropy ? { entropy: one.entropy! } : {}),
        })
        const three = linearLogProbsBackward({
          ...inputs,
          stats: one.stats,
          dLogProbs: two.dLogProbs,
          ...(entropy ? { entropy: one.entropy!, dEntropy: two.dEntropy! } : {}),
        })
        const gradients = [two.dLogProbs, two.dEntropy].map((t) => t?.toFloat32())
        const { terms } = oracle(h, ...(await Promise.all(gradients)))
        const rounded = onTensorCores(backward(dtype), dtype, terms)
        using all = recorded(b, `linear policy loss ${dtype} ${title}`, rounded, () =>
          linearPolicyLoss({ ...inputs, ...loss, ...options }),
        )
        const same = { absolute: 1e-5, relative: 1e-5 }
        expectClose(await all.logProbs.read(), await one.logProbs.read(), same)
        expectClose(await all.loss.read(), await two.loss.read(), same)
        expect((await all.metrics()).tokens).toBe((await two.metrics()).tokens)
        expectClose(Object.values(await all.metrics()), Object.values(await two.metrics()), {
          absolute: 1e-5,
          relative: 1e-5,
        })
        // Each side may be off by the bound.
        const bound: { absolute?: number } & ReturnType<typeof backward> = here(
          backward(dtype),
          dtype,
          terms,
        )
        const twice = {
          absolute: 2 * (bound.absolute ?? 0),
          ofLargest: 2 * bound.ofLargest,
          relative: 2 * bound.relative,
        }
        expectClose(await all.dHidden.toFloat32(), await three.dHidden.toFloat32(), twice)
        expectClose(await all.dWeight.read(), await three.dWeight.read(), twice)
        expectClose(await all.dBias!.read(), await three.dBias!.read(), twice)
        // And its loss is policyLoss of its own log-probs, to the bit.
        const own = policyLoss({
          ...loss,
          ...options,
          logProbs: all.logProbs,
          ...(entropy ? { entropy: one.entropy! } : {}),
        })
        expect(await all.loss.read()).toEqual(await own.loss.read())
      })

  // More rows than a chunk has on either backend; on the CPU, more logits than dz's memory holds; and
  // more rows than a chunk of tensor cores'.
  for (const [n, v, c, dtype] of [
    [5000, 7, 2, 'f32'],
    [800, 11_000, 1, 'f32'],
    [4200, 7, 8, 'bf16'],
  ] as const)
    test(`several chunks, [${n}, ${v}, ${c}] ${dtype}`, async () => {
      const h = head(n, v, c, dtype, true)
      const random = new Random(9)
      for (let i = 0; i < n; i++) if (random.uniform() < 0.2) h.targets[i] = -100
      const inputs = tensors(h, dtype)
      const mask = Uint8Array.from({ length: n }, () => +(random.uniform() < 0.8))
      const loss = {
        objective: 'gpg' as const,
        normalizer: 10,
        advantages: f32(random.normals(2)),
        cuSeqlens: [0, 100, n],
        mask: b.device.tensor(mask, [n]),
      }
      // The gradient of gpg needs no log-probabilities.
      const { dLogProbs } = policyLoss({ ...loss, logProbs: f32(new Float32Array(n)) })
      const expected = oracle(h, await dLogProbs.read())
      const record = <R>(name: string, bound: object, f: () => R): R =>
        recorded(b, `linear ${name} in chunks ${dtype} ${v}`, bound, f)
      const r = record('log probs', forward, () => linearLogProbs({ ...inputs, entropy: true }))
      const rounded = onTensorCores(backward(dtype), dtype, expected.terms)
      const d = record('backward', rounded, () =>
        linearLogProbsBackward({ ...inputs, stats: r.stats, dLogProbs }),
      )
      const l = record('policy loss', rounded, () => linearPolicyLoss({ ...inputs, ...loss }))
      expectClose(await r.logProbs.read(), expected.logProbs, forward)
      expectClose(await r.entropy!.read(), expected.entropy, forward)
      expect(await l.logProbs.read()).toEqual(await r.logProbs.read())
      for (const key of ['dHidden', 'dWeight', 'dBias'] as const) {
        const type = key === 'dHidden' ? dtype : 'f32'
        const bound = here(backward(type), dtype, expected.terms)
        expectClose(await d[key]!.toFloat32(), expected[key], bound)
        expectClose(await l[key]!.toFloat32(), expected[key], bound)
      }
    })

  test('into accumulates, and returns handles of the same storage', async () => {
    const { inputs, loss } = batch(23, 90, 12, 'f32')
    const g = f32(new Random(2).normals(23))
    const { stats } = linearLogProbs(inputs)
    const runs = [
      (into?: { dWeight: Tensor; dBias?: Tensor }) =>
        linearLogProbsBackward({ ...inputs, stats, dLogProbs: g, ...(into ? { into } : {}) }),
      (into?: { dWeight: Tensor; dBias?: Tensor }) =>
        linearPolicyLoss({ ...inputs, ...loss, ...(into ? { into } : {}) }),
    ]
    for (const run of runs) {
      const alone = run()
      const dWeight = b.device.tensor(new Float32Array(90 * 12).fill(2), [90, 12])
      const dBias = b.device.tensor(new Float32Array(90).fill(-1), [90])
      using both = recorded(b, `linear log probs into ${runs.indexOf(run)}`, forward, () =>
        run({ dWeight, dBias }),
      )
      const plus = async (t: Tensor, x: number) => (await t.toFloat32()).map((y) => y + x)
      expectClose(await both.dWeight.read(), await plus(alone.dWeight, 2), { absolute: 1e-6 })
      expectClose(await both.dBias!.read(), await plus(alone.dBias!, -1), { absolute: 1e-6 })
      expect(await dWeight.read()).toEqual(await both.dWeight.read())
      const half = run({ dWeight })
      expect(await half.dBias!.read()).toEqual(await alone.dBias!.read())
      dWeight.dispose()
      expect((await both.dWeight.read()).length).toBe(90 * 12)
    }
  })

  test('skipped rows, and rows without gradient, are not read', async () => {
    const h = head(6, 40, 8, 'f32', true)
    const targets = [3, -100, 7, 9, -100, 0]
    const clean = { ...h, targets: Int32Array.from(targets) }
    const dirty = { ...clean, hidden: Float32Array.from(h.hidden) }
    dirty.hidden.fill(NaN, 8, 16)
    dirty.hidden.fill(NaN, 32, 40)
    const g = f32([1, 5, 0, -1, 2, 0.5])
    const run = (x: Head) => {
      const inputs = tensors(x)
      const r = linearLogProbs({ ...inputs, entropy: true })
      const d = linearLogProbsBackward({ ...inputs, stats: r.stats, dLogProbs: g })
      return [r.logProbs, r.stats, r.entropy!, d.dHidden, d.dWeight, d.dBias!]
    }
    const [a, z] = [run(clean), run(dirty)]
    for (let i = 0; i < a.length; i++) expect(await z[i]!.read()).toEqual(await a[i]!.read())
    const dHidden = await z[3]!.read()
    for (const row of [1, 2, 4])
      expect(Array.from(dHidden.subarray(row * 8, row * 8 + 8))).toEqual(Array(8).fill(0))
    // Of the loss: masked rows have a log-probability, and no part in the gradient.
    const mask = b.device.tensor(Uint8Array.of(1, 1, 0, 1, 1, 1), [6])
    const masked = { ...dirty, hidden: Float32Array.from(dirty.hidden) }
    masked.hidden.fill(NaN, 16, 24)
    const loss = { advantages: f32([1]), cuSeqlens: [0, 6], mask }
    const [p, q] = [clean, masked].map((x) => linearPolicyLoss({ ...tensors(x), ...loss }))
    for (const key of ['loss', 'dHidden', 'dWeight', 'dBias'] as const)
      expect(await q![key]!.read()).toEqual(await p![key]!.read())
    expect((await q!.logProbs.read())[2]).toBeNaN()
    expectClose((await p!.logProbs.read()).slice(2, 3), (await a[0]!.read()).slice(2, 3), forward)
    // Nothing but such rows.
    const none = { ...dirty, targets: new Int32Array(6).fill(-100) }
    const zero = linearPolicyLoss({ ...tensors(none), ...loss, kl: 'none' })
    expect(new Set(await zero.dWeight.read())).toEqual(new Set([0]))
    expect(new Set(await zero.dBias!.read())).toEqual(new Set([0]))
    await b.device.synchronize()
  })

  test('a row is bitwise independent of its batch and of the number of threads', async () => {
    const h = head(150, 1500, 70, 'f32', true)
    const run = async (device: Device, from: number, to: number) => {
      const part = {
        ...h,
        n: to - from,
        hidden: h.hidden.slice(from * h.c, to * h.c),
        targets: h.targets.slice(from, to),
      }
      const inputs = tensors(part, 'f32', device)
      const r = linearLogProbs({ ...inputs, entropy: true })
      const dLogProbs = device.tensor(new Random(6).normals(part.n), [part.n])
      const d = linearLogProbsBackward({ ...inputs, stats: r.stats, dLogProbs })
      const whole = await Promise.all([d.dHidden, d.dWeight, d.dBias!].map((x) => x.read()))
      const rows = await Promise.all([r.logProbs, r.entropy!].map((x) => x.read()))
      return { rows, whole }
    }
    const all = await run(b.device, 0, 150)
    const some = await run(b.device, 60, 63)
    for (const k of [0, 1]) expect(some.rows[k]).toEqual(all.rows[k]!.slice(60, 63))
    if (b.device.info.backend !== 'cpu') return
    for (const threads of [1, 3]) {
      using device = b.open({ threads })
      expect(await run(device, 0, 150)).toEqual(all)
    }
  })

  for (const target of [-1, 40, -101])
    test(`a target of ${target} among forty faults`, async () => {
      const h = head(3, 40, 8, 'f32', true)
      const good = linearLogProbs(tensors(h))
      h.targets[1] = target
      const inputs = tensors(h)
      const g = f32([1, 1, 1])
      const calls = {
        linearLogProbs: () => linearLogProbs(inputs).logProbs,
        linearLogProbsBackward: () =>
          linearLogProbsBackward({ ...inputs, stats: good.stats, dLogProbs: g }).dWeight,
        linearPolicyLoss: () =>
          linearPolicyLoss({ ...inputs, advantages: f32([1]), cuSeqlens: [0, 3] }).loss,
      }
      for (const [op, call] of Object.entries(calls)) {
        const result = recorded(b, `${op} of target ${target}`, forward, call)
        const fault = { code: 'ERR_VALUE', op }
        await expect(result.read()).rejects.toMatchObject(fault)
        await b.device.synchronize()
      }
      expect((await good.logProbs.read()).length).toBe(3)
    })

  test('memory stays bounded', () => {
    const of = (f: () => { dispose(): void }): number => {
      b.device.resetPeak()
      const before = b.device.memory().peakBytes
      f().dispose()
      return b.device.memory().peakBytes - before
    }
    const [n, v, c] = [1500, 5000, 64]
    const inputs = {
      hidden: b.device.zeros([n, c], 'bf16'),
      weight: b.device.zeros([v, c], 'bf16'),
      targets: b.device.zeros([n], 'i32'),
    }
    const stats = b.device.zeros([n, 2])
    const dLogProbs = b.device.zeros([n])
    const cpu = b.device.info.backend === 'cpu'
    const MB = 2 ** 20
    // [N, V] would be 29 MB. Forward on the CPU: 5 MB and 0.8 MB a thread, with the results.
    const threads = b.device.info.threads ?? 0
    const most = cpu ? 5 * MB + 0.8 * MB * threads : 128 * MB
    expect(of(() => linearLogProbs({ ...inputs, entropy: true }))).toBeLessThan(most)
    const results = n * c * 2 + v * c * 4
    const back = of(() => linearLogProbsBackward({ ...inputs, stats, dLogProbs }))
    expect(back).toBeLessThan((cpu ? 32 + 15 : 150) * MB + threads * MB + results)
    const whole = of(() =>
      linearPolicyLoss({ ...inputs, advantages: dLogProbs, cuSeqlens: [0, n] }),
    )
    expect(whole).toBeLessThan(150 * MB + threads * MB + results)
    for (const t of [inputs.hidden, inputs.weight, inputs.targets, stats, dLogProbs]) t.dispose()
  })

  // What peakBytes counts is what kernels ask the device for; this asks the system.
  test('the process does not grow by [N, V]', async () => {
    if (b.device.info.backend !== 'cpu') return
    const [n, v, c] = [1024, 40_000, 4]
    const inputs = {
      hidden: b.device.zeros([n, c]),
      weight: b.device.zeros([v, c]),
      targets: b.device.zeros([n], 'i32'),
    }
    await b.device.synchronize()
    const before = process.memoryUsage().rss
    using r = linearLogProbs({ ...inputs, entropy: true })
    await b.device.synchronize()
    // The logits would be 164 MB; the results and scratch are less than 10.
    expect(process.memoryUsage().rss - before).toBeLessThan(60 * 2 ** 20)
    expectClose(await r.logProbs.read(), Array(n).fill(-Math.log(v)), forward)
    for (const t of Object.values(inputs)) t.dispose()
  })

  test('memory of the whole vocabulary of a model', () => {
    // All rows are skipped, which costs memory but no time.
    const [n, v, c] = [256, 151_936, 1024]
    const inputs = {
      hidden: b.device.zeros([n, c], 'bf16'),
      weight: b.device.zeros([v, c], 'bf16'),
      targets: i32(Array(n).fill(-100)),
    }
    b.device.resetPeak()
    const before = b.device.memory().peakBytes
    linearLogProbs(inputs).logProbs.dispose()
    const most = b.device.info.backend === 'cpu' ? 8 : 128
    expect(b.device.memory().peakBytes - before).toBeLessThan(most * 2 ** 20)
    for (const t of Object.values(inputs)) t.dispose()
  })

  test('empty sizes', async () => {
    const none = {
      hidden: b.device.zeros([0, 5], 'f16'),
      weight: b.device.zeros([9, 5], 'f16'),
      targets: b.device.zeros([0], 'i32'),
    }
    using r = linearLogProbs({ ...none, entropy: true })
    expect([r.logProbs.shape, r.stats.shape, r.entropy!.shape]).toEqual([[0], [0, 2], [0]])
    using d = linearLogProbsBackward({ ...none, stats: r.stats, dLogProbs: b.device.zeros([0]) })
    expect([d.dHidden.shape, d.dHidden.dtype]).toEqual([[0, 5], 'f16'])
    expect(Array.from(await d.dWeight.read())).toEqual(Array(45).fill(0))
    using l = linearPolicyLoss({ ...none, advantages: b.device.zeros([0]), cuSeqlens: [0] })
    expect(Array.from(await l.loss.read())).toEqual([0])
    expect(Array.from(await l.dWeight.read())).toEqual(Array(45).fill(0))
    // Without channels the logits are the bias.
    const flat = {
      hidden: b.device.zeros([2, 0]),
      weight: b.device.zeros([4, 0]),
      targets: i32([1, 2]),
    }
    expectClose(await linearLogProbs(flat).logProbs.read(), Array(2).fill(-Math.log(4)), forward)
    const bias = f32([0, 1, 2, 3])
    const lse = Math.log(1 + Math.E + Math.E ** 2 + Math.E ** 3)
    const biased = linearLogProbs({ ...flat, bias })
    expectClose(await biased.logProbs.read(), [1 - lse, 2 - lse], forward)
    const grad = linearLogProbsBackward({
      ...flat,
      bias,
      stats: biased.stats,
      dLogProbs: f32([1, 1]),
    })
    expectClose(
      await grad.dBias!.read(),
      [0, 1, 2, 3].map((x) => +(x === 1 || x === 2) - 2 * Math.exp(x - lse)),
      forward,
    )
  })

  test('refuses invalid arguments', () =>
    scope(() => {
      const a = {
        hidden: b.device.zeros([3, 4]),
        weight: b.device.zeros([7, 4]),
        bias: b.device.zeros([7]),
        targets: b.device.zeros([3], 'i32'),
      }
      const back = { ...a, stats: b.device.zeros([3, 2]), dLogProbs: b.device.zeros([3]) }
      const loss = { ...a, advantages: b.device.zeros([1]), cuSeqlens: [0, 3] }
      const all = (extra: object, code: string, message: RegExp) => {
        const calls = [
          [linearLogProbs, a],
          [linearLogProbsBackward, back],
          [linearPolicyLoss, loss],
        ] as const
        for (const [call, given] of calls)
          expectRefusal(
            () => (call as (x: object) => unknown)({ ...given, ...extra }),
            code,
            call.name,
            message,
          )
      }
      all({ hidden: undefined }, 'ERR_VALUE', /hidden/)
      all({ hidden: b.device.zeros([3, 5]) }, 'ERR_SHAPE', /weight/)
      all({ hidden: b.device.zeros([4]) }, 'ERR_SHAPE', /hidden/)
      all({ weight: b.device.zeros([7, 4], 'f16') }, 'ERR_DTYPE', /weight/)
      all({ bias: b.device.zeros([6]) }, 'ERR_SHAPE', /bias/)
      all({ bias: b.device.zeros([7], 'bf16') }, 'ERR_DTYPE', /bias/)
      all({ targets: b.device.zeros([3]) }, 'ERR_DTYPE', /targets/)
      all({ targets: b.device.zeros([2], 'i32') }, 'ERR_SHAPE', /targets/)
      all({ temperature: 0 }, 'ERR_VALUE', /temperature/)
      const backs = (extra: object, code: string, message: RegExp) => {
        const op = 'linearLogProbsBackward'
        expectRefusal(() => linearLogProbsBackward({ ...back, ...extra }), code, op, message)
      }
      backs({ stats: b.device.zeros([3]) }, 'ERR_SHAPE', /stats/)
      backs({ dLogProbs: b.device.zeros([2]) }, 'ERR_SHAPE', /dLogProbs/)
      backs({ dEntropy: b.device.zeros([3]) }, 'ERR_VALUE', /entropy/)
      backs({ into: { dWeight: b.device.zeros([7, 5]) } }, 'ERR_SHAPE', /into.dWeight/)
      backs({ into: 3 }, 'ERR_VALUE', /into/)
      backs(
        { bias: undefined, into: { dWeight: b.device.zeros([7, 4]), dBias: b.device.zeros([7]) } },
        'ERR_VALUE',
        /into.dBias/,
      )
      const losses = (extra: object, code: string, message: RegExp) => {
        const op = 'linearPolicyLoss'
        expectRefusal(() => linearPolicyLoss({ ...loss, ...extra }), code, op, message)
      }
      for (const objective of ['gspo', 'luspo', 'gmpo', 'vespo'])
        losses({ objective }, 'ERR_VALUE', /linearLogProbs, policyLoss and/)
      for (const extra of [
        { objective: 'clip_cov' },
        { objective: 'kl_cov' },
        { topEntropyQuantile: 0.2 },
      ])
        losses(extra, 'ERR_VALUE', /need all tokens of a batch/)
      losses({ objective: 'best' }, 'ERR_VALUE', /objective/)
      losses({ cuSeqlens: [0, 2] }, 'ERR_VALUE', /cuSeqlens/)
      losses({ kl: 'k3' }, 'ERR_VALUE', /refLogProbs/)
      losses({ advantages: b.device.zeros([2]) }, 'ERR_SHAPE', /advantages/)
    }))
})
