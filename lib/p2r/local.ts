import {
  checkArguments,
  checkInteger,
  checkPositive,
  checkReceiver,
  describeValue,
  isObject,
  type Names,
} from '../arguments.js'
import { refuse } from '../errors.js'
import { chatPrompt, type KnownTokens } from '../models/qwen3_vl/chat.js'
import {
  checkSamplingOptions,
  type SamplingOptions,
  samplingNames,
} from '../models/qwen3_vl/generate.js'
import { Qwen3VL } from '../models/qwen3_vl/model.js'
import { contentSeed } from '../models/qwen3_vl/scheduler.js'
import type { ChatMessage, ChatPart, Qwen3VLTokenizer } from '../models/qwen3_vl/tokens.js'
import type { Tensor } from '../tensor.js'
import { type Completion, checkRequest, type Policy, type PolicyRequest } from './policy.js'

/** Options of LocalPolicy. */
export interface LocalPolicyOptions {
  /**
   * In place of the checkpoint's tokenizer.json: its parsed content, or a `Tokenizer` of @huggingface/tokenizers.
   * @default the checkpoint's
   */
  tokenizer?: unknown
  /**
   * The longest completion, in tokens, of requests that do not say; never beyond the model's context.
   * @default 2048
   */
  maxTokens?: number
  /**
   * How all requests are sampled; a request's own temperature is used in place of this one's.
   * @default the checkpoint's sampling for requests without a temperature, none of the filters for those with one
   */
  sampling?: SamplingOptions
  /**
   * Of all random numbers, with the request's content and how often it was asked: an integer from 0 to 2^53 - 1.
   * @default 0
   */
  seed?: number
}

const optionNames: Names<LocalPolicyOptions> = {
  tokenizer: true,
  maxTokens: true,
  sampling: true,
  seed: true,
}
const op = 'LocalPolicy'

/**
 * A model in this process as a policy of both roles. Requests that wait at once are computed together, and a request's
 * `n` completions share the computation of its prompt; what else is computed changes none of them.
 *
 * Images stand before the prompt, resized as the checkpoint's processor does. Tools are described as the checkpoint's
 * template does, and calls stay in the text. Turns whose completions have tokens and prompt tokens stay exactly these,
 * so that a conversation of several turns is one sequence of tokens, as it was sampled. A request with a temperature is sampled
 * from the whole distribution at it, as training needs it; one without, as the checkpoint's generation_config.json says.
 * Log-probabilities are those of the whole distribution at that temperature, and bit for bit those of the model's
 * `logProbs` on the CPU.
 *
 * @example
 * ```js
 * import { LocalPolicy, openDevice, Perceiver, Qwen3VL } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const model = await Qwen3VL.load('Qwen3-VL-2B-Instruct', device) // a checkpoint's folder
 * const policy = new LocalPolicy(model)
 * const perceiver = new Perceiver(policy) // and a Reasoner
 * const [completion] = await policy.generate({
 *   role: 'reasoner',
 *   system: '',
 *   prompt: 'How many?',
 *   images: [],
 *   maxTokens: 4,
 * })
 * console.log(completion?.tokens?.length, completion?.finishReason)
 * device.dispose()
 * ```
 */
export class LocalPolicy implements Policy {
  readonly #model: Qwen3VL
  readonly #options: LocalPolicyOptions
  #tokenizer: Promise<Qwen3VLTokenizer> | undefined
  #forbidden: Readonly<Record<number, number>> | undefined
  /** How often each prompt was asked, so that another time gives other samples. */
  readonly #asked = new Map<string, number>()

  /** @throws P2RError ERR_VALUE for anything but a model, and for options. */
  constructor(model: Qwen3VL, options: LocalPolicyOptions = {}) {
    if (!(model instanceof Qwen3VL))
      refuse('ERR_VALUE', op, `model must be a Qwen3VL, got ${describeValue(model)}`)
    options = checkArguments(options, optionNames, op, 'options')
    if (options.maxTokens !== undefined) checkPositive(options.maxTokens, 'maxTokens', op)
    if (options.sampling !== undefined) {
      checkArguments(options.sampling, samplingNames, op, 'sampling')
      checkSamplingOptions(options.sampling, op)
    }
    if (options.seed !== undefined) checkInteger(options.seed, 0, 'seed', op)
    this.#model = model
    this.#options = { ...options }
  }

