/**
 * A miniature Perceive-to-Reason system, trained from scratch and evaluated in about two minutes.
 * `npm run demo`, or `npm run demo -- --help`.
 */
import { existsSync } from 'node:fs'
import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { SingleBar } from 'cli-progress'
import { Command, InvalidArgumentError, Option } from 'commander'
import { loadTensors, openDevice, saveTensors } from 'p2r-kernels'
import { type Digits, loadDigits, sliceDigits } from './digits.js'
import { answerAll, type System, scoresOf } from './evaluate.js'
import { answerImage } from './image.js'
import { Perceiver, Reasoner } from './policy.js'
import {
  type PhaseSummary,
  questionText,
  type Run,
  saveCurve,
  saveExamples,
  saveMetrics,
  table,
} from './report.js'
import { Canvases, LATTICE, QUESTIONS } from './scene.js'
import { type Phase, SETTINGS, type Step, schedule, Trainer } from './train.js'
import { copyParams, type Tensors } from './vit.js'

interface Options {
  seed: number
  steps: number
  split: Run['split']
  out: string
  device?: string
  image?: string
}

/** The same canvases whatever --seed is: it varies initial weights, order and draws. */
const CANVASES = {
  train: { seed: 1, count: 3000 },
  test: { seed: 2, count: 256 },
  validation: { seed: 3, count: 256 },
} as const
/** MNIST's last training digits are kept for validation. */
const VALIDATION_DIGITS = 5000
/** The learning curve: canvases per point, approximate number of points, minimum updates between. */
const CURVE = { canvases: 64, points: 18, minUpdates: 10 } as const
const EXAMPLES = 8

const integerFrom =
  (least: number) =>
  (text: string): number => {
    const value = Number(text)
    if (/^\d+$/.test(text) && value >= least && value <= 0xffffffff) return value
    throw new InvalidArgumentError(`It should be an integer of at least ${least}.`)
  }

const program = new Command('mini-p2r')
  .description(
    'Trains a miniature Perceive-to-Reason system by PRA-GRPO to read one digit in a megapixel.',
  )
  .option('--seed <n>', 'of initial weights, order and draws', integerFrom(0), 0)
  .option('--device <id>', "'cpu', 'cuda', 'cuda:1' (default: $P2R_DEVICE, else CUDA, else CPU)")
  .option(
    '--steps <n>',
    'policy updates in all; fewer than the default shorten the warm start alike',
    integerFrom(1),
    SETTINGS.updates,
  )
  .option('--image <file>', 'answers questions about this PNG or JPEG with the weights in --out')
  .addOption(
    new Option('--split <name>', 'the questions of the table')
      .choices(['test', 'validation'])
      .default('test'),
  )
  .option('--out <folder>', 'output folder for weights, pictures and figures', join('out', 'demo'))

async function main(options: Options): Promise<void> {
  using device = openDevice(options.device)
  const system = newSystem(device, options.seed)
  const weights = join(options.out, 'weights.safetensors')
  console.log(`Device: ${device.info.id} (${device.info.name})`)
  if (options.image === undefined) await trainAndReport(system, options, weights)
  else await answerFile(system, options.image, options.out, weights)
}

function newSystem(device: System['device'], seed: number): System {
  return { device, perceiver: new Perceiver(device, seed), reasoner: new Reasoner(device, seed) }
}

async function answerFile(
  system: System,
  file: string,
  out: string,
  weights: string,
): Promise<void> {
  if (!existsSync(weights)) {
    throw new Error(`There are no trained weights in ${out}: run the demo once without --image`)
  }
  await loadSystem(system, weights)
  const annotated = join(out, 'annotated.png')
  for (const { colour, cell, answer } of await answerImage(system, file, annotated)) {
    const [row, column] = [Math.floor(cell / LATTICE), cell % LATTICE]
    console.log(`${questionText(colour)} ${answer}, seen in row ${row}, column ${column}`)
  }
  console.log(`The boxes are drawn in ${annotated}`)
}

async function trainAndReport(system: System, options: Options, weights: string): Promise<void> {
  const { seed, steps, split, out } = options
  const started = performance.now()
  await mkdir(out, { recursive: true })
  const digits = loadDigits('train')
  const held = digits.count - VALIDATION_DIGITS
  const train = makeCanvases('train', sliceDigits(digits, 0, held))
  const validation = makeCanvases('validation', sliceDigits(digits, held, digits.count))
  const asked = split === 'test' ? makeCanvases('test', loadDigits('test')) : validation
  const run: Run = {
    seed,
    device: system.device.info,
    split,
    questions: QUESTIONS * asked.count,
    stopped: false,
    seconds: 0,
    phases: [],
    curve: [],
    examples: [],
    settings: { ...SETTINGS, steps, canvases: CANVASES },
  }

  const stop = new AbortController()
  const interrupt = (): void => {
    // A second Ctrl-C exits at once, without waiting for the current update.
    if (stop.signal.aborted) process.exit(130)
    stop.abort()
  }
  process.on('SIGINT', interrupt)
  try {
    await trainSystem(system, { train, validation, asked }, run, steps, stop.signal)
    await saveSystem(system, weights, seed)
    // Loaded again, so that the saved weights are those evaluated.
    await loadSystem(system, weights)
    const answered = await answerAll(system, asked, asked.count, stop.signal)
    run.trained = scoresOf(answered)
    // One question per canvas, cycling through the colours.
    const shown = Array.from(
      { length: EXAMPLES },
      (_, i) => answered[QUESTIONS * i + (i % QUESTIONS)],
    )
    const present = shown.filter((example) => example !== undefined)
    run.examples = await saveExamples(system, asked, present, out)
  } catch (error) {
    if (!stop.signal.aborted) throw error
    run.stopped = true
    await saveSystem(system, weights, seed)
    process.exitCode = 130
  } finally {
    process.off('SIGINT', interrupt)
  }
  run.seconds = (performance.now() - started) / 1000
  await saveCurve(run, join(out, 'learning-curve.svg'))
  await saveMetrics(run, join(out, 'metrics.json'))
  console.log(`\n${table(run)}\n`)
  console.log(
    `${run.stopped ? 'Stopped; the results so far are' : 'Weights, pictures and figures'} in ${out}`,
  )
}

