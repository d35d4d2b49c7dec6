// The files that `evaluate` reads and writes, a line of JSON a question.
import { createHash } from 'node:crypto'
import { existsSync } from 'node:fs'
import { dirname, resolve } from 'node:path'
import { readLines, readText } from '../files.js'
import type { Role } from '../p2r/policy.js'
import { type AnswerForm, answerForms } from '../p2r/prompts.js'
import type { Span } from './tsv.js'
import { UsageError } from './usage.js'

export interface Row {
  /** Its line in the file, from 1, which identifies it. */
  line: number
  id: string
  category: string
  question: string
  truth: string
  form: AnswerForm
  /** A path, the bytes of an image, or where its base64 is. */
  image: string | Uint8Array | Span
  /** The path as the file has it, or a hash of the bytes. */
  imageId: string
  /** What is the same for a question in several orders of its options. */
  cluster?: string
}

/** How the entries of a file are read. */
export interface Layout {
  /** The form of questions that have none of their own. */
  form: AnswerForm
  /** Where images are, relative to the file's folder. */
  imageFolders?: readonly string[]
  /** Whether categories are groups and what is in them, with a slash between. */
  grouped?: boolean
}

/** The outcome of a question. */
export interface Result {
  line: number
  id: string
  category: string
  question: string
  truth: string
  /** Row's imageId. */
  image?: string
  /** Row's cluster. */
  cluster?: string
  answer?: string
  reward?: number
  boxes?: number
  droppedBoxes?: number
  truncated?: readonly Role[]
  requests?: number
  pixels?: number
  outOfTurns?: boolean
  perception?: string
  reasoning?: string
  error?: string
}

/** What the results of a run depend on beside the questions, by name. The first result that a run writes has them. */
export type Settings = Record<string, unknown>

const letters = ['A', 'B', 'C', 'D', 'E', 'F', 'G', 'H']
/** The end of V-Star's questions; the reasoner's prompt has its own instruction. */
const lettersOnly =
  /(?<!\s)\s*Answer with the option'?s letter from the given choices directly\.?\s*$/

/**
 * The questions of a file in order, in the fields of V-Star (image, text, label, category) or HR-Bench
 * (image, question, A to D, answer, category), or with `options` as a list or by letter.
 */
export async function* readRows(path: string, form: AnswerForm): AsyncGenerator<Row> {
  for await (const { entry, line } of linesOf(path)) yield rowOf(entry, line, path, { form })
}

/** The objects in a file, one a line. */
export async function* readJsonl(path: string): AsyncGenerator<Record<string, unknown>> {
  for await (const { entry } of linesOf(path)) yield entry
}

async function* linesOf(
  path: string,
): AsyncGenerator<{ entry: Record<string, unknown>; line: number }> {
  let line = 0
  for await (const text of textsOf(path)) {
    line++
    if (text.trim() === '') continue
    try {
      yield { entry: JSON.parse(text), line }
    } catch {
      throw new Error(
        `${path}:${line}: this is not JSON; a file of questions has one object a line`,
      )
    }
  }
}

async function* textsOf(path: string): AsyncGenerator<string> {
  try {
    yield* readLines(path)
  } catch (cause) {
    throw new Error(`${path} could not be read: ${(cause as Error).message}`, { cause })
  }
}

