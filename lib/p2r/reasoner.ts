import { type AbortSignalLike, checkSignal } from '../abort.js'
import {
  checkArguments,
  checkReceiver,
  checkSamples,
  checkString,
  describeValue,
  isObject,
  type Names,
} from '../arguments.js'
import { refuse } from '../errors.js'
import { checkEvidence, type Evidence } from './evidence.js'
import {
  answered,
  ask,
  type Completion,
  checkPolicy,
  checkSampling,
  type Policy,
} from './policy.js'
import {
  type AnswerForm,
  checkForm,
  type PromptOverrides,
  type Prompts,
  promptsOf,
  reasonPrompt,
} from './prompts.js'
import { extractAnswer, type RewardRules, rulesOf } from './reward.js'

/** How a Reasoner asks and reads answers. */
export interface ReasonerOptions {
  /**
   * Of the sampling; 0 takes the most probable token.
   * @default 0 for one rollout, 1 for several
   */
  temperature?: number
  /**
   * The longest output, in tokens, thinking included.
   * @default 2048
   */
  maxTokens?: number
  /**
   * Templates instead of the default prompts.
   * @default {}
   */
  prompts?: PromptOverrides
  /**
   * Of finding the answer in the output; see extractAnswer.
   * @default 'reference'
   */
  rules?: RewardRules
}

/** The arguments of Reasoner's `reason`. */
export interface ReasonArgs {
  /** What the policy is shown: the annotated image, then the crops. */
  evidence: Evidence
  /** The question, with its options, if it has any. */
  question: string
  /** How the policy is told to answer: by a letter ('mca'), a number ('na') or in words ('free_form'). */
  answerForm: AnswerForm
  /**
   * How many outputs to sample: 1 to 65 536.
   * @default 1
   */
  n?: number
  /** An abort rejects with the signal's reason. */
  signal?: AbortSignalLike
}

/** One output of a reasoner. */
export interface Reasoning {
  /** What the policy wrote. */
  completion: Completion
  /** The answer in it; see extractAnswer. */
  answer: string
}

const optionNames: Names<ReasonerOptions> = {
  temperature: true,
  maxTokens: true,
  prompts: true,
  rules: true,
}
const argumentNames: Names<ReasonArgs> = {
  evidence: true,
  question: true,
  answerForm: true,
  n: true,
  signal: true,
}

/**
 * Asks a policy for the answer, showing it the evidence: the annotated image, then the crops.
 *
 * Source: Perceive-to-Reason, evaluation/p2r_utils.py.
 *
 * @throws P2RError ERR_VALUE for a policy without `generate`, and for wrong options.
 * @example
 * ```js
 * import { collectEvidence, functionPolicy, openDevice, Reasoner } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const image = device.zeros([480, 640, 3], 'u8')
 * const evidence = collectEvidence({ image, boxes: [{ bbox2d: [400, 300, 600, 500], label: 'sign' }] })
 * const policy = functionPolicy(({ images }) => `<answer>${images.length}</answer>`)
 * const [reasoned] = await new Reasoner(policy).reason({
 *   evidence,
 *   question: 'How many images are there?',
 *   answerForm: 'na',
 * })
 * console.log(reasoned.answer) // 2
 * evidence.dispose()
 * device.dispose()
 * ```
 */
export class Reasoner {
  readonly #policy: Policy
  readonly #options: ReasonerOptions
  readonly #prompts: Prompts

  constructor(policy: Policy, options: ReasonerOptions = {}) {
    const op = 'Reasoner'
    this.#policy = checkPolicy(policy, 'policy', op)
    options = checkArguments(options, optionNames, op)
    checkSampling(options, op)
    rulesOf(options.rules, op)
    this.#options = { ...options }
    this.#prompts = promptsOf(options.prompts, op)
  }

  /**
   * Samples n answers. The images computed for this belong to the evidence and are freed with it.
   *
   * @throws P2RError ERR_VALUE for wrong arguments; ERR_POLICY when the policy fails, or declines the only rollout. Of
   *   several, each that is no answer has a `refusal` or a `failure`, and an empty answer.
   */
  async reason(a: ReasonArgs): Promise<Reasoning[]> {
    const op = 'reason'
    checkReceiver(Reasoner.is(this), 'Reasoner', op)
    a = checkArguments(a, argumentNames, op)
    const { n = 1 } = a
    const evidence = checkEvidence(a.evidence, op)
    const question = checkString(a.question, 'question', op)
    const answerForm = checkForm(a.answerForm, 'answerForm', op)
    checkSamples(n, 'n', op)
    const signal = checkSignal(a.signal, op)
    const { temperature = n > 1 ? 1 : 0, maxTokens = 2048, rules } = this.#options
    const { hasEvidence } = evidence
    const completions = await ask(
      this.#policy,
      {
        role: 'reasoner',
        ...reasonPrompt({ question, answerForm, hasEvidence, prompts: this.#prompts }),
        images: [evidence.annotated, ...evidence.crops],
        n,
        temperature,
        maxTokens,
        ...(signal && { signal }),
      },
      op,
    )
    if (n === 1) answered(completions[0]!, 'reasoner', op)
    return completions.map((completion) => ({
      completion,
      answer: extractAnswer(completion.text, rules ? { rules } : {}),
    }))
  }

  /** @internal */
  static is(value: unknown): value is Reasoner {
    return isObject(value) && #policy in value
  }
}

/** @internal The argument `reasoner`. */
export function checkReasoner(value: unknown, op: string): Reasoner {
  if (!Reasoner.is(value))
    refuse('ERR_VALUE', op, `reasoner must be a Reasoner, got ${describeValue(value)}`)
  return value
}
