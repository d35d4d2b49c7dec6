// Requests of the OpenAI chat API as what a model generates from.
import { describeValue, isJsonObject } from '../arguments.js'
import type { SamplingOptions } from '../models/qwen3_vl/generate.js'
import type { ChatMessage, ChatPart } from '../models/qwen3_vl/tokens.js'
import { toolText } from './tool_texts.js'

/** An answer that is an error of the client's. */
export class RequestError extends Error {
  readonly status: number
  constructor(status: number, message: string) {
    super(message)
    this.status = status
  }
}

/** A request of /v1/chat/completions. */
export interface ChatCompletionRequest {
  model: string | undefined
  messages: ChatMessage[]
  /** The encoded files of the images, in their order. */
  images: Uint8Array[]
  n: number
  maxTokens: number | undefined
  sampling: SamplingOptions
  seed: number | undefined
  stop: string[]
  ignoreEos: boolean
  stream: boolean
  usage: boolean
  logProbs: boolean
  topLogProbs: number
  /** Whether calls of tools are read from the text. */
  toolCalls: boolean
  tokenIds: boolean
  /** Whether a token's text is 'token_id:7' among the log-probabilities. */
  tokensAsIds: boolean
  template: Record<string, unknown>
}

/** Fields that change an answer and that this server does not have: an error, unless they are off. */
const unsupported = [
  'audio',
  'bad_words',
  'best_of',
  'echo',
  'function_call',
  'functions',
  'guided_choice',
  'guided_grammar',
  'guided_json',
  'guided_regex',
  'min_tokens',
  'modalities',
  'prompt_logprobs',
  'structured_outputs',
  'use_beam_search',
]

type Json = Record<string, unknown>

const bad = (message: string): never => {
  throw new RequestError(400, message)
}

export function readRequest(
  json: unknown,
  limits: { maxChoices: number; maxImages: number },
): ChatCompletionRequest {
  if (!isJsonObject(json)) return bad(`the body must be an object, got ${describeValue(json)}`)
  for (const field of unsupported) if (isOn(json[field])) bad(`${field} is not supported`)
  const { response_format: format } = json
  if (isJsonObject(format) && format.type !== 'text')
    bad(`response_format ${describeValue(format.type)} is not supported`)
  const flag = (name: string, from: Json = json): boolean => {
    const value = from[name] ?? false
    return typeof value === 'boolean' ? value : bad(`${name} must be true or false`)
  }
  const number = (name: string, valid: (value: number) => boolean): number | undefined => {
    const value = json[name] ?? undefined
    if (value === undefined) return undefined
    if (typeof value !== 'number' || !valid(value))
      return bad(`${name} has no meaning as ${describeValue(value)}`)
    return value
  }
  const whole = (name: string, least: number): number | undefined =>
    number(name, (value) => Number.isSafeInteger(value) && value >= least)
  const share = (value: number): boolean => value >= 0 && value <= 1
  const n = whole('n', 1) ?? 1
  if (n > limits.maxChoices) bad(`n must be at most ${limits.maxChoices}, got ${n}`)
  const topK = number('top_k', (value) => Number.isInteger(value) && value >= -1)
  const sampling = {
    temperature: number('temperature', (value) => value >= 0 && value <= 100),
    topP: number('top_p', (value) => value > 0 && value <= 1),
    topK: topK === undefined ? undefined : Math.max(0, topK),
    minP: number('min_p', share),
    repetitionPenalty: number('repetition_penalty', (value) => value > 0 && value <= 100),
    presencePenalty: number('presence_penalty', (value) => Math.abs(value) <= 2),
    frequencyPenalty: number('frequency_penalty', (value) => Math.abs(value) <= 2),
    logitBias: readBias(json.logit_bias),
  }
  const streamOptions = json.stream_options ?? {}
  if (!isJsonObject(streamOptions)) return bad('stream_options must be an object')
  const template = json.chat_template_kwargs ?? {}
  if (!isJsonObject(template)) return bad('chat_template_kwargs must be an object')
  const model = json.model ?? undefined
  if (model !== undefined && typeof model !== 'string') return bad('model must be a string')
  const logProbs = flag('logprobs')
  const topLogProbs = number('top_logprobs', (k) => Number.isInteger(k) && k >= 0 && k <= 20) ?? 0
  if (topLogProbs && !logProbs) bad('top_logprobs needs logprobs')
  const tools = readTools(json.tools)
  return {
    model,
    ...readMessages(json.messages, limits.maxImages),
    n,
    maxTokens: whole('max_completion_tokens', 1) ?? whole('max_tokens', 1),
    sampling: Object.fromEntries(
      Object.entries(sampling).filter(([, value]) => value !== undefined),
    ),
    seed: whole('seed', 0),
    stop: readStop(json.stop),
    ignoreEos: flag('ignore_eos'),
    stream: flag('stream'),
    usage: flag('include_usage', streamOptions),
    logProbs,
    topLogProbs,
    toolCalls: readsCalls(json.tool_choice, tools),
    tokenIds: flag('return_token_ids'),
    tokensAsIds: flag('return_tokens_as_token_ids'),
    template: { ...template, ...(tools.length && { tools }) },
  }
}

