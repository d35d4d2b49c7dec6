import type { Device, Ints, Tensor } from 'p2r-kernels'
import type { Evidence } from './policy.js'
import type { Rng } from './rng.js'
import { type Canvases, CELL, OVERVIEW, QUESTIONS, type Question, THUMBNAIL } from './scene.js'

/** Questions in random order without replacement, reshuffled after each epoch. */
export class Shuffled {
  readonly #canvases: Canvases
  readonly #rng: Rng
  readonly #order: Int32Array
  #next = 0

  constructor(canvases: Canvases, rng: Rng) {
    this.#canvases = canvases
    this.#rng = rng
    this.#order = Int32Array.from({ length: QUESTIONS * canvases.count }, (_, i) => i)
    rng.shuffle(this.#order)
  }

  take(count: number): Question[] {
    return Array.from({ length: count }, () => {
      if (this.#next === this.#order.length) {
        this.#rng.shuffle(this.#order)
        this.#next = 0
      }
      return this.#canvases.question(this.#order[this.#next++] as number)
    })
  }
}

/** The overviews of the questions' canvases, stacked vertically, as a Perceiver takes them. */
export function overviewsOf(
  device: Device,
  canvases: Canvases,
  questions: readonly Question[],
): Tensor {
  const pixels = questions.map(({ canvas }) => canvases.overview(canvas).pixels)
  return stack(device, pixels, OVERVIEW)
}

/** The evidence of one cell per question. */
export function evidenceOf(
  device: Device,
  canvases: Canvases,
  questions: readonly Question[],
  cells: Ints,
): Evidence {
  const crops = questions.map(({ canvas }, i) => canvases.crop(canvas, cells[i] as number))
  const thumbnails = questions.map(({ canvas }) => canvases.overview(canvas).thumbnail)
  return {
    crops: stack(device, crops, CELL),
    thumbnails: stack(device, thumbnails, THUMBNAIL),
    cells,
  }
}

/** The host's memory of `stack`: an upload copies it, and fresh memory at each step costs a page fault per 4 KB. */
let staging = new Uint8Array(0)

/** Square RGB images stacked vertically, in one upload. */
export function stack(device: Device, images: readonly Uint8Array[], side: number): Tensor {
  const size = 3 * side * side
  if (staging.length < images.length * size) staging = new Uint8Array(images.length * size)
  for (const [i, image] of images.entries()) staging.set(image, i * size)
  return device.tensor(
    staging.subarray(0, images.length * size),
    [images.length * side, side, 3],
    'u8',
  )
}

/** 0 .. count - 1, each `times` times in a row. */
export function repeated(count: number, times: number): Int32Array {
  return Int32Array.from({ length: count * times }, (_, i) => Math.floor(i / times))
}

export function mean(values: ArrayLike<number>): number {
  let sum = 0
  for (let i = 0; i < values.length; i++) sum += values[i] as number
  return values.length === 0 ? 0 : sum / values.length
}
