import {
  checkArguments,
  checkArray,
  checkFiniteNumbers,
  checkInteger,
  checkPositive,
  checkReceiver,
  choice,
  describeValue,
  isObject,
  type Names,
} from '../arguments.js'
import type { PatchDType } from '../dtype.js'
import { refuse } from '../errors.js'
import {
  checkPatchDType,
  type ImageSize,
  type PixelValuesResult,
  pixelValues,
  type Region,
  resample,
  type SmartResizeOptions,
  smartResize,
} from '../ops/crop_resample.js'
import { drawBoxes, type Outlines, type PixelBox } from '../ops/draw_boxes.js'
import { holds } from '../scope.js'
import { type Held, imageSize, type Tensor } from '../tensor.js'
import type { EvidenceBox } from './boxes.js'

/** Limits on the images shown to a model, in pixels of the whole image. */
export interface EvidenceSizes {
  /**
   * The smallest image, where one of the other limits is given.
   * @default 4096
   */
  minPixels?: number
  /**
   * The largest annotated image. Images are resampled to smartResize's size if it is given; else they keep theirs.
   * @default none
   */
  maxPixels?: number
  /**
   * The largest crop.
   * @default maxPixels
   */
  cropMaxPixels?: number
}

/** What is cut out of an image, and in which size it is shown. */
export interface EvidenceOptions extends EvidenceSizes {
  /**
   * The largest number of crops. Further boxes are drawn, but not cropped.
   * @default 3
   */
  maxEvidence?: number
  /**
   * Of a crop on each side, in shares of the image's width and height; 600 pixels at most.
   * @default [0.1, 0.1]
   */
  padding?: readonly [x: number, y: number]
  /**
   * smartResize's rules. Where they give a thin image a side of 0, it is 32 here.
   * @default 'qwen-vl-utils'
   */
  rules?: ResizeRules
  /**
   * What boxes are measured in: thousandths of the image's width and height (Qwen3-VL), or pixels of the annotated
   * image, which is what the perceiver saw (Qwen2.5-VL): with maxPixels smartResize's size, else the image's.
   * @default 'thousandths'
   */
  coordinates?: Coordinates
}

type ResizeRules = NonNullable<SmartResizeOptions['rules']>
/** The unit of a perceiver's boxes. */
export type Coordinates = 'thousandths' | 'absolute'

/** The arguments of collectEvidence. */
export interface CollectEvidenceArgs extends EvidenceOptions {
  /** u8 [height, width, 3]. It stays the caller's, and must outlive the evidence. */
  image: Tensor<'u8'>
  /** In the unit of `coordinates`; see parseBoxes. */
  boxes: readonly EvidenceBox[]
}

/** Options of Evidence's `pixelValues`; sizes left out are those given to collectEvidence. */
export interface EvidencePixelValuesOptions<D extends PatchDType = 'f32'> extends EvidenceSizes {
  /**
   * The type of the patches; 'u8' are the bytes before they are normalised, see `normalizePatches`.
   * @default 'f32'
   */
  dtype?: D
}

/**
 * An image with boxes drawn on it, and their crops. Images are computed on first access, and belong to the
 * evidence; the source image must outlive it.
 */
export interface Evidence extends Disposable {
  /** u8 [height, width, 3]: the image with every box drawn on it, or the image itself without evidence. */
  readonly annotated: Tensor<'u8'>
  /** u8 [height, width, 3] each: one crop per box, padded, at most `maxEvidence`. */
  readonly crops: Tensor<'u8'>[]
  /** The boxes as they were given, those without a crop too. */
  readonly boxes: EvidenceBox[]
  /**
   * How many of the first `maxEvidence` boxes have no crop: outside the image, or too thin to be resampled. Many
   * such boxes mean other coordinates than the model's.
   */
  readonly dropped: number
  /** Whether there is a crop. */
  readonly hasEvidence: boolean
  /** Frees the images. A second call does nothing. */
  dispose(): void
  /**
   * The input of a vision tower, the annotated image first, computed from the source without the
   * images above. Sizes are smartResize's.
   *
   * @returns pixelValues [P, 1536], and the grid [1, height / 16, width / 16] of each image; see the function
   *   pixelValues.
   * @throws P2RError ERR_VALUE for wrong options; ERR_DISPOSED after dispose().
   */
  pixelValues<D extends PatchDType = 'f32'>(
    options?: EvidencePixelValuesOptions<D>,
  ): Held<PixelValuesResult<D>>
}

