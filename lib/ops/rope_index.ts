import {
  checkArguments,
  checkInt32,
  checkPositive,
  hostInts,
  hostMemory,
  type Names,
} from '../arguments.js'
import { refuse } from '../errors.js'
import { checkGrids, type Grid } from '../grid.js'
import type { Ints } from '../tensor.js'

/** The ids that a model's images and videos stand for, from its config.json. */
export interface RopeIndexConfig {
  /** The id of an image's placeholder; one stands for each merged patch. */
  imageToken: number
  /** The id of a video's placeholder; one stands for each merged patch. */
  videoToken: number
  /** The id before each run of placeholders. It counts as text, so the positions do not depend on it. */
  visionStartToken?: number
  /** Side, in patches, of the square that becomes one merged patch. */
  mergeSize: number
}

/** The arguments of `ropeIndex`. */
export interface RopeIndexArgs {
  /** [T] token ids of packed sequences. */
  tokens: Ints
  /** Where the B sequences begin and end: 0 = c₀ ≤ c₁ ≤ … ≤ c_B = T. */
  cuSeqlens: Ints
  /**
   * The patches [t, h, w] of the images, in the order of their placeholders.
   *
   * @default none
   */
  imageGrids?: readonly Grid[]
  /**
   * The patches [t, h, w] of the videos, in the order of their placeholders; each frame has a run of placeholders
   * of its own.
   *
   * @default none
   */
  videoGrids?: readonly Grid[]
  /** What the placeholders are. */
  config: RopeIndexConfig
}

/** The results of `ropeIndex`. */
export interface RopeIndexResult {
  /** [3, T], row by row: each token's time, row and column. */
  positions: Int32Array
  /** [B]: what is added to the number of tokens before it to get the position of a token that follows. */
  deltas: Int32Array
}

const names: Names<RopeIndexArgs> = {
  tokens: true,
  cuSeqlens: true,
  imageGrids: true,
  videoGrids: true,
  config: true,
}
const configNames: Names<RopeIndexConfig> = {
  imageToken: true,
  videoToken: true,
  visionStartToken: true,
  mergeSize: true,
}

/**
 * The positions of Qwen3-VL's rotary embedding, for each sequence from 0. Text counts on all three axes at
 * once. An image of h x w merged patches that begins at position p has the rows p ... p + h - 1 and the columns p ...
 * p + w - 1, and the text after it goes on at p + max(h, w). A frame of a video counts as an image: time is
 * told by the text between the frames. Source: get_rope_index of Hugging Face's Qwen3-VL.
 *
 * A token that is decoded after a sequence of n tokens has n + delta on all three axes.
 *
 * @throws P2RError ERR_VALUE for tokens, grids or cuSeqlens that break their rule, and for placeholders that are not
 *   as many as the merged patches.
 * @example
 * ```js
 * import { ropeIndex } from 'p2r-kernels'
 *
 * const { positions, deltas } = ropeIndex({
 *   tokens: [7, 1, 1, 1, 1, 8], // an image of 2 x 2 merged patches between two words
 *   cuSeqlens: [0, 6],
 *   imageGrids: [[1, 4, 4]],
 *   config: { imageToken: 1, videoToken: 2, mergeSize: 2 },
 * })
 * console.log([...positions.subarray(6, 12)], [...deltas]) // [ 0, 1, 1, 2, 2, 3 ] [ -2 ]
 * ```
 */
export function ropeIndex(a: RopeIndexArgs): RopeIndexResult {
  const op = 'ropeIndex'
  a = checkArguments(a, names, op)
  return ropeIndexAs(op, a)
}

