import { checkArray, checkFiniteNumbers, checkInteger, checkPositive } from '../arguments.js'
import { refuse } from '../errors.js'
import type { Grid } from '../grid.js'
import { pixelValues, type Region, resample, smartResize } from '../ops/crop_resample.js'
import { drawBoxes, type Outlines, type PixelBox } from '../ops/draw_boxes.js'
import { holds } from '../scope.js'
import { type Held, imageSize, type Tensor } from '../tensor.js'
import type { EvidenceBox } from './boxes.js'

/** Limits in pixels on the images shown to a model; see collectEvidence. */
export interface EvidenceSizes {
  minPixels?: number
  maxPixels?: number
  cropMaxPixels?: number
}

/** Images are computed on first access; the source image must outlive the evidence. */
export interface Evidence extends Disposable {
  /** The image with every box drawn on it, or the image itself when there is no evidence. */
  readonly annotated: Tensor
  /** One crop per box, padded, at most `maxEvidence`. */
  readonly crops: Tensor[]
  readonly boxes: EvidenceBox[]
  readonly hasEvidence: boolean
  dispose(): void
  /**
   * The input of a vision tower, the annotated image first, computed from the source without the
   * images above; options as given to collectEvidence unless given here. Sizes are smartResize's.
   */
  pixelValues<D extends 'f32' | 'f16' | 'bf16' = 'f32'>(
    options?: EvidenceSizes & { dtype?: D },
  ): Held<{ pixelValues: Tensor<D>; gridThw: Grid[] }>
}

/**
 * The evidence of a perceiver's boxes: the image with all of them drawn, and the first `maxEvidence`
 * cropped from the original image. Source: Perceive-to-Reason, evaluation/p2r_utils.py.
 *
 * Images keep their size unless maxPixels is given: then the annotated image and the crops are resampled
 * to smartResize's size. Crops that are empty, or that smartResize refuses, are dropped; if none remains
 * the evidence is the original image, with hasEvidence false.
 *
 * @param a.image u8 [height, width, 3].
 * @param a.boxes in thousandths of the image's size; see parseBoxes.
 * @param a.maxEvidence 3 unless given.
 * @param a.padding of a crop on each side, in shares of the image's width and height: [0.1, 0.1] unless
 *   given, at most 600 pixels.
 * @param a.minPixels 4096 unless given. a.cropMaxPixels, for the crops: maxPixels unless given.
 * @throws ERR_VALUE for boxes with coordinates that are not finite, and for sizes that are not positive
 *   integers.
 */
export function collectEvidence(
  a: {
    image: Tensor
    boxes: readonly EvidenceBox[]
    maxEvidence?: number
    padding?: readonly [number, number]
  } & EvidenceSizes,
): Evidence {
  const op = 'collectEvidence'
  const { image, boxes, maxEvidence = 3, padding = [0.1, 0.1] } = a
  const [height, width] = imageSize(image, op)
  checkArray(boxes, 'boxes', op)
  checkInteger(maxEvidence, 0, 'maxEvidence', op)
  checkFiniteNumbers(padding, 2, 'padding', op)
  for (let i = 0; i < boxes.length; i++)
    checkFiniteNumbers(boxes[i]?.bbox2d, 4, `boxes[${i}].bbox2d`, op)
  const sizes = sizesOf(a, op)

  const crops: PixelBox[] = []
  for (const { bbox2d } of boxes.slice(0, maxEvidence)) {
    const crop = cropBox(bbox2d, height, width, padding)
    if (crop[2] > crop[0] && crop[3] > crop[1] && isResizable(crop, sizes)) crops.push(crop)
  }
  return new Collected(image, [...boxes], crops, sizes)
}

class Collected implements Evidence {
  readonly boxes: EvidenceBox[]
  readonly hasEvidence: boolean
  readonly #image: Tensor
  readonly #cropBoxes: readonly PixelBox[]
  readonly #sizes: EvidenceSizes
  #annotated: Tensor | undefined
  #crops: Tensor[] | undefined
  #disposed = false

  constructor(
    image: Tensor,
    boxes: EvidenceBox[],
    cropBoxes: readonly PixelBox[],
    sizes: EvidenceSizes,
  ) {
    this.boxes = boxes
    this.hasEvidence = cropBoxes.length > 0
    this.#image = image
    this.#cropBoxes = cropBoxes
    this.#sizes = sizes
  }

