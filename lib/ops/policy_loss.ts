import { checkArguments, checkBoolean, choice, hostInts, type Names } from '../arguments.js'
import { refuse } from '../errors.js'
import { native } from '../native.js'
import { type Held, handleOf, held, type Ints, maybeHandle, type Tensor, wrap } from '../tensor.js'

/**
 * How tokens' terms become one number: the mean over all kept tokens; the mean over sequences of the mean, the sum, or
 * the sum divided by `lossScale`; the sum over all kept tokens; or 'prompt-mean', the mean over prompts (`groups`) of
 * the mean over a prompt's kept tokens (SkyRL's). The names are verl's, but for the last two.
 */
export type LossAggregation =
  | 'token-mean'
  | 'seq-mean-token-sum'
  | 'seq-mean-token-mean'
  | 'seq-mean-token-sum-norm'
  | 'token-sum'
  | 'prompt-mean'

/**
 * The policy term of the loss. 'ppo': clipped token ratios (Schulman et al. 2017); 'gspo': clipped sequence
 * ratios (Zheng et al. 2025); 'cispo': clipped weights with stopped gradient (MiniMax 2025); 'sapo': soft gates
 * (Gao et al. 2025); 'gpg': no ratio (Chu et al. 2025); 'dppo_tv', 'dppo_kl': truncated ratios with stopped gradient,
 * without the tokens whose probability has moved beyond a divergence; 'gmpo': the geometric mean of a sequence's
 * clipped ratios; 'vespo': a smooth weight of the sequence's ratio with stopped gradient; 'luspo': 'gspo' with sums
 * over tokens; 'clip_cov', 'kl_cov': 'ppo' without the tokens whose advantage and log-probability vary together the
 * most, or the plain ratio with a penalty on these (Cui et al. 2025). Formulas and sources are in ops/policy_loss.h.
 */
export type LossObjective =
  | 'ppo'
  | 'gspo'
  | 'cispo'
  | 'sapo'
  | 'gpg'
  | 'dppo_tv'
  | 'dppo_kl'
  | 'gmpo'
  | 'vespo'
  | 'luspo'
  | 'clip_cov'
  | 'kl_cov'

/**
 * Estimators of the KL divergence from the reference policy (Schulman, 2020), with d the log-ratio
 * refLogProbs - logProbs: 'k1': -d; 'k2': d² / 2; 'k3': exp(d) - d - 1; 'abs': |d|. 'k1+' and 'k3+' have the value
 * of 'k1' and 'k3' and the gradient of 'k2', whose expectation is the gradient of the divergence.
 */
export type KlEstimator = 'none' | 'k1' | 'k2' | 'k3' | 'abs' | 'k1+' | 'k3+'

/**
 * Options of the loss. The defaults are those of the Perceive-to-Reason configuration (verl's); `trlDefaults`
 * holds TRL's. Values are spelled as in verl's configuration. kl without refLogProbs, or entropyCoef without
 * entropy, is ERR_VALUE.
 */
