import { checkArguments, choice, hostInts, type Names } from '../arguments.js'
import { composite } from '../composite.js'
import type { DType, FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import { type AdvantageOptions, advantageOptionNames, advantagesAs } from '../ops/advantages.js'
import type { BiasGradient } from '../ops/linear.js'
import {
  type HeadGradients,
  type LinearHead,
  linearLogProbs,
  linearLogProbsBackward,
  linearLossAs,
} from '../ops/linear_log_probs.js'
import { tokenLogProbs, tokenLogProbsBackward } from '../ops/log_probs.js'
import {
  type LossMetrics,
  lossAs,
  lossNames,
  type PolicyLossInputs,
  type PolicyLossOptions,
  penaltyAs,
} from '../ops/policy_loss.js'
import { heldBy, scope } from '../scope.js'
import { handleOf, held, type Ints, Tensor } from '../tensor.js'

/** A trained model by its log-probabilities: the caller's engine computes them, and takes their gradient. */
export interface LogProbsModel {
  /** f32 [T]: of the batch's tokens under the current weights. */
  logProbs: Tensor<'f32'>
  logits?: never
  hidden?: never
  weight?: never
  bias?: never
  targets?: never
  temperature?: never
}

/** A trained model by its logits. */
export interface LogitsModel<D extends FloatDType = FloatDType> {
  /** [T, V], f32 | f16 | bf16: the logits from which each token of the batch was sampled. */
  logits: Tensor<D>
  /** i32 [T]: the tokens. -100 gives a log-probability of 0 and no gradient, yet counts unless masked. */
  targets: Tensor<'i32'>
  /**
   * Divides the logits; greater than 0.
   * @default 1
   */
  temperature?: number
  logProbs?: never
  hidden?: never
  weight?: never
  bias?: never
}

/** A trained model by its hidden states and head, hidden [T, C] · weight [V, C]ᵀ: the logits are never materialized. */
export interface HeadModel<D extends FloatDType = FloatDType> extends LinearHead<D> {
  logProbs?: never
  logits?: never
}

/** What the caller's engine gives for the tokens of a batch. The gradient is taken with respect to the same. */
export type GrpoModel =
  | LogProbsModel
  | LogitsModel
  | HeadModel<'f32'>
  | HeadModel<'f16'>
  | HeadModel<'bf16'>

/** The results of a step whatever its input, with the gradients that some inputs give. */
export interface GrpoStep extends Disposable {
  /** f32 [1]. */
  readonly loss: Tensor<'f32'>
  /** f32 [T]: of the tokens under the current weights; a copy where they were given. */
  readonly logProbs: Tensor<'f32'>
  /** f32 [B], one a sequence, or [T], one a token: for 'opt_baseline'. A copy where they were given. */
  readonly advantages: Tensor<'f32'>
  /** f32 [T]: for log-probabilities as input. */
  readonly dLogProbs?: Tensor<'f32'>
  /** As the logits in shape and type: for logits as input. */
  readonly dLogits?: Tensor
  /** As the hidden states in shape and type: for hidden states as input. */
  readonly dHidden?: Tensor
  /** f32 [V, C]: for hidden states as input. */
  readonly dWeight?: Tensor<'f32'>
  /** f32 [V]: for a head with a bias. */
  readonly dBias?: Tensor<'f32'>
  /** Reads the loss's metrics, which are valid until the step is disposed. */
  readonly metrics: () => Promise<LossMetrics>
  /** Frees all tensors of the step. A second call does nothing. */
  dispose(): void
}

type Gradient = 'dLogProbs' | 'dLogits' | 'dHidden' | 'dWeight' | 'dBias'
type CommonResults = Omit<GrpoStep, Gradient>

/** The results of a step on log-probabilities. */
export interface LogProbsStep extends CommonResults {
  /** f32 [T]: the gradient of the loss. */
  readonly dLogProbs: Tensor<'f32'>
}

/** The results of a step on logits. */
export interface LogitsStep<D extends FloatDType = FloatDType> extends CommonResults {
  /** The gradient of the loss, as the logits in shape and type. */
  readonly dLogits: Tensor<D>
}

/** The results of a step on hidden states; with a bias also `BiasGradient`. */
export interface HeadStep<D extends FloatDType = FloatDType>
  extends CommonResults,
    Readonly<HeadGradients<D>> {}

/** Where the KL divergence from the reference policy stands. */
export interface KlPlacement {
  /**
   * In the 'loss', or in the 'reward' of each sequence, where it changes advantages (see applyKlPenalty): of oldLogProbs,
   * or of logProbs as model, from refLogProbs. `kl` is 'k1' then unless given, and the metric `kl` is still that of the
   * current weights.
   * @default 'loss'
   */
  klIn?: 'loss' | 'reward'
}

/** A batch of rollouts with their rewards, and the options of grpoStep. */
export interface RewardsBatch
  extends AdvantageOptions,
    KlPlacement,
    Omit<PolicyLossInputs, 'advantages'> {
  /** f32 [B], or [B, K] of K kinds for 'gdpo' and `combine`. Must be finite, but for the NaN of `combine`. */
  rewards: Tensor<'f32'>
  /** The group (prompt) of each of the B sequences: any integers in any order. */
  groups: Ints
  advantages?: never
}

type NoAdvantageOptions = { [K in keyof AdvantageOptions]?: never }

/**
 * A batch of rollouts with the caller's own advantages, f32 [B] or [T], and the options of grpoStep. With rewards for
 * each step of a perceiver's answer (Perceval) they are the sequence's advantage, repeated, plus what the process adds
 * to a token.
 */
export interface AdvantagesBatch extends PolicyLossInputs, NoAdvantageOptions {
  rewards?: never
  klIn?: never
}

/** The batch and the options of grpoStep, beside the model. */
export type GrpoBatch = RewardsBatch | AdvantagesBatch

/** The arguments of grpoStep: a batch, and the model's part, which decides the gradients returned. */
export type GrpoStepArgs = GrpoModel & GrpoBatch

/** @internal */
export const modelNames: Names<GrpoModel> = {
  logProbs: true,
  logits: true,
  hidden: true,
  weight: true,
  bias: true,
  targets: true,
  temperature: true,
}
const argumentNames: Names<GrpoStepArgs> = {
  ...lossNames,
  ...modelNames,
  ...advantageOptionNames,
  rewards: true,
  groups: true,
  klIn: true,
}

/**
 * One GRPO step on a batch of rollouts: rewards and groups -> advantages -> loss -> gradient, all on
 * the device. The caller's own advantages may be given instead of rewards and groups.
 *
 * Estimators that weight by length use a sequence's kept tokens, which are counted on the device if there is a
 * mask. 'opt_baseline' takes oldLogProbs and importanceWeights for its weights. It is one operation: its errors carry
 * its name, and a fault poisons all of its results. Only the mask excludes tokens. Source: Shao et al. 2024 (GRPO); the
 * defaults are Perceive-to-Reason's.
 *
 * @returns the loss, the advantages, the log-probabilities, and the gradient for what was given: dLogProbs,
 *   dLogits, or dHidden and dWeight, with dBias if there is a bias.
 * @throws P2RError ERR_VALUE, ERR_SHAPE, ERR_DTYPE and ERR_DEVICE for wrong arguments; a fault on the device, such as a
 *   token outside the vocabulary, is thrown by the reads.
 * @example
 * ```js
 * import { grpoStep, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * // Two groups of two answers, of two tokens each; the first of each group was right.
 * const step = grpoStep({
 *   logProbs: device.tensor(new Float32Array(8).fill(-0.7), [8]),
 *   rewards: device.tensor([1, 0, 1, 0], [4]),
 *   groups: [0, 0, 1, 1],
 *   cuSeqlens: [0, 2, 4, 6, 8],
 *   clipHigh: 0.28,
 * })
 * // The gradient is negative where the answer was right.
 * console.log(await step.dLogProbs.read())
 * console.log((await step.metrics()).tokens) // 8
 * step.dispose()
 * device.dispose()
 * ```
 */
export function grpoStep(a: LogProbsModel & GrpoBatch): LogProbsStep
export function grpoStep<D extends FloatDType>(a: LogitsModel<D> & GrpoBatch): LogitsStep<D>
export function grpoStep<D extends FloatDType>(
  a: HeadModel<D> & GrpoBatch & Required<Pick<HeadModel<D>, 'bias'>>,
): HeadStep<D> & BiasGradient
export function grpoStep<D extends FloatDType>(
  a: HeadModel<D> & GrpoBatch & { bias?: never },
): HeadStep<D>
export function grpoStep(a: GrpoStepArgs): GrpoStep
export function grpoStep(a: GrpoStepArgs): GrpoStep {
  const op = 'grpoStep'
  a = checkArguments(a, argumentNames, op)
  return stepAs(op, a)
}

/** @internal For PraGrpo, under its name. */
export function stepAs(op: string, a: GrpoStepArgs): GrpoStep {
  checkModel(op, a)
  return scope(() => composite(op, () => step(op, a)))
}

/**
 * One kind of model, of as many tokens as the batch has. The operations would compare the batch's tensors with
 * the model's, and so blame the batch for a model of the wrong length.
 */
function checkModel(op: string, a: GrpoStepArgs): void {
  const kinds = (['logProbs', 'logits', 'hidden'] as const).filter((name) => a[name] !== undefined)
  const [kind] = kinds
  if (kind === undefined || kinds.length > 1)
    refuse(
      'ERR_VALUE',
      op,
      `the model must be logProbs, or logits and targets, or hidden, weight and targets; got ${kinds.join(' and ') || 'none of them'}`,
    )
  const parts = { logProbs: [], logits: ['targets'], hidden: ['targets', 'weight'] } as const
  for (const name of [kind, ...parts[kind]]) handleOf(a[name], name, op)
  for (const name of foreign[kind])
    if (a[name] !== undefined)
      refuse('ERR_VALUE', op, `${name} does not belong to a model of ${kind}`)

  const tokens = tokensOf(hostInts(a.cuSeqlens, 'cuSeqlens', op))
  const lengths = [
    kind,
    'targets',
    'oldLogProbs',
    'refLogProbs',
    'mask',
    'importanceWeights',
  ] as const
  // Where nothing is as long as cuSeqlens says, they are what is wrong, and refused by the operations.
  if (tokens === undefined || !lengths.some((name) => a[name]?.shape?.[0] === tokens)) return
  for (const [name, dtypes, columns] of [
    ['logProbs', ['f32'], ''],
    ['logits', ['f32', 'f16', 'bf16'], ', V'],
    ['hidden', ['f32', 'f16', 'bf16'], ', C'],
    ['targets', ['i32'], ''],
  ] as ['logProbs' | 'logits' | 'hidden' | 'targets', DType[], string][]) {
    const tensor: Tensor | undefined = a[name]
    if (!tensor || !dtypes.includes(tensor.dtype)) continue
    const { shape } = tensor
    if (shape.length === (columns ? 2 : 1) && shape[0] === tokens) continue
    const given = `[${shape.join(', ')}]`
    refuse(
      'ERR_SHAPE',
      op,
      `${name} must be [${tokens}${columns}], because cuSeqlens ends at ${tokens} tokens, got ${given}`,
    )
  }
}

/** The fields of other models. */
const foreign = {
  logProbs: ['targets', 'weight', 'bias', 'temperature'],
  logits: ['weight', 'bias'],
  hidden: [],
} as const

/** T of well-formed cuSeqlens; undefined for others, which the operations refuse. */
function tokensOf(cuSeqlens: Float64Array): number | undefined {
  if (cuSeqlens[0] !== 0 || !cuSeqlens.every(Number.isInteger)) return undefined
  for (let b = 1; b < cuSeqlens.length; b++) if (cuSeqlens[b]! < cuSeqlens[b - 1]!) return undefined
  return cuSeqlens.at(-1)
}

function step(op: string, given: GrpoStepArgs): GrpoStep {
  const a = withKlInReward(op, given)
  const options = { ...a, ...advantagesOf(op, a) }
  const { advantages } = options

  if (a.logProbs !== undefined) {
    const { loss, dLogProbs, metrics, hidden } = withHidden(
      lossAs(op, { ...options, logProbs: a.logProbs }),
    )
    const logProbs = a.logProbs.to(a.logProbs.device)
    return held({ loss, logProbs, dLogProbs, advantages, metrics }, hidden)
  }
  if (a.hidden !== undefined) return stepOnHead(op, a, options)
  const rows = { logits: a.logits, targets: a.targets, temperature: a.temperature ?? 1 }
  const forward = tokenLogProbs({ ...rows, entropy: takesEntropy(a) })
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

/** The same step with rewards less the KL term, where it stands in them, and none in the loss. */
function withKlInReward(op: string, a: GrpoStepArgs): GrpoStepArgs {
  if (a.klIn === undefined || choice(a.klIn, ['loss', 'reward'], 'klIn', op) === 'loss') return a
  if (a.rewards === undefined) refuse('ERR_VALUE', op, "klIn 'reward' needs rewards")
  const { refLogProbs, kl = 'k1', klUnbiased } = a
  const logProbs = a.oldLogProbs ?? a.logProbs
  if (!refLogProbs || !logProbs)
    refuse('ERR_VALUE', op, "klIn 'reward' needs refLogProbs, and oldLogProbs or logProbs")
  if (klUnbiased) refuse('ERR_VALUE', op, "klUnbiased must not be set with klIn 'reward'")
  if (kl === 'none') return a
  const { rewards, cuSeqlens } = a
  const penalty = { rewards, logProbs, refLogProbs, cuSeqlens, kl }
  const less = penaltyAs(op, { ...penalty, ...pickDefined(a, ['mask', 'klCoef', 'klClamp']) })
  return { ...a, rewards: less, kl, klCoef: 0 }
}

const advantageOptions = Object.keys(advantageOptionNames) as (keyof AdvantageOptions)[]

/** The caller's advantages, copied, or those of the rewards. */
function advantagesOf(
  op: string,
  a: GrpoBatch,
): { advantages: Tensor<'f32'>; advantagesPer?: 'sequence' | 'token' } {
  if (a.advantages !== undefined) {
    const byPrompt = [a.aggregation, a.termAggregation].includes('prompt-mean')
    const ofRewards = byPrompt ? (['rewards'] as const) : (['rewards', 'groups'] as const)
    for (const name of [...ofRewards, 'klIn', ...advantageOptions] as const)
      if (a[name] !== undefined)
        refuse('ERR_VALUE', op, `${name} must be absent where advantages are given`)
    handleOf(a.advantages, 'advantages', op)
    return {
      advantages: a.advantages.to(a.advantages.device),
      ...pickDefined(a, ['advantagesPer']),
    }
  }
  const byToken = a.estimator === 'opt_baseline'
  const advantagesPer = byToken ? 'token' : 'sequence'
  if (a.advantagesPer !== undefined && a.advantagesPer !== advantagesPer)
    refuse('ERR_VALUE', op, `advantagesPer must be '${advantagesPer}' for this estimator`)
  if (byToken && a.oldLogProbs === undefined)
    refuse('ERR_VALUE', op, "the estimator 'opt_baseline' needs oldLogProbs")
  const { cuSeqlens } = a
  const advantages = advantagesAs(op, {
    rewards: a.rewards,
    groups: a.groups,
    ...pickDefined(a, advantageOptions),
    ...(a.mask || byToken
      ? { cuSeqlens, ...pickDefined(a, ['mask']) }
      : { lengths: differences(hostInts(cuSeqlens, 'cuSeqlens', op)) }),
    ...(byToken && {
      ...(a.oldLogProbs && { logProbs: a.oldLogProbs }),
      ...pickDefined(a, ['importanceWeights']),
    }),
  })
  return { advantages, advantagesPer }
}

function takesEntropy(options: PolicyLossOptions): boolean {
  return !!options.entropyCoef || (options.topEntropyQuantile ?? 1) !== 1
}

/** In one pass if each token's gradient depends on that token only, else log-probs first. */
function stepOnHead(op: string, a: LinearHead, options: PolicyLossInputs): GrpoStep {
  const { advantages } = options
  const head: LinearHead = {
    hidden: a.hidden,
    weight: a.weight,
    targets: a.targets,
    ...pickDefined(a, ['bias', 'temperature']),
  }
  const byOthers: (string | undefined)[] = ['gspo', 'luspo', 'gmpo', 'vespo', 'clip_cov', 'kl_cov']
  if (!byOthers.includes(options.objective) && (options.topEntropyQuantile ?? 1) === 1) {
    const { hidden, ...results } = withHidden(linearLossAs(op, { ...options, ...head }))
    return held({ ...results, advantages }, hidden)
  }
  const forward = linearLogProbs({ ...head, entropy: takesEntropy(options) })
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
