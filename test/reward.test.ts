import fc from 'fast-check'
import {
  type AnswerForm,
  answerReward,
  boxIoU,
  type EvidenceBox,
  extractAnswer,
  functionPolicy,
  modelVerifier,
  overlongPenalty,
  parseBoxes,
  perceptionFault,
  type RewardRules,
} from 'p2r-kernels'
import { describe, expect, test } from 'vitest'
import { golden } from './golden.js'
import { expectRefusal } from './harness.js'

const rules = ['reference', 'strict'] as const
const reward = (answer: string, truth: string, form: AnswerForm, rules: RewardRules) =>
  answerReward({ answer, truth, form, rules })

describe('the reference’s table', () => {
  const rows = golden('grpo').json('grpo/reward_table.rows.json')

  test('reasoner, row by row', async () => {
    let seen = 0
    for (const row of rows) {
      // Forms that are not in the surface, and a verifier that the reference lacks: it scores both 0
      // in silence, here they are errors.
      if (row.role !== 'reasoner' || row.answer_form === 'other') continue
      const answer = extractAnswer(row.text)
      expect(answer, row.text).toBe(row.extracted_answer)
      const a = { answer, truth: row.ground_truth, form: row.answer_form, question: 'which?' }
      if (row.answer_form === 'free_form' && row.verifier_reply === undefined) {
        await expect(answerReward(a)).rejects.toMatchObject({ code: 'ERR_VALUE' })
        continue
      }
      const verifier = modelVerifier(functionPolicy(() => row.verifier_reply))
      expect(await answerReward({ ...a, verifier }), JSON.stringify(row)).toBe(row.score)
      seen++
    }
    expect(seen).toBe(32 + 16 + 9)
  })

  test('perceiver, row by row', async () => {
    let seen = 0
    for (const row of rows) {
      if (row.role !== 'perceiver') continue
      const boxes = parseBoxes(row.text)
      expect(boxes.length, row.text).toBe(row.bbox_count)
      const fault = perceptionFault(boxes)
      expect(fault, row.text).toBe(row.penalty === 'iou' ? 'overlap' : row.penalty)
      const answer = fault ? '' : extractAnswer(row.reasoner_text)
      expect(answer).toBe(row.extracted_answer)
      const scored = fault ? 0 : await reward(answer, row.ground_truth, 'mca', 'reference')
      expect(scored, row.text).toBe(row.score)
      seen++
    }
    expect(seen).toBe(39)
  })

  test('overlaps', () => {
    for (const row of golden('grpo').json('grpo/bbox_iou.rows.json'))
      expect(boxIoU(row.a, row.b)).toBeCloseTo(row.iou, 12)
    expect(boxIoU([0, 0, 0, 0], [0, 0, 0, 0])).toBe(0)
  })
})

test.each<[string, string, string]>([
  // text, reference, strict
  ['<answer>A</answer><answer>B</answer>', 'A', 'B'],
  ['<ANSWER>A</ANSWER>', '<ANSWER>A</ANSWER>', 'A'],
  ['<answer>A', '<answer>A', 'A'],
  ['<think>Could be D</think> final B', '<think>Could be D</think> final B', 'final B'],
  ['<think>is it <answer>A</answer>?</think><answer>B</answer>', 'A', 'B'],
  ['<think>no end', '<think>no end', ''],
  [' plain\n', 'plain', 'plain'],
  ['</answer><answer>x</answer>', 'x', 'x'],
  ['İ <answer>x</answer>', 'x', 'İ <answer>x</answer>'],
  ['', '', ''],
])('extractAnswer of %j', (text, reference, strict) => {
  expect(extractAnswer(text)).toBe(reference)
  expect(extractAnswer(text, { rules: 'strict' })).toBe(strict)
})