const sizeNames: Names<EvidenceSizes> = { minPixels: true, maxPixels: true, cropMaxPixels: true }
/** @internal */
export const evidenceNames: Names<EvidenceOptions> = {
  ...sizeNames,
  maxEvidence: true,
  padding: true,
  rules: true,
  coordinates: true,
}
const argumentNames: Names<CollectEvidenceArgs> = { ...evidenceNames, image: true, boxes: true }
const pixelValuesNames: Names<EvidencePixelValuesOptions> = { ...sizeNames, dtype: true }

/**
 * The evidence of a perceiver's boxes: the image with all of them drawn, and the first `maxEvidence`
 * cropped from the original image.
 *
 * Crops that are empty, or that smartResize refuses, are dropped and counted; if none remains the evidence is the original
 * image, with hasEvidence false. Source: Perceive-to-Reason, evaluation/p2r_utils.py.
 *
 * @throws P2RError ERR_VALUE for boxes with coordinates that are not finite, and for sizes that are not positive
 *   integers; ERR_SHAPE and ERR_DTYPE for an image that is not u8 [height, width, 3].
 * @example
 * ```js
 * import { collectEvidence, openDevice, parseBoxes } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const image = device.zeros([480, 640, 3], 'u8')
 * const boxes = parseBoxes('[{"bbox_2d": [400, 300, 600, 500], "label": "sign"}]')
 * const evidence = collectEvidence({ image, boxes, maxPixels: 65_536 })
 * console.log(evidence.annotated.shape, evidence.crops[0].shape) // [ 192, 288, 3 ] [ 192, 256, 3 ]
 * const patches = evidence.pixelValues({ dtype: 'bf16' })
 * console.log(patches.gridThw) // [ [ 1, 12, 18 ], [ 1, 12, 16 ] ]
 * patches.dispose()
 * evidence.dispose()
 * device.dispose()
 * ```
 */
export function collectEvidence(a: CollectEvidenceArgs): Evidence {
  const op = 'collectEvidence'
  a = checkArguments(a, argumentNames, op)
  const { image, maxEvidence = 3, padding = [0.1, 0.1] } = a
  const [height, width] = imageSize(image, op)
  const boxes = checkArray(a.boxes, 'boxes', op).map((box, i): EvidenceBox => {
    const bbox2d = checkFiniteNumbers(box?.bbox2d, 4, `boxes[${i}].bbox2d`, op)
    return { ...box, bbox2d: bbox2d as [number, number, number, number] }
  })
  const sizes = { ...checkEvidenceOptions(a, op), rules: a.rules }

  const whole: PixelBox = [0, 0, width, height]
  const { minPixels, maxPixels } = sizes
  let unit: ImageSize = { height: 1000, width: 1000 }
  if (a.coordinates === 'absolute')
    unit = maxPixels === undefined ? { height, width } : sized(whole, minPixels, maxPixels, a.rules)
  const wanted = boxes.slice(0, maxEvidence)
  const crops: PixelBox[] = []
  for (const { bbox2d } of wanted) {
    const crop = cropBox(bbox2d, { height, width }, padding, unit)
    if (crop[2] > crop[0] && crop[3] > crop[1] && isResizable(crop, sizes)) crops.push(crop)
  }
  const outlines = boxes.map(({ bbox2d }) => outlineBox(bbox2d, { height, width }, unit))
  return new Collected(image, [...boxes], outlines, crops, wanted.length - crops.length, sizes)
}

/** @internal The evidence of crops that are known, with a box for each. */
export function evidenceOf(
  image: Tensor<'u8'>,
  boxes: EvidenceBox[],
  crops: readonly PixelBox[],
  sizes: ResizeOptions,
): Evidence {
  return new Collected(image, boxes, crops, crops, 0, sizes)
}

/** @internal Refuses wrong options; returns the sizes among them. */
export function checkEvidenceOptions(a: EvidenceOptions, op: string): EvidenceSizes {
  if (a.maxEvidence !== undefined) checkInteger(a.maxEvidence, 0, 'maxEvidence', op)
  if (a.padding !== undefined) checkFiniteNumbers(a.padding, 2, 'padding', op)
  if (a.rules !== undefined) choice(a.rules, ['qwen-vl-utils', 'transformers'], 'rules', op)
  if (a.coordinates !== undefined)
    choice(a.coordinates, ['thousandths', 'absolute'], 'coordinates', op)
  return sizesOf(a, op)
}

