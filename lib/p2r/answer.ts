import { type AbortSignalLike, checkSignal } from '../abort.js'
import { checkArguments, checkReceiver, checkString, type Names } from '../arguments.js'
import { imageSize, type Tensor } from '../tensor.js'
import type { Evidence } from './evidence.js'
import { checkPerceiver, type Perceiver } from './perceiver.js'
import { type Completion, isTruncated, type Role } from './policy.js'
import { type AnswerForm, checkForm } from './prompts.js'
import { checkReasoner, type Reasoner } from './reasoner.js'

/** The arguments of answer. */
export interface AnswerArgs {
  /** Finds the evidence. */
  perceiver: Perceiver
  /** Answers from it. */
  reasoner: Reasoner
  /** u8 [height, width, 3]. It stays the caller's, and must outlive the answer's evidence. */
  image: Tensor<'u8'>
  /** The question, with its options, if it has any. */
  question: string
  /** How the reasoner is told to answer: by a letter ('mca'), a number ('na') or in words ('free_form'). */
  answerForm: AnswerForm
  /** An abort rejects with the signal's reason. */
  signal?: AbortSignalLike
}

/** An answer with its evidence, which is freed with it. */
export interface Answer extends Disposable {
  /** The answer that the reasoner's output contains; see extractAnswer. */
  readonly answer: string
  /** What the reasoner was shown. */
  readonly evidence: Evidence
  /** The perceiver's output. */
  readonly perception: string
  /** The reasoner's output. */
  readonly reasoning: string
  /** The roles whose output the limit of tokens cut off, so that the answer may be missing or another. */
  readonly truncated: readonly Role[]
  /** Frees the evidence. A second call does nothing. */
  dispose(): void
}

const names: Names<AnswerArgs> = {
  perceiver: true,
  reasoner: true,
  image: true,
  question: true,
  answerForm: true,
  signal: true,
}

/**
 * Perceives, then reasons: one answer to a question about an image, with its evidence.
 *
 * A failure frees what was allocated. Source: Perceive-to-Reason, evaluation/p2r_utils.py.
 *
 * @throws P2RError ERR_VALUE, ERR_SHAPE and ERR_DTYPE for wrong arguments; ERR_POLICY if a policy fails or declines.
 * @example
 * ```js
 * import { answer, functionPolicy, openDevice, Perceiver, Reasoner } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const image = device.zeros([480, 640, 3], 'u8')
 * const made = await answer({
 *   perceiver: new Perceiver(functionPolicy(() => '[{"bbox_2d": [400, 300, 600, 500], "label": "sign"}]')),
 *   reasoner: new Reasoner(functionPolicy(() => '<think>A sign.</think><answer>B</answer>')),
 *   image,
 *   question: 'What is shown?\nA. a tree\nB. a sign',
 *   answerForm: 'mca',
 * })
 * console.log(made.answer, made.evidence.crops.length) // B 1
 * made.dispose()
 * device.dispose()
 * ```
 */
export async function answer(a: AnswerArgs): Promise<Answer> {
  const op = 'answer'
  checkArguments(a, names, op)
  const perceiver = checkPerceiver(a.perceiver, op)
  const reasoner = checkReasoner(a.reasoner, op)
  imageSize(a.image, op)
  const question = checkString(a.question, 'question', op)
  const answerForm = checkForm(a.answerForm, 'answerForm', op)
  const signal = checkSignal(a.signal, op) && { signal: a.signal! }
  const [perceived] = await perceiver.perceive({ image: a.image, question, ...signal })
  const { completion, evidence } = perceived!
  try {
    const [reasoned] = await reasoner.reason({ evidence, question, answerForm, ...signal })
    const outputs = { perceiver: completion, reasoner: reasoned!.completion }
    return new EvidencedAnswer(reasoned!.answer, evidence, outputs)
  } catch (error) {
    evidence.dispose()
    throw error
  }
}

class EvidencedAnswer implements Answer {
  readonly answer: string
  readonly evidence: Evidence
  readonly perception: string
  readonly reasoning: string
  readonly truncated: readonly Role[]

  constructor(answer: string, evidence: Evidence, outputs: Record<Role, Completion>) {
    this.answer = answer
    this.evidence = evidence
    this.perception = outputs.perceiver.text
    this.reasoning = outputs.reasoner.text
    this.truncated = (['perceiver', 'reasoner'] as const).filter((role) =>
      isTruncated(outputs[role]),
    )
  }

  dispose(): void {
    checkReceiver(this instanceof EvidencedAnswer, 'Answer', 'dispose')
    this.evidence.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}
