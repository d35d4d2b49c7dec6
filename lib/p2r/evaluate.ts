import type { AbortSignalLike } from '../abort.js'
import { checkPositive } from '../arguments.js'
import type { Tensor } from '../tensor.js'
import { answer } from './answer.js'
import type { Perceiver } from './perceiver.js'
import type { AnswerForm } from './prompts.js'
import type { Reasoner } from './reasoner.js'
import { answerReward, type RewardRules, type Verifier } from './reward.js'
import { mapUnordered, pipelineDepth } from './semaphore.js'

/** A question of a benchmark; its image is loaded when it is processed, and disposed afterwards. */
export interface Question {
  question: string
  answerForm: AnswerForm
  truth: string
  load: () => Promise<Tensor>
}

export interface Judged<Q extends Question> {
  question: Q
  /** 1 or 0; absent where there is an error. */
  reward?: number
  answer?: string
  perception?: string
  reasoning?: string
  /** Number of boxes in the perceiver's output. */
  boxes?: number
  /** Why the question has no reward. */
  error?: Error
}

/**
 * Answers and scores questions, in the order of completion. A failure concerns one question only. Memory
 * does not grow with their number: about 1.5 `concurrency` of them are processed at once, each with its
 * image.
 *
 * @param a.concurrency 32 unless given; should be the policies' own.
 */
export async function* evaluate<Q extends Question>(a: {
  perceiver: Perceiver
  reasoner: Reasoner
  questions: Iterable<Q> | AsyncIterable<Q>
  verifier?: Verifier
  rules?: RewardRules
  concurrency?: number
  signal?: AbortSignalLike
}): AsyncGenerator<Judged<Q>> {
  const { perceiver, reasoner, verifier, rules, concurrency = 32, signal } = a
  checkPositive(concurrency, 'concurrency', 'evaluate')
  const judge = async (question: Q): Promise<Judged<Q>> => {
    let image: Tensor | undefined
    try {
      signal?.throwIfAborted()
      image = await question.load()
      const { answerForm, truth } = question
      const given = await answer({
        perceiver,
        reasoner,
        image,
        question: question.question,
        answerForm,
        ...(signal && { signal }),
      })
      const boxes = given.evidence.boxes.length
      given.evidence.dispose()
      const { perception, reasoning } = given
      const reward = await answerReward({
        answer: given.answer,
        truth,
        form: answerForm,
        question: question.question,
        ...(verifier && { verifier }),
        ...(rules && { rules }),
      })
      return { question, reward, answer: given.answer, perception, reasoning, boxes }
    } catch (error) {
      signal?.throwIfAborted()
      return { question, error: error instanceof Error ? error : new Error(String(error)) }
    } finally {
      image?.dispose()
    }
  }
  yield* mapUnordered(a.questions, pipelineDepth(concurrency), judge)
}
