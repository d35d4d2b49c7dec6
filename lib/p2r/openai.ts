import type { OpenAI } from 'openai'
import { type AbortSignalLike, onAbort, sleep } from '../abort.js'
import {
  checkArguments,
  checkBoolean,
  checkInteger,
  checkIntegerWithin,
  checkObject,
  checkReceiver,
  checkText,
  choice,
  describeValue,
  isObject,
  type Names,
} from '../arguments.js'
import { P2RError, refuse } from '../errors.js'
import { encodeImage } from '../image.js'
import type { Tensor } from '../tensor.js'
import {
  type Completion,
  checkRequest,
  messageOf,
  type Policy,
  type PolicyRequest,
} from './policy.js'
import { Semaphore } from './semaphore.js'

/** Options of OpenAIPolicy. */
export interface OpenAIPolicyOptions {
  /**
   * The API's address with its version: 'http://localhost:8000/v1'. Several are used in turn, and a
   * retry uses the next.
   */
  baseURL: string | readonly string[]
  /** The served model's name. */
  model: string
  /**
   * Sent as the bearer token; self-hosted servers need none.
   * @default 'EMPTY'
   */
  apiKey?: string
  /**
   * Milliseconds of one attempt, from the request to the end of the response.
   * @default 300_000
   */
  timeoutMs?: number
  /**
   * Attempts after the first.
   * @default 3
   */
  maxRetries?: number
  /**
   * Requests in flight at once; further ones wait.
   * @default 32
   */
  concurrency?: number
  /**
   * Encoding of images: 'jpeg', as in the reference, or 'png', which is lossless.
   * @default 'jpeg'
   */
  imageFormat?: 'jpeg' | 'png'
  /**
   * Of JPEG, 1 to 100; the default is Pillow's, and so the reference's.
   * @default 75
   */
  imageQuality?: number
  /**
   * Whether requests that do not specify it want token ids and log-probabilities. This sends vLLM's fields
   * besides the API's own; other servers ignore them, except api.openai.com, which refuses them.
   * @default true
   */
  tokens?: boolean
  /**
   * Streams responses. Node's fetch times out after 300 seconds without response headers, which a stream sends
   * at once.
   * @default false
   */
  stream?: boolean
  /**
   * Fields added to each request: { chat_template_kwargs: { enable_thinking: false } }.
   * @default {}
   */
  extraBody?: Readonly<Record<string, unknown>>
}

const optionNames: Names<OpenAIPolicyOptions> = {
  baseURL: true,
  model: true,
  apiKey: true,
  timeoutMs: true,
  maxRetries: true,
  concurrency: true,
  imageFormat: true,
  imageQuality: true,
  tokens: true,
  stream: true,
  extraBody: true,
}

const op = 'OpenAIPolicy'
/** Milliseconds before the first retry, doubled for each further one up to `most`. */
const backoff = { first: 500, most: 30_000 }
/** Milliseconds: a Retry-After beyond this fails the request instead of being waited for. */
const longestWait = 120_000
/** Requests whose images are encoded while `concurrency` others are in flight. */
const encodedAhead = 8

/**
 * A model behind the OpenAI chat API, as vLLM and SGLang serve it. Needs the optional peer dependency
 * `openai`, which is loaded with the first request.
 *
 * Broken connections, truncated or invalid responses, timeouts, 408, 409, 429 and 5xx are retried after
 * the delay of Retry-After, else after 0.5 s, 1 s, 2 s, ... with jitter.
 * A final failure is ERR_POLICY with its cause; an abort rejects with the signal's reason.
 *
 * A model that declines gives completions with `refusal`. Token ids come from vLLM's
 * `return_token_ids` or `return_tokens_as_token_ids`, whichever the server supports; log-probabilities
 * are the server's, which for vLLM are those of temperature 1 unless it was started otherwise.
 *
 * @throws P2RError ERR_VALUE for wrong options.
 * @example
 * ```js
 * import { OpenAIPolicy } from 'p2r-kernels'
 *
 * // vLLM or SGLang listens there.
 * const policy = new OpenAIPolicy({ baseURL: 'http://localhost:8000/v1', model: 'P2R-4B' })
 * const completions = await policy.generate({
 *   role: 'reasoner',
 *   system: 'You are a helpful assistant.',
 *   prompt: 'How many continents are there?',
 *   images: [],
 * })
 * console.log(completions[0]?.text)
 * ```
 */
