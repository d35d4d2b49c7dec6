import type { AbortSignalLike } from '../abort.js'
import type { Tensor } from '../tensor.js'
import type { Evidence } from './evidence.js'
import type { Perceiver } from './perceiver.js'
import type { AnswerForm } from './prompts.js'
import type { Reasoner } from './reasoner.js'

export interface Answer {
  answer: string
  /** Must be disposed by the caller. */
  evidence: Evidence
  /** What the two roles wrote. */
  perception: string
  reasoning: string
}

/** Perceive, then reason: one answer with its evidence. A failure disposes what was allocated. */
export async function answer(a: {
  perceiver: Perceiver
  reasoner: Reasoner
  image: Tensor
  question: string
  answerForm: AnswerForm
  signal?: AbortSignalLike
}): Promise<Answer> {
  const { perceiver, reasoner, image, question, answerForm } = a
  const signal = a.signal && { signal: a.signal }
  const [perceived] = await perceiver.perceive({ image, question, ...signal })
  const { completion, evidence } = perceived!
  try {
    const [reasoned] = await reasoner.reason({ evidence, question, answerForm, ...signal })
    return {
      answer: reasoned!.answer,
      evidence,
      perception: completion.text,
      reasoning: reasoned!.completion.text,
    }
  } catch (error) {
    evidence.dispose()
    throw error
  }
}
