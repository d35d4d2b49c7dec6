import {
  checkArguments,
  checkArray,
  checkInteger,
  checkIntegerWithin,
  checkNonNegative,
  checkNumbers,
  checkPositive,
  checkString,
  choice,
  describeValue,
  type Names,
} from '../arguments.js'
import { refuse } from '../errors.js'
import type { EvidenceBox } from './boxes.js'
import {
  asciiText,
  boxedText,
  findQuantity,
  numeralsOf,
  type Quantity,
  readQuantity,
  sameNumber,
  withoutTex,
} from './numbers.js'
import { askOnce, checkPolicy, type Policy } from './policy.js'
import { type AnswerForm, checkForm } from './prompts.js'
import { strip, words } from './python_text.js'

/**
 * 'reference' scores exactly as Perceive-to-Reason's own code, with its pitfalls; 'strict' avoids them.
 * docs/rewards.md lists the differences.
 */
export type RewardRules = 'reference' | 'strict'

/** What a verifier judges. */
export interface VerifierArgs {
  /** The question, with its options, if it has any. */
  question: string
  /** The answer to judge. */
  answer: string
  /** The right answer. */
  truth: string
}

/** Resolves to whether an answer means the same as the truth. */
export type Verifier = (a: VerifierArgs) => Promise<boolean>

/** Options of extractAnswer. */
export interface ExtractAnswerOptions {
  /**
   * Which tags hold the answer.
   * @default 'reference'
   */
  rules?: RewardRules
}

/** The arguments of answerReward. */
export interface AnswerRewardArgs {
  /** What extractAnswer returned. */
  answer: string
  /** The right answer. */
  truth: string
  /** How answers are compared: as letters ('mca'), numbers ('na') or by the verifier ('free_form'). */
  form: AnswerForm
  /**
   * For the verifier.
   * @default ''
   */
  question?: string
  /** Judges answers of free form, which need one. */
  verifier?: Verifier
  /**
   * Of comparing.
   * @default 'reference'
   */
  rules?: RewardRules
}

/** Options of perceptionFault. */
export interface PerceptionFaultOptions {
  /**
   * Of judging labels.
   * @default 'reference'
   */
  rules?: RewardRules
}

/** Options of modelVerifier. */
export interface ModelVerifierOptions {
  /**
   * Of reading the reply.
   * @default 'reference'
   */
  rules?: RewardRules
  /**
   * A template, in which {question}, {answer} and {truth} are replaced.
   * @default asks for "Yes" or "No"
   */
  prompt?: string
  /**
   * The longest reply, in tokens.
   * @default 64
   */
  maxTokens?: number
}

const rulesNames: Names<{ rules?: RewardRules }> = { rules: true }
const rewardNames: Names<AnswerRewardArgs> = {
  answer: true,
  truth: true,
  form: true,
  question: true,
  verifier: true,
  rules: true,
}
const verifierOptionNames: Names<ModelVerifierOptions> = {
  ...rulesNames,
  prompt: true,
  maxTokens: true,
}
const verifierNames: Names<VerifierArgs> = { question: true, answer: true, truth: true }

/** @internal */
export function rulesOf(rules: RewardRules | undefined, op: string, name = 'rules'): RewardRules {
  return choice(rules ?? 'reference', ['reference', 'strict'], name, op)
}

/**
 * The answer in a reasoner's output.
 *
 * 'reference': the content of the first <answer> tags, else the whole text. 'strict': the content of the last
 * tags after the thinking, tags in any case; a truncated answer counts, unfinished thinking gives ''.
 * Source: Perceive-to-Reason, verl/utils/reward_score/p2r_reward.py.
 *
 * @returns the answer without surrounding blanks; '' for anything but a text. No text throws.
 * @throws P2RError ERR_VALUE for wrong options.
 * @example
 * ```js
 * import { extractAnswer } from 'p2r-kernels'
 *
 * const text = '<think>Is it <answer>A</answer>? No.</think><answer> B </answer>'
 * console.log(extractAnswer(text)) // A
 * console.log(extractAnswer(text, { rules: 'strict' })) // B
 * ```
 */
