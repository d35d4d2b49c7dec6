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
  choice,
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
import {
  type CheckpointOption,
  checkpoints,
  Gradients,
  type TrainableOption,
  trainableOf,
} from '../gradients.js'
import { checkGrids, type Grid } from '../grid.js'
import { attention, attentionMass } from '../ops/attention.js'
import { add } from '../ops/elementwise.js'
import { gelu } from '../ops/gelu.js'
import { layerNorm } from '../ops/layer_norm.js'
import { linear } from '../ops/linear.js'
import { visionPositions } from '../ops/positions.js'
import { type RotaryTables, visionRotary } from '../ops/rotary.js'
import { holds, scope } from '../scope.js'
import { disposeAll, type Held, handleOf, held, type Tensor } from '../tensor.js'
import {
  type AttentionRecord,
  type BlockRecord,
  type MergerRecord,
  type MlpRecord,
  type NormRecord,
  type TowerGradients,
  type TowerParts,
  type TowerRecord,
  towerBackward,
} from './tower_backward.js'

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

/** The patches of images or videos. */
export interface Patches {
  /**
   * [T, 3 · temporalPatchSize · patchSize²], as the function pixelValues makes them; rounded to the tower's type
   * where they have another.
   */
  pixelValues: Tensor<FloatDType>
  /** The patches [t, h, w] of each image or video, T = Σ t·h·w in all; h and w are multiples of mergeSize. */
  gridThw: readonly Grid[]
}

/** The arguments of VisionTower's `encode`. */
export interface EncodeArgs<
  H extends boolean = boolean,
  M extends readonly number[] | undefined = readonly number[] | undefined,
