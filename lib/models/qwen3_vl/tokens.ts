/**
 * Text and tokens of Qwen3-VL: the checkpoint's own byte-level BPE (tokenizer.json), its chat template, and where
 * images and videos stand among the tokens.
 *
 * The template and what people typed become one text before they become tokens, so a question that contains
 * '<|im_end|>' could end its turn. Each control token in a message's text is therefore cut in two by a mark that no
 * text has, and the pieces between the marks are encoded one by one. Text without control tokens is encoded as
 * Hugging Face does it, in one piece with the template around it.
 */
import { join } from 'node:path'
import {
  checkArguments,
  checkArray,
  checkReceiver,
  checkString,
  choice,
  describeValue,
  hostInts,
  isJsonObject,
  isObject,
  type Names,
} from '../../arguments.js'
import { ifThere, readJson, readText } from '../../checkpoint.js'
import { refuse } from '../../errors.js'
import type { Ints } from '../../tensor.js'
import type { Qwen3VLConfig } from './config.js'

/** A part of a message: a text, or where an image or a video stands. */
export type ChatPart =
  | { readonly type: 'text'; readonly text: string }
  | { readonly type: 'image' | 'video' }

/** One turn of a conversation. */
export interface ChatMessage {
  /** Who speaks. */
  role: 'system' | 'user' | 'assistant' | 'tool'
  /** What is said: a text, or parts in their order. */
  content: string | readonly ChatPart[]
}

/** A video among the tokens. */
export interface ChatVideo {
  /** For each pair of frames, the time in seconds that is written before it. */
  seconds: readonly number[]
  /** Merged patches of a pair of frames. */
  tokens: number
}

/** What stands in the places of a conversation, and how its template is filled in. */
export interface ChatOptions {
  /**
   * The merged patches of each image, in the order of the parts.
   * @default none
   */
  images?: readonly number[]
  /**
   * The videos, in the order of the parts.
   * @default none
   */
  videos?: readonly ChatVideo[]
  /**
   * Whether the assistant's turn is opened, for the model to answer.
   * @default true
   */
  prompt?: boolean
  /**
   * Further variables of the template, such as `tools`.
   * @default none
   */
  template?: Readonly<Record<string, unknown>>
}

/** The methods of a `Tokenizer` of @huggingface/tokenizers that are used. */
export interface TokenizerLike {
  /** The ids of a text, in which added tokens are found. */
  encode(text: string, options?: { add_special_tokens?: boolean }): { ids: number[] }
  /** A token's text in the printable alphabet of byte-level BPE. */
  id_to_token(id: number): string | undefined
  /** A token's id. */
  token_to_id(token: string): number | undefined
  /** The added tokens by their ids. */
  get_added_tokens_decoder(): Map<number, { content: string; special: boolean }>
}

const optionNames: Names<ChatOptions> = {
  images: true,
  videos: true,
  prompt: true,
  template: true,
}
const roles = ['system', 'user', 'assistant', 'tool'] as const
const op = 'Qwen3VLTokenizer'
const construct = Symbol('construct')
const names = {
  imStart: '<|im_start|>',
  imEnd: '<|im_end|>',
  visionStart: '<|vision_start|>',
  visionEnd: '<|vision_end|>',
  image: '<|image_pad|>',
  video: '<|video_pad|>',
} as const

/**
 * The tokenizer and chat template of a Qwen3-VL checkpoint. Needs the optional peer dependencies
 * `@huggingface/tokenizers` and, where the folder has a template, `@huggingface/jinja`.
 *
 * @example
 * ```js
 * import { openDevice, Qwen3VL } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const model = await Qwen3VL.load('Qwen3-VL-2B-Instruct', device) // a checkpoint's folder
 * const tokenizer = await model.tokenizer()
 * const tokens = tokenizer.encode('What does the sign say?')
 * console.log(tokenizer.decode(tokens)) // What does the sign say?
 * device.dispose()
 * ```
 */
export class Qwen3VLTokenizer {
  readonly #tokenizer: TokenizerLike
  readonly #added: ReadonlyMap<number, { content: string; special: boolean }>
  readonly #render: (messages: readonly ChatMessage[], options: ChatOptions) => string
  /** The control tokens, and among them those that are special. */
  readonly #control: RegExp
  readonly #special: RegExp

