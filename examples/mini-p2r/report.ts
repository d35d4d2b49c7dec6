/** What a run leaves: a table on the terminal, and the data of metrics.json and of the page. */
import { writeFile } from 'node:fs/promises'
import type { DeviceInfo } from 'p2r-kernels'
import type { Answered, Confidence, Prediction, Scores } from './evaluate.js'
import { COLOURS } from './scene.js'
import type { Phase } from './train.js'

export interface CurvePoint extends Scores {
  /** Policy updates so far. */
  update: number
}

export interface PhaseSummary extends Phase {
  seconds: number
  /** Means over the phase's last updates, as the progress bar shows them. */
  reward?: number
  hit?: number
  loss?: number
}

export interface Run {
  seed: number
  device: DeviceInfo
  split: 'test' | 'validation'
  questions: number
  /** Policy updates to make; with 0 the run is of the backbone alone, and `trained` is absent. */
  steps: number
  /** Whether it was interrupted, so that later results are missing. */
  stopped: boolean
  seconds: number
  backbone?: Scores
  trained?: Scores
  /** Of the system that is evaluated last. */
  confidence?: Confidence
  phases: PhaseSummary[]
  /** Scores on validation questions. */
  curve: CurvePoint[]
  examples: Example[]
  settings: unknown
}

export interface Example extends Prediction {
  canvas: number
  question: string
  truth: number
  /** The digit's own cell. */
  trueCell: number
  /** Whether the box contains the digit in question. */
  hit: boolean
}

/** The scores in the order and by the names that every report uses. */
export const SCORES: readonly (readonly [name: string, key: keyof Scores])[] = [
  ['End-to-end accuracy', 'accuracy'],
  ['Hit rate (box holds the digit)', 'hit'],
  ['Reasoner on the true crop', 'reasoner'],
]

/** The systems whose scores a run reports; those of an interrupted run may be missing. */
export function systemsOf({ steps, backbone, trained }: Run): [string, Scores | undefined][] {
  return steps === 0
    ? [['backbone', backbone]]
    : [
        ['backbone', backbone],
        ['P2R', trained],
      ]
}

export function questionText(colour: number): string {
  return `Which digit is ${COLOURS[colour]}?`
}

export function exampleOf({ question, ...prediction }: Answered): Example {
  return {
    canvas: question.canvas,
    question: questionText(question.colour),
    cell: prediction.cell,
    cellProbability: prediction.cellProbability,
    answer: prediction.answer,
    answerProbability: prediction.answerProbability,
    truth: question.label,
    trueCell: question.cell,
    hit: prediction.cell === question.cell,
  }
}

export function table(run: Run): string {
  const { seed, device, split, questions, seconds } = run
  const systems = systemsOf(run)
  const cell = (text: string): string => text.padStart(10)
  const row = (title: string, cells: string[]): string =>
    `${title.padEnd(32)}${cells.map(cell).join('')}`
  const head = row(
    '',
    systems.map(([name]) => name),
  )
  const lines = SCORES.map(([title, key]) =>
    row(
      title,
      systems.map(([, scores]) => scores?.[key].toFixed(3) ?? '-'),
    ),
  )
  const rule = '-'.repeat(head.length)
  const foot = `${questions} ${split} questions, seed ${seed}, ${device.id} (${device.name}), ${seconds.toFixed(0)} s`
  return [head, rule, ...lines, rule, foot].join('\n')
}

export async function saveMetrics(run: Run, path: string): Promise<void> {
  await writeFile(path, `${JSON.stringify(run, null, 2)}\n`)
}
