// How fast a whole Qwen3-VL runs: tokens a second at the sizes of the 2B model, with random weights, which are
// written to a checkpoint's folder first. A step of decoding reads every weight once, and the keys and values that
// are cached; a prompt and an image are bound by products. The ceilings beside the rates are these bytes over
// the machine's rate of reading and these products over its rate of bf16.
import { closeSync, mkdirSync, openSync, rmSync, writeFileSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { type Device, openDevice, Qwen3VL, type Qwen3VLConfig } from 'p2r-kernels'
import { readConfig } from '../lib/models/qwen3_vl/config.js'
import { textShapes } from '../lib/models/qwen3_vl/weights.js'
import { towerShapes } from '../lib/vision/tower.js'
import { cpuCeilings, disturbances } from './ceilings.js'
import { bf16Bits, integers, normalBlock, normals, tiled } from './data.js'
import { better, type Ceilings } from './results.js'
import { quantiles } from './statistics.js'
import { aligned } from './table.js'

/** Qwen3-VL-2B-Instruct's, the fields that are read. */
const config = {
  model_type: 'qwen3_vl',
  image_token_id: 151_655,
  video_token_id: 151_656,
  vision_start_token_id: 151_652,
  vision_end_token_id: 151_653,
  tie_word_embeddings: true,
  text_config: {
    vocab_size: 151_936,
    hidden_size: 2048,
    intermediate_size: 6144,
    num_hidden_layers: 28,
    num_attention_heads: 16,
    num_key_value_heads: 8,
    head_dim: 128,
    rms_norm_eps: 1e-6,
    rope_theta: 5_000_000,
    rope_scaling: { rope_type: 'default', mrope_interleaved: true, mrope_section: [24, 20, 20] },
    max_position_embeddings: 262_144,
  },
  vision_config: {
    depth: 24,
    hidden_size: 1024,
    num_heads: 16,
    intermediate_size: 4096,
    out_hidden_size: 2048,
    num_position_embeddings: 2304,
    deepstack_visual_indexes: [5, 11, 17],
  },
}

/** Bytes of a weight of the language model's matrices: with f16 scales of groups of 32. */
const weightBytes = { bf16: 2, int8: 1 + 2 / 32, int4: 0.5 + 2 / 32 } as const
export type Format = keyof typeof weightBytes

/** What is measured, in the order of the table. */
export type Work =
  | { kind: 'decode'; format: Format; sequences: number; cached: number; steps: number }
  | { kind: 'prompt'; format: Format; tokens: number; rounds: number }
  | { kind: 'image'; format: 'bf16'; side: number; rounds: number }

const decode = (format: Format, sequences = 1, cached = 16): Work => ({
  kind: 'decode',
  format,
  sequences,
  cached,
  steps: 32,
})
const prompt = (tokens: number): Work => ({ kind: 'prompt', format: 'bf16', tokens, rounds: 3 })

export const work: readonly Work[] = [
  decode('bf16'),
  decode('bf16', 1, 1500),
  decode('bf16', 8),
  decode('bf16', 8, 1500),
  prompt(512),
  prompt(1500),
  { kind: 'image', format: 'bf16', side: 1024, rounds: 3 },
  decode('int8'),
  decode('int4'),
]

export function nameOf(w: Work): string {
  if (w.kind === 'image') return `tower, ${w.side} x ${w.side}, ${w.format}`
  if (w.kind === 'prompt') return `prompt of ${w.tokens}, ${w.format}`
  const of = w.sequences > 1 ? ` of ${w.sequences} sequences` : ''
  const at = w.cached > 100 ? ` at ${w.cached} cached` : ''
  return `decode${of}${at}, ${w.format}`
}

export interface Rate {
  work: string
  /** Tokens a second; the tower's images a second. */
  rate: number
  /** Of the samples: the fastest and the slowest quarter begin there. */
  range: [number, number]
  /** What the machine's ceiling allows, where it was measured. */
  limit?: number
}

/** Multiply-adds count as two. */
interface Cost {
  bytes: number
  flops: number
  /** Tokens, or images, that a sample makes. */
  count: number
}

/** What a sample needs at least: all weights once, the cached keys and values for each sequence, and all products. */
export function costOf(w: Work, c: Qwen3VLConfig): Cost {
  if (w.kind === 'image') {
    const { hidden_size: h, intermediate_size: m, depth } = config.vision_config
    const { out_hidden_size: out, deepstack_visual_indexes: deepstack } = config.vision_config
    const patches = (w.side / 16) ** 2
    const block = 4 * h * h + 2 * h * m
    const mergers = (1 + deepstack.length) * ((4 * h) ** 2 + 4 * h * out)
    const weights = depth * block + 3 * 2 * 16 ** 2 * h
    const attention = depth * 4 * patches ** 2 * h
    const flops = 2 * patches * weights + 2 * (patches / 4) * mergers + attention
    return { bytes: 0, flops, count: 1 }
  }
  const { layers, hiddenSize, heads, kvHeads, headDim } = c
  const perLayer =
    hiddenSize * headDim * (2 * heads + 2 * kvHeads) + 3 * hiddenSize * c.intermediateSize
  const head = c.vocabSize * hiddenSize
  const score = 4 * layers * heads * headDim // of a query and a key
  if (w.kind === 'prompt') {
    const { tokens } = w
    const flops = 2 * tokens * layers * perLayer + 2 * head + (score * tokens * (tokens + 1)) / 2
    return { bytes: 0, flops, count: tokens }
  }
  const { sequences, format } = w
  const cached = w.cached + w.steps / 2
  const weights = layers * perLayer + head
  // The sequences have their prompt in common, which has to be read once.
  const keys = (w.cached + (sequences * w.steps) / 2) * layers * 2 * kvHeads * headDim * 2
  return {
    bytes: weights * weightBytes[format] + keys,
    flops: sequences * (2 * weights + score * cached),
    count: sequences,
  }
}

/** The most samples a second that the ceilings allow, times what a sample makes. */
export function limitOf({ bytes, flops, count }: Cost, { read, bf16 }: Ceilings): number {
  return count / Math.max(bytes / (read ?? Number.POSITIVE_INFINITY), bf16 ? flops / bf16 : 0)
}

/** A share of the model: so many of its layers, the same share of its vocabulary, and a tower of one block. */
export function sliceOf(layers: number): typeof config {
  const { num_hidden_layers: all, vocab_size: ids } = config.text_config
  const vocabulary = Math.ceil((ids * layers) / all)
  return {
    ...config,
    image_token_id: vocabulary - 1,
    video_token_id: vocabulary - 2,
    vision_start_token_id: vocabulary - 3,
    vision_end_token_id: vocabulary - 4,
    text_config: { ...config.text_config, vocab_size: vocabulary, num_hidden_layers: layers },
    vision_config: { ...config.vision_config, depth: 1, deepstack_visual_indexes: [0] },
  }
}

/** A checkpoint's folder with random weights; as sharp as trained ones are not needed. */
export async function writeCheckpoint(folder: string, sizes = config): Promise<void> {
  mkdirSync(folder, { recursive: true })
  writeFileSync(join(folder, 'config.json'), JSON.stringify(sizes))
  const shapes = new Map([
    ...[...textShapes(await readConfig(folder, 'bench'))].map(
      ([name, shape]) => [`model.language_model.${name}`, shape] as const,
    ),
    ...[...(await towerShapes(folder))].map(
      ([name, shape]) => [`model.visual.${name}`, shape] as const,
    ),
  ])
  const header: Record<
    string,
    { dtype: 'BF16'; shape: readonly number[]; data_offsets: number[] }
  > = {}
  let end = 0
  for (const [name, shape] of shapes) {
    const bytes = 2 * shape.reduce((n, d) => n * d, 1)
    header[name] = { dtype: 'BF16', shape, data_offsets: [end, end + bytes] }
    end += bytes
  }
  const json = Buffer.from(JSON.stringify(header))
  const start = Buffer.alloc(8)
  start.writeBigUInt64LE(BigInt(json.length))
  const random = bytesOf(bf16Bits(normals(2 ** 22, 1, 0.02)))
  const ones = bytesOf(new Uint16Array(2 ** 16).fill(0x3f80))
  const file = openSync(join(folder, 'model.safetensors'), 'w')
  try {
    writeSync(file, start)
    writeSync(file, json)
    for (const [name, { shape, data_offsets }] of Object.entries(header)) {
      const from = shape.length === 1 && name.endsWith('weight') ? ones : random
      for (let left = data_offsets[1]! - data_offsets[0]!; left > 0; )
        left -= writeSync(file, from, 0, Math.min(left, from.length))
    }
  } finally {
    closeSync(file)
  }
}

function bytesOf({ buffer, byteOffset, byteLength }: Uint16Array): Buffer {
  return Buffer.from(buffer, byteOffset, byteLength)
}

/** Measures on a CPU device with the default number of threads. */
export async function modelRates(
  root: string,
  progress: (what: string) => void,
  list: readonly Work[] = work,
): Promise<{ threads: number; rates: Rate[]; notes: string[] }> {
  const folder = join(root, 'build/bench/qwen3_vl')
  const notes: string[] = []
  using device = openDevice('cpu')
  const { threads = 1 } = device.info
  const before = cpuCeilings(threads)
  const measured: [Cost, Rate][] = []
  try {
    progress('writing random weights')
    await writeCheckpoint(folder)
    for (const format of ['bf16', 'int8', 'int4'] as const) {
      const own = list.filter((w) => w.format === format)
      if (!own.length) continue
      progress(`loading, ${format}`)
      using model = await Qwen3VL.load(folder, device, {
        ...(format !== 'bf16' && { quantize: format === 'int8' ? 8 : 4 }),
        cacheTokens: 4096,
      })
      for (const w of own) {
        progress(nameOf(w))
        measured.push([costOf(w, model.config), await rateOf(model, w)])
      }
    }
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
  const after = cpuCeilings(threads)
  notes.push(...disturbances([before], [after]))
  const best = better(before, after)
  return {
    threads,
    rates: measured.map(([cost, rate]) => ({ ...rate, limit: limitOf(cost, best) })),
    notes,
  }
}

async function rateOf(model: Qwen3VL, w: Work): Promise<Rate> {
  const { count } = costOf(w, model.config)
  const { p25, median, p75 } = quantiles(await samplesOf(model, w))
  const perSecond = (ms: number): number => (1e3 * count) / ms
  return { work: nameOf(w), rate: perSecond(median), range: [perSecond(p75), perSecond(p25)] }
}

/** Milliseconds: of the steps of decoding, of whole prompts, of whole images. */
async function samplesOf(model: Qwen3VL, w: Work): Promise<number[]> {
  if (w.kind === 'image') return imageSamples(model, w.side, w.rounds)
  if (w.kind === 'prompt') {
    const samples: number[] = []
    for (let round = 0; round <= w.rounds; round++) {
      const start = performance.now()
      await model.generate({ ...asked(w.tokens, round), maxTokens: 1 })
      if (round > 0) samples.push(performance.now() - start)
    }
    return samples
  }
  const ends: number[] = []
  const { cached, sequences: n, steps } = w
  for await (const { index } of model.stream({ ...asked(cached, 0), n, maxTokens: steps + 2 }))
    if (index === 0) ends.push(performance.now())
  // The first token is the prompt's, and the step after it may wait for memory.
  return ends.slice(2).map((end, i) => end - ends[i + 1]!)
}

/** Random tokens, continued without log-probabilities, as the peers do it. */
function asked(tokens: number, seed: number) {
  return {
    prompts: [{ tokens: integers(tokens, 150_000, seed) }],
    stopTokens: [],
    logProbs: false,
  }
}

async function imageSamples({ tower, device }: Qwen3VL, side: number, rounds: number) {
  const grid: [number, number, number] = [1, side / 16, side / 16]
  const block = normalBlock([grid[1] * grid[2], 3 * 2 * 16 ** 2], 'bf16', 1)
  using pixelValues = tiled(device, block)
  const samples: number[] = []
  for (let round = 0; round <= rounds; round++) {
    const ms = await timed(device, () => tower.encode({ pixelValues, gridThw: [grid] }).dispose())
    if (round > 0) samples.push(ms)
  }
  return samples
}

async function timed(device: Device, run: () => void): Promise<number> {
  const start = performance.now()
  run()
  await device.synchronize()
  return performance.now() - start
}

export function modelReport(rates: readonly Rate[], threads: number): string {
  const digits = (x: number): string => x.toPrecision(3)
  const table = [
    ['', 'a second', 'p75..p25', 'limit', 'of it'],
    ...rates.map(({ work, rate, range, limit }) => [
      work,
      digits(rate),
      range.map(digits).join('..'),
      limit === undefined ? '' : digits(limit),
      limit === undefined ? '' : `${((100 * rate) / limit).toFixed(0)} %`,
    ]),
  ]
  const title = `Qwen3-VL-2B's sizes, random weights, ${threads} threads: tokens a second, and the tower's images`
  return [title, aligned(table, 1)].join('\n')
}
