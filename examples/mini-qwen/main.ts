/**
 * A tiny Qwen3-VL from random weights, one weight set in both roles: a warm start, then joint PRA-GRPO.
 * `node dist/examples/mini-qwen/main.js`, or with `--help`.
 */
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { SingleBar } from 'cli-progress'
import { Command, CommanderError, InvalidArgumentError, Option } from 'commander'
import { openDevice, Qwen3VL, saveTensors } from 'p2r-kernels'
import { loadDigits, sliceDigits } from '../mini-p2r/digits.js'
import { imagesOf } from '../mini-p2r/pictures.js'
import { type CurvePoint, questionText } from '../mini-p2r/report.js'
import { Canvases, LATTICE } from '../mini-p2r/scene.js'
import { answerAll, isHit, type Said, scoresOf } from './evaluate.js'
import { loadModel, writeModel } from './model.js'
import { type Card, page, type Run } from './page.js'
import { Sampler } from './sampler.js'
import { SETTINGS, Trainer } from './train.js'

interface Options {
  seed: number
  updates: number
  warmSteps: number
  split: Run['split']
  out: string
  device?: string
}

/** The same canvases whatever --seed is; validation and test are those of mini-p2r. */
const CANVASES = {
  train: { seed: 1, count: 6000 },
  test: { seed: 2, count: 256 },
  validation: { seed: 3, count: 256 },
  /** Of the Reasoner's warm start: crops alone are drawn, which are cheap. */
  crops: { seed: 4, count: 12_000 },
} as const
/** MNIST's last training digits are kept for validation. */
const VALIDATION_DIGITS = 5000
/** The learning curve: canvases of a point, updates between points. */
const CURVE = { canvases: 64, every: 30 } as const
const EXAMPLES = 8

const integer = (text: string): number => {
  const value = Number(text)
  if (/^\d+$/.test(text) && value <= 0xffffffff) return value
  throw new InvalidArgumentError('It should be an integer of at least 0.')
}

const program = new Command('mini-qwen')
  .description(
    'Trains a tiny Qwen3-VL, which is Perceiver and Reasoner at once, to read one digit in a megapixel.',
  )
  .option('--seed <n>', 'of initial weights, order and draws', integer, 0)
  .option('--device <id>', "'cpu', 'cuda', 'cuda:1' (default: $P2R_DEVICE, else CUDA, else CPU)")
  .option('--warm-steps <n>', 'of the warm start', integer, SETTINGS.warmStart.steps)
  .option('--updates <n>', 'of PRA-GRPO', integer, SETTINGS.policy.updates)
  .addOption(
    new Option('--split <name>', 'the questions of scores and examples')
      .choices(['test', 'validation'])
      .default('test'),
  )
  .option('--out <folder>', 'for the page, the model and figures', join('out', 'mini-qwen'))
  .exitOverride()

