// Batches of rollouts: what PraGrpo's `rollout` makes, its `step` takes and saveRollouts writes.
import type { Device } from '../device.js'
import { type AdvantageEstimator, groupAdvantages } from '../ops/advantages.js'
import type { Tensor } from '../tensor.js'
import type { Evidence } from './evidence.js'
import type { Completion, Role } from './policy.js'
import type { AnswerForm } from './prompts.js'

/** A question about an image whose answer is known. */
export interface Sample {
  image: Tensor
  question: string
  answerForm: AnswerForm
  truth: string
}

export interface RolloutItem {
  /** Index of the sample. */
  sample: number
  /** Of the trained role; its text is '' if it failed. */
  completion: Completion
  /** Its images are computed again on access; the sample's image must be alive then. */
  evidence?: Evidence
  /** Why the reward of a perception is 0 whatever the answer; the reasoner was not called. */
  fault?: 'overlap' | 'label'
  /** The other role's output: the reasoner's to this perception, or the perception reasoned about. */
  counterpart?: string
  /** The answer that was rewarded. */
  answer?: string
  /** Why there is no reward. Such an item belongs to no group. */
  error?: Error
  /** NaN where there is an error. */
  reward: number
}

/** Of one batch, known once it is rolled out. */
export interface RolloutMetrics {
  /** Over the items without an error; 0 where there are none. */
  rewardMean: number
  /** Share of groups whose rewards are all equal, so that their gradient is 0; without groups of one. */
  groupsWithoutSignal: number
  /** Items with a fault, of each kind, and items with an error. */
  faults: { overlap: number; label: number }
  errors: number
  items: number
}

export interface RolloutBatch extends Disposable {
  role: Role
  items: readonly RolloutItem[]
  /** Over the items without an error, in their order; a group is one sample under one role. */
  groups: Int32Array
  /** f32 [B], one an item without an error. */
  rewards: Tensor
  advantages: Tensor
  /** Of the completions' tokens, when the policy gives token ids. Training without them is ERR_POLICY. */
  cuSeqlens?: Int32Array
  tokens?: Int32Array
  /** f32 [T], when it gives log-probabilities. */
  oldLogProbs?: Tensor
  metrics: RolloutMetrics
  /** Frees tensors and evidence. The samples' images are the caller's. */
  dispose(): void
}

/** @internal The batch of a role's items: groups, advantages and packed tokens of those without an error. */
export function makeBatch(
  role: Role,
  items: RolloutItem[],
  device: Device,
  estimator?: AdvantageEstimator,
): RolloutBatch {
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
    ...(packed && { lengths: Int32Array.from(kept, (item) => item.completion.tokens!.length) }),
  })
  const oldLogProbs = packed?.logProbs && device.tensor(packed.logProbs, [packed.logProbs.length])
  return new Rollouts({
    role,
    items,
    groups,
    rewards,
    advantages,
    metrics: rolloutMetrics(items, groups, values),
    ...(packed && { cuSeqlens: packed.cuSeqlens, tokens: packed.tokens }),
    ...(oldLogProbs && { oldLogProbs }),
  })
}

/** @internal */
export class Rollouts implements RolloutBatch {
  readonly role: Role
  readonly items: readonly RolloutItem[]
  readonly groups: Int32Array
  readonly rewards: Tensor
  readonly advantages: Tensor
  readonly metrics: RolloutMetrics
  readonly cuSeqlens?: Int32Array
  readonly tokens?: Int32Array
  readonly oldLogProbs?: Tensor

  constructor(parts: Omit<RolloutBatch, 'dispose' | typeof Symbol.dispose>) {
    this.role = parts.role
    this.items = parts.items
    this.groups = parts.groups
    this.rewards = parts.rewards
    this.advantages = parts.advantages
    this.metrics = parts.metrics
    if (parts.cuSeqlens) this.cuSeqlens = parts.cuSeqlens
    if (parts.tokens) this.tokens = parts.tokens
    if (parts.oldLogProbs) this.oldLogProbs = parts.oldLogProbs
  }

  dispose(): void {
    this.rewards.dispose()
    this.advantages.dispose()
    this.oldLogProbs?.dispose()
    for (const { evidence } of this.items) evidence?.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
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
  const count = (f: (item: RolloutItem) => boolean): number => items.filter(f).length
  return {
    rewardMean: rewards.length ? rewards.reduce((sum, r) => sum + r, 0) / rewards.length : 0,
    groupsWithoutSignal: several.length ? silent.length / several.length : 0,
    faults: {
      overlap: count(({ fault }) => fault === 'overlap'),
      label: count(({ fault }) => fault === 'label'),
    },
    errors: count(({ error }) => error !== undefined),
    items: items.length,
  }
}

/** The packed tokens, if every item has them; log-probabilities likewise. */
function pack(
  items: readonly RolloutItem[],
): { cuSeqlens: Int32Array; tokens: Int32Array; logProbs?: Float32Array } | undefined {
  if (!items.every(({ completion }) => completion.tokens)) return undefined
  const cuSeqlens = new Int32Array(items.length + 1)
  for (const [i, { completion }] of items.entries())
    cuSeqlens[i + 1] = cuSeqlens[i]! + completion.tokens!.length
  const tokens = Int32Array.from(items.flatMap(({ completion }) => [...completion.tokens!]))
  const known = items.every(
    ({ completion: { tokens, logProbs } }) => logProbs?.length === tokens!.length,
  )
  if (!known) return { cuSeqlens, tokens }
  const logProbs = Float32Array.from(items.flatMap(({ completion }) => [...completion.logProbs!]))
  return { cuSeqlens, tokens, logProbs }
}
