import { existsSync } from 'node:fs'
import { appendFile, mkdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { SingleBar } from 'cli-progress'
import { openDevice } from '../device.js'
import { readText, replaceFile } from '../files.js'
import { loadImage } from '../image.js'
import type { AnswerForm } from '../p2r/prompts.js'
import type { Sample } from '../p2r/rollouts.js'
import {
  LocalTrainer,
  type LocalTrainerOptions,
  type TrainMetrics,
} from '../train/local_trainer.js'
import { randomFrom } from '../train/random.js'
import { imageIn } from './benchmarks.js'
import { type Row, readRows } from './questions.js'
import { UsageError } from './usage.js'

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
  seed: number
  form: AnswerForm
  device?: string
}

/** Trains a checkpoint on a file of questions; returns the exit code. */
export async function trainCommand(data: string, options: TrainCommandOptions): Promise<number> {
  const rows: Row[] = []
  for await (const row of readRows(data, options.form)) rows.push(row)
  if (!rows.length) throw new UsageError(`${data} holds no questions`)
  const free = rows.find(({ form }) => form === 'free_form')
  if (free) throw new UsageError(`${data}:${free.line} is of free form, which train cannot judge`)
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
  try {
    while (trainer.steps < steps && !stop.signal.aborted) {
      const own = rowsOfStep(rows, trainer.steps, batch, seed)
      const images = await Promise.all(
        own.map(async ({ image }) => {
          const source = typeof image === 'string' || image instanceof Uint8Array
          return loadImage(source ? image : await imageIn(image), device)
        }),
      )
      try {
        const samples = own.map(
          ({ question, truth, form }, i): Sample => ({
            image: images[i]!,
            question,
            truth,
            answerForm: form,
          }),
        )
        const made = await trainer.step(samples, { signal: stop.signal })
        await appendFile(metrics, `${JSON.stringify(made)}\n`)
        bar.update(trainer.steps, shown(made))
      } finally {
        for (const image of images) image.dispose()
      }
      if (trainer.steps % options.saveEvery === 0) await trainer.saveState(state)
    }
  } catch (error) {
    if (!stop.signal.aborted) throw error
  } finally {
    bar.stop()
    process.off('SIGINT', interrupt)
  }
  await trainer.saveState(state)
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
