import type { AbortSignalLike } from '../abort.js'
import {
  checkArguments,
  checkBoolean,
  checkFunction,
  checkIntegerWithin,
  checkPositive,
  checkReceiver,
  checkString,
  choice,
  isObject,
  type Names,
} from '../arguments.js'
import { checkDevice, type Device } from '../device.js'
import { refuse } from '../errors.js'
import {
  type Checkpoint,
  type CheckpointOption,
  checkpoints,
  type TrainableOption,
} from '../gradients.js'
import { Qwen3VL, type Qwen3VLOptions } from '../models/qwen3_vl/model.js'
import { towerPrefix } from '../models/qwen3_vl/record.js'
import { adamW } from '../ops/optimizer.js'
import { concat } from '../ops/rearrange.js'
import { LocalPolicy } from '../p2r/local.js'
import type { Completion, Policy, Role } from '../p2r/policy.js'
import { PraGrpo, type PraGrpoOptions, type RoleMetrics, type Schedule } from '../p2r/pra_grpo.js'
import type { RolloutBatch, RolloutItem, Sample } from '../p2r/rollouts.js'
import { loadMetadata, loadTensors, saveTensors } from '../safetensors.js'
import { scope } from '../scope.js'
import type { Tensor } from '../tensor.js'
import { saveCheckpoint } from './checkpoint_files.js'
import {
  checkLearningRate,
  type LearningRateOptions,
  learningRateNames,
  rateOf,
} from './learning_rate.js'
import { type MicroBatch, microBatches, type PackedBatch, pack } from './micro_batches.js'
import {
  checkLora,
  type LoraOptions,
  type OptimizerOptions,
  optimizerNames,
  TrainedWeights,
} from './trained_weights.js'

/** PraGrpo's options that a LocalTrainer takes too; the policies and the device are the model's. */
type SharedOptions = Omit<
  PraGrpoOptions,
  'perceiver' | 'reasoner' | 'zoom' | 'device' | 'logProbsMode' | 'step' | 'correction'
>

/** Options of LocalTrainer. */
export interface LocalTrainerOptions
  extends SharedOptions,
    LearningRateOptions,
    OptimizerOptions,
    CheckpointOption,
    TrainableOption,
    Pick<Qwen3VLOptions, 'dtype' | 'cacheTokens'> {
  /**
   * Both roles learn in each step: their gradients are added, the counterpart is the model itself, and the KL term is to
   * the weights of the run's start. `schedule` must be left out.
   * @default false
   */
  joint?: boolean
  /**
   * The frozen counterpart and the KL term's reference: the weights of the 'phase's start, or of the run's 'start', which
   * with `lora` is the model without its change.
   * @default 'phase'
   */
  reference?: 'phase' | 'start'
  /**
   * Trains a low-rank change of some matrices.
   * @default all weights are trained themselves
   */
  lora?: LoraOptions
  /**
   * Leaves the vision tower as it is.
   * @default false
   */
  freezeTower?: boolean
  /**
   * Tokens of one pass forward and backward, prompts included; a longer sequence has one of its own. The gradient is that
   * of the whole batch whatever it is.
   * @default 16384
   */
  microBatchTokens?: number
  /**
   * Of all random numbers: an integer from 0 to 2^31 - 1.
   * @default 0
   */
  seed?: number
  /** A file of `saveState`, whose run is continued. The other options must be that run's. */
  resume?: string
}

/** Options of LocalTrainer's `step`. */
export interface TrainStepOptions {
  /** An abort rejects with the signal's reason, and leaves the run as it was before the step. */
  signal?: AbortSignalLike
  /** Called with each role's batch before it is disposed: its items, texts and boxes. */
  onBatch?: (batch: RolloutBatch) => void | Promise<void>
}

