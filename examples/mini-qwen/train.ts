/**
 * Training of the one weight set: a supervised warm start, which stands in for a pretrained checkpoint, then PRA-GRPO
 * on rewards of answers alone.
 */
import {
  adamW,
  clipGradNorm,
  type Device,
  groupAdvantages,
  policyLoss,
  type Qwen3VL,
  scope,
  scopeAsync,
  type Tensor,
} from 'p2r-kernels'
import { mean, Shuffled } from '../mini-p2r/batch.js'
import { Rng } from '../mini-p2r/rng.js'
import { type Canvases, QUESTIONS, type Question } from '../mini-p2r/scene.js'
import { type Asked, boxIn, type Cells, cellsOf, look, pack, type View } from './batch.js'
import { Detection } from './detection.js'
import { answerIn, isHit } from './evaluate.js'
import { type Ask, Sampler } from './sampler.js'
import { answerTokens, boxTokens } from './vocabulary.js'

/** Of the warm start. */
export interface WarmSettings {
  /** Steps at most. */
  steps: number
  /** It ends as soon as the box loss, averaged over some 20 steps, is below this. */
  untilBoxLoss: number
  /** Canvases a step, each with its three questions. */
  canvases: number
  /** Crops a step. */
  crops: number
  lr: number
  rampSteps: number
  /** Weight of the detection loss. */
  detection: number
}

/** Of PRA-GRPO. */
export interface PolicySettings {
  updates: number
  /** Canvases an update, each with its three questions. */
  canvases: number
  /** Rollouts a question. */
  group: number
  temperature: number
  lr: number
  rampSteps: number
  /** The learning rate falls linearly to 0 over this share of the updates, the last ones. */
  decay: number
  /** Of the Reasoner's loss beside the Perceiver's. */
  reasonerWeight: number
}

const warmStart: WarmSettings = {
  steps: 1000,
  untilBoxLoss: 1.8,
  canvases: 32,
  crops: 48,
  lr: 2e-3,
  rampSteps: 30,
  detection: 3,
}
const policy: PolicySettings = {
  updates: 300,
  canvases: 22,
  group: 8,
  temperature: 0.5,
  lr: 4e-4,
  rampSteps: 10,
  decay: 0.2,
  reasonerWeight: 0.25,
}

/** Chosen on the validation canvases. */
export const SETTINGS = {
  warmStart,
  policy,
  betas: [0.9, 0.99],
  weightDecay: 0.01,
  maxGradNorm: 1,
} as const

type Named = Record<string, Tensor<'f32'>>

/** AdamW over some parameters. */
class Optimizer {
  readonly #params: Named
  readonly #moments: Named = {}
  #step = 0

  constructor(params: Named) {
    this.#params = params
    for (const [name, { device, size }] of Object.entries(params))
      this.#moments[name] = device.zeros([2, size])
  }

