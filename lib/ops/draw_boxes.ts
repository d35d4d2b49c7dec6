import { checkArguments, checkArray, checkNumbers, type Names } from '../arguments.js'
import { native } from '../native.js'
import { handleOf, type Tensor, wrap } from '../tensor.js'

/**
 * x0, y0, x1, y1 in whole pixels: half open where a region is cut out, both corners inclusive where a
 * rectangle is drawn, as Pillow has it.
 */
export type PixelBox = readonly [number, number, number, number]

/** Red, green and blue, 0 to 255. */
export type Color = readonly [number, number, number]

// CSS colours as Pillow's ImageColor has them, in the order of Perceive-to-Reason.
const palette: readonly Color[] = [
  [255, 0, 0],
  [0, 128, 0],
  [0, 0, 255],
  [255, 255, 0],
  [255, 165, 0],
  [128, 0, 128],
  [0, 255, 255],
  [255, 0, 255],
]

/** Outlines of boxes to draw. */
export interface Outlines {
  /**
   * In whole pixels, both corners inclusive, drawn one after the other; inverted corners are sorted, parts
   * outside the image are clipped. Boxes thinner than two borders grow outwards, as in Pillow.
   */
  boxes: readonly PixelBox[]
  /**
   * By the boxes' index, repeated.
   *
   * @default red, green (0, 128, 0), blue, yellow, orange (255, 165, 0), purple (128, 0, 128), cyan, magenta
   */
  colors?: readonly Color[]
  /**
   * Of the border, inwards, in pixels; 0 draws nothing.
   *
   * @default max(3, floor(0.003 · image width))
   */
  width?: number
}

/** The arguments of `drawBoxes`. */
export interface DrawBoxesArgs extends Outlines {
  /** u8 [height, width, 3]. */
  image: Tensor<'u8'>
}

const outlineNames: Names<Outlines> = { boxes: true, colors: true, width: true }
const names: Names<DrawBoxesArgs> = { ...outlineNames, image: true }

/**
 * A copy of the image with the outlines of boxes, byte for byte as Pillow's
 * `ImageDraw.rectangle(box, outline, width)` draws them, one after the other.
 *
 * @returns u8 [height, width, 3].
 * @throws P2RError ERR_VALUE for coordinates that are not integers; ERR_SHAPE and ERR_DTYPE for an image that
 *   is not u8 [height, width, 3]; ERR_DISPOSED.
 * @example
 * ```js
 * import { drawBoxes, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const image = device.zeros([32, 32, 3], 'u8')
 * const marked = drawBoxes({ image, boxes: [[4, 4, 20, 20]], width: 1 })
 * console.log((await marked.read()).filter((v) => v === 255).length) // 64
 * device.dispose()
 * ```
 */
export function drawBoxes(a: DrawBoxesArgs): Tensor<'u8'> {
  const op = 'drawBoxes'
  a = checkArguments(a, names, op)
  const image = handleOf(a.image, 'image', op)
  return wrap(a.image.device, native().ops.draw_boxes!(image, ...outlineArguments(a, op)))
}

/** @internal The argument `overlay`: none, or checked outlines. */
export function checkOverlay(overlay: Outlines | undefined, op: string): Outlines | undefined {
  return overlay && checkArguments(overlay, outlineNames, op, 'overlay')
}

/** @internal Boxes, colours and line width as the addon takes them. */
export function outlineArguments(
  a: Outlines | undefined,
  op: string,
): [Float64Array, Float64Array, number | null] {
  return [
    flatten(a ? a.boxes : [], 4, 'boxes', op),
    flatten(a?.colors ?? palette, 3, 'colors', op),
    a?.width ?? null,
  ]
}

/** Lists of `length` numbers, concatenated; the addon checks each value. */
function flatten(
  lists: readonly (readonly number[])[],
  length: number,
  name: string,
  op: string,
): Float64Array {
  const all = checkArray(lists, name, op)
  const out = new Float64Array(all.length * length)
  for (let i = 0; i < all.length; i++)
    out.set(checkNumbers(all[i], length, `${name}[${i}]`, op), i * length)
  return out
}
