/**
 * Log-probabilities of packed sequences and their gradients: one pass forward, which keeps what it needs, and one back.
 */
import {
  checkArguments,
  checkBoolean,
  checkReceiver,
  choice,
  hostInts,
  isObject,
  type Names,
} from '../../arguments.js'
import { composite } from '../../composite.js'
import { refuse } from '../../errors.js'
import {
  type CheckpointOption,
  checkpoints,
  Gradients,
  type TrainableOption,
  trainableOf,
} from '../../gradients.js'
import { add } from '../../ops/elementwise.js'
import { concat } from '../../ops/rearrange.js'
import { gatherRows } from '../../ops/rows.js'
import { holds, scope } from '../../scope.js'
import { disposeAll, type Held, handleOf, held, type Ints, type Tensor } from '../../tensor.js'
import type { VisionTower } from '../../vision/tower.js'
import type { TowerRecord } from '../../vision/tower_backward.js'
import type { Qwen3VLConfig } from './config.js'
import type { Decoder, Features, Placement, Scored } from './decoder.js'
import type { DecoderRecord, FeatureRows } from './decoder_backward.js'
import {
  type AttendedHeads,
  attendRows,
  attendRowsBackward,
  type Rows,
} from './packed_attention.js'
import {
  checkLength,
  checkPacked,
  featuresOf,
  type Packed,
  type PackedTokens,
  packedNames,
  place,
} from './prompt.js'

/** The arguments of Qwen3VL's `logProbs`. */
export interface Qwen3VLLogProbsArgs extends PackedTokens {
  /**
   * Divides the logits; greater than 0.
   * @default 1
   */
  temperature?: number
  /**
   * Whose log-probabilities are wanted, by their places in `tokens`.
   * @default all
   */
  targets?: Ints
  /**
   * For each sequence the index of an earlier one that it goes on after, or -1: its prompt, which is computed once for
   * all of them. Its positions go on after the prompt's, its queries see all of the prompt, and its first token is
   * predicted by the prompt's last. A prompt must not go on after another, nor be empty.
   * @default -1: each sequence by itself
   */
  prefixOf?: Ints
}

/** The arguments of Qwen3VL's `record`. */
export interface Qwen3VLRecordArgs extends Qwen3VLLogProbsArgs, CheckpointOption, TrainableOption {
  /**
   * Whether the gradients of the first layer's input and of the pixels are wanted.
   * @default false
   */
  inputs?: boolean
}

/** The gradients of a record's results, and where those of the weights are added. */
export interface Qwen3VLRecordBackwardArgs {
  /** f32 [N]: as `logProbs`. */
  dLogProbs: Tensor<'f32'>
  /**
   * f32 [N]: as `entropy`.
   * @default 0
   */
  dEntropy?: Tensor<'f32'>
  /**
   * As `features` in shape and type: added to what the language model has for them.
   * @default 0
   */
  dFeatures?: Tensor
  /**
   * By the names of `parameters()`, f32, in the weights' shapes: the gradients are added to these tensors, and the
   * results are new handles on the same storage.
   * @default new tensors
   */
  into?: Readonly<Record<string, Tensor>>
}

/** The arguments of Qwen3VL's `backward`. */
export interface Qwen3VLBackwardArgs
  extends Qwen3VLRecordArgs,
    Omit<Qwen3VLRecordBackwardArgs, 'dFeatures'> {}

/** What a backward pass returns. */
export interface Qwen3VLGradients {
  /** Of the weights that are trained, by the names of `parameters()` and in their shapes. */
  gradients: Record<string, Tensor<'f32'>>
  /** [T, H], of the model's type: of the first layer's input; where `inputs` is true. */
  dInputs?: Tensor
  /** As the patches of the images, then of the videos, of the model's type; where `inputs` is true and there are any. */
  dPixels?: Tensor
}

export const logProbsNames: Names<Qwen3VLLogProbsArgs> = {
  ...packedNames,
  temperature: true,
  targets: true,
  prefixOf: true,
}
export const recordNames: Names<Qwen3VLRecordArgs> = {
  ...logProbsNames,
  checkpoint: true,
  trainable: true,
  inputs: true,
}
const recordBackwardNames: Names<Qwen3VLRecordBackwardArgs> = {
  dLogProbs: true,
  dEntropy: true,
  dFeatures: true,
  into: true,
}
export const backwardNames: Names<Qwen3VLBackwardArgs> = {
  ...recordNames,
  dLogProbs: true,
  dEntropy: true,
  into: true,
}

