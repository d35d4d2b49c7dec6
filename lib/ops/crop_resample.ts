import {
  checkArguments,
  checkArray,
  checkBoolean,
  checkNumber,
  checkNumbers,
  checkPositive,
  choice,
  type Names,
} from '../arguments.js'
import { checkFloatDType, type FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import type { Grid } from '../grid.js'
import { native } from '../native.js'
import { type Held, handleOf, held, type Tensor, wrap } from '../tensor.js'
import { checkOverlay, type Outlines, outlineArguments, type PixelBox } from './draw_boxes.js'

/** How an image is resampled: Pillow's filters of these names, which antialias. */
export type Filter = 'box' | 'bilinear' | 'bicubic' | 'lanczos'

/** A crop of an image and the size to which it is resampled. */
export interface CropRegion {
  /** Half open, in whole pixels; pixels outside the image are black. */
  box: PixelBox
  /** Of the result, in pixels: 1 to 2^20, and at most 2^28 pixels in all. */
  height: number
  /** Of the result, in pixels. */
  width: number
}

/** A crop of one of several images, in `pixelValues`. */
export interface Region extends CropRegion {
  /**
   * Index into `images`.
   *
   * @default 0
   */
  image?: number
  /**
   * Whether the call's overlay is drawn on this region.
   *
   * @default true
   */
  overlay?: boolean
}

const cropRegionNames: Names<CropRegion> = { box: true, height: true, width: true }
const regionNames: Names<Region> = { ...cropRegionNames, image: true, overlay: true }

/** The inputs of crop-resampling. */
interface Source {
  images: readonly Tensor<'u8'>[]
  regions: readonly Region[]
  filter?: Filter | undefined
  overlay?: Outlines | undefined
}

/** The arguments of `cropResample`. */
export interface CropResampleArgs {
  /** u8 [height, width, 3]. */
  image: Tensor<'u8'>
  /** What is cut out, and its new size. */
  regions: readonly CropRegion[]
  /**
   * How pixels are interpolated.
   *
   * @default 'bicubic'
   */
  filter?: Filter
}

const cropNames: Names<CropResampleArgs> = { image: true, regions: true, filter: true }

/**
 * Each region cropped and resampled, byte for byte as Pillow's `crop(box).resize(size, filter)` (for
 * images over 100 times as tall as wide, as Pillow before 12.2). All regions in one batch.
 *
 * @returns one u8 [height, width, 3] a region.
 * @throws P2RError ERR_VALUE for an empty or inverted box, a size of 0 or one that is too large; ERR_SHAPE
 *   and ERR_DTYPE for an image that is not u8 [height, width, 3]; ERR_DISPOSED.
 * @example
 * ```js
 * import { cropResample, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const image = device.zeros([40, 60, 3], 'u8')
 * const [crop] = cropResample({ image, regions: [{ box: [10, 10, 30, 20], height: 20, width: 40 }] })
 * console.log(crop.shape) // [ 20, 40, 3 ]
 * device.dispose()
 * ```
 */
export function cropResample(a: CropResampleArgs): Tensor<'u8'>[] {
  const op = 'cropResample'
  checkArguments(a, cropNames, op)
  const { image, regions, filter } = a
  checkRegions(regions, cropRegionNames, op)
  return resample({ images: [image], regions, filter }, op)
}

/** @internal As cropResample, from several images and with an overlay. */
export function resample(a: Source, op: string): Tensor<'u8'>[] {
  const out = native().ops.crop_resample!(...sourceArguments(a, op))
  const handles = out === undefined ? [] : Array.isArray(out) ? out : [out]
  return handles.map((handle) => wrap(a.images[0]!.device, handle))
}

/** One image, or several, of which regions are cut. */
export type ImageInput =
  | {
      /** u8 [height, width, 3]. */
      image: Tensor<'u8'>
      /** Excluded by image. */
      images?: never
    }
  | {
      /** u8 [height, width, 3] each; regions name them by index. */
      images: readonly Tensor<'u8'>[]
      /** Excluded by images. */
      image?: never
    }

/** How regions become patches. */
export interface PixelValuesOptions<D extends FloatDType = FloatDType> {
  /** What is cut out, and its new size; sides are multiples of patchSize · mergeSize: see `smartResize`. */
  regions: readonly Region[]
  /**
   * How pixels are interpolated.
   *
   * @default 'bicubic'
   */
  filter?: Filter
  /**
   * Outlines drawn as by `drawBoxes` while the image is read, without a copy of it; in every region without
   * `overlay: false`.
   *
   * @default none
   */
  overlay?: Outlines
  /**
   * Pixels a side of a patch.
   *
   * @default 16
   */
  patchSize?: number
  /**
   * How often the image is repeated along time.
   *
   * @default 2
   */
  temporalPatchSize?: 1 | 2
  /**
   * Patches a side of a merge block, whose patches are neighbours in the result.
   *
   * @default 2
   */
  mergeSize?: number
  /**
   * Of red, green and blue; subtracted from values of 0 to 1.
   *
   * @default [0.5, 0.5, 0.5]
   */
  mean?: readonly [number, number, number]
  /**
   * Of red, green and blue; divides what is left.
   *
   * @default [0.5, 0.5, 0.5]
   */
  std?: readonly [number, number, number]
  /**
   * Of the result.
   *
   * @default 'f32'
   */
  dtype?: D
}

/** The arguments of `pixelValues`. */
export type PixelValuesArgs<D extends FloatDType = FloatDType> = ImageInput & PixelValuesOptions<D>

/** The results of `pixelValues`. */
export interface PixelValuesResult<D extends FloatDType = FloatDType> {
  /** [P, 3 · temporalPatchSize · patchSize²]: the patches of all regions in their order. */
  pixelValues: Tensor<D>
  /** The patches [1, height / patchSize, width / patchSize] of each region. */
  gridThw: Grid[]
}

const pixelNames: Names<PixelValuesArgs> = {
  image: true,
  images: true,
  regions: true,
  filter: true,
  overlay: true,
  patchSize: true,
  temporalPatchSize: true,
  mergeSize: true,
  mean: true,
  std: true,
  dtype: true,
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
 * @throws P2RError ERR_VALUE for a box or size that does not fit, or both image and images; ERR_DTYPE for a
 *   dtype that is not floating point; ERR_SHAPE and ERR_DTYPE for an image that is not u8 [height, width, 3];
 *   ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { openDevice, pixelValues, smartResize } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const image = device.zeros([100, 150, 3], 'u8')
 * const patches = pixelValues({
 *   image,
 *   regions: [{ ...smartResize(100, 150), box: [0, 0, 150, 100] }],
 *   dtype: 'bf16',
 * })
 * console.log(patches.gridThw, String(patches.pixelValues)) // [ [ 1, 6, 10 ] ] Tensor bf16 [60, 1536] on cpu
 * device.dispose()
 * ```
 */
export function pixelValues<D extends FloatDType = 'f32'>(
  a: PixelValuesArgs<D>,
): Held<PixelValuesResult<D>> {
  const op = 'pixelValues'
  checkArguments(a, pixelNames, op)
  if (a.image !== undefined && a.images !== undefined)
    refuse('ERR_VALUE', op, 'give either image or images, not both')
  const { regions, patchSize = 16, mean = [0.5, 0.5, 0.5], std = [0.5, 0.5, 0.5] } = a
  checkRegions(regions, regionNames, op)
  const images = a.images ?? [a.image]
  if (a.dtype !== undefined) checkFloatDType(a.dtype, 'dtype', op)
  checkNumbers(mean, 3, 'mean', op)
  checkNumbers(std, 3, 'std', op)
  const out = native().ops.pixel_values!(
    ...sourceArguments(
      { images, regions, filter: a.filter, overlay: checkOverlay(a.overlay, op) },
      op,
    ),
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

function checkRegions(
  regions: readonly Region[],
  names: Readonly<Record<string, true>>,
  op: string,
): void {
  checkArray(regions, 'regions', op)
  for (let i = 0; i < regions.length; i++) checkArguments(regions[i], names, op, `regions[${i}]`)
}

function sourceArguments(a: Source, op: string): unknown[] {
  checkArray(a.images, 'images', op, 'an array of Tensors')
  const name = a.images.length === 1 ? 'image' : 'images'
  const images = a.images.map((image) => handleOf(image, name, op))
  const fields = 8
  const regions = new Float64Array(a.regions.length * fields)
  for (let i = 0; i < a.regions.length; i++) {
    const { image = 0, box, height, width, overlay = true } = a.regions[i] as Region
    checkNumbers(box, 4, `regions[${i}].box`, op)
    for (const [field, value] of Object.entries({ image, height, width }))
      checkNumber(value, `regions[${i}].${field}`, op)
    checkBoolean(overlay, `regions[${i}].overlay`, op)
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

/** The limits within which `smartResize` stays. */
export interface SmartResizeOptions {
  /**
   * Both sides are multiples of it: patchSize · mergeSize.
   *
   * @default 32
   */
  factor?: number
  /**
   * The least number of pixels.
   *
   * @default 4096
   */
  minPixels?: number
  /**
   * The largest number of pixels.
   *
   * @default 16 777 216
   */
  maxPixels?: number
  /**
   * Whose rules: they differ for very thin images. With 'qwen-vl-utils' a side may come out as 0 where a thin
   * image has to shrink, as upstream.
   *
   * @default 'qwen-vl-utils'
   */
  rules?: 'qwen-vl-utils' | 'transformers'
}

/** The size of an image in pixels. */
export interface ImageSize {
  /** In pixels. */
  height: number
  /** In pixels. */
  width: number
}

const resizeNames: Names<SmartResizeOptions> = {
  factor: true,
  minPixels: true,
  maxPixels: true,
  rules: true,
}

/**
 * The size to which Qwen-VL resamples an image: both sides multiples of `factor`, the number of pixels
 * within [minPixels, maxPixels], the aspect ratio nearly kept. Ties go to even, as in Python. Source: smart_resize
 * of qwen-vl-utils and of Hugging Face transformers.
 *
 * @param height of the image, in pixels.
 * @param width of the image, in pixels.
 * @throws P2RError ERR_VALUE for an aspect ratio over 200, and for sizes that are not positive integers.
 * @example
 * ```js
 * import { smartResize } from 'p2r-kernels'
 *
 * console.log(smartResize(1000, 700)) // { height: 992, width: 704 }
 * ```
 */
export function smartResize(
  height: number,
  width: number,
  options: SmartResizeOptions = {},
): ImageSize {
  const op = 'smartResize'
  checkArguments(options, resizeNames, op, 'options')
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
