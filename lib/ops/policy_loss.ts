import { choice, hostInts } from '../arguments.js'
import { refuse } from '../errors.js'
import { native } from '../native.js'
import { type Held, handleOf, held, type Ints, maybeHandle, type Tensor, wrap } from '../tensor.js'

export type LossAggregation =
  | 'token-mean'
  | 'seq-mean-token-sum'
  | 'seq-mean-token-mean'
  | 'seq-mean-token-sum-norm'

/**
 * The defaults are those of the Perceive-to-Reason configuration (verl's); `trlDefaults` holds TRL's.
 * kl without refLogProbs, or entropyCoef without entropy, is ERR_VALUE.
 */
export interface PolicyLossOptions {
  /**
   * 'ppo' (default): clipped token ratios; 'gspo': clipped sequence ratios; 'cispo': clipped weights
   * with stopped gradient; 'sapo': soft gates; 'gpg': no ratio.
   */
  objective?: 'ppo' | 'gspo' | 'cispo' | 'sapo' | 'gpg'
  /** A ratio is held within 1 - clipLow and 1 + clipHigh: 0.2 each. */
  clipLow?: number
  clipHigh?: number
  /** Dual-clip constant of 'ppo', at least 1: 3; false for none. */
  dualClip?: number | false
  /** SAPO's gates: 1.0 and 1.05. */
  tauPositive?: number
  tauNegative?: number
  /** 'k3' (low_var_kl) when refLogProbs is given, else 'none'. */
  kl?: 'none' | 'k1' | 'k2' | 'k3' | 'abs'
  /** 0.01. */
  klCoef?: number
  /**
   * Bounds the value of 'k3', whose gradient is 0 beyond it: 10. Its log-ratio is clamped to ±20
   * first. With false neither is clamped, as in TRL.
   */
  klClamp?: number | false
  /** The loss falls by entropyCoef times the entropy: 0. */
  entropyCoef?: number
  /** 'token-mean'; 'seq-mean-token-mean' for 'gspo' and 'sapo'. */
  aggregation?: LossAggregation
  /** Of the KL and entropy terms: as `aggregation` where that is given, else 'token-mean'. */
  termAggregation?: LossAggregation
  /** Sequences without a kept token: left out of sequence means ('skip', verl) or counted ('count', TRL). */
  emptyRows?: 'skip' | 'count'
  /**
   * 'seq-mean-token-sum-norm' divides the mean of the sequences' sums by this: the longest sequence
   * (by cuSeqlens) unless given.
   */
  lossScale?: number
  /**
   * The divisor taken over all workers, for gradient accumulation and data parallelism: kept tokens
   * for 'token-mean', sequences with a kept token otherwise; counted in this call unless given. It is
   * that of `aggregation`; a termAggregation that counts the other thing counts here.
   */
  normalizer?: number
  /** Whether `advantages` holds one value a sequence or a token: inferred from its size, 'sequence' where both fit. */
  advantagesPer?: 'sequence' | 'token'
}

/** TRL's loss_type 'grpo': ppo without dual clip, 'seq-mean-token-mean' counting empty rows, k3 without clamp, klCoef 0. */
export const trlDefaults: PolicyLossOptions = Object.freeze({
  objective: 'ppo',
  clipLow: 0.2,
  clipHigh: 0.2,
  dualClip: false,
  klCoef: 0,
  klClamp: false,
  aggregation: 'seq-mean-token-mean',
  emptyRows: 'count',
})

/**
 * Of one call. policyLoss, kl and entropy are the terms of the loss before their coefficients, each
 * aggregated as in the loss. The rest are means over kept tokens: approxKl of old - new log-probs
 * (clamped to ±20); ratioMean of the ratio before clipping (gspo: the sequence's); clipFraction where clipping changed
 * the loss (cispo: the weight); clipFractionLower where the dual clip did. All 0 when nothing is kept.
 */
export interface LossMetrics {
  loss: number
  policyLoss: number
  kl: number
  entropy: number
  clipFraction: number
  clipFractionLower: number
  approxKl: number
  ratioMean: number
  /** Kept tokens. */
  tokens: number
}

