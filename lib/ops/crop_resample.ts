import {
  checkArray,
  checkNumber,
  checkNumbers,
  checkObject,
  checkPositive,
  choice,
} from '../arguments.js'
import { refuse } from '../errors.js'
import type { Grid } from '../grid.js'
import { native } from '../native.js'
import { type Held, handleOf, held, type Tensor, wrap } from '../tensor.js'
import { type Outlines, outlineArguments, type PixelBox } from './draw_boxes.js'

export type Filter = 'box' | 'bilinear' | 'bicubic' | 'lanczos'

/** A crop and the size to which it is resampled. */
export interface Region {
  /** Index into `images`; 0 unless given. */
  image?: number
  /** Half open, in whole pixels; pixels outside the image are black. */
  box: PixelBox
  height: number
  width: number
  /** Whether the call's overlay is drawn on this region: true unless given. */
  overlay?: boolean
}

/** The inputs of crop-resampling. */
interface Source {
  images: readonly Tensor[]
  regions: readonly Region[]
  filter?: Filter | undefined
  overlay?: Outlines | undefined
}

/**
 * Each region cropped and resampled, byte for byte as Pillow's `crop(box).resize(size, filter)` (for
 * images over 100 times as tall as wide, as Pillow before 12.2). All regions in one batch.
 *
 * @param a.image u8 [height, width, 3].
 * @param a.regions boxes in whole pixels, half open; pixels outside the image are black.
 *   Sizes are at most 2^20 a side and 2^28 pixels.
 * @param a.filter 'bicubic' unless given.
 * @returns one u8 [height, width, 3] a region.
 * @throws ERR_VALUE for an empty or inverted box, a size of 0 or one that is too large; ERR_SHAPE and
 *   ERR_DTYPE for an image that is not u8 [height, width, 3].
 */
export function cropResample(a: {
  image: Tensor
  regions: readonly { box: PixelBox; height: number; width: number }[]
  filter?: Filter
}): Tensor<'u8'>[] {
  return resample({ images: [a.image], regions: a.regions, filter: a.filter }, 'cropResample')
}

/** @internal As cropResample, from several images and with an overlay. */
export function resample(a: Source, op: string): Tensor<'u8'>[] {
  const out = native().ops.crop_resample!(...sourceArguments(a, op))
  const handles = out === undefined ? [] : Array.isArray(out) ? out : [out]
  return handles.map((handle) => wrap(a.images[0]!.device, handle))
}

/**
 * The input of a Qwen-VL vision tower: every region cropped, resampled, normalised and cut into
 * patches, in one pass without intermediate images.
 *
 * A value is that of cropResample, v, as (v / 255 - mean) / std in float64, rounded once. Rows are
 * patches in blocks of mergeSize x mergeSize, block rows first (mergeSize 1: row by row); columns are
 * [3, temporalPatchSize, patchSize, patchSize], the image repeated along time. Source:
 * Qwen2VLImageProcessor in Hugging Face transformers.
 *
 * @param a.image u8 [height, width, 3], or several as `images`, which regions name by index.
 * @param a.regions sides must be multiples of patchSize · mergeSize, else ERR_VALUE; see smartResize.
 * @param a.overlay outlines drawn as by drawBoxes while the image is read, without a copy of it; in
 *   every region without `overlay: false`.
 * @param a.patchSize 16, temporalPatchSize 2, mergeSize 2, mean and std 0.5, dtype 'f32' unless given.
 * @returns pixelValues [P, 3 · temporalPatchSize · patchSize²] of all regions in their order, and the
 *   grid [1, height / patchSize, width / patchSize] of each.
 * @throws as cropResample.
 */
export function pixelValues<D extends 'f32' | 'f16' | 'bf16' = 'f32'>(
  a: ({ image: Tensor } | { images: readonly Tensor[] }) & {
    regions: readonly Region[]
    filter?: Filter
    overlay?: Outlines
    patchSize?: number
    temporalPatchSize?: 1 | 2
    mergeSize?: number
    mean?: readonly [number, number, number]
    std?: readonly [number, number, number]
    dtype?: D
  },
): Held<{ pixelValues: Tensor<D>; gridThw: Grid[] }> {
  const op = 'pixelValues'
  const { regions, patchSize = 16, mean = [0.5, 0.5, 0.5], std = [0.5, 0.5, 0.5] } = a
  const images =
    'images' in a && a.images !== undefined ? a.images : [(a as { image: Tensor }).image]
  checkNumbers(mean, 3, 'mean', op)
  checkNumbers(std, 3, 'std', op)
  const out = native().ops.pixel_values!(
    ...sourceArguments({ images, regions, filter: a.filter, overlay: a.overlay }, op),
    patchSize,
    a.temporalPatchSize ?? 2,
    a.mergeSize ?? 2,
    Float64Array.from(mean),
    Float64Array.from(std),
    a.dtype ?? 'f32',
  )
  return held({
    pixelValues: wrap<D>(images[0]!.device, out),
    gridThw: regions.map((r): Grid => [1, r.height / patchSize, r.width / patchSize]),
  })
}

