import { type Device, scopeAsync } from 'p2r-kernels'
import { evidenceOf, mean, overviewsOf, repeated } from './batch.js'
import { cellOf, type Perceiver, type Reasoner } from './policy.js'
import { Rng } from './rng.js'
import { type Canvases, QUESTIONS, type Question } from './scene.js'

export interface System {
  device: Device
  perceiver: Perceiver
  reasoner: Reasoner
}

export interface Answered {
  question: Question
  /** The Perceiver's cell, and the Reasoner's answer to it. */
  cell: number
  answer: number
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

/** Every question about the first `count` canvases, answered greedily. */
export async function answerAll(
  { device, perceiver, reasoner }: System,
  canvases: Canvases,
  count = canvases.count,
  signal?: AbortSignal,
): Promise<Answered[]> {
  const CHUNK = 96
  // Greedy sampling takes a seed, but does not use it.
  const seeds = new Rng(0)
  const answered: Answered[] = []
  for (let first = 0; first < QUESTIONS * count; first += CHUNK) {
    signal?.throwIfAborted()
    const size = Math.min(CHUNK, QUESTIONS * count - first)
    const questions = Array.from({ length: size }, (_, i) => canvases.question(first + i))
    await scopeAsync(async () => {
      const colours = questions.map(({ colour }) => colour)
      const rows = repeated(size, 1)
      const seen = perceiver.see(overviewsOf(device, canvases, questions), colours)
      const locations = await perceiver.act(seen, rows, 0, seeds)
      const cells = Array.from(rows, (i) => cellOf(locations, i))
      const truth = questions.map(({ cell }) => cell)
      const read = (where: number[]): Promise<Int32Array> => {
        const evidence = evidenceOf(device, canvases, questions, where)
        return reasoner.act(reasoner.read(evidence, colours), rows, 0, seeds)
      }
      const [answers, answersOnTruth] = await Promise.all([read(cells), read(truth)])
      for (const [i, question] of questions.entries()) {
        answered.push({
          question,
          cell: cells[i] as number,
          answer: answers[i] as number,
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
