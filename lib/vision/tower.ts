/**
 * The vision tower of Qwen3-VL (Qwen team, 2025) on the library's operations, with the names of Hugging
 * Face's weights. Patches through a linear layer, plus interpolated position embeddings, then pre-norm
 * blocks of attention, each frame a sequence of its own, and an MLP:
 *
 *   x += proj(attention(rotary(qkv(norm1(x)))))        x += fc2(gelu(fc1(norm2(x))))
 *
 * A merger joins each block of mergeSize x mergeSize neighbouring patches into one token of the language
 * model: fc2(gelu(fc1(·))) of the normalised patches side by side. After some blocks a merger of its own
 * (DeepStack) does the same for the language model's first layers; those normalise the joined patches.
 */
import { join } from 'node:path'
import {
  checkArguments,
  checkArray,
  checkBoolean,
  checkFunction,
  checkReceiver,
  checkString,
  describeValue,
  isJsonObject,
  isObject,
  type Names,
} from '../arguments.js'
import { loadWeights, most, readJson } from '../checkpoint.js'
import { composite } from '../composite.js'
import { checkDevice, type Device } from '../device.js'
import { checkFloatDType, type FloatDType, isFloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import { checkGrids, type Grid } from '../grid.js'
import { attention, attentionMass } from '../ops/attention.js'
import { add } from '../ops/elementwise.js'
import { gelu } from '../ops/gelu.js'
import { layerNorm } from '../ops/layer_norm.js'
import { linear } from '../ops/linear.js'
import { visionPositions } from '../ops/positions.js'
import { visionRotary } from '../ops/rotary.js'

import { holds, scope } from '../scope.js'
import { type Held, handleOf, held, type Tensor } from '../tensor.js'

/** The sizes of a vision tower, from its config.json. */
export interface VisionTowerConfig {
  /** Number of blocks. */
  depth: number
  /** Width of a patch's state. */
  hiddenSize: number
  /** Attention heads of a block. */
  heads: number
  /** Width of a head: hiddenSize / heads. */
  headDim: number
  /** Width of a merged token, which is the language model's. */
  outHiddenSize: number
  /** Side of a patch in pixels. */
  patchSize: number
  /** Frames of a patch; an image is repeated. */
  temporalPatchSize: number
  /** Side, in patches, of the square that becomes one merged token. */
  mergeSize: number
  /** After which blocks, counted from 0, a DeepStack merger reads the patches. */
  deepstack: readonly number[]
}

/** Options of VisionTower.load. */
export interface VisionTowerOptions {
  /**
   * The type in which weights are held and activations computed; sums are f32 always.
   * @default as stored
   */
  dtype?: FloatDType
  /** Called while weights are loaded, with the bytes read so far and those of the whole tower. */
  onProgress?: (done: number, of: number) => void
}

/** The arguments of VisionTower's `encode`. */
export interface EncodeArgs<
  H extends boolean = boolean,
  M extends readonly number[] | undefined = readonly number[] | undefined,
> {
  /**
   * [T, 3 · temporalPatchSize · patchSize²], as the function pixelValues makes them; rounded to the tower's type
   * where they have another.
   */
  pixelValues: Tensor<FloatDType>
  /** The patches [t, h, w] of each image or video, T = Σ t·h·w in all; h and w are multiples of mergeSize. */
  gridThw: readonly Grid[]
  /**
   * Whether to return every block's state too, as `hidden`.
   * @default false
   */
  hiddenStates?: H
  /**
   * The blocks, counted from 0, whose attention is summed over its queries (`attentionMass`), as `mass`.
   * @default none
   */
  massOf?: M
}

/** What every encoding of T patches has: M = T / mergeSize² merged tokens, in the tower's type. */
export interface EncodedPatches {
  /** [M, outHiddenSize]: the language model's input. */
  merged: Tensor
  /** One [M, outHiddenSize] for each entry of the config's deepstack. */
  deepstack: Tensor[]
}

/** What an encoding has where `hiddenStates` is true. */
export interface EncodedStates {
  /** depth + 1 states [T, hiddenSize]: block 0's input, then each block's output. */
  hidden: Tensor[]
}

/** What an encoding has where `massOf` is given. */
export interface EncodedMass {
  /** For each block of massOf, how much probability each patch receives from its frame: f32 [heads, T]. */
  mass: Tensor<'f32'>[]
}

/** A tower's results; `hidden` and `mass` where the arguments ask for them. */
export type VisionEncoding<
  H extends boolean = boolean,
  M extends readonly number[] | undefined = readonly number[] | undefined,
> = EncodedPatches &
  (boolean extends H ? Partial<EncodedStates> : H extends true ? EncodedStates : unknown) &
  (undefined extends M ? (M extends undefined ? unknown : Partial<EncodedMass>) : EncodedMass)

const optionNames: Names<VisionTowerOptions> = { dtype: true, onProgress: true }
const encodeNames: Names<EncodeArgs> = {
  pixelValues: true,
  gridThw: true,
  hiddenStates: true,
  massOf: true,
}

type Weights = Record<string, Tensor>
type Activation = 'none' | 'tanh'

/** Hugging Face's names of the two forms of GELU. */
const activations: Record<string, Activation> = { gelu: 'none', gelu_pytorch_tanh: 'tanh' }
/** Of a patch and of merged patches, along an axis. */
const maxPatch = 256
/** Parts of the longest name, 'blocks.0.attn.qkv.weight'. */
const nameParts = 5
const opName = 'VisionTower'
const construct = Symbol('construct')

/**
 * The vision tower of Qwen3-VL (Qwen team, 2025), loaded from a checkpoint's folder; Qwen3.5 and later have the same
 * without DeepStack.
 *
 * @example
 * ```js
 * import { openDevice, VisionTower } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const tower = await VisionTower.load('P2R-4B', device) // a checkpoint's folder
 * const pixelValues = device.zeros([64, 1536]) // as evidence.pixelValues() returns them
 * const { merged, mass } = tower.encode({ pixelValues, gridThw: [[1, 8, 8]], massOf: [0] })
 * console.log(merged.shape, mass[0].shape) // [ 16, 24 ] [ 2, 64 ]
 * tower.dispose()
 * device.dispose()
 * ```
 */
export class VisionTower implements Disposable {
  /** Its sizes. */
  readonly config: VisionTowerConfig
  /** Where its weights are. */
  readonly device: Device
  /** In which its weights are held and its activations computed. */
  readonly dtype: FloatDType
  readonly #weights: Weights
  readonly #activation: Activation

  private constructor(
    key: typeof construct,
    device: Device,
    read: Config,
    weights: Weights,
    dtype: FloatDType,
  ) {
    if (key !== construct)
      refuse('ERR_VALUE', opName, 'a VisionTower is made by VisionTower.load()')
    const { activation, intermediateSize: _, positions: __, ...config } = read
    this.config = Object.freeze(config)
    this.device = device
    this.dtype = dtype
    this.#weights = weights
    Object.defineProperty(this, holds, { value: () => Object.values(weights) })
    this.#activation = activation
  }

  /**
   * Loads a tower from a folder with config.json (a whole model's, or its vision_config alone) and
   * safetensors: those that model.safetensors.index.json names for the tower, else all in the
   * folder. Names are Hugging Face's, with any prefix; other weights are not loaded.
   *
   * @throws P2RError ERR_VALUE and ERR_DTYPE for wrong arguments; ERR_IO for files that cannot be read; ERR_FORMAT for a
   *   config or weights that are not those of a Qwen3-VL vision tower.
   */
  static async load(
    path: string,
    device: Device,
    options: VisionTowerOptions = {},
  ): Promise<VisionTower> {
    checkString(path, 'path', opName)
    checkDevice(device, opName)
    checkArguments(options, optionNames, opName)
    const { dtype, onProgress } = options
    if (dtype !== undefined) checkFloatDType(dtype, 'dtype', opName)
    if (onProgress !== undefined) checkFunction(onProgress, 'onProgress', opName)
    const config = readConfig(
      await readJson(join(path, 'config.json'), opName),
      join(path, 'config.json'),
    )
    const expected = shapesOf(config)
    const wanted = new Set(expected.keys())
    const stored: Weights = await loadWeights(
      opName,
      path,
      device,
      (name) => towerName(name, wanted),
      { keep: (_, tensor) => tensor, ...(onProgress && { onProgress }) },
    )
    try {
      const type = dtype ?? (stored['patch_embed.proj.weight']?.dtype as FloatDType | undefined)
      for (const [name, shape] of expected) {
        const tensor = stored[name]
        if (!tensor) refuse('ERR_FORMAT', opName, `${path}: there is no weight '${name}'`)
        if (!isFloatDType(tensor.dtype))
          refuse(
            'ERR_FORMAT',
            opName,
            `${path}: '${name}' must be of a float type, got ${tensor.dtype}`,
          )
        if (tensor.size !== shape.reduce((n, d) => n * d, 1) || tensor.shape[0] !== shape[0])
          refuse(
            'ERR_FORMAT',
            opName,
            `${path}: '${name}' must be [${shape.join(', ')}], got [${tensor.shape.join(', ')}]`,
          )
        const flat = tensor.reshape(shape)
        tensor.dispose()
        stored[name] = flat
        if (flat.dtype !== type) {
          stored[name] = flat.cast(type as FloatDType)
          flat.dispose()
        }
      }
      return new VisionTower(construct, device, config, stored, type as FloatDType)
    } catch (error) {
      for (const tensor of Object.values(stored)) tensor.dispose()
      throw error
    }
  }

  /**
   * Encodes the patches of images and videos.
   *
   * @throws P2RError ERR_SHAPE, ERR_DTYPE, ERR_DEVICE for patches that do not fit; ERR_VALUE for the rest.
   */
  encode<H extends boolean = false, M extends readonly number[] | undefined = undefined>(
    a: EncodeArgs<H, M>,
  ): Held<VisionEncoding<H, M>> {
    checkReceiver(isObject(this) && #weights in this, 'VisionTower', opName)
    checkArguments(a, encodeNames, opName)
    const { depth, hiddenSize, heads, headDim, patchSize, temporalPatchSize, mergeSize } =
      this.config
    handleOf(a.pixelValues, 'pixelValues', opName)
    if (a.hiddenStates !== undefined) checkBoolean(a.hiddenStates, 'hiddenStates', opName)
    const grids = checkGrids(a.gridThw, mergeSize, opName)
    const patches = grids.reduce((n, [t, h, w]) => n + t * h * w, 0)
    const inputs = 3 * temporalPatchSize * patchSize ** 2
    const { shape } = a.pixelValues
    if (shape.length !== 2 || shape[0] !== patches || shape[1] !== inputs)
      refuse(
        'ERR_SHAPE',
        opName,
        `pixelValues must be [${patches}, ${inputs}] for these grids, got [${shape.join(', ')}]`,
      )
    const massOf: readonly number[] = checkArray(a.massOf ?? [], 'massOf', opName)
    for (const layer of massOf)
      if (!Number.isInteger(layer) || layer < 0 || layer >= depth)
        refuse(
          'ERR_VALUE',
          opName,
          `massOf must hold blocks from 0 to ${depth - 1}, got ${describeValue(layer)}`,
        )

    return composite(opName, () => {
      const parts = scope(() => {
        const hidden: Tensor[] = []
        const deepstack: Tensor[] = []
        const masses = new Map<number, Tensor>()
        const rotary = visionRotary({ gridThw: grids, headDim, mergeSize, device: this.device })
        const cuSeqlens = frames(grids)
        let x = scope(() => {
          const pixels =
            a.pixelValues.dtype === this.dtype ? a.pixelValues : a.pixelValues.cast(this.dtype)
          const table = this.#weight('pos_embed.weight')
          const positions = visionPositions({ table, gridThw: grids, mergeSize })
          return add({ x: this.#linear('patch_embed.proj', pixels), y: positions })
        })
        if (a.hiddenStates) hidden.push(x)
        for (let i = 0; i < depth; i++) {
          const block = `blocks.${i}`
          const input = x
          const middle = scope(() => {
            const qkv = this.#linear(
              `${block}.attn.qkv`,
              this.#norm(`${block}.norm1`, input),
            ).reshape([patches, 3, heads, headDim])
            const { out, lse } = attention({ qkv, rotary, cuSeqlens })
            const mass = massOf.includes(i)
              ? attentionMass({ qkv, rotary, lse, cuSeqlens })
              : undefined
            if (mass) masses.set(i, mass)
            const flat = out.reshape([patches, hiddenSize])
            return { mass, x: add({ x: input, y: this.#linear(`${block}.attn.proj`, flat) }) }
          }).x
          if (!a.hiddenStates) input.dispose()
          x = scope(() =>
            add({ x: middle, y: this.#mlp(`${block}.mlp`, this.#norm(`${block}.norm2`, middle)) }),
          )
          middle.dispose()
          if (a.hiddenStates) hidden.push(x)
          const merger = this.config.deepstack.indexOf(i)
          if (merger >= 0) deepstack[merger] = this.#merge(`deepstack_merger_list.${merger}`, x)
        }
        const merged = this.#merge('merger', x)
        return {
          merged,
          deepstack,
          ...(a.hiddenStates ? { hidden } : {}),
          ...(a.massOf ? { mass: massOf.map((layer) => masses.get(layer) as Tensor) } : {}),
        }
      })
      return held(parts as VisionEncoding<H, M> & object)
    })
  }

  /** Frees the weights. A second call does nothing. */
  dispose(): void {
    checkReceiver(isObject(this) && #weights in this, 'VisionTower', 'dispose')
    for (const tensor of Object.values(this.#weights)) tensor.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  #weight(name: string): Tensor {
    return this.#weights[name] as Tensor
  }

  #linear(name: string, x: Tensor): Tensor {
    return linear({ x, weight: this.#weight(`${name}.weight`), bias: this.#weight(`${name}.bias`) })
  }

  #norm(name: string, x: Tensor): Tensor {
    const weight = this.#weight(`${name}.weight`)
    return layerNorm({ x, weight, bias: this.#weight(`${name}.bias`) }).out
  }

  #mlp(name: string, x: Tensor): Tensor {
    const fc1 = this.#linear(`${name}.linear_fc1`, x)
    return this.#linear(`${name}.linear_fc2`, gelu({ x: fc1, approximate: this.#activation }))
  }

  /** Concatenates mergeSize x mergeSize neighbours and applies the merger's MLP, with the exact GELU. */
  #merge(name: string, x: Tensor): Tensor {
    return scope(() => {
      const width = this.config.hiddenSize * this.config.mergeSize ** 2
      const joined = (y: Tensor): Tensor => y.reshape([y.size / width, width])
      const y =
        name === 'merger'
          ? joined(this.#norm(`${name}.norm`, x))
          : this.#norm(`${name}.norm`, joined(x))
      const fc1 = this.#linear(`${name}.linear_fc1`, y)
      return this.#linear(`${name}.linear_fc2`, gelu({ x: fc1 }))
    })
  }
}

/** cuSeqlens of the frames: each is a sequence of its own. */
function frames(grids: readonly Grid[]): number[] {
  const cuSeqlens = [0]
  for (const [t, h, w] of grids)
    for (let frame = 0; frame < t; frame++) cuSeqlens.push((cuSeqlens.at(-1) as number) + h * w)
  return cuSeqlens
}

// ---- Files ----

interface Config extends VisionTowerConfig {
  intermediateSize: number
  positions: number
  activation: Activation
}

function readConfig(json: unknown, path: string): Config {
  const bad = (why: string): never => refuse('ERR_FORMAT', opName, `${path}: ${why}`)
  if (!isJsonObject(json)) return bad(`must hold an object, got ${describeValue(json)}`)
  const vision = json.vision_config ?? json
  if (!isJsonObject(vision))
    return bad(`vision_config must be an object, got ${describeValue(vision)}`)
  const within = (limit: number, name: string, otherwise?: number): number => {
    const value = vision[name] ?? otherwise
    if (!Number.isInteger(value) || (value as number) < 1 || (value as number) > limit)
      return bad(`${name} must be an integer from 1 to ${limit}, got ${describeValue(value)}`)
    return value as number
  }
  const config = {
    depth: within(most.layers, 'depth'),
    hiddenSize: within(most.sizes, 'hidden_size'),
    heads: within(most.sizes, 'num_heads'),
    outHiddenSize: within(most.sizes, 'out_hidden_size'),
    patchSize: within(maxPatch, 'patch_size', 16),
    temporalPatchSize: within(maxPatch, 'temporal_patch_size', 2),
    mergeSize: within(maxPatch, 'spatial_merge_size', 2),
    intermediateSize: within(most.sizes, 'intermediate_size'),
    positions: within(most.positions, 'num_position_embeddings'),
  }
  const channels = within(maxPatch, 'in_channels', 3)
  if (channels !== 3) bad(`in_channels must be 3, got ${channels}`)
  const headDim = config.hiddenSize / config.heads
  if (!Number.isInteger(headDim) || headDim % 8 !== 0 || headDim > 128)
    bad(`hidden_size / num_heads must be a multiple of 8 from 8 to 128, got ${headDim}`)
  const deepstack = vision.deepstack_visual_indexes ?? []
  if (
    !Array.isArray(deepstack) ||
    !deepstack.every((i) => Number.isInteger(i) && i >= 0 && i < config.depth) ||
    new Set(deepstack).size !== deepstack.length
  )
    return bad(`deepstack_visual_indexes must hold different blocks from 0 to ${config.depth - 1}`)
  const act = vision.hidden_act ?? 'gelu_pytorch_tanh'
  const activation = Object.hasOwn(activations, act as string) && activations[act as string]
  if (!activation)
    return bad(`hidden_act must be gelu or gelu_pytorch_tanh, got ${describeValue(act)}`)
  return { ...config, headDim, deepstack: Object.freeze([...deepstack]), activation }
}

/** Every weight with its shape; the patch convolution's is the equivalent matrix for one patch. */
function shapesOf(c: Config): Map<string, number[]> {
  const shapes = new Map<string, number[]>()
  const linearShapes = (name: string, inputs: number, outputs: number): void => {
    shapes.set(`${name}.weight`, [outputs, inputs]).set(`${name}.bias`, [outputs])
  }
  const norm = (name: string, width: number): void => {
    shapes.set(`${name}.weight`, [width]).set(`${name}.bias`, [width])
  }
  const joined = c.hiddenSize * c.mergeSize ** 2
  const merger = (name: string, normalised: number): void => {
    norm(`${name}.norm`, normalised)
    linearShapes(`${name}.linear_fc1`, joined, joined)
    linearShapes(`${name}.linear_fc2`, joined, c.outHiddenSize)
  }
  linearShapes('patch_embed.proj', 3 * c.temporalPatchSize * c.patchSize ** 2, c.hiddenSize)
  shapes.set('pos_embed.weight', [c.positions, c.hiddenSize])
  for (let i = 0; i < c.depth; i++) {
    norm(`blocks.${i}.norm1`, c.hiddenSize)
    norm(`blocks.${i}.norm2`, c.hiddenSize)
    linearShapes(`blocks.${i}.attn.qkv`, c.hiddenSize, 3 * c.hiddenSize)
    linearShapes(`blocks.${i}.attn.proj`, c.hiddenSize, c.hiddenSize)
    linearShapes(`blocks.${i}.mlp.linear_fc1`, c.hiddenSize, c.intermediateSize)
    linearShapes(`blocks.${i}.mlp.linear_fc2`, c.intermediateSize, c.hiddenSize)
  }
  merger('merger', c.hiddenSize)
  c.deepstack.forEach((_, i) => {
    merger(`deepstack_merger_list.${i}`, joined)
  })
  return shapes
}

/**
 * A stored name without its prefix ('model.visual.', 'visual.', ...); undefined for other weights. Only its last parts
 * are looked up, as many as the longest wanted name has, since a name in a hostile file may have a million.
 */
function towerName(stored: string, wanted: ReadonlySet<string>): string | undefined {
  let found: string | undefined
  let dot = stored.length
  for (let parts = 0; parts < nameParts && dot >= 0; parts++) {
    dot = dot > 0 ? stored.lastIndexOf('.', dot - 1) : -1
    const name = stored.slice(dot + 1)
    if (wanted.has(name)) found = name
  }
  return found
}
