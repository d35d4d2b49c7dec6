import { type Device, type Ints, scopeAsync, type Tensor } from 'p2r-kernels'
import { evidenceOf, mean, overviewsOf, repeated } from './batch.js'
import { cellOf, type Evidence, type Perceiver, type Reasoner } from './policy.js'
import { Rng } from './rng.js'
import { type Canvases, QUESTIONS, type Question } from './scene.js'
import { SETTINGS } from './train.js'

export interface System {
  device: Device
  perceiver: Perceiver
  reasoner: Reasoner
}

/** The greedy result for one question, with each policy's probability of its own choice. */
export interface Prediction {
  /** The Perceiver's cell: row * 32 + column. */
  cell: number
  cellProbability: number
  /** The Reasoner's answer to it. */
  answer: number
  answerProbability: number
}

export interface Answered extends Prediction {
  question: Question
  /** The Reasoner's answer to the needle's own cell. */
  answerOnTruth: number
}

export interface Scores {
  /** Share of questions answered correctly, end to end. */
  accuracy: number
  /** Share whose needle is in the Perceiver's box. */
  hit: number
  /** Share that the Reasoner answers correctly on the needle's own cell. */
  reasoner: number
}

/**
 * Asks one question per overview, greedily: the Perceiver's cell, then the Reasoner's answer to the
 * evidence for that cell. Probabilities are at the temperatures that the policies were trained at.
 */
export async function predict(
  { perceiver, reasoner }: System,
  overviews: Tensor,
  colours: Ints,
  evidenceAt: (cells: number[]) => Evidence | Promise<Evidence>,
): Promise<Prediction[]> {
  const { temperature } = SETTINGS
  const rows = repeated(colours.length, 1)
  // Greedy sampling takes a seed, but does not use it.
  const seeds = new Rng(0)
  const seen = perceiver.see(overviews, colours)
  const locations = await perceiver.act(seen, rows, 0, seeds)
  const cells = Array.from(rows, (i) => cellOf(locations, i))
  const read = reasoner.read(await evidenceAt(cells), colours)
  const answers = await reasoner.act(read, rows, 0, seeds)
  const [located, answered] = await Promise.all([
    perceiver.score(seen, rows, locations, temperature.perceiver).logProbs.toFloat32(),
    reasoner.score(read, rows, answers, temperature.reasoner).logProbs.toFloat32(),
  ])
  return cells.map((cell, i) => ({
    cell,
    // A location is two tokens.
    cellProbability: Math.exp((located[2 * i] as number) + (located[2 * i + 1] as number)),
    answer: answers[i] as number,
    answerProbability: Math.exp(answered[i] as number),
  }))
}

/** Every question about the first `count` canvases, answered greedily. */
export async function answerAll(
  system: System,
  canvases: Canvases,
  count = canvases.count,
  signal?: AbortSignal,
): Promise<Answered[]> {
  const CHUNK = 96
  const { device, reasoner } = system
  const answered: Answered[] = []
  for (let first = 0; first < QUESTIONS * count; first += CHUNK) {
    signal?.throwIfAborted()
    const size = Math.min(CHUNK, QUESTIONS * count - first)
    const questions = Array.from({ length: size }, (_, i) => canvases.question(first + i))
    await scopeAsync(async () => {
      const colours = questions.map(({ colour }) => colour)
      const evidenceAt = (cells: number[]): Evidence =>
        evidenceOf(device, canvases, questions, cells)
      const overviews = overviewsOf(device, canvases, questions)
      const predictions = await predict(system, overviews, colours, evidenceAt)
      const truth = reasoner.read(evidenceAt(questions.map(({ cell }) => cell)), colours)
      const answersOnTruth = await reasoner.act(truth, repeated(size, 1), 0, new Rng(0))
      for (const [i, prediction] of predictions.entries()) {
        answered.push({
          ...prediction,
          question: questions[i] as Question,
          answerOnTruth: answersOnTruth[i] as number,
        })
      }
    })
  }
  return answered
}

export function scoresOf(answered: readonly Answered[]): Scores {
  const share = (right: (a: Answered) => boolean): number =>
    mean(answered.map((a) => Number(right(a))))
  return {
    accuracy: share(({ question, answer }) => answer === question.label),
    hit: share(({ question, cell }) => cell === question.cell),
    reasoner: share(({ question, answerOnTruth }) => answerOnTruth === question.label),
  }
}

/** Mean probability that each policy gives its own choice. */
export interface Confidence {
  /** The Perceiver's; as high as the hit rate where it is calibrated. */
  box: number
  /** The Reasoner's; as high as the accuracy where it is calibrated. */
  answer: number
}

export function confidenceOf(answered: readonly Answered[]): Confidence {
  return {
    box: mean(answered.map(({ cellProbability }) => cellProbability)),
    answer: mean(answered.map(({ answerProbability }) => answerProbability)),
  }
}
