/** What the model sees and reads: patches of overviews and crops, and packed sequences of images, questions, completions. */
import {
  type Device,
  type Grid,
  parseBoxes,
  pixelValues,
  type Region,
  type Tensor,
  type Vision,
} from 'p2r-kernels'
import { stack } from '../mini-p2r/batch.js'
import { type Canvases, CELL, LATTICE, OVERVIEW } from '../mini-p2r/scene.js'
import { MERGE, PATCH, PIXELS } from './model.js'
import { imageTokens, questionTokens, type Role, textOf } from './vocabulary.js'

/** Side of a crop as the model sees it: twice a cell's. */
const CROP = 2 * CELL
const PATCHES = { patchSize: PATCH, temporalPatchSize: 1, mergeSize: MERGE, ...PIXELS } as const

/** A box in cells of the lattice, half open. */
export interface Cells {
  left: number
  top: number
  right: number
  bottom: number
}

export function cellsOf(cell: number): Cells {
  const [left, top] = [cell % LATTICE, Math.floor(cell / LATTICE)]
  return { left, top, right: left + 1, bottom: top + 1 }
}

const known = new Map<string, Cells | undefined>()

/** The box in a Perceiver's text; undefined where `parseBoxes` finds none, or more than one. */
export function boxIn(tokens: readonly number[]): Cells | undefined {
  const text = textOf(tokens)
  if (!known.has(text)) {
    const boxes = parseBoxes(text)
    const [left, top, right, bottom] = (boxes[0]?.bbox2d ?? []).map((x) => (x * LATTICE) / 1000)
    const cells = { left, top, right, bottom } as Cells
    known.set(text, boxes.length === 1 ? cells : undefined)
  }
  return known.get(text)
}

/** A canvas's overview, or a part of the canvas at full resolution. */
export interface View {
  canvas: number
  cells?: Cells
}

/** The patches of views, in their order. Regions are cut and resampled by the library. */
export function look(device: Device, canvases: Canvases, views: readonly View[]): Vision {
  const overviews: Uint8Array[] = []
  const crops: Uint8Array[] = []
  const images: Tensor<'u8'>[] = []
  const placed: { of: 'overviews' | 'crops' | 'images'; at: number }[] = []
  for (const { canvas, cells } of views) {
    if (!cells) {
      placed.push({ of: 'overviews', at: overviews.push(canvases.overview(canvas).pixels) - 1 })
      continue
    }
    const { left, top, right, bottom } = cells
    if (right === left + 1 && bottom === top + 1) {
      const crop = canvases.crop(canvas, top * LATTICE + left)
      placed.push({ of: 'crops', at: crops.push(crop) - 1 })
      continue
    }
    placed.push({ of: 'images', at: images.push(area(device, canvases, canvas, cells)) - 1 })
  }
  const stacks: Tensor<'u8'>[] = []
  const put = (list: readonly Uint8Array[], side: number): number =>
    list.length ? stacks.push(stack(device, list, side) as Tensor<'u8'>) - 1 : -1
  const first = { overviews: put(overviews, OVERVIEW), crops: put(crops, CELL) }
  const regions = placed.map(({ of, at }, i): Region => {
    if (of === 'overviews')
      return {
        image: first.overviews,
        box: [0, at * OVERVIEW, OVERVIEW, (at + 1) * OVERVIEW],
        height: OVERVIEW,
        width: OVERVIEW,
      }
    const size = { height: CROP, width: CROP }
    if (of === 'crops')
      return { image: first.crops, box: [0, at * CELL, CELL, (at + 1) * CELL], ...size }
    const { left, top, right, bottom } = (views[i] as Required<View>).cells
    const box = [0, 0, (right - left) * CELL, (bottom - top) * CELL] as const
    return { image: stacks.length + at, box, ...size }
  })
  const { pixelValues: patches, gridThw } = pixelValues({
    images: [...stacks, ...images],
    regions,
    ...PATCHES,
  })
  return { pixelValues: patches, gridThw }
}

/** Some cells of a canvas as an image. */
function area(device: Device, canvases: Canvases, canvas: number, cells: Cells): Tensor<'u8'> {
  const { left, top, right, bottom } = cells
  const [width, height] = [(right - left) * CELL, (bottom - top) * CELL]
  const pixels = new Uint8Array(3 * width * height)
  for (let row = top; row < bottom; row++)
    for (let column = left; column < right; column++) {
      const crop = canvases.crop(canvas, row * LATTICE + column)
      for (let y = 0; y < CELL; y++)
        pixels.set(
          crop.subarray(3 * CELL * y, 3 * CELL * (y + 1)),
          3 * (((row - top) * CELL + y) * width + (column - left) * CELL),
        )
    }
  return device.tensor(pixels, [height, width, 3], 'u8')
}

export const mergedOf = ([t, h, w]: Grid): number => (t * h * w) / MERGE ** 2

/** A question about an image, by its place among them, and what is said. */
export interface Asked {
  image: number
  role: Role
  colour: number
  completions: readonly (readonly number[])[]
}

/**
 * Sequences for `record`: each image once, as the shared beginning of all that is asked about it. `targets` are the
 * completions' tokens, of which `cuSeqlens` of `completions` are the bounds.
 */
export function pack(vision: Vision, asked: readonly Asked[]) {
  const tokens: number[] = []
  const cuSeqlens = [0]
  const prefixOf: number[] = []
  for (const grid of vision.gridThw) {
    tokens.push(...imageTokens(mergedOf(grid)))
    cuSeqlens.push(tokens.length)
    prefixOf.push(-1)
  }
  const targets: number[] = []
  const bounds = [0]
  for (const { image, role, colour, completions } of asked)
    for (const completion of completions) {
      tokens.push(...questionTokens(role, colour))
      for (const token of completion) targets.push(tokens.push(token) - 1)
      cuSeqlens.push(tokens.length)
      prefixOf.push(image)
      bounds.push(targets.length)
    }
  return { packed: { tokens, cuSeqlens, prefixOf, targets, images: vision }, bounds }
}
