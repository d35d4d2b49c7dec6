/**
 * A miniature Perceive-to-Reason system, trained from scratch and evaluated in about two minutes.
 * `npm run demo`, or `npm run demo -- --help`.
 */
import { existsSync } from 'node:fs'
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { SingleBar } from 'cli-progress'
import { Command, CommanderError, InvalidArgumentError, Option } from 'commander'
import { loadTensors, openDevice, saveTensors } from 'p2r-kernels'
import { type Digits, loadDigits, sliceDigits } from './digits.js'
import { answerAll, confidenceOf, type System, scoresOf } from './evaluate.js'
import { answerImage } from './image.js'
import { page } from './page.js'
import { exampleSvg, imagesOf, percent, saveCanvas } from './pictures.js'
import { Perceiver, Reasoner } from './policy.js'
import {
  type Example,
  exampleOf,
  type PhaseSummary,
  questionText,
  type Run,
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
    'policy updates in all; fewer than the default shorten the warm start in proportion, ' +
      'and 0 is a first look in seconds: a backbone whose Reasoner saw half of its warm start',
    integerFrom(0),
    SETTINGS.updates,
  )
  .addOption(
    new Option('--split <name>', 'the questions of scores and examples')
      .choices(['test', 'validation'])
      .default('test'),
  )
  .addOption(
    new Option(
      '--image <file>',
      'trains nothing: answers the questions about this image (JPEG, PNG, WebP, TIFF or AVIF) ' +
        'with the weights in --out',
    ).conflicts(['seed', 'steps', 'split']),
  )
  .option('--out <folder>', 'output folder for the page, weights and figures', join('out', 'demo'))
  .addHelpText(
    'after',
    `
Examples, from the package's folder; npm needs the -- before options:
  npm run demo                                       a full run, one to two minutes
  npm run demo -- --steps 0                          a first look: a backbone alone
  npm run demo -- --image out/demo/canvas.png        with the weights of the last run`,
  )
  .showHelpAfterError('(npm run demo -- --help lists the options; npm needs the -- before them.)')
  .configureOutput({ outputError: (text, write) => write(text.replace(/^error: /, 'mini-p2r: ')) })
  .exitOverride()

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
  const predictions = await answerImage(system, file, annotated)
  for (const [colour, prediction] of predictions.entries()) {
    const { cell, cellProbability, answer, answerProbability } = prediction
    const [row, column] = [Math.floor(cell / LATTICE), cell % LATTICE]
    console.log(
      `${questionText(colour)} ${answer} (${percent(answerProbability)} sure), ` +
        `seen in row ${row}, column ${column} (${percent(cellProbability)} sure)`,
    )
  }
  console.log(`The boxes are drawn in ${annotated}`)
  console.log(
    'The system knows digits of this kind alone: handwritten, one red, one green and one blue, on a ' +
      'dark grey canvas. On such canvases the probability of a box is close to the hit rate and that ' +
      'of an answer is too high; about any other image it answers too, and neither means anything.',
  )
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
    steps,
    stopped: false,
    seconds: 0,
    phases: [],
    curve: [],
    examples: [],
    settings: { ...SETTINGS, canvases: CANVASES },
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
    run[steps === 0 ? 'backbone' : 'trained'] = scoresOf(answered)
    run.confidence = confidenceOf(answered)
    // One question per canvas, cycling through the colours.
    const shown = Array.from(
      { length: EXAMPLES },
      (_, i) => answered[QUESTIONS * i + (i % QUESTIONS)],
    )
    run.examples = shown.filter((example) => example !== undefined).map(exampleOf)
  } catch (error) {
    if (!stop.signal.aborted) throw error
    run.stopped = true
    await saveSystem(system, weights, seed)
    process.exitCode = 130
  } finally {
    process.off('SIGINT', interrupt)
  }
  run.seconds = (performance.now() - started) / 1000
  await saveMetrics(run, join(out, 'metrics.json'))
  await savePage(system, asked, run, out)
  console.log(`\n${table(run)}\n`)
  if (steps === 0)
    console.log(
      'This is a backbone alone: a shortened warm start, and nothing trained by PRA-GRPO.',
    )
  if (run.stopped) console.log('Stopped: later results are missing.')
  console.log(`Results and examples: ${join(out, 'index.html')}`)
}

/** Writes the page, the README's picture and the first canvas, which --image can be tried on. */
async function savePage(
  { device }: System,
  canvases: Canvases,
  run: Run,
  out: string,
): Promise<void> {
  const images = await Promise.all(
    run.examples.map((example) => imagesOf(device, canvases, example)),
  )
  await writeFile(join(out, 'index.html'), await page(run, images))
  // The surest correct answer, where there is one: the picture explains the system.
  const sureness = ({ hit, answer, truth, cellProbability, answerProbability }: Example): number =>
    hit && answer === truth ? cellProbability * answerProbability : 0
  const all = run.examples.map(sureness)
  const at = all.indexOf(Math.max(...all))
  const [example, shown] = [run.examples[at], images[at]]
  if (example === undefined || shown === undefined) return
  await writeFile(join(out, 'example.svg'), exampleSvg(example, shown))
  await saveCanvas(device, canvases, example.canvas, join(out, 'canvas.png'))
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
  // The backbone alone is evaluated as a trained system is, from its saved weights.
  if (steps === 0) return
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
  if (error instanceof CommanderError) process.exitCode = error.exitCode === 0 ? 0 : 2
  else {
    console.error(`mini-p2r: ${error instanceof Error ? error.message : error}`)
    process.exitCode = 1
  }
}
