import {
  applyKlPenalty,
  type LossAggregation,
  type LossMetrics,
  type PolicyLossOptions,
  policyLoss,
  scope,
  type Tensor,
  trlDefaults,
} from 'p2r-kernels'
import { expect, test } from 'vitest'
import { type GrpoCase, grpoCases } from './golden.js'
import {
  expectClose,
  expectGradient,
  expectRefusal,
  onEveryBackend,
  Random,
  recorded,
} from './harness.js'

type Numbers = ArrayLike<number>
interface Data {
  logProbs: Numbers
  oldLogProbs?: Numbers
  refLogProbs?: Numbers
  entropy?: Numbers
  importanceWeights?: Numbers
  advantages: Numbers
  mask?: Numbers
  groups?: readonly number[]
  cuSeqlens: number[]
}

const noMetrics: LossMetrics = {
  loss: 0,
  policyLoss: 0,
  kl: 0,
  entropy: 0,
  clipFraction: 0,
  clipFractionLower: 0,
  approxKl: 0,
  ratioMean: 0,
  tokens: 0,
}

const objectives = [
  'ppo',
  'gspo',
  'cispo',
  'sapo',
  'gpg',
  'dppo_tv',
  'dppo_kl',
  'gmpo',
  'vespo',
  'luspo',
  'clip_cov',
  'kl_cov',
] as const

const clamp = (x: number, low: number, high: number): number => Math.min(Math.max(x, low), high)
const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x))

type Objective = NonNullable<PolicyLossOptions['objective']>

const ofSequences = ['gspo', 'luspo', 'gmpo', 'vespo']
const aggregationOf: { [o in Objective]?: LossAggregation } = {
  gspo: 'seq-mean-token-mean',
  gmpo: 'seq-mean-token-mean',
  sapo: 'seq-mean-token-mean',
  luspo: 'seq-mean-token-sum',
}

// The divergence of a Bernoulli variable that says whether the token was drawn.
function binaryKl(logQ: number, logP: number): number {
  const [q, p] = [Math.exp(logQ), Math.exp(logP)]
  return (q > 0 ? q * (logQ - logP) : 0) + (1 - q) * Math.log((1 - q + 1e-8) / (1 - p + 1e-8))
}

// Where a token stands in clip_cov's draw, the highest first: a bijection of 32-bit numbers.
function randomKey(seed: number, token: number): number {
  const scrambled = (x: number): number => {
    let y = Math.imul(x ^ (x >>> 16), 0x85ebca6b)
    y = Math.imul(y ^ (y >>> 13), 0xc2b2ae35)
    return y ^ (y >>> 16)
  }
  const [low, high] = [seed % 2 ** 32, Math.floor(seed / 2 ** 32)]
  return scrambled((scrambled(scrambled(token) ^ low) + high) | 0) >>> 0
}

// The tokens that clip_cov and kl_cov choose.
function chosenOf(a: Data, o: PolicyLossOptions, held: Numbers, perToken: boolean): Set<number> {
  const { cuSeqlens: c, mask } = a
  const kept = c.slice(1).flatMap((end, i) =>
    Array.from({ length: end - c[i]! }, (_, k) => c[i]! + k)
      .filter((t) => !mask || mask[t])
      .map((t) => ({ t, A: a.advantages[perToken ? t : i]! })),
  )
  const mean = (f: (x: { t: number; A: number }) => number): number =>
    kept.reduce((s, x) => s + f(x), 0) / kept.length
  const [meanA, meanP] = [mean(({ A }) => A), mean(({ t }) => held[t]!)]
  const n = Math.max(1, Math.floor((o.covRatio ?? 2e-4) * kept.length))
  const ranked = kept
    .map(({ t, A }) => ({ t, A, C: (A - meanA) * (held[t]! - meanP) }))
    .filter(({ t, A, C }) => {
      if (o.objective === 'kl_cov') return !Number.isNaN(C)
      const r = Math.exp(a.oldLogProbs ? clamp(held[t]! - a.oldLogProbs[t]!, -20, 20) : 0)
      if (-A * clamp(r, 1 - (o.clipLow ?? 0.2), 1 + (o.clipHigh ?? 0.2)) > -A * r) return false
      return C > (o.covLow ?? 1) && C < (o.covHigh ?? 5)
    })
    .map(({ t, C }) => ({ t, key: o.objective === 'kl_cov' ? C : randomKey(o.covSeed ?? 0, t) }))
    .sort((x, y) => y.key - x.key || x.t - y.t)
  return new Set(ranked.slice(0, n).map(({ t }) => t))
}

