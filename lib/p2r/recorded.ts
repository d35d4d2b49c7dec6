import { createHash } from 'node:crypto'
import { appendFile } from 'node:fs/promises'
import { checkReceiver, checkString, describeValue, isObject } from '../arguments.js'
import { refuse } from '../errors.js'
import { readText } from '../files.js'
import type { Tensor } from '../tensor.js'
import {
  type Completion,
  checkPolicy,
  checkRequest,
  messageOf,
  type Policy,
  type PolicyRequest,
  type Role,
  savedCompletion,
  type Turn,
} from './policy.js'

/** One line of a recording: a request and its completions. */
interface Line {
  role: Role
  prompt: string
  /** Matches any if absent. */
  system?: string
  /** SHA-256 of each image's shape and pixels; matches any images if absent. */
  images?: string[]
  /** SHA-256 of what follows the prompt in a conversation; absent for nothing. */
  turns?: string
  completions: Completion[]
}

const construct = Symbol('construct')

/**
 * Replays recorded completions instead of calling a model: for tests, and to compute rewards again.
 *
 * A request takes the next completions recorded for its role, system, prompt, images and turns, in the order of
 * the recording, and starts over after the last. How many requests recorded them does not matter.
 *
 * @example
 * ```js
 * import { mkdtempSync, writeFileSync } from 'node:fs'
 * import { tmpdir } from 'node:os'
 * import { join } from 'node:path'
 * import { RecordedPolicy } from 'p2r-kernels'
 *
 * const path = join(mkdtempSync(join(tmpdir(), 'p2r-')), 'recording.jsonl')
 * const line = { role: 'reasoner', prompt: 'How many?', completions: [{ text: 'three' }] }
 * writeFileSync(path, JSON.stringify(line))
 * const policy = await RecordedPolicy.load(path)
 * const [completion] = await policy.generate({
 *   role: 'reasoner',
 *   system: '',
 *   prompt: 'How many?',
 *   images: [],
 * })
 * console.log(completion?.text) // three
 * ```
 */
export class RecordedPolicy implements Policy {
  readonly #lines = new Map<string, (Line & { next: number })[]>()

  private constructor(key: typeof construct, lines: readonly Line[]) {
    if (key !== construct)
      refuse('ERR_VALUE', 'RecordedPolicy', 'a RecordedPolicy is made by RecordedPolicy.load()')
    for (const line of lines) {
      const key = JSON.stringify([line.role, line.prompt])
      const known = this.#lines.get(key) ?? []
      this.#lines.set(key, known)
      const { system, images } = line
      const same = known.find(
        (other) =>
          other.system === system &&
          `${other.images}` === `${images}` &&
          other.turns === line.turns,
      )
      if (same) same.completions.push(...line.completions)
      else known.push({ ...line, completions: [...line.completions], next: 0 })
    }
  }

  /**
   * Reads a recording: JSON, one line a request, as recordPolicy writes it. A line without `system` or
   * `images` matches any.
   *
   * @throws P2RError ERR_IO, with its cause, for a file that cannot be read; ERR_FORMAT, with the line's number,
   *   for one that is not a recording.
   */
  static async load(path: string): Promise<RecordedPolicy> {
    const op = 'RecordedPolicy'
    checkString(path, 'path', op)
    const text = await readText(path).catch((cause) =>
      refuse('ERR_IO', op, `${path} could not be read: ${messageOf(cause)}`, { cause }),
    )
    const lines = text.split('\n').flatMap((line, i): Line[] => {
      if (line.trim() === '') return []
      let value: unknown
      try {
        value = JSON.parse(line)
      } catch (cause) {
        refuse('ERR_FORMAT', op, `${path}:${i + 1} is not JSON`, { cause })
      }
      return [lineOf(value, (why) => refuse('ERR_FORMAT', op, `${path}:${i + 1}: ${why}`))]
    })
    return new RecordedPolicy(construct, lines)
  }

