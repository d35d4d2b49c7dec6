import { createHash, randomUUID, timingSafeEqual } from 'node:crypto'
import type { IncomingMessage, Server, ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import {
  checkArguments,
  checkIntegerWithin,
  checkPositive,
  checkText,
  choice,
  describeValue,
  type Names,
} from '../arguments.js'
import { P2RError, refuse } from '../errors.js'
import { loadImage } from '../image.js'
import { type ChatPrompt, chatPrompt } from '../models/qwen3_vl/chat.js'
import type {
  GeneratedToken,
  Qwen3VLGenerateArgs,
  TokenLogProb,
} from '../models/qwen3_vl/generate.js'
import { Qwen3VL } from '../models/qwen3_vl/model.js'
import { StopTexts } from '../models/qwen3_vl/stop.js'
import type { Qwen3VLTokenizer } from '../models/qwen3_vl/tokens.js'
import { type ChatCompletionRequest, RequestError, readRequest } from './requests.js'
import { type CalledTool, ToolTexts } from './tool_texts.js'

/** Options of serveModel. */
export interface ServeOptions {
  /**
   * What the model is called in requests and in /v1/models.
   * @default 'qwen3-vl'
   */
  name?: string
  /**
   * The address to listen on; others than loopback let other machines in.
   * @default '127.0.0.1'
   */
  host?: string
  /**
   * The port; 0 for any that is free.
   * @default 8000
   */
  port?: number
  /**
   * Requests must have it as their bearer token.
   * @default none
   */
  apiKey?: string
  /**
   * Of requests that do not say, in tokens; never beyond the model's context.
   * @default 2048
   */
  maxTokens?: number
  /**
   * Of which distribution log-probabilities are, by vLLM's names: of temperature 1, or of the request's temperature, as
   * training takes them.
   * @default 'raw_logprobs'
   */
  logProbsMode?: 'raw_logprobs' | 'processed_logprobs'
  /**
   * Requests at once; further ones are answered with status 503.
   * @default 256
   */
  maxRequests?: number
  /**
   * Bytes of a request's body.
   * @default 67 108 864
   */
  maxBytes?: number
  /**
   * Images of a request.
   * @default 32
   */
  maxImages?: number
  /**
   * Pixels of an image.
   * @default 67 108 864
   */
  maxPixels?: number
  /**
   * Choices of a request.
   * @default 128
   */
  maxChoices?: number
}

/** A model that is being served. */
export interface ModelServer {
  /** The API's address: 'http://127.0.0.1:8000/v1'. */
  baseURL: string
  /**
   * Takes no more requests, lets those under way end, and frees the port. The model stays the caller's.
   *
   * @param graceMs after which requests under way are broken off; default: 10 000
   */
  close(graceMs?: number): Promise<void>
}

const optionNames: Names<ServeOptions> = {
  name: true,
  host: true,
  port: true,
  apiKey: true,
  maxTokens: true,
  logProbsMode: true,
  maxRequests: true,
  maxBytes: true,
  maxImages: true,
  maxPixels: true,
  maxChoices: true,
}
const op = 'serveModel'

/**
 * Serves a model by the OpenAI chat API, as vLLM does: POST /v1/chat/completions, GET /v1/models and /health. Images
 * are data URLs; `n`, `seed`, `stop`, `logprobs`, `top_logprobs`, `logit_bias`, penalties, streaming with usage, and of
 * vLLM's fields `top_k`, `min_p`, `repetition_penalty`, `ignore_eos`, `return_token_ids`, `return_tokens_as_token_ids`
 * and `chat_template_kwargs`. `tools` are told by the checkpoint's template, and calls of them are read from the text as
 * vLLM's parser 'hermes' does. Sampling that a request leaves out is the checkpoint's. Fields that would change an
 * answer and are not supported (response formats, calls that are forced) are status 400. Requests at once are computed
 * together.
 *
 * @throws P2RError ERR_VALUE for anything but a model, and for options; ERR_IO where the address cannot be listened on;
 *   as `Qwen3VL.tokenizer`.
 * @example
 * ```js
 * import { openDevice, Qwen3VL, serveModel } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const model = await Qwen3VL.load('Qwen3-VL-2B-Instruct', device) // a checkpoint's folder
 * const server = await serveModel(model, { port: 0 })
 * const answer = await fetch(`${server.baseURL}/models`)
 * console.log(answer.status) // 200
 * await server.close()
 * device.dispose()
 * ```
 */
export async function serveModel(model: Qwen3VL, options: ServeOptions = {}): Promise<ModelServer> {
  if (!(model instanceof Qwen3VL))
    refuse('ERR_VALUE', op, `model must be a Qwen3VL, got ${describeValue(model)}`)
  const settings = settingsOf(options)
  const service = new Service(model, await model.tokenizer(), settings)
  // Loaded here: an import of the package should not wait for Node's HTTP.
  const { createServer } = await import('node:http')
  const server = createServer((request, response) => void service.answer(request, response))
  await listen(server, settings.host, settings.port)
  const { address, family, port } = server.address() as AddressInfo
  const host = family === 'IPv6' ? `[${address}]` : address
  return {
    baseURL: `http://${host}:${port}/v1`,
    close: async (graceMs = 10_000) => {
      const closed = new Promise<void>((resolve) => server.close(() => resolve()))
      server.closeIdleConnections()
      const timer = setTimeout(() => service.stop(), graceMs)
      await service.idle()
      clearTimeout(timer)
      server.closeAllConnections()
      await closed
    },
  }
}

type Settings = Required<Omit<ServeOptions, 'apiKey'>> & { apiKey: string | undefined }

function settingsOf(options: ServeOptions): Settings {
  options = checkArguments(options, optionNames, op, 'options')
  const {
    name = 'qwen3-vl',
    host = '127.0.0.1',
    port = 8000,
    apiKey,
    maxTokens = 2048,
    logProbsMode = 'raw_logprobs',
    maxRequests = 256,
    maxBytes = 2 ** 26,
    maxImages = 32,
    maxPixels = 2 ** 26,
    maxChoices = 128,
  } = options
  checkText(name, 'name', op)
  checkText(host, 'host', op)
  checkIntegerWithin(port, 0, 65_535, 'port', op)
  if (apiKey !== undefined) checkText(apiKey, 'apiKey', op)
  choice(logProbsMode, ['raw_logprobs', 'processed_logprobs'], 'logProbsMode', op)
  const counts = { maxTokens, maxRequests, maxBytes, maxImages, maxPixels, maxChoices }
  for (const [key, value] of Object.entries(counts)) checkPositive(value, key, op)
  return { name, host, port, apiKey, logProbsMode, ...counts }
}

async function listen(server: Server, host: string, port: number): Promise<void> {
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject)
    server.listen(port, host, () => {
      server.off('error', reject)
      resolve()
    })
  }).catch((cause: Error) =>
    refuse('ERR_IO', op, `${host}:${port} cannot be listened on: ${cause.message}`, { cause }),
  )
}

