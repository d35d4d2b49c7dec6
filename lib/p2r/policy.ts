import { type AbortSignalLike, checkSignal } from '../abort.js'
import {
  checkArguments,
  checkArray,
  checkBoolean,
  checkFunction,
  checkNonNegative,
  checkObject,
  checkPositive,
  checkSamples,
  checkString,
  choice,
  describeValue,
  isObject,
  type Names,
} from '../arguments.js'
import { P2RError, refuse } from '../errors.js'
import { handleOf, type Tensor } from '../tensor.js'

const roles = ['perceiver', 'reasoner'] as const
/** The two parts of Perceive-to-Reason: one finds the evidence in an image, one answers from it. */
export type Role = (typeof roles)[number]

/** A function that a model may call. */
export interface Tool {
  /** By which the model calls it. */
  name: string
  /** What it does, for the model. */
  description: string
  /** The JSON Schema of its arguments, an object. */
  parameters: Readonly<Record<string, unknown>>
}

/** A model's call of a tool. */
export interface ToolCall {
  /** To which a result refers; absent for a call that the model wrote into its text. */
  id?: string
  /** The tool's name as the model wrote it; '' where it wrote none. */
  name: string
  /** The arguments as the model wrote them: JSON, if it is right. */
  arguments: string
}

/** What a call of a tool gave. */
export interface ToolResult {
  /** The call's id; absent for a call in the model's text, whose result is shown as a message of the user's. */
  id?: string
  /** What the model is told. */
  text: string
  /** What the model is shown before the text, u8 [height, width, 3] each. */
  images: readonly Tensor<'u8'>[]
}

/** An output of the model that called tools, and what the calls gave. */
export interface Turn {
  /** The output. */
  completion: Completion
  /** A result for each of its calls. */
  results: readonly ToolResult[]
}

/** One output of a policy. */
export interface Completion {
  /** The text, without the tokens that end it; '' where the policy declined. */
  text: string
  /** The ids of the text's tokens, where the policy gives them. Training needs them. */
  tokens?: readonly number[]
  /** The log-probability of each token when it was sampled, in nats; NaN where the policy gives none for a token. */
  logProbs?: readonly number[]
  /** The ids of the prompt's tokens, images included, where the policy gives them. */
  promptTokens?: readonly number[]
  /** Why the text ends: 'stop' where the model ended it, 'length' where `maxTokens` cut it off, or the server's word. */
  finishReason?: string
  /** What the model thought, where the server separates it from the text. */
  reasoning?: string
  /** The calls of tools, where the request has tools and the server reads calls. */
  toolCalls?: readonly ToolCall[]
  /**
   * [tokens]: 1 for the model's own tokens, 0 for those of tool results between its outputs, which are not trained on.
   * @default 1 each
   */
  mask?: readonly number[]
  /** The policy's reason for declining to answer. */
  refusal?: string
  /** Why this is no answer, where others of the same request are; its text is ''. */
  failure?: string
}

/** One call of a policy. */
export interface PolicyRequest {
  /** The role that the policy plays in this call. */
  role: Role
  /** The system prompt; '' for none. */
  system: string
  /** The user's prompt, which follows the images. */
  prompt: string
  /** u8 [height, width, 3] each. They are valid until the policy's promise settles. */
  images: readonly Tensor<'u8'>[]
  /** Tools that the model may call. Left out: none. */
  tools?: readonly Tool[]
  /**
   * Whether the model may call them in this turn; the prompt describes them either way.
   * @default 'auto'
   */
  toolChoice?: 'auto' | 'none'
  /** What follows the prompt in a conversation of several turns, in order. Left out: nothing. */
  turns?: readonly Turn[]
  /**
   * How many completions to sample.
   * @default 1
   */
  n?: number
  /** Of the sampling; 0 takes the most probable token. Left out: the policy's own. */
  temperature?: number
  /** The longest completion, in tokens. Left out: the policy's own. */
  maxTokens?: number
  /** Whether tokens and log-probabilities are wanted. Left out: the policy's own. */
  tokens?: boolean
  /** An abort rejects with the signal's reason. */
  signal?: AbortSignalLike
}

/**
 * A model that plays a role: served, in this process, or any object with such a method.
 *
 * `functionPolicy` makes one of a function, `OpenAIPolicy` of a served model.
 */
export interface Policy {
  /** Resolves to `request.n` completions. A rejection becomes a P2RError with it as its cause. */
  generate(request: PolicyRequest): Promise<Completion[]>
}

