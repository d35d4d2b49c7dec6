import type { OpenAI } from 'openai'
import { type AbortSignalLike, onAbort, sleep } from '../abort.js'
import {
  checkArguments,
  checkArray,
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
  type ToolCall,
  type Turn,
} from './policy.js'
import { Semaphore } from './semaphore.js'

/** Options of OpenAIPolicy. */
export interface OpenAIPolicyOptions {
  /**
   * The API's address with its version: 'http://localhost:8000/v1', without a password. Several are used in turn, and a
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
   * Where the images of tool results are: in the 'tool' message, as vLLM and SGLang take them, or in a message of the
   * 'user' after it, since api.openai.com takes no images of tools.
   * @default 'tool'
   */
  toolImages?: 'tool' | 'user'
  /**
   * Streams responses: the headers come at once, which keeps proxies from closing a connection that seems idle.
   * @default false
   */
  stream?: boolean
  /**
   * Whether the model thinks before it answers, where its template has a switch as those of Qwen3.5 and later do: sent as
   * `chat_template_kwargs.enable_thinking`, which vLLM, SGLang and llama.cpp pass on.
   * @default as the template has it
   */
  thinking?: boolean
  /**
   * Fields added to each request: { repetition_penalty: 1.05 }.
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
  toolImages: true,
  stream: true,
  thinking: true,
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
 * A final failure is ERR_POLICY with its cause; an abort rejects with the signal's reason. A redirect to another
 * server is a failure, and the key is left out of messages and of what the server repeats.
 *
 * Text parts are joined. A response with fewer choices than `n` is completed by further requests for those that
 * are missing. A model that declines gives completions with `refusal`. What holds no answer (a thought that
 * `maxTokens` cut off, calls of tools that the request does not have, filtered content) is ERR_POLICY, or one completion's `failure` where others of the
 * request are answers. Token ids come from vLLM's
 * `return_token_ids` or `return_tokens_as_token_ids`, SGLang's `return_meta_info` or the ids in llama.cpp's
 * log-probabilities; log-probabilities are the server's, which for vLLM are those of temperature 1 unless it was
 * started otherwise. docs/serving.md says what each server gives.
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
  readonly #options: Required<Omit<OpenAIPolicyOptions, 'baseURL' | 'thinking'>>
  readonly #urls: readonly string[]
  readonly #requests: Semaphore
  readonly #encodings: Semaphore
  #clients: Promise<OpenAI[]> | undefined
  #turn = 0

  constructor(options: OpenAIPolicyOptions) {
    options = checkArguments(options, optionNames, op)
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
      toolImages: choice(options.toolImages ?? 'tool', ['tool', 'user'], 'toolImages', op),
      stream: checkBoolean(options.stream ?? false, 'stream', op),
      extraBody: bodyOf(options),
    }
    this.#requests = new Semaphore(this.#options.concurrency)
    this.#encodings = new Semaphore(this.#options.concurrency + encodedAhead)
  }

  /**
   * Sends one request, and again where it fails in a way that may pass, or where choices are missing.
   *
   * @returns n completions. Where some are answers, those that are none have a `failure`.
   * @throws P2RError ERR_VALUE for a wrong request; ERR_POLICY, with its cause, when the last attempt failed, and when
   *   none of the completions is an answer.
   */
  async generate(request: PolicyRequest): Promise<Completion[]> {
    checkReceiver(isObject(this) && #options in this, 'OpenAIPolicy', op)
    const { system, n = 1, temperature, maxTokens, tools, signal } = checkRequest(request, op)
    const prompt = checkText(request.prompt, 'prompt', op)
    const { model, extraBody, stream } = this.#options
    return this.#encodings.run(async () => {
      const content = await this.#content(prompt, request.images)
      const turns = await Promise.all((request.turns ?? []).map((turn) => this.#messages(turn)))
      signal?.throwIfAborted()
      const body = {
        model,
        messages: [
          ...(system ? [{ role: 'system', content: system }] : []),
          { role: 'user', content },
          ...turns.flat(),
        ],
        ...(tools?.length && {
          tools: tools.map((tool) => ({ type: 'function', function: tool })),
          tool_choice: request.toolChoice ?? 'auto',
        }),
        ...(temperature !== undefined && { temperature }),
        ...(maxTokens !== undefined && { max_tokens: maxTokens }),
        ...((request.tokens ?? this.#options.tokens) && {
          logprobs: true,
          return_token_ids: true,
          return_tokens_as_token_ids: true,
          // SGLang's, which refuses them for streams.
          ...(!stream && { return_meta_info: true, return_prompt_token_ids: true }),
        }),
        ...(stream && { stream }),
        ...extraBody,
      }
      return this.#requests.run(() => this.#complete(body, n, !!tools?.length, signal), signal)
    }, signal)
  }

  /** The parts of a message: images, then the text. */
  async #content(text: string, images: readonly Tensor<'u8'>[]): Promise<object[]> {
    const urls = await Promise.all(images.map((image) => this.#dataURL(image)))
    return [
      ...urls.map((url) => ({ type: 'image_url', image_url: { url } })),
      { type: 'text', text },
    ]
  }

  /** A turn as messages: the model's, and those of the results. */
  async #messages({ completion, results }: Turn): Promise<object[]> {
    const { text, reasoning, toolCalls } = completion
    const calls = (toolCalls ?? []).map(({ id, name, arguments: given }) => ({
      id,
      type: 'function',
      function: { name, arguments: given },
    }))
    const said = {
      role: 'assistant',
      content: text,
      // Chat templates show the thought of a turn that called a tool.
      ...(reasoning !== undefined && { reasoning_content: reasoning }),
      ...(calls.length && { tool_calls: calls }),
    }
    const beside = this.#options.toolImages === 'user'
    const answers: object[] = []
    // Behind all tool messages, since these have to follow the calls at once.
    const shown: object[] = []
    for (const { id, text, images } of results)
      if (id === undefined)
        shown.push({
          role: 'user',
          content: await this.#content(`<tool_response>\n${text}\n</tool_response>`, images),
        })
      else {
        const separate = beside && images.length > 0
        const content = separate ? text : await this.#content(text, images)
        answers.push({ role: 'tool', tool_call_id: id, content })
        if (separate) shown.push({ role: 'user', content: await this.#content(text, images) })
      }
    return [said, ...answers, ...shown]
  }

  async #dataURL(image: Tensor<'u8'>): Promise<string> {
    const { imageFormat: format, imageQuality: quality } = this.#options
    const bytes = await encodeImage(image, format === 'jpeg' ? { format, quality } : { format })
    return `data:image/${format};base64,${Buffer.from(bytes).toString('base64')}`
  }

  /** Requests until there are n completions, or until another attempt cannot help. */
  async #complete(
    body: Body,
    n: number,
    tools: boolean,
    signal?: AbortSignalLike,
  ): Promise<Completion[]> {
    const { maxRetries, timeoutMs } = this.#options
    const made: Completion[] = []
    // Only attempts that give nothing count: a server that gives one choice a request is asked n times.
    for (let attempt = 0; made.length < n; ) {
      const url = this.#urls[this.#turn++ % this.#urls.length]!
      let failure: Failure
      try {
        const missing = n - made.length
        const some = await this.#attempt(
          url,
          { ...body, ...(missing > 1 && { n: missing }) },
          tools,
          signal,
        )
        if (some.length > missing)
          refuse('ERR_POLICY', op, `the server must give ${missing} choices, got ${some.length}`)
        made.push(...some)
        continue
      } catch (error) {
        if (signal?.aborted) throw signal.reason
        if (error instanceof P2RError) throw error
        failure = redactedFailure(failureOf(error, timeoutMs), this.#options.apiKey)
      }
      const wait = failure.after ?? Math.min(backoff.first * 2 ** attempt, backoff.most)
      if (!failure.retry || attempt === maxRetries || wait > longestWait) {
        const message = `${url}, model ${this.#options.model}: ${failure.message}${
          attempt ? ` (after ${attempt + 1} attempts)` : ''
        }`
        if (!made.length) refuse('ERR_POLICY', op, message, { cause: failure.cause })
        while (made.length < n) made.push({ text: '', failure: message })
        break
      }
      attempt++
      // Retry-After is kept exactly; our own backoff is jittered, so that clients do not retry in step.
      await sleep(failure.after ?? wait * (0.75 + 0.5 * Math.random()), signal)
    }
    const [first] = made
    if (first?.failure !== undefined && made.every(({ failure }) => failure !== undefined))
      refuse('ERR_POLICY', op, `model ${this.#options.model}: ${first.failure}`)
    return made
  }

  /** One request with a deadline for all of it; the client's own timeout ends at the headers. */
  async #attempt(
    url: string,
    body: Body,
    tools: boolean,
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
      const whole = streamed ? await assemble(answer as AsyncIterable<unknown>) : answer
      return completionsOf(redacted(whole, this.#options.apiKey), tools)
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
      const fetch = await patientFetch(apiKey)
      return this.#urls.map(
        (baseURL) => new library.OpenAI({ baseURL, apiKey, fetch, logLevel: 'off' }),
      )
    })()
    return this.#clients
  }
}

