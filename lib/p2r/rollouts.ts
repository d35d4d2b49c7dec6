// Batches of rollouts: what PraGrpo's `rollout` makes, its `step` takes and saveRollouts writes.
import { checkArray, checkReceiver, choice, describeValue, isObject } from '../arguments.js'
import type { Device } from '../device.js'
import { P2RError, refuse } from '../errors.js'
import { type AdvantageEstimator, groupAdvantages } from '../ops/advantages.js'
import { holds } from '../scope.js'
import { handleOf, type Tensor } from '../tensor.js'
import type { Evidence } from './evidence.js'
import { type Completion, isTruncated, type Role } from './policy.js'
import type { AnswerForm, RolePrompt } from './prompts.js'

/** A question about an image whose answer is known. */
export interface Sample {
  /** u8 [height, width, 3]. It stays the caller's, and must outlive the batch's evidence. */
  image: Tensor<'u8'>
  /** The question, with its options, if it has any. */
  question: string
  /** How it is answered: by a letter ('mca'), a number ('na') or in words ('free_form'). */
  answerForm: AnswerForm
  /** The right answer. */
  truth: string
}

/** An image of a request in a file that saveRollouts wrote. */
export interface StoredImage {
  /** The SHA-256 of its pixels, height · width · 3 bytes, in hexadecimal digits. */
  sha256: string
  /** In pixels. */
  height: number
  /** In pixels. */
  width: number
  /** A PNG, relative to the folder of the batch's file; absent where hashes alone were saved. */
  file?: string
}

/** What the trained role was asked: with a completion's tokens all that a model's forward pass needs. */
export interface RolloutRequest extends RolePrompt {
  /**
   * u8 [height, width, 3] each, as they were encoded for the policy. They are computed on first access, for which the
   * sample's image must be alive, and belong to the batch. Reading them is ERR_VALUE where the batch is of a file
   * without images.
   */
  readonly images: readonly Tensor<'u8'>[]
  /** The ids of the prompt's tokens, images included, where the policy gives them. */
  promptTokens?: readonly number[]
  /** The images in the file that the batch is of. */
  stored?: readonly StoredImage[]
}

/** One rollout of the trained role with its reward, or with the error for which it has none. */
export interface RolloutItem {
  /** Index of the sample in those given to `rollout`. */
  sample: number
  /**
   * What the trained role was asked, the same object for all rollouts of a sample; absent where it gave nothing. With
   * `zoom` each rollout has its own, whose images are the first one and then its crops, in the order of their tokens.
   */
  request?: RolloutRequest
  /** The trained role's output; its text is '' if it failed. */
  completion: Completion
  /** What the reasoner was shown. Its images are computed again on access; the sample's image must be alive then. */
  evidence?: Evidence
  /** Why the reward of a perception is 0 whatever the answer; the reasoner was not called. See perceptionFault. */
  fault?: 'overlap' | 'label'
  /** The other role's output: the reasoner's to this perception, or the perception reasoned about. */
  counterpart?: string
  /** The answer that was rewarded. */
  answer?: string
  /** Whether a ZoomAgent still called its tool in its last turn: the reward is 0. Absent where it did not. */
  outOfTurns?: boolean
  /** Why there is no reward. Such an item belongs to no group. */
  error?: Error
  /** 1 or 0; NaN where there is an error. */
  reward: number
}

/** What is known of a batch once it is rolled out. */
export interface RolloutMetrics {
  /** Over the items without an error; 0 where there are none. */
  rewardMean: number
  /** Share of groups whose rewards are all equal, so that their gradient is 0; without groups of one. */
  groupsWithoutSignal: number
  /** Number of items with a fault, of each kind. */
  faults: { overlap: number; label: number }
  /** Number of items with an error. */
  errors: number
  /**
   * Number of boxes without a crop, of each perception once; see Evidence's `dropped`. Absent in files of earlier
   * releases.
   */
  droppedBoxes?: number
  /** Number of items whose completion the limit of tokens cut off. They have a reward, if they have no error. */
  truncated: number
  /** Number of trajectories of a ZoomAgent whose turns ran out, which have reward 0. */
  outOfTurns: number
  /** Number of all items. */
  items: number
}