/** Tools as they are given, for the template. */
function readTools(value: unknown): unknown[] {
  const tools = value ?? []
  if (!Array.isArray(tools)) return bad('tools must be a list')
  tools.forEach((tool: unknown, i) => {
    const { function: given } = isJsonObject(tool) && tool.type === 'function' ? tool : {}
    if (!isJsonObject(given) || typeof given.name !== 'string')
      bad(`tools[${i}] must be of type 'function', with a function that has a name`)
  })
  return tools
}

/** What the model must call would have to be forced on it. */
function readsCalls(choice: unknown, tools: readonly unknown[]): boolean {
  if (choice === 'none') return false
  if (choice !== undefined && choice !== null && choice !== 'auto')
    bad(`tool_choice ${describeValue(choice)} is not supported; 'auto' and 'none' are`)
  return tools.length > 0
}

function readBias(value: unknown): Record<number, number> | undefined {
  if (value === undefined || value === null) return undefined
  if (!isJsonObject(value)) return bad('logit_bias must be an object')
  for (const [id, bias] of Object.entries(value))
    if (!/^\d+$/.test(id) || typeof bias !== 'number' || Math.abs(bias) > 100)
      bad(`logit_bias must have numbers from -100 to 100 by token ids, got ${id}: ${String(bias)}`)
  return value as Record<number, number>
}

function isOn(value: unknown): boolean {
  if (value === undefined || value === null || value === false || value === 0) return false
  if (value === 'none' || value === 'auto') return false
  if (Array.isArray(value)) return value.length > 0 && String(value) !== 'text'
  return !(isJsonObject(value) && Object.keys(value).length === 0)
}

function readStop(value: unknown): string[] {
  const list = value === undefined || value === null ? [] : [value].flat()
  if (list.length > 16 || !list.every((text) => typeof text === 'string' && text !== ''))
    return bad('stop must be a text, or at most 16')
  return list as string[]
}

const roles = new Map<unknown, ChatMessage['role']>([
  ['system', 'system'],
  ['developer', 'system'],
  ['user', 'user'],
  ['assistant', 'assistant'],
  ['tool', 'tool'],
])

function readMessages(
  value: unknown,
  maxImages: number,
): { messages: ChatMessage[]; images: Uint8Array[] } {
  if (!Array.isArray(value) || !value.length) return bad('messages must be a list, not empty')
  const images: Uint8Array[] = []
  const messages = value.map((message: unknown, i): ChatMessage => {
    const name = `messages[${i}]`
    if (!isJsonObject(message)) return bad(`${name} must be an object`)
    const role =
      roles.get(message.role) ?? bad(`${name}.role ${describeValue(message.role)} is not known`)
    const said = message.content ?? (message.tool_calls ? '' : message.content)
    const calls = message.tool_calls ? callsText(message.tool_calls, `${name}.tool_calls`) : ''
    const content = calls && typeof said === 'string' ? joinedText(said, calls) : said
    if (typeof content === 'string') return { role, content }
    if (!Array.isArray(content)) return bad(`${name}.content must be a text or a list of parts`)
    const parts = content.map((part: unknown, j): ChatPart => {
      if (typeof part === 'string') return { type: 'text', text: part }
      if (!isJsonObject(part)) return bad(`${name}.content[${j}] must be an object`)
      if (part.type === 'text' && typeof part.text === 'string')
        return { type: 'text', text: part.text }
      if (part.type !== 'image_url')
        return bad(`${name}.content[${j}] of type ${describeValue(part.type)} is not supported`)
      const url = isJsonObject(part.image_url) ? part.image_url.url : part.image_url
      images.push(readDataUrl(url, `${name}.content[${j}].image_url`))
      return { type: 'image' }
    })
    if (calls) parts.push({ type: 'text', text: joinedText('', calls) })
    return { role, content: parts }
  })
  if (images.length > maxImages)
    bad(`a request may have ${maxImages} images at most, got ${images.length}`)
  return { messages, images }
}

/** Calls of an earlier turn, as the model wrote them. */
function callsText(value: unknown, name: string): string {
  if (!Array.isArray(value)) return bad(`${name} must be a list`)
  const texts = value.map((call: unknown, i) => {
    const { function: given } = isJsonObject(call) ? call : {}
    if (!isJsonObject(given) || typeof given.name !== 'string') {
      return bad(`${name}[${i}] must have a function with a name`)
    }
    const { name: called, arguments: own = '{}' } = given
    return toolText({
      name: called,
      arguments: typeof own === 'string' ? own : JSON.stringify(own),
    })
  })
  return texts.join('\n')
}

function joinedText(said: string, calls: string): string {
  return said === '' ? calls : `${said}\n${calls}`
}

/** Nothing is fetched: a server that opens addresses for its clients opens those of its own network too. */
function readDataUrl(url: unknown, name: string): Uint8Array {
  const start =
    typeof url === 'string' ? /^data:image\/[\w.+-]+;base64,/i.exec(url)?.[0] : undefined
  if (start === undefined)
    return bad(`${name} must be a data URL (data:image/...;base64,...); nothing is fetched`)
  return Buffer.from((url as string).slice(start.length), 'base64')
}