export class OpenAIPolicy implements Policy {
  readonly #options: Required<Omit<OpenAIPolicyOptions, 'baseURL'>>
  readonly #urls: readonly string[]
  readonly #requests: Semaphore
  readonly #encodings: Semaphore
  #clients: Promise<OpenAI[]> | undefined
  #turn = 0

  constructor(options: OpenAIPolicyOptions) {
    checkArguments(options, optionNames, op)
    this.#urls = urlsOf(options.baseURL)
    this.#options = {
      model: checkText(options.model, 'model', op),
      apiKey: checkText(options.apiKey ?? 'EMPTY', 'apiKey', op),
      timeoutMs: checkInteger(options.timeoutMs ?? 300_000, 1, 'timeoutMs', op),
      maxRetries: checkInteger(options.maxRetries ?? 3, 0, 'maxRetries', op),
      concurrency: checkInteger(options.concurrency ?? 32, 1, 'concurrency', op),
      imageFormat: choice(options.imageFormat ?? 'jpeg', ['jpeg', 'png'], 'imageFormat', op),
      imageQuality: checkIntegerWithin(options.imageQuality ?? 75, 1, 100, 'imageQuality', op),
      tokens: checkBoolean(options.tokens ?? true, 'tokens', op),
      stream: checkBoolean(options.stream ?? false, 'stream', op),
      extraBody: checkObject(options.extraBody ?? {}, 'extraBody', op),
    }
    this.#requests = new Semaphore(this.#options.concurrency)
    this.#encodings = new Semaphore(this.#options.concurrency + encodedAhead)
  }

  /**
   * Sends one request, and again where it fails in a way that may pass.
   *
   * @throws P2RError ERR_VALUE for a wrong request; ERR_POLICY, with its cause, when the last attempt failed.
   */
  async generate(request: PolicyRequest): Promise<Completion[]> {
    checkReceiver(isObject(this) && #options in this, 'OpenAIPolicy', op)
    const { system, n = 1, temperature, maxTokens, signal } = checkRequest(request, op)
    const prompt = checkText(request.prompt, 'prompt', op)
    const { model, extraBody, stream } = this.#options
    return this.#encodings.run(async () => {
      const images = await Promise.all(request.images.map((image) => this.#dataURL(image)))
      signal?.throwIfAborted()
      const body = {
        model,
        messages: [
          ...(system ? [{ role: 'system' as const, content: system }] : []),
          {
            role: 'user' as const,
            content: [
              ...images.map((url) => ({ type: 'image_url' as const, image_url: { url } })),
              { type: 'text' as const, text: prompt },
            ],
          },
        ],
        ...(n !== 1 && { n }),
        ...(temperature !== undefined && { temperature }),
        ...(maxTokens !== undefined && { max_tokens: maxTokens }),
        ...((request.tokens ?? this.#options.tokens) && {
          logprobs: true,
          return_token_ids: true,
          return_tokens_as_token_ids: true,
        }),
        ...(stream && { stream }),
        ...extraBody,
      }
      return this.#requests.run(() => this.#withRetries(body, n, signal), signal)
    }, signal)
  }

  async #dataURL(image: Tensor<'u8'>): Promise<string> {
    const { imageFormat: format, imageQuality: quality } = this.#options
    const bytes = await encodeImage(image, format === 'jpeg' ? { format, quality } : { format })
    return `data:image/${format};base64,${Buffer.from(bytes).toString('base64')}`
  }

  /** The request, repeated where another attempt may help. */
  async #withRetries(body: Body, n: number, signal?: AbortSignalLike): Promise<Completion[]> {
    const { maxRetries, timeoutMs } = this.#options
    for (let attempt = 0; ; attempt++) {
      const url = this.#urls[this.#turn++ % this.#urls.length]!
      let failure: Failure
      try {
        return await this.#attempt(url, body, n, signal)
      } catch (error) {
        if (signal?.aborted) throw signal.reason
        if (error instanceof P2RError) throw error
        failure = failureOf(error, timeoutMs)
      }
      const wait = failure.after ?? Math.min(backoff.first * 2 ** attempt, backoff.most)
      if (!failure.retry || attempt === maxRetries || wait > longestWait)
        refuse(
          'ERR_POLICY',
          op,
          `${url}, model ${this.#options.model}: ${failure.message}${
            attempt ? ` (after ${attempt + 1} attempts)` : ''
          }`,
          { cause: failure.cause },
        )
      // Retry-After is kept exactly; our own backoff is jittered, so that clients do not retry in step.
      await sleep(failure.after ?? wait * (0.75 + 0.5 * Math.random()), signal)
    }
  }

  /** One request with a deadline for all of it; the client's own timeout ends at the headers. */
  async #attempt(
    url: string,
    body: Body,
    n: number,
    signal?: AbortSignalLike,
  ): Promise<Completion[]> {
    const clients = await this.#load()
    const client = clients[this.#urls.indexOf(url)]!
    const deadline = new AbortController()
    const timer = setTimeout(() => deadline.abort(new TimedOut()), this.#options.timeoutMs)
    const forget = onAbort(signal, () => deadline.abort(signal?.reason))
    try {
      const answer = await client.chat.completions.create(
        body as unknown as OpenAI.Chat.ChatCompletionCreateParams,
        { signal: deadline.signal, maxRetries: 0, timeout: 2 ** 31 - 1 },
      )
      const streamed =
        typeof answer === 'object' && answer !== null && Symbol.asyncIterator in answer
      return completionsOf(streamed ? await assemble(answer as AsyncIterable<unknown>) : answer, n)
    } catch (error) {
      throw deadline.signal.aborted && !signal?.aborted ? deadline.signal.reason : error
    } finally {
      clearTimeout(timer)
      forget()
    }
  }

  #load(): Promise<OpenAI[]> {
    this.#clients ??= (async () => {
      let library: typeof import('openai')
      try {
        library = await import('openai')
      } catch (cause) {
        refuse(
          'ERR_POLICY',
          op,
          'the package `openai`, an optional peer dependency, could not be loaded: install it with `npm install openai`',
          { cause },
        )
      }
      const { apiKey } = this.#options
      return this.#urls.map((baseURL) => new library.OpenAI({ baseURL, apiKey, logLevel: 'off' }))
    })()
    return this.#clients
  }
}

