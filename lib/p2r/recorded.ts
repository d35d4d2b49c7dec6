import { createHash } from 'node:crypto'
import { appendFile, readFile } from 'node:fs/promises'
import { describeValue } from '../arguments.js'
import { refuse } from '../errors.js'
import type { Tensor } from '../tensor.js'
import {
  type Completion,
  checkPolicy,
  messageOf,
  type Policy,
  type PolicyRequest,
  type Role,
} from './policy.js'

/** One line of a recording: a request and its completions. */
interface Line {
  role: Role
  prompt: string
  /** Matches any if absent. */
  system?: string
  /** SHA-256 of each image's shape and pixels; matches any images if absent. */
  images?: string[]
  completions: Completion[]
}

/**
 * Replays recorded completions instead of calling a model: for tests, and to compute rewards again.
 *
 * A request takes the next completions recorded for its role, system, prompt and images, in the order of
 * the recording, and starts over after the last. How many requests recorded them does not matter.
 */
export class RecordedPolicy implements Policy {
  readonly #lines = new Map<string, (Line & { next: number })[]>()

  private constructor(lines: readonly Line[]) {
    for (const line of lines) {
      const key = JSON.stringify([line.role, line.prompt])
      const known = this.#lines.get(key) ?? []
      this.#lines.set(key, known)
      const { system, images } = line
      const same = known.find(
        (other) => other.system === system && `${other.images}` === `${images}`,
      )
      if (same) same.completions.push(...line.completions)
      else known.push({ ...line, completions: [...line.completions], next: 0 })
    }
  }

  /**
   * Reads a recording: JSON, one line a request, as recordPolicy writes it. A line without `system` or
   * `images` matches any.
   *
   * @throws ERR_IO, with its cause, for a file that cannot be read; ERR_FORMAT, with the line's number,
   *   for one that is not a recording.
   */
  static async load(path: string): Promise<RecordedPolicy> {
    const op = 'RecordedPolicy'
    const text = await readFile(path, 'utf8').catch((cause) =>
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
      return [checkLine(value, `${path}:${i + 1}`, op)]
    })
    return new RecordedPolicy(lines)
  }

  async generate(request: PolicyRequest): Promise<Completion[]> {
    const { n = 1, signal } = request
    signal?.throwIfAborted()
    const { role, system, prompt } = request
    const images = await Promise.all(request.images.map(imageHash))
    const recorded = this.#lines
      .get(JSON.stringify([role, prompt]))
      ?.find(
        (line) =>
          (line.system === undefined || line.system === system) &&
          (line.images === undefined || `${line.images}` === `${images}`),
      )
    if (!recorded?.completions.length)
      refuse(
        'ERR_POLICY',
        'RecordedPolicy',
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
 */
export function recordPolicy(policy: Policy, path: string): Policy {
  const op = 'recordPolicy'
  checkPolicy(policy, 'policy', op)
  let written: Promise<unknown> = Promise.resolve()
  return {
    async generate(request) {
      const hashes = Promise.all(request.images.map(imageHash))
      hashes.catch(() => {})
      const completions = await policy.generate(request)
      const { role, system, prompt } = request
      const line: Line = { role, system, prompt, images: await hashes, completions }
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

function checkLine(value: unknown, where: string, op: string): Line {
  const line = value as Partial<Line> | null
  const good =
    typeof line === 'object' &&
    line !== null &&
    (line.role === 'perceiver' || line.role === 'reasoner') &&
    typeof line.prompt === 'string' &&
    (line.images === undefined || Array.isArray(line.images)) &&
    Array.isArray(line.completions) &&
    line.completions.every((c) => typeof c?.text === 'string')
  if (!good)
    refuse('ERR_FORMAT', op, `${where} must have a role, a prompt and completions with a text`)
  return line as Line
}

async function imageHash(image: Tensor): Promise<string> {
  const hash = createHash('sha256').update(JSON.stringify(image.shape))
  return hash.update(await image.read()).digest('hex')
}