  get annotated(): Tensor {
    this.#check()
    if (this.#annotated) return this.#annotated
    const { minPixels, maxPixels } = this.#sizes
    if (maxPixels !== undefined) {
      const region = sized(this.#whole, minPixels, maxPixels)
      this.#annotated = this.#resample([region], this.#outlines)[0]!
    } else if (this.#outlines)
      this.#annotated = drawBoxes({ image: this.#image, ...this.#outlines })
    else this.#annotated = this.#image.reshape(this.#image.shape)
    return this.#annotated
  }

  get crops(): Tensor[] {
    this.#check()
    const { minPixels, maxPixels, cropMaxPixels = maxPixels } = this.#sizes
    this.#crops ??= this.#resample(
      this.#cropBoxes.map((box) =>
        cropMaxPixels === undefined ? unresized(box) : sized(box, minPixels, cropMaxPixels),
      ),
    )
    return this.#crops
  }

  pixelValues<D extends 'f32' | 'f16' | 'bf16' = 'f32'>(
    options: EvidenceSizes & { dtype?: D } = {},
  ): Held<{ pixelValues: Tensor<D>; gridThw: Grid[] }> {
    this.#check()
    const sizes = sizesOf(options, 'pixelValues', this.#sizes)
    const { minPixels, maxPixels, cropMaxPixels = maxPixels } = sizes
    const regions: Region[] = [
      sized(this.#whole, minPixels, maxPixels),
      ...this.#cropBoxes.map((box) => ({
        ...sized(box, minPixels, cropMaxPixels),
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

  #check(): void {
    if (this.#disposed) refuse('ERR_DISPOSED', 'evidence', 'the evidence has been disposed')
  }

  get #whole(): PixelBox {
    return [0, 0, this.#image.shape[1]!, this.#image.shape[0]!]
  }

  get #outlines(): Outlines | undefined {
    if (!this.hasEvidence) return undefined
    const [height, width] = this.#image.shape as [number, number]
    return { boxes: this.boxes.map(({ bbox2d }) => outlineBox(bbox2d, height, width)) }
  }

  #resample(regions: Region[], overlay?: Outlines): Tensor[] {
    return resample({ images: [this.#image], regions, overlay }, 'evidence')
  }
}

// The reference's geometry, in its order of operations: c / 1000 · size is not c · size / 1000.

function outlineBox(box: EvidenceBox['bbox2d'], height: number, width: number): PixelBox {
  // Clamped because the addon takes 32-bit integers; beyond this no pixel of the image changes.
  const limit = 2 ** 30
  const pixel = (c: number, size: number) =>
    Math.max(-limit, Math.min(limit, Math.trunc((c / 1000) * size)))
  return [pixel(box[0], width), pixel(box[1], height), pixel(box[2], width), pixel(box[3], height)]
}

function cropBox(
  box: EvidenceBox['bbox2d'],
  height: number,
  width: number,
  padding: readonly [number, number],
): PixelBox {
  const interval = (a: number, b: number, size: number, padding: number): [number, number] => {
    const pad = Math.min(padding, 600 / size)
    const low = Math.max(0, Math.min(a / 1000, b / 1000) - pad)
    const high = Math.min(1, Math.max(a / 1000, b / 1000) + pad)
    return [Math.trunc(low * size), Math.trunc(high * size)]
  }
  const [x0, x1] = interval(box[0], box[2], width, padding[0])
  const [y0, y1] = interval(box[1], box[3], height, padding[1])
  return [x0, y0, x1, y1]
}

function unresized(box: PixelBox): Region {
  return { box, height: box[3] - box[1], width: box[2] - box[0] }
}

function sized(box: PixelBox, minPixels?: number, maxPixels?: number): Region {
  const { height, width } = unresized(box)
  const size = smartResize(height, width, {
    ...(minPixels !== undefined && { minPixels }),
    ...(maxPixels !== undefined && { maxPixels }),
  })
  return { box, ...size }
}

/** Whether smartResize accepts a crop; without a limit on pixels crops are not resampled. */
function isResizable(crop: PixelBox, sizes: EvidenceSizes): boolean {
  const { minPixels, maxPixels, cropMaxPixels = maxPixels } = sizes
  if (cropMaxPixels === undefined) return true
  const { height, width } = unresized(crop)
  if (Math.max(height, width) > 200 * Math.min(height, width)) return false
  const region = sized(crop, minPixels, cropMaxPixels)
  return region.height > 0 && region.width > 0
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