/** @internal An evidence given as an argument: collectEvidence's, or an object with the same members. */
export function checkEvidence(value: unknown, op: string): Evidence {
  const given = value as Partial<Evidence> | null | undefined
  // A Collected's images are made when they are first read: not here.
  const isLike =
    isObject(given) &&
    typeof given.hasEvidence === 'boolean' &&
    Array.isArray(given.boxes) &&
    (given instanceof Collected || Array.isArray(given.crops))
  if (!isLike) refuse('ERR_VALUE', op, `evidence must be an Evidence, got ${describeValue(value)}`)
  return given as Evidence
}

interface ResizeOptions extends EvidenceSizes {
  rules: ResizeRules | undefined
}

class Collected implements Evidence {
  readonly boxes: EvidenceBox[]
  readonly dropped: number
  readonly hasEvidence: boolean
  readonly #outlineBoxes: readonly PixelBox[]
  readonly #image: Tensor<'u8'>
  readonly #cropBoxes: readonly PixelBox[]
  readonly #sizes: ResizeOptions
  #annotated: Tensor<'u8'> | undefined
  #crops: Tensor<'u8'>[] | undefined
  #disposed = false

  constructor(
    image: Tensor<'u8'>,
    boxes: EvidenceBox[],
    outlines: readonly PixelBox[],
    cropBoxes: readonly PixelBox[],
    dropped: number,
    sizes: ResizeOptions,
  ) {
    this.boxes = boxes
    this.dropped = dropped
    this.#outlineBoxes = outlines
    this.hasEvidence = cropBoxes.length > 0
    this.#image = image
    this.#cropBoxes = cropBoxes
    this.#sizes = sizes
  }