// From the definitions, token by token in float64. `held` gives the log-probs whose gradient cispo, dppo
// and vespo stop, and by which clip_cov and kl_cov choose.
function oracle(a: Data, o: PolicyLossOptions, held: Numbers = a.logProbs) {
  const { cuSeqlens: c, mask } = a
  const B = c.length - 1
  const objective = o.objective ?? 'ppo'
  const kl = o.kl ?? (a.refLogProbs ? 'k3' : 'none')
  const [low, high] = [1 - (o.clipLow ?? 0.2), 1 + (o.clipHigh ?? 0.2)]
  const klCoef = o.klCoef ?? 0.01
  const entropyCoef = o.entropyCoef ?? 0
  const delta = o.delta ?? (objective.startsWith('dppo') ? 20 : false)
  const most = (r: number): number => (delta === false ? r : Math.min(r, delta))
  const aggregation = o.aggregation ?? aggregationOf[objective] ?? 'token-mean'
  const terms = o.termAggregation ?? o.aggregation ?? 'token-mean'
  const perToken = o.advantagesPer ? o.advantagesPer === 'token' : a.advantages.length !== B
  const sequences = Array.from({ length: B }, (_, i) => {
    const kept: number[] = []
    for (let t = c[i]!; t < c[i + 1]!; t++) if (!mask || mask[t]) kept.push(t)
    return kept
  })
  const tokens = sequences.reduce((n, s) => n + s.length, 0)
  const rows = o.emptyRows === 'count' ? B : sequences.filter((s) => s.length).length
  const group = (i: number): number => a.groups?.[i] ?? i
  const keptOf = (g: number): number =>
    sequences.reduce((n, s, i) => n + (group(i) === g ? s.length : 0), 0)
  const prompts = new Set(
    sequences.map((_, i) => group(i)).filter((g) => o.emptyRows === 'count' || keptOf(g) > 0),
  ).size
  const chosen = objective.endsWith('_cov') ? chosenOf(a, o, held, perToken) : new Set()
  const quantile = o.topEntropyQuantile ?? 1
  const entropies = sequences.flat().map((t) => a.entropy?.[t] ?? 0)
  const sorted = entropies.toSorted((x, y) => x - y)
  const leastEntropy = sorted[Math.ceil((1 - quantile) * (tokens - 1) - 1e-9)]!
  const longest = Math.max(1, ...c.slice(1).map((end, i) => end - c[i]!))
  const weight = (how: string, kept: number, i: number): number => {
    const same = (how === 'token-mean') === (aggregation === 'token-mean')
    const given = same ? o.normalizer : undefined
    if (how === 'token-sum') return 1
    if (how === 'token-mean') return 1 / (given ?? tokens)
    if (how === 'prompt-mean') return 1 / ((given ?? prompts) * keptOf(group(i)))
    const s = given ?? rows
    if (how === 'seq-mean-token-sum') return 1 / s
    if (how === 'seq-mean-token-mean') return 1 / (s * kept)
    return 1 / (s * (o.lossScale ?? longest))
  }
  const out = { ...noMetrics, tokens }
  const dLogProbs = new Float64Array(a.logProbs.length)
  const dEntropy = new Float64Array(a.logProbs.length)
  let size = 0 // the sum of the terms' sizes, by which rounding errors are to be judged
  sequences.forEach((kept, i) => {
    const step = (t: number): number => (a.oldLogProbs ? a.logProbs[t]! - a.oldLogProbs[t]! : 0)
    const heldStep = (t: number): number => (a.oldLogProbs ? held[t]! - a.oldLogProbs[t]! : 0)
    // Of gspo and gmpo the mean of the log-ratios, of vespo their sum with the weights'.
    const mean =
      kept.reduce((s, t) => {
        const A = a.advantages[perToken ? t : i]!
        if (objective !== 'gmpo') return s + step(t)
        if (A === 0) return s
        return (
          s +
          (A > 0 ? Math.min(step(t), o.clipHigh ?? 0.2) : Math.max(step(t), -(o.clipLow ?? 0.2)))
        )
      }, 0) / kept.length
    const least = Math.log(1e-8)
    const sum = clamp(
      kept.reduce((s, t) => {
        const w = a.importanceWeights?.[t] ?? 1
        return s + clamp(heldStep(t), -20, 20) + clamp(Math.log(w), least, 20)
      }, 0),
      least,
      20,
    )
    const phi = (A: number): number => {
      const k = A < 0 ? (o.vespoKNegative ?? 3) : (o.vespoKPositive ?? 2)
      const lambda = A < 0 ? (o.vespoLambdaNegative ?? 2) : (o.vespoLambdaPositive ?? 3)
      return Math.exp(lambda + k * sum - lambda * Math.exp(sum))
    }
    for (const t of kept) {
      const w = weight(aggregation, kept.length, i)
      const v = weight(terms, kept.length, i)
      const A = a.advantages[perToken ? t : i]!
      const is = objective === 'vespo' ? 1 : (a.importanceWeights?.[t] ?? 1)
      const d = clamp(step(t), -20, 20)
      let inside = Math.abs(step(t)) <= 20
      let r = Math.exp(d)
      if (objective === 'gspo' || objective === 'luspo' || objective === 'gmpo') {
        r = Math.exp(clamp(mean, -20, 10))
        inside = mean <= 10 && mean >= -20
      }
      let value = 0
      let slope = 0
      let clipped = false
      let lower = false
      const now = Math.exp(clamp(heldStep(t), -20, 20))
      if (objective === 'ppo' || objective === 'gspo' || objective === 'luspo') {
        const bounded = -A * clamp(r, low, high)
        clipped = bounded > -A * most(r)
        value = Math.max(-A * most(r), bounded)
        const dual = objective === 'ppo' ? (o.dualClip ?? 3) : false
        if (dual !== false && A < 0 && value > -A * dual) {
          value = -A * dual
          lower = true
        }
        if (inside && !clipped && most(r) !== r) lower = true
        slope = inside && !clipped && !lower ? -A * r : 0
      } else if (objective === 'dppo_tv' || objective === 'dppo_kl') {
        const logQ = a.oldLogProbs?.[t] ?? held[t]!
        const moved = Math.exp(held[t]!) - Math.exp(logQ)
        const far = objective === 'dppo_tv' ? Math.abs(moved) : binaryKl(logQ, held[t]!)
        clipped =
          A > 0 ? moved > 0 && far > (o.clipHigh ?? 0.2) : moved < 0 && far > (o.clipLow ?? 0.2)
        lower = !clipped && now > most(now)
        slope = clipped ? 0 : -A * most(now)
        value = clipped ? 0 : slope * a.logProbs[t]!
      } else if (objective === 'clip_cov') {
        clipped = -A * clamp(r, low, high) > -A * r
        lower = chosen.has(t)
        value = lower ? 0 : Math.max(-A * r, -A * clamp(r, low, high))
        slope = inside && !clipped && !lower ? -A * r : 0
      } else if (objective === 'kl_cov') {
        lower = chosen.has(t)
        const penalty = lower ? (o.covKlCoef ?? 1) : 0
        value = -A * r + penalty * Math.abs(d)
        slope = inside ? -A * r + penalty * Math.sign(d) : 0
      } else if (objective === 'gmpo') {
        clipped = A > 0 && step(t) > (o.clipHigh ?? 0.2)
        lower = A < 0 && step(t) < -(o.clipLow ?? 0.2)
        value = -A * r
        slope = inside && !clipped && !lower ? value : 0
      } else if (objective === 'vespo') {
        slope = -A * phi(A)
        value = slope * a.logProbs[t]!
      } else if (objective === 'cispo') {
        clipped = clamp(now, low, high) !== now
        slope = -A * clamp(now, low, high)
        value = slope * a.logProbs[t]!
      } else if (objective === 'sapo') {
        const tau = A > 0 ? (o.tauPositive ?? 1) : (o.tauNegative ?? 1.05)
        const gate = sigmoid(tau * (r - 1))
        value = (-A * gate * 4) / tau
        slope = inside ? -A * 4 * gate * (1 - gate) * r : 0
      } else {
        slope = -A
        value = -A * a.logProbs[t]!
      }
      if (quantile < 1 && a.entropy![t]! < leastEntropy) value = slope = 0
      out.policyLoss += w * is * value
      dLogProbs[t] = w * is * slope
      size += Math.abs(w * is * value)
      if (kl !== 'none') {
        const x = a.refLogProbs![t]! - a.logProbs[t]!
        let [k, g] = [-x, 1]
        if (kl === 'abs') [k, g] = [Math.abs(x), -Math.sign(x)]
        if (kl === 'k2') [k, g] = [(x * x) / 2, -x]
        if (kl === 'k1+') [k, g] = [-x, -x]
        if (kl === 'k3' || kl === 'k3+') {
          const limit = o.klClamp ?? 10
          const at = limit === false ? x : clamp(x, -20, 20)
          k = Math.expm1(at) - at
          g = -Math.expm1(at)
          if (limit !== false && k > limit) [k, g] = [limit, 0]
          if (kl === 'k3+') g = -x
        }
        if (o.klUnbiased) {
          const ratio = Math.exp(d)
          ;[k, g] = [k * ratio, ratio * (g + (Math.abs(step(t)) <= 20 ? k : 0))]
        }
        out.kl += v * k
        dLogProbs[t]! += klCoef * v * g
        size += Math.abs(klCoef * v * k)
      }
      if (a.entropy) out.entropy += v * a.entropy[t]!
      dEntropy[t] = -entropyCoef * v
      out.clipFraction += +clipped / tokens
      out.clipFractionLower += +lower / tokens
      out.approxKl -= d / tokens
      out.ratioMean += r / tokens
    }
  })
  size += Math.abs(entropyCoef * out.entropy)
  out.loss =
    out.policyLoss + (klCoef ? klCoef * out.kl : 0) - (entropyCoef ? entropyCoef * out.entropy : 0)
  return { metrics: out, dLogProbs, dEntropy, size }
}

