// The files that `evaluate` reads and writes, a line of JSON a question.
import { createHash } from 'node:crypto'
import { createReadStream, existsSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { dirname, resolve } from 'node:path'
import { createInterface } from 'node:readline'
import type { Role } from '../p2r/policy.js'
import { type AnswerForm, answerForms } from '../p2r/prompts.js'
import { UsageError } from './usage.js'

export interface Row {
  /** Its line in the file, from 1, which identifies it. */
  line: number
  id: string
  category: string
  question: string
  truth: string
  form: AnswerForm
  /** A path, or the bytes of an image. */
  image: string | Uint8Array
  /** The path as the file has it, or a hash of the bytes. */
  imageId: string
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
  answer?: string
  reward?: number
  boxes?: number
  droppedBoxes?: number
  truncated?: readonly Role[]
  perception?: string
  reasoning?: string
  error?: string
}

/** What the results of a run depend on beside the questions, by name. The first result that a run writes has them. */
export type Settings = Record<string, unknown>

const letters = ['A', 'B', 'C', 'D', 'E', 'F', 'G', 'H']
/** The end of V-Star's questions; the reasoner's prompt has its own instruction. */
const lettersOnly = /\s*Answer with the option'?s letter from the given choices directly\.?\s*$/

/**
 * The questions of a file in order, in the fields of V-Star (image, text, label, category) or HR-Bench
 * (image, question, A to D, answer, category), or with `options` as a list or by letter.
 */
export async function* readRows(path: string, form: AnswerForm): AsyncGenerator<Row> {
  let line = 0
  for await (const text of readLines(path)) {
    line++
    if (text.trim() !== '') yield rowOf(text, line, path, form)
  }
}

async function* readLines(path: string): AsyncGenerator<string> {
  const input = createReadStream(path, 'utf8')
  try {
    yield* createInterface({ input, crlfDelay: Number.POSITIVE_INFINITY })
  } catch (cause) {
    throw new Error(`${path} could not be read: ${(cause as Error).message}`, { cause })
  } finally {
    input.destroy()
  }
}

function rowOf(text: string, line: number, path: string, form: AnswerForm): Row {
  const bad = (why: string): never => {
    throw new Error(`${path}:${line}: ${why}`)
  }
  let row: Record<string, unknown>
  try {
    row = JSON.parse(text)
  } catch {
    return bad('this is not JSON; a file of questions has one object a line')
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
  const image = first('image', 'image_path') ?? bad("there is no 'image'")
  const own = (first('answer_form', 'form') ?? form) as AnswerForm
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
    ...(imageOf(image, path) ?? bad(`there is no image ${image.slice(0, 200)}`)),
  }
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
function imageOf(image: string, path: string): Pick<Row, 'image' | 'imageId'> | undefined {
  const encoded = (base64: string): Pick<Row, 'image' | 'imageId'> => {
    const bytes = Buffer.from(base64, 'base64')
    const hash = createHash('sha256').update(bytes).digest('hex')
    return { image: bytes, imageId: `sha256:${hash.slice(0, 16)}` }
  }
  const data = /^data:image\/[\w.+-]+;base64,/.exec(image)
  if (data) return encoded(image.slice(data[0].length))
  if (image.length < 4096) {
    const file = resolve(dirname(path), image)
    if (existsSync(file)) return { image: file, imageId: image }
  }
  if (image.length >= 100 && /^[A-Za-z0-9+/\s]+={0,2}\s*$/.test(image)) return encoded(image)
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
  const lines = (await readFile(path, 'utf8')).split('\n')
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