function sourceArguments(a: Source, op: string): unknown[] {
  checkArray(a.images, 'images', op, 'an array of Tensors')
  checkArray(a.regions, 'regions', op)
  const name = a.images.length === 1 ? 'image' : 'images'
  const images = a.images.map((image) => handleOf(image, name, op))
  const fields = 8
  const regions = new Float64Array(a.regions.length * fields)
  for (let i = 0; i < a.regions.length; i++) {
    const region = checkObject(a.regions[i] as Region, `regions[${i}]`, op)
    const { image = 0, box, height, width, overlay = true } = region
    checkNumbers(box, 4, `regions[${i}].box`, op)
    for (const [field, value] of Object.entries({ image, height, width }))
      checkNumber(value, `regions[${i}].${field}`, op)
    const at = i * fields
    regions[at] = image
    regions[at + 1] = box[0]
    regions[at + 2] = box[1]
    regions[at + 3] = box[2]
    regions[at + 4] = box[3]
    regions[at + 5] = height
    regions[at + 6] = width
    regions[at + 7] = overlay ? 1 : 0
  }
  return [images, regions, a.filter ?? 'bicubic', ...outlineArguments(a.overlay, op)]
}

/**
 * The size to which Qwen-VL resamples an image: both sides multiples of `factor`, the number of pixels
 * within [minPixels, maxPixels], the aspect ratio nearly kept. Ties go to even, as in Python.
 *
 * @param options.factor patchSize · mergeSize: 32 unless given.
 * @param options.minPixels 4096 and maxPixels 16 777 216 unless given.
 * @param options.rules 'qwen-vl-utils' (default) or 'transformers', which differ for very thin images.
 *   With 'qwen-vl-utils' a side may come out as 0 where a thin image has to shrink, as upstream.
 * @throws ERR_VALUE for an aspect ratio over 200, and for sizes that are not positive integers.
 */
export function smartResize(
  height: number,
  width: number,
  options: {
    factor?: number
    minPixels?: number
    maxPixels?: number
    rules?: 'qwen-vl-utils' | 'transformers'
  } = {},
): { height: number; width: number } {
  const op = 'smartResize'
  const { factor = 32, minPixels = 4096, maxPixels = 16_777_216, rules = 'qwen-vl-utils' } = options
  for (const [name, value] of Object.entries({ height, width, factor, minPixels, maxPixels }))
    checkPositive(value, name, op)
  choice(rules, ['qwen-vl-utils', 'transformers'], 'rules', op)
  if (maxPixels < minPixels)
    refuse('ERR_VALUE', op, `maxPixels must be at least minPixels, ${minPixels}, got ${maxPixels}`)
  const aspect = Math.max(height, width) / Math.min(height, width)
  if (aspect > 200) refuse('ERR_VALUE', op, `the aspect ratio must be at most 200, got ${aspect}`)

  const utils = rules === 'qwen-vl-utils'
  const nearest = (x: number) => Math.max(utils ? factor : 0, roundHalfEven(x / factor) * factor)
  let h = nearest(height)
  let w = nearest(width)
  if (h * w > maxPixels) {
    const beta = Math.sqrt((height * width) / maxPixels)
    const shrink = (x: number) =>
      Math.max(utils ? 0 : factor, Math.floor(x / beta / factor) * factor)
    h = shrink(height)
    w = shrink(width)
  } else if (h * w < minPixels) {
    const beta = Math.sqrt(minPixels / (height * width))
    h = Math.ceil((height * beta) / factor) * factor
    w = Math.ceil((width * beta) / factor) * factor
  }
  return { height: h, width: w }
}

function roundHalfEven(x: number): number {
  const below = Math.floor(x)
  const rest = x - below
  return rest > 0.5 || (rest === 0.5 && below % 2 === 1) ? below + 1 : below
}