type Body = Record<string, unknown>

class TimedOut extends Error {}
/** An invalid response. */
class BadAnswer extends Error {
  /** Whether another attempt may help. */
  readonly retry: boolean
  constructor(message: string, retry = true) {
    super(message)
    this.retry = retry
  }
}

/**
 * Fetch without time limits of its own (Node's ends a request after 300 s without headers or data, whatever
 * `timeoutMs` is), whose error responses have a body that the client reads.
 */
async function patientFetch(apiKey: string): Promise<typeof globalThis.fetch> {
  const { Agent } = await import('undici')
  const dispatcher = new Agent({ headersTimeout: 0, bodyTimeout: 0 })
  const patient = async (url: string, init?: object): Promise<Response> => {
    const response = await fetchWithin(url, { ...init, dispatcher } as object)
    const bounded = response.body
      ? new Response(response.body.pipeThrough(limited()), response)
      : response
    return bounded.ok ? bounded : withError(bounded, apiKey)
  }
  return patient as typeof globalThis.fetch
}

/** Bytes of a response. Beyond them a server is broken, or wants the memory. */
const longestResponse = 1 << 28

function limited(): TransformStream<Uint8Array, Uint8Array> {
  let length = 0
  return new TransformStream({
    transform(bytes, controller) {
      length += bytes.length
      if (length > longestResponse)
        throw new BadAnswer(`the answer has more than ${longestResponse} bytes`, false)
      controller.enqueue(bytes)
    },
  })
}