  update(gradients: Readonly<Named>, lr: number): void {
    const names = Object.keys(this.#params)
    const of = (all: Readonly<Named>): Tensor<'f32'>[] => names.map((name) => all[name]!)
    const { betas, weightDecay, maxGradNorm } = SETTINGS
    const grads = of(gradients)
    clipGradNorm({ grads, maxNorm: maxGradNorm })
    const [params, moments] = [of(this.#params), of(this.#moments)]
    adamW({ params, grads, moments, step: ++this.#step, lr, betas, weightDecay })
  }

  dispose(): void {
    for (const tensor of Object.values(this.#moments)) tensor.dispose()
  }
}

/** Means over a step. */
export interface WarmStep {
  /** Of a box's tokens, summed; likewise of an answer's. */
  boxLoss: number
  answerLoss: number
  detectionLoss: number
}

export interface PolicyStep {
  /** Of the Perceiver's rollouts, and of the Reasoner's. */
  reward: number
  reasonerReward: number
  hit: number
  /** Share of the Perceiver's rollouts without a box. */
  faults: number
}

export class Trainer implements Disposable {
  readonly sampler: Sampler
  readonly #model: Qwen3VL
  readonly #device: Device
  readonly #canvases: Canvases
  readonly #cropCanvases: Canvases
  readonly #seed: number
  readonly #weights: Named

  /** canvases: what both roles learn on; cropCanvases: further ones, for the Reasoner's warm start alone. */
  constructor(model: Qwen3VL, canvases: Canvases, cropCanvases: Canvases, seed: number) {
    this.#model = model
    this.#device = model.device
    this.#canvases = canvases
    this.#cropCanvases = cropCanvases
    this.#seed = seed
    this.#weights = Object.fromEntries(model.parameters()) as Named
    this.sampler = new Sampler(model, 2 ** 16)
  }

  dispose(): void {
    this.sampler.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  /** Yields after each step. The next one is queued before a step's losses are read. */
  async *warmStart(settings: WarmSettings = SETTINGS.warmStart): AsyncGenerator<WarmStep> {
    const rng = new Rng(this.#seed, 30)
    const head = new Detection(this.#device, rng)
    const parameters = { ...this.#weights, ...head.parameters }
    const optimizer = new Optimizer(parameters)
    const order = new Shuffled(this.#canvases, rng)
    let before: Promise<WarmStep> | undefined
    let average: number | undefined
    try {
      for (let step = 1; step <= settings.steps; step++) {
        const lr = settings.lr * Math.min(1, step / settings.rampSteps)
        const canvases = order.take(settings.canvases).map(({ canvas }) => canvas)
        const crops = Array.from({ length: settings.crops }, () =>
          this.#cropCanvases.question(rng.below(QUESTIONS * this.#cropCanvases.count)),
        )
        const { losses } = scope(() => {
          const { losses, gradients } = this.#supervise(head, canvases, crops, settings)
          optimizer.update(gradients, lr)
          return { losses }
        })
        losses.catch(() => {})
        if (before) {
          const done = await before
          average = average === undefined ? done.boxLoss : 0.95 * average + 0.05 * done.boxLoss
          yield done
        }
        before = losses
        if (average !== undefined && average < settings.untilBoxLoss) break
      }
      if (before) yield await before
    } finally {
      optimizer.dispose()
      for (const tensor of Object.values(head.parameters)) tensor.dispose()
    }
  }

  #supervise(
    head: Detection,
    canvases: readonly number[],
    crops: readonly Question[],
    { detection }: WarmSettings,
  ): { losses: Promise<WarmStep>; gradients: Named } {
    const device = this.#device
    const needles = canvases.map((canvas) =>
      Array.from({ length: QUESTIONS }, (_, colour) =>
        this.#canvases.question(QUESTIONS * canvas + colour),
      ),
    )
    const asked: Asked[] = [
      ...needles.flatMap((own, image) =>
        own.map(
          ({ colour, cell }): Asked => ({
            image,
            role: 'perceiver',
            colour,
            completions: [boxTokens(cell)],
          }),
        ),
      ),
      ...crops.map(
        ({ colour, label }, i): Asked => ({
          image: canvases.length + i,
          role: 'reasoner',
          colour,
          completions: [answerTokens(label)],
        }),
      ),
    ]
    const overviews = look(
      device,
      this.#canvases,
      canvases.map((canvas) => ({ canvas })),
    )
    const cut = look(
      device,
      this.#cropCanvases,
      crops.map(({ canvas, cell }) => ({ canvas, cells: cellsOf(cell) })),
    )
    const vision = {
      pixelValues: joinRows(overviews.pixelValues, cut.pixelValues),
      gridThw: [...overviews.gridThw, ...cut.gridThw],
    }
    const { packed, bounds } = pack(vision, asked)
    const boxes = QUESTIONS * canvases.length
    const boxEnd = bounds[boxes]!
    const total = bounds.at(-1)!
    const record = this.#model.record(packed)
    const dLogProbs = new Float32Array(total)
      .fill(-1 / boxes, 0, boxEnd)
      .fill(-1 / crops.length, boxEnd)
    const features = record.features as Tensor<'f32'>
    const seen = 16 * canvases.length
    const aux = head.loss(
      features.slice(0, seen),
      needles.map((own) => own.map(({ cell }) => cell)),
      detection,
    )
    const dFeatures = device.zeros(features.shape)
    dFeatures.slice(0, seen).copyFrom(aux.dFeatures)
    const { gradients } = record.backward({
      dLogProbs: device.tensor(dLogProbs, [total]),
      dFeatures,
    })
    const reads = Promise.all([record.logProbs.read(), aux.logProbs.read()])
    const losses = reads.then(
      ([said, detected]): WarmStep => ({
        boxLoss: -sum(said.subarray(0, boxEnd)) / boxes,
        answerLoss: -sum(said.subarray(boxEnd)) / crops.length,
        detectionLoss: -sum(detected) / boxes,
      }),
    )
    return { losses, gradients: { ...gradients, ...aux.gradients } }
  }

  /** Joint updates of both roles. Yields after each. */
  async *policy(settings: PolicySettings = SETTINGS.policy): AsyncGenerator<PolicyStep> {
    const rng = new Rng(this.#seed, 31)
    const optimizer = new Optimizer(this.#weights)
    const canvases = Array.from({ length: this.#canvases.count }, (_, canvas) => canvas)
    let order: Int32Array = new Int32Array(0)
    let next = 0
    try {
      for (let step = 1; step <= settings.updates; step++) {
        if (next + settings.canvases > order.length) {
          order = rng.shuffle(Int32Array.from(canvases))
          next = 0
        }
        const own = [...order.subarray(next, next + settings.canvases)]
        next += settings.canvases
        const left = (settings.updates - step + 1) / (settings.decay * settings.updates)
        const lr = settings.lr * Math.min(1, step / settings.rampSteps, left)
        yield await scopeAsync(async () => {
          const { gradients, ...made } = await this.#improve(own, settings, rng)
          optimizer.update(gradients, lr)
          return made
        })
      }
    } finally {
      optimizer.dispose()
    }
  }

  async #improve(
    canvases: readonly number[],
    { group, temperature, reasonerWeight }: PolicySettings,
    rng: Rng,
  ): Promise<PolicyStep & { gradients: Named }> {
    const device = this.#device
    const questions = canvases.flatMap((canvas) =>
      Array.from({ length: QUESTIONS }, (_, colour) =>
        this.#canvases.question(QUESTIONS * canvas + colour),
      ),
    )
    const sampled = new Array<number>(group).fill(temperature)
    const overviews = look(
      device,
      this.#canvases,
      canvases.map((canvas) => ({ canvas })),
    )
    // The greedy box comes last.
    const located = await this.sampler.rollouts(
      'perceiver',
      overviews,
      questions.map(
        ({ colour }, i): Ask => ({
          image: Math.floor(i / QUESTIONS),
          colour,
          temperatures: [...sampled, 0],
        }),
      ),
      rng,
    )

    // Each box of a question is answered greedily once; the greedy box by the Reasoner's rollouts, too.
    const views: View[] = []
    const asks: Ask[] = []
    const shown: { question: number; ask: number }[] = []
    const judged = located.map((own, q) => {
      const { canvas, colour } = questions[q]!
      const at = new Map<Cells, number>()
      return own.map((tokens, i) => {
        const cells = boxIn(tokens)
        if (!cells) return -1
        let ask = at.get(cells)
        if (ask === undefined) {
          ask =
            asks.push({ image: views.push({ canvas, cells }) - 1, colour, temperatures: [0] }) - 1
          at.set(cells, ask)
        }
        if (i === group) {
          asks[ask]!.temperatures = [0, ...sampled]
          shown.push({ question: q, ask })
        }
        return ask
      })
    })
    const answers = views.length
      ? await this.sampler.rollouts('reasoner', look(device, this.#canvases, views), asks, rng)
      : []
    const right = (question: number, tokens: readonly number[]): number =>
      Number(answerIn(tokens) === String(questions[question]!.label))
    const boxRewards = judged.flatMap((own, q) =>
      own.slice(0, group).map((ask) => (ask < 0 ? 0 : right(q, answers[ask]![0]!))),
    )
    const answerRewards = shown.flatMap(({ question, ask }) =>
      answers[ask]!.slice(1).map((tokens) => right(question, tokens)),
    )

    const asked: Asked[] = [
      ...questions.map(
        ({ colour }, i): Asked => ({
          image: Math.floor(i / QUESTIONS),
          role: 'perceiver',
          colour,
          completions: located[i]!.slice(0, group),
        }),
      ),
      ...shown.map(
        ({ question, ask }, i): Asked => ({
          image: canvases.length + i,
          role: 'reasoner',
          colour: questions[question]!.colour,
          completions: answers[ask]!.slice(1),
        }),
      ),
    ]
    const vision = look(device, this.#canvases, [
      ...canvases.map((canvas) => ({ canvas })),
      ...shown.map(({ ask }) => views[asks[ask]!.image]!),
    ])
    const { packed, bounds } = pack(vision, asked)
    const record = this.#model.record({ ...packed, temperature })
    const rewards = [...boxRewards, ...answerRewards]
    const groups = rewards.map((_, i) => Math.floor(i / group))
    const weights = new Float32Array(bounds.at(-1)!)
    weights.fill(1, 0, bounds[boxRewards.length]).fill(reasonerWeight, bounds[boxRewards.length])
    // One on-policy update: ratios are 1. The sum over a sequence's tokens, the mean over the Perceiver's sequences.
    const { dLogProbs } = policyLoss({
      logProbs: record.logProbs,
      advantages: groupAdvantages({
        rewards: device.tensor(rewards, [rewards.length]),
        groups,
        estimator: 'grpo',
      }),
      importanceWeights: device.tensor(weights, [weights.length]),
      cuSeqlens: bounds,
      aggregation: 'seq-mean-token-sum',
      normalizer: boxRewards.length,
    })
    const { gradients } = record.backward({ dLogProbs })
    const hits = located.flatMap((own, q) =>
      own.slice(0, group).map((tokens) => Number(isHit(boxIn(tokens), questions[q]!.cell))),
    )
    const faults = judged.flatMap((own) => own.slice(0, group).map((ask) => Number(ask < 0)))
    return {
      gradients,
      reward: mean(boxRewards),
      reasonerReward: mean(answerRewards),
      hit: mean(hits),
      faults: mean(faults),
    }
  }
}

function joinRows(a: Tensor, b: Tensor): Tensor {
  const { device } = a
  const width = a.shape[1]!
  const [rows, more] = [a.shape[0]!, b.shape[0]!]
  const all = device.zeros([rows + more, width])
  all.slice(0, rows).copyFrom(a as Tensor<'f32'>)
  all.slice(rows).copyFrom(b as Tensor<'f32'>)
  return all
}

function sum(values: Float32Array): number {
  let total = 0
  for (const value of values) total += value
  return total
}