describe('mca', () => {
  test.each<[string, string, number, number]>([
    // answer, truth, reference, strict
    ['B', 'B', 1, 1],
    ['b', 'B', 0, 1],
    ['(b)', 'B', 0, 1],
    ['(C)', 'C', 1, 1],
    ['**C**', 'C', 1, 1],
    ['D. the cat', 'D', 1, 1],
    ['b) blue', 'B', 0, 1],
    ['C: a glove', 'C', 1, 1],
    ['Apple', 'A', 1, 0],
    ['Both A and C', 'B', 1, 0],
    ['A or B', 'A', 1, 0],
    ['not sure', '', 1, 0],
    ['', '', 1, 0],
    ['F', 'F', 0, 1],
    ['the best answer is d', 'D', 0, 1],
    ['The answer is B', 'B', 1, 1],
    ['The correct option is (C) because of the hat', 'C', 1, 1],
    ['I think Because it is red the Answer: C', 'C', 0, 1],
    ['final B', 'B', 1, 1],
    ['it is option d', 'D', 0, 1],
    ['It is D', 'D', 1, 1],
    ['A red hat', 'A', 1, 0],
    ['the answer is a red hat', 'A', 0, 0],
    ['答案是B', 'B', 1, 1],
    ['（Ｂ）', 'B', 0, 1],
    ['The correct answer is B. Option A is wrong because it is red.', 'B', 1, 1],
    ['The correct answer is B. Option A is wrong because it is red.', 'A', 0, 0],
    ['The answer is A. No, the answer is B.', 'B', 0, 0],
    ['B is correct. A is wrong.', 'B', 1, 1],
    ['Option B is correct, option A is not', 'B', 1, 1],
    ['I choose option B because option A shows red', 'B', 1, 1],
    ['Both A and B look plausible, but the answer is C.', 'C', 0, 1],
    ['The answer should be B. Option A is wrong', 'B', 1, 1],
    ['Therefore, the answer is option B. Option A is incorrect.', 'B', 1, 1],
    ['A. is the tree, B. the sign. The correct answer is B', 'B', 0, 1],
    ['My final answer is D. Options A, B and C are wrong.', 'D', 1, 1],
    ["It's B, because A is a tree", 'B', 1, 1],
    ['B because A is wrong', 'B', 1, 1],
    ['The correct answer is not A but B.', 'B', 0, 1],
    ['The answer is not A.', 'A', 1, 0],
    ["It isn't option A", 'A', 1, 0],
    ['The answer is A or B', 'A', 1, 0],
    ['The answer is A and B', 'B', 0, 0],
    ['正确答案是B，A是错的', 'B', 1, 1],
    ['\\boxed{B}', 'B', 1, 1],
    ['So it is $\\boxed{\\text{B}}$, not A', 'B', 1, 1],
    ['\\boxed{B. Stop} A was the tree', 'B', 1, 1],
    ['C: \\boxed{42}', 'C', 1, 1],
    ['\\mathbf{B}', 'B', 1, 1],
    ["A's", 'A', 1, 0],
    ['e.g. none', 'E', 0, 0],
    ['U.S.A.', 'A', 1, 0],
    ['C\u200b', 'C', 1, 1],
    ['no letters here at all just many many small words in a long line', 'A', 0, 0],
    ['no letters here at all just many many small words in a long line', '', 0, 0],
  ])('%j for %j', async (answer, truth, reference, strict) => {
    expect(await reward(answer, truth, 'mca', 'reference')).toBe(reference)
    expect(await reward(answer, truth, 'mca', 'strict')).toBe(strict)
  })
})