/** A question of an entry; `image` is where its image is, if not in the entry. */
export function rowOf(
  row: Record<string, unknown>,
  line: number,
  path: string,
  layout: Layout & { image?: { span: Span; id: string } },
): Row {
  const bad = (why: string): never => {
    throw new Error(`${path}:${line}: ${why}`)
  }
  if (typeof row !== 'object' || row === null || Array.isArray(row))
    return bad('a question must be an object')
  const first = (...names: string[]): string | undefined => {
    for (const name of names) {
      const value = row[name]
      if (typeof value === 'string' || typeof value === 'number') return String(value)
    }
    return undefined
  }
  const asked = first('question', 'text') ?? bad("there is no 'question' or 'text'")
  const truth = first('answer', 'label', 'truth') ?? bad("there is no 'answer' or 'label'")
  const image = layout.image ? '' : (first('image', 'image_path') ?? bad("there is no 'image'"))
  const own = (first('answer_form', 'form') ?? layout.form) as AnswerForm
  if (!answerForms.includes(own)) bad(`the form must be ${answerForms.join(', ')}, got '${own}'`)
  const options = optionsOf(row)
  const benchmark = first('benchmark')
  const category = first('category') ?? 'all'
  return {
    line,
    id: first('question_id', 'index', 'id') ?? String(line),
    category: benchmark === undefined ? category : `${benchmark} ${category}`,
    question:
      asked.replace(lettersOnly, '').trim() +
      (options.length ? `\nOptions:\n${options.join('\n')}` : ''),
    truth,
    form: own,
    ...(row.cycle_category !== undefined && { cluster: clusterOf(asked, options) }),
    ...(layout.image
      ? { image: layout.image.span, imageId: layout.image.id }
      : (imageOf(image, path, layout.imageFolders) ??
        bad(`there is no image ${image.slice(0, 200)}`))),
  }
}

/** The same for all orders of the options, whose letters differ. */
function clusterOf(question: string, options: readonly string[]): string {
  const texts = options.map((option) => option.replace(/^(?:\(\w\)|\w\.)\s*/, '')).sort()
  const hash = createHash('sha256').update(JSON.stringify([question.trim(), texts]))
  return hash.digest('hex').slice(0, 16)
}

function optionsOf(row: Record<string, unknown>): string[] {
  const { options } = row
  const all: [string, unknown][] = Array.isArray(options)
    ? options.map((option, i) => [letters[i] ?? String(i + 1), option])
    : typeof options === 'object' && options !== null
      ? Object.entries(options)
      : letters.map((letter) => [letter, row[letter]])
  return all
    .filter(
      ([, text]) => (typeof text === 'string' && text.trim() !== '') || typeof text === 'number',
    )
    .map(([letter, text]) => {
      const option = String(text).trim()
      // In some files the text has the letter already.
      return option.startsWith(`${letter}.`) || option.startsWith(`(${letter})`)
        ? option
        : `${letter}. ${option}`
    })
}

/** A path relative to the file's folder, or the image itself in base64, as in HR-Bench. */
function imageOf(
  image: string,
  path: string,
  folders: readonly string[] = ['.'],
): Pick<Row, 'image' | 'imageId'> | undefined {
  const encoded = (base64: string): Pick<Row, 'image' | 'imageId'> => {
    const bytes = Buffer.from(base64, 'base64')
    const hash = createHash('sha256').update(bytes).digest('hex')
    return { image: bytes, imageId: `sha256:${hash.slice(0, 16)}` }
  }
  const data = /^data:image\/[\w.+-]+;base64,/.exec(image)
  if (data) return encoded(image.slice(data[0].length))
  if (image.length < 4096) {
    const places = folders.map((folder) => resolve(dirname(path), folder, image))
    const file = places.find((place) => existsSync(place))
    if (file !== undefined) return { image: file, imageId: image }
  }
  if (image.length >= 100 && /^[A-Za-z0-9+/\s]+={0,2}$/.test(image.trimEnd())) return encoded(image)
  return undefined
}

/**
 * The results of earlier runs by line, and their settings; empty if there is no file. An incomplete last line,
 * left by a crash, is ignored.
 */
export async function readResults(
  path: string,
): Promise<{ results: Map<number, Result>; settings?: Settings }> {
  const results = new Map<number, Result>()
  let settings: Settings | undefined
  if (!existsSync(path)) return { results }
  const lines = (await readText(path)).split('\n')
  for (const [i, text] of lines.entries()) {
    if (text.trim() === '') continue
    try {
      const read = JSON.parse(text) as Result & { settings?: Settings }
      if (!Number.isInteger(read?.line)) throw new Error('no line')
      const { settings: own, ...result } = read
      settings = own ? { ...own, ...settings } : settings
      results.set(result.line, result)
    } catch (cause) {
      if (i === lines.length - 1) break
      throw new UsageError(
        `${path}:${i + 1} is not a result of evaluate; name another file by --out`,
        {
          cause,
        },
      )
    }
  }
  return { results, ...(settings && { settings }) }
}
