import {
  checkArguments,
  checkArray,
  checkBoolean,
  checkNumber,
  choice,
  hostInts,
  type Names,
} from '../arguments.js'
import { native } from '../native.js'
import { type Held, handleOf, held, type Ints, maybeHandle, type Tensor, wrap } from '../tensor.js'

/** One rule of rejection: the bounds of a measure of the log-ratio d = logProbs - rolloutLogProbs, clamped to ±20. */
export interface RolloutRejection {
  /** 'k1': -d; 'k2': d² / 2; 'k3': exp(d) - 1 - d; 'ratio': exp(d). */
  measure: 'k1' | 'k2' | 'k3' | 'ratio'
  /** Of each 'token', which drops tokens; or its 'sum', 'mean' or 'max' over a sequence, which drops sequences. */
  over: 'token' | 'sum' | 'mean' | 'max'
  /**
   * What is below is rejected. verl gives the bounds of k1 as ratios: take their logarithms.
   *
   * @default no bound
   */
  low?: number
  /**
   * What is above is rejected.
   *
   * @default no bound
   */
  high?: number
}

/** How importance weights are made of ratios, and what is rejected. */
export interface RolloutCorrectionOptions {
  /**
   * The ratio of each 'token', of a 'sequence' (the product of its tokens'), or the sequence's 'geometric' mean.
   *
   * @default 'token'
   */
  level?: 'token' | 'sequence' | 'geometric'
  /**
   * 'truncate' bounds the ratio by `high` (TIS); 'mask' gives 0 to what is outside `low` and `high` (MIS, IcePop);
   * 'none' leaves it.
   *
   * @default 'truncate'
   */
  mode?: 'truncate' | 'mask' | 'none'
  /**
   * The highest ratio, greater than 0.
   *
   * @default 2
   */
  high?: number
  /**
   * The lowest ratio that 'mask' leaves; from 0 to `high`.
   *
   * @default 0
   */
  low?: number
  /**
   * Divides the weights by their mean, over tokens or, for the levels of sequences, over sequences.
   *
   * @default false
   */
  normalize?: boolean
  /**
   * At most 8 rules; a token is kept if it passes all.
   *
   * @default []
   */
  reject?: readonly RolloutRejection[]
  /**
   * Drops the sequences of negative advantage whose mean of rolloutLogProbs - logProbs is above this, at least 0:
   * off-policy sequence masking (DeepSeek-V3.2). Needs `advantages`.
   *
   * @default none are dropped
   */
  maxDivergence?: number
}

/** The arguments of `rolloutCorrection`. */
export interface RolloutCorrectionArgs extends RolloutCorrectionOptions {
  /** f32 [T], packed by cuSeqlens: log-probabilities of the sampled tokens as the trainer computes them. */
  logProbs: Tensor<'f32'>
  /** f32 [T]: as the engine that sampled the tokens computed them, at the same temperature. */
  rolloutLogProbs: Tensor<'f32'>
  /** Where the B sequences begin and end: 0 = c₀ ≤ c₁ ≤ … ≤ c_B = T. */
  cuSeqlens: Ints
  /**
   * u8 [T]: 1 keeps a token, 0 drops it; any other value makes the wait throw ERR_VALUE.
   *
   * @default every token is kept
   */
  mask?: Tensor<'u8'>
  /** f32 [B], one a sequence: for maxDivergence. */
  advantages?: Tensor<'f32'>
}

/**
 * TRL's default: the product of a sequence's ratios, and weight 0 where it is above 3.
 *
 * @example
 * ```js
 * import { openDevice, rolloutCorrection, trlRolloutCorrection } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const logProbs = device.tensor([-1, -1, -1], [3])
 * const rolloutLogProbs = device.tensor([-2, -2, -1], [3])
 * const given = { logProbs, rolloutLogProbs, cuSeqlens: [0, 2, 3] }
 * const { importanceWeights } = rolloutCorrection({ ...trlRolloutCorrection, ...given })
 * console.log(await importanceWeights.read()) // Float32Array(3) [ 0, 0, 1 ]
 * device.dispose()
 * ```
 */
export const trlRolloutCorrection: Readonly<RolloutCorrectionOptions> = Object.freeze({
  level: 'sequence',
  mode: 'mask',
  high: 3,
})

/**
 * verl's values: ratios of tokens, at most 2. They are the defaults here too.
 *
 * @example
 * ```js
 * import { openDevice, rolloutCorrection, verlRolloutCorrection } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const logProbs = device.tensor([-1, -1], [2])
 * const rolloutLogProbs = device.tensor([-2, -1], [2])
 * const given = { logProbs, rolloutLogProbs, cuSeqlens: [0, 2] }
 * const { importanceWeights } = rolloutCorrection({ ...verlRolloutCorrection, ...given })
 * console.log(await importanceWeights.read()) // Float32Array(2) [ 2, 1 ]
 * device.dispose()
 * ```
 */
export const verlRolloutCorrection: Readonly<RolloutCorrectionOptions> = Object.freeze({
  level: 'token',
  mode: 'truncate',
  high: 2,
})

/**
 * How far trainer and rollout engine are apart, over the tokens that the given mask keeps; all 0 when nothing is
 * kept.
 */
