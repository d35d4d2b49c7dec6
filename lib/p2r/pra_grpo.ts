import { type AbortSignalLike, checkSignal } from '../abort.js'
import {
  checkArguments,
  checkArray,
  checkFunction,
  checkInteger,
  checkNonNegative,
  checkObject,
  checkPositive,
  checkReceiver,
  checkSamples,
  checkString,
  choice,
  isObject,
  type Names,
} from '../arguments.js'
import { composite } from '../composite.js'
import { checkDevice, type Device } from '../device.js'
import type { FloatDType } from '../dtype.js'
import { P2RError, refuse } from '../errors.js'
import type { AdvantageEstimator } from '../ops/advantages.js'
import type { BiasGradient } from '../ops/linear.js'
import { type LossMetrics, lossOptionNames, type PolicyLossOptions } from '../ops/policy_loss.js'
import {
  correctionAs,
  correctionOptionNames,
  type RolloutCorrectionMetrics,
  type RolloutCorrectionOptions,
  type RolloutCorrectionResult,
  verlRolloutCorrection,
} from '../ops/rollout_correction.js'
import { scope } from '../scope.js'
import { type Held, handleOf, imageSize, type Tensor } from '../tensor.js'
import type { EvidenceBox } from './boxes.js'
import {
  checkEvidenceOptions,
  collectEvidence,
  type Evidence,
  type EvidenceOptions,
  evidenceNames,
} from './evidence.js'
import {
  type GrpoModel,
  type GrpoStep,
  type HeadModel,
  type HeadStep,
  type KlPlacement,
  type LogitsModel,
  type LogitsStep,
  type LogProbsModel,
  type LogProbsStep,
  modelNames,
  stepAs,
} from './grpo.js'
import { Perceiver } from './perceiver.js'
import {
  answered,
  type Completion,
  checkPolicy,
  isTruncated,
  messageOf,
  type Policy,
  type PolicyRequest,
  type Role,
} from './policy.js'
import {
  checkForm,
  type PromptOverrides,
  perceivePrompt,
  promptsOf,
  type RolePrompt,
  reasonPrompt,
} from './prompts.js'
import { Reasoner } from './reasoner.js'
import {
  answerReward,
  checkOverlong,
  type OverlongOptions,
  overlongNames,
  overlongPenalty,
  perceptionFault,
  type RewardRules,
  rulesOf,
  type Verifier,
} from './reward.js'
import {
  AskedRequest,
  checkBatch,
  EvidenceImages,
  keptTokens,
  makeBatch,
  type RolloutBatch,
  type RolloutItem,
  type RolloutMetrics,
  type Sample,
} from './rollouts.js'
import { mapUnordered, pipelineDepth, Semaphore } from './semaphore.js'
import {
  checkZoomOptions,
  RegionImages,
  ZoomAgent,
  type Zooming,
  type ZoomOptions,
} from './zoom.js'

/** Steps of each role's phase; the perceiver's comes first. One of them may be 0. */
export interface Schedule {
  /** Steps of the perceiver, one after the other. */
  perceiver: number
  /** Steps of the reasoner, one after the other. */
  reasoner: number
}

/** The part of PraGrpo's options that a recipe such as paperSettings() sets. */
export interface PraGrpoSettings {
  /**
   * Rollouts a sample.
   * @default 8
   */
  groupSize?: number
  /**
   * Steps of each phase.
   * @default one step each
   */
  schedule?: Schedule
  /**
   * Rounds of both phases, after which `finished` is true.
   * @default unlimited
   */
  rounds?: number
  /**
   * How advantages are computed; see groupAdvantages. Spelled as verl does.
   * @default 'grpo'
   */
  estimator?: AdvantageEstimator
  /**
   * Options of the loss; see policyLoss.
   * @default {}
   */
  loss?: PolicyLossOptions
  /**
   * How the loss corrects for the difference between trainer and server, where a step has the old log-probabilities of
   * both at one temperature; see rolloutCorrection. What it rejects leaves the loss and its group. With false the
   * difference is measured and nothing is corrected.
   * @default verlRolloutCorrection
   */
  correction?: RolloutCorrectionOptions | false
  /**
   * Whether the KL term, where a step has refLogProbs, stands in the 'loss' or in the 'reward'; see grpoStep.
   * @default 'loss'
   */
  klIn?: 'loss' | 'reward'
  /**
   * Completions that the limit of tokens cut off (`finishReason` 'length'): they are trained on ('keep'), or their
   * tokens leave the loss, as in DAPO's overlong filtering and with TRL's mask_truncated_completions ('mask'). Their
   * rewards stay in their group's baseline, but where `correction` can reject sequences.
   * @default 'keep'
   */
  truncated?: 'keep' | 'mask'
  /**
   * Of the trained role's rollouts, and of the log-probabilities in its loss. The frozen role answers greedily.
   * @default 1
   */
  temperature?: number
}