/** Before the names of the tower's weights, as Hugging Face stores them. */
export const towerPrefix = 'model.visual.'
const opName = 'Qwen3VL'
const construct = Symbol('construct')

/** What a pass runs through. */
export interface ModelParts {
  config: Qwen3VLConfig
  tower: VisionTower
  decoder: Decoder
}

/** Checked sequences, in the order of their rows. */
interface Arranged {
  packed: Packed
  /** Of the rows. */
  tokens: Int32Array
  positions: Int32Array
  rows: Rows
  /** The row of each token; absent where it is the token's place. */
  rowOf?: Int32Array
  /** Of each token the row that predicts it, or -1. */
  before: Int32Array
}

/** What is to be scored. */
export interface Scoring {
  arranged: Arranged
  /** By place; -100 for those that nothing predicts. */
  targets: Int32Array
  /** The rows that predict them. */
  rows: Int32Array
  temperature: number
}

/** Checks the arguments of `logProbs`. */
export function checkScoring(
  a: Qwen3VLLogProbsArgs,
  { config, tower }: ModelParts,
  op: string,
): Scoring {
  const packed = checkPacked(a, config, tower, op)
  const arranged =
    a.prefixOf === undefined ? alone(packed) : arrange(packed, a.prefixOf, config, op)
  const count = packed.tokens.length
  const places =
    a.targets === undefined ? packed.tokens.map((_, t) => t) : hostInts(a.targets, 'targets', op)
  const targets = new Int32Array(places.length)
  const rows = new Int32Array(places.length)
  for (let i = 0; i < places.length; i++) {
    const place = places[i]!
    if (!Number.isInteger(place) || place < 0 || place >= count)
      refuse(
        'ERR_VALUE',
        op,
        `targets[${i}] must be a place in tokens, from 0 to ${count - 1}, got ${place}`,
      )
    const row = arranged.before[place]!
    targets[i] = row < 0 ? -100 : packed.tokens[place]!
    rows[i] = Math.max(0, row)
  }
  return { arranged, targets, rows, temperature: a.temperature ?? 1 }
}

/** Sequences that stand alone are rows in their order. */
function alone(packed: Packed): Arranged {
  const { tokens, positions } = packed
  const before = tokens.map((_, t) => t - 1)
  const cuSeqlens = [...packed.cuSeqlens]
  for (const first of cuSeqlens) if (first < tokens.length) before[first] = -1
  return { packed, tokens, positions, rows: { cuSeqlens }, before }
}

/** Prompts, and sequences that have none, first; then those that go on after one. */
function arrange(packed: Packed, given: Ints, config: Qwen3VLConfig, op: string): Arranged {
  const { tokens, cuSeqlens, positions, deltas } = packed
  const count = cuSeqlens.length - 1
  const prefixOf = hostInts(given, 'prefixOf', op)
  if (prefixOf.length !== count)
    refuse(
      'ERR_VALUE',
      op,
      `prefixOf must have one entry a sequence, ${count}, got ${prefixOf.length}`,
    )
  const length = (s: number): number => cuSeqlens[s + 1]! - cuSeqlens[s]!
  const [first, readers]: [number[], number[]] = [[], []]
  for (let s = 0; s < count; s++) {
    const prefix = prefixOf[s]!
    if (prefix === -1) {
      first.push(s)
      continue
    }
    if (!Number.isInteger(prefix) || prefix < 0 || prefix >= s || prefixOf[prefix] !== -1)
      refuse(
        'ERR_VALUE',
        op,
        `prefixOf[${s}] must be -1 or an earlier sequence that has no prefix itself, got ${prefix}`,
      )
    if (length(prefix) === 0)
      refuse('ERR_VALUE', op, `prefixOf[${s}] is sequence ${prefix}, which is empty`)
    checkLength(length(prefix) + length(s), config.maxPositions, `sequence ${s}`, op)
    readers.push(s)
  }
  if (!readers.length) return alone(packed)
  const total = tokens.length
  const starts = new Int32Array(count)
  let at = 0
  const ends = (sequences: readonly number[]): number[] => {
    const cu = [at]
    for (const s of sequences) {
      starts[s] = at
      at += length(s)
      cu.push(at)
    }
    return cu
  }
  const rows: Rows = {
    cuSeqlens: ends(first),
    readers: {
      cuSeqlens: ends(readers),
      sharedKeys: readers.map((s) => [starts[prefixOf[s]!]!, length(prefixOf[s]!)] as const),
    },
  }
  const rowOf = new Int32Array(total)
  const before = new Int32Array(total)
  const arranged = { tokens: new Int32Array(total), positions: new Int32Array(3 * total) }
  for (let s = 0; s < count; s++) {
    const prefix = prefixOf[s]!
    const shift = prefix < 0 ? 0 : length(prefix) + deltas[prefix]!
    for (let i = 0; i < length(s); i++) {
      const [place, row] = [cuSeqlens[s]! + i, starts[s]! + i]
      rowOf[place] = row
      before[place] = row - 1
      arranged.tokens[row] = tokens[place]!
      for (let axis = 0; axis < 3; axis++)
        arranged.positions[axis * total + row] = positions[axis * total + place]! + shift
    }
    if (length(s)) before[cuSeqlens[s]!] = prefix < 0 ? -1 : starts[prefix]! + length(prefix) - 1
  }
  return { packed, ...arranged, rows, rowOf, before }
}

