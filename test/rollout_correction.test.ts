import {
  policyLoss,
  type RolloutCorrectionMetrics,
  type RolloutCorrectionOptions,
  rolloutCorrection,
  scope,
  type Tensor,
  trlRolloutCorrection,
  verlRolloutCorrection,
} from 'p2r-kernels'
import { expect, test } from 'vitest'
import { grpoCases } from './golden.js'
import { expectClose, expectRefusal, onEveryBackend, Random, recorded } from './harness.js'

type Numbers = ArrayLike<number>
interface Data {
  logProbs: Numbers
  rolloutLogProbs: Numbers
  cuSeqlens: number[]
  mask?: Numbers
  advantages?: Numbers
}

const sum = (x: readonly number[]): number => x.reduce((a, b) => a + b, 0)
const clamp = (x: number): number => Math.min(Math.max(x, -20), 20)

// From the definitions, token by token in float64.
function oracle(a: Data, o: RolloutCorrectionOptions) {
  const { level = 'token', mode = 'truncate', high = 2, low = 0, reject = [] } = o
  const T = a.logProbs.length
  const weights = new Float64Array(T)
  const mask = Uint8Array.from({ length: T }, (_, t) => +(a.mask?.[t] ?? 1))
  const l = Float64Array.from({ length: T }, (_, t) => a.logProbs[t]! - a.rolloutLogProbs[t]!)
  const measure = {
    k1: (d: number) => -d,
    k2: (d: number) => (d * d) / 2,
    k3: (d: number) => Math.expm1(d) - d,
    ratio: Math.exp,
  }
  const bounded = (r: number): number => {
    if (mode === 'truncate') return Math.min(r, high)
    return mode === 'mask' && (r > high || r < low) ? 0 : r
  }
  const sequences = a.cuSeqlens.slice(1).map((end, i) => {
    const tokens: number[] = []
    for (let t = a.cuSeqlens[i]!; t < end; t++) if (mask[t]) tokens.push(t)
    return tokens
  })
  const all = sequences.flat()
  const per: number[] = []
  let cut = 0
  sequences.forEach((tokens) => {
    if (tokens.length === 0) return
    const total = sum(tokens.map((t) => l[t]!))
    const shared = Math.exp(clamp(level === 'geometric' ? total / tokens.length : total))
    for (const t of tokens) {
      const r = level === 'token' ? Math.exp(clamp(l[t]!)) : shared
      weights[t] = bounded(r)
      cut += +(weights[t] !== r)
    }
    per.push(bounded(shared))
  })
  const w = all.map((t) => weights[t]!)
  sequences.forEach((tokens, i) => {
    if (tokens.length === 0) return
    for (const { measure: name, over, low = -Infinity, high = Infinity } of reject) {
      const m = tokens.map((t) => measure[name](clamp(l[t]!)))
      const outside = (x: number): boolean => !(x >= low && x <= high)
      const total = { sum: sum(m), mean: sum(m) / m.length, max: Math.max(...m), token: 0 }[over]
      tokens.forEach((t, k) => {
        if (outside(over === 'token' ? m[k]! : total)) mask[t] = 0
      })
    }
    const divergence = -sum(tokens.map((t) => l[t]!)) / tokens.length
    if (o.maxDivergence !== undefined && a.advantages![i]! < 0 && divergence > o.maxDivergence)
      for (const t of tokens) mask[t] = 0
  })
  const mean = level === 'token' ? sum(w) / w.length : sum(per) / per.length
  const divisor = o.normalize && mean > 1e-8 ? mean : 1
  for (let t = 0; t < T; t++) weights[t] = mask[t] ? weights[t]! / divisor : 0
  const n = all.length
  const kept = sequences.filter((tokens) => tokens.length)
  const perplexity = (x: Numbers): number =>
    sum(kept.map((tokens) => Math.exp(-sum(tokens.map((t) => x[t]!)) / tokens.length))) /
    kept.length
  const metrics: RolloutCorrectionMetrics = {
    effectiveSampleSize: sum(w) ** 2 / (n * sum(w.map((x) => x * x))) || 0,
    chi2: sum(all.map((t) => Math.exp(2 * clamp(l[t]!)))) / n - 1,
    sequenceChi2:
      sum(kept.map((tokens) => Math.exp(2 * clamp(sum(tokens.map((t) => l[t]!)))))) / kept.length -
      1,
    k1: -sum(all.map((t) => l[t]!)) / n,
    k3: sum(all.map((t) => measure.k3(clamp(l[t]!)))) / n,
    trainerPerplexity: perplexity(a.logProbs),
    rolloutPerplexity: perplexity(a.rolloutLogProbs),
    cutShare: cut / n,
    rejectedShare: all.filter((t) => !mask[t]).length / n,
    meanWeight: sum(w) / n,
  }
  return { weights, mask, metrics }
}