/** What is known of one role's batch in a step. */
export interface TrainRoleMetrics extends RoleMetrics {
  /** The trained role. */
  role: Role
  /** The mean over the trained tokens, in nats, of the distribution that each was drawn from. */
  entropyMean: number
  /**
   * The largest difference, in nats, between the log-probability of a token as it was sampled and as the trainer computes
   * it: 0 on the CPU.
   */
  samplerDifference: number
  /** Mean and longest completion, in tokens. */
  lengthMean: number
  /** Likewise. */
  lengthMax: number
  /** Tokens that the passes read: each prompt once for its group, and the completions. */
  tokensRead: number
  /** Passes forward and backward. */
  microBatches: number
}

/** What is known of a step. */
export interface TrainMetrics {
  /** Which step it was, counted from 0. */
  step: number
  /** One role's, or both's in a joint step. */
  roles: TrainRoleMetrics[]
  /** The learning rate. */
  lr: number
  /** The gradients' joint norm before clipping; 0 where there was nothing to train on. */
  gradNorm: number
  /**
   * Whether the weights changed. Not where there was nothing to train on, all gradients were 0 (equal rewards in every
   * group, and no other term of the loss), or one was not finite: weights and moments are then as before.
   */
  applied: boolean
  /** Wall time, in seconds. */
  seconds: number
  /** `tokensRead` of the roles over `seconds`. */
  tokensPerSecond: number
}

const ownNames = {
  joint: true,
  reference: true,
  lora: true,
  freezeTower: true,
  microBatchTokens: true,
  seed: true,
  resume: true,
  checkpoint: true,
  trainable: true,
  dtype: true,
  cacheTokens: true,
} as const
const sharedNames: Names<SharedOptions> = {
  groupSize: true,
  schedule: true,
  rounds: true,
  estimator: true,
  loss: true,
  klIn: true,
  truncated: true,
  temperature: true,
  verifier: true,
  concurrency: true,
  rules: true,
  evidence: true,
  prompts: true,
  maxTokens: true,
  overlong: true,
}
const optionNames: Names<LocalTrainerOptions> = {
  ...sharedNames,
  ...learningRateNames,
  ...optimizerNames,
  ...ownNames,
}
const stepNames: Names<TrainStepOptions> = { signal: true, onBatch: true }
const op = 'LocalTrainer'
const construct = Symbol('construct')
/** Steps of a run have seeds of their own; a prompt that is asked again in one step has the next. */
const seedsOfAStep = 2 ** 20

interface Parts {
  folder: string
  model: Qwen3VL
  frozen: Qwen3VL
  weights: TrainedWeights
  options: LocalTrainerOptions
  step: number
}

/** A role's gradient, added to `gradients`. */
interface RoleGradient {
  gradients: Record<string, Tensor<'f32'>> | undefined
  metrics: TrainRoleMetrics
}

/**
 * PRA-GRPO of a model in this process, one weight set in both roles: rollouts by LocalPolicy, rewards, advantages and
 * loss by PraGrpo, gradients by Qwen3VL's `record` with each group's prompt computed once, and AdamW on f32 masters.
 *
 * The frozen counterpart is a second copy of the weights, as they were at the phase's start; the KL term is to the same.
 * A step is one update on its own rollouts, so that all ratios are 1; on the CPU the sampler's log-probabilities are the
 * trainer's to the bit (`samplerDifference`). A batch beyond `microBatchTokens` is scored in pieces first, its loss is
 * taken over all of it, and then its pieces go forward and backward: normalisers are the whole batch's for every loss.
 * Memory and time: docs/training.md.
 *
 * @example
 * ```js
 * import { LocalTrainer, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const folder = 'Qwen3-VL-2B-Instruct' // a checkpoint's folder
 * const trainer = await LocalTrainer.load(folder, device, {
 *   groupSize: 2,
 *   maxTokens: { perceiver: 4, reasoner: 4 },
 *   microBatchTokens: 512,
 *   evidence: { maxPixels: 64 * 64, minPixels: 32 * 32 },
 * })
 * const image = device.zeros([64, 64, 3], 'u8')
 * const { step, roles } = await trainer.step([
 *   { image, question: 'Which? A. 1 B. 2', answerForm: 'mca', truth: 'B' },
 * ])
 * console.log(step, roles[0].role, trainer.role) // 0 perceiver reasoner
 * trainer.dispose()
 * device.dispose()
 * ```
 */
