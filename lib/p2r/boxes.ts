import { checkArguments, type Names } from '../arguments.js'
import { objectsOf } from './lenient_json.js'
import { type Json, NotJson, parseJson, TooDeep } from './python_json.js'
import { blanks, strip } from './python_text.js'
import { afterThinking, type RewardRules, rulesOf } from './reward.js'

/** A region of an image that a perceiver points at. */
export interface EvidenceBox {
  /** x0, y0, x1, y1 in thousandths of the image's width and height, as the model writes them. */
  bbox2d: readonly [x0: number, y0: number, x1: number, y1: number]
  /** What the region shows; '' where the model wrote none. */
  label: string
}

/** Options of parseBoxes. */
export interface ParseBoxesOptions {
  /**
   * Of reading: 'reference' as Perceive-to-Reason does, 'strict' without its pitfalls.
   * @default 'reference'
   */
  rules?: RewardRules
}

const optionNames: Names<ParseBoxesOptions> = { rules: true }
const opensList = new RegExp(`[${blanks}]*:[${blanks}]*\\[`, 'y')
const key = '"bbox_2d"'

/**
 * The boxes in a perceiver's output.
 *
 * 'reference', as Perceive-to-Reason's `parse_bboxes`: the whole text is read as JSON, one object with `bbox_2d` and `label` or a list of them; else every
 * object without nested braces that has a list `bbox_2d` is extracted from the text. JSON is Python's:
 * NaN and Infinity are numbers, the last of equal keys counts. A box needs four finite numbers
 * (booleans count as 0 and 1) with x0 < x1 and y0 < y1, in any range; a missing label is ''. Anything
 * else yields no box; where the reference fails on one (`bbox_2d` null or a number), the others are
 * kept.
 *
 * 'strict': what follows the thinking, so that no draft in it counts; boxes within other objects too; single
 * quotes, unescaped quotes, keys without quotes, trailing commas, comments, tuples, Python's literals, and
 * braces within labels. Coordinates may be numbers in quotes; a label that is no text becomes one, null ''.
 *
 * Source: Perceive-to-Reason, evaluation/p2r_utils.py.
 *
 * @returns the boxes in their order; none for a text without boxes, or for anything but a text. No text throws.
 * @throws P2RError ERR_VALUE for wrong options.
 * @example
 * ```js
 * import { parseBoxes } from 'p2r-kernels'
 *
 * const boxes = parseBoxes('The sign: [{"bbox_2d": [400, 300, 600, 500], "label": "sign"}]')
 * console.log(boxes) // [ { bbox2d: [ 400, 300, 600, 500 ], label: 'sign' } ]
 * const python = "{'bbox_2d': (400, 300, 600, 500), 'label': None}"
 * console.log(parseBoxes(python).length, parseBoxes(python, { rules: 'strict' }).length) // 0 1
 * ```
 */
export function parseBoxes(text: string, options: ParseBoxesOptions = {}): EvidenceBox[] {
  options = checkArguments(options, optionNames, 'parseBoxes')
  const rules = rulesOf(options.rules, 'parseBoxes')
  if (typeof text !== 'string') return []
  if (rules === 'strict') return boxesAfterThinking(text)
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
  const label = item.get('label') ?? (item.has('label') ? null : '')
  const coordinates = item.get('bbox_2d')
  if (typeof label !== 'string' || !Array.isArray(coordinates)) return []
  if (!coordinates.every((c) => typeof c === 'number' || typeof c === 'boolean')) return []
  return boxAt(coordinates.map(Number), label)
}

/** The boxes after the thinking, however they are written. */
function boxesAfterThinking(text: string): EvidenceBox[] {
  const visible = afterThinking(text)
  let data: Iterable<Json>
  try {
    data = [parseJson(strip(visible))]
  } catch (error) {
    if (!(error instanceof NotJson || error instanceof TooDeep)) throw error
    data = objectsOf(visible)
  }
  return [...data].flatMap((item) => boxesIn(item, 0))
}

/** The boxes in an object or a list, and in what they hold. */
function boxesIn(item: Json, depth: number): EvidenceBox[] {
  if (depth > 100) return []
  if (Array.isArray(item)) return item.flatMap((one) => boxesIn(one, depth + 1))
  if (!(item instanceof Map)) return []
  const coordinates = item.get('bbox_2d')
  if (coordinates === undefined) return [...item.values()].flatMap((one) => boxesIn(one, depth + 1))
  if (!Array.isArray(coordinates)) return []
  const label = item.get('label') ?? ''
  const isPlain = typeof label !== 'object'
  return boxAt(coordinates.map(coordinateOf), isPlain ? String(label) : '')
}

function coordinateOf(value: Json): number {
  if (typeof value === 'string' && strip(value) !== '') return Number(value)
  return typeof value === 'number' ? value : Number.NaN
}

function boxAt(coordinates: readonly number[], label: string): EvidenceBox[] {
  if (coordinates.length !== 4) return []
  const [x0, y0, x1, y1] = coordinates as [number, number, number, number]
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
