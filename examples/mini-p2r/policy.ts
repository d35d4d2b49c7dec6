/**
 * The two policies. The Perceiver takes the overview and the question and outputs a location in
 * two tokens: one of 8 x 8 coarse squares, then one of the 4 x 4 cells in it. The Reasoner
 * takes the question and the evidence, which are the cell at full resolution and a thumbnail of the
 * image with the cell's box drawn on it, and answers with a digit.
 *
 * Both give token log-probabilities at a temperature and take gradients with respect to them, so
 * that supervised training and policy optimisation go through the same code.
 */
import {
  add,
  type Device,
  gatherRows,
  gatherRowsBackward,
  type Ints,
  meanPool,
  meanPoolBackward,
  type PixelBox,
  pixelValues,
  type Region,
  sample,
  type Tensor,
  tokenLogProbs,
  tokenLogProbsBackward,
} from 'p2r-kernels'
import { Rng } from './rng.js'
import { CELL, LATTICE, OVERVIEW, QUESTIONS, THUMBNAIL } from './scene.js'
import { type Tensors, Vit, type VitState } from './vit.js'

const COARSE = 8
const FINE = LATTICE / COARSE
/** Images are dark: these normalise them to about zero mean and unit range. */
const MEAN = [0.25, 0.25, 0.25] as const
const STD = [0.4, 0.4, 0.4] as const
const PATCHES = { temporalPatchSize: 1, mergeSize: 1, filter: 'box', mean: MEAN, std: STD } as const
const HEAD_GAIN = 0.3

/** Two location tokens a rollout. */
export interface Locations {
  coarse: Int32Array
  fine: Int32Array
}

/** The cell (row * 32 + column) that the i-th pair of location tokens names. */
export function cellOf({ coarse, fine }: Locations, i: number): number {
  const [square, part] = [coarse[i] as number, fine[i] as number]
  const row = Math.floor(square / COARSE) * FINE + Math.floor(part / FINE)
  return row * LATTICE + (square % COARSE) * FINE + (part % FINE)
}

/** The location tokens that name cells. */
export function locationsOf(cells: Ints): Locations {
  const each = (f: (row: number, column: number) => number): Int32Array =>
    Int32Array.from(cells, (cell) => f(Math.floor(cell / LATTICE), cell % LATTICE))
  return {
    coarse: each((row, column) => Math.floor(row / FINE) * COARSE + Math.floor(column / FINE)),
    fine: each((row, column) => (row % FINE) * FINE + (column % FINE)),
  }
}

export interface Scored {
  /** Packed: each rollout's tokens together. */
  logProbs: Tensor
  cuSeqlens: Int32Array
  /** The gradients of all parameters, given that of logProbs. */
  backward(dLogProbs: Tensor): Tensors
}

interface Seen {
  vit: VitState
  /** Logits of the coarse token, [images, 64]. */
  coarse: Tensor
}

export class Perceiver {
  readonly #device: Device
  readonly #vit: Vit

  constructor(device: Device, seed: number) {
    const rng = new Rng(seed, 10)
    const tokens = COARSE * COARSE
    const inputs = 3 * (OVERVIEW / COARSE) ** 2
    const size = { width: 48, heads: 3, depth: 2 }
    this.#device = device
    this.#vit = new Vit(device, { tokens, inputs, ...size, questions: QUESTIONS }, rng)
    this.#vit.addLinear('coarse', size.width, 1, rng, HEAD_GAIN)
    this.#vit.addLinear('fine', size.width, FINE * FINE, rng, HEAD_GAIN)
  }

  get params(): Tensors {
    return this.#vit.params
  }

  /** overviews: u8 [images * 128, 128, 3], stacked vertically; one question per image. */
  see(overviews: Tensor, questions: Ints): Seen {
    const regions = Array.from(questions, (_, i) => tile(OVERVIEW, i))
    const patchSize = OVERVIEW / COARSE
    const { pixelValues: pixels } = pixelValues({
      image: overviews,
      regions,
      patchSize,
      ...PATCHES,
    })
    const vit = this.#vit.forward(pixels, questions)
    const coarse = this.#vit.linear('coarse', vit.out)
    return { vit, coarse: coarse.reshape([questions.length, COARSE * COARSE]) }
  }