  /**
   * The next n completions recorded for such a request.
   *
   * @throws P2RError ERR_POLICY where there are none.
   */
  async generate(request: PolicyRequest): Promise<Completion[]> {
    const op = 'RecordedPolicy'
    checkReceiver(isObject(this) && #lines in this, 'RecordedPolicy', op)
    const { n = 1, signal } = checkRequest(request, op)
    signal?.throwIfAborted()
    const { role, system, prompt } = request
    const images = await Promise.all(request.images.map(imageHash))
    const turns = await turnsHash(request.turns)
    const recorded = this.#lines
      .get(JSON.stringify([role, prompt]))
      ?.find(
        (line) =>
          (line.system === undefined || line.system === system) &&
          (line.images === undefined || `${line.images}` === `${images}`) &&
          line.turns === turns,
      )
    if (!recorded?.completions.length)
      refuse(
        'ERR_POLICY',
        op,
        `no recorded rollout of the ${role} for this prompt and its ${images.length} images: ${describeValue(prompt.slice(0, 80))}`,
      )
    return Array.from({ length: n }, () => {
      const completion = recorded.completions[recorded.next]!
      recorded.next = (recorded.next + 1) % recorded.completions.length
      return completion
    })
  }
}

/**
 * A policy that also appends each request and its completions to a file, one line of JSON a request, for
 * RecordedPolicy. Failures are not recorded.
 *
 * @throws P2RError ERR_VALUE for wrong arguments; the policy rejects with ERR_IO where the file cannot be written.
 * @example
 * ```js
 * import { mkdtempSync, readFileSync } from 'node:fs'
 * import { tmpdir } from 'node:os'
 * import { join } from 'node:path'
 * import { functionPolicy, recordPolicy } from 'p2r-kernels'
 *
 * const path = join(mkdtempSync(join(tmpdir(), 'p2r-')), 'recording.jsonl')
 * const policy = recordPolicy(
 *   functionPolicy(() => 'three'),
 *   path,
 * )
 * await policy.generate({ role: 'reasoner', system: '', prompt: 'How many?', images: [] })
 * console.log(JSON.parse(readFileSync(path, 'utf8')).completions) // [ { text: 'three' } ]
 * ```
 */
export function recordPolicy(policy: Policy, path: string): Policy {
  const op = 'recordPolicy'
  checkPolicy(policy, 'policy', op)
  checkString(path, 'path', op)
  let written: Promise<unknown> = Promise.resolve()
  return {
    async generate(request) {
      checkRequest(request, op)
      const hashes = Promise.all(request.images.map(imageHash))
      hashes.catch(() => {})
      const said = turnsHash(request.turns)
      said.catch(() => {})
      const completions = await policy.generate(request)
      const { role, system, prompt } = request
      const turns = await said
      const images = await hashes
      const line: Line = { role, system, prompt, images, ...(turns && { turns }), completions }
      const write = (): Promise<void> => appendFile(path, `${JSON.stringify(line)}\n`)
      // Appends are serialized so that lines of concurrent requests do not interleave.
      const done = written.then(write, write)
      written = done.catch(() => {})
      await done.catch((cause) =>
        refuse('ERR_IO', op, `${path} could not be written: ${messageOf(cause)}`, { cause }),
      )
      return completions
    },
  }
}

function lineOf(value: unknown, bad: (why: string) => never): Line {
  const { role, prompt, system, images, turns, completions } = (
    isObject(value) ? value : {}
  ) as Partial<Line>
  if (
    (role !== 'perceiver' && role !== 'reasoner') ||
    typeof prompt !== 'string' ||
    !Array.isArray(completions)
  )
    return bad('a line must have a role, a prompt and completions with a text')
  for (const [name, text] of Object.entries({ system, turns }))
    if (text !== undefined && typeof text !== 'string') bad(`${name} must be a string`)
  if (images !== undefined && !isTexts(images)) bad('images must be a list of hashes')
  return {
    role,
    prompt,
    ...(system !== undefined && { system }),
    ...(images !== undefined && { images }),
    ...(turns !== undefined && { turns }),
    completions: completions.map((completion) => savedCompletion(completion, bad)),
  }
}

function isTexts(list: unknown): boolean {
  return Array.isArray(list) && list.every((item) => typeof item === 'string')
}

/** Of the texts, calls and images of a conversation, without the ids that a server gave. */
async function turnsHash(turns: readonly Turn[] = []): Promise<string | undefined> {
  if (!turns.length) return undefined
  const said = await Promise.all(
    turns.map(async ({ completion, results }) => [
      completion.text,
      (completion.toolCalls ?? []).map((call) => [call.name, call.arguments]),
      await Promise.all(
        results.map(async ({ text, images }) => [text, await Promise.all(images.map(imageHash))]),
      ),
    ]),
  )
  return createHash('sha256').update(JSON.stringify(said)).digest('hex')
}

async function imageHash(image: Tensor<'u8'>): Promise<string> {
  const hash = createHash('sha256').update(JSON.stringify(image.shape))
  return hash.update(await image.read()).digest('hex')
}