function makeCanvases(split: keyof typeof CANVASES, digits: Digits): Canvases {
  const { seed, count } = CANVASES[split]
  return new Canvases(digits, seed, count)
}

/** Runs every phase, filling in the run's backbone, phases and curve. */
async function trainSystem(
  system: System,
  canvases: { train: Canvases; validation: Canvases; asked: Canvases },
  run: Run,
  steps: number,
  signal: AbortSignal,
): Promise<void> {
  const trainer = new Trainer(system, canvases.train, run.seed)
  const { warmStart, policy } = schedule(steps)
  for (const phase of warmStart) {
    await followPhase(trainer, phase, run.phases, signal, () => undefined)
  }
  run.backbone = scoresOf(await answerAll(system, canvases.asked, canvases.asked.count, signal))

  let update = 0
  const mark = async (): Promise<number> => {
    const { validation } = canvases
    const scores = scoresOf(await answerAll(system, validation, CURVE.canvases, signal))
    run.curve.push({ update, ...scores })
    return scores.accuracy
  }
  let accuracy = await mark()
  const every = Math.max(CURVE.minUpdates, Math.round(steps / CURVE.points))
  for (const phase of policy) {
    await followPhase(trainer, phase, run.phases, signal, async () => {
      update++
      if (update % every === 0 || update === steps) accuracy = await mark()
      return accuracy
    })
  }
}

/**
 * Runs one phase under a progress bar and adds it to `done`, an interrupted one by the updates that
 * it made. `afterStep` gives the latest accuracy on validation questions, if there is any yet.
 */
async function followPhase(
  trainer: Trainer,
  phase: Phase,
  done: PhaseSummary[],
  signal: AbortSignal,
  afterStep: () => Promise<number> | undefined,
): Promise<void> {
  const round = phase.round > 0 ? ` ${phase.round}/${SETTINGS.rounds}` : ''
  const title = `${phase.kind}${round}, ${phase.role}`
  const format = `${title.padEnd(24)} {bar} {value}/{total} {shown}`
  // The bar's own handler of Ctrl-C would run before ours.
  const bar = new SingleBar({ format, barsize: 24, hideCursor: true, gracefulExit: false })
  const started = performance.now()
  const averages = new Averages()
  let updates = 0
  let shown = ''
  bar.start(phase.updates, 0, { shown })
  try {
    for await (const step of trainer.run(phase)) {
      updates = step.step
      averages.add(step)
      shown = describe(averages, await afterStep())
      bar.update(updates, { shown })
      signal.throwIfAborted()
    }
  } finally {
    bar.stop()
    const seconds = (performance.now() - started) / 1000
    done.push({ ...phase, updates, seconds, ...averages.values })
    // Bars are drawn on terminals only; elsewhere a line reports the end of the phase.
    if (!process.stderr.isTTY) console.log(`${title.padEnd(24)} ${updates} updates ${shown}`)
  }
}

/** Exponential moving averages with a time constant of about twenty steps. */
class Averages {
  readonly values: Pick<Step, 'reward' | 'hit' | 'loss'> = {}

  add(step: Step): void {
    const DECAY = 0.95
    for (const key of ['reward', 'hit', 'loss'] as const) {
      const value = step[key]
      if (value === undefined) continue
      const before = this.values[key] ?? value
      this.values[key] = DECAY * before + (1 - DECAY) * value
    }
  }
}

function describe({ values }: Averages, accuracy: number | undefined): string {
  const parts = { ...values, accuracy }
  return Object.entries(parts)
    .filter(([, value]) => value !== undefined)
    .map(([name, value]) => `${name} ${(value as number).toFixed(3)}`)
    .join('  ')
}

function paramsOf({ perceiver, reasoner }: System): Tensors {
  const named = (prefix: string, params: Tensors): [string, Tensors[string]][] =>
    Object.entries(params).map(([name, tensor]) => [`${prefix}.${name}`, tensor])
  return Object.fromEntries([
    ...named('perceiver', perceiver.params),
    ...named('reasoner', reasoner.params),
  ])
}

async function saveSystem(system: System, path: string, seed: number): Promise<void> {
  await saveTensors(path, paramsOf(system), { model: 'mini-p2r', seed: String(seed) })
}

async function loadSystem(system: System, path: string): Promise<void> {
  const loaded = await loadTensors(path, system.device)
  copyParams(paramsOf(system), loaded)
  for (const tensor of Object.values(loaded)) tensor.dispose()
}

try {
  await main(program.parse().opts<Options>())
} catch (error) {
  console.error(`mini-p2r: ${error instanceof Error ? error.message : error}`)
  process.exitCode = 1
}
