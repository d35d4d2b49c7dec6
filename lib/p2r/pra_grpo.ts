import type { AbortSignalLike } from '../abort.js'
import { checkArray, checkInteger, checkPositive, checkString } from '../arguments.js'
import { checkDevice, type Device } from '../device.js'
import { P2RError, refuse } from '../errors.js'
import type { AdvantageEstimator } from '../ops/advantages.js'
import type { LossMetrics, PolicyLossOptions } from '../ops/policy_loss.js'
import { handleOf, type Tensor } from '../tensor.js'
import { collectEvidence, type Evidence } from './evidence.js'
import { type GrpoModel, type GrpoStep, grpoStep } from './grpo.js'
import { Perceiver, type PerceiverOptions } from './perceiver.js'
import {
  answered,
  checkPolicy,
  messageOf,
  type Policy,
  type PolicyRequest,
  type Role,
} from './policy.js'
import { checkForm, type PromptOverrides } from './prompts.js'
import { Reasoner } from './reasoner.js'
import { answerReward, perceptionFault, type RewardRules, type Verifier } from './reward.js'
import {
  makeBatch,
  type RolloutBatch,
  type RolloutItem,
  type RolloutMetrics,
  type Sample,
} from './rollouts.js'
import { mapUnordered, pipelineDepth, Semaphore } from './semaphore.js'

/** Steps of each role's phase; the perceiver's comes first. */
export interface Schedule {
  perceiver: number
  reasoner: number
}

/** The part of PraGrpo's options that a recipe such as p2r() sets. */
export interface PraGrpoSettings {
  /** Rollouts a sample: 8 unless given. */
  groupSize?: number
  /** One step each unless given. */
  schedule?: Schedule
  /** Rounds of both phases; unlimited unless given. */
  rounds?: number
  /** 'grpo' unless given. */
  estimator?: AdvantageEstimator
  loss?: PolicyLossOptions
  /** Of the trained role's rollouts: 1 unless given. The frozen one answers greedily. */
  temperature?: number
}

export interface PraGrpoOptions extends PraGrpoSettings {
  perceiver: Policy
  reasoner: Policy
  /** For samples of free form. */
  verifier?: Verifier
  /** Where rewards, advantages and losses are computed. */
  device: Device
  /**
   * The policies' requests in flight: 32 unless given. About 1.5 times as many samples are processed at
   * once, and at most as many have evidence images in memory.
   */
  concurrency?: number
  /** Of extraction, rewards and faults: 'reference' unless given. */
  rules?: RewardRules
  /** The perceiver's image size and the crops, as in Perceiver. */
  evidence?: Omit<PerceiverOptions, 'temperature' | 'maxTokens' | 'prompts'>
  prompts?: PromptOverrides
  /** 1024 and 2048 unless given. */
  maxTokens?: Partial<Record<Role, number>>
  /** Steps already made by the run that this one continues. */
  step?: number
}

/**
 * The paper's training: one perceiver stage, then one reasoner stage, each an epoch of `samples` in
 * batches of `batch`. Its loss is grpoStep's default: PPO with clip 0.2 and dual clip 3, mean over tokens,
 * k3 with 0.01 to the weights that the stage began with, where their log-probabilities are given.
 * Source: Perceive-to-Reason, example/qwen3_vl_4b_p2r.
 */
export function p2r(
  options: { samples?: number; batch?: number } = {},
): Required<
  Pick<PraGrpoSettings, 'groupSize' | 'schedule' | 'rounds' | 'estimator' | 'loss' | 'temperature'>
> {
  const { samples = 10_000, batch = 64 } = options
  for (const [name, value] of Object.entries({ samples, batch })) checkPositive(value, name, 'p2r')
  // verl leaves out a last batch that is not full.
  const steps = Math.max(1, Math.floor(samples / batch))
  return {
    groupSize: 8,
    schedule: { perceiver: steps, reasoner: steps },
    rounds: 1,
    estimator: 'grpo',
    loss: {},
    temperature: 1,
  }
}

/** The paper's settings, but phases of `steps` steps, 1 unless given, and unlimited rounds. */
export function alternating(options: { steps?: number } = {}): PraGrpoSettings {
  const steps = checkPositive(options.steps ?? 1, 'steps', 'alternating')
  const { rounds: _, ...settings } = p2r()
  return { ...settings, schedule: { perceiver: steps, reasoner: steps } }
}