/** What is kept of a pass. */
export interface Kept {
  what: 'all' | 'inputs'
  /** The first layer that is kept. */
  from: number
  tower: boolean
}

/** A pass forward. */
export interface ScoredPass {
  logProbs: Tensor<'f32'>
  entropy: Tensor<'f32'>
  /** The merged tokens of the images, and of the videos. */
  merged: Tensor[]
  /** What the backward needs. */
  kept: PassRecord | undefined
}

interface PassRecord {
  final: Tensor
  scored: Scored
  decoder: DecoderRecord
  /** Of the images, and of the videos. */
  towers: TowerRecord[]
  features: FeatureRows[]
}

/** In a scope of the caller's, which disposes what is not returned. */
export function score(
  { config, tower, decoder }: ModelParts,
  { arranged, targets, rows, temperature }: Scoring,
  keep?: Kept,
): ScoredPass {
  const { packed, tokens, positions, rowOf } = arranged
  const towers: TowerRecord[] = []
  const features: Features[] = []
  const placements = place(packed, config, (vision) => {
    const pass = keep?.tower
      ? tower.pass(vision.pixelValues, vision.gridThw, keep.what)
      : { ...featuresOf(tower, vision), record: undefined }
    if (pass.record) towers.push(pass.record)
    features.push(pass)
    return pass
  }).map((placement) => ({ ...placement, at: rowOf?.[placement.at] ?? placement.at }))
  const { final, record } = decoder.run({
    tokens,
    positions,
    attend: (_, q, k, v) => attendRows(arranged.rows, q, k, v),
    placements,
    rows,
    keep,
  })
  const { scored, logProbs, entropy } = decoder.logProbs(final, targets, temperature)
  const kept = record &&
    scored && {
      final,
      scored,
      decoder: record,
      towers,
      features: featureRows(features, placements),
    }
  return { logProbs, entropy, merged: features.map(({ merged }) => merged), kept }
}

/** The rows of each feature, in its own order. */
function featureRows(
  features: readonly Features[],
  placements: readonly Placement[],
): FeatureRows[] {
  return features.map((own) => {
    const index = new Int32Array(own.merged.shape[0]!)
    for (const { at, length, features: of, from } of placements)
      if (of === own) for (let i = 0; i < length; i++) index[from + i] = at + i
    return { index, deepstack: own.deepstack.length }
  })
}

/**
 * Log-probabilities by Qwen3VL's `record`, with what their gradients need. `dispose` frees all of it.
 *
 * @example
 * ```js
 * import { openDevice, Qwen3VL } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const model = await Qwen3VL.load('Qwen3-VL-2B-Instruct', device, { dtype: 'f32' }) // a checkpoint's folder
 * const record = model.record({ tokens: [5, 6, 7], cuSeqlens: [0, 3], targets: [1, 2] })
 * const { gradients } = record.backward({ dLogProbs: device.tensor([-0.5, -0.5], [2]) })
 * console.log(gradients['model.language_model.norm.weight'].shape) // [ 64 ]
 * record.dispose()
 * model.dispose()
 * device.dispose()
 * ```
 */