/** Redirects that a request follows, one after the other. */
const mostRedirects = 3

/**
 * @internal fetch, but a redirect to another origin is an error: prompts, images and the key are for the named server
 * alone. Redirects that would drop the request's body (301 to 303) are errors too, unless it has none.
 */
export async function fetchWithin(url: string, init: RequestInit): Promise<Response> {
  let at = new URL(url)
  for (let followed = 0; ; followed++) {
    const response = await fetch(at, { ...init, redirect: 'manual' })
    const location = response.headers.get('location')
    if (response.status < 300 || response.status >= 400 || location === null) return response
    await response.body?.cancel()
    const next = URL.canParse(location, at.href) ? new URL(location, at) : undefined
    if (next?.origin !== at.origin)
      throw new BadAnswer(`it redirects to ${next?.origin ?? 'no address'}, another server`, false)
    if ((response.status < 307 && init.body) || followed === mostRedirects)
      throw new BadAnswer(`it redirects to ${next.pathname}; name that address`, false)
    at = next
  }
}

/** @internal Whether an address holds a user's name or password. fetch refuses it, and messages would repeat it. */
export function hasCredentials(url: string): boolean {
  if (!URL.canParse(url)) return false
  const { username, password } = new URL(url)
  return username !== '' || password !== ''
}

/** Characters from which on a key is a secret; 'EMPTY', which servers without keys are given, is none. */
const shortestSecret = 6

/** A value with the key left out of every text in it, since servers repeat what they were sent. */
function redacted<T>(value: T, apiKey: string): T {
  if (apiKey.length < shortestSecret) return value
  const without = (value: unknown): unknown => {
    if (typeof value === 'string') return value.replaceAll(apiKey, '[key]')
    if (Array.isArray(value)) return value.map(without)
    if (typeof value !== 'object' || value === null) return value
    return Object.fromEntries(Object.entries(value).map(([name, v]) => [without(name), without(v)]))
  }
  return without(value) as T
}

