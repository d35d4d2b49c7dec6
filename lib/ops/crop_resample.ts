import {
  checkArguments,
  checkArray,
  checkBoolean,
  checkNumber,
  checkNumbers,
  checkPositive,
  choice,
  describeValue,
  type Names,
} from '../arguments.js'
import { checkFloatDType, type FloatDType, isFloatDType, type PatchDType } from '../dtype.js'
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
  a = checkArguments(a, cropNames, op)
  const { image, filter } = a
  const regions = checkRegions(a.regions, cropRegionNames, op)
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

/** How bytes of a pixel become values: (v / 255 - mean) / std. */
export interface Normalization {
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
}

/** How regions become patches. */
export interface PixelValuesOptions<D extends PatchDType = PatchDType> extends Normalization {
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
   * Of the result: normalised values, or 'u8' for the bytes before they are normalised, a quarter of f32's memory,
   * which `normalizePatches` or the server's own processor normalises; `mean` and `std` belong there then.
   *
   * @default 'f32'
   */
  dtype?: D
}

/** The arguments of `pixelValues`. */
export type PixelValuesArgs<D extends PatchDType = PatchDType> = ImageInput & PixelValuesOptions<D>

/** The results of `pixelValues`. */
export interface PixelValuesResult<D extends PatchDType = PatchDType> {
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
 * A value is that of cropResample, v, as (v / 255 - mean) / std in float64, rounded once; with dtype 'u8' it is v
 * itself. Rows are
 * patches in blocks of mergeSize x mergeSize, block rows first (mergeSize 1: row by row); columns are
 * [3, temporalPatchSize, patchSize, patchSize], the image repeated along time. Source:
 * Qwen2VLImageProcessor in Hugging Face transformers.
 *
 * @throws P2RError ERR_VALUE for a box or size that does not fit, both image and images, or mean and std of bytes;
 *   ERR_DTYPE for a dtype that is neither floating point nor u8; ERR_SHAPE and ERR_DTYPE for an image that is not u8 [height, width, 3];
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
export function pixelValues<D extends PatchDType = 'f32'>(
  a: PixelValuesArgs<D>,
): Held<PixelValuesResult<D>> {
  const op = 'pixelValues'
  a = checkArguments(a, pixelNames, op)
  if (a.image !== undefined && a.images !== undefined)
    refuse('ERR_VALUE', op, 'give either image or images, not both')
  const { patchSize = 16 } = a
  const regions = checkRegions(a.regions, regionNames, op)
  const images = a.image === undefined ? checkArray(a.images, 'images', op) : [a.image]
  if (a.dtype !== undefined) checkPatchDType(a.dtype, op)
  if (a.dtype === 'u8' && (a.mean !== undefined || a.std !== undefined))
    refuse('ERR_VALUE', op, 'mean and std must be absent for bytes: give them to normalizePatches')
  const out = native().ops.pixel_values!(
    ...sourceArguments(
      { images, regions, filter: a.filter, overlay: checkOverlay(a.overlay, op) },
      op,
    ),
    patchSize,
    a.temporalPatchSize ?? 2,
    a.mergeSize ?? 2,
    ...normalizationArguments(a, op),
    a.dtype ?? 'f32',
  )
  return held({
    pixelValues: wrap<D>(images[0]!.device, out),
    gridThw: regions.map((r): Grid => [1, r.height / patchSize, r.width / patchSize]),
  })
}

/** The arguments of `normalizePatches`. */
export interface NormalizePatchesArgs<D extends FloatDType = FloatDType> extends Normalization {
  /** u8 [P, C], C a multiple of 3 with a third of the columns for each channel, as `pixelValues` with dtype 'u8' gives. */
  patches: Tensor<'u8'>
  /**
   * Of the result.
   *
   * @default 'f32'
   */
  dtype?: D
}

const normalizeNames: Names<NormalizePatchesArgs> = {
  patches: true,
  mean: true,
  std: true,
  dtype: true,
}

/**
 * Patches of bytes as the values that a vision tower takes: (v / 255 - mean) / std of the channel, in float64, rounded
 * once.
 *
 * The result equals that of `pixelValues` with the same dtype, mean and std bit for bit, for all images, sizes,
 * filters and backends: there too a resampled pixel is rounded to a byte, as Pillow does, before it is normalised.
 * Source: vLLM and transformers, which fold the scale of 1 / 255 into mean and std in float32; theirs may differ by one
 * rounding.
 *
 * @returns as patches in shape.
 * @throws P2RError ERR_SHAPE and ERR_DTYPE for patches that are not u8 [P, C] with C a multiple of 3; ERR_DTYPE for a dtype
 *   that is not floating point; ERR_VALUE for mean and std that are no three finite numbers, std above 0; ERR_DISPOSED.
 * @example
 * ```js
 * import { normalizePatches, openDevice, pixelValues } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const image = device.zeros([64, 96, 3], 'u8')
 * const { pixelValues: patches } = pixelValues({
 *   image,
 *   regions: [{ box: [0, 0, 96, 64], height: 64, width: 96 }],
 *   dtype: 'u8',
 * })
 * const values = normalizePatches({ patches, dtype: 'bf16' })
 * console.log(patches.byteLength, values.byteLength, String(values)) // 36864 73728 Tensor bf16 [24, 1536] on cpu
 * device.dispose()
 * ```
 */
export function normalizePatches<D extends FloatDType = 'f32'>(
  a: NormalizePatchesArgs<D>,
): Tensor<D> {
  const op = 'normalizePatches'
  a = checkArguments(a, normalizeNames, op)
  if (a.dtype !== undefined) checkFloatDType(a.dtype, 'dtype', op)
  const out = native().ops.normalize_patches!(
    handleOf(a.patches, 'patches', op),
    ...normalizationArguments(a, op),
    a.dtype ?? 'f32',
  )
  return wrap<D>(a.patches.device, out)
}

/** @internal */
export function checkPatchDType(value: unknown, op: string): void {
  if (value !== 'u8' && !isFloatDType(value))
    refuse('ERR_DTYPE', op, `dtype must be f32, f16, bf16 or u8, got ${describeValue(value)}`)
}

function normalizationArguments(a: Normalization, op: string): [Float64Array, Float64Array] {
  const { mean = [0.5, 0.5, 0.5], std = [0.5, 0.5, 0.5] } = a
  return [
    Float64Array.from(checkNumbers(mean, 3, 'mean', op)),
    Float64Array.from(checkNumbers(std, 3, 'std', op)),
  ]
}

function checkRegions<R extends CropRegion>(
  regions: readonly R[],
  names: Readonly<Record<string, true>>,
  op: string,
): readonly R[] {
  return checkArray(regions, 'regions', op).map((region, i) =>
    checkArguments(region, names, op, `regions[${i}]`),
  )
}

function sourceArguments(a: Source, op: string): unknown[] {
  const given = checkArray(a.images, 'images', op, 'an array of Tensors')
  const name = given.length === 1 ? 'image' : 'images'
  const images = given.map((image) => handleOf(image, name, op))
  const fields = 8
  const regions = new Float64Array(a.regions.length * fields)
  for (let i = 0; i < a.regions.length; i++) {
    const { image = 0, box, height, width, overlay = true } = a.regions[i] as Region
    const corners = checkNumbers(box, 4, `regions[${i}].box`, op)
    for (const [field, value] of Object.entries({ image, height, width }))
      checkNumber(value, `regions[${i}].${field}`, op)
    checkBoolean(overlay, `regions[${i}].overlay`, op)
    const at = i * fields
    regions[at] = image
    regions.set(corners, at + 1)
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
  options = checkArguments(options, resizeNames, op, 'options')
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
