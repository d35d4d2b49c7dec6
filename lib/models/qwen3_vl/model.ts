/**
 * Qwen3-VL (Qwen team, 2025): the vision tower and the language model of a checkpoint's folder.
 */
import {
  checkArguments,
  checkFunction,
  checkReceiver,
  checkString,
  isObject,
  type Names,
} from '../../arguments.js'
import { weightBytes } from '../../checkpoint.js'
import { checkDevice, type Device } from '../../device.js'
import { checkFloatDType, type FloatDType } from '../../dtype.js'
import { refuse } from '../../errors.js'
import { VisionTower } from '../../vision/tower.js'
import { type Qwen3VLConfig, type Qwen3VLSampling, readConfig, readSampling } from './config.js'
import { type Qwen3VLTokenizer, tokenizerOf } from './tokens.js'
import { loadText, type TextWeights, textName, textShapes } from './weights.js'

/** Options of Qwen3VL.load. */
export interface Qwen3VLOptions {
  /**
   * The type in which weights are held and activations computed; sums are f32 always.
   * @default as stored
   */
  dtype?: FloatDType
  /** Called while weights are loaded, with the bytes read so far and those of the whole model. */
  onProgress?: (done: number, of: number) => void
}

const optionNames: Names<Qwen3VLOptions> = { dtype: true, onProgress: true }
const opName = 'Qwen3VL'
const construct = Symbol('construct')

/** What a model is made of. */
interface Parts {
  folder: string
  device: Device
  dtype: FloatDType
  config: Qwen3VLConfig
  sampling: Qwen3VLSampling
  tower: VisionTower
  weights: TextWeights
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
  /** Where its weights are. */
  readonly device: Device
  /** In which its weights are held and its activations computed. */
  readonly dtype: FloatDType
  /** Its vision tower. */
  readonly tower: VisionTower
  readonly #weights: TextWeights
  readonly #folder: string
  #tokenizer: Promise<Qwen3VLTokenizer> | undefined

  private constructor(key: typeof construct, parts: Parts) {
    if (key !== construct) refuse('ERR_VALUE', opName, 'a Qwen3VL is made by Qwen3VL.load()')
    this.config = Object.freeze(parts.config)
    this.sampling = parts.sampling
    this.device = parts.device
    this.dtype = parts.dtype
    this.tower = parts.tower
    this.#weights = parts.weights
    this.#folder = parts.folder
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
    const { dtype, onProgress } = options
    if (dtype !== undefined) checkFloatDType(dtype, 'dtype', opName)
    if (onProgress !== undefined) checkFunction(onProgress, 'onProgress', opName)
    const config = await readConfig(folder, opName)
    const sampling = await readSampling(folder, config.vocabSize, opName)
    const wanted = textShapes(config)
    const textBytes = await weightBytes(opName, folder, (name) => textName(name, wanted))
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
      const text = await loadText(opName, folder, device, wanted, dtype, (done) =>
        onProgress?.(towerBytes + done, towerBytes + textBytes),
      )
      return new Qwen3VL(construct, { folder, device, config, sampling, tower, ...text })
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
    checkReceiver(isObject(this) && #weights in this, 'Qwen3VL', 'tokenizer')
    if (given !== undefined) return tokenizerOf(this.#folder, this.config, given)
    this.#tokenizer ??= tokenizerOf(this.#folder, this.config)
    return this.#tokenizer
  }

  /** Frees the weights. A second call does nothing. */
  dispose(): void {
    checkReceiver(isObject(this) && #weights in this, 'Qwen3VL', 'dispose')
    this.tower.dispose()
    for (const tensor of Object.values(this.#weights)) tensor.dispose()
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
