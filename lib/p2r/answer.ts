import { type AbortSignalLike, checkSignal } from '../abort.js'
import { checkArguments, checkReceiver, checkString, type Names } from '../arguments.js'
import { refuse } from '../errors.js'
import { imageSize, type Tensor } from '../tensor.js'
import type { Evidence } from './evidence.js'
import { checkPerceiver, type Perceiver } from './perceiver.js'
import { type Completion, isTruncated, type Role, type Turn } from './policy.js'
import { type AnswerForm, checkForm } from './prompts.js'
import { checkReasoner, type Reasoner } from './reasoner.js'
import { checkAgent, type ZoomAgent } from './zoom.js'

/** Who answers: a perceiver and a reasoner, one after the other, or an agent in several turns. */
export type Answerer =
  | {
      /** Finds the evidence. */
      perceiver: Perceiver
      /** Answers from it. */
      reasoner: Reasoner
      /** Excluded by perceiver and reasoner. */
      agent?: never
    }
  | {
      /** Looks at crops of its own choice, and answers. */
      agent: ZoomAgent
      /** Excluded by agent. */
      perceiver?: never
      /** Excluded by agent. */
      reasoner?: never
    }

/** What is asked, and how it is answered. */
export interface AnswerQuestion {
  /** u8 [height, width, 3]. It stays the caller's, and must outlive the answer's evidence. */
  image: Tensor<'u8'>
  /** The question, with its options, if it has any. */
  question: string
  /** How the reasoner is told to answer: by a letter ('mca'), a number ('na') or in words ('free_form'). */
  answerForm: AnswerForm
  /** An abort rejects with the signal's reason. */
  signal?: AbortSignalLike
}

/** The arguments of answer. */
export type AnswerArgs = Answerer & AnswerQuestion

/** An answer with its evidence, which is freed with it. */
export interface Answer extends Disposable {
  /** The answer that the reasoner's output contains; see extractAnswer. */
  readonly answer: string
  /** What the reasoner was shown; of an agent the regions that it cropped. */
  readonly evidence: Evidence
  /** The perceiver's output; '' of an agent. */
  readonly perception: string
  /** The reasoner's output, or the agent's last one. */
  readonly reasoning: string
  /** The outputs of an agent before its last one; none of a perceiver and a reasoner. */
  readonly turns: readonly Turn[]
  /** Requests that the answer took. */
  readonly requests: number
  /** Pixels of all images that were shown for it, each counted once in the request that first has it. */
  readonly pixels: number
  /** Whether an agent still called its tool in its last turn, so that there is no answer. */
  readonly outOfTurns: boolean
  /** The roles whose output the limit of tokens cut off, so that the answer may be missing or another. */
  readonly truncated: readonly Role[]
  /** Frees the evidence. A second call does nothing. */
  dispose(): void
}

const names: Names<AnswerArgs> = {
  perceiver: true,
  reasoner: true,
  agent: true,
  image: true,
  question: true,
  answerForm: true,
  signal: true,
}

/**
 * One answer to a question about an image, with its evidence: perceives, then reasons; or by an agent, in several turns.
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
  a = checkArguments(a, names, op)
  const { perceiver, reasoner, agent } = checkAnswerer(a, op)
  const { image } = a
  imageSize(image, op)
  const question = checkString(a.question, 'question', op)
  const answerForm = checkForm(a.answerForm, 'answerForm', op)
  const signal = checkSignal(a.signal, op) && { signal: a.signal! }
  if (agent) {
    const [made] = await agent.zoom({ image, question, answerForm, ...signal })
    const { answer, completion, evidence, turns, requests, pixels, ended } = made!
    const outOfTurns = ended === 'turns'
    return new EvidencedAnswer(
      { answer, evidence, turns, requests, pixels, outOfTurns },
      { reasoner: completion },
    )
  }
  const [perceived] = await perceiver.perceive({ image, question, ...signal })
  const { completion, evidence } = perceived!
  try {
    const [reasoned] = await reasoner.reason({ evidence, question, answerForm, ...signal })
    const { annotated, crops } = evidence
    // The perceiver saw the image in the size of the annotated one.
    const pixels = [annotated, annotated, ...crops].reduce((sum, shown) => sum + shown.size / 3, 0)
    const { answer } = reasoned!
    return new EvidencedAnswer(
      { answer, evidence, turns: [], requests: 2, pixels, outOfTurns: false },
      { perceiver: completion, reasoner: reasoned!.completion },
    )
  } catch (error) {
    evidence.dispose()
    throw error
  }
}

/** @internal Either form of those who answer; anything else is refused. */
export function checkAnswerer(a: Answerer, op: string): Answerer {
  if (a.agent === undefined)
    return { perceiver: checkPerceiver(a.perceiver, op), reasoner: checkReasoner(a.reasoner, op) }
  if (a.perceiver !== undefined || a.reasoner !== undefined)
    refuse('ERR_VALUE', op, 'give either an agent, or a perceiver and a reasoner')
  return { agent: checkAgent(a.agent, op) }
}

type Parts = Pick<Answer, 'answer' | 'evidence' | 'turns' | 'requests' | 'pixels' | 'outOfTurns'>

class EvidencedAnswer implements Answer {
  readonly answer: string
  readonly evidence: Evidence
  readonly perception: string
  readonly reasoning: string
  readonly turns: readonly Turn[]
  readonly requests: number
  readonly pixels: number
  readonly outOfTurns: boolean
  readonly truncated: readonly Role[]

  constructor(parts: Parts, outputs: { perceiver?: Completion; reasoner: Completion }) {
    this.answer = parts.answer
    this.evidence = parts.evidence
    this.turns = parts.turns
    this.requests = parts.requests
    this.pixels = parts.pixels
    this.outOfTurns = parts.outOfTurns
    this.perception = outputs.perceiver?.text ?? ''
    this.reasoning = outputs.reasoner.text
    this.truncated = (['perceiver', 'reasoner'] as const).filter((role) => {
      const output = outputs[role]
      return output !== undefined && isTruncated(output)
    })
  }

  dispose(): void {
    checkReceiver(this instanceof EvidencedAnswer, 'Answer', 'dispose')
    this.evidence.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}