export interface PolicyLossOptions {
  /**
   * The policy term.
   *
   * @default 'ppo'
   */
  objective?: LossObjective
  /**
   * A ratio is held at 1 - clipLow and above; at least 0. 'gmpo' (0.4 in its paper) holds the log-ratio at -clipLow
   * and above; for 'dppo_tv' and 'dppo_kl' it bounds the divergence.
   *
   * @default 0.2
   */
  clipLow?: number
  /**
   * A ratio is held at 1 + clipHigh and below; at least 0. 'gmpo' (0.4 in its paper) holds the log-ratio at clipHigh
   * and below; for 'dppo_tv' and 'dppo_kl' it bounds the divergence.
   *
   * @default 0.2
   */
  clipHigh?: number
  /**
   * Dual-clip constant of 'ppo' (Ye et al. 2020), at least 1: bounds the loss where the advantage is negative;
   * false for none.
   *
   * @default 3
   */
  dualClip?: number | false
  /**
   * Bounds the ratio from above before its product with the advantage, greater than 0; false for none. For
   * 'ppo', 'gspo' and 'luspo' it is TRL's two-sided clipping.
   *
   * @default false; 20 for 'dppo_tv' and 'dppo_kl' (verl's clip_ratio_c)
   */
  delta?: number | false
  /**
   * Exponent of VESPO's weight for advantages of at least 0; at least 0.
   *
   * @default 2
   */
  vespoKPositive?: number
  /**
   * Rate of VESPO's weight for advantages of at least 0; at least 1e-4.
   *
   * @default 3
   */
  vespoLambdaPositive?: number
  /**
   * Exponent of VESPO's weight for negative advantages; at least 0.
   *
   * @default 3
   */
  vespoKNegative?: number
  /**
   * Rate of VESPO's weight for negative advantages; at least 1e-4.
   *
   * @default 2
   */
  vespoLambdaNegative?: number
  /**
   * The share of kept tokens that 'clip_cov' and 'kl_cov' choose by their covariance, at least one; greater than 0, at
   * most 1.
   *
   * @default 0.0002 (verl's)
   */
  covRatio?: number
  /**
   * 'clip_cov' chooses among tokens whose covariance is above this, at random.
   *
   * @default 1 (verl's)
   */
  covLow?: number
  /**
   * 'clip_cov' chooses among tokens whose covariance is below this; at least covLow.
   *
   * @default 5 (verl's)
   */
  covHigh?: number
  /**
   * What |logProbs - oldLogProbs| of the tokens that 'kl_cov' chose costs.
   *
   * @default 1 (verl's ppo_kl_coef)
   */
  covKlCoef?: number
  /**
   * What 'clip_cov' draws from, with a token's place: an integer from 0 to 2^53 - 1. Change it from step to step.
   *
   * @default 0
   */
  covSeed?: number
  /**
   * Leaves the policy term to this share of the kept tokens, those of the highest entropy, as in the 80/20 paper (Wang et
   * al. 2025, with 0.2) and TRL; greater than 0, at most 1. Divisors count all kept tokens. Needs entropy.
   *
   * @default 1
   */
  topEntropyQuantile?: number
  /**
   * Temperature of SAPO's gate for positive advantages, greater than 0.
   *
   * @default 1
   */
  tauPositive?: number
  /**
   * Temperature of SAPO's gate for the other advantages, greater than 0.
   *
   * @default 1.05
   */
  tauNegative?: number
  /**
   * The KL term.
   *
   * @default 'k3' (verl's low_var_kl) if refLogProbs is given, else 'none'
   */
  kl?: KlEstimator
  /**
   * Multiplies the estimate by the token's ratio, gradient included (DeepSeek-V3.2, TRL's use_bias_correction_kl).
   *
   * @default false
   */
  klUnbiased?: boolean
  /**
   * Multiplies the KL term.
   *
   * @default 0.01
   */
  klCoef?: number
  /**
   * Bounds the value of 'k3', whose gradient is 0 beyond it. Its log-ratio is clamped to ±20 first. With false
   * neither is clamped, as in TRL.
   *
   * @default 10
   */
  klClamp?: number | false
  /**
   * The loss falls by entropyCoef times the entropy.
   *
   * @default 0
   */
  entropyCoef?: number
  /**
   * Of the policy term.
   *
   * @default 'token-mean'; 'seq-mean-token-mean' for 'gspo', 'gmpo' and 'sapo', 'seq-mean-token-sum' for 'luspo'
   */
  aggregation?: LossAggregation
  /**
   * Of the KL and entropy terms.
   *
   * @default aggregation where that is given, else 'token-mean'
   */
  termAggregation?: LossAggregation
  /**
   * Sequences, or prompts, without a kept token: left out of their means ('skip', as verl) or counted ('count', as TRL).
   *
   * @default 'skip'
   */
  emptyRows?: 'skip' | 'count'
  /**
   * 'seq-mean-token-sum-norm' divides the mean of the sequences' sums by this; greater than 0.
   *
   * @default the length of the longest sequence, by cuSeqlens
   */
  lossScale?: number
  /**
   * The divisor taken over all workers, for gradient accumulation and data parallelism: kept tokens
   * for 'token-mean', prompts for 'prompt-mean', sequences with a kept token otherwise; must be absent for 'token-sum'. It is that of
   * `aggregation`; a termAggregation that counts the other thing counts here.
   *
   * @default counted in this call
   */
  normalizer?: number
  /**
   * Whether `advantages` holds one value a sequence or a token.
   *
   * @default by its size; 'sequence' where both fit
   */
  advantagesPer?: 'sequence' | 'token'
}

