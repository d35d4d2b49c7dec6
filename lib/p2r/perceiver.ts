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
import { imageSize, type Tensor } from '../tensor.js'
import { parseBoxes } from './boxes.js'
import {
  checkEvidenceOptions,
  collectEvidence,
  type Evidence,
  type EvidenceOptions,
  evidenceNames,
} from './evidence.js'
import {
  answered,
  ask,
  type Completion,
  checkPolicy,
  checkSampling,
  type Policy,
} from './policy.js'
import { type PromptOverrides, type Prompts, perceivePrompt, promptsOf } from './prompts.js'

import { type RewardRules, rulesOf } from './reward.js'

/** How a Perceiver asks and what it cuts out. */
export interface PerceiverOptions extends EvidenceOptions {
  /**
   * Of the sampling; 0 takes the most probable token.
   * @default 0 for one rollout, 1 for several
   */
  temperature?: number
  /**
   * The longest output, in tokens.
   * @default 1024
   */
  maxTokens?: number
  /**
   * Templates instead of the default prompts.
   * @default {}
   */
  prompts?: PromptOverrides
  /**
   * Of reading boxes in the output; see parseBoxes. (`rules` are those of resizing.)
   * @default 'reference'
   */
  boxRules?: RewardRules
}

/** The arguments of Perceiver's `perceive`. */
export interface PerceiveArgs {
  /** u8 [height, width, 3]. It stays the caller's, and must outlive the evidence. */
  image: Tensor<'u8'>
  /** What is asked about the image. */
  question: string
  /**
   * How many outputs to sample: 1 to 65 536.
   * @default 1
   */
  n?: number
  /** An abort rejects with the signal's reason. */
  signal?: AbortSignalLike
}

/** One output of a perceiver. */
export interface Perception {
  /** What the policy wrote. */
  completion: Completion
  /** The evidence of its boxes; none where it wrote none. The caller disposes it. */
  evidence: Evidence
}

const optionNames: Names<PerceiverOptions> = {
  ...evidenceNames,
  temperature: true,
  maxTokens: true,
  prompts: true,
  boxRules: true,
}
const argumentNames: Names<PerceiveArgs> = { image: true, question: true, n: true, signal: true }

/**
 * Asks a policy where in an image the evidence for a question is, and collects it.
 *
 * The image that the policy sees is reduced to maxPixels, if given; the evidence is cut from the full image.
 * Source: Perceive-to-Reason, evaluation/p2r_utils.py.
 *
 * @throws P2RError ERR_VALUE for a policy without `generate`, and for wrong options.
 * @example
 * ```js
 * import { functionPolicy, openDevice, Perceiver } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const image = device.zeros([480, 640, 3], 'u8')
 * const policy = functionPolicy(() => '[{"bbox_2d": [400, 300, 600, 500], "label": "sign"}]')
 * const [{ evidence }] = await new Perceiver(policy).perceive({ image, question: 'What is shown?' })
 * console.log(evidence.boxes[0].label, evidence.crops[0].shape) // sign [ 193, 256, 3 ]
 * evidence.dispose()
 * device.dispose()
 * ```
 */
export class Perceiver {
  readonly #policy: Policy
  readonly #options: PerceiverOptions
  readonly #prompts: Prompts

  constructor(policy: Policy, options: PerceiverOptions = {}) {
    const op = 'Perceiver'
    this.#policy = checkPolicy(policy, 'policy', op)
    options = checkArguments(options, optionNames, op)
    checkEvidenceOptions(options, op)
    checkSampling(options, op)
    rulesOf(options.boxRules, op, 'boxRules')
    this.#options = { ...options }
    this.#prompts = promptsOf(options.prompts, op)
  }

  /**
   * Samples n outputs, and collects the evidence of each.
   *
   * @throws P2RError ERR_VALUE, ERR_SHAPE and ERR_DTYPE for wrong arguments; ERR_POLICY when the policy fails, or
   *   declines the only rollout. Of several, each that is no answer has a `refusal` or a `failure`, and evidence without
   *   boxes.
   */
  async perceive(a: PerceiveArgs): Promise<Perception[]> {
    const op = 'perceive'
    checkReceiver(Perceiver.is(this), 'Perceiver', op)
    a = checkArguments(a, argumentNames, op)
    const { image, n = 1 } = a
    imageSize(image, op)
    const question = checkString(a.question, 'question', op)
    checkSamples(n, 'n', op)
    const signal = checkSignal(a.signal, op)
    const {
      temperature = n > 1 ? 1 : 0,
      maxTokens = 1024,
      prompts: _,
      boxRules: rules = 'reference',
      ...options
    } = this.#options
    const seen = collectEvidence({ ...options, image, boxes: [] })
    let completions: Completion[]
    try {
      completions = await ask(
        this.#policy,
        {
          role: 'perceiver',
          ...perceivePrompt({ question, prompts: this.#prompts }),
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
      evidence: collectEvidence({
        ...options,
        image,
        boxes: parseBoxes(completion.text, { rules }),
      }),
    }))
  }

  /** @internal */
  static is(value: unknown): value is Perceiver {
    return isObject(value) && #policy in value
  }
}

/** @internal The argument `perceiver`. */
export function checkPerceiver(value: unknown, op: string): Perceiver {
  if (!Perceiver.is(value))
    refuse('ERR_VALUE', op, `perceiver must be a Perceiver, got ${describeValue(value)}`)
  return value
}
