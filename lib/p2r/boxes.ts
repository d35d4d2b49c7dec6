import { type Json, NotJson, parseJson, TooDeep } from './python_json.js'
import { blanks, strip } from './python_text.js'

/** A region of an image that a perceiver points at. */
export interface EvidenceBox {
  /** x0, y0, x1, y1 in thousandths of the image's width and height, as the model writes them. */
  bbox2d: readonly [x0: number, y0: number, x1: number, y1: number]
  /** What the region shows; '' where the model wrote none. */
  label: string
}

const opensList = new RegExp(`[${blanks}]*:[${blanks}]*\\[`, 'y')
const key = '"bbox_2d"'

/**
 * The boxes in a perceiver's output, as Perceive-to-Reason's `parse_bboxes` reads them.
 *
 * The whole text is read as JSON, one object with `bbox_2d` and `label` or a list of them; else every
 * object without nested braces that has a list `bbox_2d` is extracted from the text. JSON is Python's:
 * NaN and Infinity are numbers, the last of equal keys counts. A box needs four finite numbers
 * (booleans count as 0 and 1) with x0 < x1 and y0 < y1, in any range; a missing label is ''. Anything
 * else yields no box; where the reference fails on one (`bbox_2d` null or a number), the others are
 * kept. Source: Perceive-to-Reason, evaluation/p2r_utils.py.
 *
 * @returns the boxes in their order; none for a text without boxes, or for anything but a text. Never throws.
 * @example
 * ```js
 * import { parseBoxes } from 'p2r-kernels'
 *
 * const boxes = parseBoxes('The sign: [{"bbox_2d": [400, 300, 600, 500], "label": "sign"}]')
 * console.log(boxes) // [ { bbox2d: [ 400, 300, 600, 500 ], label: 'sign' } ]
 * ```
 */
export function parseBoxes(text: string): EvidenceBox[] {
  if (typeof text !== 'string') return []
  try {
    const data = parseJson(strip(text))
    if (data instanceof Map || Array.isArray(data)) return [data].flat().flatMap(boxOf)
  } catch (error) {
    if (error instanceof TooDeep) return []
    if (!(error instanceof NotJson)) throw error
  }
  return [...objectsIn(text)].flatMap((object) => {
    try {
      return boxOf(parseJson(object))
    } catch (error) {
      if (error instanceof NotJson || error instanceof TooDeep) return []
      throw error
    }
  })
}

function boxOf(item: Json): EvidenceBox[] {
  if (!(item instanceof Map)) return []
  const coordinates = item.get('bbox_2d')
  const label = item.get('label') ?? (item.has('label') ? null : '')
  if (!Array.isArray(coordinates) || coordinates.length !== 4 || typeof label !== 'string')
    return []
  if (!coordinates.every((c) => typeof c === 'number' || typeof c === 'boolean')) return []
  const [x0, y0, x1, y1] = coordinates.map(Number) as [number, number, number, number]
  if (![x0, y0, x1, y1].every(Number.isFinite) || x0 >= x1 || y0 >= y1) return []
  return [{ bbox2d: [x0, y0, x1, y1], label }]
}

/**
 * The matches of the reference's pattern, from left to right, in linear time:
 *
 *   \{ [^{}]* "bbox_2d" \s* : \s* \[ [^\]]+ \] [^{}]* \}
 */
function* objectsIn(text: string): Generator<string> {
  const matchAt = matcher(text)
  let open = text.indexOf('{')
  while (open >= 0) {
    const end = matchAt(open)
    if (end > open) yield text.slice(open, end)
    open = text.indexOf('{', Math.max(end, open + 1))
  }
}

/** Returns the end of the match that starts at an opening brace, or -1. */
function matcher(text: string): (open: number) => number {
  const brace = finder(text, /[{}]/g)
  const bracket = finder(text, /\]/g)
  return (open) => {
    const run = text.slice(open + 1, brace(open + 1))
    // The pattern is greedy: the last key before the next brace comes first.
    for (let at = run.lastIndexOf(key); at >= 0; at = at > 0 ? run.lastIndexOf(key, at - 1) : -1) {
      opensList.lastIndex = open + 1 + at + key.length
      if (!opensList.test(text)) continue
      const list = opensList.lastIndex
      const close = bracket(list)
      if (close >= text.length || close === list) continue
      const end = brace(close + 1)
      if (text[end] === '}') return end + 1
    }
    return -1
  }
}

/** Returns the index of the first match at or after `from`, or the text's length. */
function finder(text: string, pattern: RegExp): (from: number) => number {
  const indices = Array.from(text.matchAll(pattern), (match) => match.index)
  indices.push(text.length)
  return (from) => {
    let low = 0
    let high = indices.length - 1
    while (low < high) {
      const middle = (low + high) >> 1
      if (indices[middle]! < from) low = middle + 1
      else high = middle
    }
    return indices[low]!
  }
}