  /** One rollout for each entry of `images`, the index of its image; temperature 0 is greedy. */
  async act(seen: Seen, images: Ints, temperature: number, seeds: Rng): Promise<Locations> {
    const draw = async (logits: Tensor): Promise<Int32Array> =>
      ints(await sample({ logits, temperature, seed: seeds.uint32() }).read())
    const coarse = await draw(gatherRows({ x: seen.coarse, index: images }))
    const fine = await draw(this.#fine(seen, images, coarse).logits)
    return { coarse, fine }
  }

  /** log p of each rollout's two tokens. */
  score(seen: Seen, images: Ints, locations: Locations, temperature: number): Scored {
    const count = images.length
    const target = (tokens: Int32Array): Tensor => this.#device.tensor(tokens, [count], 'i32')
    const coarse = {
      logits: gatherRows({ x: seen.coarse, index: images }),
      targets: target(locations.coarse),
      temperature,
    }
    const { hidden, rows, logits } = this.#fine(seen, images, locations.coarse)
    const fine = { logits, targets: target(locations.fine), temperature }
    const scored = { coarse: tokenLogProbs(coarse), fine: tokenLogProbs(fine) }

    // All coarse tokens, then all fine ones; a sequence is a rollout's pair of them.
    const both = this.#device.zeros([2 * count])
    both.slice(0, count).copyFrom(scored.coarse.logProbs as Tensor<'f32'>)
    both.slice(count).copyFrom(scored.fine.logProbs as Tensor<'f32'>)
    const order = Int32Array.from({ length: 2 * count }, (_, i) => (i % 2) * count + (i >> 1))

    const backward = (dLogProbs: Tensor): Tensors => {
      const d = gatherRowsBackward({ dOut: dLogProbs, index: order, rows: 2 * count })
      const dCoarse = tokenLogProbsBackward({
        ...coarse,
        stats: scored.coarse.stats,
        dLogProbs: d.slice(0, count),
      })
      const dFine = tokenLogProbsBackward({
        ...fine,
        stats: scored.fine.stats,
        dLogProbs: d.slice(count),
      })
      const heads: Tensors = {}
      const tokens = seen.vit.out.shape[0] as number
      const dHidden = this.#vit.linearBackward('fine', hidden, dFine, heads)
      const dFromFine = gatherRowsBackward({ dOut: dHidden, index: rows, rows: tokens })
      const dSquares = gatherRowsBackward({
        dOut: dCoarse,
        index: images,
        rows: seen.coarse.shape[0] as number,
      })
      const dFromCoarse = this.#vit.linearBackward(
        'coarse',
        seen.vit.out,
        dSquares.reshape([tokens, 1]),
        heads,
      )
      const dOut = add({ x: dFromCoarse, y: dFromFine })
      return { ...heads, ...this.#vit.backward(seen.vit, dOut) }
    }
    const cuSeqlens = Int32Array.from({ length: count + 1 }, (_, i) => 2 * i)
    return { logProbs: gatherRows({ x: both, index: order }), cuSeqlens, backward }
  }

  /** Logits of the fine token, computed from the hidden state of the coarse token's square. */
  #fine(
    seen: Seen,
    images: Ints,
    coarse: Int32Array,
  ): { hidden: Tensor; rows: Int32Array; logits: Tensor } {
    const square = (image: number, i: number): number => image * COARSE * COARSE + (coarse[i] ?? 0)
    const rows = Int32Array.from(images, square)
    const hidden = gatherRows({ x: seen.vit.out, index: rows })
    return { hidden, rows, logits: this.#vit.linear('fine', hidden) }
  }
}

/** The inputs of a Reasoner. */
export interface Evidence {
  /** Cells at full resolution, stacked vertically: u8 [count * 32, 32, 3]. */
  crops: Tensor
  /** Thumbnails of the whole image, likewise, without boxes: a pixel is a cell. */
  thumbnails: Tensor
  /** Which cell each crop shows. */
  cells: Ints
}

interface Read {
  vit: VitState
  /** Logits of the answer, [evidences, 10]. */
  logits: Tensor
}

export class Reasoner {
  static readonly #PATCH = 8
  /** Side of the annotated image after resampling: four patches. */
  static readonly #ANNOTATED = 16
  static readonly #ANSWERS = 10
  readonly #device: Device
  readonly #vit: Vit

