/**
 * Training: a supervised warm start, which stands in for the paper's pretrained backbone, then
 * PRA-GRPO, in alternating phases. In the Perceiver's phase a group of boxes is sampled for each
 * question and the frozen Reasoner answers each; in the Reasoner's phase the frozen Perceiver's
 * greedy box is fixed and a group of answers is sampled. Either way the reward is 1 for a correct
 * final answer and 0 for a wrong one: boxes have no labels here.
 */
import { groupAdvantages, policyLoss, scope, scopeAsync, type Tensor } from 'p2r-kernels'
import { evidenceOf, mean, overviewsOf, repeated, Shuffled } from './batch.js'
import type { System } from './evaluate.js'
import { cellOf, locationsOf, Perceiver, Reasoner, type Scored } from './policy.js'
import { Rng } from './rng.js'
import type { Canvases, Question } from './scene.js'
import { copyParams, Optimizer } from './vit.js'

/** Chosen on the validation canvases, whose digits are neither trained nor tested on. */
export const SETTINGS = {
  batch: 64,
  /** Rollouts a question. */
  group: 8,
  rounds: 3,
  /** Policy updates of a full run; two sevenths of them are the Perceiver's. */
  updates: 1260,
  perceiverShare: 2 / 7,
  /** The Perceiver's is short, so that its hit rate starts low; it rises steeply after this. */
  warmStart: { perceiver: 68, reasoner: 800, lr: 2e-3 },
  /** Of the Reasoner's warm start, in a run without policy updates: a first look. */
  firstLook: 0.5,
  lr: { perceiver: 5e-4, reasoner: 7e-4 },
  /**
   * Below 1 the Perceiver's policy is sharper: of 1024 cells sampled uniformly hardly any contains the
   * needle, and the tenth of the others that are answered correctly by chance would dominate.
   */
  temperature: { perceiver: 0.5, reasoner: 1 },
  klCoef: 0.01,
} as const

export type Role = 'perceiver' | 'reasoner'

export interface Phase {
  kind: 'warm start' | 'PRA-GRPO'
  role: Role
  /** Of SETTINGS.rounds; 0 for the warm start. */
  round: number
  updates: number
}

export interface Step {
  phase: Phase
  /** 1 .. phase.updates */
  step: number
  /** PRA-GRPO: mean reward of the batch's rollouts, and the share that look at the needle. */
  reward?: number
  hit?: number
  /** Warm start: mean -log p of the labels, each a token. */
  loss?: number
}

/**
 * The phases in order. Fewer updates than a full run's shorten the warm start in proportion; none at
 * all shorten the Reasoner's alone: the Perceiver's hits come with its last steps.
 */
export function schedule(updates: number): { warmStart: Phase[]; policy: Phase[] } {
  const { warmStart, firstLook, rounds, perceiverShare } = SETTINGS
  const share = (role: Role): number => {
    if (updates > 0) return Math.min(1, updates / SETTINGS.updates)
    return role === 'reasoner' ? firstLook : 1
  }
  const warm = (role: Role): Phase => ({
    kind: 'warm start',
    role,
    round: 0,
    updates: Math.max(1, Math.round(share(role) * warmStart[role])),
  })
  const total = { perceiver: Math.round(updates * perceiverShare), reasoner: 0 }
  total.reasoner = updates - total.perceiver
  const until = (role: Role, round: number): number => Math.round((total[role] * round) / rounds)
  const policy: Phase[] = []
  for (let round = 1; round <= rounds; round++) {
    for (const role of ['perceiver', 'reasoner'] as const) {
      const count = until(role, round) - until(role, round - 1)
      policy.push({ kind: 'PRA-GRPO', role, round, updates: count })
    }
  }
  return {
    warmStart: [warm('perceiver'), warm('reasoner')],
    policy: policy.filter((phase) => phase.updates > 0),
  }
}

export class Trainer {
  readonly #system: System
  readonly #canvases: Canvases
  readonly #questions: Shuffled
  readonly #draws: Rng
  /** The trained role's weights at the start of its phase, the reference of the KL term. */
  readonly #reference: { perceiver: Perceiver; reasoner: Reasoner }
  #optimizers: Record<Role, Optimizer>
  /** Taken early, so that their canvases are drawn while the device computes. */
  #next: Question[]
  #kind: Phase['kind'] = 'warm start'