  get annotated(): Tensor<'u8'> {
    Collected.#check(this)
    if (this.#annotated) return this.#annotated
    const { minPixels, maxPixels, rules } = this.#sizes
    if (maxPixels !== undefined) {
      const region = sized(this.#whole, minPixels, maxPixels, rules)
      this.#annotated = this.#resample([region], this.#outlines)[0]!
    } else if (this.#outlines)
      this.#annotated = drawBoxes({ image: this.#image, ...this.#outlines })
    else this.#annotated = this.#image.reshape(this.#image.shape)
    return this.#annotated
  }

  get crops(): Tensor<'u8'>[] {
    Collected.#check(this)
    const { minPixels, maxPixels, cropMaxPixels = maxPixels, rules } = this.#sizes
    this.#crops ??= this.#resample(
      this.#cropBoxes.map((box) =>
        cropMaxPixels === undefined ? unresized(box) : sized(box, minPixels, cropMaxPixels, rules),
      ),
    )
    return this.#crops
  }

  pixelValues<D extends PatchDType = 'f32'>(
    options: EvidencePixelValuesOptions<D> = {},
  ): Held<PixelValuesResult<D>> {
    Collected.#check(this)
    const op = 'pixelValues'
    options = checkArguments(options, pixelValuesNames, op)
    if (options.dtype !== undefined) checkPatchDType(options.dtype, op)
    const sizes = sizesOf(options, op, this.#sizes)
    const { minPixels, maxPixels, cropMaxPixels = maxPixels } = sizes
    const { rules } = this.#sizes
    const regions: Region[] = [
      sized(this.#whole, minPixels, maxPixels, rules),
      ...this.#cropBoxes.map((box) => ({
        ...sized(box, minPixels, cropMaxPixels, rules),
        overlay: false,
      })),
    ]
    return pixelValues<D>({
      image: this.#image,
      regions,
      ...(this.#outlines && { overlay: this.#outlines }),
      ...(options.dtype && { dtype: options.dtype }),
    })
  }

  dispose(): void {
    checkReceiver(isObject(this) && #disposed in this, 'Evidence', 'dispose')
    this.#disposed = true
    this.#annotated?.dispose()
    for (const crop of this.#crops ?? []) crop.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  /** For scopes: includes the source, from which further images may be computed. */
  *[holds](): Iterable<Tensor> {
    if (this.#disposed) return
    yield this.#image
    if (this.#annotated) yield this.#annotated
    yield* this.#crops ?? []
  }

  static #check(evidence: Collected): void {
    const op = 'evidence'
    checkReceiver(isObject(evidence) && #disposed in evidence, 'Evidence', op)
    if (evidence.#disposed) refuse('ERR_DISPOSED', op, 'the evidence has been disposed')
  }

  get #whole(): PixelBox {
    return [0, 0, this.#image.shape[1]!, this.#image.shape[0]!]
  }

  get #outlines(): Outlines | undefined {
    return this.hasEvidence ? { boxes: this.#outlineBoxes } : undefined
  }

  #resample(regions: Region[], overlay?: Outlines): Tensor<'u8'>[] {
    return resample({ images: [this.#image], regions, overlay }, 'evidence')
  }
}

// The reference's geometry, in its order of operations: c / 1000 · size is not c · size / 1000.
// `unit` is the size of the image in the boxes' coordinates, so that a region is the same in any unit.

function outlineBox(
  box: EvidenceBox['bbox2d'],
  { height, width }: ImageSize,
  unit: ImageSize,
): PixelBox {
  // Clamped because the addon takes 32-bit integers; beyond this no pixel of the image changes.
  const limit = 2 ** 30
  const pixel = (c: number, size: number, whole: number) =>
    Math.max(-limit, Math.min(limit, Math.trunc((c / whole) * size)))
  const x = (c: number) => pixel(c, width, unit.width)
  const y = (c: number) => pixel(c, height, unit.height)
  return [x(box[0]), y(box[1]), x(box[2]), y(box[3])]
}

function cropBox(
  box: EvidenceBox['bbox2d'],
  { height, width }: ImageSize,
  padding: readonly [number, number],
  unit: ImageSize,
): PixelBox {
  const interval = (
    a: number,
    b: number,
    size: number,
    padding: number,
    whole: number,
  ): [number, number] => {
    const pad = Math.min(padding, 600 / size)
    const low = Math.max(0, Math.min(a / whole, b / whole) - pad)
    const high = Math.min(1, Math.max(a / whole, b / whole) + pad)
    return [Math.trunc(low * size), Math.trunc(high * size)]
  }
  const [x0, x1] = interval(box[0], box[2], width, padding[0], unit.width)
  const [y0, y1] = interval(box[1], box[3], height, padding[1], unit.height)
  return [x0, y0, x1, y1]
}

function unresized(box: PixelBox): Region {
  return { box, height: box[3] - box[1], width: box[2] - box[0] }
}

/** smartResize's factor, and so the smallest side. */
const leastSide = 32

/** @internal A region and the size in which it is shown: smartResize's. */
export function sized(
  box: PixelBox,
  minPixels: number | undefined,
  maxPixels: number | undefined,
  rules: ResizeRules | undefined,
): Region {
  const given = unresized(box)
  const { height, width } = smartResize(given.height, given.width, {
    ...(minPixels !== undefined && { minPixels }),
    ...(maxPixels !== undefined && { maxPixels }),
    ...(rules && { rules }),
  })
  return { box, height: Math.max(height, leastSide), width: Math.max(width, leastSide) }
}

/** @internal Whether smartResize accepts a crop; without a limit on pixels crops are not resampled. */
export function isResizable(crop: PixelBox, sizes: EvidenceSizes): boolean {
  if (sizes.cropMaxPixels === undefined && sizes.maxPixels === undefined) return true
  const { height, width } = unresized(crop)
  return Math.max(height, width) <= 200 * Math.min(height, width)
}

/** The sizes given in `a`, with defaults. */
function sizesOf(a: EvidenceSizes, op: string, defaults: EvidenceSizes = {}): EvidenceSizes {
  const sizes: EvidenceSizes = {}
  for (const name of ['minPixels', 'maxPixels', 'cropMaxPixels'] as const) {
    const value = a[name] ?? defaults[name]
    if (value === undefined) continue
    sizes[name] = checkPositive(value, name, op)
  }
  const least = sizes.minPixels ?? 4096
  for (const name of ['maxPixels', 'cropMaxPixels'] as const)
    if ((sizes[name] ?? least) < least)
      refuse('ERR_VALUE', op, `${name} must be at least minPixels, ${least}, got ${sizes[name]}`)
  return sizes
}