/** @internal For operations that contain it, under their name. */
export function ropeIndexAs(op: string, a: RopeIndexArgs): RopeIndexResult {
  const { imageToken, videoToken, visionStartToken, mergeSize } = checkArguments(
    a.config,
    configNames,
    op,
    'config',
  )
  checkInt32(imageToken, 0, 'config.imageToken', op)
  checkInt32(videoToken, 0, 'config.videoToken', op)
  if (visionStartToken !== undefined) checkInt32(visionStartToken, 0, 'config.visionStartToken', op)
  checkPositive(mergeSize, 'config.mergeSize', op)
  const tokens = hostInts(a.tokens, 'tokens', op)
  const bounds = checkCuSeqlens(a.cuSeqlens, tokens.length, op)
  const pads: Record<number, Placeholders> = {
    [videoToken]: new Placeholders('video', grids(a.videoGrids ?? [], 'videoGrids'), mergeSize),
    [imageToken]: new Placeholders('image', grids(a.imageGrids ?? [], 'imageGrids'), mergeSize),
  }
  const positions = hostMemory(() => new Int32Array(3 * tokens.length), op)
  const [time, row, column] = [0, 1, 2].map((axis) =>
    positions.subarray(axis * tokens.length, (axis + 1) * tokens.length),
  ) as [Int32Array, Int32Array, Int32Array]
  const deltas = new Int32Array(bounds.length - 1)
  for (let s = 0; s < deltas.length; s++) {
    const [begin, end] = [bounds[s]!, bounds[s + 1]!]
    let next = 0
    for (let at = begin; at < end; ) {
      const token = checkInt32(tokens[at], 0, `tokens[${at}]`, op)
      const kind = pads[token]
      if (!kind) {
        time[at] = next
        row[at] = next
        column[at] = next
        next++
        at++
        continue
      }
      const [t, h, w] = kind.take(tokens, token, at, end, op)
      for (let frame = 0; frame < t; frame++)
        for (let y = 0; y < h; y++)
          for (let x = 0; x < w; x++) {
            time[at] = next + frame
            row[at] = next + y
            column[at] = next + x
            at++
          }
      next += Math.max(t, h, w)
    }
    deltas[s] = next - (end - begin)
  }
  for (const kind of Object.values(pads)) kind.finish(op)
  return { positions, deltas }

  function grids(given: readonly Grid[], name: string): readonly Grid[] {
    return checkGrids(given, mergeSize, op, name)
  }
}

/** The images, or the videos frame by frame, whose placeholders are met one after another. */
class Placeholders {
  readonly #what: 'image' | 'video'
  readonly #merged: readonly Grid[]
  #at = 0
  #frame = 0

  constructor(what: 'image' | 'video', grids: readonly Grid[], mergeSize: number) {
    this.#what = what
    this.#merged = grids.map(([t, h, w]) => [t, h / mergeSize, w / mergeSize])
    this.#skipEmpty()
  }

  /** The merged patches of the image or frame whose placeholders begin at `at`; there must be as many. */
  take(tokens: Float64Array, token: number, at: number, end: number, op: string): Grid {
    const given = this.#merged[this.#at]
    if (!given)
      refuse(
        'ERR_VALUE',
        op,
        `tokens[${at}] is ${token}, the placeholder of ${this.#what}s, but there are none left: got ${this.#merged.length}`,
      )
    const [t, h, w] = given
    const whole = this.#what === 'image'
    const wanted = whole ? t * h * w : h * w
    let count = 0
    while (count < wanted && at + count < end && tokens[at + count] === token) count++
    if (count < wanted) {
      const name = `${whole ? '' : `frame ${this.#frame} of `}${this.#what} ${this.#at}`
      refuse(
        'ERR_VALUE',
        op,
        `${name} needs ${wanted} placeholders (${token}) from tokens[${at}] on, got ${count}`,
      )
    }
    if (whole || ++this.#frame === t) {
      this.#at++
      this.#skipEmpty()
    }
    return [whole ? t : 1, h, w]
  }

  finish(op: string): void {
    const { length } = this.#merged
    if (this.#at < length)
      refuse(
        'ERR_VALUE',
        op,
        `tokens must have placeholders of ${length} ${this.#what}s, got those of ${this.#at}`,
      )
  }

  #skipEmpty(): void {
    this.#frame = 0
    while (this.#merged[this.#at]?.includes(0)) this.#at++
  }
}

/** @internal cuSeqlens of T tokens on the host: 0 = c₀ ≤ c₁ ≤ … = T. */
export function checkCuSeqlens(cuSeqlens: Ints, tokens: number, op: string): Float64Array {
  const list = hostInts(cuSeqlens, 'cuSeqlens', op)
  let before = 0
  for (let i = 0; i < list.length; i++) {
    if (!Number.isInteger(list[i]) || list[i]! < before || (i === 0 && list[i] !== 0))
      refuse('ERR_VALUE', op, `cuSeqlens must start at 0 and not decrease, got ${list[i]} at ${i}`)
    before = list[i]!
  }
  if (list.length < 1 || before !== tokens)
    refuse('ERR_VALUE', op, `cuSeqlens must end at ${tokens}, the number of tokens, got ${before}`)
  return list
}