/** Options of PraGrpo. */
export interface PraGrpoOptions extends PraGrpoSettings {
  /**
   * Finds the evidence: the trained model in the perceiver's phase, a frozen one in the reasoner's. Needed without
   * `zoom`, and absent with it.
   */
  perceiver?: Policy
  /** Answers from it: the trained model in the reasoner's phase, a frozen one in the perceiver's. */
  reasoner: Policy
  /**
   * Trains the multi-turn form instead: the reasoner is a ZoomAgent of these options, and looks at crops of its own choice.
   * All steps are the reasoner's. A trajectory is one sequence of tokens, those of tool results masked; one whose turns ran
   * out has reward 0. Left out: perceiver and reasoner, in two stages.
   */
  zoom?: ZoomOptions
  /** Judges answers of free form, which need one. */
  verifier?: Verifier
  /** Where rewards, advantages and losses are computed. */
  device: Device
  /**
   * The policies' requests in flight. About 1.5 times as many samples are processed at once, and at most as many
   * have evidence images in memory.
   * @default 32
   */
  concurrency?: number
  /**
   * Of boxes, answers, rewards and faults; see docs/rewards.md. (Those of resizing are `evidence.rules`.)
   * @default 'reference'
   */
  rules?: RewardRules
  /**
   * The perceiver's image size and the crops; see collectEvidence.
   * @default {}
   */
  evidence?: EvidenceOptions
  /**
   * Templates instead of the default prompts.
   * @default {}
   */
  prompts?: PromptOverrides
  /**
   * The longest output of each role, in tokens.
   * @default { perceiver: 1024, reasoner: 2048 }
   */
  maxTokens?: Partial<Record<Role, number>>
  /**
   * What long completions of the trained role lose of their reward before maxTokens of that role; see overlongPenalty.
   * Needs the policy's token ids.
   * @default no penalty
   */
  overlong?: OverlongOptions
  /**
   * What the trained role's policy gives as log-probabilities, in vLLM's words: 'raw', of temperature 1, or 'processed',
   * of the rollouts' temperature, as vLLM's are with `--logprobs-mode processed_logprobs`. At a temperature other than
   * 1, raw ones are no old log-probabilities, and `step` needs the trainer's.
   * @default 'raw'
   */
  logProbsMode?: 'raw' | 'processed'
  /**
   * Steps already made by the run that this one continues.
   * @default 0
   */
  step?: number
}

/** Options of paperSettings. */
export interface PaperSettingsOptions {
  /**
   * Samples of a stage, each seen once.
   * @default 10_000
   */
  samples?: number
  /**
   * Samples a step.
   * @default 64
   */
  batch?: number
}

/** Options of alternatingSettings. */
export interface AlternatingSettingsOptions {
  /**
   * Steps of each phase.
   * @default 1
   */
  steps?: number
}

/** The roles' limits of tokens unless others are given. */
const longest: Readonly<Record<Role, number>> = { perceiver: 1024, reasoner: 2048 }
const roleNames: Names<Record<Role, unknown>> = { perceiver: true, reasoner: true }
const settingNames: Names<PraGrpoSettings> = {
  groupSize: true,
  schedule: true,
  rounds: true,
  estimator: true,
  loss: true,
  correction: true,
  klIn: true,
  truncated: true,
  temperature: true,
}
const optionNames: Names<PraGrpoOptions> = {
  ...settingNames,
  perceiver: true,
  reasoner: true,
  zoom: true,
  verifier: true,
  device: true,
  concurrency: true,
  rules: true,
  evidence: true,
  prompts: true,
  maxTokens: true,
  overlong: true,
  logProbsMode: true,
  step: true,
}
const paperNames: Names<PaperSettingsOptions> = { samples: true, batch: true }
const alternatingNames: Names<AlternatingSettingsOptions> = { steps: true }
const rolloutNames: Names<RolloutOptions> = { signal: true }
const trainedNames: Names<TrainedModel> = { ...modelNames, refLogProbs: true, oldLogProbs: true }

