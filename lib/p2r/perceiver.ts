import type { AbortSignalLike } from '../abort.js'
import { checkString } from '../arguments.js'
import type { Tensor } from '../tensor.js'
import { parseBoxes } from './boxes.js'
import { collectEvidence, type Evidence, type EvidenceSizes } from './evidence.js'
import { answered, ask, type Completion, checkPolicy, type Policy } from './policy.js'
import { type PromptOverrides, type Prompts, perceivePrompt, promptsOf } from './prompts.js'

export interface PerceiverOptions extends EvidenceSizes {
  /** Crops at most: 3 unless given. */
  maxEvidence?: number
  /** As in collectEvidence. */
  padding?: readonly [number, number]
  /** 0 for one rollout, 1 for several, unless given. */
  temperature?: number
  /** 1024 unless given. */
  maxTokens?: number
  prompts?: PromptOverrides
}

/**
 * Asks a policy where the evidence is. The image that the policy sees is reduced to maxPixels if given;
 * the evidence is cropped from the full image.
 */
export class Perceiver {
  readonly #policy: Policy
  readonly #options: PerceiverOptions
  readonly #prompts: Prompts

  constructor(policy: Policy, options: PerceiverOptions = {}) {
    this.#policy = checkPolicy(policy, 'policy', 'Perceiver')
    this.#options = options
    this.#prompts = promptsOf(options.prompts, 'Perceiver')
  }

  /**
   * n rollouts, 1 unless given: each the completion and the evidence of its boxes, which the caller
   * disposes.
   *
   * @throws ERR_POLICY when the policy fails, or declines the only rollout. Of several that it
   *   declines, each has a `refusal` and evidence without boxes.
   */
  async perceive(a: {
    image: Tensor
    question: string
    n?: number
    signal?: AbortSignalLike
  }): Promise<{ completion: Completion; evidence: Evidence }[]> {
    const op = 'perceive'
    const { image, question, n = 1, signal } = a
    const text = checkString(question, 'question', op)
    const { temperature = n > 1 ? 1 : 0, maxTokens = 1024, prompts: _, ...options } = this.#options
    const seen = collectEvidence({ ...options, image, boxes: [] })
    let completions: Completion[]
    try {
      completions = await ask(
        this.#policy,
        {
          role: 'perceiver',
          system: this.#prompts.system,
          prompt: perceivePrompt(this.#prompts, text),
          images: [seen.annotated],
          n,
          temperature,
          maxTokens,
          ...(signal && { signal }),
        },
        op,
      )
    } finally {
      seen.dispose()
    }
    if (n === 1) answered(completions[0]!, 'perceiver', op)
    return completions.map((completion) => ({
      completion,
      evidence: collectEvidence({ ...options, image, boxes: parseBoxes(completion.text) }),
    }))
  }
}