export function extractAnswer(text: string, options: ExtractAnswerOptions = {}): string {
  const op = 'extractAnswer'
  options = checkArguments(options, rulesNames, op)
  const rules = rulesOf(options.rules, op)
  if (typeof text !== 'string') return ''
  if (rules === 'reference') {
    const open = text.indexOf('<answer>')
    const close = open < 0 ? -1 : text.indexOf('</answer>', open)
    return strip(close < 0 ? text : text.slice(open + '<answer>'.length, close))
  }
  const visible = afterThinking(text)
  const lower = visible.toLowerCase()
  // Some letters change their length in lower case, which would shift the indices.
  if (lower.length !== visible.length) return strip(visible)
  const open = lower.lastIndexOf('<answer>')
  if (open < 0) return strip(visible)
  const close = lower.indexOf('</answer>', open)
  return strip(visible.slice(open + '<answer>'.length, close < 0 ? undefined : close))
}

/** @internal The text after the thinking; '' if the thinking is unfinished. */
export function afterThinking(text: string): string {
  const end = text.lastIndexOf('</think>')
  const visible = end < 0 ? text : text.slice(end + '</think>'.length)
  const open = visible.indexOf('<think>')
  return open < 0 ? visible : visible.slice(0, open)
}

/**
 * 1 if the answer is correct, else 0. Never throws because of an answer's content.
 *
 * - 'mca': the option's letter. 'reference': the first of A to E in upper case, also within a word
 *   ('Apple' is A). 'strict': a single letter that is written as an option.
 * - 'na': equal as numbers: percentages, fractions, mixed numbers, thousands separators and scales
 *   (million) are parsed, units are ignored. 'reference' also accepts a percentage as its plain number,
 *   50 % as 50; 'strict' accepts it as 0.5 only, compares units if both have one, and finds the only
 *   number in a sentence. Texts that are not numbers are compared as texts ('reference').
 * - 'free_form': the verifier's verdict; its errors are passed on.
 *
 * Source: Perceive-to-Reason, verl/utils/reward_score/p2r_reward.py.
 *
 * @throws P2RError ERR_VALUE for 'free_form' without a verifier, and for wrong arguments.
 * @example
 * ```js
 * import { answerReward } from 'p2r-kernels'
 *
 * console.log(await answerReward({ answer: '1/2', truth: '50 %', form: 'na' })) // 1
 * console.log(await answerReward({ answer: 'Apple', truth: 'A', form: 'mca' })) // 1
 * console.log(await answerReward({ answer: 'Apple', truth: 'A', form: 'mca', rules: 'strict' })) // 0
 * ```
 */
export async function answerReward(a: AnswerRewardArgs): Promise<number> {
  const op = 'answerReward'
  a = checkArguments(a, rewardNames, op)
  const { truth, question = '', verifier } = a
  const rules = rulesOf(a.rules, op)
  const form = checkForm(a.form, 'form', op)
  checkString(truth, 'truth', op)
  checkString(question, 'question', op)
  const answer = typeof a.answer === 'string' ? a.answer : ''
  if (form === 'mca') return +optionMatches[rules](answer, truth)
  if (form === 'na') return +numberMatches[rules](answer, truth)
  if (typeof verifier !== 'function')
    refuse('ERR_VALUE', op, `'free_form' needs a verifier, got ${describeValue(verifier)}`)
  const verdict: unknown = await verifier({ question, answer, truth })
  if (typeof verdict !== 'boolean')
    refuse(
      'ERR_POLICY',
      op,
      `the verifier must resolve to true or false, got ${describeValue(verdict)}`,
    )
  return +verdict
}

/** Phrases that the reference removes everywhere, in this order. */
const optionPhrases = [
  'The best answer is',
  'The correct answer is',
  'The answer is',
  'The answer',
  'The best option is',
  'The correct option is',
  'Best answer:',
  'Best option:',
  'Answer:',
  'Option:',
  'The correct answer',
  'The correct option',
]

const optionMatches: Record<RewardRules, (answer: string, truth: string) => boolean> = {
  reference(answer, truth) {
    const rest = optionPhrases.reduce((text, phrase) => text.replaceAll(phrase, ''), strip(answer))
    const letter = /[ABCDE]/.exec(rest)?.[0]
    // An answer of many words and no letter is wrong even where the truth is empty.
    if (!letter && words(rest).length > 10) return false
    return (letter ?? '') === strip(truth).toUpperCase()
  },
  strict(answer, truth) {
    const letter = optionLetter(answer)
    return letter !== '' && letter === optionLetter(truth)
  },
}

