import fc from 'fast-check'
import {
  type Box,
  boxIoU,
  formatReward,
  groundingRewards,
  groupAdvantages,
  matchedIoU,
  openDevice,
  pointInBoxes,
  unionIoU,
} from 'p2r-kernels'
import { describe, expect, test } from 'vitest'
import { expectRefusal } from './harness.js'

const box = fc
  .tuple(fc.nat(12), fc.nat(12), fc.integer({ min: 1, max: 8 }), fc.integer({ min: 1, max: 8 }))
  .map(([x, y, w, h]): Box => [x, y, x + w, y + h])
const several = (maxLength: number) => fc.array(box, { maxLength })

/** All injections of the shorter list into the longer one. */
function bestMatching(a: readonly Box[], b: readonly Box[]): number {
  if (a.length > b.length) return bestMatching(b, a)
  const [first, ...rest] = a
  if (!first) return 0
  return Math.max(
    ...b.map((each, i) => boxIoU(first, each) + bestMatching(rest, b.toSpliced(i, 1))),
  )
}

/** Counts the unit squares of a small image. */
function squares(boxes: readonly Box[]): Set<number> {
  const covered = new Set<number>()
  for (const [x0, y0, x1, y1] of boxes)
    for (let y = y0; y < y1; y++) for (let x = x0; x < x1; x++) covered.add(1000 * y + x)
  return covered
}

describe('matchedIoU', () => {
  test('is the best of all matchings', () => {
    fc.assert(
      fc.property(several(5), several(5), (a, b) => {
        const longer = Math.max(a.length, b.length)
        const expected = longer ? bestMatching(a, b) / longer : 1
        expect(matchedIoU(a, b)).toBeCloseTo(expected, 12)
        expect(matchedIoU(a, b)).toBeCloseTo(matchedIoU(b, a.toReversed()), 12)
      }),
    )
  })

  test('a greedy matching would be worse', () => {
    // The first box overlaps both; taking its best one leaves nothing for the second box.
    const boxes: Box[] = [
      [0, 0, 20, 10],
      [0, 0, 12, 10],
    ]
    const truth: Box[] = [
      [0, 0, 14, 10],
      [14, 0, 20, 10],
    ]
    expect(matchedIoU(boxes, truth)).toBeCloseTo((6 / 20 + 12 / 14) / 2, 12)
  })

  test('many boxes', () => {
    const many = Array.from({ length: 300 }, (_, i): Box => [i, 0, i + 1, 1])
    expect(matchedIoU(many, many.toReversed())).toBe(1)
  })
})

describe('unionIoU', () => {
  test('counts unit squares', () => {
    fc.assert(
      fc.property(several(6), several(6), (a, b) => {
        const [covered, wanted] = [squares(a), squares(b)]
        const all = new Set([...covered, ...wanted]).size
        const expected = all ? [...covered].filter((at) => wanted.has(at)).length / all : 1
        expect(unionIoU(a, b)).toBeCloseTo(expected, 12)
      }),
    )
  })

  test('equals boxIoU for single boxes, and is 0 without area', () => {
    fc.assert(
      fc.property(box, box, (a, b) => {
        expect(unionIoU([a], [b])).toBeCloseTo(boxIoU(a, b), 12)
      }),
    )
    expect(unionIoU([[5, 5, 5, 9]], [])).toBe(0)
    expect(unionIoU([], [])).toBe(1)
    expect(unionIoU([[9, 9, 0, 0]], [[0, 0, 9, 9]])).toBe(0)
  })
})

test('pointInBoxes includes edges, and any box will do', () => {
  const boxes: Box[] = [
    [0, 0, 10, 10],
    [20, 20, 30, 30],
  ]
  for (const point of [
    [0, 0],
    [10, 10],
    [25, 20],
  ] as const)
    expect(pointInBoxes(point, boxes)).toBe(1)
  for (const point of [
    [10.5, 10],
    [15, 15],
    [-1, 5],
    [5, 11],
  ] as const)
    expect(pointInBoxes(point, boxes)).toBe(0)
  expect(pointInBoxes([0, 0], [])).toBe(0)
})

