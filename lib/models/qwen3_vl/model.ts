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
import {
  cachedAttention,
  checkKvCache,
  KvCache,
  type Shift,
  sequenceShifts,
} from '../../ops/cached_attention.js'
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
import {
  checkLength,
  checkPacked,
  featuresOf,
  type Packed,
  type PackedTokens,
  packedNames,
  place,
} from './prompt.js'
import {
  backwardNames,
  checkScoring,
  logProbsNames,
  type ModelParts,
  type Qwen3VLBackwardArgs,
  type Qwen3VLGradients,
  type Qwen3VLLogProbsArgs,
  type Qwen3VLRecord,
  type Qwen3VLRecordArgs,
  type RecordedModel,
  recordNames,
  recordOf,
  score,
  towerPrefix,
} from './record.js'
import { type Job, Scheduler } from './scheduler.js'
import { type Qwen3VLTokenizer, tokenizerOf, undrawnIds } from './tokens.js'
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
   * Sequences of a cache, which these tokens continue: a long prompt in parts, one token after another, forks. An image
   * or a video stands whole in one part. On the CPU the results are the bits of one pass over all tokens.
   * @default none: sequences begin
   */
  cache?: Qwen3VLCache
  /**
   * Of which tokens logits are made, by their places in `tokens`; a token's logits predict the one after it.
   * @default all
   */
  rows?: Ints
}

