// Rewards for grounding: pure functions of a model's output and of boxes that are known to be right.
import {
  checkArguments,
  checkArray,
  checkFiniteNumbers,
  checkString,
  choice,
  type Names,
} from '../arguments.js'
import { type EvidenceBox, parseBoxes } from './boxes.js'
import type { Role } from './policy.js'
import { NotJson, parseJson, TooDeep } from './python_json.js'
import { blanks, strip } from './python_text.js'
import { afterThinking, boxIoU } from './reward.js'

/** x0, y0, x1, y1 in any unit; both boxes of a comparison in the same. */
export type Box = EvidenceBox['bbox2d']

/** The arguments of groundingRewards. */
export interface GroundingRewardsArgs {
  /** A perceiver's output. What it thinks before `</think>` does not count. */
  text: string
  /** The boxes that are right, in the unit of those in the text; none where no region is needed. */
  truth: readonly Box[]
}

/** The rewards of an output, each from 0 to 1. */
export interface GroundingRewards {
  /** The IoU of each true box with its own predicted one, see matchedIoU. */
  iou: number
  /** The IoU of the two sets of boxes as regions of the image, see unionIoU. */
  unionIoU: number
  /** The share of predicted boxes whose centre is in a true box, see pointInBoxes. */
  pointInBox: number
  /** 1 where the output has the form that the prompt asks for, see formatReward. */
  format: number
}

const argumentNames: Names<GroundingRewardsArgs> = { text: true, truth: true }

/**
 * The four rewards of a perceiver's output against known boxes. Without true boxes the right output has none
 * either.
 *
 * The kinds have different scales and spreads: summed up before they are normalised, the one with the
 * largest spread decides. As rewards [B, 4] with the estimator 'gdpo' each kind is normalised within its group
 * by itself.
 *
 * @returns values from 0 to 1. No text throws.
 * @throws P2RError ERR_VALUE for a text that is none, and for boxes without four finite numbers.
 * @example
 * ```ts
 * import { type Box, groundingRewards, groupAdvantages, openDevice } from 'p2r-kernels'
 *
 * const truth: Box[] = [[400, 300, 600, 500]]
 * const outputs = [
 *   '[{"bbox_2d": [400, 300, 600, 500], "label": "sign"}]',
 *   '[{"bbox_2d": [400, 300, 800, 500], "label": "sign"}]',
 *   'It is at [{"bbox_2d": [0, 0, 600, 500], "label": "sign"}]',
 * ]
 * const kinds = outputs.map((text) => Object.values(groundingRewards({ text, truth })))
 * console.log(kinds[1]) // [ 0.5, 0.5, 1, 1 ]
 *
 * const device = openDevice('cpu')
 * const rewards = device.tensor(kinds.flat(), [3, 4])
 * const advantages = groupAdvantages({ rewards, groups: [0, 0, 0], lengths: [1, 1, 1], estimator: 'gdpo' })
 * console.log(advantages.shape) // [ 3 ]
 * device.dispose()
 * ```
 */
export function groundingRewards(a: GroundingRewardsArgs): GroundingRewards {
  const op = 'groundingRewards'
  a = checkArguments(a, argumentNames, op)
  const text = checkString(a.text, 'text', op)
  const truth = checkBoxes(a.truth, 'truth', op)
  const boxes = parseBoxes(afterThinking(text)).map(({ bbox2d }) => bbox2d)
  const centres = boxes.map(([x0, y0, x1, y1]): Point => [(x0 + x1) / 2, (y0 + y1) / 2])
  const inside = centres.reduce((sum, centre) => sum + pointInBoxes(centre, truth), 0)
  return {
    iou: matchedIoU(boxes, truth),
    unionIoU: unionIoU(boxes, truth),
    pointInBox: boxes.length ? inside / boxes.length : +!truth.length,
    format: formatReward(text, 'perceiver'),
  }
}

/**
 * The sum of the IoUs of the best matching of two lists of boxes one to one, divided by the length of the longer
 * list: for one box each their IoU; a box that is missing or too many counts as 0. Two empty lists: 1.
 *
 * The matching is the optimal assignment (Kuhn 1955), which does not depend on the order of the boxes.
 *
 * @param boxes x0, y0, x1, y1 in any unit.
 * @param truth in the same unit.
 * @throws P2RError ERR_VALUE for boxes without four finite numbers.
 * @example
 * ```ts
 * import { type Box, matchedIoU } from 'p2r-kernels'
 *
 * const truth: Box[] = [[0, 0, 100, 100], [200, 0, 300, 100]]
 * console.log(matchedIoU([[200, 0, 300, 100], [0, 0, 100, 50]], truth)) // 0.75
 * console.log(matchedIoU([[0, 0, 100, 100]], truth)) // 0.5
 * ```
 */