/**
 * The paper's training: one perceiver stage, then one reasoner stage, each an epoch of `samples` in
 * batches of `batch`.
 *
 * Its loss is grpoStep's default: PPO with clip 0.2 and dual clip 3, mean over tokens, k3 with 0.01 to the
 * weights that the stage began with, where their log-probabilities are given.
 * Source: Perceive-to-Reason, example/qwen3_vl_4b_p2r.
 *
 * @throws P2RError ERR_VALUE for wrong options.
 * @example
 * ```js
 * import { paperSettings } from 'p2r-kernels'
 *
 * const { schedule, groupSize } = paperSettings({ samples: 1000, batch: 50 })
 * console.log(schedule, groupSize) // { perceiver: 20, reasoner: 20 } 8
 * ```
 */
export function paperSettings(options: PaperSettingsOptions = {}): Required<PraGrpoSettings> {
  const op = 'paperSettings'
  options = checkArguments(options, paperNames, op)
  const { samples = 10_000, batch = 64 } = options
  for (const [name, value] of Object.entries({ samples, batch })) checkPositive(value, name, op)
  // verl leaves out a last batch that is not full.
  const steps = Math.max(1, Math.floor(samples / batch))
  return {
    groupSize: 8,
    schedule: { perceiver: steps, reasoner: steps },
    rounds: 1,
    estimator: 'grpo',
    loss: {},
    correction: verlRolloutCorrection,
    klIn: 'loss',
    truncated: 'keep',
    temperature: 1,
  }
}

/**
 * The paper's settings, but short phases and unlimited rounds: the roles take turns.
 *
 * @throws P2RError ERR_VALUE for wrong options.
 * @example
 * ```js
 * import { alternatingSettings } from 'p2r-kernels'
 *
 * console.log(alternatingSettings({ steps: 2 }).schedule) // { perceiver: 2, reasoner: 2 }
 * ```
 */
export function alternatingSettings(
  options: AlternatingSettingsOptions = {},
): Omit<Required<PraGrpoSettings>, 'rounds'> {
  const op = 'alternatingSettings'
  options = checkArguments(options, alternatingNames, op)
  const steps = checkPositive(options.steps ?? 1, 'steps', op)
  const { rounds: _, ...settings } = paperSettings()
  return { ...settings, schedule: { perceiver: steps, reasoner: steps } }
}

/** What is known of a role's latest step: its batch's metrics, and the loss's. */
export interface RoleMetrics extends RolloutMetrics, LossMetrics {
  /** Which step it was, counted from 0 over both roles. */
  step: number
  /**
   * The mean of -log p of the sampled tokens, in nats: an estimate of the policy's entropy without
   * extra cost. `entropy` is exact if the loss has an entropyCoef, else 0.
   */
  sampledEntropy: number
  /**
   * Whose log-probabilities the loss took its ratios to: the 'trainer's; the 'server's, of another precision and perhaps
   * of older weights, uncorrected but for the loss's clipping (verl's bypass mode); or 'current', the model's own, so
   * that all ratios are 1.
   */
  ratiosTo: 'trainer' | 'server' | 'current'
  /** How far trainer and server are apart, where the step had the old log-probabilities of both at one temperature. */
  correction?: RolloutCorrectionMetrics
}

/** Log-probabilities of a batch's tokens under other weights than the current ones. */
export interface StepLogProbs {
  /** f32 [T]: of the weights that the stage began with, at the rollouts' temperature. The loss has its KL term then. */
  refLogProbs?: Tensor<'f32'>
  /**
   * f32 [T]: of the weights that sampled the tokens, as the trainer computes them, at the rollouts' temperature.
   * Importance weights then correct for the server's; see PraGrpo's option `correction`.
   * @default the batch's, which the server computed in its own precision: the ratios then hold the difference of the
   *   engines too. Refused if they are of another temperature.
   */
  oldLogProbs?: Tensor<'f32'>
}