/** Sequences of a cache that a pass continues. */
export interface Qwen3VLCache {
  /** With the model's layers, key heads, head dimension and type; made by `Qwen3VL.kvCache` or by hand. */
  kv: KvCache
  /** A sequence of the cache for each of `cuSeqlens`, each once. */
  sequences: Ints
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

/** The results of Qwen3VL's `logProbs`. */
export interface Qwen3VLLogProbs {
  /** f32 [N], in nats: of each target, given the tokens before it; 0 for one that has none. */
  logProbs: Tensor<'f32'>
  /** f32 [N], in nats: of the distribution that each target is of; 0 for one that has no token before it. */
  entropy: Tensor<'f32'>
}

const forwardNames: Names<Qwen3VLForwardArgs> = {
  ...packedNames,
  cache: true,
  want: true,
  rows: true,
}
const cacheNames: Names<Qwen3VLCache> = { kv: true, sequences: true }
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

/** A pass that continues sequences of a cache. */
interface Continued {
  kv: KvCache
  sequences: number[]
  commit: () => void
}

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
  undrawn: readonly number[]
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
  #parameters: ReadonlyMap<string, Tensor> | undefined

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
    this.#decoder = new Decoder(parts.config, parts.device, parts.weights, parts.undrawn)
    this.#folder = parts.folder
    const { config, cacheTokens, tower } = parts
    this.#scheduler = new Scheduler({
      op: opName,
      decoder: this.#decoder,
      place: (prompt) => place(prompt, config, (vision) => featuresOf(tower, vision)),
      cache: () => this.kvCache(cacheTokens),
      cacheTokens: Math.ceil(cacheTokens / pageSize) * pageSize,
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
    options = checkArguments(options, optionNames, opName, 'options')
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
    const undrawn = await undrawnIds(folder, config)
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
      const read = { config, sampling, imageRules, undrawn }
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
   * @throws P2RError ERR_VALUE for tokens outside the vocabulary, sequences beyond the model's context, images or
   *   videos that are not those of the placeholders, and a cache of another model; ERR_SHAPE, ERR_DTYPE, ERR_DEVICE for
   *   patches and caches that do not fit; ERR_MEMORY, also where the cache is full, which then has what it had before;
   *   ERR_DISPOSED.
   */
  forward<W extends Qwen3VLWant = 'logits'>(
    a: Qwen3VLForwardArgs<W>,
  ): Held<Pick<Qwen3VLResults, W>> {
    checkReceiver(isObject(this) && #decoder in this, 'Qwen3VL', opName)
    a = checkArguments(a, forwardNames, opName)
    const want = checkArray<Qwen3VLWant>(a.want ?? ['logits'], 'want', opName)
    want.forEach((one, i) => {
      choice(one, wants, `want[${i}]`, opName)
    })
    const packed = checkPacked(a, this.config, this.tower, opName)
    const cached = a.cache && this.#continued(a.cache, packed)
    const rows = a.rows === undefined ? undefined : hostInts(a.rows, 'rows', opName)
    return composite(opName, () =>
      held(
        scope(() => {
          const { final, hidden } = this.#run(packed, want.includes('hiddenStates'), cached)
          cached?.commit()
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
    a = checkArguments(a, logProbsNames, opName)
    const scoring = checkScoring(a, this.#parts, opName)
    return composite(opName, () =>
      held(
        scope(() => {
          const { logProbs, entropy } = score(this.#parts, scoring)
          return { logProbs, entropy }
        }),
      ),
    )
  }

  /**
   * Log-probabilities as `logProbs` has them, to the bit, with what their gradients need.
   *
   * @throws P2RError as `logProbs`; ERR_VALUE for a quantized model, which has no gradients.
   */
  record(a: Qwen3VLRecordArgs): Qwen3VLRecord {
    checkReceiver(isObject(this) && #decoder in this, 'Qwen3VL', opName)
    a = checkArguments(a, recordNames, opName)
    return recordOf(this.#recorded(), a)
  }

  /**
   * The gradients of Σ dLogProbs · logProbs (and dEntropy · entropy) with respect to all weights.
   *
   * @returns `gradients` by the names of `parameters()`, f32; and `dInputs` and `dPixels` where `inputs` is true.
   * @throws P2RError as `record` and `Qwen3VLRecord.backward`.
   */
  backward(a: Qwen3VLBackwardArgs): Held<Qwen3VLGradients> {
    checkReceiver(isObject(this) && #decoder in this, 'Qwen3VL', opName)
    a = checkArguments(a, backwardNames, opName)
    const { dLogProbs, dEntropy, into, ...rest } = a
    const record = recordOf(this.#recorded(), rest)
    try {
      return record.backward({ dLogProbs, ...(dEntropy && { dEntropy }), ...(into && { into }) })
    } finally {
      record.dispose()
    }
  }

  /**
   * The weights by Hugging Face's names and in their shapes; a tied head is the embedding. They are the model's own:
   * what is written to them changes it, and they are disposed with it. A quantized model has only those that are not.
   */
  parameters(): Map<string, Tensor> {
    checkReceiver(isObject(this) && #decoder in this, 'Qwen3VL', 'parameters')
    const visual = [...this.tower.parameters()].map(
      ([name, weight]) => [towerPrefix + name, weight] as const,
    )
    return new Map([...this.#decoder.parameters(), ...visual])
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

  get #parts(): ModelParts {
    return { config: this.config, tower: this.tower, decoder: this.#decoder }
  }

  #recorded(): RecordedModel {
    if (this.#decoder.quantized)
      refuse('ERR_VALUE', opName, 'the weights are quantized, and have no gradients')
    this.#parameters ??= this.parameters()
    return { parts: this.#parts, parameters: this.#parameters }
  }

  /**
   * Keys and values of sequences that continue in passes, of the model's sizes: for `forward`'s `cache`.
   *
   * @throws P2RError ERR_VALUE for a number of tokens that is none; ERR_MEMORY; ERR_DISPOSED.
   */
  kvCache(tokens: number): KvCache {
    checkReceiver(isObject(this) && #decoder in this, 'Qwen3VL', 'kvCache')
    checkIntegerWithin(tokens, 1, 2 ** 24, 'tokens', opName)
    const { layers, kvHeads, headDim } = this.config
    const pages = Math.ceil(tokens / pageSize)
    return new KvCache(this.device, {
      layers,
      kvHeads,
      headDim,
      pages,
      pageSize,
      dtype: this.dtype,
    })
  }

  /** Moves a pass's positions behind those of the sequences that it continues. */
  #continued(cache: Qwen3VLCache, packed: Packed): Continued {
    checkArguments(cache, cacheNames, opName, 'cache')
    const kv = checkKvCache(cache.kv, 'cache.kv', opName)
    const sequences = [...hostInts(cache.sequences, 'cache.sequences', opName)]
    const { layers, maxPositions } = this.config
    if (kv.layers !== layers || kv.dtype !== this.dtype)
      refuse(
        'ERR_VALUE',
        opName,
        `cache.kv must have ${layers} layers of ${this.dtype}, as the model, got ${kv.layers} of ${kv.dtype}`,
      )
    const { tokens, cuSeqlens, positions } = packed
    if (sequences.length !== cuSeqlens.length - 1)
      refuse(
        'ERR_VALUE',
        opName,
        `cache.sequences must be as many as those of cuSeqlens, ${cuSeqlens.length - 1}, got ${sequences.length}`,
      )
    const added = sequences.map((sequence, s): Shift[] => {
      const [first, end] = [cuSeqlens[s]!, cuSeqlens[s + 1]!]
      const shifts = sequenceShifts(kv, sequence, `cache.sequences[${s}]`, opName)
      const length = kv.length(sequence)
      checkLength(length + end - first, maxPositions, `sequence ${sequence} of the cache`, opName)
      let shift = shifts.at(-1)?.shift ?? 0
      const start = length + shift
      const made: Shift[] = []
      for (let t = first; t < end; t++) {
        for (let axis = 0; axis < 3; axis++) positions[axis * tokens.length + t]! += start
        const isText = tokens[t] !== this.config.imageToken && tokens[t] !== this.config.videoToken
        const place = length + t - first
        if (!isText || positions[t]! - place === shift) continue
        shift = positions[t]! - place
        made.push({ from: place, shift })
      }
      // What follows an image at the end stands where the next token would.
      const next = length + end - first
      const last = start + packed.deltas[s]! - length
      if (end > first && last !== shift) made.push({ from: next, shift: last })
      return made
    })
    return {
      kv,
      sequences,
      commit: () => {
        for (const [s, sequence] of sequences.entries())
          sequenceShifts(kv, sequence, `cache.sequences[${s}]`, opName, added[s])
      },
    }
  }

  #run(
    packed: Packed,
    hiddenStates: boolean,
    cached?: Continued,
  ): { final: Tensor; hidden: Tensor[] } {
    const { tokens, cuSeqlens, positions } = packed
    return this.#decoder.run({
      tokens,
      positions,
      attend: (layer, q, k, v) =>
        cached
          ? cachedAttention({
              ...{ q, k, v, cuSeqlens, layer },
              cache: cached.kv,
              sequences: cached.sequences,
            })
          : attention({ q, k, v, cuSeqlens, causal: true }),
      placements: place(packed, this.config, (vision) => featuresOf(this.tower, vision)),
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