export function matchedIoU(boxes: readonly Box[], truth: readonly Box[]): number {
  const op = 'matchedIoU'
  boxes = checkBoxes(boxes, 'boxes', op)
  truth = checkBoxes(truth, 'truth', op)
  if (!boxes.length && !truth.length) return 1
  const [few, many] = boxes.length < truth.length ? [boxes, truth] : [truth, boxes]
  const overlaps = few.map((a) => many.map((b) => boxIoU(a, b)))
  return assignmentSum(overlaps) / many.length
}

/**
 * Intersection over union of two sets of boxes, each taken as the region that its boxes cover together: boxes that
 * overlap, or that split a region, count for what they cover. Two sets without area: 1 if both are empty lists,
 * else 0.
 *
 * @param boxes x0, y0, x1, y1 in any unit.
 * @param truth in the same unit.
 * @throws P2RError ERR_VALUE for boxes without four finite numbers.
 * @example
 * ```ts
 * import { type Box, unionIoU } from 'p2r-kernels'
 *
 * const halves: Box[] = [[0, 0, 50, 100], [50, 0, 100, 100]]
 * console.log(unionIoU(halves, [[0, 0, 100, 100]])) // 1
 * console.log(unionIoU(halves, [[0, 0, 100, 200]])) // 0.5
 * ```
 */
export function unionIoU(boxes: readonly Box[], truth: readonly Box[]): number {
  const op = 'unionIoU'
  boxes = checkBoxes(boxes, 'boxes', op)
  truth = checkBoxes(truth, 'truth', op)
  if (!boxes.length && !truth.length) return 1
  const edges = [...new Set([...boxes, ...truth].flatMap(([x0, , x1]) => [x0, x1]))].sort(
    (a, b) => a - b,
  )
  let intersection = 0
  let union = 0
  for (let i = 1; i < edges.length; i++) {
    const [x0, x1] = [edges[i - 1]!, edges[i]!]
    // Between neighbouring edges a box covers the whole width or nothing.
    const columns = [boxes, truth].map((all) =>
      intervals(all.filter((box) => box[0] <= x0 && box[2] >= x1)),
    )
    const [a, b, both] = [columns[0]!, columns[1]!, intervals(columns.flat())].map(length)
    intersection += Math.max(0, a! + b! - both!) * (x1 - x0)
    union += both! * (x1 - x0)
  }
  return union > 0 ? intersection / union : 0
}

/** x, y in any unit. */
export type Point = readonly [x: number, y: number]

/**
 * 1 if a point is in one of the boxes, edges included, else 0: the reward of pointing (the in-box reward of
 * GuirlVG, arXiv:2508.04389).
 *
 * @param point x, y in any unit.
 * @param boxes x0, y0, x1, y1 in the same unit.
 * @throws P2RError ERR_VALUE for anything but two and four finite numbers.
 * @example
 * ```js
 * import { pointInBoxes } from 'p2r-kernels'
 *
 * console.log(pointInBoxes([50, 50], [[0, 0, 100, 100]])) // 1
 * console.log(pointInBoxes([150, 50], [[0, 0, 100, 100]])) // 0
 * ```
 */
export function pointInBoxes(point: Point, boxes: readonly Box[]): number {
  const op = 'pointInBoxes'
  const [x, y] = checkFiniteNumbers(point, 2, 'point', op) as [number, number]
  return +checkBoxes(boxes, 'boxes', op).some(
    ([x0, y0, x1, y1]) => x >= x0 && x <= x1 && y >= y0 && y <= y1,
  )
}

/**
 * 1 where an output has the form that the default prompts ask for, else 0, whatever it says.
 *
 * 'perceiver': after the thought, if any, JSON and nothing else, in a fence of three backticks or without; a list,
 * which may be empty, whose entries each have exactly a `bbox_2d` in thousandths (four finite numbers from 0 to 1000, x0
 * < x1, y0 < y1) and a `label` that is neither blank nor the prompt's 'description'. 'reasoner': one thought in
 * `<think>` tags and behind it one answer that is not blank in `<answer>` tags, with nothing else outside of them.
 *
 * @param text a model's output.
 * @param role whose.
 * @throws P2RError ERR_VALUE for a text that is none, and for an unknown role.
 * @example
 * ```js
 * import { formatReward } from 'p2r-kernels'
 *
 * console.log(formatReward('[{"bbox_2d": [0, 0, 10, 10], "label": "sign"}]', 'perceiver')) // 1
 * console.log(formatReward('Here: [{"bbox_2d": [0, 0, 10, 10], "label": "sign"}]', 'perceiver')) // 0
 * console.log(formatReward('<think>A sign.</think><answer>B</answer>', 'reasoner')) // 1
 * ```
 */
export function formatReward(text: string, role: Role): number {
  const op = 'formatReward'
  checkString(text, 'text', op)
  choice(role, ['perceiver', 'reasoner'], 'role', op)
  return +(role === 'perceiver' ? isListOfBoxes(text) : isThoughtAndAnswer(text))
}