/** RolloutMetrics and the loss's own, of a role's latest step. */
export type RoleMetrics = RolloutMetrics &
  LossMetrics & {
    step: number
    /**
     * The mean of -log p of the sampled tokens, in nats: an estimate of the policy's entropy without
     * extra cost. `entropy` is exact if the loss has an entropyCoef, else 0.
     */
    sampledEntropy: number
  }

/** What the trained role's engine gives for the tokens of a batch, in their order. */
export type TrainedModel = GrpoModel & {
  /** f32 [T]: of the weights that the stage began with. The loss has its KL term then. */
  refLogProbs?: Tensor
  /** f32 [T]: replaces the batch's, which the server computed in its own precision. */
  oldLogProbs?: Tensor
}

/**
 * Perception-Reasoning Alternating GRPO. In the perceiver's phase G box rollouts are each answered by
 * the frozen reasoner; in the reasoner's phase one fixed perception is answered G times. Rewards come
 * from the final answer alone.
 *
 * Serving and training engines are the caller's: `rollout` calls the policies, `step` takes the trained
 * role's log-probabilities (or logits, or hidden states and head) and returns their gradient. The caller
 * serves the new weights before the next rollout.
 */
export class PraGrpo {
  readonly #options: PraGrpoOptions
  readonly #settings: Required<Pick<PraGrpoSettings, 'groupSize' | 'schedule' | 'temperature'>>
  readonly #policies: Record<Role, Policy>
  readonly #depth: number
  readonly #evidences: Semaphore
  readonly #stepped = new WeakSet<RolloutBatch>()
  readonly #metrics: Partial<Record<Role, Promise<RoleMetrics>>> = {}
  #step: number

