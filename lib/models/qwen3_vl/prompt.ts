/**
 * Packed token ids and the images and videos among them: checked against the model, their positions, and where the
 * tower's features belong.
 */
import { checkArguments, hostInts, type Names } from '../../arguments.js'
import { refuse } from '../../errors.js'
import { checkGrids, type Grid } from '../../grid.js'
import { checkCuSeqlens, ropeIndexAs } from '../../ops/rope_index.js'
import { scope } from '../../scope.js'
import { handleOf, type Ints, type Tensor } from '../../tensor.js'
import type { VisionTower } from '../../vision/tower.js'
import type { Qwen3VLConfig } from './config.js'
import type { Features, Placement } from './decoder.js'

/** The patches of images or videos, as `pixelValues` gives them. */
export interface Vision {
  /** [P, 3 · temporalPatchSize · patchSize²]: the patches of all, one after another. */
  pixelValues: Tensor
  /** The patches [t, h, w] of each, P = Σ t·h·w in all. */
  gridThw: readonly Grid[]
}

/** What stands in a model's packed sequences. */
export interface PackedTokens {
  /** [T] token ids, one placeholder a merged patch among them. */
  tokens: Ints
  /** Where the B sequences begin and end: 0 = c₀ ≤ c₁ ≤ … ≤ c_B = T. */
  cuSeqlens: Ints
  /**
   * The images, in the order of their placeholders.
   * @default none
   */
  images?: Vision
  /**
   * The videos, in the order of their placeholders.
   * @default none
   */
  videos?: Vision
}

export const packedNames: Names<PackedTokens> = {
  tokens: true,
  cuSeqlens: true,
  images: true,
  videos: true,
}
const visionNames: Names<Vision> = { pixelValues: true, gridThw: true }

/** Checked tokens with their positions. */
export interface Packed {
  tokens: Int32Array
  cuSeqlens: Int32Array
  positions: Int32Array
  deltas: Int32Array
  images?: Vision | undefined
  videos?: Vision | undefined
}

export function checkPacked(
  a: PackedTokens,
  config: Qwen3VLConfig,
  tower: VisionTower,
  op: string,
): Packed {
  const tokens = checkTokens(a.tokens, 'tokens', config.vocabSize, op)
  const cuSeqlens = Int32Array.from(checkCuSeqlens(a.cuSeqlens, tokens.length, op))
  for (let s = 1; s < cuSeqlens.length; s++)
    checkLength(cuSeqlens[s]! - cuSeqlens[s - 1]!, config.maxPositions, `sequence ${s - 1}`, op)
  const images = checkVision(a.images, 'images', tower, op)
  const videos = checkVision(a.videos, 'videos', tower, op)
  const { positions, deltas } = ropeIndexAs(op, {
    tokens,
    cuSeqlens,
    imageGrids: images?.gridThw ?? [],
    videoGrids: videos?.gridThw ?? [],
    config: {
      imageToken: config.imageToken,
      videoToken: config.videoToken,
      mergeSize: tower.config.mergeSize,
    },
  })
  return { tokens, cuSeqlens, positions, deltas, images, videos }
}

/** Token ids of the model's vocabulary. */
export function checkTokens(list: Ints, name: string, vocabSize: number, op: string): Int32Array {
  const ids = hostInts(list, name, op)
  for (let i = 0; i < ids.length; i++)
    if (!Number.isInteger(ids[i]) || ids[i]! < 0 || ids[i]! >= vocabSize)
      refuse(
        'ERR_VALUE',
        op,
        `${name}[${i}] must be a token id from 0 to ${vocabSize - 1}, got ${ids[i]}`,
      )
  return Int32Array.from(ids)
}

/** A sequence within the model's context. */
export function checkLength(length: number, most: number, what: string, op: string): void {
  if (length > most)
    refuse(
      'ERR_VALUE',
      op,
      `${what} has ${length} tokens, more than the model's context of ${most}`,
    )
}

function checkVision(
  vision: Vision | undefined,
  name: string,
  tower: VisionTower,
  op: string,
): Vision | undefined {
  if (vision === undefined) return undefined
  vision = checkArguments(vision, visionNames, op, name)
  const { pixelValues, gridThw } = vision
  handleOf(pixelValues, `${name}.pixelValues`, op)
  const { mergeSize, patchSize, temporalPatchSize } = tower.config
  const grids = checkGrids(gridThw, mergeSize, op, `${name}.gridThw`)
  const patches = grids.reduce((sum, [t, h, w]) => sum + t * h * w, 0)
  const width = 3 * temporalPatchSize * patchSize ** 2
  const { shape } = pixelValues
  if (shape.length !== 2 || shape[0] !== patches || shape[1] !== width)
    refuse(
      'ERR_SHAPE',
      op,
      `${name}.pixelValues must be [${patches}, ${width}] for these grids, got [${shape.join(', ')}]`,
    )
  return { pixelValues, gridThw: grids }
}

/** What a tower makes of images or videos. */
export function featuresOf(tower: VisionTower, { pixelValues, gridThw }: Vision): Features {
  return scope(() => {
    const { merged, deepstack } = tower.encode({ pixelValues, gridThw })
    return { merged, deepstack }
  })
}

/** What `encode` makes of the images and videos, and the rows of tokens that it stands in for. */
export function place(
  packed: Packed,
  config: Qwen3VLConfig,
  encode: (vision: Vision) => Features,
): Placement[] {
  const kinds = new Map([
    [config.imageToken, { features: packed.images && encode(packed.images), from: 0 }],
    [config.videoToken, { features: packed.videos && encode(packed.videos), from: 0 }],
  ])
  const { tokens } = packed
  const placements: Placement[] = []
  for (let at = 0; at < tokens.length; ) {
    const kind = kinds.get(tokens[at]!)
    let end = at + 1
    while (kind && tokens[end] === tokens[at]) end++
    if (kind?.features) {
      placements.push({ at, length: end - at, features: kind.features, from: kind.from })
      kind.from += end - at
    }
    at = end
  }
  return placements
}