  /** @internal Tokenizers are made by `Qwen3VL.tokenizer`. */
  constructor(key: typeof construct, tokenizer: TokenizerLike, render: Template | undefined) {
    if (key !== construct)
      refuse('ERR_VALUE', op, 'a Qwen3VLTokenizer is made by Qwen3VL.tokenizer()')
    this.#tokenizer = tokenizer
    this.#added = tokenizer.get_added_tokens_decoder()
    const added = [...this.#added.values()]
    this.#control = anyOf(added.map(({ content }) => content))
    this.#special = anyOf(added.filter(({ special }) => special).map(({ content }) => content))
    this.#render = render ?? instructTemplate
  }

  /**
   * The tokens of a text. Control tokens that it spells out, such as '<|im_end|>', are encoded as text.
   *
   * @throws P2RError ERR_VALUE for anything but a string.
   */
  encode(text: string): number[] {
    checkReceiver(isObject(this) && #added in this, op, 'encode')
    checkString(text, 'text', op)
    const mark = markFor([text])
    return this.#encodePieces(cut(text, this.#control, mark), mark)
  }

  /**
   * The tokens of a conversation in the checkpoint's chat template, or, without one, in that of Qwen3-VL-Instruct.
   * An image stands as one placeholder a merged patch, a video as its frames, each after its time.
   *
   * @throws P2RError ERR_VALUE for messages that are none, and where images and videos are not as many as their parts.
   */
  encodeChat(messages: readonly ChatMessage[], options: ChatOptions = {}): number[] {
    checkReceiver(isObject(this) && #added in this, op, 'encodeChat')
    checkMessages(messages)
    options = checkArguments(options, optionNames, op, 'options')
    const { images = [], videos = [] } = options
    const { text, mark } = this.#rendered(messages, options)
    return this.#expand(this.#encodePieces(text, mark), images, videos)
  }

  /**
   * @internal The tokens of a conversation after what one of its turns says, whose own tokens are known. The options
   * have the images and videos of later messages alone. Undefined where the template does not show the turn.
   */
  encodeAfter(
    messages: readonly ChatMessage[],
    turn: number,
    options: ChatOptions,
  ): number[] | undefined {
    checkReceiver(isObject(this) && #added in this, op, 'encodeAfter')
    const { images = [], videos = [] } = options
    // It is cut out of the text again, with what is before it.
    let said = '\u{e002}'
    while (JSON.stringify(messages).includes(said)) said += '\u{e003}'
    const shown = messages.map((message, i) =>
      i === turn ? { ...message, content: said } : message,
    )
    const { text, mark } = this.#rendered(shown, options)
    const at = text.indexOf(said)
    if (at < 0) return undefined
    return this.#expand(this.#encodePieces(text.slice(at + said.length), mark), images, videos)
  }

  /** The template's text, and the mark that cuts the control tokens in what people typed. */
  #rendered(
    messages: readonly ChatMessage[],
    options: ChatOptions,
  ): { text: string; mark: string } {
    const { videos = [] } = options
    const texts = messages.flatMap(({ content }) =>
      typeof content === 'string'
        ? [content]
        : content.flatMap((part) => (part.type === 'text' ? [part.text] : [])),
    )
    const { template = {} } = options
    const mark = markFor([...texts, JSON.stringify(template)])
    const marked = messages.map((message) => this.#marked(message, mark))
    const variables = this.#markedValue(template, mark) as Record<string, unknown>
    let text = this.#render(marked, { ...options, template: variables })
    let video = 0
    text = text.replaceAll(names.visionStart + names.video + names.visionEnd, (whole) => {
      const frames = videos[video++]
      return frames ? frames.seconds.map((at) => `<${tenths(at)} seconds>${whole}`).join('') : whole
    })
    return { text, mark }
  }

  /** The text of tokens, without special ones; bytes that are no UTF-8 become U+FFFD. */
  decode(tokens: Ints): string {
    checkReceiver(isObject(this) && #added in this, op, 'decode')
    const stream = this.stream()
    let text = ''
    for (const token of hostInts(tokens, 'tokens', op)) text += stream.push(token)
    return text + stream.end()
  }

  /** @internal Decodes token by token; an incomplete character is held back until its last byte comes. */
  stream(): TextStream {
    checkReceiver(isObject(this) && #added in this, op, 'stream')
    return new TextStream((token) => this.bytesOf(token))
  }

  /** @internal The ids below a vocabulary's size that have no token. */
  unknownIds(vocabSize: number): number[] {
    checkReceiver(isObject(this) && #added in this, op, 'unknownIds')
    const all = Array.from({ length: vocabSize }, (_, id) => id)
    return all.filter((id) => !this.#added.has(id) && this.#tokenizer.id_to_token(id) === undefined)
  }

  /** @internal The bytes that a token stands for; of special ones, and of ids without a token, none. */
  bytesOf(token: number): { bytes: Uint8Array; added: boolean } {
    checkReceiver(isObject(this) && #added in this, op, 'bytesOf')
    const added = this.#added.get(token)
    if (added)
      return { bytes: added.special ? new Uint8Array() : utf8.encode(added.content), added: true }
    const text = this.#tokenizer.id_to_token(token) ?? ''
    return { bytes: Uint8Array.from(text, (c) => byteOf.get(c) ?? 63), added: false }
  }

  #marked({ role, content }: ChatMessage, mark: string): ChatMessage {
    // What the assistant said may hold thoughts and calls of tools, which are added tokens, but no turns.
    const control = role === 'assistant' ? this.#special : this.#control
    if (typeof content === 'string') return { role, content: cut(content, control, mark) }
    const parts = content.map((part, i): ChatPart => {
      if (part.type !== 'text') return { type: part.type }
      // Two texts side by side must not make a control token together.
      const end = content[i + 1]?.type === 'text' ? mark : ''
      return { type: 'text', text: cut(part.text, control, mark) + end }
    })
    return { role, content: parts }
  }

  /** What the template shows of its variables, such as descriptions of tools, is text too. */
  #markedValue(value: unknown, mark: string): unknown {
    if (typeof value === 'string') return cut(value, this.#control, mark)
    if (Array.isArray(value)) return value.map((one) => this.#markedValue(one, mark))
    if (!isJsonObject(value)) return value
    const entries = Object.entries(value).map(([key, one]) => [
      cut(key, this.#control, mark),
      this.#markedValue(one, mark),
    ])
    return Object.fromEntries(entries)
  }

  #encodePieces(text: string, mark: string): number[] {
    return text
      .split(mark)
      .filter((piece) => piece !== '')
      .flatMap((piece) => this.#tokenizer.encode(piece, { add_special_tokens: false }).ids)
  }

  /** One placeholder becomes as many as its image, or a frame of its video, has merged patches. */
  #expand(ids: number[], images: readonly number[], videos: readonly ChatVideo[]): number[] {
    const frames = videos.flatMap(({ seconds, tokens }) => seconds.map(() => tokens))
    const counts = new Map([
      [this.#tokenizer.token_to_id(names.image), { what: 'images', left: [...images] }],
      [this.#tokenizer.token_to_id(names.video), { what: 'frames of videos', left: frames }],
    ])
    const out: number[] = []
    for (const id of ids) {
      const kind = counts.get(id)
      const count = kind ? kind.left.shift() : 1
      if (count === undefined)
        refuse('ERR_VALUE', op, `the messages have more ${kind!.what} than were given`)
      for (let i = 0; i < count; i++) out.push(id)
    }
    for (const { what, left } of counts.values())
      if (left.length)
        refuse('ERR_VALUE', op, `the messages have ${left.length} ${what} fewer than were given`)
    return out
  }
}

/** The tokenizer of a folder, or one given in its place; of another model it is ERR_FORMAT. */
export async function tokenizerOf(
  folder: string,
  config: Qwen3VLConfig,
  given?: unknown,
): Promise<Qwen3VLTokenizer> {
  if (given instanceof Qwen3VLTokenizer) return given
  const path = join(folder, 'tokenizer.json')
  const tokenizer = isTokenizer(given)
    ? given
    : await load(given ?? (await readJson(path, op)), path)
  checkIds(tokenizer, config, given === undefined ? path : 'tokenizer')
  return new Qwen3VLTokenizer(construct, tokenizer, await templateOf(folder))
}

/**
 * The ids that a model never draws: placeholders, behind which only an image or a video can stand, and those that the
 * folder's tokenizer.json, where there is one, has no token for.
 */
export async function undrawnIds(folder: string, config: Qwen3VLConfig): Promise<number[]> {
  const { vocabSize, imageToken, videoToken } = config
  const json = await ifThere(readJson(join(folder, 'tokenizer.json'), op))
  const { model, added_tokens: added } = isJsonObject(json) ? json : {}
  if (!isJsonObject(model) || !isJsonObject(model.vocab)) return [imageToken, videoToken]
  const known = new Set<unknown>(Object.values(model.vocab))
  if (Array.isArray(added)) for (const token of added) known.add(token?.id)
  const all = Array.from({ length: vocabSize }, (_, id) => id)
  return all.filter((id) => id === imageToken || id === videoToken || !known.has(id))
}

/** The decoded text of tokens that come one by one. */
export class TextStream {
  readonly #bytesOf: (token: number) => { bytes: Uint8Array; added: boolean }
  #decoder = newDecoder()

  constructor(bytesOf: (token: number) => { bytes: Uint8Array; added: boolean }) {
    this.#bytesOf = bytesOf
  }

  /** The text that this token completes. */
  push(token: number): string {
    const { bytes, added } = this.#bytesOf(token)
    // An added token's text is no part of the bytes around it.
    const before = added ? this.end() : ''
    return before + this.#decoder.decode(bytes, { stream: true })
  }

  /** What was held back, as U+FFFD. */
  end(): string {
    const rest = this.#decoder.decode()
    this.#decoder = newDecoder()
    return rest
  }
}

const utf8 = new TextEncoder()
const newDecoder = (): InstanceType<typeof TextDecoder> =>
  new TextDecoder('utf-8', { ignoreBOM: true })

/**
 * The printable alphabet of byte-level BPE: a byte that prints stands for itself, the 68 others for the letters from
 * U+0100 on. Source: bytes_to_unicode of GPT-2.
 */
const byteOf: ReadonlyMap<string, number> = (() => {
  const prints = (byte: number): boolean =>
    (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad)
  const map = new Map<string, number>()
  let next = 0x100
  for (let byte = 0; byte < 256; byte++)
    map.set(String.fromCodePoint(prints(byte) ? byte : next++), byte)
  return map
})()

/** A text that no other one contains. */
function markFor(texts: readonly string[]): string {
  let mark = '\u{e000}'
  while (texts.some((text) => text.includes(mark))) mark += '\u{e001}'
  return mark
}

/** Cuts every control token in a text behind its first character, until there is none. */
function cut(text: string, control: RegExp, mark: string): string {
  const next = text.replaceAll(control, (token) => token[0] + mark + token.slice(1))
  return next === text ? text : cut(next, control, mark)
}

/** Matches any of the texts that can be cut, the longest first; nothing where there are none. */
function anyOf(texts: readonly string[]): RegExp {
  const sorted = texts.filter(({ length }) => length > 1).sort((a, b) => b.length - a.length)
  const escaped = sorted.map((text) => text.replaceAll(/[\\^$.*+?()[\]{}|]/g, '\\$&'))
  return new RegExp(escaped.length ? escaped.join('|') : '(?!)', 'g')
}

/** With one decimal as Python's '.1f': ties, which only quarters of a second are, go to even. */
export function tenths(seconds: number): string {
  const tie = Number.isInteger(seconds * 4) && !Number.isInteger(seconds * 2)
  if (!tie) return seconds.toFixed(1)
  const below = Math.floor(seconds * 10)
  return ((below % 2 === 0 ? below : below + 1) / 10).toFixed(1)
}

function checkMessages(messages: readonly ChatMessage[]): void {
  checkArray(messages, 'messages', op).forEach((message, i) => {
    if (!isJsonObject(message))
      refuse('ERR_VALUE', op, `messages[${i}] must be an object, got ${describeValue(message)}`)
    choice(message.role, roles, `messages[${i}].role`, op)
    if (typeof message.content === 'string') return
    const name = `messages[${i}].content`
    checkArray(message.content, name, op, 'a string or an array of parts').forEach((part, j) => {
      choice(part?.type, ['text', 'image', 'video'], `${name}[${j}].type`, op)
      if (part.type === 'text') checkString(part.text, `${name}[${j}].text`, op)
    })
  })
}

type Template = (messages: readonly ChatMessage[], options: ChatOptions) => string

/** What the template of Qwen3-VL-Instruct makes of a conversation without tools. */
const instructTemplate: Template = (messages, { prompt = true }) => {
  const part = (p: ChatPart): string =>
    p.type === 'text' ? p.text : names.visionStart + names[p.type] + names.visionEnd
  const turns = messages.map(({ role: speaker, content }) => {
    const said = typeof content === 'string' ? content : content.map(part).join('')
    // A tool's result is shown as the user's.
    const isTool = speaker === 'tool'
    const role = isTool ? 'user' : speaker
    const text = isTool ? `<tool_response>\n${said}\n</tool_response>` : said
    return `${names.imStart}${role}\n${text}${names.imEnd}\n`
  })
  return turns.join('') + (prompt ? `${names.imStart}assistant\n` : '')
}

/** The folder's chat template, in any of the files that Hugging Face has kept it in. */
async function templateOf(folder: string): Promise<Template | undefined> {
  const source =
    (await ifThere(readText(join(folder, 'chat_template.jinja'), op))) ??
    templateIn(await ifThere(readJson(join(folder, 'chat_template.json'), op))) ??
    templateIn(await ifThere(readJson(join(folder, 'tokenizer_config.json'), op)))
  if (source === undefined) return undefined
  // Bundlers let a missing package pass only where its import stands in a try block.
  let jinja: typeof import('@huggingface/jinja')
  try {
    jinja = await import('@huggingface/jinja')
  } catch (cause) {
    missing('@huggingface/jinja', cause)
  }
  let template: InstanceType<typeof jinja.Template>
  try {
    template = new jinja.Template(source)
  } catch (cause) {
    refuse('ERR_FORMAT', op, `${folder}: the chat template: ${(cause as Error).message}`, { cause })
  }
  return (messages, { prompt = true, template: variables = {} }) => {
    try {
      return template.render({ ...variables, messages, add_generation_prompt: prompt })
    } catch (cause) {
      const { message } = cause as Error
      refuse('ERR_VALUE', op, `the chat template refuses the messages: ${message}`, { cause })
    }
  }
}

function templateIn(json: unknown): string | undefined {
  const found = isJsonObject(json) ? json.chat_template : undefined
  if (typeof found === 'string') return found
  if (!Array.isArray(found)) return undefined
  const named = found.find((entry) => isJsonObject(entry) && entry.name === 'default')
  return typeof named?.template === 'string' ? named.template : undefined
}

async function load(json: unknown, path: string): Promise<TokenizerLike> {
  if (!isJsonObject(json) || !isJsonObject(json.model))
    refuse('ERR_FORMAT', op, `${path}: a tokenizer.json must hold an object with a model`)
  if (!/"type":"ByteLevel"/.test(JSON.stringify(json.decoder ?? null)))
    refuse('ERR_FORMAT', op, `${path}: the decoder must be ByteLevel, as that of Qwen3-VL`)
  let library: typeof import('@huggingface/tokenizers')
  try {
    library = await import('@huggingface/tokenizers')
  } catch (cause) {
    missing('@huggingface/tokenizers', cause)
  }
  try {
    return new library.Tokenizer(json, {})
  } catch (cause) {
    refuse('ERR_FORMAT', op, `${path}: ${(cause as Error).message}`, { cause })
  }
}

function isTokenizer(value: unknown): value is TokenizerLike {
  const methods = ['encode', 'id_to_token', 'token_to_id', 'get_added_tokens_decoder'] as const
  const given = value as Partial<TokenizerLike> | null | undefined
  return methods.every((method) => typeof given?.[method] === 'function')
}

/** The placeholders' ids are those of the model, and every id has a row of its embedding. */
function checkIds(tokenizer: TokenizerLike, config: Qwen3VLConfig, path: string): void {
  const other = (why: string): never =>
    refuse('ERR_FORMAT', op, `${path} is of another model: ${why}`)
  for (const [token, id] of [
    [names.image, config.imageToken],
    [names.video, config.videoToken],
    [names.visionStart, config.visionStartToken],
    [names.visionEnd, config.visionEndToken],
  ] as const) {
    const found = tokenizer.token_to_id(token)
    if (found !== id) other(`'${token}' must be ${id}, as in config.json, got ${found}`)
  }
  for (const [id, { content }] of tokenizer.get_added_tokens_decoder())
    if (id >= config.vocabSize)
      other(`'${content}' is ${id}, but the model has ${config.vocabSize} tokens`)
}

function missing(name: string, cause: unknown): never {
  refuse(
    'ERR_NATIVE',
    op,
    `the package \`${name}\`, an optional peer dependency, could not be loaded: install it with \`npm install ${name}\``,
    { cause },
  )
}
