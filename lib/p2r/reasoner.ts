import type { AbortSignalLike } from '../abort.js'
import { checkString } from '../arguments.js'
import type { Evidence } from './evidence.js'
import { answered, ask, type Completion, checkPolicy, type Policy } from './policy.js'
import {
  type AnswerForm,
  checkForm,
  type PromptOverrides,
  type Prompts,
  promptsOf,
  reasonPrompt,
} from './prompts.js'
import { extractAnswer, type RewardRules } from './reward.js'

export interface ReasonerOptions {
  /** 0 for one rollout, 1 for several, unless given. */
  temperature?: number
  /** 2048 unless given. */
  maxTokens?: number
  prompts?: PromptOverrides
  /** Of extractAnswer. */
  rules?: RewardRules
}

/** Asks a policy for the answer, showing it the evidence: the annotated image, then the crops. */
export class Reasoner {
  readonly #policy: Policy
  readonly #options: ReasonerOptions
  readonly #prompts: Prompts

  constructor(policy: Policy, options: ReasonerOptions = {}) {
    this.#policy = checkPolicy(policy, 'policy', 'Reasoner')
    this.#options = options
    this.#prompts = promptsOf(options.prompts, 'Reasoner')
  }

  /**
   * n answers, 1 unless given. The images computed for this belong to the evidence and are freed with
   * it.
   *
   * @throws ERR_POLICY when the policy fails, or declines the only rollout. Of several that it
   *   declines, each has a `refusal` and an empty answer.
   */
  async reason(a: {
    evidence: Evidence
    question: string
    answerForm: AnswerForm
    n?: number
    signal?: AbortSignalLike
  }): Promise<{ completion: Completion; answer: string }[]> {
    const op = 'reason'
    const { evidence, n = 1, signal } = a
    const question = checkString(a.question, 'question', op)
    const form = checkForm(a.answerForm, op)
    const { temperature = n > 1 ? 1 : 0, maxTokens = 2048, rules } = this.#options
    const { hasEvidence } = evidence
    const completions = await ask(
      this.#policy,
      {
        role: 'reasoner',
        system: this.#prompts.system,
        prompt: reasonPrompt(this.#prompts, { question, form, hasEvidence }),
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
}