/**
 * TRL's loss_type 'grpo': ppo without dual clip, 'seq-mean-token-mean' counting empty rows, k3 without clamp,
 * klCoef 0.
 *
 * @example
 * ```js
 * import { openDevice, policyLoss, trlDefaults } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const logProbs = device.tensor([-1, -2], [2])
 * const advantages = device.tensor([1], [1])
 * const { loss } = policyLoss({ ...trlDefaults, logProbs, advantages, cuSeqlens: [0, 2] })
 * console.log(await loss.read()) // Float32Array(1) [ -1 ]
 * device.dispose()
 * ```
 */
export const trlDefaults: Readonly<PolicyLossOptions> = Object.freeze({
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
 * The numbers that describe one call. The rest but `tokens` are means over kept tokens; all are 0 when nothing
 * is kept.
 */
export interface LossMetrics {
  /** What the gradient is of. */
  loss: number
  /** The policy term, aggregated as in the loss. */
  policyLoss: number
  /** The KL term before its coefficient, aggregated as in the loss. */
  kl: number
  /** The entropy term before its coefficient, aggregated as in the loss. */
  entropy: number
  /**
   * The share of tokens whose loss clipping changed: for cispo the weight, for gmpo of positive advantages alone; for
   * dppo the tokens that the divergence excluded.
   */
  clipFraction: number
  /**
   * The share of tokens whose loss the dual clip or delta changed; for gmpo clipping, of negative advantages; for
   * clip_cov and kl_cov of the chosen tokens.
   */
  clipFractionLower: number
  /** Of old - new log-probabilities, clamped to ±20. */
  approxKl: number
  /** Of the ratio before clipping; for gspo, luspo and gmpo the sequence's. */
  ratioMean: number
  /** Kept tokens. */
  tokens: number
}

/** What the loss of a batch takes besides its log-probabilities and entropies. */
export interface PolicyLossInputs extends PolicyLossOptions {
  /**
   * f32 [T]: log-probabilities under the policy that sampled the tokens.
   *
   * @default on-policy: a ratio of 1
   */
  oldLogProbs?: Tensor<'f32'>
  /** f32 [T]: log-probabilities under the reference policy, for the KL term. */
  refLogProbs?: Tensor<'f32'>
  /**
   * f32 [T]: multiply the policy term.
   *
   * @default 1 each
   */
  importanceWeights?: Tensor<'f32'>
  /** f32 [B], one a sequence, or [T], one a token. */
  advantages: Tensor<'f32'>
  /** [B], for 'prompt-mean': the prompt of each sequence: any integers in any order. Ignored otherwise. */
  groups?: Ints
  /** Where the B sequences begin and end: 0 = c₀ ≤ c₁ ≤ … ≤ c_B = T. A padded batch is given whole: 0, L, 2L, ... and its mask. */
  cuSeqlens: Ints
  /**
   * u8 [T]: 1 keeps a token, 0 drops it; any other value makes the wait throw ERR_VALUE.
   *
   * @default every token is kept
   */
  mask?: Tensor<'u8'>
}

/** The arguments of `policyLoss`. */
export interface PolicyLossArgs extends PolicyLossInputs {
  /** f32 [T], packed by cuSeqlens: log-probabilities of the sampled tokens. */
  logProbs: Tensor<'f32'>
  /** f32 [T], in nats: the entropy of each token's distribution, for entropyCoef. */
  entropy?: Tensor<'f32'>
}

/** The results of `policyLoss`. */
export interface PolicyLossResult {
  /** f32 [1]. */
  loss: Tensor<'f32'>
  /** f32 [T]: the gradient with respect to logProbs. */
  dLogProbs: Tensor<'f32'>
  /** Reads the numbers that describe the call, once it is done. */
  metrics: () => Promise<LossMetrics>
}

/** A further result where an entropy is given. */
export interface EntropyGradient {
  /** f32 [T]: the gradient with respect to entropy. */
  dEntropy: Tensor<'f32'>
}

/** @internal */
export const lossOptionNames: Names<PolicyLossOptions> = {
  objective: true,
  clipLow: true,
  clipHigh: true,
  dualClip: true,
  delta: true,
  vespoKPositive: true,
  vespoLambdaPositive: true,
  vespoKNegative: true,
  vespoLambdaNegative: true,
  covRatio: true,
  covLow: true,
  covHigh: true,
  covKlCoef: true,
  covSeed: true,
  topEntropyQuantile: true,
  tauPositive: true,
  tauNegative: true,
  kl: true,
  klUnbiased: true,
  klCoef: true,
  klClamp: true,
  entropyCoef: true,
  aggregation: true,
  termAggregation: true,
  emptyRows: true,
  lossScale: true,
  normalizer: true,
  advantagesPer: true,
}
/** @internal */
export const lossNames: Names<PolicyLossInputs> = {
  ...lossOptionNames,
  oldLogProbs: true,
  refLogProbs: true,
  importanceWeights: true,
  advantages: true,
  cuSeqlens: true,
  groups: true,
  mask: true,
}
const names: Names<PolicyLossArgs> = { ...lossNames, logProbs: true, entropy: true }

/**
 * The policy-gradient loss of packed sequences with its gradient with respect to logProbs
 * and, where given, entropy, in one pass. Masked tokens are ignored, NaN too.
 * Without a kept token loss and gradient are 0. Sums run in a fixed order.
 *
 * @returns loss, dLogProbs and metrics; dEntropy exactly if an entropy is given.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for options and, where a result
 *   is read, for a mask value other than 0 and 1; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { openDevice, policyLoss } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const logProbs = device.tensor([-1, -2, -3], [3])
 * const advantages = device.tensor([1, -1], [2])
 * const step = policyLoss({ logProbs, advantages, cuSeqlens: [0, 2, 3] })
 * console.log(await step.dLogProbs.read()) // about -0.333, -0.333, 0.333
 * device.dispose()
 * ```
 */
export function policyLoss(
  a: PolicyLossArgs & { entropy: Tensor },
): Held<PolicyLossResult & EntropyGradient>
export function policyLoss(a: PolicyLossArgs & { entropy?: never }): Held<PolicyLossResult>
export function policyLoss(a: PolicyLossArgs): Held<PolicyLossResult & Partial<EntropyGradient>>
export function policyLoss(a: PolicyLossArgs): Held<PolicyLossResult & Partial<EntropyGradient>> {
  const op = 'policyLoss'
  a = checkArguments(a, names, op)
  return lossAs(op, a)
}

/** @internal For composites, under their name; unknown fields are ignored. */
export function lossAs(
  op: string,
  a: PolicyLossArgs,
): Held<PolicyLossResult & Partial<EntropyGradient>> {
  const [dLogProbs, loss, metrics, dEntropy] = native().ops.policy_loss!(
    handleOf(a.logProbs, 'logProbs', op),
    maybeHandle(a.entropy, 'entropy', op),
    ...lossArguments(op, a),
  ) as unknown[]
  const { device } = a.logProbs
  const results = {
    loss: wrap<'f32'>(device, loss),
    dLogProbs: wrap<'f32'>(device, dLogProbs),
    ...(dEntropy ? { dEntropy: wrap<'f32'>(device, dEntropy) } : {}),
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

/** The arguments of `applyKlPenalty`. */
export interface ApplyKlPenaltyArgs {
  /** f32 [B], one a sequence. */
  rewards: Tensor<'f32'>
  /** f32 [T], packed by cuSeqlens: log-probabilities of the sampled tokens under the policy that sampled them. */
  logProbs: Tensor<'f32'>
  /** f32 [T]: log-probabilities under the reference policy. */
  refLogProbs: Tensor<'f32'>
  /** Where the B sequences begin and end: 0 = c₀ ≤ c₁ ≤ … ≤ c_B = T. */
  cuSeqlens: Ints
  /**
   * u8 [T]: 1 keeps a token, 0 drops it; any other value makes the wait throw ERR_VALUE.
   *
   * @default every token is kept
   */
  mask?: Tensor<'u8'>
  /**
   * The estimate of a token.
   *
   * @default 'k1', whose sum is the sequence's log-ratio
   */
  kl?: Exclude<KlEstimator, 'none'>
  /**
   * Multiplies the sum of a sequence's estimates.
   *
   * @default 0.01
   */
  klCoef?: number
  /**
   * Bounds 'k3', as in policyLoss; false for no bound.
   *
   * @default 10
   */
  klClamp?: number | false
}
const penaltyNames: Names<ApplyKlPenaltyArgs> = {
  rewards: true,
  logProbs: true,
  refLogProbs: true,
  cuSeqlens: true,
  mask: true,
  kl: true,
  klCoef: true,
  klClamp: true,
}

/**
 * Rewards less the KL divergence from a reference policy: KL in the reward, where it changes advantages, in place of
 * KL in the loss. Source: verl's apply_kl_penalty.
 *
 * @returns f32 [B]: rewards - klCoef times the sum of the kept tokens' estimates.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for options and, where the result is
 *   read, for a mask value other than 0 and 1; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { applyKlPenalty, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const rewards = device.tensor([1], [1])
 * const logProbs = device.tensor([-1, -1], [2])
 * const refLogProbs = device.tensor([-2, -1], [2])
 * const less = applyKlPenalty({ rewards, logProbs, refLogProbs, cuSeqlens: [0, 2], klCoef: 0.5 })
 * console.log(await less.read()) // Float32Array(1) [ 0.5 ]
 * device.dispose()
 * ```
 */
export function applyKlPenalty(a: ApplyKlPenaltyArgs): Tensor<'f32'> {
  const op = 'applyKlPenalty'
  a = checkArguments(a, penaltyNames, op)
  return penaltyAs(op, a)
}

/** @internal For composites, under their name. */
export function penaltyAs(op: string, a: ApplyKlPenaltyArgs): Tensor<'f32'> {
  const out = native().ops.apply_kl_penalty!(
    handleOf(a.rewards, 'rewards', op),
    handleOf(a.logProbs, 'logProbs', op),
    handleOf(a.refLogProbs, 'refLogProbs', op),
    maybeHandle(a.mask, 'mask', op),
    hostInts(a.cuSeqlens, 'cuSeqlens', op),
    a.kl ?? 'k1',
    a.klCoef ?? 0.01,
    unlessFalse(a.klClamp, 10, 'klClamp', op),
  )
  return wrap(a.rewards.device, out)
}

const aggregationOf: { [objective in string]?: LossAggregation } = {
  gspo: 'seq-mean-token-mean',
  gmpo: 'seq-mean-token-mean',
  sapo: 'seq-mean-token-mean',
  luspo: 'seq-mean-token-sum',
}

/** @internal What binding/policy_loss.h reads: all but the log-probs and the entropy. */
export function lossArguments(op: string, a: PolicyLossInputs): unknown[] {
  const objective = a.objective ?? 'ppo'
  const dppo = objective === 'dppo_tv' || objective === 'dppo_kl'
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
    a.groups === undefined ? null : hostInts(a.groups, 'groups', op),
    objective,
    a.clipLow ?? 0.2,
    a.clipHigh ?? 0.2,
    unlessFalse(a.dualClip, 3, 'dualClip', op),
    unlessFalse(a.delta, dppo ? 20 : null, 'delta', op),
    a.tauPositive ?? 1,
    a.tauNegative ?? 1.05,
    a.vespoKPositive ?? 2,
    a.vespoLambdaPositive ?? 3,
    a.vespoKNegative ?? 3,
    a.vespoLambdaNegative ?? 2,
    a.covRatio ?? 2e-4,
    a.covHigh ?? 5,
    a.covLow ?? 1,
    a.covKlCoef ?? 1,
    a.covSeed ?? 0,
    a.topEntropyQuantile ?? 1,
    a.kl ?? (a.refLogProbs ? 'k3' : 'none'),
    checkBoolean(a.klUnbiased ?? false, 'klUnbiased', op),
    a.klCoef ?? 0.01,
    unlessFalse(a.klClamp, 10, 'klClamp', op),
    a.entropyCoef ?? 0,
    a.aggregation ??
      (typeof objective === 'string' ? aggregationOf[objective] : undefined) ??
      'token-mean',
    a.termAggregation ?? a.aggregation ?? 'token-mean',
    choice(a.emptyRows ?? 'skip', ['skip', 'count'], 'emptyRows', op) === 'count',
    a.lossScale,
    a.normalizer,
  ]
}

function unlessFalse(
  value: number | false | undefined,
  otherwise: number | null,
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
