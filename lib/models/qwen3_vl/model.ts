/**
 * Qwen3-VL (Qwen team, 2025): the vision tower and the language model of a checkpoint's folder.
 */
import { onAbort } from '../../abort.js'
import {
  checkArguments,
  checkArray,
  checkFunction,
  checkIntegerWithin,
  checkReceiver,
  checkString,
  choice,
  describeValue,
  hostInts,
  isObject,
  type Names,
} from '../../arguments.js'
import { bytesOf, listWeights } from '../../checkpoint.js'
import { composite } from '../../composite.js'
import { checkDevice, type Device } from '../../device.js'
import { checkFloatDType, type FloatDType } from '../../dtype.js'
import { refuse } from '../../errors.js'
import { attention } from '../../ops/attention.js'
import { KvCache } from '../../ops/cached_attention.js'
import { gatherRows } from '../../ops/rows.js'
import { holds, scope } from '../../scope.js'
import { type Held, held, type Ints, type Tensor } from '../../tensor.js'
import { VisionTower } from '../../vision/tower.js'
import {
  type Qwen3VLConfig,
  type Qwen3VLImageRules,
  type Qwen3VLSampling,
  readConfig,
  readImageRules,
  readSampling,
} from './config.js'
import { Decoder } from './decoder.js'
import {
  type Generated,
  type GeneratedToken,
  jobsOf,
  type Qwen3VLGenerateArgs,
  stopper,
  streamed,
} from './generate.js'
import { checkPacked, type Packed, type PackedTokens, packedNames, place } from './prompt.js'
import { type Job, Scheduler } from './scheduler.js'
import { type Qwen3VLTokenizer, tokenizerOf } from './tokens.js'
import { loadText, storedType, type TextWeights, textName, textShapes } from './weights.js'

/** Options of Qwen3VL.load. */
export interface Qwen3VLOptions {
  /**
   * The type in which weights are held and activations computed; sums are f32 always.
   * @default as stored
   */
  dtype?: FloatDType
  /**
   * Holds the language model's matrices, but the embedding, in 8 or 4 bits, as `quantize` makes them: they take a half
   * or a quarter of the memory, and of the time of a decoded token. The vision tower stays as it is.
   * @default off
   */
  quantize?: 8 | 4
  /**
   * Tokens that the cache of keys and values holds, for all sequences of `generate` at once. It is allocated by the
   * first call.
   * @default as many as fit into a quarter of the device's memory, from 1024 to 32 768 on the CPU and 1 048 576 on a GPU
   */
  cacheTokens?: number
  /** Called while weights are loaded, with the bytes read so far and those of the whole model. */
  onProgress?: (done: number, of: number) => void
}

const wants = ['hiddenStates', 'final', 'logits'] as const

/** A result of `forward`. */
export type Qwen3VLWant = (typeof wants)[number]

/** The arguments of Qwen3VL's `forward`. */
export interface Qwen3VLForwardArgs<W extends Qwen3VLWant = Qwen3VLWant> extends PackedTokens {
  /**
   * The results: the layers' states, the states after the last norm, the logits.
   * @default ['logits']
   */
  want?: readonly W[]
  /**
   * Of which tokens logits are made, by their places in `tokens`; a token's logits predict the one after it.
   * @default all
   */
  rows?: Ints
}

/** The results of Qwen3VL's `forward`, those that were wanted; of T tokens, H wide, V in the vocabulary. */
export interface Qwen3VLResults {
  /** [T, H] each: the first layer's input, and each layer's output. */
  hiddenStates: Tensor[]
  /** [T, H]: after the last norm. */
  final: Tensor
  /** [T, V], or [rows.length, V]. */
  logits: Tensor
}

/** The arguments of Qwen3VL's `logProbs`. */
export interface Qwen3VLLogProbsArgs extends PackedTokens {
  /**
   * Divides the logits; greater than 0.
   * @default 1
   */
  temperature?: number
}

/** The results of Qwen3VL's `logProbs`. */
export interface Qwen3VLLogProbs {
  /** f32 [T], in nats: of each token, given those before it in its sequence; 0 for a sequence's first. */
  logProbs: Tensor<'f32'>
  /** f32 [T], in nats: of the distribution that each token is of; 0 for a sequence's first. */
  entropy: Tensor<'f32'>
}