  /**
   * Resolves to `request.n` completions, with tokens, log-probabilities and the prompt's tokens unless
   * `request.tokens` is false.
   *
   * @throws P2RError as `Qwen3VL.generate` and `Qwen3VL.tokenizer`. An abort rejects with the signal's reason.
   */
  async generate(request: PolicyRequest): Promise<Completion[]> {
    checkReceiver(isObject(this) && #model in this, 'LocalPolicy', op)
    const { n = 1, temperature, signal, tokens = true } = checkRequest(request, op)
    signal?.throwIfAborted()
    const model = this.#model
    this.#tokenizer ??= model.tokenizer(this.#options.tokenizer)
    const tokenizer = await this.#tokenizer
    // The model knows what its own tokenizer has no token for, but not what another one has none for.
    if (this.#options.tokenizer !== undefined)
      this.#forbidden ??= Object.fromEntries(
        tokenizer.unknownIds(model.config.vocabSize).map((id) => [id, Number.NEGATIVE_INFINITY]),
      )
    using asked = chatPrompt(model, tokenizer, conversationOf(request), op)
    const room = model.config.maxPositions - asked.tokens.length
    if (room < 1)
      refuse(
        'ERR_VALUE',
        op,
        `the prompt has ${asked.tokens.length} tokens, which leaves no room in the model's context of ${model.config.maxPositions}`,
      )
    const { stopTokens, ...authors } = model.sampling
    const sampling: SamplingOptions =
      this.#options.sampling ?? (temperature === undefined ? authors : {})
    const maxTokens = request.maxTokens ?? this.#options.maxTokens ?? 2048
    const [made] = await model.generate({
      prompts: [{ tokens: asked.tokens, ...(asked.images && { images: asked.images }) }],
      n,
      maxTokens: Math.min(maxTokens, room),
      ...sampling,
      ...(temperature !== undefined && { temperature }),
      ...(this.#forbidden && { logitBias: { ...sampling.logitBias, ...this.#forbidden } }),
      seed: this.#seed(asked.tokens),
      stopTokens,
      logProbs: tokens,
      ...(signal && { signal }),
    })
    return made!.map(({ tokens: ids, logProbs, finishReason }) => {
      const ended = finishReason === 'stop' && stopTokens.includes(ids.at(-1)!)
      return {
        text: tokenizer.decode(ended ? ids.slice(0, -1) : ids),
        finishReason,
        ...(tokens && { tokens: ids, logProbs, promptTokens: asked.tokens }),
      }
    })
  }

  #seed(tokens: readonly number[]): number {
    const content = contentSeed(0, Int32Array.from(tokens), 0).join()
    const times = this.#asked.get(content) ?? 0
    this.#asked.set(content, times + 1)
    return ((this.#options.seed ?? 0) + times) % Number.MAX_SAFE_INTEGER
  }
}

/** A request as the messages of a conversation, with the images of all of them. */
function conversationOf(request: PolicyRequest): {
  messages: ChatMessage[]
  images: Tensor<'u8'>[]
  template: Record<string, unknown>
  known: KnownTokens | undefined
} {
  const images: Tensor<'u8'>[] = []
  const shown = (text: string, own: readonly Tensor<'u8'>[]): ChatPart[] => {
    images.push(...own)
    return [...own.map(() => ({ type: 'image' as const })), { type: 'text', text }]
  }
  const { system, prompt, tools = [], turns = [] } = request
  const messages: ChatMessage[] = []
  if (system !== '') messages.push({ role: 'system', content: system })
  messages.push({ role: 'user', content: shown(prompt, request.images) })
  let known: KnownTokens | undefined
  for (const { completion, results } of turns) {
    const { text, tokens, promptTokens } = completion
    if (tokens?.length && promptTokens?.length)
      known = {
        tokens: [...promptTokens, ...tokens],
        message: messages.length,
        images: images.length,
      }
    messages.push({ role: 'assistant', content: text })
    for (const { text, images: own } of results)
      messages.push({ role: 'tool', content: shown(text, own) })
  }
  const described = tools.map((tool) => ({ type: 'function', function: tool }))
  return { messages, images, known, template: described.length ? { tools: described } : {} }
}