export class LocalTrainer implements Disposable {
  /** The model that is trained. It belongs to the trainer. */
  readonly model: Qwen3VL
  readonly #folder: string
  readonly #frozen: Qwen3VL
  readonly #weights: TrainedWeights
  readonly #options: LocalTrainerOptions
  readonly #rate: Required<LearningRateOptions>
  readonly #schedule: Schedule
  #step: number
  #busy = false

  private constructor(key: typeof construct, parts: Parts) {
    if (key !== construct) refuse('ERR_VALUE', op, 'a LocalTrainer is made by LocalTrainer.load()')
    const { folder, model, frozen, weights, options, step } = parts
    this.model = model
    this.#folder = folder
    this.#frozen = frozen
    this.#weights = weights
    this.#options = options
    this.#rate = checkLearningRate(options, op)
    this.#schedule = options.schedule ?? { perceiver: 1, reasoner: 1 }
    this.#step = step
  }

  /**
   * Loads a checkpoint's folder, twice: the trained model and the frozen one.
   *
   * @throws P2RError ERR_VALUE for wrong options, and for a state of another run; as `Qwen3VL.load` and `PraGrpo`;
   *   ERR_IO and ERR_FORMAT for a state that cannot be read.
   */
  static async load(
    folder: string,
    device: Device,
    options: LocalTrainerOptions = {},
  ): Promise<LocalTrainer> {
    checkString(folder, 'folder', op)
    checkDevice(device, op)
    options = checkTrainerOptions(options, device)
    const { dtype, cacheTokens, resume, seed = 0 } = options
    const state = resume === undefined ? undefined : await loadMetadata(resume)
    if (state) checkState(state, options, resume!)
    const given = { ...(dtype && { dtype }), ...(cacheTokens !== undefined && { cacheTokens }) }
    const model = await Qwen3VL.load(folder, device, given)
    const made: Disposable[] = [model]
    try {
      const frozen = await Qwen3VL.load(folder, device, given)
      made.push(frozen)
      const { freezeTower = false, trainable = () => true, lora } = options
      const weights = new TrainedWeights(
        model.parameters(),
        {
          ...optimizerOf(options),
          ...(lora && { lora: checkLora(lora, op) }),
          trainable: (name) =>
            !(freezeTower && name.startsWith(towerPrefix)) && Boolean(trainable(name)),
          seed,
        },
        op,
      )
      made.push(weights)
      const step = state ? Number(state.step) : 0
      if (state) await restore(resume!, device, weights, frozen)
      return new LocalTrainer(construct, { folder, model, frozen, weights, options, step })
    } catch (error) {
      for (const each of made) each[Symbol.dispose]()
      throw error
    }
  }

  /** Steps so far, those before a resumed state among them. */
  get steps(): number {
    LocalTrainer.#check(this, 'steps')
    return this.#step
  }

  /** Whether all `rounds` are over. */
  get finished(): boolean {
    LocalTrainer.#check(this, 'finished')
    const { rounds, joint } = this.#options
    const { perceiver, reasoner } = this.#schedule
    return rounds !== undefined && this.#step >= rounds * (joint ? 1 : perceiver + reasoner)
  }

