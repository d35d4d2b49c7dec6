import { checkArray, checkFiniteNumbers, checkInteger, checkPositive } from '../arguments.js'
import { refuse } from '../errors.js'
import type { Grid } from '../grid.js'
import { pixelValues, type Region, resample, smartResize } from '../ops/crop_resample.js'
import { drawBoxes, type Outlines, type PixelBox } from '../ops/draw_boxes.js'
import { holds } from '../scope.js'
import { type Held, imageSize, type Tensor } from '../tensor.js'
import type { EvidenceBox } from './boxes.js'

/** Limits on the size of what a model is shown, in pixels; see collectEvidence. */
export interface EvidenceSizes {
  minPixels?: number
  maxPixels?: number
  cropMaxPixels?: number
}

/** Images are made when first asked for; the source image must outlive it. */
export interface Evidence extends Disposable {
  /** The image with every box drawn on it, or the image itself when there is no evidence. */
  readonly annotated: Tensor
  /** One crop per box, padded, at most `maxEvidence`. */
  readonly crops: Tensor[]
  readonly boxes: EvidenceBox[]
  readonly hasEvidence: boolean
  dispose(): void
  /**
   * What a vision tower takes, the annotated image first, made straight from the source without the
   * images above; options as given to collectEvidence unless given here. Sizes are smartResize's.
   */
  pixelValues<D extends 'f32' | 'f16' | 'bf16' = 'f32'>(
    options?: EvidenceSizes & { dtype?: D },
  ): Held<{ pixelValues: Tensor<D>; gridThw: Grid[] }>
}

/**
 * The evidence that a perceiver's boxes point at: the image with all of them drawn, and the first
 * `maxEvidence` cut out of the untouched image. Source: Perceive-to-Reason, evaluation/p2r_utils.py.
 *
 * Images are as cut, unless maxPixels is given: then the annotated image and the crops are resampled to
 * smartResize's size. A crop that is empty, or that smartResize refuses then, is left out; when none
 * remains the evidence is the untouched image, with hasEvidence false.
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

  const cuts: PixelBox[] = []
  for (const { bbox2d } of boxes.slice(0, maxEvidence)) {
    const cut = cropBox(bbox2d, height, width, padding)
    if (cut[2] > cut[0] && cut[3] > cut[1] && fits(cut, sizes)) cuts.push(cut)
  }
  return new Collected(image, [...boxes], cuts, sizes)
}

class Collected implements Evidence {
  readonly boxes: EvidenceBox[]
  readonly hasEvidence: boolean
  readonly #image: Tensor
  readonly #cuts: readonly PixelBox[]
  readonly #sizes: EvidenceSizes
  #annotated: Tensor | undefined
  #crops: Tensor[] | undefined
  #disposed = false

  constructor(
    image: Tensor,
    boxes: EvidenceBox[],
    cuts: readonly PixelBox[],
    sizes: EvidenceSizes,
  ) {
    this.boxes = boxes
    this.hasEvidence = cuts.length > 0
    this.#image = image
    this.#cuts = cuts
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
      this.#cuts.map((cut) =>
        cropMaxPixels === undefined ? asCut(cut) : sized(cut, minPixels, cropMaxPixels),
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
      ...this.#cuts.map((cut) => ({ ...sized(cut, minPixels, cropMaxPixels), overlay: false })),
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

  /** What a scope must keep for evidence that leaves it: the source too, for what is not made yet. */
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
  // Beyond this nothing of a rectangle changes inside the image, and the addon takes integers.
  const far = 2 ** 30
  const pixel = (c: number, size: number) =>
    Math.max(-far, Math.min(far, Math.trunc((c / 1000) * size)))
  return [pixel(box[0], width), pixel(box[1], height), pixel(box[2], width), pixel(box[3], height)]
}

function cropBox(
  box: EvidenceBox['bbox2d'],
  height: number,
  width: number,
  padding: readonly [number, number],
): PixelBox {
  const along = (a: number, b: number, size: number, padding: number): [number, number] => {
    const pad = Math.min(padding, 600 / size)
    const low = Math.max(0, Math.min(a / 1000, b / 1000) - pad)
    const high = Math.min(1, Math.max(a / 1000, b / 1000) + pad)
    return [Math.trunc(low * size), Math.trunc(high * size)]
  }
  const [x0, x1] = along(box[0], box[2], width, padding[0])
  const [y0, y1] = along(box[1], box[3], height, padding[1])
  return [x0, y0, x1, y1]
}

function asCut(box: PixelBox): Region {
  return { box, height: box[3] - box[1], width: box[2] - box[0] }
}

function sized(box: PixelBox, minPixels?: number, maxPixels?: number): Region {
  const { height, width } = asCut(box)
  const size = smartResize(height, width, {
    ...(minPixels !== undefined && { minPixels }),
    ...(maxPixels !== undefined && { maxPixels }),
  })
  return { box, ...size }
}

/** Whether a crop can be resampled to the size asked for; as it is cut it always can be. */
function fits(cut: PixelBox, sizes: EvidenceSizes): boolean {
  const { minPixels, maxPixels, cropMaxPixels = maxPixels } = sizes
  if (cropMaxPixels === undefined) return true
  const { height, width } = asCut(cut)
  if (Math.max(height, width) > 200 * Math.min(height, width)) return false
  const region = sized(cut, minPixels, cropMaxPixels)
  return region.height > 0 && region.width > 0
}

/** The sizes given in `a`, else those of `unlessGiven`. */
function sizesOf(a: EvidenceSizes, op: string, unlessGiven: EvidenceSizes = {}): EvidenceSizes {
  const sizes: EvidenceSizes = {}
  for (const name of ['minPixels', 'maxPixels', 'cropMaxPixels'] as const) {
    const value = a[name] ?? unlessGiven[name]
    if (value === undefined) continue
    sizes[name] = checkPositive(value, name, op)
  }
  const least = sizes.minPixels ?? 4096
  for (const name of ['maxPixels', 'cropMaxPixels'] as const)
    if ((sizes[name] ?? least) < least)
      refuse('ERR_VALUE', op, `${name} must be at least minPixels, ${least}, got ${sizes[name]}`)
  return sizes
}