const latin = '\\p{Script=Latin}'
const open = '[*_"\'`(\\[{]{0,8}'
/** No longer word, and no possessive. */
const end = `(?!['’]?${latin})`
/** A letter in upper case. A and I before a word in lower case are words themselves, but for a few. */
const upper = `(?:[B-HJ-Z]|[AI](?!\\s+(?!(?:and|as|because|but|is|not|or|rather|since)\\b)[a-z]))${end}`
const alone = new RegExp(`^[^${latin}\\d]*(${latin})[^${latin}\\d]*$`, 'u')
const leading = new RegExp(
  `^[^${latin}\\d]*(?:([A-Za-z])[*_"'\`]*[.):\\]}](?!\\S*\\.)|([A-Z])\\s+(?:because|since)\\b)`,
  'u',
)
const be = '(?:\\s+(?:is|IS|was|should be|must be|would be))'
const right = '(?:[Cc]orrect|CORRECT|[Bb]est|[Rr]ight)'
const option = '(?:[Oo]ption|OPTION|[Cc]hoice|CHOICE)'
const announced = new RegExp(
  `(?:[Aa]nswer|ANSWER|${option})${be}?\\s*:?\\s*${open}(?:([A-Z])|([a-z])(?=[^${latin}\\s]|\\s*$))${end}`,
  'gu',
)
const says = `(?:[Aa]nswer|ANSWER|${right}\\s+${option})(?:${be}\\s*:?|\\s*:)|答案\\s*[是为:]|选择?`
const takes = "(?:choose|chose|pick|select|go with|[Ii]t(?:['’]s|\\s+is))\\s"
const mark = `[)\\]*_"'\`]{0,8}`
const beside = `${mark}\\s*(?:or|/|&|and(?!\\s+\\S+\\s+[a-z]))\\s*(?:${option}\\s+)?${open}([A-Z])${end}`
/** A letter that is declared right, whatever is said of other options, and one beside it: "B or C". */
const declared = new RegExp(
  `(?:${says}|${takes})\\s*(?:${option}\\s+)?${open}(${upper})(?:${beside})?`,
  'gu',
)
const praised = new RegExp(
  `(?<![${latin}'’])([A-Z])${end}${mark}\\s+(?:is|was)\\s+(?:the\\s+)?${right}\\b`,
  'gu',
)
const capital = new RegExp(`(?<![${latin}'’])(${upper})`, 'gu')
const more = `(?:(?:\\s*,\\s*|\\s+(?:and|or)\\s+)(?:and\\s+|or\\s+)?${open}[A-Z]${end}${mark}){0,8}`
const is = '(?:is|are|was|were)\\s+(?:also\\s+|clearly\\s+|all\\s+|both\\s+)?'
const wrong = `(?:isn['’]t|aren['’]t|${is}(?:not|wrong|incorrect|false|ruled out))(?!${latin})`
/** Letters that are said not to be the answer. */
const denied = new RegExp(
  `(?<!${latin})(?:not|isn['’]t|rather than|instead of)\\s+(?:${option}\\s+)?${open}[A-Z]${end}` +
    `|(?:${option}s?\\s+)?${open}(?<![${latin}'’])[A-Z]${end}${mark}${more}\\s+${wrong}`,
  'gu',
)

/** The letter of the only option that an answer names; '' if it names none or several. */
function optionLetter(answer: string): string {
  const text = strip(asciiText(answer.slice(0, 10_000)))
  const boxed = boxedText(text)
  return (boxed === undefined ? '' : letterIn(withoutTex(boxed))) || letterIn(withoutTex(text))
}

function letterIn(text: string): string {
  const rest = text.replace(denied, ' ')
  const right = new Set([...lettersIn(rest, declared), ...lettersIn(rest, praised)])
  if (right.size > 0) return only(right)
  const first = alone.exec(text) ?? leading.exec(text)
  if (first) return (first[1] ?? first[2])!.toUpperCase()
  const named = lettersIn(rest, announced)
  return only(named.size > 0 ? named : lettersIn(rest, capital))
}

function lettersIn(text: string, pattern: RegExp): Set<string> {
  const letters = Array.from(text.matchAll(pattern), (match) => match.slice(1)).flat()
  return new Set(letters.flatMap((letter) => letter?.toUpperCase() ?? []))
}

function only(letters: ReadonlySet<string>): string {
  return letters.size === 1 ? [...letters][0]! : ''
}

