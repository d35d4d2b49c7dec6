import type { AbortSignalLike } from '../abort.js'
import { describeValue } from '../arguments.js'
import { P2RError, refuse } from '../errors.js'
import type { Tensor } from '../tensor.js'

export type Role = 'perceiver' | 'reasoner'

/** A policy's output. */
export interface Completion {
  text: string
  /** The ids of its tokens, where the policy gives them; training needs them. */
  tokens?: readonly number[]
  /** The log-probability of each token when it was sampled. */
  logProbs?: readonly number[]
  /** The policy's reason for declining to answer; `text` is '' then. */
  refusal?: string
}

export interface PolicyRequest {
  role: Role
  system: string
  prompt: string
  /** u8 [height, width, 3] each, before the prompt. A policy reads them before its promise settles. */
  images: readonly Tensor[]
  /** Completions wanted: 1 unless given. */
  n?: number
  temperature?: number
  maxTokens?: number
  /** Whether tokens and log-probabilities are wanted; the policy's own choice unless given. */
  tokens?: boolean
  /** An abort rejects with the signal's reason. */
  signal?: AbortSignalLike
}

/** A model in one of the roles: served, or in this process. */
export interface Policy {
  generate(request: PolicyRequest): Promise<Completion[]>
}

/**
 * A policy from a function of the request that returns one text or completion, which is repeated n
 * times, or a list of n. Sampling is up to the function.
 */
export function functionPolicy(
  f: (
    request: PolicyRequest,
  ) => string | Completion | readonly (string | Completion)[] | Promise<unknown>,
): Policy {
  if (typeof f !== 'function')
    refuse('ERR_VALUE', 'functionPolicy', `f must be a function, got ${describeValue(f)}`)
  return {
    async generate(request) {
      request.signal?.throwIfAborted()
      const made = await f(request)
      request.signal?.throwIfAborted()
      const list = Array.isArray(made)
        ? made
        : Array.from({ length: request.n ?? 1 }, () => made as string | Completion)
      const completions = list.map((c) => (typeof c === 'string' ? { text: c } : c))
      return checkCompletions(completions, request.n ?? 1, 'functionPolicy')
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

/** As ask, for one completion that must be an answer. */
export async function askOnce(
  policy: Policy,
  request: Omit<PolicyRequest, 'n'>,
  op: string,
): Promise<Completion> {
  const [completion] = await ask(policy, { ...request, n: 1 }, op)
  return answered(completion!, request.role, op)
}

/** The completion, unless the policy declined. */
export function answered(completion: Completion, role: Role, op: string): Completion {
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
  for (const completion of made as Completion[])
    if (typeof completion?.text !== 'string')
      refuse(
        'ERR_POLICY',
        op,
        `a completion must have a text, got ${describeValue(completion?.text ?? completion)}`,
      )
  return made as Completion[]
}

export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error)
}

/** @internal A policy given as an argument. */
export function checkPolicy(policy: unknown, name: string, op: string): Policy {
  if (typeof (policy as Policy | undefined)?.generate !== 'function')
    refuse('ERR_VALUE', op, `${name} must be a Policy, got ${describeValue(policy)}`)
  return policy as Policy
}