const fenced = new RegExp(`^\`\`\`(?:json)?(?=[${blanks}]*\n)([^\`]*)\`\`\`$`)

function isListOfBoxes(text: string): boolean {
  const shown = strip(afterThinking(text))
  let data: ReturnType<typeof parseJson>
  try {
    data = parseJson(strip(fenced.exec(shown)?.[1] ?? shown))
  } catch (error) {
    if (error instanceof NotJson || error instanceof TooDeep) return false
    throw error
  }
  return (
    Array.isArray(data) &&
    data.every((entry) => {
      if (!(entry instanceof Map) || entry.size !== 2) return false
      const [box, label] = [entry.get('bbox_2d'), entry.get('label')]
      if (!Array.isArray(box) || box.length !== 4 || typeof label !== 'string') return false
      if (!box.every((c) => typeof c === 'number' && c >= 0 && c <= 1000)) return false
      const [x0, y0, x1, y1] = box as number[]
      const name = strip(label).toLowerCase()
      return x0! < x1! && y0! < y1! && name !== '' && name !== 'description'
    })
  )
}

function isThoughtAndAnswer(text: string): boolean {
  const tags = ['<think>', '</think>', '<answer>', '</answer>']
  const places = tags.map((tag) => text.indexOf(tag))
  if (places.some((at, i) => at < 0 || at !== text.lastIndexOf(tags[i]!))) return false
  const [think, thought, answer, end] = places as [number, number, number, number]
  const outside = [
    text.slice(0, think),
    text.slice(thought + '</think>'.length, answer),
    text.slice(end + '</answer>'.length),
  ]
  return (
    think < thought &&
    thought < answer &&
    answer < end &&
    outside.every((rest) => strip(rest) === '') &&
    strip(text.slice(answer + '<answer>'.length, end)) !== ''
  )
}

function checkBoxes(boxes: readonly Box[], name: string, op: string): readonly Box[] {
  return checkArray(boxes, name, op).map(
    (box, i) => checkFiniteNumbers(box, 4, `${name}[${i}]`, op) as unknown as Box,
  )
}

type Interval = readonly [low: number, high: number]

/** What the boxes, or intervals, cover of the y axis: disjoint intervals in order. */
function intervals(of: readonly (Box | Interval)[]): Interval[] {
  const sorted = of
    .map((each): Interval => (each.length === 4 ? [each[1], each[3]] : each))
    .filter(([low, high]) => low < high)
    .sort(([a], [b]) => a - b)
  const merged: [number, number][] = []
  for (const [low, high] of sorted) {
    const last = merged.at(-1)
    if (last && low <= last[1]) last[1] = Math.max(last[1], high)
    else merged.push([low, high])
  }
  return merged
}

function length(of: readonly Interval[]): number {
  return of.reduce((sum, [low, high]) => sum + (high - low), 0)
}

/**
 * The largest sum of entries with one from each row, no two of them from the same column; there are at least as many
 * columns as rows. The Hungarian algorithm with potentials, one row at a time along the cheapest augmenting path
 * (Jonker and Volgenant 1987): O(rows² columns).
 */
function assignmentSum(values: readonly (readonly number[])[]): number {
  const rows = values.length
  const columns = values[0]?.length ?? 0
  const none = rows
  // Column `columns` is a virtual one, where the row to be assigned starts.
  const owner = new Array<number>(columns + 1).fill(none)
  const rowPotential = new Array<number>(rows + 1).fill(0)
  const columnPotential = new Array<number>(columns + 1).fill(0)
  for (let row = 0; row < rows; row++) {
    owner[columns] = row
    let column = columns
    const least = new Array<number>(columns).fill(Number.POSITIVE_INFINITY)
    const before = new Array<number>(columns).fill(columns)
    const visited = new Array<boolean>(columns + 1).fill(false)
    while (owner[column] !== none) {
      visited[column] = true
      const from = owner[column]!
      let step = Number.POSITIVE_INFINITY
      let next = column
      for (let c = 0; c < columns; c++) {
        if (visited[c]) continue
        const cost = -values[from]![c]! - rowPotential[from]! - columnPotential[c]!
        if (cost < least[c]!) {
          least[c] = cost
          before[c] = column
        }
        if (least[c]! < step) {
          step = least[c]!
          next = c
        }
      }
      for (let c = 0; c <= columns; c++)
        if (visited[c]) {
          rowPotential[owner[c]!]! += step
          columnPotential[c]! -= step
        } else if (c < columns) least[c]! -= step
      column = next
    }
    while (column !== columns) {
      owner[column] = owner[before[column]!]!
      column = before[column]!
    }
  }
  let sum = 0
  for (let c = 0; c < columns; c++) if (owner[c] !== none) sum += values[owner[c]!]![c]!
  return sum
}
