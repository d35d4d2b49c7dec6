import { existsSync } from 'node:fs'
import { appendFile, mkdir, rm } from 'node:fs/promises'
import { basename, join, resolve } from 'node:path'
import { SingleBar } from 'cli-progress'
import { type Device, openDevice } from '../device.js'
import { readText, replaceFile } from '../files.js'
import { encodeImage, loadImage } from '../image.js'
import { cropResample } from '../ops/crop_resample.js'
import { evaluate } from '../p2r/evaluate.js'
import { LocalPolicy } from '../p2r/local.js'
import { Perceiver } from '../p2r/perceiver.js'
import type { AnswerForm } from '../p2r/prompts.js'
import { Reasoner } from '../p2r/reasoner.js'
import type { RolloutBatch, Sample } from '../p2r/rollouts.js'
import type { Tensor } from '../tensor.js'
import {
  LocalTrainer,
  type LocalTrainerOptions,
  type TrainMetrics,
} from '../train/local_trainer.js'
import { randomFrom } from '../train/random.js'
import { imageIn } from './benchmarks.js'
import { type Row, readRows } from './questions.js'
import { type MetricsLine, runPage, type ShownRollout, type Validation } from './run_page.js'
import { UsageError } from './usage.js'

/** Questions of a step whose rollouts the page shows. */
const mostShown = 6
/** The longer side of their images, in pixels. */
const thumbnailSide = 480
const faults = {
  overlap: 'Boxes overlap too much.',
  label: 'A box has no label of its own.',
} as const

export interface TrainCommandOptions {
  model: string
  out: string
  steps: number
  batch: number
  group: number
  stages: 'two-stage' | 'alternating' | 'joint'
  lr: number
  warmup: number
  decay: 'constant' | 'cosine'
  lora?: number
  freezeTower?: boolean
  checkpoint?: boolean
  microTokens: number
  maxTokens: number
  maxPixels: number
  minPixels: number
  saveEvery: number
  validate?: string
  validateEvery: number
  seed: number
  form: AnswerForm
  device?: string
}

/** Trains a checkpoint on a file of questions; returns the exit code. */
export async function trainCommand(data: string, options: TrainCommandOptions): Promise<number> {
  const rows = await rowsOf(data, options)
  const validation = options.validate === undefined ? [] : await rowsOf(options.validate, options)
  const { out, steps, batch, seed } = options
  await mkdir(out, { recursive: true })
  const [state, metrics] = [join(out, 'state.safetensors'), join(out, 'metrics.jsonl')]
  using device = openDevice(options.device)
  using trainer = await LocalTrainer.load(options.model, device, {
    ...trainerOptions(options),
    ...(existsSync(state) && { resume: state }),
  })
  if (trainer.steps) console.error(`Goes on after ${trainer.steps} steps of ${state}.`)
  // Steps after the last saved state are made again.
  await keepSteps(metrics, trainer.steps)
  const lines = await linesOf(metrics)
  const page = join(out, 'index.html')
  let rollouts: ShownRollout[] = []
  const save = async (): Promise<void> => {
    await trainer.saveState(state)
    // Without a step of this run the page that is there is that of the same lines, with rollouts.
    if (!rollouts.length && existsSync(page)) return
    const title = basename(resolve(options.model))
    await replaceFile(page, [Buffer.from(runPage({ title, steps, lines, rollouts }))])
  }

  const stop = new AbortController()
  const interrupt = (): void => {
    // A second Ctrl-C exits at once.
    if (stop.signal.aborted) process.exit(130)
    stop.abort()
  }
  process.on('SIGINT', interrupt)
  const format = '{bar} {value}/{total} steps  {role} reward {reward}  {eta_formatted} left'
  const bar = new SingleBar({ format, barsize: 24, hideCursor: true })
  bar.start(steps, trainer.steps, { role: trainer.role, reward: '-' })
  const due = (): boolean =>
    validation.length > 0 &&
    (trainer.steps % options.validateEvery === 0 || trainer.steps === steps)
  const validateNow = async (line: MetricsLine): Promise<void> => {
    const judged = await validate(trainer, validation, options, stop.signal)
    if (judged) line.validation = judged
  }
  try {
    // A Ctrl-C may have come during the last step's validation.
    const last = lines.at(-1)
    if (last && !last.validation && due()) {
      await validateNow(last)
      const text = lines.map((line) => `${JSON.stringify(line)}\n`).join('')
      await replaceFile(metrics, [Buffer.from(text)])
    }
    while (trainer.steps < steps && !stop.signal.aborted) {
      const own = rowsOfStep(rows, trainer.steps, batch, seed)
      const images = await Promise.all(own.map((row) => imageOf(row, device)))
      try {
        const samples = own.map(
          ({ question, truth, form }, i): Sample => ({
            image: images[i]!,
            question,
            truth,
            answerForm: form,
          }),
        )
        const shownNow: ShownRollout[] = []
        const made: MetricsLine = await trainer.step(samples, {
          signal: stop.signal,
          onBatch: async (batch) => {
            shownNow.push(...(await rolloutsOf(batch, own, images)))
          },
        })
        rollouts = shownNow
        if (due()) await validateNow(made)
        lines.push(made)
        await appendFile(metrics, `${JSON.stringify(made)}\n`)
        bar.update(trainer.steps, shown(made))
      } finally {
        for (const image of images) image.dispose()
      }
      if (trainer.steps % options.saveEvery === 0) await save()
    }
  } catch (error) {
    if (!stop.signal.aborted) throw error
  } finally {
    bar.stop()
    process.off('SIGINT', interrupt)
  }
  await save()
  if (stop.signal.aborted) {
    console.error(
      `Stopped after ${trainer.steps} of ${steps} steps; run the same command to resume.`,
    )
    return 130
  }
  const folder = join(out, 'model')
  await trainer.save(folder)
  console.log(folder)
  return 0
}