const numberMatches: Record<RewardRules, (answer: string, truth: string) => boolean> = {
  reference(answer, truth) {
    const [a, b] = [readQuantity(answer), readQuantity(truth)]
    if (!a || !b) return answer !== '' && plainText(answer) === plainText(truth)
    return sameNumber(a.value, b.value) || sameNumber(asFraction(a), asFraction(b))
  },
  strict(answer, truth) {
    const [a, b] = [quantityIn(answer), quantityIn(truth)]
    if (!a || !b || (a.unit && b.unit && a.unit !== b.unit)) return false
    return sameNumber(asFraction(a), asFraction(b))
  },
}

/** A text that is a number, the one in a box, or the only one of a sentence. */
function quantityIn(text: string): Quantity | undefined {
  const boxed = boxedText(text.slice(0, 10_000))
  return (
    readQuantity(text) ??
    (boxed === undefined ? undefined : quantityIn(boxed)) ??
    findQuantity(text)
  )
}

function asFraction({ value, percent }: Quantity): number {
  return percent ? value / 100 : value
}

/** What is left of a text that is no number: letters in one case, without blanks, TeX's fonts and braces. */
function plainText(text: string): string {
  // Bounds the time of the patterns.
  if (text.length > 200) return words(text).join('').toLowerCase()
  const plain = numeralsOf(text.replace(/\\([{}])/g, '$1'))
    .replace(/^\s*\$(.*)\$\s*$/s, '$1')
    .replace(/\\pi(?![A-Za-z])|π/g, 'pi')
    .replace(/\\infty(?![A-Za-z])|∞/g, 'inf')
    .replace(/ (?:and|or) /g, ',')
  return words(plain).join('').toLowerCase()
}

/**
 * Why a perceiver's output has reward 0 whatever the answer: two boxes overlap by more than half (IoU >
 * 0.5), or a label is missing or the placeholder 'description'; null otherwise, also without boxes.
 * 'strict' also rejects blank labels and the placeholder in brackets.
 *
 * Source: Perceive-to-Reason, verl/utils/reward_score/p2r_reward.py.
 *
 * @param boxes all that parseBoxes returned.
 * @throws P2RError ERR_VALUE for boxes without four numbers and a label, and for wrong options.
 * @example
 * ```js
 * import { parseBoxes, perceptionFault } from 'p2r-kernels'
 *
 * const sign = '{"bbox_2d": [0, 0, 100, 100], "label": "sign"}'
 * console.log(perceptionFault(parseBoxes(`[${sign}, ${sign}]`))) // overlap
 * console.log(perceptionFault(parseBoxes('{"bbox_2d": [0, 0, 100, 100]}'))) // label
 * console.log(perceptionFault(parseBoxes(sign))) // null
 * ```
 */
export function perceptionFault(
  boxes: readonly EvidenceBox[],
  options: PerceptionFaultOptions = {},
): 'overlap' | 'label' | null {
  const op = 'perceptionFault'
  options = checkArguments(options, rulesNames, op)
  const strict = rulesOf(options.rules, op) === 'strict'
  const read = checkArray(boxes, 'boxes', op).map((box, i): EvidenceBox => {
    const corners = checkNumbers(box?.bbox2d, 4, `boxes[${i}].bbox2d`, op)
    return {
      bbox2d: corners as unknown as EvidenceBox['bbox2d'],
      label: checkString(box.label, `boxes[${i}].label`, op),
    }
  })
  if (anyOverlap(read)) return 'overlap'
  for (const { label } of read) {
    const name = strip(label).toLowerCase()
    if (label === '' || name === 'description') return 'label'
    if (strict && ['', 'description'].includes(withoutBrackets(name))) return 'label'
  }
  return null
}

/**
 * Whether two boxes have an IoU above 0.5. They are then of similar sides and near each other, so that each box is
 * compared with those in the cells around it, of which a cell holds few before two of them overlap: the time is linear
 * in the number of boxes.
 */