type Said = string | Completion | readonly (string | Completion)[]

/** What a function policy calls: one text or completion, repeated n times, or a list of n. */
export type PolicyFunction = (request: PolicyRequest) => Said | Promise<Said>

const requestNames: Names<PolicyRequest> = {
  role: true,
  system: true,
  prompt: true,
  images: true,
  tools: true,
  toolChoice: true,
  turns: true,
  n: true,
  temperature: true,
  maxTokens: true,
  tokens: true,
  signal: true,
}

/** @internal A request as the library's policies take it. */
export function checkRequest(request: PolicyRequest, op: string): PolicyRequest {
  request = checkArguments(request, requestNames, op)
  choice(request.role, roles, 'role', op)
  checkString(request.system, 'system', op)
  checkString(request.prompt, 'prompt', op)
  const images = checkArray(request.images, 'images', op, 'an array of Tensors')
  images.forEach((image, i) => {
    handleOf(image, `images[${i}]`, op)
  })
  checkSamples(request.n ?? 1, 'n', op)
  checkArray(request.tools ?? [], 'tools', op)
  choice(request.toolChoice ?? 'auto', ['auto', 'none'], 'toolChoice', op)
  for (const [i, turn] of checkArray(request.turns ?? [], 'turns', op).entries()) {
    const name = `turns[${i}]`
    checkString(checkObject(turn, name, op).completion?.text, `${name}.completion.text`, op)
    for (const result of checkArray(turn.results, `${name}.results`, op)) {
      checkString(checkObject(result, `${name}.results`, op).text, `${name}.results.text`, op)
      for (const image of checkArray(result.images, `${name}.results.images`, op))
        handleOf(image, `${name}.results.images`, op)
    }
  }
  checkSampling(request, op)
  if (request.tokens !== undefined) checkBoolean(request.tokens, 'tokens', op)
  checkSignal(request.signal, op)
  return { ...request, images }
}

/** @internal */
export function checkSampling(a: { temperature?: number; maxTokens?: number }, op: string): void {
  if (a.temperature !== undefined) checkNonNegative(a.temperature, 'temperature', op)
  if (a.maxTokens !== undefined) checkPositive(a.maxTokens, 'maxTokens', op)
}

/**
 * A policy that calls a function of the request. Sampling is up to the function.
 *
 * @param f called once a request; see PolicyFunction.
 * @throws P2RError ERR_VALUE for anything but a function. The policy rejects with ERR_POLICY if the function's result is
 *   no completion, or not as many as requested.
 * @example
 * ```js
 * import { functionPolicy } from 'p2r-kernels'
 *
 * const policy = functionPolicy(({ prompt }) => `You asked: ${prompt}`)
 * const [completion] = await policy.generate({
 *   role: 'reasoner',
 *   system: '',
 *   prompt: 'How many?',
 *   images: [],
 * })
 * console.log(completion.text) // You asked: How many?
 * ```
 */
export function functionPolicy(f: PolicyFunction): Policy {
  const op = 'functionPolicy'
  checkFunction(f, 'f', op)
  return {
    async generate(request) {
      const { n = 1, signal } = checkRequest(request, op)
      signal?.throwIfAborted()
      const made = await f(request)
      signal?.throwIfAborted()
      const list: readonly unknown[] = Array.isArray(made)
        ? made
        : Array.from({ length: n }, () => made)
      const completions = list.map((c) => (typeof c === 'string' ? { text: c } : c))
      return checkCompletions(completions, n, op)
    },
  }
}

/**
 * @internal Calls a policy: a list of n completions, or a P2RError with other errors as its cause. An
 * abort rejects with the signal's reason. All of the library's calls go through here.
 */
export async function ask(
  policy: Policy,
  request: PolicyRequest,
  op: string,
): Promise<Completion[]> {
  request.signal?.throwIfAborted()
  let made: Completion[]
  try {
    made = await policy.generate(request)
  } catch (cause) {
    if (request.signal?.aborted) throw request.signal.reason
    if (cause instanceof P2RError) throw cause
    refuse('ERR_POLICY', op, `the ${request.role} failed: ${messageOf(cause)}`, { cause })
  }
  request.signal?.throwIfAborted()
  return checkCompletions(made, request.n ?? 1, op)
}

/** @internal As ask, for one completion that must be an answer. */
export async function askOnce(
  policy: Policy,
  request: Omit<PolicyRequest, 'n'>,
  op: string,
): Promise<Completion> {
  const [completion] = await ask(policy, { ...request, n: 1 }, op)
  return answered(completion!, request.role, op)
}