  constructor(device: Device, seed: number) {
    const rng = new Rng(seed, 11)
    const patch = Reasoner.#PATCH
    const tokens = (Reasoner.#ANNOTATED / patch) ** 2 + (CELL / patch) ** 2
    const size = { width: 64, heads: 4, depth: 2 }
    this.#device = device
    this.#vit = new Vit(
      device,
      { tokens, inputs: 3 * patch ** 2, ...size, questions: QUESTIONS },
      rng,
    )
    this.#vit.addLinear('answer', size.width, Reasoner.#ANSWERS, rng, HEAD_GAIN)
  }

  get params(): Tensors {
    return this.#vit.params
  }

  /** As the paper has it, the annotated image comes first and then the crop. */
  read({ crops, thumbnails, cells }: Evidence, questions: Ints): Read {
    const side = Reasoner.#ANNOTATED
    const regions = Array.from(cells).flatMap((_, i): Region[] => [
      { ...tile(THUMBNAIL, i), height: side, width: side },
      { ...tile(CELL, i), image: 1, overlay: false },
    ])
    const { pixelValues: pixels } = pixelValues({
      images: [thumbnails, crops],
      regions,
      overlay: { boxes: Array.from(cells, thumbnailBox), colors: [[255, 255, 0]], width: 1 },
      patchSize: Reasoner.#PATCH,
      ...PATCHES,
    })
    const vit = this.#vit.forward(pixels, questions)
    const pooled = meanPool({ x: vit.out, cuSeqlens: vit.cuSeqlens })
    return { vit, logits: this.#vit.linear('answer', pooled) }
  }

  /** One answer for each entry of `evidences`; temperature 0 is greedy. */
  async act(read: Read, evidences: Ints, temperature: number, seeds: Rng): Promise<Int32Array> {
    const logits = gatherRows({ x: read.logits, index: evidences })
    return ints(await sample({ logits, temperature, seed: seeds.uint32() }).read())
  }

  /** log p of each answer, a sequence of one token. */
  score(read: Read, evidences: Ints, answers: Ints, temperature: number): Scored {
    const count = evidences.length
    const scored = {
      logits: gatherRows({ x: read.logits, index: evidences }),
      targets: this.#device.tensor(Int32Array.from(answers), [count], 'i32'),
      temperature,
    }
    const { logProbs, stats } = tokenLogProbs(scored)
    const backward = (dLogProbs: Tensor): Tensors => {
      const { vit } = read
      const rows = read.logits.shape[0] as number
      const dAnswers = tokenLogProbsBackward({ ...scored, stats, dLogProbs })
      const dLogits = gatherRowsBackward({ dOut: dAnswers, index: evidences, rows })
      const head: Tensors = {}
      // Recomputed: one small row per image, so it is not kept from the forward pass.
      const pooled = meanPool({ x: vit.out, cuSeqlens: vit.cuSeqlens })
      const dPooled = this.#vit.linearBackward('answer', pooled, dLogits, head)
      const dOut = meanPoolBackward({ dOut: dPooled, cuSeqlens: vit.cuSeqlens })
      return { ...head, ...this.#vit.backward(vit, dOut) }
    }
    const cuSeqlens = Int32Array.from({ length: count + 1 }, (_, i) => i)
    return { logProbs, cuSeqlens, backward }
  }
}

/** The i-th of vertically stacked square images, without resizing. */
function tile(side: number, i: number): Region {
  return { box: [0, i * side, side, (i + 1) * side], height: side, width: side }
}

/**
 * The outline around a cell in the i-th thumbnail. It is one pixel wide, just outside the cell, and
 * clipped to its own thumbnail, since others are stacked above and below.
 */
function thumbnailBox(cell: number, i: number): PixelBox {
  const [x, y] = [cell % LATTICE, Math.floor(cell / LATTICE)]
  const last = THUMBNAIL - 1
  const top = i * THUMBNAIL
  return [x - 1, top + Math.max(0, y - 1), x + 1, top + Math.min(last, y + 1)]
}

function ints(data: ArrayLike<number>): Int32Array {
  return Int32Array.from(data)
}
