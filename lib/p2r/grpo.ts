import { hostInts } from '../arguments.js'
import { composite } from '../composite.js'
import { refuse } from '../errors.js'
import { type AdvantageEstimator, advantagesAs } from '../ops/advantages.js'
import {
  type LinearHead,
  linearLogProbs,
  linearLogProbsBackward,
  linearLossAs,
} from '../ops/linear_log_probs.js'
import { tokenLogProbs, tokenLogProbsBackward } from '../ops/log_probs.js'
import {
  type LossMetrics,
  lossAs,
  type PolicyLossInputs,
  type PolicyLossOptions,
} from '../ops/policy_loss.js'
import { heldBy, scope } from '../scope.js'
import { handleOf, held, type Ints, Tensor } from '../tensor.js'

/**
 * What the caller's engine gives for the tokens of a batch: log-probs f32 [T]; logits [T, V] with
 * their targets i32 [T]; or hidden states [T, C] and targets with the head's weight [V, C] and bias,
 * whose logits are never materialized. The gradient is taken with respect to the same.
 */
export type GrpoModel =
  | { logProbs: Tensor }
  | { logits: Tensor; targets: Tensor; temperature?: number }
  | LinearHead

export interface GrpoStep extends Disposable {
  loss: Tensor
  logProbs: Tensor
  /** For log-probs as input. */
  dLogProbs?: Tensor
  /** For logits as input. */
  dLogits?: Tensor
  /** For hidden states as input: as they are, f32 [V, C], and f32 [V] where there is a bias. */
  dHidden?: Tensor
  dWeight?: Tensor
  dBias?: Tensor
  metrics: () => Promise<LossMetrics>
  dispose(): void
}

export interface GrpoBatch extends PolicyLossOptions {
  /** f32 [B], or [B, K] for 'gdpo'. */
  rewards: Tensor
  /** The group (prompt) of each sequence. */
  groups: Ints
  cuSeqlens: Ints
  /** u8 [T]: 1 keeps a token. */
  mask?: Tensor
  oldLogProbs?: Tensor
  refLogProbs?: Tensor
  importanceWeights?: Tensor
  /** 'grpo' unless given, with epsilon 1e-6, and singleton and weights as in groupAdvantages. */
  estimator?: AdvantageEstimator
  epsilon?: number
  singleton?: 'reward' | 'zero'
  weights?: readonly number[]
}

/**
 * One GRPO step on a batch of rollouts: rewards and groups -> advantages -> loss -> gradient, all on
 * the device. Estimators that weight by length use a sequence's kept tokens, which are counted on the
 * device if there is a mask.
 *
 * It is one operation: its errors carry its name, and a fault poisons all of its results. With log-probs
 * as input, `logProbs` of the result is a copy of them. Only the mask excludes tokens: a target of -100
 * has log-probability 0 and no gradient, yet counts unless masked.
 */
export function grpoStep(a: GrpoModel & GrpoBatch): GrpoStep & { advantages: Tensor } {
  const op = 'grpoStep'
  return scope(() => composite(op, () => step(op, a)))
}

function step(op: string, a: GrpoModel & GrpoBatch): GrpoStep & { advantages: Tensor } {
  const advantages = advantagesAs(op, {
    rewards: a.rewards,
    groups: a.groups,
    ...pickDefined(a, ['estimator', 'epsilon', 'singleton', 'weights']),
    ...(a.mask
      ? { counted: { mask: a.mask, cuSeqlens: a.cuSeqlens } }
      : { lengths: differences(hostInts(a.cuSeqlens, 'cuSeqlens', op)) }),
  })
  if (a.advantagesPer === 'token')
    refuse('ERR_VALUE', op, "advantagesPer must be 'sequence': an advantage belongs to a reward")
  const options = { ...a, advantages, advantagesPer: 'sequence' as const }

  if ('logProbs' in a) {
    handleOf(a.logProbs, 'logProbs', op)
    const { loss, dLogProbs, metrics, hidden } = withHidden(
      lossAs(op, { ...options, logProbs: a.logProbs }),
    )
    const logProbs = a.logProbs.to(a.logProbs.device)
    return held({ loss, logProbs, dLogProbs, advantages, metrics }, hidden)
  }
  if ('hidden' in a) return stepOnHead(op, a, { ...options, advantages })
  handleOf(a.logits, 'logits', op)
  handleOf(a.targets, 'targets', op)
  const rows = { logits: a.logits, targets: a.targets, temperature: a.temperature ?? 1 }
  const forward = tokenLogProbs({ ...rows, entropy: !!a.entropyCoef })
  const { loss, dLogProbs, dEntropy, metrics, hidden } = withHidden(
    lossAs(op, {
      ...options,
      logProbs: forward.logProbs,
      ...(forward.entropy ? { entropy: forward.entropy } : {}),
    }),
  )
  const dLogits = tokenLogProbsBackward({
    ...rows,
    stats: forward.stats,
    dLogProbs,
    ...(forward.entropy && dEntropy ? { entropy: forward.entropy, dEntropy } : {}),
  })
  return held({ loss, logProbs: forward.logProbs, dLogits, advantages, metrics }, hidden)
}

type Options = PolicyLossInputs

/** In one pass if each token's gradient depends on that token only, else log-probs first. */
function stepOnHead(
  op: string,
  a: LinearHead,
  options: Options,
): GrpoStep & { advantages: Tensor } {
  const { advantages } = options
  const head: LinearHead = {
    hidden: a.hidden,
    weight: a.weight,
    targets: a.targets,
    ...pickDefined(a, ['bias', 'temperature']),
  }
  if (options.objective !== 'gspo') {
    const { hidden, ...results } = withHidden(linearLossAs(op, { ...options, ...head }))
    return held({ ...results, advantages }, hidden)
  }
  const forward = linearLogProbs({ ...head, entropy: !!options.entropyCoef })
  const { logProbs, stats, entropy } = forward
  const { loss, dLogProbs, dEntropy, metrics, hidden } = withHidden(
    lossAs(op, { ...options, logProbs, ...(entropy ? { entropy } : {}) }),
  )
  const { dHidden, dWeight, dBias } = linearLogProbsBackward({
    ...head,
    stats,
    dLogProbs,
    ...(entropy && dEntropy ? { entropy, dEntropy } : {}),
  })
  const gradients = dBias ? { dHidden, dWeight, dBias } : { dHidden, dWeight }
  return held({ loss, logProbs, ...gradients, advantages, metrics }, hidden)
}

/** A loss's results, with the tensors that its metrics read as `hidden`. */
function withHidden<L extends object>(loss: L): L & { hidden: Tensor[] } {
  return { ...loss, hidden: [...heldBy(loss)].filter(Tensor.is) }
}

function pickDefined<T extends object, K extends keyof T>(
  from: T,
  keys: readonly K[],
): Partial<Pick<T, K>> {
  return Object.fromEntries(
    keys.filter((k) => from[k] !== undefined).map((k) => [k, from[k]]),
  ) as Partial<Pick<T, K>>
}

function differences(cuSeqlens: Float64Array): Float64Array {
  return cuSeqlens.subarray(1).map((end, i) => end - cuSeqlens[i]!)
}