describe('formatReward', () => {
  const good = '{"bbox_2d": [0, 0.5, 1000, 700], "label": "a sign"}'

  test.each([
    ['a list', `[${good}]`, 1],
    ['two boxes', `[${good}, ${good}]`, 1],
    ['no box', '[]', 1],
    ['a fence', `\`\`\`json\n[${good}]\n\`\`\``, 1],
    ['a fence without a name', `\`\`\`\n[${good}]\`\`\``, 1],
    ['behind a thought', `<think>${'[{'}</think>\n [${good}] `, 1],
    ['a thought that never ends', `<think>[${good}]`, 0],
    ['words around it', `Here: [${good}]`, 0],
    ['an object', good, 0],
    ['nothing', '', 0],
    ['a number', '5', 0],
    ['a blank label', '[{"bbox_2d": [0, 0, 1, 1], "label": " "}]', 0],
    ['the placeholder', '[{"bbox_2d": [0, 0, 1, 1], "label": "Description"}]', 0],
    ['no label', '[{"bbox_2d": [0, 0, 1, 1]}]', 0],
    ['a further field', '[{"bbox_2d": [0, 0, 1, 1], "label": "x", "score": 1}]', 0],
    ['three numbers', '[{"bbox_2d": [0, 0, 1], "label": "x"}]', 0],
    ['an inverted box', '[{"bbox_2d": [5, 0, 1, 1], "label": "x"}]', 0],
    ['pixels', '[{"bbox_2d": [0, 0, 1920, 1080], "label": "x"}]', 0],
    ['NaN', '[{"bbox_2d": [0, 0, NaN, 1], "label": "x"}]', 0],
    ['a boolean', '[{"bbox_2d": [0, 0, true, 1], "label": "x"}]', 0],
    ['a list within', `[[${good}]]`, 0],
    ['too deep', '['.repeat(100_000), 0],
    ['one bad entry', `[${good}, 7]`, 0],
  ])('of a perceiver: %s', (_, text, expected) => {
    expect(formatReward(text, 'perceiver')).toBe(expected)
  })

  test.each([
    ['as asked', '<think>Red.</think>\n<answer>B</answer>\n', 1],
    ['an empty thought', '<think></think><answer>B</answer>', 1],
    ['a blank answer', '<think>Red.</think><answer> </answer>', 0],
    ['no thought', '<answer>B</answer>', 0],
    ['no answer', '<think>Red.</think> B', 0],
    ['words before', 'So <think>Red.</think><answer>B</answer>', 0],
    ['words between', '<think>Red.</think> so <answer>B</answer>', 0],
    ['words after', '<think>Red.</think><answer>B</answer>.', 0],
    ['two answers', '<think>Red.</think><answer>A</answer><answer>B</answer>', 0],
    ['an answer in the thought', '<think><answer>A</answer></think><answer>B</answer>', 0],
    ['the wrong order', '<answer>B</answer><think>Red.</think>', 0],
    ['an answer that is cut off', '<think>Red.</think><answer>B', 0],
    ['nothing', '', 0],
  ])('of a reasoner: %s', (_, text, expected) => {
    expect(formatReward(text, 'reasoner')).toBe(expected)
  })
})