describe('na', () => {
  test.each<[string, string, number, number]>([
    // answer, truth, reference, strict
    ['42', '42.0', 1, 1],
    ['+7', '7', 1, 1],
    ['−7', '-7', 1, 1],
    ['- 7', '-7', 1, 1],
    ['7', '-7', 0, 0],
    ['1,234.50', '1234.5', 1, 1],
    ['12,34', '1234', 0, 0],
    ['.5', '1/2', 1, 1],
    ['2/4', '1/2', 1, 1],
    ['8/2', '4', 1, 1],
    ['3 1/2', '3.5', 1, 1],
    ['\\frac{1}{2}', '0.5', 1, 1],
    ['$\\frac{3}{4}$', '75%', 1, 1],
    ['1/3', '0.3333', 0, 0],
    ['\\boxed{42}', '42', 1, 1],
    ['\\fbox{42}', '42', 1, 1],
    ['\\mathbf{42}', '42', 1, 1],
    ['\\frac12', '0.5', 1, 1],
    ['\\boxed{\\frac{1}{2}}', '0.5', 1, 1],
    ['３', '3', 1, 1],
    ['42 \\mathrm{~cm}', '42', 1, 1],
    ['x = 7', '7', 1, 1],
    ['x = 7', '8', 0, 0],
    ['1.5 \\times 10^3', '1500', 1, 1],
    ['2 × 10^{-3}', '0.002', 1, 1],
    ['\\frac123', '0.5', 0, 0],
    // As MathRuler has them.
    ['\\frac1{2}', '0.5', 1, 1],
    ['\\tfrac{3}{4}', '0.75', 1, 1],
    ['2\\frac{1}{2}', '2.5', 1, 1],
    ['\\(42\\)', '42', 1, 1],
    ['\\[42\\]', '42', 1, 1],
    ['\\bm{42}', '42', 1, 1],
    ['\\emph{42}', '42', 1, 1],
    ['\\mathrm{42}', '42', 1, 1],
    ['\\boxed{42 \\text{ cm}}', '42', 1, 1],
    ['1{,}000', '1000', 1, 1],
    ['= 42', '42', 1, 1],
    ['[42]', '42', 1, 1],
    ['$-7', '-7', 1, 1],
    ['42\\\\', '42', 1, 1],
    ['42,', '42', 1, 1],
    ['\\quad 42', '42', 1, 1],
    ['{\\bf 42}', '42', 1, 1],
    ['\\rm{42 cm}', '42', 1, 1],
    ['\\color{red}{42}', '42', 1, 1],
    ['\\hspace{1cm}42', '42', 1, 1],
    ['(\\frac{3}{4})', '0.75', 1, 1],
    ['$\\frac{3}{4} days', '0.75', 1, 1],
    ['$n = 0.5 \\text{ years}', '0.5', 1, 1],
    ['5!', '5', 0, 1],
    ['٣', '3', 1, 1],
    ['۱۲', '12', 1, 1],
    ['९', '9', 1, 1],
    ['\\sqrt{4}', '4', 0, 0],
    // Expressions: as texts under 'reference'; no number under 'strict'.
    ['2\\sqrt{3}', '2\\sqrt3', 1, 0],
    ['2\\sqrt{3}', '2\\sqrt{5}', 0, 0],
    ['\\frac{\\pi}{2}', '\\pi/2', 1, 0],
    ['\\sqrt 5', '5', 0, 0],
    ['x+1', 'x+2', 0, 0],
    ['\\text{red}', 'Red', 1, 0],
    ['red and blue', 'red, blue', 1, 0],
    ['3π', '3 \\pi', 1, 1],
    ['3π', '3', 0, 0],
    ['2\\pi r', '2\\pi', 0, 0],
    ['\\{1, 2\\}', '{1,2}', 1, 0],
    ['-\\infty', '-inf', 1, 0],
    ['$x$', 'x', 1, 0],
    // Within a sentence.
    ['So x \\approx 5.', '5', 0, 1],
    ['The area is 4 m^2 in all', '4', 0, 1],
    ['The distance is 1.5 \\times 10^3 m.', '1500', 0, 1],
    ['So half of it: \\frac{1}{2}.', '0.5', 0, 1],
    ['We add 3 + 4, so \\boxed{7}', '7', 0, 1],
    ['Out of 8, \\boxed{\\frac12} are red', '0.5', 0, 1],
    ['There are 3 million people', '3000000', 0, 1],
    ['There are 3 million people', '3', 0, 0],
    ['Es sind ３ Katzen', '3', 0, 1],
    ['50%', '0.5', 1, 1],
    ['50 percent', '50%', 1, 1],
    ['50\\%', '1/2', 1, 1],
    ['50%', '50', 1, 0],
    ['0.5', '50', 0, 0],
    ['5 cm', '5', 1, 1],
    ['5cm', '5 cm', 1, 1],
    ['5 cats', '5', 1, 1],
    ['5 cm', '5 m', 1, 0],
    ['5 meters', '5 meter', 1, 1],
    ['90°', '90', 1, 1],
    ['90^\\circ', '90 degrees', 1, 0],
    ['$5 million', '5,000,000', 1, 1],
    ['$1,000', '1000', 1, 1],
    ['1e3', '1000', 1, 1],
    ['12 km/h', '12', 1, 1],
    ['4 m^2', '4', 1, 1],
    ['5.', '5', 1, 1],
    ['5', '5.5', 0, 0],
    ['5 or 6', '5', 0, 0],
    ['5-6', '5', 0, 0],
    ['12:30', '12', 0, 0],
    ['There are 5 cats.', '5', 0, 1],
    ['The value is 50%', '0.5', 0, 1],
    ['2 of the 5 cats', '5', 0, 0],
    ['on 2024-05-01', '2024', 0, 0],
    ['five', 'Five', 1, 0],
    ['a b', 'AB', 1, 0],
    ['', '', 0, 0],
    ['', '5', 0, 0],
    ['1e999', '1e999', 1, 0],
    ['1/0', '1/0', 1, 0],
    ['NaN', '5', 0, 0],
    ['Infinity', '5', 0, 0],
    ['0x10', '16', 0, 0],
  ])('%j for %j', async (answer, truth, reference, strict) => {
    expect(await reward(answer, truth, 'na', 'reference')).toBe(reference)
    expect(await reward(answer, truth, 'na', 'strict')).toBe(strict)
  })

  test('a number equals itself in every notation', async () => {
    const values = fc
      .double({ min: -1e9, max: 1e9, noNaN: true })
      .map((x) => Math.round(x * 1e3) / 1e3 + 0)
    await fc.assert(
      fc.asyncProperty(values, async (x) => {
        const truth = String(x)
        for (const answer of [
          truth,
          x.toExponential(),
          `${truth} cm`,
          x.toLocaleString('en-US', { maximumFractionDigits: 20 }),
        ])
          for (const r of rules) if (!(await reward(answer, truth, 'na', r))) return false
        return (await reward(String(x + 1 + Math.abs(x)), truth, 'na', 'strict')) === 0
      }),
      { numRuns: 300, seed: 4 },
    )
  })
})

