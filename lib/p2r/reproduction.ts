import type { SamplingOptions } from '../models/qwen3_vl/generate.js'
import type { OpenAIPolicyOptions } from './openai.js'
import type { PerceiverOptions } from './perceiver.js'
import type { ReasonerOptions } from './reasoner.js'

/** Options of the parts of an evaluation; see reproductionSettings. */
export interface ReproductionSettings {
  /** Of the OpenAIPolicy of both roles: the images' encoding and the sampler's fields. */
  policy: Required<Pick<OpenAIPolicyOptions, 'imageFormat' | 'extraBody'>>
  /** Of a LocalPolicy in place of that: the sampler's fields. */
  sampling: Required<Pick<SamplingOptions, 'topP' | 'repetitionPenalty'>>
  /** Of the Perceiver. */
  perceiver: Required<
    Pick<PerceiverOptions, 'temperature' | 'maxTokens' | 'minPixels' | 'maxPixels'>
  >
  /** Of the Reasoner. */
  reasoner: Required<Pick<ReasonerOptions, 'temperature' | 'maxTokens'>>
}

/** One token of an image, 2 by 2 merged patches of the vision tower, in pixels. */
const patch = 32 * 32

/**
 * The settings of the reference's own evaluation: greedy, with a repetition penalty of 1.05, images of 16 to 4096
 * patches of 32 by 32 pixels as PNG, 256 tokens to perceive and 1024 to reason.
 *
 * `p2r-kernels evaluate --reproduction` uses them. The server must know `repetition_penalty`, as vLLM and SGLang do.
 * Source: Perceive-to-Reason, evaluation.
 *
 * @returns options to spread into those of each part. Never throws.
 *
 * @example
 * ```js
 * import { OpenAIPolicy, Perceiver, Reasoner, reproductionSettings } from 'p2r-kernels'
 *
 * const settings = reproductionSettings()
 * const policy = new OpenAIPolicy({
 *   baseURL: 'http://localhost:8000/v1',
 *   model: 'P2R-4B',
 *   ...settings.policy,
 * })
 * const perceiver = new Perceiver(policy, settings.perceiver)
 * const reasoner = new Reasoner(policy, settings.reasoner)
 * console.log(settings.policy.extraBody) // { top_p: 1, repetition_penalty: 1.05 }
 * ```
 */
export function reproductionSettings(): ReproductionSettings {
  return {
    sampling: { topP: 1, repetitionPenalty: 1.05 },
    policy: { imageFormat: 'png', extraBody: { top_p: 1, repetition_penalty: 1.05 } },
    perceiver: {
      temperature: 0,
      maxTokens: 256,
      minPixels: 16 * patch,
      maxPixels: 4096 * patch,
    },
    reasoner: { temperature: 0, maxTokens: 1024 },
  }
}