const forwardNames: Names<Qwen3VLForwardArgs> = { ...packedNames, want: true, rows: true }
const logProbsNames: Names<Qwen3VLLogProbsArgs> = { ...packedNames, temperature: true }
const optionNames: Names<Qwen3VLOptions> = {
  dtype: true,
  quantize: true,
  cacheTokens: true,
  onProgress: true,
}
const opName = 'Qwen3VL'
/** Tokens of a page of the cache. */
const pageSize = 16
const construct = Symbol('construct')

/** What a model is made of. */
interface Parts {
  folder: string
  device: Device
  dtype: FloatDType
  config: Qwen3VLConfig
  sampling: Qwen3VLSampling
  imageRules: Qwen3VLImageRules
  tower: VisionTower
  weights: TextWeights
  cacheTokens: number
}

/**
 * A whole Qwen3-VL (Qwen team, 2025), loaded from a checkpoint's folder: the vision tower and the language model.
 * Dense models of every size; not the mixtures of experts.
 *
 * @example
 * ```js
 * import { openDevice, Qwen3VL } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const model = await Qwen3VL.load('Qwen3-VL-2B-Instruct', device) // a checkpoint's folder
 * console.log(model.config.layers, model.dtype) // 3 bf16
 * model.dispose()
 * device.dispose()
 * ```
 */
export class Qwen3VL implements Disposable {
  /** The language model's sizes and the special tokens. */
  readonly config: Qwen3VLConfig
  /** How the checkpoint's authors sample. */
  readonly sampling: Qwen3VLSampling
  /** How images become patches. */
  readonly imageRules: Qwen3VLImageRules
  /** Where its weights are. */
  readonly device: Device
  /** In which its weights are held and its activations computed. */
  readonly dtype: FloatDType
  /** Its vision tower. */
  readonly tower: VisionTower
  readonly #decoder: Decoder
  readonly #scheduler: Scheduler
  readonly #folder: string
  #tokenizer: Promise<Qwen3VLTokenizer> | undefined