async function main(options: Options): Promise<void> {
  const { seed, split, out } = options
  const started = performance.now()
  const since = (from: number): number => (performance.now() - from) / 1000
  using device = openDevice(options.device)
  console.log(`Device: ${device.info.id} (${device.info.name})`)
  const digits = loadDigits('train')
  const held = digits.count - VALIDATION_DIGITS
  const make = (name: keyof typeof CANVASES, of: typeof digits): Canvases =>
    new Canvases(of, CANVASES[name].seed, CANVASES[name].count)
  const learned = sliceDigits(digits, 0, held)
  const validation = make('validation', sliceDigits(digits, held, digits.count))
  const asked = split === 'test' ? make('test', loadDigits('test')) : validation

  const start = join(out, 'start')
  await writeModel(start, device, seed)
  using model = await loadModel(start, device)
  using trainer = new Trainer(model, make('train', learned), make('crops', learned), seed)
  const score = async (canvases: Canvases, count = canvases.count) =>
    scoresOf(await answerAll(model, trainer.sampler, canvases, count))

  const warm = performance.now()
  const warmSettings = { ...SETTINGS.warmStart, steps: options.warmSteps }
  await follow('warm start', trainer.warmStart(warmSettings), warmSettings.steps)
  const seconds = { warmStart: since(warm), policy: 0, all: 0, cpu: 0 }
  const warmStart = await score(asked)

  const curve: CurvePoint[] = [{ update: 0, ...(await score(validation, CURVE.canvases)) }]
  const policySettings = { ...SETTINGS.policy, updates: options.updates }
  await follow(
    'PRA-GRPO',
    trainer.policy(policySettings),
    policySettings.updates,
    async (update) => {
      if (update % CURVE.every === 0 || update === policySettings.updates) {
        const from = performance.now()
        curve.push({ update, ...(await score(validation, CURVE.canvases)) })
        seconds.policy -= since(from)
      }
      return `accuracy ${curve.at(-1)!.accuracy.toFixed(3)}`
    },
  ).then((all) => {
    seconds.policy += all
  })

  // The checkpoint is loaded again, so that the saved weights are those evaluated.
  const trained = join(out, 'model')
  await writeModel(trained, device, seed)
  await saveTensors(join(trained, 'model.safetensors'), Object.fromEntries(model.parameters()))
  using saved = await Qwen3VL.load(trained, device)
  using sampler = new Sampler(saved, 2 ** 16)
  const said = await answerAll(saved, sampler, asked)

  const cards = cardsOf(said)
  seconds.all = since(started)
  const { user, system } = process.cpuUsage()
  seconds.cpu = (user + system) / 1e6
  const run: Run = {
    seed,
    device: `${device.info.id} (${device.info.name})`,
    split,
    questions: said.length,
    parameters: [...model.parameters().values()].reduce((sum, { size }) => sum + size, 0),
    seconds,
    warmStart,
    trained: scoresOf(said),
    curve,
    cards,
    settings: { ...SETTINGS, warmStart: warmSettings, policy: policySettings, canvases: CANVASES },
  }
  await mkdir(out, { recursive: true })
  await writeFile(join(out, 'metrics.json'), `${JSON.stringify(run, null, 2)}\n`)
  const images = await Promise.all(
    cards.map(({ canvas, cell }) =>
      imagesOf(device, asked, { canvas, cell } as Parameters<typeof imagesOf>[2]),
    ),
  )
  await writeFile(join(out, 'index.html'), await page(run, images))
  for (const [name, scores] of [
    ['warm start', run.warmStart],
    ['P2R', run.trained],
  ] as const)
    console.log(
      `${name.padEnd(12)} end to end ${scores.accuracy.toFixed(3)}  hit ${scores.hit.toFixed(3)}  ` +
        `Reasoner on the true crop ${scores.reasoner.toFixed(3)}`,
    )
  console.log(
    `${said.length} ${split} questions, seed ${seed}, ${seconds.all.toFixed(0)} s, ${seconds.cpu.toFixed(0)} s of the CPU: ${join(out, 'index.html')}`,
  )
}

/** One question a canvas, cycling through the colours; those whose box is a cell. */
function cardsOf(said: readonly Said[]): Card[] {
  return said
    .filter(({ question: { canvas, colour } }) => colour === canvas % 3)
    .filter(
      ({ cells }) => cells && cells.right === cells.left + 1 && cells.bottom === cells.top + 1,
    )
    .slice(0, EXAMPLES)
    .map(({ question, cells, box, answer }) => ({
      canvas: question.canvas,
      question: questionText(question.colour),
      cell: cells!.top * LATTICE + cells!.left,
      trueCell: question.cell,
      hit: isHit(cells, question.cell),
      truth: question.label,
      box,
      answer,
    }))
}

/** Runs steps under a progress bar with moving averages; elsewhere than on a terminal, ten lines. Returns seconds. */
async function follow(
  title: string,
  steps: AsyncIterable<object>,
  total: number,
  after: (step: number) => Promise<string> | string = () => '',
): Promise<number> {
  const bar = new SingleBar({
    format: `${title.padEnd(11)} {bar} {value}/{total} {shown}`,
    barsize: 24,
  })
  const started = performance.now()
  const averages: Record<string, number> = {}
  let step = 0
  bar.start(total, 0, { shown: '' })
  for await (const one of steps) {
    step++
    for (const [name, value] of Object.entries(one))
      averages[name] = 0.95 * (averages[name] ?? value) + 0.05 * value
    const named = Object.entries(averages).map(([name, value]) => `${name} ${value.toFixed(3)}`)
    const shown = [...named, await after(step)].join('  ')
    bar.update(step, { shown })
    // Bars are drawn on terminals only.
    if (!process.stderr.isTTY && (step % Math.ceil(total / 10) === 0 || step === total))
      console.log(
        `${title.padEnd(11)} ${step}/${total} ${((performance.now() - started) / 1000).toFixed(0)} s  ${shown}`,
      )
  }
  bar.stop()
  return (performance.now() - started) / 1000
}

try {
  await main(program.parse().opts<Options>())
} catch (error) {
  if (error instanceof CommanderError) process.exitCode = error.exitCode === 0 ? 0 : 2
  else {
    console.error(`mini-qwen: ${error instanceof Error ? error.message : error}`)
    process.exitCode = 1
  }
}
