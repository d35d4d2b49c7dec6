/** Greedy answers of the whole system: the box in the Perceiver's text, its crop, the answer in the Reasoner's text. */
import { extractAnswer, type Qwen3VL, scopeAsync } from 'p2r-kernels'
import type { Scores } from '../mini-p2r/evaluate.js'
import { Rng } from '../mini-p2r/rng.js'
import { type Canvases, LATTICE, QUESTIONS, type Question } from '../mini-p2r/scene.js'
import { boxIn, type Cells, cellsOf, look } from './batch.js'
import type { Ask, Sampler } from './sampler.js'
import { textOf } from './vocabulary.js'

/** A question with what was said. */
export interface Said {
  question: Question
  /** The Perceiver's text, and its box; undefined where there is none. */
  box: string
  cells: Cells | undefined
  /** The Reasoner's answer to the box's crop, '' without a box; and to the needle's own cell. */
  answer: string
  answerOnTruth: string
}

export const isHit = (cells: Cells | undefined, cell: number): boolean =>
  cells !== undefined &&
  cells.left === cell % LATTICE &&
  cells.top === Math.floor(cell / LATTICE) &&
  cells.right === cells.left + 1 &&
  cells.bottom === cells.top + 1

/** The answer in a Reasoner's text. */
export const answerIn = (tokens: readonly number[]): string => extractAnswer(textOf(tokens))

export async function answerAll(
  model: Qwen3VL,
  sampler: Sampler,
  canvases: Canvases,
  count = canvases.count,
): Promise<Said[]> {
  const CHUNK = 64
  const all: Said[] = []
  const rng = new Rng(0)
  for (let from = 0; from < count; from += CHUNK) {
    const own = Array.from({ length: Math.min(CHUNK, count - from) }, (_, i) => from + i)
    await scopeAsync(async () => {
      const questions = own.flatMap((canvas) =>
        Array.from({ length: QUESTIONS }, (_, colour) =>
          canvases.question(QUESTIONS * canvas + colour),
        ),
      )
      const asks = questions.map(
        ({ canvas, colour }): Ask => ({ image: canvas - from, colour, temperatures: [0] }),
      )
      const overviews = look(
        model.device,
        canvases,
        own.map((canvas) => ({ canvas })),
      )
      const located = await sampler.rollouts('perceiver', overviews, asks, rng)
      const boxes = located.map(([tokens]) => boxIn(tokens!))
      const views = questions.flatMap(({ canvas, cell }, i) => [
        { canvas, cells: cellsOf(cell) },
        { canvas, cells: boxes[i] ?? cellsOf(cell) },
      ])
      const read = await sampler.rollouts(
        'reasoner',
        look(model.device, canvases, views),
        views.map((_, i) => ({ image: i, colour: questions[i >> 1]!.colour, temperatures: [0] })),
        rng,
      )
      for (const [i, question] of questions.entries())
        all.push({
          question,
          box: textOf(located[i]![0]!),
          cells: boxes[i],
          answer: boxes[i] ? answerIn(read[2 * i + 1]![0]!) : '',
          answerOnTruth: answerIn(read[2 * i]![0]!),
        })
    })
  }
  return all
}

export function scoresOf(said: readonly Said[]): Scores {
  const share = (right: (one: Said) => boolean): number => said.filter(right).length / said.length
  return {
    accuracy: share(({ question, answer }) => answer === String(question.label)),
    hit: share(({ question, cells }) => isHit(cells, question.cell)),
    reasoner: share(({ question, answerOnTruth }) => answerOnTruth === String(question.label)),
  }
}