/** The rollouts of one role for a list of samples, as `step` takes them. */
export interface RolloutBatch extends Disposable {
  /** The trained role. */
  role: Role
  /** All rollouts, sample by sample. */
  items: readonly RolloutItem[]
  /** [B], over the items without an error, in their order; a group is one sample under one role. */
  groups: Int32Array
  /** f32 [B], one an item without an error. */
  rewards: Tensor<'f32'>
  /** f32 [B], of the option `estimator`. */
  advantages: Tensor<'f32'>
  /** [B + 1]: where each completion's tokens begin, when the policy gives token ids. Training needs them. */
  cuSeqlens?: Int32Array
  /** [T]: the completions' tokens, when the policy gives token ids. */
  tokens?: Int32Array
  /** u8 [T]: 1 for the model's own tokens, 0 for those of tool results; absent where all are the model's. */
  mask?: Tensor<'u8'>
  /** f32 [T], when the policy gives log-probabilities; 0 where the mask is. */
  oldLogProbs?: Tensor<'f32'>
  /** At which temperature the tokens were sampled. Left out: that of the trainer that steps the batch. */
  temperature?: number
  /**
   * At which temperature `oldLogProbs` are.
   * @default 1
   */
  oldLogProbsTemperature?: number
  /** Of this batch. */
  metrics: RolloutMetrics
  /** Frees tensors and evidence. The samples' images are the caller's. A second call does nothing. */
  dispose(): void
}

/** @internal The argument `batch`. */
export function checkBatch(value: unknown, op: string): RolloutBatch {
  const batch = value as Partial<RolloutBatch> | null | undefined
  if (!isObject(batch) || Array.isArray(batch) || !(batch.groups instanceof Int32Array))
    refuse('ERR_VALUE', op, `batch must be a RolloutBatch, got ${describeValue(value)}`)
  choice(batch.role as Role, ['perceiver', 'reasoner'], 'batch.role', op)
  checkArray(batch.items as readonly RolloutItem[], 'batch.items', op)
  handleOf(batch.rewards, 'batch.rewards', op)
  handleOf(batch.advantages, 'batch.advantages', op)
  return batch as RolloutBatch
}

/**
 * @internal The batch of a role's items: groups, advantages and packed tokens of those without an error. Where some
 * have tokens or log-probabilities, those that lack them get an error.
 */
export function makeBatch(
  role: Role,
  rolled: readonly RolloutItem[],
  device: Device,
  sampling: Required<Pick<RolloutBatch, 'temperature' | 'oldLogProbsTemperature'>>,
  estimator?: AdvantageEstimator,
): RolloutBatch {
  const items = withErrors(rolled, role)
  const kept = items.filter((item) => !item.error)
  // One id per (sample, role), so that groups stay distinct if batches of both roles are concatenated.
  const groups = Int32Array.from(kept, ({ sample }) => 2 * sample + +(role === 'reasoner'))
  const values = Float32Array.from(kept, ({ reward }) => reward)
  const packed = pack(kept)
  const rewards = device.tensor(values, [kept.length])
  const advantages = groupAdvantages({
    rewards,
    groups,
    ...(estimator && { estimator }),
    ...(packed && { lengths: packed.lengths }),
  })
  const mask = packed?.mask && device.tensor(packed.mask, [packed.mask.length])
  const oldLogProbs = packed?.logProbs && device.tensor(packed.logProbs, [packed.logProbs.length])
  return new Rollouts({
    role,
    items,
    groups,
    rewards,
    advantages,
    metrics: rolloutMetrics(items, groups, values),
    ...sampling,
    ...(packed && { cuSeqlens: packed.cuSeqlens, tokens: packed.tokens }),
    ...(mask && { mask }),
    ...(oldLogProbs && { oldLogProbs }),
  })
}

/** @internal The images of a request. */
export interface RequestImages extends Disposable {
  readonly images: readonly Tensor<'u8'>[]
}

/** @internal Those of an evidence, which it disposes: the annotated image, then the crops. */
export class EvidenceImages implements RequestImages {
  readonly evidence: Evidence

  constructor(evidence: Evidence) {
    this.evidence = evidence
  }