async function rowsOf(data: string, { form }: TrainCommandOptions): Promise<Row[]> {
  const rows: Row[] = []
  for await (const row of readRows(data, form)) rows.push(row)
  if (!rows.length) throw new UsageError(`${data} holds no questions`)
  const free = rows.find(({ form }) => form === 'free_form')
  if (free) throw new UsageError(`${data}:${free.line} is of free form, which train cannot judge`)
  return rows
}

async function imageOf({ image }: Row, device: Device): Promise<Tensor<'u8'>> {
  const source = typeof image === 'string' || image instanceof Uint8Array
  return loadImage(source ? image : await imageIn(image), device)
}

/** Both roles' answers by the current weights, greedy; undefined where it was told to stop. */
async function validate(
  { model }: LocalTrainer,
  rows: readonly Row[],
  { maxTokens, maxPixels, minPixels }: TrainCommandOptions,
  signal: AbortSignal,
): Promise<Validation | undefined> {
  const policy = new LocalPolicy(model)
  let [correct, failed] = [0, 0]
  try {
    for await (const { reward, error } of evaluate({
      perceiver: new Perceiver(policy, { temperature: 0, maxTokens, maxPixels, minPixels }),
      reasoner: new Reasoner(policy, { temperature: 0, maxTokens }),
      questions: rows.map((row) => ({
        question: row.question,
        answerForm: row.form,
        truth: row.truth,
        load: () => imageOf(row, model.device),
      })),
      signal,
    })) {
      correct += reward ?? 0
      if (error) failed++
    }
  } catch (error) {
    // A step that is made keeps its line.
    if (!signal.aborted) throw error
    return undefined
  }
  return { accuracy: correct / rows.length, questions: rows.length, failed }
}