function anyOverlap(boxes: readonly EvidenceBox[]): boolean {
  const cells = new Map<string, EvidenceBox['bbox2d'][]>()
  for (const { bbox2d: box } of boxes) {
    const [width, height] = [box[2] - box[0], box[3] - box[1]]
    // Others have no area, or none that is a number.
    if (!(width > 0 && height > 0 && Number.isFinite(width) && Number.isFinite(height))) continue
    const across = placesNear(box[0], width)
    const down = placesNear(box[1], height)
    for (const x of across)
      for (const y of down)
        for (const other of cells.get(`${x},${y}`) ?? []) if (iou(box, other) > 0.5) return true
    const cell = `${placeOf(box[0], sizeClass(width))},${placeOf(box[1], sizeClass(height))}`
    const inside = cells.get(cell)
    if (inside) inside.push(box)
    else cells.set(cell, [box])
  }
  return false
}

/** k where a side is at least 2^k and less than 2^(k + 1). */
function sizeClass(side: number): number {
  return Math.floor(Math.log2(side))
}

/** The cell along one axis of a side of class k that begins at `start`; cells are as long as the longest such side. */
function placeOf(start: number, k: number): string {
  return `${k}:${Math.floor(start / 2 ** (k + 1))}`
}

/**
 * The cells of sides whose intersection with this one may be more than half of the longer one: of at most twice or at
 * least half its length, beginning nearer than half the longer one.
 */
function placesNear(start: number, side: number): string[] {
  const own = sizeClass(side)
  const places: string[] = []
  for (let k = own - 1; k <= own + 1; k++) {
    const reach = 2 ** Math.max(k, own)
    const length = 2 ** (k + 1)
    const last = Math.floor((start + reach) / length)
    for (let at = Math.floor((start - reach) / length); at <= last; at++) {
      places.push(`${k}:${at}`)
      // Far from 0 a cell may be smaller than the distance of two numbers.
      if (at + 1 === at) break
    }
  }
  return places
}

/** A label without the brackets and quotes around it. */
function withoutBrackets(label: string): string {
  let [start, end] = [0, label.length]
  while (start < end && '<[({"\''.includes(label[start]!)) start++
  while (end > start && '>])}"\''.includes(label[end - 1]!)) end--
  return label.slice(start, end)
}

/** How long an answer may be, in tokens, and what it costs to be longer. */
export interface OverlongOptions {
  /** The tokens before the limit over which the penalty grows; at least 1. */
  buffer: number
  /**
   * The penalty at the limit and beyond; at least 0.
   * @default 1
   */
  factor?: number
}

/** The arguments of `overlongPenalty`. */
export interface OverlongPenaltyArgs extends OverlongOptions {
  /** The tokens of the completion. */
  length: number
  /** The limit, in tokens; at least `buffer`. */
  maxTokens: number
}

/** @internal */
export const overlongNames: Names<OverlongOptions> = { buffer: true, factor: true }
const overlongPenaltyNames: Names<OverlongPenaltyArgs> = {
  ...overlongNames,
  length: true,
  maxTokens: true,
}

/** @internal */
export function checkOverlong(options: OverlongOptions, maxTokens: number, op: string): void {
  checkIntegerWithin(options.buffer, 1, maxTokens, 'overlong.buffer', op)
  if (options.factor !== undefined) checkNonNegative(options.factor, 'overlong.factor', op)
}

/**
 * What DAPO adds to the reward of a long completion: 0 up to maxTokens - buffer tokens, from there on falling linearly,
 * -factor at maxTokens and beyond. Source: Yu et al. 2025, soft overlong
 * punishment; verl's overlong_buffer.
 *
 * @returns a number from -factor to 0.
 * @throws P2RError ERR_VALUE for lengths that are not integers, a buffer longer than maxTokens, or a negative factor.
 * @example
 * ```js
 * import { overlongPenalty } from 'p2r-kernels'
 *
 * const limit = { maxTokens: 1000, buffer: 200 }
 * console.log([700, 850, 1000].map((length) => overlongPenalty({ ...limit, length }))) // [ 0, -0.25, -1 ]
 * ```
 */
export function overlongPenalty(a: OverlongPenaltyArgs): number {
  const op = 'overlongPenalty'
  a = checkArguments(a, overlongPenaltyNames, op)
  const { length, maxTokens, buffer, factor = 1 } = a
  checkInteger(length, 0, 'length', op)
  checkPositive(maxTokens, 'maxTokens', op)
  checkIntegerWithin(buffer, 1, maxTokens, 'buffer', op)
  checkNonNegative(factor, 'factor', op)
  const exceeding = Math.min(Math.max(length - (maxTokens - buffer), 0), buffer)
  return exceeding === 0 ? 0 : (-exceeding / buffer) * factor
}