  get images(): readonly Tensor<'u8'>[] {
    return [this.evidence.annotated, ...this.evidence.crops]
  }

  [Symbol.dispose](): void {
    this.evidence.dispose()
  }
}

/** @internal A request whose images are made when they are asked for. */
export class AskedRequest implements RolloutRequest {
  readonly system: string
  readonly prompt: string
  declare readonly promptTokens?: readonly number[]
  declare readonly stored?: readonly StoredImage[]
  readonly #make: () => RequestImages
  #made: RequestImages | undefined
  #disposed = false

  constructor(parts: Omit<RolloutRequest, 'images'>, make: () => RequestImages) {
    this.system = parts.system
    this.prompt = parts.prompt
    if (parts.promptTokens) this.promptTokens = parts.promptTokens
    if (parts.stored) this.stored = parts.stored
    this.#make = make
  }

  get images(): readonly Tensor<'u8'>[] {
    const op = 'request'
    checkReceiver(isObject(this) && #make in this, 'RolloutRequest', op)
    if (this.#disposed) refuse('ERR_DISPOSED', op, 'the batch has been disposed')
    this.#made ??= this.#make()
    return this.#made.images
  }

  /** Calls f with the images, and frees them afterwards if nobody else holds them. */
  async withImages<R>(f: (images: readonly Tensor<'u8'>[]) => Promise<R>): Promise<R> {
    if (this.#made) return f(this.images)
    using made = this.#make()
    return await f(made.images)
  }

  dispose(): void {
    this.#disposed = true
    this.#made?.[Symbol.dispose]()
  }

  *[holds](): Iterable<unknown> {
    if (this.#made && !this.#disposed) yield this.#made
  }
}

/** @internal */
export class Rollouts implements RolloutBatch {
  readonly role: Role
  readonly items: readonly RolloutItem[]
  readonly groups: Int32Array
  readonly rewards: Tensor<'f32'>
  readonly advantages: Tensor<'f32'>
  readonly metrics: RolloutMetrics
  readonly cuSeqlens?: Int32Array
  readonly tokens?: Int32Array
  readonly mask?: Tensor<'u8'>
  readonly oldLogProbs?: Tensor<'f32'>
  readonly temperature?: number
  readonly oldLogProbsTemperature?: number

  readonly #images: readonly Tensor[]

  /** `images` are those of a loaded batch's requests, which it disposes. */
  constructor(
    parts: Omit<RolloutBatch, 'dispose' | typeof Symbol.dispose>,
    images: readonly Tensor[] = [],
  ) {
    this.#images = images
    this.role = parts.role
    this.items = parts.items
    this.groups = parts.groups
    this.rewards = parts.rewards
    this.advantages = parts.advantages
    this.metrics = parts.metrics
    if (parts.cuSeqlens) this.cuSeqlens = parts.cuSeqlens
    if (parts.tokens) this.tokens = parts.tokens
    if (parts.mask) this.mask = parts.mask
    if (parts.oldLogProbs) this.oldLogProbs = parts.oldLogProbs
    if (parts.temperature !== undefined) this.temperature = parts.temperature
    if (parts.oldLogProbsTemperature !== undefined)
      this.oldLogProbsTemperature = parts.oldLogProbsTemperature
  }

  dispose(): void {
    checkReceiver(this instanceof Rollouts, 'RolloutBatch', 'dispose')
    this.rewards.dispose()
    this.advantages.dispose()
    this.mask?.dispose()
    this.oldLogProbs?.dispose()
    for (const image of this.#images) image.dispose()
    for (const { evidence, request } of this.items) {
      evidence?.dispose()
      if (request instanceof AskedRequest) request.dispose()
    }
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  [holds](): Iterable<Tensor> {
    return this.#images
  }
}

/** Metrics of a batch; `groups` and `rewards` are those of the items without an error. */
function rolloutMetrics(
  items: readonly RolloutItem[],
  groups: Int32Array,
  rewards: Float32Array,
): RolloutMetrics {
  const byGroup = new Map<number, number[]>()
  for (const [i, group] of groups.entries())
    byGroup.set(group, [...(byGroup.get(group) ?? []), rewards[i]!])
  const several = [...byGroup.values()].filter((group) => group.length > 1)
  const silent = several.filter((group) => group.every((reward) => reward === group[0]))
  const perceptions = new Set(items.flatMap(({ evidence }) => evidence ?? []))
  const count = (f: (item: RolloutItem) => boolean): number => items.filter(f).length
  return {
    rewardMean: rewards.length ? rewards.reduce((sum, r) => sum + r, 0) / rewards.length : 0,
    groupsWithoutSignal: several.length ? silent.length / several.length : 0,
    faults: {
      overlap: count(({ fault }) => fault === 'overlap'),
      label: count(({ fault }) => fault === 'label'),
    },
    errors: count(({ error }) => error !== undefined),
    droppedBoxes: [...perceptions].reduce((sum, { dropped }) => sum + dropped, 0),
    truncated: count(({ completion }) => isTruncated(completion)),
    outOfTurns: count(({ outOfTurns }) => outOfTurns === true),
    items: items.length,
  }
}

/** The items, of which those that cannot be trained on beside the others have an error. */
function withErrors(items: readonly RolloutItem[], role: Role): RolloutItem[] {
  const given = (name: 'tokens' | 'logProbs'): boolean =>
    items.some(({ error, completion }) => !error && completion[name])
  const wanted = { tokens: given('tokens'), logProbs: given('logProbs') }
  return items.map((item) => {
    const why = item.error ? undefined : missingIn(item.completion, wanted)
    if (why === undefined) return item
    const message = `[rollout] the ${role} gave ${why}`
    return {
      ...item,
      error: new P2RError('ERR_POLICY', message, { op: 'rollout' }),
      reward: Number.NaN,
    }
  })
}

function missingIn(
  { tokens, logProbs, mask }: Completion,
  wanted: { tokens: boolean; logProbs: boolean },
): string | undefined {
  if (wanted.tokens && !tokens) return 'no token ids, but gave those of other rollouts'
  // Without tokens there is nothing to train on, and log-probabilities do not matter.
  if (tokens && mask && !isMaskOf(mask, tokens)) return 'a mask that is not 0 or 1 for each token'
  if (!tokens || !wanted.logProbs) return undefined
  if (!logProbs) return 'no log-probabilities, but gave those of other rollouts'
  if (logProbs.length !== tokens.length)
    return `${logProbs.length} log-probabilities of ${tokens.length} tokens`
  const missing = logProbs.filter((x) => !Number.isFinite(x)).length
  return missing ? `no log-probability of ${missing} of its ${tokens.length} tokens` : undefined
}

function isMaskOf(mask: readonly number[], tokens: readonly number[]): boolean {
  return mask.length === tokens.length && mask.every((kept) => kept === 0 || kept === 1)
}

interface Packed {
  cuSeqlens: Int32Array
  tokens: Int32Array
  /** Of the model's own tokens. */
  lengths: Int32Array
  mask?: Uint8Array
  logProbs?: Float32Array
}

/** @internal How many tokens of a completion are trained on. */
export function keptTokens({ tokens = [], mask }: Completion): number {
  return mask ? mask.reduce((sum, kept) => sum + kept, 0) : tokens.length
}

/** The packed tokens, if the items have them; their mask and log-probabilities likewise. */
function pack(items: readonly RolloutItem[]): Packed | undefined {
  const completions = items.map(({ completion }) => completion)
  if (!completions.every(({ tokens }) => tokens)) return undefined
  const cuSeqlens = new Int32Array(items.length + 1)
  for (const [i, { tokens }] of completions.entries())
    cuSeqlens[i + 1] = cuSeqlens[i]! + tokens!.length
  const tokens = Int32Array.from(completions.flatMap((each) => [...each.tokens!]))
  const lengths = Int32Array.from(completions, keptTokens)
  const packed: Packed = { cuSeqlens, tokens, lengths }
  if (completions.some(({ mask }) => mask))
    packed.mask = Uint8Array.from(
      completions.flatMap(({ tokens, mask }) => [...(mask ?? tokens!.map(() => 1))]),
    )
  if (completions.every(({ logProbs }) => logProbs))
    packed.logProbs = Float32Array.from(completions.flatMap((each) => [...each.logProbs!]))
  return packed
}