/** An error of the client's with no more of the request and the response than its texts, without the key. */
function redactedError(error: unknown, apiKey: string): unknown {
  if (!(error instanceof Error)) return redacted(error, apiKey)
  const { status, code, cause } = error as { status?: unknown; code?: unknown; cause?: unknown }
  const made = new Error(
    redacted(error.message, apiKey),
    cause === undefined ? undefined : { cause: redactedError(cause, apiKey) },
  )
  made.name = error.name
  if (error.stack) made.stack = redacted(error.stack, apiKey)
  return Object.assign(
    made,
    redacted(
      { ...(status !== undefined && { status }), ...(code !== undefined && { code }) },
      apiKey,
    ),
  )
}

/** An error response in the API's form. The client shows `error.message` and drops what others write. */
async function withError(response: Response, apiKey: string): Promise<Response> {
  const text = redacted(await response.text(), apiKey)
  const { status, headers } = response
  let said: string | undefined
  try {
    const body: unknown = JSON.parse(text)
    said = reported(body) ?? (typeof body === 'string' ? body : text).slice(0, 500)
  } catch {
    // Not JSON: the client shows the text.
  }
  const body = said === undefined ? text : JSON.stringify({ error: { message: said } })
  return new Response(body, { status, headers: [...headers] })
}

/**
 * The message in a body that reports an error: the API's `error.message`; the flat `message` of SGLang and of
 * vLLM before 0.10.1; the `detail` of FastAPI, a text or a list of faults; the `error` of Ollama, a text.
 */
function reported(body: unknown): string | undefined {
  if (!isObject(body)) return undefined
  const { error, message, detail } = body as Record<string, unknown>
  if (typeof error === 'string') return error
  if (isObject(error)) return reported(error) ?? JSON.stringify(error)
  if (typeof message === 'string') return message
  if (typeof detail === 'string') return detail
  return detail === undefined || detail === null ? undefined : JSON.stringify(detail)
}

/** The client's status codes that a body of status 200 may carry. */
function reportedCode(body: unknown): number | undefined {
  const { error, code } = body as { error?: { code?: unknown }; code?: unknown }
  const given = Number(error?.code ?? code)
  return Number.isInteger(given) ? given : undefined
}

const mayPass = (status: number): boolean =>
  status === 408 || status === 409 || status === 429 || status >= 500

interface Failure {
  message: string
  retry: boolean
  /** Milliseconds of Retry-After. */
  after?: number | undefined
  cause: unknown
}

function redactedFailure({ message, cause, ...failure }: Failure, apiKey: string): Failure {
  return { ...failure, message: redacted(message, apiKey), cause: redactedError(cause, apiKey) }
}