export class Qwen3VLRecord implements Disposable {
  /** f32 [N], in nats: as Qwen3VL's `logProbs` returns them, to the bit. */
  readonly logProbs: Tensor<'f32'>
  /** f32 [N], in nats: as Qwen3VL's `logProbs` returns them. */
  readonly entropy: Tensor<'f32'>
  /** [M, H]: the merged tokens of the images, then of the videos; undefined without any. */
  readonly features: Tensor | undefined
  readonly #model: RecordedModel
  readonly #scoring: Scoring
  readonly #trained: Trained
  #kept: PassRecord | undefined

  /** @internal */
  constructor(
    key: typeof construct,
    model: RecordedModel,
    scoring: Scoring,
    trained: Trained,
    pass: ScoredPass,
  ) {
    if (key !== construct)
      refuse('ERR_VALUE', opName, 'a Qwen3VLRecord is made by Qwen3VL.record()')
    this.#model = model
    this.#scoring = scoring
    this.#trained = trained
    this.#kept = pass.kept
    this.logProbs = pass.logProbs
    this.entropy = pass.entropy
    const { merged } = pass
    this.features = merged.length > 1 ? concat({ tensors: merged }) : merged[0]
    Object.defineProperty(this, holds, { value: () => [this.#kept] })
  }

  /**
   * The gradients of the weights, from those of the results. It uses up what was kept, and can be called once.
   *
   * @throws P2RError ERR_SHAPE, ERR_DTYPE, ERR_DEVICE for tensors that do not fit; ERR_VALUE for names in `into` that
   *   are no weights, for `dFeatures` of a tower without gradients, and for a second call; ERR_MEMORY; ERR_DISPOSED.
   */
  backward(a: Qwen3VLRecordBackwardArgs): Held<Qwen3VLGradients> {
    checkReceiver(isObject(this) && #kept in this, 'Qwen3VLRecord', 'backward')
    a = checkArguments(a, recordBackwardNames, opName)
    const { parts, parameters } = this.#model
    checkLike(a.dLogProbs, this.logProbs, 'dLogProbs', opName)
    if (a.dEntropy !== undefined) checkLike(a.dEntropy, this.entropy, 'dEntropy', opName)
    if (a.dFeatures !== undefined) {
      if (!this.features || !this.#trained.tower)
        refuse(
          'ERR_VALUE',
          opName,
          'dFeatures needs images or videos, and weights of the tower that are trained',
        )
      checkLike(a.dFeatures, this.features, 'dFeatures', opName)
    }
    return composite(opName, () => {
      const made = scope(() => {
        const gradients = Gradients.of(parameters, this.#trained.names, a.into, opName)
        const kept = this.#kept
        if (!kept) refuse('ERR_VALUE', opName, 'the record is used up: backward can be called once')
        this.#kept = undefined
        try {
          const inputs = this.#backward(parts, kept, a, gradients)
          return { gradients: gradients.all(parameters), ...inputs }
        } finally {
          disposeAll(kept)
        }
      })
      return held(made, Object.values(made.gradients))
    })
  }

  #backward(
    { decoder, config, tower }: ModelParts,
    { final, scored, features, towers, decoder: record }: PassRecord,
    { dLogProbs, dEntropy, dFeatures }: Qwen3VLRecordBackwardArgs,
    gradients: Gradients,
  ): { dInputs?: Tensor; dPixels?: Tensor } {
    const { arranged, rows, temperature } = this.#scoring
    const { tokens, rowOf } = arranged
    const { lowest, inputs, below } = this.#trained
    const { dFinal } = scope(() => {
      const given = { final, entropy: this.entropy, temperature, ...scored }
      const dFinal = decoder.logProbsBackward(given, { dLogProbs, dEntropy }, gradients)
      return { dFinal, gradients }
    })
    const pass = {
      rows,
      of: tokens.length,
      features: this.#trained.tower ? features : [],
      lowest,
      attend: (_: number, q: Tensor, k: Tensor, v: Tensor) => attendRows(arranged.rows, q, k, v),
      attendBackward: (heads: AttendedHeads, dOut: Tensor) =>
        attendRowsBackward(arranged.rows, heads, dOut),
    }
    const { d, deepstack } = decoder.backward(record, dFinal, pass, gradients)
    dFinal.dispose()
    if (!below) return {}
    // Rows of placeholders hold features in place of embeddings.
    const { imageToken, videoToken } = config
    const isText = (token: number) => token !== imageToken && token !== videoToken
    scope(() => {
      const text = Int32Array.from(tokens.keys()).filter((row) => isText(tokens[row]!))
      const dText = text.length === tokens.length ? d : gatherRows({ x: d, index: text })
      decoder.embedBackward(dText, tokens.filter(isText), gradients)
      return gradients
    })
    const dPixels: Tensor[] = []
    let from = 0
    for (const [f, { index }] of pass.features.entries()) {
      const made = scope(() => {
        const own = gatherRows({ x: d, index })
        const extra = dFeatures?.slice(from, from + index.length)
        const typed = (x: Tensor): Tensor => (x.dtype === tower.dtype ? x : x.cast(tower.dtype))
        const merged = typed(own)
        const grads = {
          merged: extra ? add({ x: merged, y: extra }) : merged,
          deepstack: deepstack[f]!.map(typed),
        }
        const dX = tower.passBackward(towers[f]!, grads, gradients.under(towerPrefix))
        return { ...(inputs && { dX }), gradients }
      })
      if (made.dX) dPixels.push(made.dX)
      from += index.length
    }
    if (!inputs) return {}
    return {
      dInputs: rowOf ? gatherRows({ x: d, index: rowOf }) : d,
      ...(dPixels.length && {
        dPixels: dPixels.length > 1 ? concat({ tensors: dPixels }) : dPixels[0]!,
      }),
    }
  }

  /** Frees the results and what was kept. A second call does nothing. */
  dispose(): void {
    checkReceiver(isObject(this) && #kept in this, 'Qwen3VLRecord', 'dispose')
    disposeAll([this.logProbs, this.entropy, this.features, this.#kept])
    this.#kept = undefined
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

/** A pass forward that keeps what its gradients need. */
export function recordOf(model: RecordedModel, a: Qwen3VLRecordArgs): Qwen3VLRecord {
  const { parts, parameters } = model
  const scoring = checkScoring(a, parts, opName)
  const checkpoint = choice(a.checkpoint ?? 'none', checkpoints, 'checkpoint', opName)
  const inputs = a.inputs === undefined ? false : checkBoolean(a.inputs, 'inputs', opName)
  const names = trainableOf(parameters.keys(), a.trainable, opName)
  const trained = trainedOf(names, inputs, parts.config)
  const what = checkpoint === 'none' ? 'all' : 'inputs'
  return composite(opName, () =>
    scope(() => {
      const pass = score(parts, scoring, { what, from: trained.lowest, tower: trained.tower })
      return new Qwen3VLRecord(construct, model, scoring, trained, pass)
    }),
  )
}

/** The model that a record is of. */
export interface RecordedModel {
  parts: ModelParts
  parameters: ReadonlyMap<string, Tensor>
}

/** Whose gradients are wanted, and how far back they reach. */
interface Trained {
  names: ReadonlySet<string>
  inputs: boolean
  /** The first layer that is needed. */
  lowest: number
  /** Whether the first layer's input is. */
  below: boolean
  tower: boolean
}

function trainedOf(names: ReadonlySet<string>, inputs: boolean, config: Qwen3VLConfig): Trained {
  let tower = inputs
  let below = inputs
  let lowest = config.layers
  for (const name of names) {
    if (name.startsWith(towerPrefix)) tower = true
    if (name.endsWith('.embed_tokens.weight')) below = true
    const layer = /\.language_model\.layers\.(\d+)\./.exec(name)?.[1]
    if (layer !== undefined) lowest = Math.min(lowest, Number(layer))
  }
  below ||= tower
  return { names, inputs, tower, below, lowest: below ? 0 : lowest }
}

function checkLike(d: Tensor, like: Tensor, name: string, op: string): void {
  handleOf(d, name, op)
  if (String(d.shape) !== String(like.shape))
    refuse(
      'ERR_SHAPE',
      op,
      `${name} must be [${like.shape.join(', ')}], got [${d.shape.join(', ')}]`,
    )
  if (d.dtype !== like.dtype)
    refuse('ERR_DTYPE', op, `${name} must be ${like.dtype}, got ${d.dtype}`)
}