/**
 * Intersection over union of two boxes, x0, y0, x1, y1 in any unit; 0 for boxes without area.
 *
 * @throws P2RError ERR_VALUE for anything but four numbers.
 * @example
 * ```js
 * import { boxIoU } from 'p2r-kernels'
 *
 * console.log(boxIoU([0, 0, 100, 100], [50, 0, 150, 100])) // 0.3333333333333333
 * ```
 */
export function boxIoU(a: EvidenceBox['bbox2d'], b: EvidenceBox['bbox2d']): number {
  const corners = (box: EvidenceBox['bbox2d'], name: string) =>
    checkNumbers(box, 4, name, 'boxIoU') as unknown as EvidenceBox['bbox2d']
  return iou(corners(a, 'a'), corners(b, 'b'))
}

function iou(a: EvidenceBox['bbox2d'], b: EvidenceBox['bbox2d']): number {
  const width = Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0]))
  const height = Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]))
  const area = (c: EvidenceBox['bbox2d']) => (c[2] - c[0]) * (c[3] - c[1])
  const intersection = width * height
  const union = area(a) + area(b) - intersection
  return union > 0 ? intersection / union : 0
}

/**
 * A verifier that asks a model.
 *
 * 'reference': correct if 'yes' occurs anywhere in the reply outside the thinking ('Eyes' too). 'strict': the
 * reply must begin with yes or no, and is ERR_POLICY otherwise.
 *
 * @throws P2RError ERR_VALUE for wrong arguments. The verifier rejects with ERR_POLICY where the policy fails.
 * @example
 * ```js
 * import { functionPolicy, modelVerifier } from 'p2r-kernels'
 *
 * const judge = functionPolicy(({ prompt }) => (prompt.includes('a feline') ? 'Yes' : 'No'))
 * const verifier = modelVerifier(judge, { rules: 'strict' })
 * console.log(await verifier({ question: 'What is it?', answer: 'a feline', truth: 'a cat' })) // true
 * ```
 */
export function modelVerifier(policy: Policy, options: ModelVerifierOptions = {}): Verifier {
  const op = 'modelVerifier'
  checkPolicy(policy, 'policy', op)
  options = checkArguments(options, verifierOptionNames, op)
  const rules = rulesOf(options.rules, op)
  const { maxTokens = 64 } = options
  const prompt = checkString(options.prompt ?? verifierPrompt, 'prompt', op)
  checkPositive(maxTokens, 'maxTokens', op)
  return async (a) => {
    const { question, answer, truth } = checkArguments(a, verifierNames, op)
    for (const [name, text] of Object.entries({ question, answer, truth }))
      checkString(text, name, op)
    const given: Record<string, string> = { question, answer, truth }
    const { text } = await askOnce(
      policy,
      {
        role: 'reasoner',
        system: 'You grade answers.',
        prompt: prompt.replace(/\{(question|answer|truth)\}/g, (_, name: string) => given[name]!),
        images: [],
        temperature: 0,
        maxTokens,
        tokens: false,
      },
      op,
    )
    if (rules === 'reference') return withoutThinking(text).toLowerCase().includes('yes')
    const [verdict] = /^(yes|no)(?![\p{L}\d])/u.exec(
      strip(afterThinking(text))
        .replace(/^[^\p{L}\d]+/u, '')
        .toLowerCase(),
    ) ?? ['']
    if (verdict === '')
      refuse('ERR_POLICY', op, `the verifier must say yes or no, got ${describeValue(text)}`)
    return verdict === 'yes'
  }
}

const verifierPrompt =
  'Here are a question, its true answer and an answer that somebody gave. Decide whether the given ' +
  'answer is right. What counts is its meaning, not its wording.\n\n' +
  'Question: {question}\nTrue answer: {truth}\nGiven answer: {answer}\n\n' +
  'Is the given answer right? Reply "Yes" or "No" and nothing else.'

/** The text without complete <think> blocks, as by the reference's pattern. */
function withoutThinking(text: string): string {
  const [open, close] = ['<think>', '</think>']
  let out = ''
  let at = 0
  for (;;) {
    const start = text.indexOf(open, at)
    const end = start < 0 ? -1 : text.indexOf(close, start)
    if (end < 0) return out + text.slice(at)
    out += text.slice(at, start)
    at = end + close.length
  }
}