  constructor(options: PraGrpoOptions) {
    const op = 'PraGrpo'
    const { schedule = { perceiver: 1, reasoner: 1 }, groupSize = 8, temperature = 1 } = options
    checkDevice(options.device, op)
    checkPositive(groupSize, 'groupSize', op)
    if (options.rounds !== undefined) checkPositive(options.rounds, 'rounds', op)
    for (const role of ['perceiver', 'reasoner'] as const)
      checkInteger(schedule[role], 0, `schedule.${role}`, op)
    if (schedule.perceiver + schedule.reasoner === 0)
      refuse('ERR_VALUE', op, 'schedule must give one of the roles a step')
    this.#options = options
    this.#settings = { groupSize, schedule, temperature }
    this.#policies = {
      perceiver: checkPolicy(options.perceiver, 'perceiver', op),
      reasoner: checkPolicy(options.reasoner, 'reasoner', op),
    }
    this.#step = checkInteger(options.step ?? 0, 0, 'step', op)
    this.#depth = pipelineDepth(checkPositive(options.concurrency ?? 32, 'concurrency', op))
    this.#evidences = new Semaphore(this.#depth)
  }

  /** Steps so far, of both roles together: the option `step` of a run that continues this one. */
  get steps(): number {
    return this.#step
  }

  /** Completed rounds. */
  get round(): number {
    const { perceiver, reasoner } = this.#settings.schedule
    return Math.floor(this.#step / (perceiver + reasoner))
  }

  /** Whether all rounds are over. */
  get finished(): boolean {
    return this.#options.rounds !== undefined && this.round >= this.#options.rounds
  }

  /** The role of the current phase. */
  get role(): Role {
    const { perceiver, reasoner } = this.#settings.schedule
    return this.#step % (perceiver + reasoner) < perceiver ? 'perceiver' : 'reasoner'
  }

  /** Of each role's latest step. Rejects as the step's own reads do. */
  async metrics(): Promise<Partial<Record<Role, RoleMetrics>>> {
    const all: Partial<Record<Role, RoleMetrics>> = {}
    for (const role of ['perceiver', 'reasoner'] as const) {
      const metrics = await this.#metrics[role]
      if (metrics) all[role] = metrics
    }
    return all
  }

  /**
   * Rollouts and rewards of one batch for the current role. A rollout that fails, because of the policy,
   * the other role or the verifier, is an item with an `error` that the batch's tensors leave out. An
   * abort rejects.
   */
  async rollout(
    samples: readonly Sample[],
    options: { signal?: AbortSignalLike } = {},
  ): Promise<RolloutBatch> {
    const op = 'rollout'
    const { role } = this
    if (this.finished) refuse('ERR_VALUE', op, `all ${this.#options.rounds} rounds are over`)
    checkArray(samples, 'samples', op)
    for (const [i, sample] of samples.entries()) this.#checkSample(sample, i, op)
    const { signal } = options
    const groups: RolloutItem[][] = []
    const roll = role === 'perceiver' ? this.#perceive : this.#reason
    const rolled = mapUnordered(samples, this.#depth, async (sample, at) => ({
      at,
      items: await roll.call(this, sample, at, signal),
    }))
    for await (const { at, items } of rolled) groups[at] = items
    signal?.throwIfAborted()
    const { device, estimator } = this.#options
    return makeBatch(role, groups.flat(), device, estimator)
  }

  /**
   * Loss and gradient of a batch under the trained role's current model; advances the schedule.
   *
   * @throws ERR_VALUE for a batch of the other role, or one that was stepped already; ERR_POLICY for one
   *   without token ids.
   */
  step(batch: RolloutBatch, model: TrainedModel): GrpoStep {
    const op = 'step'
    if (batch.role !== this.role)
      refuse('ERR_VALUE', op, `it is the ${this.role}'s turn, got a batch of the ${batch.role}`)
    if (this.finished) refuse('ERR_VALUE', op, `all ${this.#options.rounds} rounds are over`)
    if (this.#stepped.has(batch)) refuse('ERR_VALUE', op, 'this batch was stepped already')
    const { cuSeqlens, rewards, groups } = batch
    if (!cuSeqlens)
      refuse(
        'ERR_POLICY',
        op,
        `the ${batch.role}'s policy gave no token ids, and training needs them`,
      )
    const { estimator, loss } = this.#options
    const oldLogProbs = model.oldLogProbs ?? batch.oldLogProbs
    const made = grpoStep({
      ...loss,
      ...model,
      rewards,
      groups,
      cuSeqlens,
      ...(oldLogProbs && { oldLogProbs }),
      ...(estimator && { estimator }),
    })
    this.#stepped.add(batch)
    const step = this.#step++
    // Read now, because the caller may dispose the step.
    const read = Promise.all([made.metrics(), made.logProbs.read()]).then(([metrics, logProbs]) => {
      const sum = (logProbs as Float32Array).reduce((s, x) => s - x, 0)
      const sampledEntropy = logProbs.length ? sum / logProbs.length : 0
      return { ...batch.metrics, ...metrics, step, sampledEntropy }
    })
    read.catch(() => {})
    this.#metrics[batch.role] = read
    return made
  }

  #checkSample(sample: Sample, i: number, op: string): void {
    handleOf(sample?.image, `samples[${i}].image`, op)
    const form = checkForm(sample.answerForm, op)
    for (const name of ['question', 'truth'] as const)
      checkString(sample[name], `samples[${i}].${name}`, op)
    if (form === 'free_form' && !this.#options.verifier)
      refuse('ERR_VALUE', op, `samples[${i}] is of free form, which needs a verifier`)
  }

  /** G perceptions, each answered by the frozen reasoner. */
  async #perceive(sample: Sample, at: number, signal?: AbortSignalLike): Promise<RolloutItem[]> {
    const perceiver = this.#perceiver(true)
    const { image, question } = sample
    let perceived: Awaited<ReturnType<Perceiver['perceive']>>
    try {
      const n = this.#settings.groupSize
      const a = { image, question, n, ...(signal && { signal }) }
      perceived = await this.#evidences.run(() => perceiver.perceive(a), signal)
    } catch (error) {
      signal?.throwIfAborted()
      return this.#failed(at, error)
    }
    const { rules } = this.#options
    return Promise.all(
      perceived.map(async ({ completion, evidence }): Promise<RolloutItem> => {
        const item = { sample: at, completion, evidence }
        const fault = perceptionFault(evidence.boxes, rules ? { rules } : {})
        if (fault) return { ...item, fault, reward: 0 }
        try {
          answered(completion, 'perceiver', 'rollout')
          return { ...item, ...(await this.#judge(sample, evidence, signal)) }
        } catch (error) {
          signal?.throwIfAborted()
          return { ...item, error: asError(error), reward: Number.NaN }
        }
      }),
    )
  }

  /** The frozen reasoner's answer to a perception, and its reward. */
  async #judge(
    sample: Sample,
    evidence: Evidence,
    signal?: AbortSignalLike,
  ): Promise<{ counterpart: string; answer: string; reward: number }> {
    const { question, answerForm } = sample
    const [reasoned] = await this.#withImages(sample.image, evidence, signal, (shown) =>
      this.#reasoner(false).reason({
        evidence: shown,
        question,
        answerForm,
        ...(signal && { signal }),
      }),
    )
    const { answer, completion } = reasoned!
    const reward = await this.#reward(sample, answer)
    return { counterpart: completion.text, answer, reward }
  }

  /** One perception by the frozen perceiver, answered G times. */
  async #reason(sample: Sample, at: number, signal?: AbortSignalLike): Promise<RolloutItem[]> {
    const { image, question, answerForm } = sample
    const given = signal && { signal }
    let evidence: Evidence
    let perception: string
    let reasoned: Awaited<ReturnType<Reasoner['reason']>>
    try {
      const [perceived] = await this.#evidences.run(
        () => this.#perceiver(false).perceive({ image, question, ...given }),
        signal,
      )
      evidence = perceived!.evidence
      perception = perceived!.completion.text
      const n = this.#settings.groupSize
      reasoned = await this.#withImages(image, evidence, signal, (shown) =>
        this.#reasoner(true).reason({ evidence: shown, question, answerForm, n, ...given }),
      )
    } catch (error) {
      signal?.throwIfAborted()
      return this.#failed(at, error)
    }
    return Promise.all(
      reasoned.map(async ({ completion, answer }): Promise<RolloutItem> => {
        const item = { sample: at, completion, evidence, counterpart: perception, answer }
        try {
          answered(completion, 'reasoner', 'rollout')
          return { ...item, reward: await this.#reward(sample, answer) }
        } catch (error) {
          signal?.throwIfAborted()
          return { ...item, error: asError(error), reward: Number.NaN }
        }
      }),
    )
  }

  /** Calls f with a copy of the evidence, whose images are freed afterwards. */
  #withImages<R>(
    image: Tensor,
    { boxes }: Evidence,
    signal: AbortSignalLike | undefined,
    f: (evidence: Evidence) => Promise<R>,
  ): Promise<R> {
    return this.#evidences.run(async () => {
      const shown = collectEvidence({ ...this.#options.evidence, image, boxes })
      try {
        return await f(shown)
      } finally {
        shown.dispose()
      }
    }, signal)
  }

  #reward({ truth, answerForm: form, question }: Sample, answer: string): Promise<number> {
    const { verifier, rules } = this.#options
    return answerReward({
      answer,
      truth,
      form,
      question,
      ...(verifier && { verifier }),
      ...(rules && { rules }),
    })
  }

  #perceiver(trained: boolean): Perceiver {
    const { evidence, prompts, maxTokens } = this.#options
    return new Perceiver(withTokens(this.#policies.perceiver, trained), {
      ...evidence,
      temperature: trained ? this.#settings.temperature : 0,
      ...(prompts && { prompts }),
      ...(maxTokens?.perceiver !== undefined && { maxTokens: maxTokens.perceiver }),
    })
  }

  #reasoner(trained: boolean): Reasoner {
    const { prompts, maxTokens, rules } = this.#options
    return new Reasoner(withTokens(this.#policies.reasoner, trained), {
      temperature: trained ? this.#settings.temperature : 0,
      ...(prompts && { prompts }),
      ...(rules && { rules }),
      ...(maxTokens?.reasoner !== undefined && { maxTokens: maxTokens.reasoner }),
    })
  }

  #failed(sample: number, error: unknown): RolloutItem[] {
    return Array.from({ length: this.#settings.groupSize }, () => ({
      sample,
      completion: { text: '' },
      error: asError(error),
      reward: Number.NaN,
    }))
  }
}

/** Tokens are requested only where they are trained on. */
function withTokens(policy: Policy, tokens: boolean): Policy {
  return { generate: (request: PolicyRequest) => policy.generate({ ...request, tokens }) }
}

function asError(error: unknown): Error {
  return error instanceof Error
    ? error
    : new P2RError('ERR_POLICY', `[rollout] ${messageOf(error)}`, { op: 'rollout', cause: error })
}