describe('free form', () => {
  const judged = (reply: string, rules: RewardRules) =>
    modelVerifier(
      functionPolicy(() => reply),
      { rules },
    )({ question: 'q', answer: 'a', truth: 't' })

  test.each<[string, boolean, boolean | 'unclear']>([
    ['Yes', true, true],
    ['yes.', true, true],
    ['**Yes**, it is', true, true],
    ['NO', false, false],
    ['No.', false, false],
    ['Eyes', true, 'unclear'],
    ['Not quite, but yes-ish', true, 'unclear'],
    ['<think>No, wait: yes</think>No', false, false],
    ['<think>hm</think>\nYes', true, true],
    ['<think>yes', true, 'unclear'],
    ['', false, 'unclear'],
    ['nothing', false, 'unclear'],
  ])('a verifier that says %j', async (reply, reference, strict) => {
    expect(await judged(reply, 'reference')).toBe(reference)
    if (strict === 'unclear')
      await expect(judged(reply, 'strict')).rejects.toMatchObject({
        code: 'ERR_POLICY',
        op: 'modelVerifier',
      })
    else expect(await judged(reply, 'strict')).toBe(strict)
  })

  test('the verifier receives question, truth and answer unchanged', async () => {
    let prompt = ''
    const verifier = modelVerifier(
      functionPolicy((request) => {
        prompt = request.prompt
        return 'yes'
      }),
      { prompt: '{question}|{truth}|{answer}' },
    )
    const a = { answer: '$& {truth}', truth: '{answer}', form: 'free_form' as const }
    expect(await answerReward({ ...a, question: 'who?', verifier })).toBe(1)
    expect(prompt).toBe('who?|{answer}|$& {truth}')
  })

  test('its failure is an error, not a score', async () => {
    const verifier = modelVerifier(
      functionPolicy(() => {
        throw new Error('down')
      }),
    )
    await expect(
      answerReward({ answer: 'a', truth: 'a', form: 'free_form', verifier }),
    ).rejects.toMatchObject({ code: 'ERR_POLICY', message: expect.stringContaining('down') })
  })
})

test('perceptionFault: overlap before label, and what strict adds', () => {
  const box = (label: string, ...bbox2d: [number, number, number, number]): EvidenceBox => ({
    bbox2d,
    label,
  })
  const [a, b] = [box('', 0, 0, 10, 10), box('x', 0, 0, 10, 9)]
  expect(perceptionFault([])).toBe(null)
  expect(perceptionFault([a, b])).toBe('overlap')
  expect(perceptionFault([a])).toBe('label')
  for (const label of ['   ', '<description>', '"description"', '[]'])
    expect([
      perceptionFault([box(label, 0, 0, 1, 1)]),
      perceptionFault([box(label, 0, 0, 1, 1)], { rules: 'strict' }),
    ]).toEqual([null, 'label'])
  expect(perceptionFault([box('a description', 0, 0, 1, 1)], { rules: 'strict' })).toBe(null)
})