/** @internal Whether the limit of tokens cut the completion off. */
export function isTruncated({ finishReason }: Completion): boolean {
  return finishReason === 'length'
}

/** @internal The completion, unless the policy declined or it is no answer. */
export function answered(completion: Completion, role: Role, op: string): Completion {
  if (completion.failure !== undefined)
    refuse('ERR_POLICY', op, `the ${role} gave no answer: ${completion.failure}`)
  if (completion.refusal !== undefined)
    refuse(
      'ERR_POLICY',
      op,
      `the ${role} refused to answer: ${completion.refusal || 'no reason given'}`,
    )
  return completion
}

function checkCompletions(made: unknown, n: number, op: string): Completion[] {
  if (!Array.isArray(made) || made.length !== n)
    refuse(
      'ERR_POLICY',
      op,
      `the policy must give ${n} completion${n === 1 ? '' : 's'}, got ${
        Array.isArray(made) ? made.length : describeValue(made)
      }`,
    )
  return (made as Completion[]).map((completion) => {
    if (typeof completion?.text !== 'string')
      refuse(
        'ERR_POLICY',
        op,
        `a completion must have a text, got ${describeValue(completion?.text ?? completion)}`,
      )
    const wrong = wrongIn(completion)
    // One that cannot be trained on must not take the others of its request with it.
    return wrong === undefined ? completion : { text: '', failure: `the policy gave ${wrong}` }
  })
}

/** The largest token id that an i32 holds. */
const largestToken = 2 ** 31 - 1

/** @internal Which field of a completion with a text is not as its type says; undefined where all are. */
export function wrongIn(completion: Completion): string | undefined {
  const { tokens, promptTokens, logProbs, mask, toolCalls } = completion
  for (const [name, ids] of Object.entries({ tokens, promptTokens }))
    if (ids !== undefined && !isListOf(ids, isToken))
      return `${name} that are no list of integers from 0 to ${largestToken}`
  if (logProbs !== undefined && !isListOf(logProbs, (x) => typeof x === 'number'))
    return 'logProbs that are no list of numbers'
  if (mask !== undefined && !isListOf(mask, (x) => x === 0 || x === 1))
    return 'a mask that is no list of 0 and 1'
  for (const name of ['finishReason', 'reasoning', 'refusal', 'failure'] as const)
    if (completion[name] !== undefined && typeof completion[name] !== 'string')
      return `a ${name} that is no string`
  if (toolCalls !== undefined && !isListOf(toolCalls, isCall))
    return 'toolCalls that are no list of names with arguments'
  return undefined
}

function isListOf(list: unknown, good: (item: unknown) => boolean): boolean {
  if (!Array.isArray(list) && !ArrayBuffer.isView(list)) return false
  const { length } = list as ArrayLike<unknown>
  if (typeof length !== 'number') return false // a DataView
  // Holes are undefined, which `every` would pass over.
  for (let i = 0; i < length; i++) if (!good((list as ArrayLike<unknown>)[i])) return false
  return true
}

function isToken(id: unknown): boolean {
  return Number.isInteger(id) && (id as number) >= 0 && (id as number) <= largestToken
}

function isCall(call: unknown): boolean {
  const { id, name, arguments: given } = (isObject(call) ? call : {}) as Partial<ToolCall>
  return (
    typeof name === 'string' &&
    typeof given === 'string' &&
    (id === undefined || typeof id === 'string')
  )
}

/** @internal A completion of a JSON file, which has null for NaN; what is wrong with it is given to `bad`. */
export function savedCompletion(value: unknown, bad: (why: string) => never): Completion {
  if (!isObject(value) || typeof (value as Completion).text !== 'string')
    return bad('a completion must have a text')
  const saved = { ...value } as Completion
  if (Array.isArray(saved.logProbs))
    (saved as { logProbs: unknown }).logProbs = saved.logProbs.map((x: unknown) => x ?? Number.NaN)
  const wrong = wrongIn(saved)
  return wrong === undefined ? saved : bad(`a completion has ${wrong}`)
}

/** @internal */
export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : describeValue(error)
}

/** @internal A policy given as an argument. */
export function checkPolicy(policy: unknown, name: string, op: string): Policy {
  if (typeof (policy as Policy | null | undefined)?.generate !== 'function')
    refuse('ERR_VALUE', op, `${name} must be a Policy, got ${describeValue(policy)}`)
  return policy as Policy
}
