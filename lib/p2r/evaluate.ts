import { type AbortSignalLike, checkSignal } from '../abort.js'
import {
  checkArguments,
  checkFunction,
  checkPositive,
  checkString,
  describeValue,
  isObject,
  type Names,
} from '../arguments.js'
import { refuse } from '../errors.js'
import { imageSize, type Tensor } from '../tensor.js'
import { type Answerer, answer, checkAnswerer } from './answer.js'
import { messageOf, type Role } from './policy.js'
import { type AnswerForm, checkForm } from './prompts.js'
import { answerReward, type RewardRules, rulesOf, type Verifier } from './reward.js'
import { ImageGate, mapUnordered, pipelineDepth } from './semaphore.js'

/** A question of a benchmark. */
export interface Question {
  /** With its options, if it has any. */
  question: string
  /** How it is answered: by a letter ('mca'), a number ('na') or in words ('free_form'). */
  answerForm: AnswerForm
  /** The right answer. */
  truth: string
  /** Loads the image, u8 [height, width, 3], when the question is processed. It is disposed afterwards. */
  load: () => Promise<Tensor<'u8'>>
}

/** A question with its score, or with the error for which it has none. */
export interface Judged<Q extends Question> {
  /** The question as it was given. */
  question: Q
  /** 1 for a right answer, 0 for a wrong one; absent where there is an error. */
  reward?: number
  /** The answer that was scored. */
  answer?: string
  /** The perceiver's output; '' of an agent. */
  perception?: string
  /** The reasoner's output, or the agent's last one. */
  reasoning?: string
  /** Requests that the answer took. */
  requests?: number
  /** Pixels of all images that were shown for it; see Answer. */
  pixels?: number
  /** Whether an agent still called its tool in its last turn, so that there is no answer; absent where it did not. */
  outOfTurns?: boolean
  /** The roles whose output the limit of tokens cut off; absent where there are none. */
  truncated?: readonly Role[]
  /** Number of boxes in the perceiver's output, or of an agent's crops. */
  boxes?: number
  /** How many of them have no crop; see Evidence's `dropped`. Absent where there are none. */
  droppedBoxes?: number
  /** Why the question has no reward. */
  error?: Error
}

/** What is answered and scored, and how. */
export interface EvaluateOptions<Q extends Question = Question> {
  /** The questions, read as they are processed; each may have further fields. */
  questions: Iterable<Q> | AsyncIterable<Q>
  /** Judges answers of free form, which need one. */
  verifier?: Verifier
  /**
   * Of scoring; see answerReward.
   * @default 'reference'
   */
  rules?: RewardRules
  /**
   * The policies' requests in flight, which should be the policies' own limit. About 1.5 times as many questions
   * are processed at once, each with its image; fewer where images have more than 4 GiB in all.
   * @default 32
   */
  concurrency?: number
  /** An abort rejects with the signal's reason. */
  signal?: AbortSignalLike
}

/** The arguments of evaluate. */
export type EvaluateArgs<Q extends Question = Question> = Answerer & EvaluateOptions<Q>

/** Bytes of the images of all questions that are processed, at which no further one is loaded: 40 of 33 megapixels. */
const mostImageBytes = 2 ** 32
/** A decoder holds several times an image's bytes, and there are few threads to decode on. */
const loadedAtOnce = 8

const argumentNames: Names<EvaluateArgs> = {
  perceiver: true,
  reasoner: true,
  agent: true,
  questions: true,
  verifier: true,
  rules: true,
  concurrency: true,
  signal: true,
}

/**
 * Answers and scores questions, and yields them in the order of completion.
 *
 * A failure concerns one question only, whose `error` it is. Memory does not grow with the number of questions.
 *
 * @throws P2RError ERR_VALUE for wrong arguments, at the call.
 * @example
 * ```js
 * import { evaluate, functionPolicy, openDevice, Perceiver, Reasoner } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const load = async () => device.zeros([48, 64, 3], 'u8')
 * let right = 0
 * for await (const { reward, error } of evaluate({
 *   perceiver: new Perceiver(functionPolicy(() => '[]')),
 *   reasoner: new Reasoner(functionPolicy(() => '<answer>A</answer>')),
 *   questions: [
 *     { question: 'Which?', answerForm: 'mca', truth: 'A', load },
 *     { question: 'Where?', answerForm: 'mca', truth: 'B', load },
 *   ],
 * })) {
 *   if (error) throw error
 *   right += reward ?? 0
 * }
 * console.log(right) // 1
 * device.dispose()
 * ```
 */
export function evaluate<Q extends Question>(
  a: EvaluateArgs<Q>,
): AsyncGenerator<Judged<Q>, void, undefined> {
  const op = 'evaluate'
  a = checkArguments(a, argumentNames, op)
  const { questions, verifier, rules, concurrency = 32, signal } = a
  const answerer = checkAnswerer(a, op)
  if (!isObject(questions) || !(Symbol.iterator in questions || Symbol.asyncIterator in questions))
    refuse('ERR_VALUE', op, `questions must be iterable, got ${describeValue(questions)}`)
  if (verifier !== undefined) checkFunction(verifier, 'verifier', op)
  rulesOf(rules, op)
  checkPositive(concurrency, 'concurrency', op)
  checkSignal(signal, op)
  const gate = new ImageGate(mostImageBytes, loadedAtOnce)
  const judge = async (question: Q): Promise<Judged<Q>> => {
    let image: Tensor<'u8'> | undefined
    let held: Tensor<'u8'> | undefined
    try {
      signal?.throwIfAborted()
      checkQuestion(question, op)
      held = await gate.load(async () => {
        image = await question.load()
        imageSize(image, op)
        return image
      }, signal)
      const { answerForm, truth } = question
      const made = await answer({
        ...answerer,
        image: held,
        question: question.question,
        answerForm,
        ...(signal && { signal }),
      })
      const { boxes, dropped } = made.evidence
      made.dispose()
      const { perception, reasoning, truncated, requests, pixels, outOfTurns } = made
      const reward = await answerReward({
        answer: made.answer,
        truth,
        form: answerForm,
        question: question.question,
        ...(verifier && { verifier }),
        ...(rules && { rules }),
      })
      return {
        question,
        reward,
        answer: made.answer,
        perception,
        reasoning,
        boxes: boxes.length,
        ...(dropped > 0 && { droppedBoxes: dropped }),
        requests,
        pixels,
        ...(outOfTurns && { outOfTurns }),
        ...(truncated.length > 0 && { truncated }),
      }
    } catch (error) {
      signal?.throwIfAborted()
      return { question, error: error instanceof Error ? error : new Error(messageOf(error)) }
    } finally {
      if (held) gate.release(held)
      image?.dispose()
    }
  }
  return mapUnordered(questions, pipelineDepth(concurrency), judge)
}

/** Other fields are the caller's. */
function checkQuestion(question: Question, op: string): void {
  if (!isObject(question))
    refuse('ERR_VALUE', op, `a question must be an object, got ${describeValue(question)}`)
  checkString(question.question, 'question', op)
  checkString(question.truth, 'truth', op)
  checkForm(question.answerForm, 'answerForm', op)
  checkFunction(question.load, 'load', op)
}
