/** A run's report: a table on the terminal; pictures, a plot and figures in a folder. */
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { cropResample, type DeviceInfo, drawBoxes, saveImage, scopeAsync } from 'p2r-kernels'
import { parse, View } from 'vega'
import { compile, type TopLevelSpec } from 'vega-lite'
import type { Answered, Scores, System } from './evaluate.js'
import { CANVAS, type Canvases, CELL, COLOURS, LATTICE } from './scene.js'
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
  /** Whether it was interrupted, so that later results are missing. */
  stopped: boolean
  seconds: number
  backbone?: Scores
  trained?: Scores
  phases: PhaseSummary[]
  /** Scores on validation questions. */
  curve: CurvePoint[]
  examples: Example[]
  settings: unknown
}

export interface Example {
  annotated: string
  crop: string
  question: string
  answer: number
  truth: number
  /** Whether the box contains the digit in question. */
  hit: boolean
}

export function questionText(colour: number): string {
  return `Which digit is ${COLOURS[colour]}?`
}

export function table({ seed, device, split, questions, backbone, trained, seconds }: Run): string {
  const rows: [string, keyof Scores][] = [
    ['End-to-end accuracy', 'accuracy'],
    ['Hit rate (box holds the digit)', 'hit'],
    ['Reasoner on the true crop', 'reasoner'],
  ]
  const cell = (score?: number): string => (score?.toFixed(3) ?? '-').padStart(10)
  const lines = rows.map(
    ([title, key]) => `${title.padEnd(32)}${cell(backbone?.[key])}${cell(trained?.[key])}`,
  )
  const head = `${''.padEnd(32)}${'backbone'.padStart(10)}${'P2R'.padStart(10)}`
  const rule = '-'.repeat(head.length)
  const foot = `${questions} ${split} questions, seed ${seed}, ${device.id} (${device.name}), ${seconds.toFixed(0)} s`
  return [head, rule, ...lines, rule, foot].join('\n')
}

/** Draws the answers on their canvases and saves each with the crop that the Reasoner saw. */
export async function saveExamples(
  { device }: System,
  canvases: Canvases,
  answered: readonly Answered[],
  folder: string,
): Promise<Example[]> {
  const examples: Example[] = []
  for (const [i, { question, cell, answer }] of answered.entries()) {
    const stem = `example-${i + 1}-${COLOURS[question.colour]}`
    const [annotated, crop] = [`${stem}.png`, `${stem}-crop.png`]
    await scopeAsync(async () => {
      const pixels = canvases.canvas(question.canvas)
      const image = device.tensor(pixels, [CANVAS, CANVAS, 3], 'u8')
      await saveAnnotated(image, [cell], join(folder, annotated))
      const [x, y] = [(cell % LATTICE) * CELL, Math.floor(cell / LATTICE) * CELL]
      // Nearest neighbour, which is what 'box' does when it enlarges.
      const ENLARGED = 8 * CELL
      const box = [x, y, x + CELL, y + CELL] as const
      const regions = [{ box, height: ENLARGED, width: ENLARGED }]
      const [enlarged] = cropResample({ image, regions, filter: 'box' })
      if (enlarged) await saveImage(enlarged, join(folder, crop))
    })
    const [text, truth] = [questionText(question.colour), question.label]
    examples.push({ annotated, crop, question: text, answer, truth, hit: cell === question.cell })
  }
  return examples
}

/** Outlines cells just outside their edges, so that no pixel of a digit is covered. */
export async function saveAnnotated(
  image: Parameters<typeof drawBoxes>[0]['image'],
  cells: readonly number[],
  path: string,
): Promise<void> {
  const [height, width] = image.shape as [number, number, number]
  const LINE = Math.max(3, Math.floor(0.003 * width))
  const boxes = cells.map((cell) => {
    const [x0, y0, x1, y1] = cellBox(cell, height, width)
    return [x0 - LINE, y0 - LINE, x1 - 1 + LINE, y1 - 1 + LINE] as const
  })
  const yellow = [255, 255, 0] as const
  await saveImage(drawBoxes({ image, boxes, colors: [yellow], width: LINE }), path)
}

/** A cell's box in an image of any size, half open. */
export function cellBox(
  cell: number,
  height: number,
  width: number,
): readonly [number, number, number, number] {
  const [column, row] = [cell % LATTICE, Math.floor(cell / LATTICE)]
  const at = (i: number, size: number): number => Math.floor((i * size) / LATTICE)
  return [at(column, width), at(row, height), at(column + 1, width), at(row + 1, height)]
}

export async function saveCurve({ curve, phases, seed }: Run, path: string): Promise<void> {
  const spec = curveSpec(curve, phases, seed)
  const view = new View(parse(compile(spec).spec), { renderer: 'none' })
  await writeFile(path, await view.toSVG())
  view.finalize()
}

export async function saveMetrics(run: Run, path: string): Promise<void> {
  await writeFile(path, `${JSON.stringify(run, null, 2)}\n`)
}

/** The three scores against policy updates; the background shows the phases. */
function curveSpec(
  curve: readonly CurvePoint[],
  phases: readonly PhaseSummary[],
  seed: number,
): TopLevelSpec {
  const series: [string, keyof Scores][] = [
    ['end to end', 'accuracy'],
    ['hit rate', 'hit'],
    ['reasoner on the true crop', 'reasoner'],
  ]
  const points = curve.flatMap((point) =>
    series.map(([name, key]) => ({ update: point.update, score: name, value: point[key] })),
  )
  let end = 0
  const bands = phases
    .filter(({ kind }) => kind === 'PRA-GRPO')
    .map(({ role, updates }) => {
      const start = end
      end += updates
      return { start, end, phase: `${role} trains` }
    })
  const names = series.map(([name]) => name)
  return {
    $schema: 'https://vega.github.io/schema/vega-lite/v6.json',
    title: `Miniature Perceive-to-Reason, PRA-GRPO, seed ${seed}`,
    width: 640,
    height: 360,
    background: 'white',
    layer: [
      {
        data: { values: bands },
        mark: { type: 'rect', opacity: 0.5 },
        encoding: {
          x: { field: 'start', type: 'quantitative' },
          x2: { field: 'end' },
          color: {
            field: 'phase',
            type: 'nominal',
            scale: {
              domain: ['perceiver trains', 'reasoner trains'],
              range: ['#e3ecf7', '#fbeee0'],
            },
            legend: { title: 'phase' },
          },
        },
      },
      {
        data: { values: points },
        mark: { type: 'line', point: true, strokeWidth: 2 },
        encoding: {
          x: { field: 'update', type: 'quantitative', title: 'policy updates' },
          y: {
            field: 'value',
            type: 'quantitative',
            title: 'share of validation questions',
            scale: { domain: [0, 1] },
          },
          color: {
            field: 'score',
            type: 'nominal',
            scale: { domain: names, range: ['#1b1b1b', '#1f77b4', '#e07b00'] },
            legend: { title: 'score', labelLimit: 300 },
          },
        },
      },
    ],
    resolve: { scale: { color: 'independent' } },
  }
}