// Log-ratios are differences of f32 numbers, exact or good to one rounding; the exponential has 2 ulp, and
// a term some five roundings: 1e-6 of it, and so of the sum of the terms' sizes. Gradients likewise, with
// a large step (|d| up to 20) costing what its rounding does to e^d.
const relative = 3e-6

onEveryBackend('policy_loss', (b) => {
  const f32 = (x: Numbers): Tensor => b.device.tensor(Float32Array.from(x), [x.length])
  const run = (a: Data, o: PolicyLossOptions) =>
    policyLoss({
      logProbs: f32(a.logProbs),
      advantages: f32(a.advantages),
      cuSeqlens: a.cuSeqlens,
      ...(a.oldLogProbs ? { oldLogProbs: f32(a.oldLogProbs) } : {}),
      ...(a.refLogProbs ? { refLogProbs: f32(a.refLogProbs) } : {}),
      ...(a.entropy ? { entropy: f32(a.entropy) } : {}),
      ...(a.importanceWeights ? { importanceWeights: f32(a.importanceWeights) } : {}),
      ...(a.groups ? { groups: a.groups } : {}),
      ...(a.mask ? { mask: b.device.tensor(Uint8Array.from(a.mask), [a.mask.length]) } : {}),
      ...o,
    })

  const expectLoss = async (
    got: ReturnType<typeof policyLoss>,
    expected: ReturnType<typeof oracle>,
    slack = 1,
  ) => {
    const { metrics, dLogProbs, dEntropy, size } = expected
    const absolute = slack * relative * size + 1e-12
    const m = await got.metrics()
    const [loss] = await got.loss.read()
    expect(loss).toBe(m.loss)
    expectClose([m.loss, m.policyLoss], [metrics.loss, metrics.policyLoss], { absolute })
    const bound = { absolute: 1e-7 * slack, relative: slack * relative }
    const means = [metrics.kl, metrics.entropy, metrics.approxKl, metrics.ratioMean]
    expectClose([m.kl, m.entropy, m.approxKl, m.ratioMean], means, {
      ...bound,
      absolute: 2e-7 * slack * (1 + Math.abs(metrics.ratioMean)),
    })
    expectClose(
      [m.clipFraction, m.clipFractionLower],
      [metrics.clipFraction, metrics.clipFractionLower],
      { absolute: 1e-6 },
    )
    expect(m.tokens).toBe(metrics.tokens)
    const gradient = { relative: slack * 1e-5, ofLargest: slack * relative, absolute: 1e-30 }
    expectClose(await got.dLogProbs.read(), dLogProbs, gradient)
    if (got.dEntropy) expectClose(await got.dEntropy.read(), dEntropy, gradient)
  }

  // Ragged sequences, some without a token, one longer than a run of the kernel.
  const batch = (seed: number, longest = 90, spread = 0.4): Required<Data> => {
    const random = new Random(seed)
    const lengths = [3, 0, 17, 1, longest, 40, 5]
    const cuSeqlens = [0]
    for (const n of lengths) cuSeqlens.push(cuSeqlens.at(-1)! + n)
    const T = cuSeqlens.at(-1)!
    const logProbs = Float32Array.from({ length: T }, () => -3 * random.uniform())
    const near = () => Float32Array.from(logProbs, (x) => x + random.normal(spread))
    const mask = Uint8Array.from({ length: T }, () => +(random.uniform() < 0.8))
    mask.fill(0, cuSeqlens[3], cuSeqlens[4]) // a sequence that lost all of its tokens
    return {
      logProbs,
      oldLogProbs: near(),
      refLogProbs: near(),
      entropy: Float32Array.from({ length: T }, () => 5 * random.uniform()),
      importanceWeights: Float32Array.from({ length: T }, () => 2 * random.uniform()),
      advantages: random.normals(lengths.length),
      mask,
      groups: [7, 9, 7, -3, 9, 9, 4],
      cuSeqlens,
    }
  }

  const aggregations = [
    'token-mean',
    'seq-mean-token-sum',
    'seq-mean-token-mean',
    'seq-mean-token-sum-norm',
    'token-sum',
    'prompt-mean',
  ] as const
  const variants: [string, PolicyLossOptions][] = [
    ...objectives.map((objective): [string, PolicyLossOptions] => [objective, { objective }]),
    ...aggregations.map((aggregation): [string, PolicyLossOptions] => [
      aggregation,
      { aggregation },
    ]),
    ...(['none', 'k1', 'k2', 'k3', 'abs', 'k1+', 'k3+'] as const).flatMap(
      (kl): [string, PolicyLossOptions][] => [
        [`kl ${kl}`, { kl, klCoef: 0.3 }],
        [`kl ${kl} times the ratio`, { kl, klCoef: 0.3, klUnbiased: true }],
      ],
    ),
    ['ppo with delta', { delta: 1.3, dualClip: false, clipHigh: 0.4 }],
    ['ppo with delta below the clip', { delta: 1.1 }],
    ['gspo with delta', { objective: 'gspo', delta: 1.02 }],
    ['dppo_tv with delta', { objective: 'dppo_tv', delta: 1.1, clipLow: 0.05, clipHigh: 0.1 }],
    ['dppo_kl with delta', { objective: 'dppo_kl', delta: 1.1, clipLow: 0.02, clipHigh: 0.01 }],
    [
      'clip_cov of many',
      { objective: 'clip_cov', covRatio: 0.1, covLow: 0.1, covSeed: 2 ** 40 + 3 },
    ],
    ['clip_cov of all candidates', { objective: 'clip_cov', covRatio: 1, covLow: 0, covHigh: 0.5 }],
    ['kl_cov of many', { objective: 'kl_cov', covRatio: 0.2, covKlCoef: 0.4 }],
    ['kl_cov of all', { objective: 'kl_cov', covRatio: 1 }],
    ['top entropies', { topEntropyQuantile: 0.2, entropyCoef: 0.1, kl: 'k3' }],
    ['top entropies of gspo', { objective: 'gspo', topEntropyQuantile: 0.5 }],
    ['top entropies of clip_cov', { objective: 'clip_cov', topEntropyQuantile: 0.3, covLow: 0.1 }],
    ['top entropy, one token', { topEntropyQuantile: 1e-9 }],
    ['prompt means, counting empty', { aggregation: 'prompt-mean', emptyRows: 'count' }],
    ['prompt means of the terms', { termAggregation: 'prompt-mean', normalizer: 9, klCoef: 0.5 }],
    ['prompt means, normalizer', { aggregation: 'prompt-mean', normalizer: 9 }],
    ['gmpo wider', { objective: 'gmpo', clipLow: 0.4, clipHigh: 0.4 }],
    [
      'vespo of other weights',
      {
        objective: 'vespo',
        vespoKPositive: 1,
        vespoLambdaPositive: 0.5,
        vespoKNegative: 0.5,
        vespoLambdaNegative: 1,
      },
    ],
    ['count empty', { aggregation: 'seq-mean-token-mean', emptyRows: 'count' }],
    [
      'terms apart',
      { aggregation: 'seq-mean-token-sum', termAggregation: 'token-mean', normalizer: 9.5 },
    ],
    ['gspo normalizer', { objective: 'gspo', normalizer: 12 }],
    ['loss scale', { aggregation: 'seq-mean-token-sum-norm', lossScale: 64 }],
    ['clips', { clipLow: 0.05, clipHigh: 0.4, dualClip: 1.2, entropyCoef: 0.02 }],
    ['no bounds', { dualClip: false, klClamp: false }],
    ['trl', trlDefaults],
    ['gates', { objective: 'sapo', tauPositive: 2, tauNegative: 3, aggregation: 'token-mean' }],
  ]
  for (const [title, o] of variants)
    test(title, async () => {
      const a = batch(title.length, 90)
      const bound = { absolute: 1e-6, relative: 1e-5, ofLargest: relative }
      const got = recorded(b, `policy loss ${title}`, bound, () => run(a, o))
      await expectLoss(got, oracle(a, o))
      got.dispose()
    })

  test('advantages a token, no mask, on-policy, several runs', async () => {
    const { logProbs, cuSeqlens, refLogProbs } = batch(3, 5000)
    const advantages = new Random(8).normals(logProbs.length)
    await expectLoss(
      run({ logProbs, cuSeqlens, advantages }, {}),
      oracle({ logProbs, cuSeqlens, advantages }, {}),
    )
    const a = { logProbs, cuSeqlens, refLogProbs, advantages: advantages.subarray(0, 7) }
    const got = run(a, {})
    await expectLoss(got, oracle(a, {}))
    expect((await got.metrics()).ratioMean).toBe(1)
  })

  test('k3 is accurate for small log-ratios', async () => {
    const logProbs = new Float32Array(64).fill(-0.125)
    const refLogProbs = Float32Array.from(logProbs, (x, i) => x + (i - 32) * 2 ** -16)
    const a = { logProbs, refLogProbs, advantages: [0], cuSeqlens: [0, 64] }
    const { metrics } = oracle(a, {})
    expectClose([(await run(a, {}).metrics()).kl], [metrics.kl], { relative: 1e-6 })
  })

  for (const objective of objectives)
    for (const kl of ['k1', 'k2', 'k3', 'k3 times the ratio'] as const)
      test(`the gradient of ${objective} with ${kl} matches finite differences`, async () => {
        // That of objectives of sequences is the derivative where the weighted advantage is constant.
        const { importanceWeights, ...plain } = batch(11, 20)
        const a = ofSequences.includes(objective) ? plain : { ...plain, importanceWeights }
        const o = {
          objective,
          kl: kl === 'k3 times the ratio' ? ('k3' as const) : kl,
          klUnbiased: kl === 'k3 times the ratio',
          klCoef: 0.2,
          entropyCoef: 0.1,
          advantagesPer: 'sequence',
        } as const
        const got = run(a, o)
        const f = (x: Float64Array) => oracle({ ...a, logProbs: x }, o, a.logProbs).metrics.loss
        const bound = { absolute: 2e-7, relative: 1e-5, step: 1e-6, entries: 80 }
        expectGradient(f, a.logProbs, await got.dLogProbs.read(), bound)
        const g = (x: Float64Array) => oracle({ ...a, entropy: x }, o).metrics.loss
        expectGradient(g, a.entropy, await got.dEntropy!.read(), bound)
      })

  // ------------------------------------------------------------------ the reference's numbers

  function fromGolden(c: GrpoCase): PolicyLossOptions {
    const p = c.params
    if (c.convention === 'trl') {
      const terms = p.beta ? { klCoef: p.beta } : { kl: 'none' as const }
      const common = { ...trlDefaults, ...terms, clipLow: p.eps_low, clipHigh: p.eps_high }
      if (p.level === 'sequence') return { ...common, objective: 'gspo' }
      switch (p.loss_type) {
        case 'bnpo':
        case 'dapo':
          return { ...common, aggregation: 'token-mean', delta: p.delta ?? false }
        case 'dr_grpo':
          return {
            ...common,
            aggregation: 'seq-mean-token-sum-norm',
            lossScale: p.max_completion_length,
          }
        case 'cispo': // min(r, eps_high), without a lower bound
          return {
            ...common,
            objective: 'cispo',
            aggregation: 'token-mean',
            clipLow: 1,
            clipHigh: p.eps_high - 1,
          }
        case 'sapo':
          return { ...common, objective: 'sapo' }
        default:
          return common
      }
    }
    const objectives = {
      vanilla: 'ppo',
      gspo: 'gspo',
      cispo: 'cispo',
      sapo: 'sapo',
      gpg: 'gpg',
      dppo_tv: 'dppo_tv',
      dppo_kl: 'dppo_kl',
    } as const
    const objective = objectives[p.loss_mode as keyof typeof objectives]
    const kl = p.kl_type === 'low_var_kl' ? 'k3' : p.kl_type
    const fixed = objective === 'gspo' || objective === 'sapo'
    const count = p.agg === 'token-mean' ? p.batch_num_tokens : p.global_batch_size
    return {
      objective,
      aggregation: fixed ? 'seq-mean-token-mean' : p.agg,
      termAggregation: p.agg,
      ...(p.clip_low === undefined ? {} : { clipLow: p.clip_low, clipHigh: p.clip_high }),
      ...(p.clip_c === undefined ? {} : { dualClip: p.clip_c }),
      ...(kl ? { kl, klCoef: p.kl_coef } : {}),
      ...(p.entropy_coef ? { entropyCoef: p.entropy_coef } : {}),
      ...(count ? { normalizer: count / (p.dp_size ?? 1) } : {}),
      lossScale: p.loss_scale_factor ?? c.input('logp').shape[1],
    }
  }

  for (const c of grpoCases('policy_loss')) {
    const options = fromGolden(c)
    for (const packed of [false, true])
      test(`golden ${c.group}.${c.id}, ${packed ? 'packed' : 'whole'}`, async () => {
        const [B, T] = c.input('logp').shape as [number, number]
        const mask = c.input('mask').values
        // The places of the padded batch that are handed over: all, or rows up to their last kept token.
        const places: number[] = []
        const cuSeqlens = [0]
        for (let i = 0; i < B; i++) {
          let end = T
          while (packed && end > 0 && !mask[i * T + end - 1]) end--
          for (let t = 0; t < end; t++) places.push(i * T + t)
          cuSeqlens.push(places.length)
        }
        const take = (name: string): Float64Array => {
          const { values } = c.input(name)
          return Float64Array.from(places, (at) => values[at]!)
        }
        const single = c.input('advantages').shape.length === 1
        const a: Data = {
          logProbs: take('logp'),
          oldLogProbs: take('old_logp'),
          advantages: single ? c.input('advantages').values : take('advantages'),
          mask: take('mask'),
          cuSeqlens,
          ...(c.has('ref_logp') ? { refLogProbs: take('ref_logp') } : {}),
          ...(c.has('entropy') ? { entropy: take('entropy') } : {}),
          ...(c.has('is_weights') ? { importanceWeights: take('is_weights') } : {}),
        }
        const o = { ...options, advantagesPer: single ? ('sequence' as const) : ('token' as const) }
        // The test's own formulas against the reference, in float64; its means have a count + 1e-8 below.
        const exact = oracle(a, o)
        const s = c.scalars
        const fine = { absolute: 1e-8 * (exact.size + 1) }
        const dLogProbs = Float64Array.from(places, (at) => c.output('d_logp').values[at]!)
        expectClose([exact.metrics.loss], [s.loss!], fine)
        expectClose(exact.dLogProbs, dLogProbs, { relative: 1e-7, ofLargest: 1e-8 })
        // And the kernel, whose inputs are rounded to f32, which moves a log-ratio by some 2e-7.
        const bound = { absolute: 1e-6, relative: 2e-5, ofLargest: 1e-5 }
        const got = recorded(b, `golden ${c.group}.${c.id} ${packed}`, bound, () => run(a, o))
        await expectLoss(got, exact, 3)
        const m = await got.metrics()
        const loose = { absolute: 1e-6, relative: 1e-5 }
        if (s.pg_loss !== undefined)
          expectClose([m.policyLoss], [s.pg_loss], { absolute: 1e-5 * exact.size })
        if (s.kl_loss !== undefined) expectClose([m.kl], [s.kl_loss], loose)
        if (s.entropy_loss !== undefined) expectClose([m.entropy], [s.entropy_loss], loose)
        if (s.ppo_kl !== undefined) expectClose([m.approxKl], [s.ppo_kl], loose)
        if (s.pg_clipfrac !== undefined) expectClose([m.clipFraction], [s.pg_clipfrac], loose)
        if (s.pg_clipfrac_lower !== undefined)
          expectClose([m.clipFractionLower], [s.pg_clipfrac_lower], loose)
        expectClose(await got.dLogProbs.read(), dLogProbs, { relative: 2e-5, ofLargest: 1e-5 })
        if (c.has('d_entropy')) {
          const { values } = c.output('d_entropy')
          const dEntropy = places.map((at) => values[at]!)
          expectClose(await got.dEntropy!.read(), dEntropy, { relative: 1e-6 })
        }
      })
  }

  for (const c of grpoCases('kl')) {
    const uncapped = c.params.kl_type === 'k3_uncapped'
    const kl = uncapped ? 'k3' : c.params.kl_type
    test(`golden kl ${c.id}`, async () => {
      // One sequence a token shows each token's value as a loss of its own.
      const logProbs = c.input('logp').values
      const n = logProbs.length
      const a = {
        logProbs,
        refLogProbs: c.input('ref_logp').values,
        advantages: new Float32Array(1),
        cuSeqlens: [0, n],
      }
      const o = {
        kl,
        klCoef: 1,
        aggregation: 'seq-mean-token-sum' as const,
        klClamp: uncapped ? (false as const) : 10,
      }
      const got = run(a, o)
      // e^x of an x of 22 that was rounded to f32 twice: 4e-6.
      expectClose(await got.dLogProbs.read(), c.output('d_logp').values, {
        relative: 1e-5,
        absolute: 2e-6,
      })
      for (let t = 0; t < n; t += 5) {
        const one = run(
          { ...a, logProbs: [logProbs[t]!], refLogProbs: [a.refLogProbs[t]!], cuSeqlens: [0, 1] },
          o,
        )
        expectClose([(await one.metrics()).kl], [c.output('kl').values[t]!], {
          relative: 1e-5,
          absolute: 1e-6,
        })
        one.dispose()
      }
    })
  }

  // ------------------------------------------------------------------ edges

  test('masked tokens are ignored, NaN too', async () => {
    const a = batch(5)
    const plain = run(a, { entropyCoef: 0.1 })
    const poison = (x: Numbers) => Float32Array.from(x, (v, t) => (a.mask[t] ? v : NaN))
    const poisoned = {
      ...a,
      logProbs: poison(a.logProbs),
      oldLogProbs: poison(a.oldLogProbs),
      refLogProbs: poison(a.refLogProbs),
      entropy: poison(a.entropy),
      importanceWeights: poison(a.importanceWeights),
    }
    for (const objective of objectives) {
      const one = run(a, { objective, entropyCoef: 0.1 })
      const two = run(poisoned, { objective, entropyCoef: 0.1 })
      expect(await two.loss.read()).toEqual(await one.loss.read())
      expect(await two.dLogProbs.read()).toEqual(await one.dLogProbs.read())
      expect(await two.dEntropy!.read()).toEqual(await one.dEntropy!.read())
      expect(await two.metrics()).toEqual(await one.metrics())
    }
    plain.dispose()
    const kept = run({ ...a, mask: Array.from(a.mask, () => 1), logProbs: poison(a.logProbs) }, {})
    expect((await kept.loss.read())[0]).toBeNaN()
  })

  for (const aggregation of aggregations)
    test(`nothing kept: 0, ${aggregation}`, async () => {
      for (const emptyRows of ['skip', 'count'] as const) {
        const nan = [NaN, NaN, NaN]
        const all = {
          logProbs: nan,
          oldLogProbs: nan,
          refLogProbs: nan,
          entropy: nan,
          advantages: [1, 1],
          mask: [0, 0, 0],
          groups: [0, 0],
          cuSeqlens: [0, 2, 3],
        }
        for (const objective of ['ppo', 'clip_cov', 'kl_cov'] as const) {
          const o = { objective, aggregation, emptyRows, entropyCoef: 1, topEntropyQuantile: 0.2 }
          const got = run(all, o)
          expect(Array.from(await got.loss.read())).toEqual([0])
          expect(Array.from(await got.dLogProbs.read())).toEqual([0, 0, 0])
          expect(Array.from(await got.dEntropy!.read())).toEqual([0, 0, 0])
          expect(await got.metrics()).toEqual(noMetrics)
        }
        for (const cuSeqlens of [[0], [0, 0, 0]]) {
          const groups = cuSeqlens.slice(1)
          const none = run(
            { logProbs: [], advantages: groups.map(() => 1), groups, cuSeqlens },
            { aggregation, emptyRows },
          )
          expect(Array.from(await none.loss.read())).toEqual([0])
          expect(none.dLogProbs.shape).toEqual([0])
          expect(await none.metrics()).toEqual(noMetrics)
        }
      }
    })

  const one = { advantages: [1], cuSeqlens: [0, 1], refLogProbs: [-1] }
  for (const objective of objectives)
    test(`one token, infinite log-ratios and log-probs, ${objective}`, async () => {
      for (const [logProb, oldLogProb] of [
        [-1, -2],
        [-1, -Infinity],
        [-Infinity, -1],
        [-120, -1],
        [0, -1],
        [-1, 0],
      ] as const)
        for (const A of [1, -1, 0]) {
          const a = { ...one, logProbs: [logProb], oldLogProbs: [oldLogProb], advantages: [A] }
          const o = { objective, kl: 'none' } as const
          const got = recorded(b, `one token ${objective}`, { relative: 1e-5 }, () => run(a, o))
          const expected = oracle(a, o)
          const bound = { relative: 1e-5, absolute: 1e-30 }
          expectClose(await got.dLogProbs.read(), expected.dLogProbs, bound)
          expectClose(await got.loss.read(), [expected.metrics.loss], bound)
          got.dispose()
        }
    })

  test('sums do not depend on the number of threads', async () => {
    const a = batch(6, 9000)
    const one = run(a, {})
    const again = run(a, {})
    expect(await again.loss.read()).toEqual(await one.loss.read())
    expect(await again.dLogProbs.read()).toEqual(await one.dLogProbs.read())
  })

  for (const kl of ['k1', 'k2', 'k3', 'abs', 'k1+', 'k3+'] as const)
    for (const masked of [true, false])
      test(`${kl} in the reward${masked ? ', masked' : ''}`, async () => {
        const { logProbs, refLogProbs, cuSeqlens, mask, advantages } = batch(4, 600)
        const klClamp = kl === 'k3+' ? 0.2 : false
        const given = {
          ...(masked && { mask: b.device.tensor(Uint8Array.from(mask), [mask.length]) }),
        }
        const out = recorded(b, `kl penalty ${kl} ${masked}`, { absolute: 1e-6 }, () =>
          applyKlPenalty({
            rewards: f32(advantages),
            logProbs: f32(logProbs),
            refLogProbs: f32(refLogProbs),
            cuSeqlens,
            kl,
            klCoef: 0.3,
            klClamp,
            ...given,
          }),
        )
        const expected = Array.from(advantages, (reward, i) => {
          let sum = 0
          for (let t = cuSeqlens[i]!; t < cuSeqlens[i + 1]!; t++) {
            const x = refLogProbs[t]! - logProbs[t]!
            const k3 = Math.expm1(x) - x
            const k = {
              k1: -x,
              'k1+': -x,
              k2: (x * x) / 2,
              abs: Math.abs(x),
              k3,
              'k3+': Math.min(k3, 0.2),
            }
            if (!masked || mask[t]) sum += k[kl]
          }
          return reward - 0.3 * sum
        })
        // Rounded once, to f32.
        expectClose(await out.read(), expected, { absolute: 1e-30, relative: 2 ** -23 })
      })

  test('KL in the reward: refusals and faults', async () => {
    const logProbs = f32([-1, -2, -3])
    const a = { rewards: f32([1]), logProbs, refLogProbs: logProbs, cuSeqlens: [0, 3] }
    const refuses = (extra: object, code: string, message: RegExp) =>
      expectRefusal(
        () => applyKlPenalty({ ...a, ...extra } as never),
        code,
        'applyKlPenalty',
        message,
      )
    refuses({ kl: 'none' }, 'ERR_VALUE', /'none'/)
    refuses({ refLogProbs: f32([1]) }, 'ERR_SHAPE', /refLogProbs/)
    refuses({ cuSeqlens: [0, 1, 3] }, 'ERR_SHAPE', /cuSeqlens/)
    refuses({ klCoeff: 1 }, 'ERR_VALUE', /klCoef/)
    const mask = b.device.tensor(Uint8Array.of(1, 2, 1), [3])
    const out = applyKlPenalty({ ...a, mask })
    await expect(out.read()).rejects.toMatchObject({ code: 'ERR_VALUE', op: 'applyKlPenalty' })
    await b.device.synchronize()
    const empty = { rewards: f32([]), logProbs: f32([]), refLogProbs: f32([]), cuSeqlens: [0] }
    expect(applyKlPenalty(empty).shape).toEqual([0])
  })

  test('of equal covariances the first tokens are chosen', async () => {
    const n = 40
    const a = { logProbs: Array(n).fill(-1), advantages: [1], cuSeqlens: [0, n] }
    const oldLogProbs = Array(n).fill(-1.5)
    const o = { objective: 'kl_cov', covRatio: 0.25, aggregation: 'token-sum' } as const
    const got = run({ ...a, oldLogProbs }, o)
    const gradient = await got.dLogProbs.read()
    expect(gradient.subarray(0, 10).every((x) => x === gradient[0]! && x > gradient[39]!)).toBe(
      true,
    )
    expect(gradient.subarray(10).every((x) => x === gradient[39]!)).toBe(true)
  })

  test('clip_cov draws without favour, and by its seed', async () => {
    // Every token is a candidate, and 64 of 4096 are drawn.
    const n = 4096
    const logProbs = Float32Array.from({ length: n }, (_, i) => (i < n / 2 ? -3 : -1))
    const advantages = Float32Array.from({ length: n }, (_, i) => (i < n / 2 ? -1 : 1))
    const a = { logProbs, advantages, cuSeqlens: [0, n] }
    const draw = async (covSeed: number): Promise<number[]> => {
      const o = { objective: 'clip_cov', covRatio: 1 / 64, covLow: 0.5, covSeed } as const
      const gradient = await run(a, o).dLogProbs.read()
      return Array.from(gradient.keys()).filter((t) => gradient[t] === 0)
    }
    const times = new Float64Array(8)
    for (let seed = 0; seed < 32; seed++) {
      const drawn = await draw(seed)
      expect(drawn.length).toBe(64)
      expect(await draw(seed)).toEqual(drawn)
      for (const t of drawn) times[Math.floor((t * 8) / n)]!++
    }
    // 2048 draws, 256 in each eighth: within 5 standard deviations of some 15.
    expect(Math.max(...times.map((x) => Math.abs(x - 256)))).toBeLessThan(75)
  })

  for (const objective of ['clip_cov', 'kl_cov'] as const)
    test(`${objective} over many runs and threads`, async () => {
      const a = batch(5, 30_000)
      const o = { objective, covRatio: 0.01, covLow: 0.5 } as const
      await expectLoss(run(a, o), oracle(a, o))
      const again = await run(a, o).dLogProbs.read()
      expect(again).toEqual(await run(a, o).dLogProbs.read())
    })

  test('a mask with values other than 0 and 1 faults', async () => {
    const a = { logProbs: [-1, -2, -3], advantages: [1], mask: [1, 2, 0], cuSeqlens: [0, 3] }
    const got = recorded(b, 'policy loss of a bad mask', { absolute: 1e-6 }, () => run(a, {}))
    const fault = { code: 'ERR_VALUE', op: 'policyLoss' }
    await expect(got.loss.read()).rejects.toMatchObject(fault)
    await expect(got.dLogProbs.read()).rejects.toMatchObject(fault)
    await expect(got.metrics()).rejects.toMatchObject(fault)
    await b.device.synchronize()
  })

  test('metrics can be read until the result is disposed', async () => {
    // At most, here and below: what earlier tests dropped may be collected meanwhile.
    const before = b.device.memory().liveBytes
    const a = { logProbs: [-1], advantages: [1], cuSeqlens: [0, 1] }
    scope(() => void run(a, {}))
    expect(b.device.memory().liveBytes).toBeLessThanOrEqual(before)
    const got = scope(() => run(a, {}))
    expect((await got.metrics()).tokens).toBe(1)
    got.dispose()
    expect(b.device.memory().liveBytes).toBeLessThanOrEqual(before)
    await expect(got.metrics()).rejects.toMatchObject({ code: 'ERR_DISPOSED' })
  })

  test('refuses invalid arguments', () =>
    scope(() => {
      const logProbs = f32([-1, -2, -3])
      const a = { logProbs, advantages: f32([1, 1]), cuSeqlens: [0, 2, 3] }
      const refuses = (extra: object, code: string, message?: RegExp) =>
        expectRefusal(() => policyLoss({ ...a, ...extra } as never), code, 'policyLoss', message)
      refuses({ kl: 'k3' }, 'ERR_VALUE', /refLogProbs/)
      refuses({ entropyCoef: 0.1 }, 'ERR_VALUE', /entropy/)
      refuses({ cuSeqlens: [0, 2] }, 'ERR_VALUE', /cuSeqlens/)
      refuses({ cuSeqlens: [0, 3, 2, 3] }, 'ERR_VALUE', /cuSeqlens/)
      refuses({ cuSeqlens: [1, 3] }, 'ERR_VALUE', /start with 0/)
      refuses({ advantages: f32([1]) }, 'ERR_SHAPE', /advantages/)
      refuses({ advantagesPer: 'token' }, 'ERR_SHAPE', /a token, 3, got 2/)
      refuses({ oldLogProbs: f32([1]) }, 'ERR_SHAPE', /oldLogProbs/)
      refuses({ mask: f32([1, 1, 1]) }, 'ERR_DTYPE', /mask/)
      refuses({ logProbs: b.device.zeros([3], 'bf16') }, 'ERR_DTYPE')
      refuses({ logProbs: b.device.zeros([1, 3]) }, 'ERR_SHAPE')
      refuses(
        { objective: 'trpo' },
        'ERR_VALUE',
        /objective must be 'ppo', 'gspo', .*, 'clip_cov' or 'kl_cov', got 'trpo'/,
      )
      refuses({ objective: 1 }, 'ERR_VALUE', /objective must be .* or 'kl_cov', got 1/)
      refuses({ kl: 'k4' }, 'ERR_VALUE', /kl must be 'none', 'k1', .*, 'k1\+' or 'k3\+', got 'k4'/)
      refuses(
        { aggregation: 'mean' },
        'ERR_VALUE',
        /\baggregation must be 'token-mean', .*, 'token-sum' or 'prompt-mean', got/,
      )
      refuses({ termAggregation: 'mean' }, 'ERR_VALUE', /termAggregation/)
      refuses({ emptyRows: 'drop' }, 'ERR_VALUE', /emptyRows/)
      refuses({ clipLow: -0.1 }, 'ERR_VALUE', /clipLow/)
      refuses({ dualClip: 0.5 }, 'ERR_VALUE', /dualClip/)
      refuses({ dualClip: true }, 'ERR_VALUE', /dualClip/)
      refuses({ delta: 0 }, 'ERR_VALUE', /delta/)
      refuses({ klUnbiased: 1 }, 'ERR_VALUE', /klUnbiased/)
      refuses({ vespoKPositive: -1 }, 'ERR_VALUE', /vespoKPositive/)
      refuses({ aggregation: 'token-sum', normalizer: 3 }, 'ERR_VALUE', /normalizer/)
      refuses({ aggregation: 'prompt-mean' }, 'ERR_VALUE', /needs groups/)
      refuses({ termAggregation: 'prompt-mean' }, 'ERR_VALUE', /needs groups/)
      refuses({ aggregation: 'prompt-mean', groups: [1] }, 'ERR_SHAPE', /groups/)
      refuses({ groups: [1, 0.5] }, 'ERR_VALUE', /groups/)
      refuses({ topEntropyQuantile: 0.2 }, 'ERR_VALUE', /needs entropy/)
      refuses({ topEntropyQuantile: 0, entropy: logProbs }, 'ERR_VALUE', /topEntropyQuantile/)
      refuses({ covRatio: 0 }, 'ERR_VALUE', /covRatio/)
      refuses({ covLow: 6 }, 'ERR_VALUE', /covLow/)
      refuses({ covSeed: -1 }, 'ERR_VALUE', /covSeed/)
      refuses({ normalizer: 0 }, 'ERR_VALUE', /normalizer/)
      refuses({ lossScale: -1 }, 'ERR_VALUE', /lossScale/)
      refuses({ klCoef: NaN }, 'ERR_VALUE', /klCoef/)
    }))
})