type Body = Record<string, unknown>

class TimedOut extends Error {}
/** An invalid response, which a retry may fix. */
class BadAnswer extends Error {}

interface Failure {
  message: string
  retry: boolean
  /** Milliseconds of Retry-After. */
  after?: number | undefined
  cause: unknown
}

function failureOf(cause: unknown, timeoutMs: number): Failure {
  if (cause instanceof TimedOut)
    return { message: `no answer within ${timeoutMs} ms`, retry: true, cause }
  const { status, headers } = cause as { status?: number; headers?: Headers }
  if (typeof status !== 'number') {
    // Refused and broken connections, truncated bodies: the reason is the innermost cause.
    let reason = cause
    while ((reason as Error)?.cause) reason = (reason as Error).cause
    const message =
      cause instanceof BadAnswer ? cause.message : `the connection failed: ${messageOf(reason)}`
    return { message, retry: true, cause }
  }
  return {
    message: `the server answered ${messageOf(cause)}`,
    retry: status === 408 || status === 409 || status === 429 || status >= 500,
    after: retryAfter(headers),
    cause,
  }
}

/** Retry-After in seconds or as a date (RFC 9110, 10.2.3). */
function retryAfter(headers: Headers | undefined): number | undefined {
  const value = headers?.get?.('retry-after')
  if (!value) return undefined
  const seconds = Number(value)
  const wait = Number.isFinite(seconds) ? 1000 * seconds : Date.parse(value) - Date.now()
  return Number.isFinite(wait) ? Math.max(0, wait) : undefined
}

/** The choices of a response, sorted by index. The response is validated. */
function completionsOf(answer: unknown, n: number): Completion[] {
  const choices = (answer as { choices?: unknown } | null | undefined)?.choices
  if (!Array.isArray(choices)) {
    const reported = (answer as { error?: { message?: unknown } } | null)?.error?.message
    throw new BadAnswer(
      `the answer holds no choices${typeof reported === 'string' ? `: ${reported}` : ''}, got ${
        typeof answer === 'string' ? 'text instead of JSON' : describeValue(answer)
      }`,
    )
  }
  if (choices.length !== n)
    refuse('ERR_POLICY', op, `the server must give ${n} choices, got ${choices.length}`)
  const at = (c: unknown): number => Number((c as { index?: unknown } | null)?.index) || 0
  return [...choices].sort((a, b) => at(a) - at(b)).map(completionOf)
}