/** Log-probabilities as the trained model, with the temperature at which the caller computed them. */
export interface TrainedLogProbs extends Omit<LogProbsModel, 'temperature'> {
  /**
   * At which the log-probabilities were computed; must be the rollouts'.
   * @default 1
   */
  temperature?: number
}

/**
 * What the trained role's engine gives for the tokens of a batch, in their order. The temperature of logits and hidden
 * states is the rollouts', and a model that names another is refused.
 */
export type TrainedModel = (Exclude<GrpoModel, LogProbsModel> | TrainedLogProbs) & StepLogProbs

/** Options of PraGrpo's `rollout`. */
export interface RolloutOptions {
  /** An abort rejects with the signal's reason. */
  signal?: AbortSignalLike
}

/**
 * Perception-Reasoning Alternating GRPO. In the perceiver's phase G box rollouts are each answered by
 * the frozen reasoner; in the reasoner's phase one fixed perception is answered G times. Rewards come
 * from the final answer alone.
 *
 * Serving and training engines are the caller's: `rollout` calls the policies, `step` takes the trained
 * role's log-probabilities (or logits, or hidden states and head) and returns their gradient. The caller
 * serves the new weights before the next rollout. Source: Perceive-to-Reason, verl/trainer.
 *
 * @throws P2RError ERR_VALUE for wrong options.
 * @example
 * ```js
 * import { functionPolicy, openDevice, PraGrpo } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * let count = 0
 * const trainer = new PraGrpo({
 *   perceiver: functionPolicy(() => ({ text: '[]', tokens: [1, 2], logProbs: [-0.5, -0.5] })),
 *   reasoner: functionPolicy(() => `<answer>${'AB'[count++ % 2]}</answer>`),
 *   device,
 *   groupSize: 4,
 * })
 * const image = device.zeros([48, 64, 3], 'u8')
 * const batch = await trainer.rollout([{ image, question: 'Which?', answerForm: 'mca', truth: 'B' }])
 * // The trained model's log-probabilities of batch.tokens.
 * const logProbs = device.tensor(new Float32Array(8).fill(-0.5), [8])
 * const step = trainer.step(batch, { logProbs })
 * console.log(step.dLogProbs.shape, batch.metrics.rewardMean, trainer.role) // [ 8 ] 0.5 reasoner
 * step.dispose()
 * batch.dispose()
 * device.dispose()
 * ```
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
    options = checkArguments(options, optionNames, op)
    const { zoom, groupSize = 8, temperature = 1 } = options
    const { schedule = { perceiver: +(zoom === undefined), reasoner: 1 } } = options
    const { estimator, loss, correction, klIn, overlong, verifier, evidence, maxTokens } = options
    checkDevice(options.device, op)
    checkSamples(groupSize, 'groupSize', op)
    checkNonNegative(temperature, 'temperature', op)
    if (options.rounds !== undefined) checkPositive(options.rounds, 'rounds', op)
    checkArguments(schedule, roleNames, op, 'schedule')
    for (const role of ['perceiver', 'reasoner'] as const)
      checkInteger(schedule[role], 0, `schedule.${role}`, op)
    if (schedule.perceiver + schedule.reasoner === 0)
      refuse('ERR_VALUE', op, 'schedule must give one of the roles a step')
    if (zoom !== undefined) {
      checkZoomOptions(checkObject(zoom, 'zoom', op), 'zoom', op)
      if (schedule.perceiver !== 0)
        refuse('ERR_VALUE', op, 'schedule.perceiver must be 0 with zoom, which has no perceiver')
      for (const name of ['perceiver', 'evidence'] as const)
        if (options[name] !== undefined)
          refuse('ERR_VALUE', op, `${name} must be absent with zoom, which has no perceiver`)
    }
    // Checked before the first rollout, because rollouts are what costs.
    if (loss !== undefined) checkArguments(loss, lossOptionNames, op, 'loss')
    if (correction !== undefined && correction !== false)
      checkArguments(correction, correctionOptionNames, op, 'correction')
    const given = { ...loss, ...(estimator && { estimator }), ...(klIn && { klIn }) }
    checkOnEmptyBatch(op, options.device, given, correction)
    if (verifier !== undefined) checkFunction(verifier, 'verifier', op)
    rulesOf(options.rules, op)
    promptsOf(options.prompts, op)
    if (evidence !== undefined) {
      checkArguments(evidence, evidenceNames, op, 'evidence')
      checkEvidenceOptions(evidence, op)
    }
    if (maxTokens !== undefined) {
      checkArguments(maxTokens, roleNames, op, 'maxTokens')
      for (const [role, tokens] of Object.entries(maxTokens))
        if (tokens !== undefined) checkPositive(tokens, `maxTokens.${role}`, op)
    }
    choice(options.logProbsMode ?? 'raw', ['raw', 'processed'], 'logProbsMode', op)
    choice(options.truncated ?? 'keep', ['keep', 'mask'], 'truncated', op)
    if (overlong !== undefined) {
      checkArguments(overlong, overlongNames, op, 'overlong')
      for (const role of ['perceiver', 'reasoner'] as const)
        if (schedule[role] > 0) checkOverlong(overlong, maxTokens?.[role] ?? longest[role], op)
    }
    this.#options = { ...options }
    this.#settings = { groupSize, schedule, temperature }
    const reasoner = checkPolicy(options.reasoner, 'reasoner', op)
    this.#policies = {
      perceiver: zoom ? reasoner : checkPolicy(options.perceiver, 'perceiver', op),
      reasoner,
    }
    this.#step = checkInteger(options.step ?? 0, 0, 'step', op)
    this.#depth = pipelineDepth(checkPositive(options.concurrency ?? 32, 'concurrency', op))
    this.#evidences = new Semaphore(this.#depth)
  }

  /** Steps so far, of both roles together: the option `step` of a run that continues this one. */
  get steps(): number {
    PraGrpo.#check(this, 'steps')
    return this.#step
  }

  /** Completed rounds. */
  get round(): number {
    PraGrpo.#check(this, 'round')
    const { perceiver, reasoner } = this.#settings.schedule
    return Math.floor(this.#step / (perceiver + reasoner))
  }

  /** Whether all rounds are over. */
  get finished(): boolean {
    PraGrpo.#check(this, 'finished')
    return this.#options.rounds !== undefined && this.round >= this.#options.rounds
  }

  /** The role of the current phase. */
  get role(): Role {
    PraGrpo.#check(this, 'role')
    const { perceiver, reasoner } = this.#settings.schedule
    return this.#step % (perceiver + reasoner) < perceiver ? 'perceiver' : 'reasoner'
  }

  /** Metrics of each role's latest step; none before its first. Rejects as the step's own reads do. */
  async metrics(): Promise<Partial<Record<Role, RoleMetrics>>> {
    PraGrpo.#check(this, 'metrics')
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
   *
   * @throws P2RError ERR_VALUE for wrong arguments, and when all rounds are over.
   */
  async rollout(samples: readonly Sample[], options: RolloutOptions = {}): Promise<RolloutBatch> {
    const op = 'rollout'
    PraGrpo.#check(this, op)
    options = checkArguments(options, rolloutNames, op)
    const signal = checkSignal(options.signal, op)
    const { role } = this
    if (this.finished) refuse('ERR_VALUE', op, `all ${this.#options.rounds} rounds are over`)
    samples = checkArray(samples, 'samples', op)
    for (const [i, sample] of samples.entries()) this.#checkSample(sample, i, op)
    const groups: RolloutItem[][] = []
    const reason = this.#options.zoom ? this.#zoom : this.#reason
    const roll = role === 'perceiver' ? this.#perceive : reason
    const rolled = mapUnordered(samples, this.#depth, async (sample, at) => ({
      at,
      items: await roll.call(this, sample, at, signal),
    }))
    for await (const { at, items } of rolled) groups[at] = items
    signal?.throwIfAborted()
    const { device, estimator, logProbsMode } = this.#options
    const { temperature } = this.#settings
    const oldLogProbsTemperature = logProbsMode === 'processed' ? temperature : 1
    const sampling = { temperature, oldLogProbsTemperature }
    const items = groups.flat().map((item) => this.#withPenalty(item, role))
    return makeBatch(role, items, device, sampling, estimator)
  }

  /**
   * Loss and gradient of a batch under the trained role's current model; advances the schedule.
   *
   * Everything is of the temperature at which the batch was sampled: logits are divided by it.
   *
   * @returns as grpoStep: the gradient is taken with respect to what the model gives.
   * @throws P2RError ERR_VALUE for a batch of the other role, or one that was stepped already; ERR_POLICY for one
   *   without token ids; ERR_VALUE, ERR_SHAPE, ERR_DTYPE and ERR_DEVICE for a wrong model, also one of another
   *   temperature.
   */
  step(batch: RolloutBatch, model: TrainedLogProbs & StepLogProbs): LogProbsStep
  step<D extends FloatDType>(
    batch: RolloutBatch,
    model: LogitsModel<D> & StepLogProbs,
  ): LogitsStep<D>
  step<D extends FloatDType>(
    batch: RolloutBatch,
    model: HeadModel<D> & StepLogProbs & Required<Pick<HeadModel<D>, 'bias'>>,
  ): HeadStep<D> & BiasGradient
  step<D extends FloatDType>(
    batch: RolloutBatch,
    model: HeadModel<D> & StepLogProbs & { bias?: never },
  ): HeadStep<D>
  step(batch: RolloutBatch, model: TrainedModel): GrpoStep
  step(batch: RolloutBatch, model: TrainedModel): GrpoStep {
    const op = 'step'
    PraGrpo.#check(this, op)
    checkBatch(batch, op)
    model = checkArguments(model, trainedNames, op, 'model')
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
    const { estimator, loss, correction = verlRolloutCorrection, klIn, truncated } = this.#options
    const sampled = batch.temperature ?? this.#settings.temperature
    const oldLogProbs = model.oldLogProbs ?? oldLogProbsOf(batch, sampled, op)
    using whole = truncated === 'mask' ? maskOfWhole(batch) : undefined
    const mask = whole ?? batch.mask
    const engines = { batch, logProbs: model.oldLogProbs, mask }
    using corrected = correctionOf(engines, sampled, correction || {}, op)
    const made = stepAs(op, {
      ...loss,
      ...atTemperature(model, sampled, op),
      rewards,
      groups,
      cuSeqlens,
      ...(oldLogProbs && { oldLogProbs }),
      ...(estimator && { estimator }),
      ...(klIn && { klIn }),
      ...(mask && { mask }),
      ...(corrected &&
        correction && {
          importanceWeights: corrected.importanceWeights,
          mask: corrected.mask,
          skipEmpty: !!correction.reject?.length || correction.maxDivergence !== undefined,
        }),
    })
    this.#stepped.add(batch)
    const step = this.#step++
    const ratiosTo = model.oldLogProbs ? 'trainer' : oldLogProbs ? 'server' : 'current'
    // Read now, because the caller may dispose the step.
    const read = Promise.all([
      made.metrics(),
      made.logProbs.read(),
      mask?.read(),
      corrected?.metrics(),
    ]).then(([metrics, logProbs, kept, apart]): RoleMetrics => {
      const own = kept ? logProbs.filter((_, i) => kept[i]) : logProbs
      const sum = own.reduce((s, x) => s - x, 0)
      const sampledEntropy = own.length ? sum / own.length : 0
      return {
        ...batch.metrics,
        ...metrics,
        step,
        sampledEntropy,
        ratiosTo,
        ...(apart && { correction: apart }),
      }
    })
    read.catch(() => {})
    this.#metrics[batch.role] = read
    return made
  }

  static #check(value: unknown, op: string): void {
    checkReceiver(isObject(value) && #settings in value, 'PraGrpo', op)
  }

  /** Other fields are the caller's. */
  #checkSample(sample: Sample, i: number, op: string): void {
    checkObject(sample, `samples[${i}]`, op)
    imageSize(sample.image, op, `samples[${i}].image`)
    const form = checkForm(sample.answerForm, `samples[${i}].answerForm`, op)
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
    const { rules, prompts } = this.#options
    const asked = perceivePrompt({ question, ...(prompts && { prompts }) })
    const request = this.#request(asked, image, [], perceived)
    return Promise.all(
      perceived.map(async ({ completion, evidence }): Promise<RolloutItem> => {
        const item = { sample: at, request, completion, evidence }
        try {
          answered(completion, 'perceiver', 'rollout')
          const fault = perceptionFault(evidence.boxes, rules ? { rules } : {})
          if (fault) return { ...item, fault, reward: 0 }
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
    const { prompts } = this.#options
    const { hasEvidence, boxes } = evidence
    const asked = reasonPrompt({ question, answerForm, hasEvidence, ...(prompts && { prompts }) })
    const request = this.#request(asked, image, boxes, reasoned)
    return Promise.all(
      reasoned.map(async ({ completion, answer }): Promise<RolloutItem> => {
        const item = { sample: at, request, completion, evidence, counterpart: perception, answer }
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

  /** G trajectories of the trained reasoner, which looks at crops of its own choice. */
  async #zoom(sample: Sample, at: number, signal?: AbortSignalLike): Promise<RolloutItem[]> {
    const { image, question, answerForm } = sample
    const { zoom, prompts, maxTokens, rules } = this.#options
    const agent = new ZoomAgent(withTokens(this.#policies.reasoner, true), {
      ...zoom,
      temperature: this.#settings.temperature,
      ...(prompts && { prompts }),
      ...(rules && { rules }),
      ...(maxTokens?.reasoner !== undefined && { maxTokens: maxTokens.reasoner }),
    })
    let made: Zooming[]
    try {
      const n = this.#settings.groupSize
      const a = { image, question, answerForm, n, ...(signal && { signal }) }
      made = await this.#evidences.run(() => agent.zoom(a), signal)
    } catch (error) {
      signal?.throwIfAborted()
      return this.#failed(at, error)
    }
    return Promise.all(
      made.map(async (each): Promise<RolloutItem> => {
        const { completion, answer, evidence, shown, ended, untrainable, asked } = each
        const { promptTokens } = completion
        const request = new AskedRequest(
          { ...asked, ...(promptTokens && { promptTokens }) },
          () => new RegionImages(image, shown),
        )
        const outOfTurns = ended === 'turns'
        const item = {
          sample: at,
          request,
          completion,
          evidence,
          answer,
          ...(outOfTurns && { outOfTurns }),
        }
        try {
          answered(completion, 'reasoner', 'rollout')
          if (untrainable !== undefined)
            refuse('ERR_POLICY', 'rollout', `the trajectory has no tokens: ${untrainable}`)
          return { ...item, reward: outOfTurns ? 0 : await this.#reward(sample, answer) }
        } catch (error) {
          signal?.throwIfAborted()
          return { ...item, error: asError(error), reward: Number.NaN }
        }
      }),
    )
  }

  /** What a sample's rollouts were asked, with the images of these boxes. */
  #request(
    asked: RolePrompt,
    image: Tensor<'u8'>,
    boxes: readonly EvidenceBox[],
    rolled: readonly { completion: Completion }[],
  ): AskedRequest {
    const { evidence } = this.#options
    const promptTokens = rolled.find(({ completion }) => completion.promptTokens)?.completion
      .promptTokens
    return new AskedRequest(
      { ...asked, ...(promptTokens && { promptTokens }) },
      () => new EvidenceImages(collectEvidence({ ...evidence, image, boxes })),
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

  /** A rollout with its reward less the penalty for its length. */
  #withPenalty(item: RolloutItem, role: Role): RolloutItem {
    const { overlong, maxTokens } = this.#options
    if (!overlong || item.error) return item
    const { tokens } = item.completion
    if (!tokens) {
      const message = `[rollout] the ${role} gave no token ids, and overlong needs them`
      const error = new P2RError('ERR_POLICY', message, { op: 'rollout' })
      return { ...item, error, reward: Number.NaN }
    }
    const limit = { ...overlong, maxTokens: maxTokens?.[role] ?? longest[role] }
    const length = keptTokens(item.completion)
    return { ...item, reward: item.reward + overlongPenalty({ ...limit, length }) }
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
    const { evidence, prompts, maxTokens, rules } = this.#options
    return new Perceiver(withTokens(this.#policies.perceiver, trained), {
      ...evidence,
      ...(rules && { boxRules: rules }),
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

/** A step without tokens: the operations refuse the options that they would refuse at the first real one. */
function checkOnEmptyBatch(
  op: string,
  device: Device,
  options: PolicyLossOptions & KlPlacement & { estimator?: AdvantageEstimator },
  correction: RolloutCorrectionOptions | false = {},
): void {
  scope(() => {
    const none = device.zeros([0])
    const targets = device.zeros([0], 'i32')
    const given = {
      oldLogProbs: none,
      refLogProbs: none,
      rewards: none,
      groups: [],
      cuSeqlens: [0],
    }
    stepAs(op, { ...options, ...given, logits: device.zeros([0, 1]), targets })
    const { oldLogProbs, cuSeqlens } = given
    const engines = { logProbs: oldLogProbs, rolloutLogProbs: oldLogProbs, cuSeqlens }
    composite(op, () => correctionAs(op, { ...correction, ...engines, advantages: none }))
  })
}

/** The batch's log-probabilities, which must be of the temperature that the tokens were sampled at. */
function oldLogProbsOf(
  { oldLogProbs, oldLogProbsTemperature = 1 }: RolloutBatch,
  sampled: number,
  op: string,
): Tensor<'f32'> | undefined {
  if (oldLogProbs && oldLogProbsTemperature !== sampled)
    refuse(
      'ERR_VALUE',
      op,
      `the batch's log-probabilities are of temperature ${oldLogProbsTemperature}, its tokens were sampled at ${sampled}: give the trainer's as oldLogProbs, or logProbsMode 'processed' to PraGrpo if the server computes them so`,
    )
  return oldLogProbs
}

/** The batch's mask less completions that the limit of tokens cut off; undefined where there are none. */
function maskOfWhole({ items, rewards }: RolloutBatch): Tensor<'u8'> | undefined {
  const completions = items.filter((item) => !item.error).map(({ completion }) => completion)
  if (!completions.some(isTruncated)) return undefined
  const mask = Uint8Array.from(
    completions.flatMap((completion) => {
      const { tokens = [], mask: own = tokens.map(() => 1) } = completion
      return isTruncated(completion) ? tokens.map(() => 0) : [...own]
    }),
  )
  return rewards.device.tensor(mask, [mask.length])
}

/** What corrects the trainer's old log-probabilities for the batch's, where there are both at one temperature. */
function correctionOf(
  a: { batch: RolloutBatch; logProbs: Tensor<'f32'> | undefined; mask: Tensor<'u8'> | undefined },
  sampled: number,
  correction: RolloutCorrectionOptions,
  op: string,
): Held<RolloutCorrectionResult> | undefined {
  const { batch, logProbs, mask } = a
  const { oldLogProbs: rolloutLogProbs, oldLogProbsTemperature = 1, cuSeqlens, advantages } = batch
  if (!logProbs || !rolloutLogProbs || !cuSeqlens || oldLogProbsTemperature !== sampled)
    return undefined
  handleOf(logProbs, 'oldLogProbs', op)
  const { dtype, shape, device } = logProbs
  const fits = shape.length === 1 && shape[0] === cuSeqlens.at(-1)
  // The step refuses it, under its own name.
  if (dtype !== 'f32' || !fits || device !== rolloutLogProbs.device) return undefined
  return composite(op, () =>
    correctionAs(op, {
      ...correction,
      logProbs,
      rolloutLogProbs,
      cuSeqlens,
      ...(mask && { mask }),
      ...(correction.maxDivergence !== undefined && { advantages }),
    }),
  )
}

/** The model as grpoStep takes it, at the temperature that the tokens were sampled at. */
function atTemperature(model: TrainedModel, sampled: number, op: string): GrpoModel {
  const { temperature, ...rest } = model
  const own = temperature ?? (model.logProbs === undefined ? sampled : 1)
  if (own !== sampled)
    refuse(
      'ERR_VALUE',
      op,
      `the model's temperature must be ${sampled}, at which the tokens were sampled, got ${own}`,
    )
  if (model.logProbs !== undefined) return rest as GrpoModel
  if (sampled === 0)
    refuse('ERR_VALUE', op, 'tokens that were sampled at temperature 0 have no log-probabilities')
  return { ...rest, temperature: sampled } as GrpoModel
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