describe('groundingRewards', () => {
  const truth: Box[] = [[400, 300, 600, 500]]
  const said = (...boxes: Box[]): string =>
    JSON.stringify(boxes.map((bbox_2d) => ({ bbox_2d, label: 'sign' })))

  test('each kind by itself', () => {
    expect(groundingRewards({ text: said([400, 300, 600, 500]), truth })).toEqual({
      iou: 1,
      unionIoU: 1,
      pointInBox: 1,
      format: 1,
    })
    // The right region in two halves: right as a region, half right as boxes.
    expect(
      groundingRewards({ text: said([400, 300, 600, 400], [400, 400, 600, 500]), truth }),
    ).toEqual({ iou: 0.25, unionIoU: 1, pointInBox: 1, format: 1 })
    expect(
      groundingRewards({ text: `Here: ${said([400, 300, 600, 500], [0, 0, 100, 100])}`, truth }),
    ).toEqual({ iou: 0.5, unionIoU: 0.8, pointInBox: 0.5, format: 0 })
    expect(groundingRewards({ text: 'I see no sign.', truth })).toEqual({
      iou: 0,
      unionIoU: 0,
      pointInBox: 0,
      format: 0,
    })
  })

  test('what is drafted in a thought does not count', () => {
    const text = `<think>${said([0, 0, 100, 100])}</think>${said([400, 300, 600, 500])}`
    expect(groundingRewards({ text, truth }).iou).toBe(1)
    expect(groundingRewards({ text: `<think>${said(truth[0]!)}`, truth }).iou).toBe(0)
  })

  test('no region is needed', () => {
    expect(groundingRewards({ text: '[]', truth: [] })).toEqual({
      iou: 1,
      unionIoU: 1,
      pointInBox: 1,
      format: 1,
    })
    expect(groundingRewards({ text: said([0, 0, 9, 9]), truth: [] })).toEqual({
      iou: 0,
      unionIoU: 0,
      pointInBox: 0,
      format: 1,
    })
  })

  test('never throws on a text', () => {
    fc.assert(
      fc.property(fc.string({ unit: 'binary' }), (text) => {
        for (const reward of Object.values(groundingRewards({ text, truth })))
          expect(reward).toBeGreaterThanOrEqual(0)
      }),
    )
  })

  test("'gdpo' normalises each kind by itself", async () => {
    using device = openDevice('cpu')
    const texts = [
      said([400, 300, 600, 500]),
      `at ${said([400, 300, 600, 500])}`,
      said([300, 300, 600, 500]),
      'nothing',
    ]
    const rows = texts.map((text) => Object.values(groundingRewards({ text, truth })))
    // Of each kind (r - mean) / (std + epsilon), the standard deviation with n - 1; then their sum, whitened.
    const sums = texts.map(() => 0)
    for (let k = 0; k < 4; k++) {
      const kind = rows.map((row) => row[k]!)
      const mean = kind.reduce((s, r) => s + r, 0) / 4
      const std = Math.sqrt(kind.reduce((s, r) => s + (r - mean) ** 2, 0) / 3)
      for (const [i, r] of kind.entries()) sums[i]! += (r - mean) / (std + 1e-6)
    }
    const mean = sums.reduce((s, r) => s + r, 0) / 4
    const std = Math.sqrt(sums.reduce((s, r) => s + (r - mean) ** 2, 0) / 3)
    const expected = sums.map((s) => (s - mean) / std)
    using rewards = device.tensor(rows.flat(), [4, 4])
    const groups = [0, 0, 0, 0]
    const lengths = [1, 1, 1, 1]
    using made = groupAdvantages({ rewards, groups, lengths, estimator: 'gdpo' })
    for (const [i, value] of (await made.read()).entries())
      expect(value).toBeCloseTo(expected[i]!, 5)
    // Scaling one kind changes nothing, though it would decide a plain sum.
    using scaled = device.tensor(
      rows.flatMap(([iou, ...rest]) => [100 * iou!, ...rest]),
      [4, 4],
    )
    using same = groupAdvantages({ rewards: scaled, groups, lengths, estimator: 'gdpo' })
    for (const [i, value] of (await same.read()).entries())
      expect(value).toBeCloseTo(expected[i]!, 5)
  })
})

test('mistakes are refused', () => {
  const any = (value: unknown) => value as never
  const one: Box = [0, 0, 1, 1]
  const refuses = (op: string, message: RegExp, f: () => unknown) =>
    expectRefusal(f, 'ERR_VALUE', op, message)
  refuses('matchedIoU', /boxes\[0\]/, () => matchedIoU(any([[0, 0, 1]]), []))
  refuses('unionIoU', /truth/, () => unionIoU([one], any('x')))
  refuses('unionIoU', /boxes\[0\]\[2\]/, () => unionIoU([[0, 0, Number.NaN, 1]], []))
  refuses('pointInBoxes', /point/, () => pointInBoxes(any([1]), [one]))
  refuses('formatReward', /text/, () => formatReward(any(5), 'perceiver'))
  refuses('formatReward', /role/, () => formatReward('', any('judge')))
  refuses('groundingRewards', /did you mean 'truth'/, () =>
    groundingRewards(any({ text: '', truths: [] })),
  )
})