class Service {
  readonly #model: Qwen3VL
  readonly #tokenizer: Qwen3VLTokenizer
  readonly #settings: Settings
  readonly #started = Math.floor(Date.now() / 1000)
  readonly #running = new Set<AbortController>()
  #whenIdle: (() => void) | undefined

  constructor(model: Qwen3VL, tokenizer: Qwen3VLTokenizer, settings: Settings) {
    this.#model = model
    this.#tokenizer = tokenizer
    this.#settings = settings
  }

  /** Resolves when no request is under way. */
  idle(): Promise<void> {
    if (!this.#running.size) return Promise.resolve()
    return new Promise((resolve) => {
      this.#whenIdle = resolve
    })
  }

  /** Breaks off the requests under way. */
  stop(): void {
    for (const left of this.#running) left.abort(new RequestError(503, 'the server is closing'))
  }

  async answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const left = new AbortController()
    this.#running.add(left)
    response.on('close', () => left.abort(new Error('the client left')))
    try {
      await this.#route(request, response, left.signal)
    } catch (error) {
      if (!response.destroyed) fail(response, error)
    } finally {
      this.#running.delete(left)
      if (!this.#running.size) this.#whenIdle?.()
    }
  }

  async #route(
    request: IncomingMessage,
    response: ServerResponse,
    signal: AbortSignal,
  ): Promise<void> {
    const path = new URL(request.url ?? '/', 'http://server').pathname
    const { method } = request
    if (path === '/health' && method === 'GET') return send(response, 200, {})
    this.#authorise(request)
    if (path === '/v1/models' && method === 'GET') return send(response, 200, this.#models())
    if (path !== '/v1/chat/completions' || method !== 'POST')
      throw new RequestError(404, `there is no ${method} ${path}`)
    if (this.#running.size > this.#settings.maxRequests)
      throw new RequestError(503, `${this.#settings.maxRequests} requests are under way`)
    const asked = readRequest(await this.#body(request), this.#settings)
    if (asked.model !== undefined && asked.model !== this.#settings.name)
      throw new RequestError(
        404,
        `the model '${asked.model}' does not exist; '${this.#settings.name}' does`,
      )
    await this.#complete(asked, response, signal)
  }

  #authorise({ headers }: IncomingMessage): void {
    const { apiKey } = this.#settings
    if (apiKey === undefined) return
    const digest = (text: string): Buffer => createHash('sha256').update(text).digest()
    if (!timingSafeEqual(digest(headers.authorization ?? ''), digest(`Bearer ${apiKey}`)))
      throw new RequestError(401, 'the API key is missing or wrong')
  }

  #models(): object {
    const { maxPositions } = this.#model.config
    const own = {
      id: this.#settings.name,
      object: 'model',
      created: this.#started,
      owned_by: 'p2r-kernels',
      max_model_len: maxPositions,
    }
    return { object: 'list', data: [own] }
  }

  async #body(request: IncomingMessage): Promise<unknown> {
    const { maxBytes } = this.#settings
    // A page in a browser can send other types to this address without being asked for permission.
    const type = request.headers['content-type'] ?? ''
    if (!/^application\/json\b/i.test(type))
      throw new RequestError(415, `the body must be of type application/json, got '${type}'`)
    const parts: Buffer[] = []
    let size = 0
    for await (const part of request as AsyncIterable<Buffer>) {
      size += part.length
      if (size > maxBytes) throw new RequestError(413, `a body may have ${maxBytes} bytes`)
      parts.push(part)
    }
    try {
      return JSON.parse(Buffer.concat(parts).toString('utf8'))
    } catch {
      throw new RequestError(400, 'the body is not JSON')
    }
  }

  async #complete(
    asked: ChatCompletionRequest,
    response: ServerResponse,
    signal: AbortSignal,
  ): Promise<void> {
    using prompt = await this.#prompt(asked, signal)
    const args = this.#argumentsOf(asked, prompt, signal)
    const reply = new Reply(asked, prompt.tokens, this.#settings.name, this.#tokenizer)
    if (!asked.stream) {
      for await (const { index, ...token } of this.#model.stream(args)) reply.push(index, token)
      return send(response, 200, reply.whole())
    }
    // The first step comes before the headers, so that what cannot be generated has a status of its own.
    let begun = false
    const write = (data: object): void => {
      if (!begun) response.writeHead(200, { 'content-type': 'text/event-stream; charset=utf-8' })
      begun = true
      response.write(`data: ${JSON.stringify(data)}\n\n`)
    }
    try {
      for await (const { index, ...token } of this.#model.stream(args)) {
        if (!begun) for (const chunk of reply.first()) write(chunk)
        const chunk = reply.push(index, token)
        if (chunk) write(chunk)
        if (response.writableNeedDrain)
          await new Promise<void>((resolve) => {
            response.once('drain', resolve)
            response.once('close', resolve)
          })
      }
      if (asked.usage) write(reply.usage())
      response.end('data: [DONE]\n\n')
    } catch (error) {
      if (!begun) throw error
      if (!response.destroyed) response.end(`data: ${JSON.stringify(errorOf(error).body)}\n\n`)
    }
  }

  async #prompt(asked: ChatCompletionRequest, signal: AbortSignal): Promise<ChatPrompt> {
    const { maxPixels } = this.#settings
    const { device } = this.#model
    const images = await Promise.all(
      asked.images.map((bytes) => loadImage(bytes, device, { maxPixels, signal })),
    )
    try {
      return chatPrompt(this.#model, this.#tokenizer, { ...asked, images }, op)
    } finally {
      for (const image of images) image.dispose()
    }
  }

  #argumentsOf(
    asked: ChatCompletionRequest,
    { tokens, images }: ChatPrompt,
    signal: AbortSignal,
  ): Qwen3VLGenerateArgs {
    const { config, sampling } = this.#model
    const { stopTokens, ...authors } = sampling
    const room = config.maxPositions - tokens.length
    const most = asked.maxTokens ?? Math.min(this.#settings.maxTokens, room)
    if (room < 1 || most > room)
      throw new RequestError(
        400,
        `the prompt has ${tokens.length} tokens${room < 1 ? '' : ` and max_tokens is ${most}`}: more than the model's context of ${config.maxPositions}`,
      )
    return {
      prompts: [{ tokens, ...(images && { images }) }],
      n: asked.n,
      maxTokens: most,
      ...authors,
      ...asked.sampling,
      seed: asked.seed ?? Math.floor(Math.random() * 2 ** 48),
      stopTokens: asked.ignoreEos ? [] : stopTokens,
      stop: asked.stop,
      logProbs: asked.logProbs,
      topLogProbs: asked.topLogProbs,
      ...(this.#settings.logProbsMode === 'raw_logprobs' && { logProbsTemperature: 1 }),
      signal,
    }
  }
}

type Token = Omit<GeneratedToken, 'prompt' | 'index'>

/** What a request is answered with, at once or chunk by chunk. */
class Reply {
  readonly #asked: ChatCompletionRequest
  readonly #prompt: readonly number[]
  readonly #tokenizer: Qwen3VLTokenizer
  readonly #head: { id: string; created: number; model: string }
  readonly #choices: {
    text: string
    calls: object[]
    tokens: number[]
    logProbs: object[]
    finishReason: string | null
    stream: ReturnType<Qwen3VLTokenizer['stream']>
    stop: StopTexts
    tools: ToolTexts
  }[]

  constructor(
    asked: ChatCompletionRequest,
    prompt: readonly number[],
    model: string,
    tokenizer: Qwen3VLTokenizer,
  ) {
    this.#asked = asked
    this.#prompt = prompt
    this.#tokenizer = tokenizer
    this.#head = { id: `chatcmpl-${randomUUID()}`, created: Math.floor(Date.now() / 1000), model }
    this.#choices = Array.from({ length: asked.n }, () => ({
      text: '',
      calls: [],
      tokens: [],
      logProbs: [],
      finishReason: null,
      stream: tokenizer.stream(),
      stop: new StopTexts(asked.stop),
      tools: new ToolTexts(),
    }))
  }