test('no output of a model throws', async () => {
  const piece = fc.constantFrom(
    ...['<answer>', '</answer>', '<think>', '</think>', 'A', 'b)', 'answer is', 'option', '1,234'],
    ...[
      '50%',
      '/',
      '1/0',
      '1e999',
      '-',
      '\\frac{',
      '}',
      '{',
      '[',
      '"bbox_2d"',
      ':',
      '$',
      '\\text{',
    ],
    ...['million', ' ', '\n', '\u0000', '\ud800', 'İ', '°', 'NaN', '[1,2,3,4]', '.', "'", '٣'],
  )
  const texts = fc.oneof(
    fc.string({ unit: 'binary', maxLength: 60 }),
    fc.array(piece, { maxLength: 30 }).map((p) => p.join('')),
  )
  await fc.assert(
    fc.asyncProperty(texts, texts, async (text, truth) => {
      for (const r of rules) {
        perceptionFault(parseBoxes(text), { rules: r })
        const answer = extractAnswer(text, { rules: r })
        for (const form of ['mca', 'na', 'free_form'] as const) {
          const verifier = async () => true
          const score = await answerReward({ answer, truth, form, rules: r, verifier })
          if (score !== 0 && score !== 1) return false
        }
      }
      return true
    }),
    { numRuns: 4000, seed: 5 },
  )
  expect(extractAnswer(undefined as never)).toBe('')
  expect(await reward(null as never, '5', 'na', 'strict')).toBe(0)
})

test('long invalid text takes linear time', async () => {
  const n = 300_000
  const started = performance.now()
  for (const text of [
    '<answer>'.repeat(n / 8),
    '</think><think>'.repeat(n / 15),
    ' '.repeat(n),
    '1 '.repeat(n / 2),
    '1,'.repeat(n / 2),
    'answer is '.repeat(n / 10),
    'A.'.repeat(n / 2),
    '('.repeat(n),
    '\\frac{'.repeat(n / 6),
    '9'.repeat(n),
    `5${'m'.repeat(n)}!`,
  ])
    for (const r of rules) {
      const answer = extractAnswer(text, { rules: r })
      for (const form of ['mca', 'na'] as const) await reward(answer, '5', form, r)
    }
  // Quadratic time would be minutes.
  expect(performance.now() - started).toBeLessThan(10_000)
})

test('long answers cost what DAPO and verl take', () => {
  const limit = { maxTokens: 1000, buffer: 200 }
  // verl: min(-exceed / buffer * factor, 0); DAPO: not below -1.
  const verl = (length: number, factor: number): number =>
    Math.max(Math.min((-(length - 800) / 200) * factor, 0), -factor)
  for (const factor of [0, 0.5, 1, 3])
    for (const length of [0, 1, 799, 800, 801, 850, 999, 1000, 1001, 5000])
      expect(overlongPenalty({ ...limit, length, factor })).toBeCloseTo(verl(length, factor), 12)
  expect(overlongPenalty({ ...limit, length: 900 })).toBe(-0.5)
  expect(Object.is(overlongPenalty({ ...limit, length: 800 }), 0)).toBe(true)
  expect(overlongPenalty({ maxTokens: 8, buffer: 8, length: 4 })).toBe(-0.5)
  const refuses = (extra: object, message: RegExp) =>
    expectRefusal(
      () => overlongPenalty({ ...limit, length: 1, ...extra } as never),
      'ERR_VALUE',
      'overlongPenalty',
      message,
    )
  refuses({ length: -1 }, /length/)
  refuses({ length: 1.5 }, /length/)
  refuses({ buffer: 0 }, /buffer/)
  refuses({ buffer: 1001 }, /buffer/)
  refuses({ factor: -1 }, /factor/)
  refuses({ bufer: 3 }, /did you mean 'buffer'/)
})

test('refuses invalid arguments', async () => {
  const good = { answer: 'a', truth: 'a', form: 'mca' as const }
  for (const wrong of [{ truth: 3 }, { form: 'other' }, { rules: 'lax' }, { form: 'free_form' }])
    await expect(answerReward({ ...good, ...wrong } as never)).rejects.toMatchObject({
      code: 'ERR_VALUE',
      op: 'answerReward',
    })
  expectRefusal(() => extractAnswer('', { rules: 'x' as never }), 'ERR_VALUE', 'extractAnswer')
  expectRefusal(() => perceptionFault([], { rules: 'x' as never }), 'ERR_VALUE', 'perceptionFault')
  expectRefusal(() => modelVerifier({} as never), 'ERR_VALUE', 'modelVerifier', /Policy/)
})