  /** Which role the next step trains; 'joint' where both. */
  get role(): Role | 'joint' {
    LocalTrainer.#check(this, 'role')
    if (this.#options.joint) return 'joint'
    const { perceiver, reasoner } = this.#schedule
    return this.#step % (perceiver + reasoner) < perceiver ? 'perceiver' : 'reasoner'
  }

  /**
   * Rollouts of some samples, and one update of the weights.
   *
   * @throws P2RError ERR_VALUE for wrong arguments, while another step or save is under way, and when all rounds are over;
   *   as `Qwen3VL.generate` and `record`. The run is then as it was before the step.
   */
  async step(samples: readonly Sample[], options: TrainStepOptions = {}): Promise<TrainMetrics> {
    LocalTrainer.#check(this, 'step')
    options = checkArguments(options, stepNames, 'step', 'options')
    if (options.onBatch !== undefined) checkFunction(options.onBatch, 'onBatch', 'step')
    if (this.finished) refuse('ERR_VALUE', 'step', `all ${this.#options.rounds} rounds are over`)
    return this.#alone('step', () => this.#update(samples, options))
  }

  /**
   * The model's weights as files of the loaded checkpoint: names, types and layout are the source's, and its other files
   * are copied. Each file is replaced atomically.
   *
   * @param folder is made where it does not exist; must not be the source.
   * @throws P2RError ERR_IO, ERR_FORMAT for files that cannot be read or written; ERR_VALUE for the source's folder.
   */
  async save(folder: string): Promise<void> {
    LocalTrainer.#check(this, 'save')
    checkString(folder, 'folder', 'save')
    await this.#alone('save', () =>
      saveCheckpoint('save', this.#folder, folder, this.model.parameters()),
    )
  }

  /**
   * What a run needs to go on as if it had not been interrupted: master weights or the low-rank change, moments, the
   * frozen weights and the step. The file is replaced atomically.
   *
   * @throws P2RError ERR_IO.
   */
  async saveState(path: string): Promise<void> {
    LocalTrainer.#check(this, 'saveState')
    checkString(path, 'path', 'saveState')
    await this.#alone('saveState', async () => {
      const frozen = [...this.#frozen.parameters()]
        .filter(([name]) => this.#weights.trains(name))
        .map(([name, weight]) => [`frozen.${name}`, weight] as const)
      const tensors = { ...this.#weights.state(), ...Object.fromEntries(frozen) }
      await saveTensors(path, tensors, { ...identity(this.#options), step: String(this.#step) })
    })
  }

  /** Frees both models and the optimizer's state. A second call does nothing. */
  dispose(): void {
    LocalTrainer.#check(this, 'dispose')
    this.#weights.dispose()
    this.#frozen.dispose()
    this.model.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  static #check(value: unknown, name: string): void {
    checkReceiver(isObject(value) && #frozen in value, 'LocalTrainer', name)
  }

  /** Weights change between awaits: one thing at a time. */
  async #alone<R>(name: string, f: () => Promise<R>): Promise<R> {
    if (this.#busy) refuse('ERR_VALUE', name, 'another step or save of this trainer is under way')
    this.#busy = true
    try {
      return await f()
    } finally {
      this.#busy = false
    }
  }

  async #update(
    samples: readonly Sample[],
    { signal, onBatch }: TrainStepOptions,
  ): Promise<TrainMetrics> {
    const start = performance.now()
    const { joint = false } = this.#options
    const step = this.#step
    this.#snapshot()
    const roles: TrainRoleMetrics[] = []
    let gradients: RoleGradient['gradients']
    let update = { gradNorm: 0, applied: false }
    const lr = rateOf(step, this.#rate)
    try {
      const grpo = this.#grpo()
      for (let i = 0; i < (joint ? 2 : 1); i++) {
        const batch = await grpo.rollout(samples, signal ? { signal } : {})
        try {
          const made = await this.#gradient(grpo, batch, gradients)
          gradients = made.gradients
          roles.push(made.metrics)
          await onBatch?.(batch)
        } finally {
          batch.dispose()
        }
        signal?.throwIfAborted()
      }
      if (gradients) update = await this.#weights.update(gradients, step + 1, lr)
      this.#step++
    } finally {
      for (const gradient of Object.values(gradients ?? {})) gradient.dispose()
    }
    const seconds = (performance.now() - start) / 1000
    const read = roles.reduce((sum, { tokensRead }) => sum + tokensRead, 0)
    return { step, roles, lr, ...update, seconds, tokensPerSecond: read / seconds }
  }

  /** At a phase's start the counterpart gets the current weights. */
  #snapshot(): void {
    const { joint, reference = 'phase' } = this.#options
    if (joint || reference === 'start') return
    const { perceiver, reasoner } = this.#schedule
    const at = this.#step % (perceiver + reasoner)
    if (at !== 0 && at !== perceiver) return
    const frozen = this.#frozen.parameters()
    for (const [name, weight] of this.model.parameters())
      if (this.#weights.trains(name)) frozen.get(name)!.copyFrom(weight)
  }

  /** The trainer of this step, whose policies draw the step's own random numbers. */
  #grpo(): PraGrpo {
    const { joint, temperature = 1, seed = 0 } = this.#options
    const own = (seed * 2 ** 20 + this.#step) * seedsOfAStep
    const policyOf = (model: Qwen3VL, role: Role): Policy =>
      new LocalPolicy(model, { seed: (own + (role === 'reasoner' ? 2 ** 19 : 0)) % 2 ** 52 })
    const model = (role: Role): Qwen3VL => (joint || this.role === role ? this.model : this.#frozen)
    return new PraGrpo({
      ...sharedOf(this.#options),
      perceiver: policyOf(model('perceiver'), 'perceiver'),
      reasoner: policyOf(model('reasoner'), 'reasoner'),
      device: this.model.device,
      logProbsMode: 'processed',
      temperature,
      // On one engine there is nothing to correct; the difference is measured.
      correction: false,
      // A joint step is a step of each role.
      step: joint ? 2 * this.#step : this.#step,
      ...(joint && this.#options.rounds !== undefined && { rounds: this.#options.rounds }),
    })
  }

  /** The gradient of a batch's loss, added to `into`, which it uses up. */
  async #gradient(
    grpo: PraGrpo,
    batch: RolloutBatch,
    into: RoleGradient['gradients'],
  ): Promise<RoleGradient> {
    const { role, items } = batch
    const { microBatchTokens = 16_384, temperature = 1 } = this.#options
    const own = items.filter(({ error }) => !error).map(({ completion }) => completion)
    const total = own.reduce((sum, { tokens = [] }) => sum + tokens.length, 0)
    // The passes stand for the batch's tokens, which are those of the items without an error.
    const pieces = batch.cuSeqlens && total ? microBatches(batch, microBatchTokens, op) : []
    if (!pieces.length) return { gradients: into, metrics: emptyMetrics(role, batch, grpo.steps) }
    const passes = pieces.map((piece) => new Passes(this.model, piece, this.#passOptions()))
    try {
      // A batch in one piece goes forward once.
      const first = passes.length === 1 ? passes[0]!.record() : undefined
      const scored = first ? [first] : passes.map((pass) => pass.score(this.model))
      const parts = {
        logProbs: joined(scored.map(({ logProbs }) => logProbs)),
        entropy: joined(scored.map(({ entropy }) => entropy)),
      }
      const refLogProbs = this.#needsReference
        ? joined(passes.map((pass) => pass.score(this.#frozen).logProbs))
        : undefined
      const { logProbs, entropy } = parts
      const step = grpo.step(batch, {
        logProbs,
        temperature,
        oldLogProbs: logProbs,
        ...(refLogProbs && { refLogProbs }),
      })
      let gradients = into
      for (const [i, pass] of passes.entries()) {
        const { from, to } = pieces[i]!
        const dLogProbs = step.dLogProbs.slice(from, to)
        const record = first ?? pass.record()
        const before = gradients
        const made = record.backward({ dLogProbs, ...(before && { into: before }) })
        record.dispose()
        dLogProbs.dispose()
        // New handles on the same storage.
        for (const tensor of Object.values(before ?? {})) tensor.dispose()
        gradients = made.gradients
      }
      const known = (await grpo.metrics())[role]!
      const [ours, sampled, entropies] = await Promise.all([
        logProbs.read(),
        batch.oldLogProbs?.read(),
        entropy.read(),
      ])
      step.dispose()
      refLogProbs?.dispose()
      for (const tensor of [logProbs, entropy]) tensor.dispose()
      return {
        gradients,
        metrics: {
          ...known,
          role,
          entropyMean: entropies.reduce((sum, x) => sum + x, 0) / entropies.length,
          samplerDifference: sampled
            ? ours.reduce((most, x, i) => Math.max(most, Math.abs(x - sampled[i]!)), 0)
            : Number.NaN,
          ...lengthsOf(items),
          tokensRead: passes.reduce((sum, { tokens }) => sum + tokens, 0),
          microBatches: passes.length,
        },
      }
    } finally {
      for (const pass of passes) pass.dispose()
    }
  }

  #passOptions(): PassOptions {
    const { temperature = 1, checkpoint } = this.#options
    return {
      temperature,
      ...(checkpoint && { checkpoint }),
      trainable: (name) => this.#weights.trains(name),
    }
  }

  get #needsReference(): boolean {
    const { kl, klCoef } = this.#options.loss ?? {}
    return kl !== 'none' && klCoef !== 0
  }
}

interface PassOptions extends CheckpointOption, TrainableOption {
  temperature: number
}

/** A piece of a batch on its way through the model. */
class Passes implements Disposable {
  readonly #model: Qwen3VL
  readonly #packed: PackedBatch
  readonly #options: PassOptions

  constructor(model: Qwen3VL, piece: MicroBatch, options: PassOptions) {
    this.#model = model
    this.#packed = pack(model, piece, op)
    this.#options = options
  }

  get tokens(): number {
    return this.#packed.tokens.length
  }

  record(): ReturnType<Qwen3VL['record']> {
    return this.#model.record({ ...this.#arguments(), ...this.#options })
  }

  score(model: Qwen3VL): ReturnType<Qwen3VL['logProbs']> {
    return model.logProbs({ ...this.#arguments(), temperature: this.#options.temperature })
  }

  dispose(): void {
    this.#packed[Symbol.dispose]()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  #arguments() {
    const { tokens, cuSeqlens, prefixOf, targets, images } = this.#packed
    return { tokens, cuSeqlens, prefixOf, targets, ...(images && { images }) }
  }
}

/** One tensor of the pieces' results, which it frees; a copy where there is one alone. */
function joined(tensors: readonly Tensor<'f32'>[]): Tensor<'f32'> {
  return concat({ tensors })
}

function lengthsOf(items: readonly RolloutItem[]): { lengthMean: number; lengthMax: number } {
  const lengths = items.flatMap(({ error, completion }) => (error ? [] : [lengthOf(completion)]))
  const sum = lengths.reduce((all, length) => all + length, 0)
  return {
    lengthMean: lengths.length ? sum / lengths.length : 0,
    lengthMax: Math.max(0, ...lengths),
  }
}

function lengthOf({ tokens = [] }: Completion): number {
  return tokens.length
}

/** Of a batch that there is nothing to train on in. */
function emptyMetrics(role: Role, batch: RolloutBatch, step: number): TrainRoleMetrics {
  const none = { loss: 0, policyLoss: 0, kl: 0, entropy: 0, approxKl: 0, ratioMean: 1, tokens: 0 }
  return {
    ...batch.metrics,
    ...none,
    role,
    step,
    clipFraction: 0,
    clipFractionLower: 0,
    sampledEntropy: 0,
    ratiosTo: 'trainer',
    entropyMean: 0,
    samplerDifference: 0,
    ...lengthsOf(batch.items),
    tokensRead: 0,
    microBatches: 0,
  }
}

function pick<T extends object>(options: T, names: object): Partial<T> {
  return Object.fromEntries(
    Object.entries(options).filter(([name, value]) => name in names && value !== undefined),
  ) as Partial<T>
}

const sharedOf = (options: LocalTrainerOptions): SharedOptions => pick(options, sharedNames)
const optimizerOf = (options: LocalTrainerOptions): OptimizerOptions =>
  pick(options, optimizerNames)

function checkTrainerOptions(options: LocalTrainerOptions, device: Device): LocalTrainerOptions {
  options = checkArguments(options, optionNames, op, 'options')
  const { joint, schedule, freezeTower, microBatchTokens, seed, resume, loss } = options
  if (joint !== undefined) checkBoolean(joint, 'joint', op)
  if (joint && schedule !== undefined)
    refuse('ERR_VALUE', op, 'schedule must be absent with joint, whose steps are of both roles')
  choice(options.reference ?? 'phase', ['phase', 'start'], 'reference', op)
  choice<Checkpoint>(options.checkpoint ?? 'none', checkpoints, 'checkpoint', op)
  if (freezeTower !== undefined) checkBoolean(freezeTower, 'freezeTower', op)
  if (options.trainable !== undefined) checkFunction(options.trainable, 'trainable', op)
  if (microBatchTokens !== undefined) checkPositive(microBatchTokens, 'microBatchTokens', op)
  if (seed !== undefined) checkIntegerWithin(seed, 0, 2 ** 31 - 1, 'seed', op)
  if (resume !== undefined) checkString(resume, 'resume', op)
  if (options.lora !== undefined) checkLora(options.lora, op)
  checkLearningRate(options, op)
  // The gradient goes through the log-probabilities.
  for (const name of ['entropyCoef', 'topEntropyQuantile'] as const)
    if (loss?.[name])
      refuse('ERR_VALUE', op, `loss.${name} must be absent: a LocalTrainer takes no entropy term`)
  const { maxGradNorm = 1, betas = [0.9, 0.999], eps = 1e-8, weightDecay = 0.01 } = options
  if (!(maxGradNorm >= 0))
    refuse('ERR_VALUE', op, `maxGradNorm must be at least 0, got ${maxGradNorm}`)
  // What the operations and PraGrpo refuse is refused here, before the models are loaded.
  scope(() => {
    const [params, grads, moments] = [
      [device.zeros([1])],
      [device.zeros([1])],
      [device.zeros([2, 1])],
    ]
    adamW({ params, grads, moments, step: 1, lr: 0, betas, eps, weightDecay })
  })
  const policy: Policy = { generate: async () => [] }
  new PraGrpo({ ...sharedOf(options), perceiver: policy, reasoner: policy, device })
  return { ...options }
}

/** What a run's state is of, as strings: a state of other options is refused. */
function identity(options: LocalTrainerOptions): Record<string, string> {
  const { lora, schedule, joint = false, reference = 'phase', seed = 0 } = options
  return {
    format: 'p2r-kernels train 1',
    lora: JSON.stringify(lora ? checkLora(lora, op) : null),
    schedule: JSON.stringify(schedule ?? { perceiver: 1, reasoner: 1 }),
    joint: String(joint),
    reference,
    seed: String(seed),
  }
}

function checkState(
  state: Record<string, string>,
  options: LocalTrainerOptions,
  path: string,
): void {
  for (const [name, value] of Object.entries(identity(options)))
    if (state[name] !== value)
      refuse('ERR_VALUE', op, `${path} is of a run with ${name} ${state[name]}, and not ${value}`)
  if (!/^\d+$/.test(state.step ?? ''))
    refuse('ERR_FORMAT', op, `${path}: there is no step of a run in it`)
}

async function restore(
  path: string,
  device: Device,
  weights: TrainedWeights,
  frozen: Qwen3VL,
): Promise<void> {
  const stored = await loadTensors(path, device)
  try {
    const own = { ...weights.state() }
    for (const [name, weight] of frozen.parameters())
      if (weights.trains(name)) own[`frozen.${name}`] = weight
    for (const [name, tensor] of Object.entries(own)) {
      const from = stored[name]
      if (!from || from.dtype !== tensor.dtype || String(from.shape) !== String(tensor.shape))
        refuse('ERR_FORMAT', op, `${path}: '${name}' is not that of this run`)
    }
    for (const [name, tensor] of Object.entries(own)) tensor.copyFrom(stored[name]!)
    weights.restored()
  } finally {
    for (const tensor of Object.values(stored)) tensor.dispose()
  }
}