  /** Adds a token of a choice; the chunk that tells of it, unless there is nothing to tell. */
  push(index: number, { token, logProb, topLogProbs, finishReason }: Token): object | undefined {
    const choice = this.#choices[index]!
    const { logProbs, tokenIds, toolCalls } = this.#asked
    let text = choice.stop.push(choice.stream.push(token))
    if (finishReason) text += choice.stop.push(choice.stream.end()) + choice.stop.end()
    let calls: CalledTool[] = []
    if (toolCalls) {
      ;({ text, calls } = choice.tools.push(text))
      if (finishReason) {
        const rest = choice.tools.end()
        text += rest.text
        calls.push(...rest.calls)
      }
    }
    const called = calls.map((call, i) => ({
      index: choice.calls.length + i,
      id: `chatcmpl-tool-${randomUUID()}`,
      type: 'function',
      function: call,
    }))
    choice.text += text
    choice.calls.push(...called.map(({ index: _, ...call }) => call))
    choice.tokens.push(token)
    choice.finishReason =
      finishReason === 'stop' && choice.calls.length ? 'tool_calls' : (finishReason ?? null)
    const entry = logProbs ? this.#entry(token, logProb!, topLogProbs) : undefined
    if (entry) choice.logProbs.push(entry)
    if (text === '' && !calls.length && !finishReason && !logProbs && !tokenIds) return undefined
    return this.#chunk({
      index,
      delta: {
        ...(text !== '' && { content: text }),
        ...(called.length && { tool_calls: called }),
      },
      logprobs: entry ? { content: [entry] } : null,
      finish_reason: choice.finishReason,
      ...(tokenIds && { token_ids: [token] }),
    })
  }

  /** The chunks that open the choices. */
  first(): object[] {
    return this.#choices.map((_, index) => ({
      ...this.#chunk({
        index,
        delta: { role: 'assistant', content: '' },
        logprobs: null,
        finish_reason: null,
      }),
      ...(this.#asked.tokenIds && index === 0 && { prompt_token_ids: this.#prompt }),
    }))
  }

  /** The chunk that counts tokens. */
  usage(): object {
    return { ...this.#chunk(), usage: this.#usage() }
  }

  whole(): object {
    const { logProbs, tokenIds } = this.#asked
    return {
      ...this.#head,
      object: 'chat.completion',
      choices: this.#choices.map((choice, index) => ({
        index,
        message: {
          role: 'assistant',
          content: choice.text === '' && choice.calls.length ? null : choice.text,
          refusal: null,
          ...(choice.calls.length && { tool_calls: choice.calls }),
        },
        logprobs: logProbs ? { content: choice.logProbs } : null,
        finish_reason: choice.finishReason,
        ...(tokenIds && { token_ids: choice.tokens }),
      })),
      usage: this.#usage(),
      ...(tokenIds && { prompt_token_ids: this.#prompt }),
    }
  }

  #chunk(...choices: object[]): object {
    return { ...this.#head, object: 'chat.completion.chunk', choices }
  }

  #usage(): object {
    const prompt = this.#prompt.length
    const made = this.#choices.reduce((sum, { tokens }) => sum + tokens.length, 0)
    return { prompt_tokens: prompt, completion_tokens: made, total_tokens: prompt + made }
  }

  #entry(token: number, logProb: number, top: readonly TokenLogProb[] = []): object {
    const of = ({ token, logProb }: TokenLogProb): object => {
      const { bytes } = this.#tokenizer.bytesOf(token)
      return {
        token: this.#asked.tokensAsIds ? `token_id:${token}` : new TextDecoder().decode(bytes),
        // JSON has no -Infinity.
        logprob: Math.max(logProb, -9999),
        bytes: [...bytes],
      }
    }
    return { ...of({ token, logProb }), top_logprobs: top.map(of) }
  }
}

function send(response: ServerResponse, status: number, body: object): void {
  response.writeHead(status, { 'content-type': 'application/json; charset=utf-8' })
  response.end(JSON.stringify(body))
}

function fail(response: ServerResponse, error: unknown): void {
  const { status, body } = errorOf(error)
  if (response.headersSent) return void response.destroy()
  if (status === 401) response.setHeader('www-authenticate', 'Bearer')
  if (status === 503) response.setHeader('retry-after', '1')
  // What is left of a body that was not read would be taken for the next request.
  response.setHeader('connection', 'close')
  send(response, status, body)
}

/** The client's mistakes are 4xx; a cache that is full may have room later. */
function errorOf(error: unknown): { status: number; body: object } {
  const message = error instanceof Error ? error.message : String(error)
  const code = error instanceof P2RError ? error.code : undefined
  let status = 500
  if (error instanceof RequestError) status = error.status
  else if (code === 'ERR_VALUE' || code === 'ERR_SHAPE' || code === 'ERR_FORMAT') status = 400
  else if (code === 'ERR_MEMORY') status = 503
  const type = status < 500 ? 'invalid_request_error' : 'server_error'
  return { status, body: { error: { message, type, param: null, code: code ?? status } } }
}