> extends Patches {
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

/** The arguments of VisionTower's `record`. */
export interface RecordPatchesArgs extends Patches, CheckpointOption, TrainableOption {
  /**
   * Whether the gradient of the patches is wanted.
   * @default false
   */
  inputs?: boolean
}

/** The gradients of an encoding's results, and where those of the weights are added. */
export interface VisionRecordBackwardArgs {
  /**
   * As `merged` in shape and type.
   * @default 0
   */
  dMerged?: Tensor
  /**
   * One for each of `deepstack`, as it in shape and type.
   * @default 0
   */
  dDeepstack?: readonly Tensor[]
  /**
   * By the names of `parameters()`, f32, in the weights' shapes: the gradients are added to these tensors, and the
   * results are new handles on the same storage.
   * @default new tensors
   */
  into?: Readonly<Record<string, Tensor>>
}

/** The arguments of VisionTower's `backward`. */
export interface VisionTowerBackwardArgs extends RecordPatchesArgs, VisionRecordBackwardArgs {}

/** What a backward pass of the tower returns. */
export interface VisionGradients {
  /** Of the weights that are trained, by the names of `parameters()` and in their shapes. */
  gradients: Record<string, Tensor<'f32'>>
  /** As the patches in shape, of the tower's type; where `inputs` is true. */
  dPixels?: Tensor
}

/** What a pass through the tower keeps. */
type Keep = 'all' | 'inputs' | undefined

interface ForwardOptions {
  hidden?: boolean
  massOf?: readonly number[]
  keep?: Keep
}

/** @internal The results of a pass through the tower. */
export interface TowerPass {
  merged: Tensor
  deepstack: Tensor[]
  hidden: Tensor[]
  masses: Map<number, Tensor>
  record: TowerRecord | undefined
}

const optionNames: Names<VisionTowerOptions> = { dtype: true, onProgress: true }
const patchNames: Names<Patches> = { pixelValues: true, gridThw: true }
const encodeNames: Names<EncodeArgs> = { ...patchNames, hiddenStates: true, massOf: true }
const recordNames: Names<RecordPatchesArgs> = {
  ...patchNames,
  checkpoint: true,
  trainable: true,
  inputs: true,
}
const recordBackwardNames: Names<VisionRecordBackwardArgs> = {
  dMerged: true,
  dDeepstack: true,
  into: true,
}
const backwardNames: Names<VisionTowerBackwardArgs> = { ...recordNames, ...recordBackwardNames }

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
  /** The weights in Hugging Face's shapes. */
  readonly #parameters: ReadonlyMap<string, Tensor>
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
    const { patchSize, temporalPatchSize } = config
    const patch = weights['patch_embed.proj.weight']!.reshape([
      config.hiddenSize,
      3,
      temporalPatchSize,
      patchSize,
      patchSize,
    ])
    this.#parameters = new Map(Object.entries({ ...weights, 'patch_embed.proj.weight': patch }))
    Object.defineProperty(this, holds, { value: () => [...Object.values(weights), patch] })
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
    options = checkArguments(options, optionNames, opName)
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
    a = checkArguments(a, encodeNames, opName)
    const { depth } = this.config
    const grids = this.#checkPatches(a)
    if (a.hiddenStates !== undefined) checkBoolean(a.hiddenStates, 'hiddenStates', opName)
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
        const { merged, deepstack, hidden, masses } = this.#forward(a.pixelValues, grids, {
          hidden: a.hiddenStates ?? false,
          massOf,
        })
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

  /**
   * Encodes patches as `encode` does, to the same bits, and keeps what the gradients need.
   *
   * @throws P2RError as `encode`; ERR_VALUE for the options.
   */
  record(a: RecordPatchesArgs): VisionRecord {
    checkReceiver(isObject(this) && #weights in this, 'VisionTower', opName)
    a = checkArguments(a, recordNames, opName)
    const grids = this.#checkPatches(a)
    const checkpoint = choice(a.checkpoint ?? 'none', checkpoints, 'checkpoint', opName)
    if (a.inputs !== undefined) checkBoolean(a.inputs, 'inputs', opName)
    const trained = trainableOf(this.#parameters.keys(), a.trainable, opName)
    return composite(opName, () =>
      scope(() => {
        const keep = checkpoint === 'none' ? 'all' : 'inputs'
        const pass = this.#forward(a.pixelValues, grids, { keep })
        return new VisionRecord(construct, this, pass, trained, a.inputs ?? false)
      }),
    )
  }

  /**
   * The gradients of `encode` with respect to all weights, from those of its results.
   *
   * @returns `gradients` by the names of `parameters()`, f32; and `dPixels` where `inputs` is true.
   * @throws P2RError as `record` and `VisionRecord.backward`.
   */
  backward(a: VisionTowerBackwardArgs): Held<VisionGradients> {
    checkReceiver(isObject(this) && #weights in this, 'VisionTower', opName)
    a = checkArguments(a, backwardNames, opName)
    const { dMerged, dDeepstack, into, ...rest } = a
    const record = this.record(rest)
    try {
      return record.backward({
        ...(dMerged && { dMerged }),
        ...(dDeepstack && { dDeepstack }),
        ...(into && { into }),
      })
    } finally {
      record.dispose()
    }
  }

  /**
   * The weights, by Hugging Face's names without prefix and in their shapes. They are the tower's own: what is written
   * to them changes it, and they are disposed with it.
   */
  parameters(): Map<string, Tensor> {
    checkReceiver(isObject(this) && #weights in this, 'VisionTower', 'parameters')
    return new Map(this.#parameters)
  }

  /** @internal A pass whose backward the language model calls. */
  pass(pixelValues: Tensor, grids: readonly Grid[], keep?: Keep): TowerPass {
    checkReceiver(isObject(this) && #weights in this, 'VisionTower', 'pass')
    return this.#forward(pixelValues, grids, { keep })
  }

  /** @internal Adds the gradients of a recorded pass, and returns that of its pixels. */
  passBackward(record: TowerRecord, d: TowerGradients, gradients: Gradients): Tensor {
    checkReceiver(isObject(this) && #weights in this, 'VisionTower', 'passBackward')
    const parts: TowerParts = {
      weight: (name) => this.#weight(name),
      activation: this.#activation,
      mergeSize: this.config.mergeSize,
      deepstack: this.config.deepstack,
      block: (i, input, { rotary, cuSeqlens }) => {
        const first = this.#attend(i, input, rotary, cuSeqlens)
        const second = this.#feed(i, first.x)
        return { input, attention: first.record, ...second.record }
      },
      merger: (name, input) => this.#merge(name, input).record,
    }
    return towerBackward(parts, record, d, gradients)
  }

  /** Frees the weights. A second call does nothing. */
  dispose(): void {
    checkReceiver(isObject(this) && #weights in this, 'VisionTower', 'dispose')
    for (const tensor of [...Object.values(this.#weights), ...this.#parameters.values()])
      tensor.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  #checkPatches({ pixelValues, gridThw }: Patches): readonly Grid[] {
    const { patchSize, temporalPatchSize, mergeSize } = this.config
    handleOf(pixelValues, 'pixelValues', opName)
    const grids = checkGrids(gridThw, mergeSize, opName)
    const patches = grids.reduce((n, [t, h, w]) => n + t * h * w, 0)
    const inputs = 3 * temporalPatchSize * patchSize ** 2
    const { shape } = pixelValues
    if (shape.length !== 2 || shape[0] !== patches || shape[1] !== inputs)
      refuse(
        'ERR_SHAPE',
        opName,
        `pixelValues must be [${patches}, ${inputs}] for these grids, got [${shape.join(', ')}]`,
      )
    return grids
  }

  /** In a scope of the caller's. */
  #forward(
    pixelValues: Tensor,
    grids: readonly Grid[],
    { hidden: wantsHidden = false, massOf = [], keep }: ForwardOptions,
  ): TowerPass {
    const { depth, headDim, mergeSize, deepstack: after } = this.config
    const hidden: Tensor[] = []
    const deepstack: Tensor[] = []
    const masses = new Map<number, Tensor>()
    const rotary = visionRotary({ gridThw: grids, headDim, mergeSize, device: this.device })
    const cuSeqlens = frames(grids)
    // A handle of its own, which outlives the caller's.
    const pixels =
      pixelValues.dtype === this.dtype
        ? pixelValues.reshape(pixelValues.shape)
        : pixelValues.cast(this.dtype)
    const blocks: BlockRecord[] = []
    const mergers = new Map<string, MergerRecord>()
    const merge = (name: string, input: Tensor): Tensor => {
      const { out, record } = scope(() => {
        const made = this.#merge(name, input)
        return keep === 'all' ? made : { out: made.out, record: { input } }
      })
      mergers.set(name, record)
      return out
    }
    let x = scope(() => {
      const table = this.#weight('pos_embed.weight')
      const positions = visionPositions({ table, gridThw: grids, mergeSize })
      return add({ x: this.#linear('patch_embed.proj', pixels), y: positions })
    })
    if (!keep) pixels.dispose()
    if (wantsHidden) hidden.push(x)
    for (let i = 0; i < depth; i++) {
      const input = x
      const first = scope(() => {
        const made = this.#attend(i, input, rotary, cuSeqlens)
        const { qkv, lse } = made.record
        if (massOf.includes(i)) masses.set(i, attentionMass({ qkv, rotary, lse, cuSeqlens }))
        return {
          ...(keep === 'all' ? made : { x: made.x, record: undefined }),
          mass: masses.get(i),
        }
      })
      const second = scope(() => {
        const made = this.#feed(i, first.x)
        return keep === 'all' ? made : { x: made.x, record: undefined }
      })
      x = second.x
      if (first.record && second.record)
        blocks.push({ input, attention: first.record, ...second.record })
      else {
        if (keep) blocks.push({ input })
        first.x.dispose()
      }
      if (!wantsHidden && !keep) input.dispose()
      if (wantsHidden) hidden.push(x)
      const merger = after.indexOf(i)
      if (merger >= 0) deepstack[merger] = merge(`deepstack_merger_list.${merger}`, x)
    }
    const merged = merge('merger', x)
    const record = keep && { pixels, grids, rotary, cuSeqlens, blocks, mergers }
    return { merged, deepstack, hidden, masses, record }
  }

  #weight(name: string): Tensor {
    return this.#weights[name] as Tensor
  }

  #linear(name: string, x: Tensor): Tensor {
    return linear({ x, weight: this.#weight(`${name}.weight`), bias: this.#weight(`${name}.bias`) })
  }

  #norm(name: string, x: Tensor): NormRecord {
    const weight = this.#weight(`${name}.weight`)
    const { out, stats } = layerNorm({ x, weight, bias: this.#weight(`${name}.bias`) })
    return { x, out, stats }
  }

  /** The first half of a block. */
  #attend(
    i: number,
    input: Tensor,
    rotary: RotaryTables,
    cuSeqlens: readonly number[],
  ): { x: Tensor; record: AttentionRecord } {
    const { hiddenSize, heads, headDim } = this.config
    const patches = input.shape[0]!
    const norm = this.#norm(`blocks.${i}.norm1`, input)
    const qkv = this.#linear(`blocks.${i}.attn.qkv`, norm.out).reshape([patches, 3, heads, headDim])
    const { out, lse } = attention({ qkv, rotary, cuSeqlens })
    const flat = out.reshape([patches, hiddenSize])
    const x = add({ x: input, y: this.#linear(`blocks.${i}.attn.proj`, flat) })
    return { x, record: { norm, qkv, out, lse } }
  }

  /** The second half of a block. */
  #feed(i: number, middle: Tensor): { x: Tensor; record: { norm: NormRecord; mlp: MlpRecord } } {
    const norm = this.#norm(`blocks.${i}.norm2`, middle)
    const { out, record } = this.#mlp(`blocks.${i}.mlp`, norm.out, this.#activation)
    return { x: add({ x: middle, y: out }), record: { norm, mlp: record } }
  }

  #mlp(name: string, x: Tensor, approximate: Activation): { out: Tensor; record: MlpRecord } {
    const inner = this.#linear(`${name}.linear_fc1`, x)
    const out = this.#linear(`${name}.linear_fc2`, gelu({ x: inner, approximate }))
    return { out, record: { x, inner } }
  }

  /** Concatenates mergeSize x mergeSize neighbours and applies the merger's MLP, with the exact GELU. */
  #merge(name: string, input: Tensor): { out: Tensor; record: Required<MergerRecord> } {
    const width = this.config.hiddenSize * this.config.mergeSize ** 2
    const joined = (y: Tensor): Tensor => y.reshape([y.size / width, width])
    const norm = this.#norm(`${name}.norm`, name === 'merger' ? input : joined(input))
    const { out, record } = this.#mlp(name, joined(norm.out), 'none')
    return { out, record: { input, norm, mlp: record } }
  }
}

/**
 * An encoding by VisionTower's `record`, with what its gradients need. `dispose` frees all of it.
 *
 * @example
 * ```js
 * import { openDevice, VisionTower } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const tower = await VisionTower.load('P2R-4B', device) // a checkpoint's folder
 * const record = tower.record({ pixelValues: device.zeros([64, 1536]), gridThw: [[1, 8, 8]] })
 * const { gradients } = record.backward({ dMerged: device.zeros(record.merged.shape, tower.dtype) })
 * console.log(gradients['merger.norm.bias'].shape) // [ 16 ]
 * record.dispose()
 * tower.dispose()
 * device.dispose()
 * ```
 */
export class VisionRecord implements Disposable {
  /** As `encode` returns it. */
  readonly merged: Tensor
  /** As `encode` returns it. */
  readonly deepstack: readonly Tensor[]
  readonly #tower: VisionTower
  readonly #trained: ReadonlySet<string>
  readonly #inputs: boolean
  #record: TowerRecord | undefined

  /** @internal */
  constructor(
    key: typeof construct,
    tower: VisionTower,
    pass: TowerPass,
    trained: ReadonlySet<string>,
    inputs: boolean,
  ) {
    if (key !== construct)
      refuse('ERR_VALUE', opName, 'a VisionRecord is made by VisionTower.record()')
    this.merged = pass.merged
    this.deepstack = pass.deepstack
    this.#tower = tower
    this.#record = pass.record
    this.#trained = trained
    this.#inputs = inputs
    Object.defineProperty(this, holds, { value: () => [this.#record] })
  }

  /**
   * The gradients of the weights, from those of the results. It uses up what was kept, and can be called once.
   *
   * @throws P2RError ERR_SHAPE, ERR_DTYPE, ERR_DEVICE for tensors that do not fit; ERR_VALUE for names in `into` that
   *   are no weights, and for a second call; ERR_MEMORY; ERR_DISPOSED.
   */
  backward(a: VisionRecordBackwardArgs): Held<VisionGradients> {
    checkReceiver(isObject(this) && #record in this, 'VisionRecord', 'backward')
    a = checkArguments(a, recordBackwardNames, opName)
    const weights = this.#tower.parameters()
    const check = (d: Tensor, like: Tensor, name: string): void => {
      handleOf(d, name, opName)
      if (String(d.shape) !== String(like.shape))
        refuse(
          'ERR_SHAPE',
          opName,
          `${name} must be [${like.shape.join(', ')}], got [${d.shape.join(', ')}]`,
        )
      if (d.dtype !== like.dtype)
        refuse('ERR_DTYPE', opName, `${name} must be ${like.dtype}, got ${d.dtype}`)
    }
    if (a.dMerged !== undefined) check(a.dMerged, this.merged, 'dMerged')
    const dDeepstack = checkArray(a.dDeepstack ?? [], 'dDeepstack', opName)
    if (a.dDeepstack !== undefined && dDeepstack.length !== this.deepstack.length)
      refuse(
        'ERR_VALUE',
        opName,
        `dDeepstack must hold ${this.deepstack.length} tensors, got ${dDeepstack.length}`,
      )
    for (const [i, d] of dDeepstack.entries()) check(d, this.deepstack[i]!, `dDeepstack[${i}]`)
    return composite(opName, () => {
      const parts = scope(() => {
        const gradients = Gradients.of(weights, this.#trained, a.into, opName)
        const record = this.#record
        if (!record)
          refuse('ERR_VALUE', opName, 'the record is used up: backward can be called once')
        this.#record = undefined
        try {
          const d = { merged: a.dMerged, deepstack: dDeepstack }
          const dPixels = this.#tower.passBackward(record, d, gradients)
          const all = gradients.all(weights)
          return { gradients: all, ...(this.#inputs && { dPixels }) }
        } finally {
          disposeAll(record)
        }
      })
      return held(parts, Object.values(parts.gradients))
    })
  }

  /** Frees the results and what was kept. A second call does nothing. */
  dispose(): void {
    checkReceiver(isObject(this) && #record in this, 'VisionRecord', 'dispose')
    disposeAll([this.merged, this.deepstack, this.#record])
    this.#record = undefined
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

/** @internal The shapes of the weights that a folder's config.json describes, by their names. */
export async function towerShapes(folder: string): Promise<Map<string, number[]>> {
  const path = join(folder, 'config.json')
  return shapesOf(readConfig(await readJson(path, opName), path))
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