export interface PolicyLossInput extends PolicyLossOptions {
  /** f32 [T], packed by cuSeqlens: log-probabilities of the sampled tokens. */
  logProbs: Tensor
  /** f32 [T]: those of the policy that sampled them; absent means on-policy, a ratio of 1. */
  oldLogProbs?: Tensor
  /** f32 [T]: those of the reference policy. */
  refLogProbs?: Tensor
  /** f32 [T], of each token's distribution. */
  entropy?: Tensor
  /** f32 [T]: multiply the policy term. */
  importanceWeights?: Tensor
  /** f32 [B] or [T]. */
  advantages: Tensor
  cuSeqlens: Ints
  /** u8 [T]: 1 keeps a token, 0 drops it; any other value makes the wait throw ERR_VALUE. */
  mask?: Tensor
}

/**
 * The policy-gradient loss of packed sequences, f32 [1], with its gradient with respect to logProbs
 * and, where given, entropy, f32 [T], in one pass. Masked tokens are ignored, NaN too.
 * Without a kept token loss and gradient are 0. Sums run in a fixed order.
 *
 * A padded batch is given whole: cuSeqlens 0, L, 2L, ... and its mask.
 */
export function policyLoss(a: PolicyLossInput): Held<{
  loss: Tensor
  dLogProbs: Tensor
  dEntropy?: Tensor
  metrics: () => Promise<LossMetrics>
}> {
  return lossAs('policyLoss', a)
}

/** @internal For composites, under their name. */
export function lossAs(op: string, a: PolicyLossInput): ReturnType<typeof policyLoss> {
  const [dLogProbs, loss, metrics, dEntropy] = native().ops.policy_loss!(
    handleOf(a.logProbs, 'logProbs', op),
    maybeHandle(a.entropy, 'entropy', op),
    ...lossArguments(op, a),
  ) as unknown[]
  const { device } = a.logProbs
  const results = {
    loss: wrap(device, loss),
    dLogProbs: wrap(device, dLogProbs),
    ...(dEntropy ? { dEntropy: wrap(device, dEntropy) } : {}),
  }
  return withMetrics(results, wrap<'f32'>(device, metrics))
}

/** @internal A loss's results with its metrics, which are read on demand. */
export function withMetrics<R extends object>(
  results: R,
  numbers: Tensor<'f32'>,
): Held<R & { metrics: () => Promise<LossMetrics> }> {
  return held({ ...results, metrics: async () => lossMetrics(await numbers.read()) }, [numbers])
}

/** @internal What binding/policy_loss.h reads: all but the log-probs and the entropy. */
export function lossArguments(op: string, a: Omit<PolicyLossInput, 'logProbs' | 'entropy'>) {
  const objective = a.objective ?? 'ppo'
  const perSequence = objective === 'gspo' || objective === 'sapo'
  return [
    maybeHandle(a.oldLogProbs, 'oldLogProbs', op),
    maybeHandle(a.refLogProbs, 'refLogProbs', op),
    maybeHandle(a.importanceWeights, 'importanceWeights', op),
    handleOf(a.advantages, 'advantages', op),
    maybeHandle(a.mask, 'mask', op),
    hostInts(a.cuSeqlens, 'cuSeqlens', op),
    a.advantagesPer === undefined
      ? null
      : choice(a.advantagesPer, ['sequence', 'token'], 'advantagesPer', op) === 'token',
    objective,
    a.clipLow ?? 0.2,
    a.clipHigh ?? 0.2,
    unlessFalse(a.dualClip, 3, 'dualClip', op),
    a.tauPositive ?? 1,
    a.tauNegative ?? 1.05,
    a.kl ?? (a.refLogProbs ? 'k3' : 'none'),
    a.klCoef ?? 0.01,
    unlessFalse(a.klClamp, 10, 'klClamp', op),
    a.entropyCoef ?? 0,
    a.aggregation ?? (perSequence ? 'seq-mean-token-mean' : 'token-mean'),
    a.termAggregation ?? a.aggregation ?? 'token-mean',
    choice(a.emptyRows ?? 'skip', ['skip', 'count'], 'emptyRows', op) === 'count',
    a.lossScale,
    a.normalizer,
  ]
}

function unlessFalse(
  value: number | false | undefined,
  otherwise: number,
  name: string,
  op: string,
): number | null {
  if ((value as unknown) === true)
    refuse('ERR_VALUE', op, `${name} must be a number or false, got true`)
  return value === false ? null : (value ?? otherwise)
}

function lossMetrics(m: Float32Array): LossMetrics {
  return {
    loss: m[0]!,
    policyLoss: m[1]!,
    kl: m[2]!,
    entropy: m[3]!,
    clipFraction: m[4]!,
    clipFractionLower: m[5]!,
    approxKl: m[6]!,
    ratioMean: m[7]!,
    tokens: m[8]! * 65536 + m[9]!,
  }
}