function completionOf(choice: unknown): Completion {
  const { message, logprobs, ...fields } = (choice ?? {}) as {
    message?: { content?: unknown; refusal?: unknown }
    logprobs?: { content?: unknown }
    [field: string]: unknown
  }
  const { content, refusal } = message ?? {}
  const declined = typeof refusal === 'string' && refusal !== ''
  // Content is null in responses that ended before the first token.
  const completion: Completion = {
    text: !declined && typeof content === 'string' ? content : '',
    ...(declined && { refusal }),
  }
  if (!declined && message === undefined) throw new BadAnswer('a choice holds no message')
  const each = Array.isArray(logprobs?.content) ? (logprobs.content as unknown[]) : undefined
  const listed = [fields.token_ids, fields.response_token_ids].find(isNumbers)
  const tokens = listed ?? each?.map(tokenId)
  if (tokens && isNumbers(tokens)) completion.tokens = tokens
  const logProbs = each?.map((entry) => (entry as { logprob?: unknown } | null)?.logprob)
  if (isNumbers(logProbs) && (!completion.tokens || completion.tokens.length === logProbs.length))
    completion.logProbs = logProbs
  return completion
}

/** The id in 'token_id:123', vLLM's form of tokens with return_tokens_as_token_ids. */
function tokenId(entry: unknown): number | undefined {
  const token = (entry as { token?: unknown } | null)?.token
  const digits = typeof token === 'string' ? /^token_id:(\d+)$/.exec(token)?.[1] : undefined
  return digits === undefined ? undefined : Number(digits)
}

function isNumbers(list: unknown): list is number[] {
  return Array.isArray(list) && list.every((x) => typeof x === 'number')
}

/** The chunks of a stream as one response. */
async function assemble(stream: AsyncIterable<unknown>): Promise<unknown> {
  interface Chunk {
    index?: number
    delta?: { content?: unknown; refusal?: unknown }
    logprobs?: { content?: unknown[] }
    token_ids?: number[]
    finish_reason?: unknown
  }
  const choices = new Map<
    number,
    {
      index: number
      finished: boolean
      message: { content: string; refusal?: string }
      logprobs?: { content: unknown[] }
      token_ids?: number[]
    }
  >()
  for await (const event of stream) {
    const { choices: chunks, error } = event as { choices?: Chunk[]; error?: { message?: string } }
    if (error) throw new BadAnswer(`the stream broke off: ${error.message ?? 'no reason given'}`)
    for (const chunk of Array.isArray(chunks) ? chunks : []) {
      const index = Number(chunk.index) || 0
      const choice = choices.get(index) ?? { index, finished: false, message: { content: '' } }
      choices.set(index, choice)
      const { content, refusal } = chunk.delta ?? {}
      if (typeof content === 'string') choice.message.content += content
      if (typeof refusal === 'string')
        choice.message.refusal = (choice.message.refusal ?? '') + refusal
      if (Array.isArray(chunk.logprobs?.content)) {
        choice.logprobs ??= { content: [] }
        choice.logprobs.content.push(...chunk.logprobs.content)
      }
      if (isNumbers(chunk.token_ids)) {
        choice.token_ids ??= []
        choice.token_ids.push(...chunk.token_ids)
      }
      if (chunk.finish_reason) choice.finished = true
    }
  }
  const all = [...choices.values()]
  if (!all.length || !all.every(({ finished }) => finished))
    throw new BadAnswer('the stream ended before the answer did')
  return { choices: all }
}

function urlsOf(baseURL: unknown): string[] {
  const urls = (Array.isArray(baseURL) ? baseURL : [baseURL]) as unknown[]
  if (!urls.length) refuse('ERR_VALUE', op, 'baseURL must name at least one server')
  for (const url of urls)
    if (typeof url !== 'string' || !URL.canParse(url) || !/^https?:/.test(url))
      refuse('ERR_VALUE', op, `baseURL must be an http address, got ${describeValue(url)}`)
  return urls as string[]
}
