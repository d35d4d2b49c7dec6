import { checkArray, checkNumbers, checkObject } from '../arguments.js'
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

/** Outlines to draw: see drawBoxes. */
export interface Outlines {
  boxes: readonly PixelBox[]
  colors?: readonly Color[]
  width?: number
}

/**
 * A copy of the image with the outlines of boxes, byte for byte as Pillow's
 * `ImageDraw.rectangle(box, outline, width)` draws them, one after the other.
 *
 * @param a.image u8 [height, width, 3].
 * @param a.boxes in whole pixels, both corners inclusive; inverted corners are sorted, parts
 *   outside the image are clipped. Boxes thinner than two borders grow outwards, as in Pillow.
 * @param a.colors by index, repeated: red, green (0, 128, 0), blue, yellow, orange (255, 165, 0),
 *   purple (128, 0, 128), cyan, magenta unless given.
 * @param a.width of the border in pixels, inwards: max(3, floor(0.003 · image width)) unless given;
 *   0 draws nothing.
 * @throws ERR_VALUE for coordinates that are not integers; ERR_SHAPE and ERR_DTYPE for an image that
 *   is not u8 [height, width, 3].
 */
export function drawBoxes(a: { image: Tensor } & Outlines): Tensor<'u8'> {
  const op = 'drawBoxes'
  const image = handleOf(a.image, 'image', op)
  return wrap(a.image.device, native().ops.draw_boxes!(image, ...outlineArguments(a, op)))
}

/** @internal Boxes, colours and line width as the addon takes them. */
export function outlineArguments(
  a: Outlines | undefined,
  op: string,
): [Float64Array, Float64Array, number | null] {
  if (a !== undefined) checkObject(a, 'overlay', op, 'an object with boxes')
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
  checkArray(lists, name, op)
  const out = new Float64Array(lists.length * length)
  for (let i = 0; i < lists.length; i++) {
    const list: unknown = lists[i]
    checkNumbers(list, length, `${name}[${i}]`, op)
    out.set(list, i * length)
  }
  return out
}