  constructor(system: System, canvases: Canvases, seed: number) {
    const { device } = system
    this.#system = system
    this.#canvases = canvases
    this.#questions = new Shuffled(canvases, new Rng(seed, 12))
    this.#next = this.#questions.take(SETTINGS.batch)
    this.#draws = new Rng(seed, 13)
    this.#reference = {
      perceiver: new Perceiver(device, seed),
      reasoner: new Reasoner(device, seed),
    }
    this.#optimizers = this.#freshOptimizers()
  }

  /** Yields after each update; ending the iteration stops the training between updates. */
  async *run(phase: Phase): AsyncGenerator<Step> {
    if (phase.kind !== this.#kind) {
      for (const optimizer of Object.values(this.#optimizers)) optimizer.dispose()
      this.#optimizers = this.#freshOptimizers()
      this.#kind = phase.kind
    }
    const { role, kind } = phase
    copyParams(this.#reference[role].params, this.#system[role].params)
    // The Perceiver is frozen while the Reasoner learns, so each question's box is found once.
    const boxes = new Map<string, number>()
    // A step of the warm start is queued before the loss of the one before is read, so that the device never waits
    // for the next canvases to be drawn.
    let queued: { step: number; loss: Promise<number> } | undefined
    for (let step = 1; step <= phase.updates; step++) {
      const questions = this.#next
      this.#next = this.#questions.take(SETTINGS.batch)
      if (kind === 'warm start') {
        const before = queued
        queued = { step, ...scope(() => this.#supervise(role, questions)) }
        if (before) yield { phase, step: before.step, loss: await before.loss }
        continue
      }
      const result = await scopeAsync(
        (): Promise<Partial<Step>> =>
          role === 'perceiver'
            ? this.#improvePerceiver(questions)
            : this.#improveReasoner(questions, boxes),
      )
      yield { phase, step, ...result }
    }
    if (queued) yield { phase, step: queued.step, loss: await queued.loss }
  }

  /** One step of maximum likelihood: the needle's cell, or its class given that cell. */
  #supervise(role: Role, questions: Question[]): { loss: Promise<number> } {
    const { device, perceiver, reasoner } = this.#system
    const colours = questions.map(({ colour }) => colour)
    const cells = questions.map(({ cell }) => cell)
    const labels = questions.map(({ label }) => label)
    const rows = repeated(questions.length, 1)
    const scored =
      role === 'perceiver'
        ? perceiver.score(
            perceiver.see(overviewsOf(device, this.#canvases, questions), colours),
            rows,
            locationsOf(cells),
            1,
          )
        : reasoner.score(
            reasoner.read(evidenceOf(device, this.#canvases, questions, cells), colours),
            rows,
            labels,
            1,
          )
    // The loss is the mean over questions of -log p, summed over the label's tokens.
    const dLogProbs = new Float32Array(scored.logProbs.size).fill(-1 / questions.length)
    const gradient = device.tensor(dLogProbs, scored.logProbs.shape)
    this.#optimizers[role].update(scored.backward(gradient), SETTINGS.warmStart.lr)
    const loss = scored.logProbs.toFloat32().then((values) => -mean(values))
    // It is awaited after the next step; where the run ends before, nobody asks for it.
    loss.catch(() => {})
    for (const { canvas } of this.#next) this.#canvases.overview(canvas)
    return { loss }
  }

  async #improvePerceiver(questions: Question[]): Promise<{ reward: number; hit: number }> {
    const { device, perceiver } = this.#system
    const temperature = SETTINGS.temperature.perceiver
    const colours = questions.map(({ colour }) => colour)
    const groups = repeated(questions.length, SETTINGS.group)
    const overviews = overviewsOf(device, this.#canvases, questions)

    const seen = perceiver.see(overviews, colours)
    const locations = await perceiver.act(seen, groups, temperature, this.#draws)
    const scored = perceiver.score(seen, groups, locations, temperature)
    const reference = this.#reference.perceiver
    const anchored = reference.score(
      reference.see(overviews, colours),
      groups,
      locations,
      temperature,
    )

    const cells = Int32Array.from(groups, (_, i) => cellOf(locations, i))
    const rewards = await this.#judge(questions, groups, cells)
    this.#update('perceiver', scored, anchored, rewards, groups)
    const hits = Array.from(groups, (group, i) => Number(questions[group]?.cell === cells[i]))
    return { reward: mean(rewards), hit: mean(hits) }
  }

  async #improveReasoner(
    questions: Question[],
    boxes: Map<string, number>,
  ): Promise<{ reward: number; hit: number }> {
    const { device, reasoner } = this.#system
    const temperature = SETTINGS.temperature.reasoner
    const colours = questions.map(({ colour }) => colour)
    const groups = repeated(questions.length, SETTINGS.group)
    const cells = await this.#bestCells(questions, boxes)
    const evidence = evidenceOf(device, this.#canvases, questions, cells)

    const read = reasoner.read(evidence, colours)
    const answers = await reasoner.act(read, groups, temperature, this.#draws)
    const scored = reasoner.score(read, groups, answers, temperature)
    const reference = this.#reference.reasoner
    const anchored = reference.score(
      reference.read(evidence, colours),
      groups,
      answers,
      temperature,
    )

    const right = (group: number, i: number): number =>
      Number(questions[group]?.label === answers[i])
    const rewards = Float32Array.from(groups, right)
    this.#update('reasoner', scored, anchored, rewards, groups)
    const hits = questions.map(({ cell }, i) => Number(cell === cells[i]))
    return { reward: mean(rewards), hit: mean(hits) }
  }

  /** One on-policy GRPO update: no old log-probabilities, hence ratios of 1. */
  #update(
    role: Role,
    scored: Scored,
    anchored: Scored,
    rewards: Float32Array,
    groups: Int32Array,
  ): void {
    const given = this.#system.device.tensor(rewards, [rewards.length])
    const { dLogProbs } = policyLoss({
      logProbs: scored.logProbs,
      refLogProbs: anchored.logProbs,
      advantages: groupAdvantages({ rewards: given, groups, estimator: 'grpo' }),
      cuSeqlens: scored.cuSeqlens,
      kl: 'k3',
      klCoef: SETTINGS.klCoef,
    })
    this.#optimizers[role].update(scored.backward(dLogProbs), SETTINGS.lr[role])
  }

  /** 1 for each rollout from whose cell the frozen Reasoner answers correctly. */
  async #judge(
    questions: Question[],
    groups: Int32Array,
    cells: Int32Array,
  ): Promise<Float32Array> {
    const { device, reasoner } = this.#system
    // Rollouts of a group often agree: each (question, cell) is evaluated once.
    const seen = new Map<string, number>()
    const asked: Question[] = []
    const shown: number[] = []
    const where = Array.from(groups, (group, i) => {
      const key = `${group} ${cells[i]}`
      const known = seen.get(key)
      if (known !== undefined) return known
      seen.set(key, asked.length)
      asked.push(questions[group] as Question)
      shown.push(cells[i] as number)
      return asked.length - 1
    })
    const colours = asked.map(({ colour }) => colour)
    const read = reasoner.read(evidenceOf(device, this.#canvases, asked, shown), colours)
    const answers = await reasoner.act(read, repeated(asked.length, 1), 0, this.#draws)
    return Float32Array.from(where, (at) => Number(answers[at] === asked[at]?.label))
  }

  /** The Perceiver's greedy cells, cached per question. */
  async #bestCells(questions: Question[], boxes: Map<string, number>): Promise<number[]> {
    const { device, perceiver } = this.#system
    const key = ({ canvas, colour }: Question): string => `${canvas} ${colour}`
    const missing = questions.filter((question) => !boxes.has(key(question)))
    if (missing.length > 0) {
      const overviews: Tensor = overviewsOf(device, this.#canvases, missing)
      const colours = missing.map(({ colour }) => colour)
      const rows = repeated(missing.length, 1)
      const locations = await perceiver.act(perceiver.see(overviews, colours), rows, 0, this.#draws)
      for (const [i, question] of missing.entries()) boxes.set(key(question), cellOf(locations, i))
    }
    return questions.map((question) => boxes.get(key(question)) as number)
  }

  #freshOptimizers(): Record<Role, Optimizer> {
    const { device, perceiver, reasoner } = this.#system
    return {
      perceiver: new Optimizer(device, perceiver.params),
      reasoner: new Optimizer(device, reasoner.params),
    }
  }
}