/** The first rollout of each of the first questions, as the page shows them. */
async function rolloutsOf(
  { role, items }: RolloutBatch,
  rows: readonly Row[],
  images: readonly Tensor<'u8'>[],
): Promise<ShownRollout[]> {
  const first = [...new Map([...items].reverse().map((item) => [item.sample, item])).values()]
  first.sort((a, b) => a.sample - b.sample)
  const shown: ShownRollout[] = []
  for (const { sample, completion, evidence, ...item } of first.slice(0, mostShown)) {
    const { question, truth } = rows[sample]!
    const { counterpart, answer, reward, error } = item
    const fault = item.fault && faults[item.fault]
    shown.push({
      role,
      question,
      truth,
      image: await thumbnail(evidence?.annotated ?? images[sample]!),
      output: completion.text,
      ...(counterpart !== undefined && { counterpart }),
      ...(answer !== undefined && { answer }),
      ...(!error && { reward }),
      ...(error ? { fault: error.message } : fault && { fault }),
    })
  }
  return shown
}

/** A data URL of the image, made smaller. */
async function thumbnail(image: Tensor<'u8'>): Promise<string> {
  const [height, width] = image.shape as [number, number, number]
  const scale = Math.min(1, thumbnailSide / Math.max(height, width))
  const size = (side: number): number => Math.max(1, Math.round(side * scale))
  const region = { box: [0, 0, width, height] as const, height: size(height), width: size(width) }
  const [small] = cropResample({ image, regions: [region] })
  try {
    const jpeg = await encodeImage(small!, { format: 'jpeg', quality: 75 })
    return `data:image/jpeg;base64,${Buffer.from(jpeg).toString('base64')}`
  } finally {
    small!.dispose()
  }
}

async function linesOf(metrics: string): Promise<MetricsLine[]> {
  if (!existsSync(metrics)) return []
  const text = (await readText(metrics)).trim()
  return text ? text.split('\n').map((line) => JSON.parse(line)) : []
}

function trainerOptions(options: TrainCommandOptions): LocalTrainerOptions {
  const { stages, steps, group, maxTokens, maxPixels, minPixels, lora } = options
  const half = Math.ceil(steps / 2)
  const { lr, warmup, decay, seed } = options
  return {
    groupSize: group,
    ...(stages === 'joint' && { joint: true }),
    ...(stages === 'alternating' && { schedule: { perceiver: 1, reasoner: 1 } }),
    ...(stages === 'two-stage' && { schedule: { perceiver: half, reasoner: half } }),
    lr,
    warmup,
    decay,
    steps,
    seed,
    microBatchTokens: options.microTokens,
    maxTokens: { perceiver: maxTokens, reasoner: maxTokens },
    evidence: { maxPixels, minPixels },
    ...(lora !== undefined && { lora: { rank: lora, alpha: 2 * lora } }),
    ...(options.freezeTower && { freezeTower: true }),
    ...(options.checkpoint && { checkpoint: 'block' }),
  }
}

function shown({ roles }: TrainMetrics): { role: string; reward: string } {
  return {
    role: roles.map(({ role }) => role).join(' and '),
    reward: roles.map(({ rewardMean }) => rewardMean.toFixed(3)).join(' '),
  }
}

/** A step's questions: each epoch has them all, in an order of its own. */
function rowsOfStep(rows: readonly Row[], step: number, batch: number, seed: number): Row[] {
  const own: Row[] = []
  let order: { epoch: number; rows: Row[] } | undefined
  for (let at = step * batch; at < (step + 1) * batch; at++) {
    const epoch = Math.floor(at / rows.length)
    if (order?.epoch !== epoch) order = { epoch, rows: shuffled(rows, seed, epoch) }
    own.push(order.rows[at % rows.length]!)
  }
  return own
}

function shuffled(rows: readonly Row[], seed: number, epoch: number): Row[] {
  const random = randomFrom(`${seed} ${epoch}`)
  const all = [...rows]
  for (let i = all.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1))
    const [a, b] = [all[i]!, all[j]!]
    all[i] = b
    all[j] = a
  }
  return all
}

/** Drops the lines of steps that are made again, and an incomplete one that a crash left. */
async function keepSteps(path: string, steps: number): Promise<void> {
  if (!existsSync(path)) return
  if (!steps) return rm(path)
  const lines = (await readText(path)).split('\n').slice(0, steps)
  await replaceFile(path, [Buffer.from(`${lines.join('\n')}\n`)])
}
