/**
 * The words of the miniature. A fixed part of a text is one token, and so is a number: a box is six tokens,
 *
 *   [{"bbox_2d": [ | 31.25,  | 62.5,  | 62.5,  | 93.75], "label": "digit"}] | <|im_end|>
 *
 * which `parseBoxes` reads as any other, and an answer is four: <answer> | 7 | </answer> | <|im_end|>.
 */
import { COLOURS, LATTICE } from '../mini-p2r/scene.js'

/** Coordinates are thousandths of the image, as Qwen3-VL writes them; the lattice's lines are multiples of 31.25. */
const lines = Array.from({ length: LATTICE + 1 }, (_, line) => (1000 * line) / LATTICE)
const digits = Array.from({ length: 10 }, (_, digit) => String(digit))

/** The text of each token id. */
export const WORDS: readonly string[] = [
  '<|im_end|>',
  '<|im_start|>user\n',
  '<|vision_start|>',
  '<|vision_end|>',
  '<|image_pad|>',
  '<|video_pad|>',
  '<|im_end|>\n<|im_start|>assistant\n',
  'Locate the digit that is ',
  'Read the digit that is ',
  ...COLOURS,
  '[{"bbox_2d": [',
  '<answer>',
  '</answer>',
  ...digits,
  ...lines.map((line) => `${line}, `),
  ...lines.slice(1).map((line) => `${line}], "label": "digit"}]`),
]

const ids = new Map(WORDS.map((word, id) => [word, id]))

/** The id of a word. */
export function idOf(word: string): number {
  const id = ids.get(word)
  if (id === undefined) throw new Error(`'${word}' is no word of the miniature`)
  return id
}

export const END = idOf('<|im_end|>')
export const IMAGE = idOf('<|image_pad|>')
export const VIDEO = idOf('<|video_pad|>')
export const VISION_START = idOf('<|vision_start|>')
export const VISION_END = idOf('<|vision_end|>')
const USER = idOf('<|im_start|>user\n')
const ASSISTANT = idOf('<|im_end|>\n<|im_start|>assistant\n')
const OPEN = idOf('[{"bbox_2d": [')
const ANSWER = idOf('<answer>')
const ANSWERED = idOf('</answer>')

export type Role = 'perceiver' | 'reasoner'

/** Tokens of the longest completion. */
export const MAX_TOKENS: Record<Role, number> = { perceiver: 6, reasoner: 4 }

/** What every question about an image begins with; the image stands first, as in Qwen3-VL's chats. */
export function imageTokens(merged: number): number[] {
  return [USER, VISION_START, ...new Array<number>(merged).fill(IMAGE), VISION_END]
}

export function questionTokens(role: Role, colour: number): number[] {
  const ask = role === 'perceiver' ? 'Locate the digit that is ' : 'Read the digit that is '
  return [idOf(ask), idOf(COLOURS[colour] as string), ASSISTANT]
}

/** The box of a cell, row * 32 + column. */
export function boxTokens(cell: number): number[] {
  const [column, row] = [cell % LATTICE, Math.floor(cell / LATTICE)]
  const number = (line: number): number => idOf(`${lines[line]}, `)
  const last = idOf(`${lines[row + 1]}], "label": "digit"}]`)
  return [OPEN, number(column), number(row), number(column + 1), last, END]
}

export function answerTokens(digit: number): number[] {
  return [ANSWER, idOf(String(digit)), ANSWERED, END]
}

/** The text of a completion, without the token that ended it. */
export function textOf(tokens: readonly number[]): string {
  const said = tokens.at(-1) === END ? tokens.slice(0, -1) : tokens
  return said.map((token) => WORDS[token]).join('')
}

const byLength = WORDS.map((word, id) => ({ word, id })).sort(
  (a, b) => b.word.length - a.word.length,
)

/**
 * The miniature's tokenizer, as LocalPolicy takes one: the longest word that fits. In Qwen3-VL's chat template an image
 * and `questionText` are `imageTokens` and `questionTokens`.
 */
export const TOKENIZER = {
  encode(text: string): { ids: number[] } {
    const ids: number[] = []
    for (let at = 0; at < text.length; ) {
      const found = byLength.find(({ word }) => text.startsWith(word, at))
      if (!found) throw new Error(`No word of the miniature begins '${text.slice(at)}'`)
      ids.push(found.id)
      at += found.word.length
    }
    return { ids }
  },
  /** In the printable alphabet of byte-level BPE. */
  id_to_token: (id: number): string | undefined =>
    WORDS[id]?.replaceAll(' ', '\u0120').replaceAll('\n', '\u010a'),
  token_to_id: (token: string): number | undefined => ids.get(token),
  get_added_tokens_decoder: (): Map<number, { content: string; special: boolean }> =>
    new Map(
      [END, VISION_START, VISION_END, IMAGE, VIDEO].map((id) => [
        id,
        { content: WORDS[id] as string, special: true },
      ]),
    ),
}

export function questionText(role: Role, colour: number): string {
  return questionTokens(role, colour)
    .slice(0, -1)
    .map((token) => WORDS[token])
    .join('')
}