export interface RolloutCorrectionMetrics {
  /** Of the weights before `normalize`, as a share of the tokens: 1 for equal weights. */
  effectiveSampleSize: number
  /** The χ² divergence: the mean of the tokens' squared ratios, less 1. */
  chi2: number
  /** The same of the sequences' ratios. */
  sequenceChi2: number
  /** An estimate of the KL divergence of the trainer from the rollout engine: the mean of k1, in nats. */
  k1: number
  /** Another, which is never negative: the mean of k3, in nats. */
  k3: number
  /** Of the trainer: the mean over sequences. */
  trainerPerplexity: number
  /** Of the rollout engine: the mean over sequences. */
  rolloutPerplexity: number
  /** The share of tokens whose weight `mode` changed. */
  cutShare: number
  /** The share of tokens that `reject` and `maxDivergence` dropped. */
  rejectedShare: number
  /** The mean weight before `normalize`. */
  meanWeight: number
}

/** The results of `rolloutCorrection`. */
export interface RolloutCorrectionResult {
  /** f32 [T]: for policyLoss and grpoStep; 0 where the given or the returned mask drops a token. */
  importanceWeights: Tensor<'f32'>
  /** u8 [T]: the given mask less what was rejected. grpoStep's skipEmpty leaves rejected sequences out of their group. */
  mask: Tensor<'u8'>
  /** Reads how far the two engines are apart, once it is computed. */
  metrics: () => Promise<RolloutCorrectionMetrics>
}

/** @internal */
export const correctionOptionNames: Names<RolloutCorrectionOptions> = {
  level: true,
  mode: true,
  high: true,
  low: true,
  normalize: true,
  reject: true,
  maxDivergence: true,
}
const names: Names<RolloutCorrectionArgs> = {
  ...correctionOptionNames,
  logProbs: true,
  rolloutLogProbs: true,
  cuSeqlens: true,
  mask: true,
  advantages: true,
}
const ruleNames: Names<RolloutRejection> = { measure: true, over: true, low: true, high: true }

/**
 * Importance weights between the policy as the trainer computes it and as the rollout engine sampled from it, which
 * differ by precision, kernels and staleness, and rejection of what is too far apart. Log-ratios are clamped to ±20.
 * Masked tokens are ignored, NaN too. Each input is read once. Formulas and sources: ops/rollout_correction.h.
 *
 * @returns importanceWeights, mask and metrics.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for options and, where a result
 *   is read, for a mask value other than 0 and 1; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { openDevice, rolloutCorrection } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const logProbs = device.tensor([-1, -2, -0.5], [3])
 * const rolloutLogProbs = device.tensor([-1, -3, -0.5], [3])
 * const corrected = rolloutCorrection({ logProbs, rolloutLogProbs, cuSeqlens: [0, 2, 3] })
 * console.log(await corrected.importanceWeights.read()) // Float32Array(3) [ 1, 2, 1 ]
 * console.log((await corrected.metrics()).cutShare) // about 0.333
 * corrected.dispose()
 * device.dispose()
 * ```
 */
export function rolloutCorrection(a: RolloutCorrectionArgs): Held<RolloutCorrectionResult> {
  const op = 'rolloutCorrection'
  a = checkArguments(a, names, op)
  return correctionAs(op, a)
}

/** @internal For composites, under their name. */
export function correctionAs(op: string, a: RolloutCorrectionArgs): Held<RolloutCorrectionResult> {
  const [weights, mask, numbers] = native().ops.rollout_correction!(
    handleOf(a.logProbs, 'logProbs', op),
    handleOf(a.rolloutLogProbs, 'rolloutLogProbs', op),
    hostInts(a.cuSeqlens, 'cuSeqlens', op),
    maybeHandle(a.mask, 'mask', op),
    a.level ?? 'token',
    a.mode ?? 'truncate',
    a.high ?? 2,
    a.low ?? 0,
    checkBoolean(a.normalize ?? false, 'normalize', op),
    Float64Array.from(
      checkArray(a.reject ?? [], 'reject', op).flatMap((rule, i) => ruleOf(rule, i, op)),
    ),
    maybeHandle(a.advantages, 'advantages', op),
    a.maxDivergence,
  ) as unknown[]
  const { device } = a.logProbs
  const metrics = wrap<'f32'>(device, numbers)
  return held(
    {
      importanceWeights: wrap<'f32'>(device, weights),
      mask: wrap<'u8'>(device, mask),
      metrics: async () => metricsOf(await metrics.read()),
    },
    [metrics],
  )
}

const measures = ['k1', 'k2', 'k3', 'ratio'] as const
const overs = ['token', 'sum', 'mean', 'max'] as const

function ruleOf(rule: RolloutRejection, i: number, op: string): number[] {
  const name = `reject[${i}]`
  const { measure, over, low, high } = checkArguments(rule, ruleNames, op, name)
  return [
    measures.indexOf(choice(measure, measures, `${name}.measure`, op)),
    overs.indexOf(choice(over, overs, `${name}.over`, op)),
    checkNumber(low ?? Number.NEGATIVE_INFINITY, `${name}.low`, op),
    checkNumber(high ?? Number.POSITIVE_INFINITY, `${name}.high`, op),
  ]
}

function metricsOf(m: Float32Array): RolloutCorrectionMetrics {
  return {
    effectiveSampleSize: m[0]!,
    chi2: m[1]!,
    sequenceChi2: m[2]!,
    k1: m[3]!,
    k3: m[4]!,
    trainerPerplexity: m[5]!,
    rolloutPerplexity: m[6]!,
    cutShare: m[7]!,
    rejectedShare: m[8]!,
    meanWeight: m[9]!,
  }
}