function failureOf(cause: unknown, timeoutMs: number): Failure {
  if (cause instanceof TimedOut)
    return { message: `no answer within ${timeoutMs} ms`, retry: true, cause }
  const { status, headers } = cause as { status?: number; headers?: Headers }
  if (typeof status !== 'number') {
    // Refused and broken connections, truncated bodies: the reason is the innermost cause.
    let reason = cause
    while ((reason as Error)?.cause) reason = (reason as Error).cause
    if (reason instanceof BadAnswer) return { message: reason.message, retry: reason.retry, cause }
    return { message: `the connection failed: ${messageOf(reason)}`, retry: true, cause }
  }
  return {
    message: `the server answered ${messageOf(cause)}`,
    retry: mayPass(status),
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

/** The choices of a response that hold a message, sorted by index. */
function completionsOf(answer: unknown, tools: boolean): Completion[] {
  const { choices, prompt_token_ids, usage } = (answer ?? {}) as {
    choices?: unknown
    prompt_token_ids?: unknown
    usage?: { completion_tokens?: unknown } | null
  }
  if (!Array.isArray(choices)) {
    const said = reported(answer)
    const code = said === undefined ? undefined : reportedCode(answer)
    const got = typeof answer === 'string' ? 'text instead of JSON' : JSON.stringify(answer)
    throw new BadAnswer(
      `the answer holds no choices${said === undefined ? `, got ${got?.slice(0, 500)}` : `: ${said}`}`,
      code === undefined || code < 400 || mayPass(code),
    )
  }
  if (!choices.length) throw new BadAnswer('the answer holds an empty list of choices')
  const whole = (choices as (Choice | null)[]).filter((c): c is Choice => isObject(c?.message))
  // Those without a message are asked for again, as others that are missing.
  if (!whole.length) throw new BadAnswer('a choice holds no message')
  const at = ({ index }: Choice): number => Number(index) || 0
  const listsAll = listsTokens(whole, usage?.completion_tokens)
  return whole
    .sort((a, b) => at(a) - at(b))
    .map((choice) => ({
      ...completionOf(choice, tools, listsAll),
      ...([choice.prompt_token_ids, prompt_token_ids].some(isTokens) && {
        promptTokens: [choice.prompt_token_ids, prompt_token_ids].find(isTokens)!,
      }),
    }))
}

interface Choice {
  index?: unknown
  finish_reason?: unknown
  message: Message
  logprobs?: { content?: unknown } | null
  token_ids?: unknown
  response_token_ids?: unknown
  prompt_token_ids?: unknown
  /** SGLang's: [log-probability, token id, text] of each token. */
  meta_info?: { output_token_logprobs?: unknown } | null
}

interface Message {
  content?: unknown
  refusal?: unknown
  reasoning?: unknown
  reasoning_content?: unknown
  tool_calls?: unknown
  function_call?: unknown
}

/**
 * Whether the choices' log-probabilities are of all tokens that were sampled. llama.cpp's, which hold the ids, lack
 * tokens that end within a character; the last token of a text that ended by itself may be left out.
 */
function listsTokens(choices: readonly Choice[], sampled: unknown): boolean {
  const sum = (f: (choice: Choice) => number): number => choices.reduce((n, c) => n + f(c), 0)
  const listed = sum(({ logprobs }) => (logprobs?.content as unknown[] | undefined)?.length ?? 0)
  const ended = sum(({ finish_reason }) => +(finish_reason === 'stop'))
  return sampled === listed || sampled === listed + ended
}

function completionOf(choice: Choice, tools: boolean, listsAll: boolean): Completion {
  const { message } = choice
  const parts = partsOf(message.content)
  const refusal = [message.refusal, parts?.refusal].find(isText)
  const reasoning = [message.reasoning, message.reasoning_content, parts?.reasoning].find(isText)
  const finishReason = isText(choice.finish_reason) ? choice.finish_reason : undefined
  const said = refusal === undefined ? (parts?.text ?? '') : ''
  const toolCalls = tools ? callsOf(message.tool_calls) : []
  const failure =
    refusal === undefined && !toolCalls.length
      ? failureIn(message, parts, { text: said, reasoning, finishReason })
      : undefined
  const completion: Completion = {
    text: failure === undefined ? said : '',
    ...(finishReason !== undefined && { finishReason }),
    ...(reasoning !== undefined && { reasoning }),
    ...(toolCalls.length > 0 && { toolCalls }),
    ...(refusal !== undefined && { refusal }),
    ...(failure !== undefined && { failure }),
  }
  const each = entriesOf(choice, listsAll)
  const listed = [choice.token_ids, choice.response_token_ids].find(isTokens)
  const tokens = listed ?? each?.map(({ id }) => id)
  if (tokens && isTokens(tokens)) completion.tokens = tokens
  const logProbs = each?.map(({ logProb }) => logProb)
  // Some servers list nothing but nulls. One value that is missing stays, as NaN, for the batch to refuse.
  if (
    logProbs &&
    (!logProbs.length || !logProbs.every(Number.isNaN)) &&
    (!completion.tokens || completion.tokens.length === logProbs.length)
  )
    completion.logProbs = logProbs
  return completion
}

/** A message's calls of tools, as the server has them, right or not. */
function callsOf(calls: unknown): ToolCall[] {
  if (!Array.isArray(calls)) return []
  return calls.filter(isObject).map((call, i): ToolCall => {
    const { id, function: called } = call as { id?: unknown; function?: unknown }
    const { name, arguments: given } = (isObject(called) ? called : {}) as Record<string, unknown>
    return {
      id: isText(id) ? id : `call_${i}`,
      name: typeof name === 'string' ? name : '',
      // Ollama has an object.
      arguments: typeof given === 'string' ? given : JSON.stringify(given ?? {}),
    }
  })
}

interface Parts {
  text: string
  refusal?: string
  reasoning?: string
  /** The types of parts that hold neither. */
  others: string[]
}

/** The content of a message: a text, or a list of parts, whose texts are joined. */
function partsOf(content: unknown): Parts | undefined {
  if (typeof content === 'string') return { text: content, others: [] }
  if (!Array.isArray(content)) return undefined
  const joined = { text: '', refusal: '', reasoning: '' }
  const others: string[] = []
  for (const part of content) {
    const { type, text, refusal, thinking } = (isObject(part) ? part : {}) as Record<
      string,
      unknown
    >
    if (typeof part === 'string') joined.text += part
    else if (type === 'refusal' && typeof refusal === 'string') joined.refusal += refusal
    else if (type === 'thinking' || type === 'reasoning')
      joined.reasoning += partsOf(thinking ?? text)?.text ?? ''
    else if (typeof text === 'string') joined.text += text
    else others.push(describeValue(type))
  }
  return { ...joined, others }
}

/** Why a message holds no answer, by what it holds instead. */
function failureIn(
  message: Message,
  parts: Parts | undefined,
  got: { text: string; reasoning?: string | undefined; finishReason?: string | undefined },
): string | undefined {
  const { reasoning, finishReason } = got
  const filtered = finishReason === 'content_filter'
  const { tool_calls: tools, function_call: call, content } = message
  // A single function_call is the API's older form.
  const calls = Array.isArray(tools) ? tools : isObject(call) ? [{ function: call }] : []
  const isEmpty = Array.isArray(content) && content.length === 0
  // An empty text is what a model wrote that ended at once; without a text, something else came.
  const others =
    !parts || isEmpty || reasoning !== undefined || parts.others.length > 0 || calls.length > 0
  if (!filtered && (got.text !== '' || !(others || finishReason === 'length'))) return undefined
  const names = calls.map((call) =>
    describeValue((call as { function?: { name?: unknown } } | null)?.function?.name),
  )
  const came = [
    ...(reasoning === undefined ? [] : [`reasoning of ${reasoning.length} characters`]),
    ...(calls.length ? [`calls of the tools ${names.join(', ')}`] : []),
    ...(parts?.others.length ? [`parts of type ${parts.others.join(', ')}`] : []),
    ...(filtered ? ['content that the server filtered'] : []),
  ]
  return `the answer holds no text: got ${
    came.join(' and ') || (isEmpty ? 'no parts' : `content ${describeValue(content)}`)
  }${finishReason === undefined ? '' : `, finish_reason '${finishReason}'`}${
    finishReason === 'length' ? ': maxTokens cut it off' : ''
  }`
}

function isText(value: unknown): value is string {
  return typeof value === 'string' && value !== ''
}

/** A sampled token: NaN and undefined for what the server does not say. */
interface Entry {
  id: number | undefined
  logProb: number
}

/** The tokens that a choice lists with their log-probabilities. */
function entriesOf({ logprobs, meta_info }: Choice, listsAll: boolean): Entry[] | undefined {
  const numberOr = <T>(value: unknown, otherwise: T): number | T =>
    typeof value === 'number' ? value : otherwise
  const triples = meta_info?.output_token_logprobs
  if (Array.isArray(triples) && triples.length > 0 && triples.every(Array.isArray))
    return triples.map(([logProb, id]) => ({
      id: numberOr(id, undefined),
      logProb: numberOr(logProb, Number.NaN),
    }))
  if (!Array.isArray(logprobs?.content)) return undefined
  return (logprobs.content as unknown[]).map((entry) => {
    const { token, id, logprob } = (entry ?? {}) as Record<string, unknown>
    // 'token_id:123' is vLLM's form of tokens with return_tokens_as_token_ids.
    const digits = typeof token === 'string' ? /^token_id:(\d+)$/.exec(token)?.[1] : undefined
    const own = listsAll ? numberOr(id, undefined) : undefined
    return {
      id: digits === undefined ? own : Number(digits),
      logProb: numberOr(logprob, Number.NaN),
    }
  })
}

function isTokens(list: unknown): list is number[] {
  return Array.isArray(list) && list.every(Number.isInteger)
}

/** The chunks of a stream as one response. */
async function assemble(stream: AsyncIterable<unknown>): Promise<unknown> {
  interface Chunk extends Omit<Choice, 'message'> {
    delta?: Message
  }
  interface AssembledCall {
    id?: string
    function: { name: string; arguments: string }
  }
  interface Assembled extends Choice {
    index: number
    message: Message & { content: string | null; tool_calls?: AssembledCall[] }
    logprobs?: { content: unknown[] }
    token_ids?: number[]
  }
  const choices = new Map<number, Assembled>()
  let prompt: unknown
  for await (const event of stream) {
    const { choices: chunks, prompt_token_ids } = event as {
      choices?: Chunk[]
      prompt_token_ids?: unknown
    }
    const said = Array.isArray(chunks) ? undefined : reported(event)
    if (said !== undefined || isObject((event as { error?: unknown }).error))
      throw new BadAnswer(`the stream broke off: ${said ?? reported(event) ?? 'no reason given'}`)
    if (isTokens(prompt_token_ids)) prompt = prompt_token_ids
    for (const chunk of Array.isArray(chunks) ? chunks : []) {
      const index = Number(chunk.index) || 0
      const choice: Assembled = choices.get(index) ?? { index, message: { content: null } }
      choices.set(index, choice)
      const { message } = choice
      const { content, refusal, tool_calls: calls, ...delta } = chunk.delta ?? {}
      const { text } = partsOf(content) ?? {}
      if (text !== undefined) message.content = (message.content ?? '') + text
      for (const [name, piece] of [
        ['refusal', refusal],
        ['reasoning', delta.reasoning ?? delta.reasoning_content],
      ] as const)
        if (typeof piece === 'string') message[name] = `${message[name] ?? ''}${piece}`
      for (const call of Array.isArray(calls) ? calls : []) {
        if (!isObject(call)) continue
        const { index, id, function: piece } = call as Record<string, unknown>
        const { name, arguments: given } = (isObject(piece) ? piece : {}) as Record<string, unknown>
        message.tool_calls ??= []
        // A piece continues the call of its index; one with a name begins a call where there is no index.
        const all = message.tool_calls
        const place =
          typeof index === 'number' ? index : all.length - +(!isText(name) && all.length > 0)
        if (place > all.length || place < 0) continue
        all[place] ??= { function: { name: '', arguments: '' } }
        const made = all[place]
        if (isText(id)) made.id = id
        if (isText(name)) made.function.name += name
        if (typeof given === 'string') made.function.arguments += given
        else if (isObject(given)) made.function.arguments = JSON.stringify(given)
      }
      if (Array.isArray(chunk.logprobs?.content)) {
        choice.logprobs ??= { content: [] }
        choice.logprobs.content.push(...chunk.logprobs.content)
      }
      if (isTokens(chunk.token_ids)) {
        choice.token_ids ??= []
        choice.token_ids.push(...chunk.token_ids)
      }
      if (isTokens(chunk.prompt_token_ids)) choice.prompt_token_ids = chunk.prompt_token_ids
      if (chunk.finish_reason) choice.finish_reason = chunk.finish_reason
    }
  }
  const all = [...choices.values()]
  if (!all.length || !all.every(({ finish_reason }) => finish_reason))
    throw new BadAnswer('the stream ended before the answer did')
  return { choices: all, prompt_token_ids: prompt }
}

/** The option extraBody, with the switch of thinking among the template's arguments. */
function bodyOf({ extraBody = {}, thinking }: OpenAIPolicyOptions): Record<string, unknown> {
  const body: Record<string, unknown> = { ...checkObject(extraBody, 'extraBody', op) }
  if (thinking === undefined) return body
  const enable_thinking = checkBoolean(thinking, 'thinking', op)
  const others = checkObject(
    (body.chat_template_kwargs ?? {}) as object,
    'extraBody.chat_template_kwargs',
    op,
  )
  return { ...body, chat_template_kwargs: { ...others, enable_thinking } }
}

function urlsOf(baseURL: unknown): string[] {
  const urls = Array.isArray(baseURL) ? checkArray<unknown>(baseURL, 'baseURL', op) : [baseURL]
  if (!urls.length) refuse('ERR_VALUE', op, 'baseURL must name at least one server')
  for (const url of urls)
    if (typeof url !== 'string' || !URL.canParse(url) || !/^https?:/.test(url))
      refuse('ERR_VALUE', op, `baseURL must be an http address, got ${describeValue(url)}`)
    else if (hasCredentials(url))
      refuse('ERR_VALUE', op, 'baseURL must not hold a password; give a key by apiKey')
  return urls as string[]
}