  private constructor(key: typeof construct, parts: Parts) {
    if (key !== construct) refuse('ERR_VALUE', opName, 'a Qwen3VL is made by Qwen3VL.load()')
    this.config = Object.freeze(parts.config)
    this.sampling = parts.sampling
    this.imageRules = parts.imageRules
    this.device = parts.device
    this.dtype = parts.dtype
    this.tower = parts.tower
    const tensors = (): Iterable<unknown> => [parts.tower, ...this.#decoder.weights()]
    Object.defineProperty(this, holds, { value: tensors })
    this.#decoder = new Decoder(parts.config, parts.device, parts.weights)
    this.#folder = parts.folder
    const { config, device, dtype, cacheTokens, tower } = parts
    const { layers, kvHeads, headDim } = config
    const pages = Math.ceil(cacheTokens / pageSize)
    this.#scheduler = new Scheduler({
      op: opName,
      decoder: this.#decoder,
      place: (prompt) => place(prompt, tower, config),
      cache: () => new KvCache(device, { layers, kvHeads, headDim, pages, pageSize, dtype }),
      cacheTokens: pages * pageSize,
    })
  }

  /**
   * Loads a model from a folder with config.json, generation_config.json where there is one, and safetensors:
   * those that model.safetensors.index.json names, else all in the folder. Names are Hugging Face's.
   *
   * @throws P2RError ERR_VALUE and ERR_DTYPE for wrong arguments; ERR_IO for files that cannot be read; ERR_FORMAT for a
   *   config or weights that are not those of a dense Qwen3-VL; ERR_MEMORY.
   */
  static async load(
    folder: string,
    device: Device,
    options: Qwen3VLOptions = {},
  ): Promise<Qwen3VL> {
    checkString(folder, 'folder', opName)
    checkDevice(device, opName)
    checkArguments(options, optionNames, opName, 'options')
    const { dtype, quantize, cacheTokens, onProgress } = options
    if (quantize !== undefined && quantize !== 8 && quantize !== 4)
      refuse('ERR_VALUE', opName, `quantize must be 8 or 4, got ${describeValue(quantize)}`)
    if (dtype !== undefined) checkFloatDType(dtype, 'dtype', opName)
    if (onProgress !== undefined) checkFunction(onProgress, 'onProgress', opName)
    if (cacheTokens !== undefined)
      checkIntegerWithin(cacheTokens, 1, 2 ** 24, 'cacheTokens', opName)
    const config = await readConfig(folder, opName)
    const sampling = await readSampling(folder, config.vocabSize, opName)
    const imageRules = await readImageRules(folder, opName)
    const wanted = textShapes(config)
    const stored = await listWeights(opName, folder, (name) => textName(name, wanted))
    const textBytes = bytesOf(stored)
    let towerBytes = 0
    const tower = await VisionTower.load(folder, device, {
      ...(dtype && { dtype }),
      onProgress(done, of) {
        towerBytes = of
        onProgress?.(done, of + textBytes)
      },
    })
    try {
      checkTower(tower, config, folder)
      const type = dtype ?? storedType(stored, folder, opName)
      const weights = await loadText(opName, folder, device, wanted, type, quantize, (done) =>
        onProgress?.(towerBytes + done, towerBytes + textBytes),
      )
      const sizes = { dtype: type, cacheTokens: cacheTokens ?? defaultCache(config, type, device) }
      const read = { config, sampling, imageRules }
      return new Qwen3VL(construct, { folder, device, ...read, tower, weights, ...sizes })
    } catch (error) {
      tower.dispose()
      throw error
    }
  }

  /**
   * The checkpoint's tokenizer and chat template, which are read at the first call.
   *
   * @param given in place of the folder's tokenizer.json: its parsed content, or a `Tokenizer` of @huggingface/tokenizers.
   * @throws P2RError ERR_IO where the folder has no tokenizer.json; ERR_FORMAT for one of another model; ERR_NATIVE where
   *   an optional peer dependency is not installed.
   */
  async tokenizer(given?: unknown): Promise<Qwen3VLTokenizer> {
    checkReceiver(isObject(this) && #decoder in this, 'Qwen3VL', 'tokenizer')
    if (given !== undefined) return tokenizerOf(this.#folder, this.config, given)
    this.#tokenizer ??= tokenizerOf(this.#folder, this.config)
    return this.#tokenizer
  }

  /**
   * The states and logits of packed sequences, each computed by itself.
   *
   * @throws P2RError ERR_VALUE for tokens outside the vocabulary, sequences beyond the model's context, and images or
   *   videos that are not those of the placeholders; ERR_SHAPE, ERR_DTYPE, ERR_DEVICE for patches that do not fit;
   *   ERR_MEMORY; ERR_DISPOSED.
   */
  forward<W extends Qwen3VLWant = 'logits'>(
    a: Qwen3VLForwardArgs<W>,
  ): Held<Pick<Qwen3VLResults, W>> {
    checkReceiver(isObject(this) && #decoder in this, 'Qwen3VL', opName)
    checkArguments(a, forwardNames, opName)
    const want = checkArray<Qwen3VLWant>(a.want ?? ['logits'], 'want', opName)
    want.forEach((one, i) => {
      choice(one, wants, `want[${i}]`, opName)
    })
    const packed = checkPacked(a, this.config, this.tower, opName)
    const rows = a.rows === undefined ? undefined : hostInts(a.rows, 'rows', opName)
    return composite(opName, () =>
      held(
        scope(() => {
          const { final, hidden } = this.#run(packed, want.includes('hiddenStates'))
          const parts: Partial<Qwen3VLResults> = {}
          if (want.includes('hiddenStates')) parts.hiddenStates = hidden
          if (want.includes('final')) parts.final = final
          if (want.includes('logits'))
            parts.logits = this.#decoder.logits(
              rows ? gatherRows({ x: final, index: rows }) : final,
            )
          return parts as Pick<Qwen3VLResults, W> & object
        }),
      ),
    )
  }

  /**
   * The log-probability of each token of packed sequences given those before it, and the entropy of what it was drawn
   * from, at a temperature. Logits are never held.
   *
   * @throws P2RError as `forward`.
   */
  logProbs(a: Qwen3VLLogProbsArgs): Held<Qwen3VLLogProbs> {
    checkReceiver(isObject(this) && #decoder in this, 'Qwen3VL', opName)
    checkArguments(a, logProbsNames, opName)
    const packed = checkPacked(a, this.config, this.tower, opName)
    return composite(opName, () =>
      held(
        scope(() => {
          const { final } = this.#run(packed, false)
          // Token t is predicted by row t - 1; a sequence's first by none.
          const before = packed.tokens.map((_, t) => Math.max(0, t - 1))
          const targets = packed.tokens.slice()
          for (const first of packed.cuSeqlens) if (first < targets.length) targets[first] = -100
          const states = gatherRows({ x: final, index: before })
          return this.#decoder.logProbs(states, targets, a.temperature ?? 1)
        }),
      ),
    )
  }

  /**
   * Continues prompts, all at once, together with those of other calls that are under way: each prompt is computed once
   * for its n continuations, and what is done makes room for the next.
   *
   * @returns for each prompt its n continuations.
   * @throws P2RError ERR_VALUE for prompts that `forward` would refuse, or that leave no room for maxTokens in the
   *   model's context, and for options; ERR_MEMORY where the cache is too small for a prompt, or full; as `tokenizer`
   *   where there are stop texts; ERR_DISPOSED. The other calls go on.
   */
  async generate(a: Qwen3VLGenerateArgs): Promise<Generated[][]> {
    checkReceiver(isObject(this) && #decoder in this, 'Qwen3VL', opName)
    const { jobs, stop } = jobsOf(a, this, opName)
    const tokenizer = stop.length ? await this.tokenizer() : undefined
    return this.#submit(jobs.map((job) => ({ ...job, onToken: stopper(job, stop, tokenizer) })))
  }

  /**
   * As `generate`, token by token as they are drawn; ends when all continuations have. Leaving the loop ends them.
   *
   * @throws P2RError as `generate`, with the first step.
   */
  async *stream(a: Qwen3VLGenerateArgs): AsyncGenerator<GeneratedToken, void, undefined> {
    checkReceiver(isObject(this) && #decoder in this, 'Qwen3VL', opName)
    const { jobs, stop } = jobsOf(a, this, opName)
    const tokenizer = stop.length ? await this.tokenizer() : undefined
    yield* streamed(
      jobs.map((job) => ({ ...job, onToken: stopper(job, stop, tokenizer) })),
      (all) => this.#submit(all),
    )
  }

  /** All jobs; one that fails ends the others. */
  async #submit(jobs: readonly Job[]): Promise<Generated[][]> {
    const all = new AbortController()
    const forget = onAbort(jobs[0]?.signal, () => all.abort(jobs[0]!.signal!.reason))
    try {
      return await Promise.all(
        jobs.map(async (job) => this.#scheduler.submit({ ...job, signal: all.signal })),
      )
    } catch (error) {
      all.abort(error)
      throw error
    } finally {
      forget()
    }
  }

  #run(packed: Packed, hiddenStates: boolean): { final: Tensor; hidden: Tensor[] } {
    const { tokens, cuSeqlens, positions } = packed
    return this.#decoder.run({
      tokens,
      positions,
      attend: (_, q, k, v) => attention({ q, k, v, cuSeqlens, causal: true }).out,
      placements: place(packed, this.tower, this.config),
      hiddenStates,
    })
  }

  /** Frees the weights. A second call does nothing. */
  dispose(): void {
    checkReceiver(isObject(this) && #decoder in this, 'Qwen3VL', 'dispose')
    this.#scheduler.dispose()
    this.tower.dispose()
    this.#decoder.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

/** The tower's merged tokens and DeepStack features are rows of the language model's states. */
function checkTower(tower: VisionTower, config: Qwen3VLConfig, folder: string): void {
  const { outHiddenSize, deepstack } = tower.config
  if (outHiddenSize !== config.hiddenSize)
    refuse(
      'ERR_FORMAT',
      opName,
      `${folder}: vision_config.out_hidden_size must be text_config.hidden_size, ${config.hiddenSize}, got ${outHiddenSize}`,
    )
  if (deepstack.length > config.layers)
    refuse(
      'ERR_FORMAT',
      opName,
      `${folder}: deepstack_visual_indexes has ${deepstack.length} entries, more than the language model's ${config.layers} layers`,
    )
}

function defaultCache(
  { layers, kvHeads, headDim }: Qwen3VLConfig,
  dtype: FloatDType,
  { info }: Device,
): number {
  const bytes = 2 * layers * kvHeads * headDim * (dtype === 'f32' ? 4 : 2)
  const most = info.backend === 'cpu' ? 2 ** 15 : 2 ** 20
  return Math.min(most, Math.max(1024, Math.floor(info.memoryBytes / 4 / bytes)))
}