const noMetrics: RolloutCorrectionMetrics = {
  effectiveSampleSize: 0,
  chi2: 0,
  sequenceChi2: 0,
  k1: 0,
  k3: 0,
  trainerPerplexity: 0,
  rolloutPerplexity: 0,
  cutShare: 0,
  rejectedShare: 0,
  meanWeight: 0,
}

// A log-ratio is exact or one rounding of it, the exponential has 2 ulp and the weight two more roundings.
// A sequence's sum of some 90 log-ratios is f64, of differences rounded to f32: 90 x 2^-25 in the exponent.
const relative = 4e-6
const bound = { relative, absolute: 1e-7 }

onEveryBackend('rollout_correction', (b) => {
  const f32 = (x: Numbers): Tensor => b.device.tensor(Float32Array.from(x), [x.length])
  const run = (a: Data, o: RolloutCorrectionOptions) =>
    rolloutCorrection({
      logProbs: f32(a.logProbs),
      rolloutLogProbs: f32(a.rolloutLogProbs),
      cuSeqlens: a.cuSeqlens,
      ...(a.mask && { mask: b.device.tensor(Uint8Array.from(a.mask), [a.mask.length]) }),
      ...(a.advantages && { advantages: f32(a.advantages) }),
      ...o,
    })

  const batch = (seed: number, longest = 90, spread = 0.3): Required<Data> => {
    const random = new Random(seed)
    const cuSeqlens = [0]
    for (const n of [3, 0, 17, 1, longest, 40, 5, 2]) cuSeqlens.push(cuSeqlens.at(-1)! + n)
    const T = cuSeqlens.at(-1)!
    const logProbs = Float32Array.from({ length: T }, () => -3 * random.uniform())
    const mask = Uint8Array.from({ length: T }, () => +(random.uniform() < 0.8))
    mask.fill(0, cuSeqlens[3], cuSeqlens[4])
    const rolloutLogProbs = logProbs.map((x) => x + random.normal(spread))
    return { logProbs, rolloutLogProbs, cuSeqlens, mask, advantages: random.normals(8) }
  }

  const expectCorrection = async (
    got: ReturnType<typeof rolloutCorrection>,
    expected: ReturnType<typeof oracle>,
  ) => {
    expectClose(await got.importanceWeights.read(), expected.weights, bound)
    expect(Array.from(await got.mask.read())).toEqual(Array.from(expected.mask))
    const metrics = await got.metrics()
    expect(Object.keys(metrics)).toEqual(Object.keys(expected.metrics))
    // Means less 1, and of signed terms of some 0.3.
    const loose = { relative: 1e-5, absolute: 2e-6 }
    expectClose(Object.values(metrics), Object.values(expected.metrics), loose)
  }

  const measures = ['k1', 'k2', 'k3', 'ratio'] as const
  const variants: [string, RolloutCorrectionOptions][] = [
    ['default', {}],
    ['trl', trlRolloutCorrection],
    ['verl', verlRolloutCorrection],
    ...(['token', 'sequence', 'geometric'] as const).flatMap((level) =>
      (['truncate', 'mask', 'none'] as const).flatMap(
        (mode): [string, RolloutCorrectionOptions][] => [
          [`${level} ${mode}`, { level, mode, high: 1.3, low: 0.8 }],
          [`${level} ${mode} normalized`, { level, mode, high: 1.3, low: 0.8, normalize: true }],
        ],
      ),
    ),
    ...measures.flatMap((measure) =>
      (['token', 'sum', 'mean', 'max'] as const).map((over): [string, RolloutCorrectionOptions] => [
        `rejects by ${over} of ${measure}`,
        {
          reject: [
            {
              measure,
              over,
              ...(measure === 'k1' || measure === 'ratio' ? { low: -0.2 } : {}),
              high: { token: 0.25, sum: 1, mean: 0.05, max: 0.35 }[over] + +(measure === 'ratio'),
            },
          ],
        },
      ]),
    ),
    [
      'several rules',
      {
        level: 'geometric',
        normalize: true,
        reject: [
          { measure: 'k3', over: 'token', high: 0.2 },
          { measure: 'k1', over: 'mean', low: -0.1, high: 0.1 },
          { measure: 'ratio', over: 'max', high: 2.1 },
        ],
      },
    ],
    ['off-policy sequences', { maxDivergence: 0.01 }],
  ]
  for (const [title, o] of variants)
    for (const masked of [true, false])
      test(`${title}${masked ? ', masked' : ''}`, async () => {
        const { mask, ...rest } = batch(title.length)
        const a = masked ? { ...rest, mask } : rest
        const got = recorded(b, `rollout correction ${title} ${masked}`, bound, () => run(a, o))
        await expectCorrection(got, oracle(a, o))
        got.dispose()
      })

  test('sequences of several runs', async () => {
    const a = batch(9, 5000, 0.02)
    const reject = [
      { measure: 'k3', over: 'max', high: 0.001 },
      { measure: 'k2', over: 'sum', high: 0.9 },
    ] as const
    for (const level of ['token', 'geometric'] as const)
      await expectCorrection(run(a, { level, reject }), oracle(a, { level, reject }))
  })

  test('neither threads nor the rest of the batch change a weight', async () => {
    const a = batch(11, 9000, 0.02)
    const o = { level: 'geometric', reject: [{ measure: 'k3', over: 'sum', high: 1 }] } as const
    const whole = await run(a, o).importanceWeights.read()
    const device = b.open({ threads: 1 })
    const on = (x: Numbers) => device.tensor(Float32Array.from(x), [x.length])
    const [from, to] = [a.cuSeqlens[4]!, a.cuSeqlens[5]!]
    const one = rolloutCorrection({
      logProbs: on(Array.from(a.logProbs).slice(from, to)),
      rolloutLogProbs: on(Array.from(a.rolloutLogProbs).slice(from, to)),
      mask: device.tensor(Uint8Array.from(Array.from(a.mask).slice(from, to)), [to - from]),
      cuSeqlens: [0, to - from],
      ...o,
    })
    expect(await one.importanceWeights.read()).toEqual(whole.slice(from, to))
    device.dispose()
  })

  for (const c of grpoCases('is_weights'))
    test(`golden ${c.group}.${c.id}`, async () => {
      const [B, T] = c.input('train_logp').shape as [number, number]
      const mask = c.input('mask').values
      const a = {
        logProbs: c.input('train_logp').values,
        rolloutLogProbs: c.input('rollout_logp').values,
        mask,
        cuSeqlens: Array.from({ length: B + 1 }, (_, i) => i * T),
      }
      const { verl_threshold: high, verl_icepop: icepop, trl_max: most } = c.params
      const cases: [string, RolloutCorrectionOptions][] = [
        ['verl_token', { high }],
        ['verl_sequence', { level: 'sequence', high }],
        ['verl_icepop_token', { mode: 'mask', low: icepop[0], high: icepop[1] }],
        ['trl_token_truncate', { high: most }],
        ['trl_token_mask', { mode: 'mask', high: most }],
        ['trl_sequence_truncate', { level: 'sequence', high: most }],
        ['trl_sequence_mask', { level: 'sequence', mode: 'mask', high: most }],
      ]
      for (const [name, o] of cases) {
        const { values, shape } = c.output(name)
        // TRL has a value for each sequence, and 1 at masked tokens; ours are 0 there.
        const expected = Array.from(mask, (m, t) =>
          m ? values[shape[1] === 1 ? Math.floor(t / T) : t]! : 0,
        )
        const got = recorded(b, `golden ${c.group} ${name}`, bound, () => run(a, o))
        // Inputs are rounded to f32, which moves a log-ratio by some 2e-7, a sequence's by 16 of these.
        expectClose(await got.importanceWeights.read(), expected, {
          relative: 1e-5,
          absolute: 1e-7,
        })
      }
    })

  test('equal log-probs have weights of exactly 1', async () => {
    const { logProbs, cuSeqlens } = batch(3)
    for (const level of ['token', 'sequence', 'geometric'] as const) {
      const got = run({ logProbs, rolloutLogProbs: logProbs, cuSeqlens }, { level })
      expect(Array.from(await got.importanceWeights.read())).toEqual(Array(logProbs.length).fill(1))
      const metrics = await got.metrics()
      expect(metrics).toMatchObject({ effectiveSampleSize: 1, chi2: 0, k1: 0, k3: 0, cutShare: 0 })
    }
  })

  test('infinite ratios', async () => {
    const a = {
      logProbs: [-1, -Infinity, -1, -1],
      rolloutLogProbs: [-Infinity, -1, -1, -60],
      cuSeqlens: [0, 1, 2, 3, 4],
    }
    for (const level of ['token', 'sequence', 'geometric'] as const)
      for (const mode of ['truncate', 'mask', 'none'] as const) {
        const got = recorded(b, `infinite ratios ${level} ${mode}`, bound, () =>
          run(a, { level, mode, reject: [{ measure: 'k3', over: 'mean', high: 30 }] }),
        )
        const r = [Math.exp(20), Math.exp(-20), 1, Math.exp(20)]
        const kept = [0, 1, 1, 0]
        const cut = mode === 'truncate' ? 2 : 0
        const expected = r.map((x, t) => (kept[t] ? (x > 2 && mode !== 'none' ? cut : x) : 0))
        expectClose(await got.importanceWeights.read(), expected, bound)
        expect(Array.from(await got.mask.read())).toEqual(kept)
      }
  })

  test('nothing kept: 0', async () => {
    const nan = [NaN, NaN, NaN]
    for (const level of ['token', 'geometric'] as const) {
      const o = {
        level,
        normalize: true,
        reject: [{ measure: 'k1', over: 'max', high: 0 }],
      } as const
      const a = { logProbs: nan, rolloutLogProbs: nan, mask: [0, 0, 0], cuSeqlens: [0, 2, 2, 3] }
      const got = run(a, o)
      expect(Array.from(await got.importanceWeights.read())).toEqual([0, 0, 0])
      expect(Array.from(await got.mask.read())).toEqual([0, 0, 0])
      expect(await got.metrics()).toEqual(noMetrics)
      const none = run({ logProbs: [], rolloutLogProbs: [], cuSeqlens: [0, 0] }, o)
      expect(none.importanceWeights.shape).toEqual([0])
      expect(await none.metrics()).toEqual(noMetrics)
    }
  })

  test('masked tokens are ignored, NaN too', async () => {
    const a = batch(5)
    const poison = (x: Numbers) => Float32Array.from(x, (v, t) => (a.mask[t] ? v : NaN))
    const poisoned = {
      ...a,
      logProbs: poison(a.logProbs),
      rolloutLogProbs: poison(a.rolloutLogProbs),
    }
    for (const level of ['token', 'sequence', 'geometric'] as const) {
      const reject = [{ measure: 'k2', over: 'max', high: 0.2 }] as const
      const one = run(a, { level, reject })
      const two = run(poisoned, { level, reject })
      expect(await two.importanceWeights.read()).toEqual(await one.importanceWeights.read())
      expect(await two.mask.read()).toEqual(await one.mask.read())
      expect(await two.metrics()).toEqual(await one.metrics())
    }
  })

  test('its results are those that the loss takes', async () => {
    const a = batch(7)
    const [logProbs, rollout] = [f32(a.logProbs), f32(a.rolloutLogProbs)]
    const { cuSeqlens } = a
    using c = rolloutCorrection({ logProbs, rolloutLogProbs: rollout, cuSeqlens })
    const { importanceWeights, mask } = c
    const loss = policyLoss({
      logProbs,
      advantages: f32(a.advantages),
      cuSeqlens,
      importanceWeights,
      mask,
    })
    expect((await loss.metrics()).tokens).toBe(logProbs.size)
  })

  test('a mask with values other than 0 and 1 faults', async () => {
    const a = { logProbs: [-1, -2], rolloutLogProbs: [-1, -2], mask: [1, 2], cuSeqlens: [0, 2] }
    const got = recorded(b, 'rollout correction of a bad mask', bound, () => run(a, {}))
    const fault = { code: 'ERR_VALUE', op: 'rolloutCorrection' }
    await expect(got.importanceWeights.read()).rejects.toMatchObject(fault)
    await expect(got.mask.read()).rejects.toMatchObject(fault)
    await expect(got.metrics()).rejects.toMatchObject(fault)
    await b.device.synchronize()
  })

  test('refuses invalid arguments', () =>
    scope(() => {
      const logProbs = f32([-1, -2, -3])
      const a = { logProbs, rolloutLogProbs: logProbs, cuSeqlens: [0, 2, 3] }
      const refuses = (extra: object, code: string, message?: RegExp) =>
        expectRefusal(
          () => rolloutCorrection({ ...a, ...extra } as never),
          code,
          'rolloutCorrection',
          message,
        )
      refuses({ rolloutLogProbs: f32([1]) }, 'ERR_SHAPE', /rolloutLogProbs/)
      refuses({ cuSeqlens: [0, 2] }, 'ERR_VALUE', /cuSeqlens/)
      refuses({ mask: f32([1, 1, 1]) }, 'ERR_DTYPE', /mask/)
      refuses({ level: 'batch' }, 'ERR_VALUE', /'token', 'sequence' or 'geometric', got 'batch'/)
      refuses({ mode: 'clip' }, 'ERR_VALUE', /mode/)
      refuses({ high: 0 }, 'ERR_VALUE', /high/)
      refuses({ low: 3 }, 'ERR_VALUE', /low/)
      refuses({ normalize: 1 }, 'ERR_VALUE', /normalize/)
      refuses({ reject: {} }, 'ERR_VALUE', /reject/)
      const rule = { measure: 'k1', over: 'token' }
      refuses({ reject: [{ ...rule, measure: 'k4' }] }, 'ERR_VALUE', /reject\[0\]\.measure/)
      refuses({ reject: [rule, { ...rule, over: 'all' }] }, 'ERR_VALUE', /reject\[1\]\.over/)
      refuses({ reject: [{ ...rule, low: 1, high: 0 }] }, 'ERR_VALUE', /low <= high/)
      refuses({ reject: Array(9).fill(rule) }, 'ERR_VALUE', /at most 8 rules, got 9/)
      refuses({ maxDivergence: 1 }, 'ERR_VALUE', /advantages/)
      refuses({ advantages: f32([1]) }, 'ERR_SHAPE', /advantages/)
    }))
})
