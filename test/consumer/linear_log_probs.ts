// A linear head over a vocabulary, as a strict consumer trains through it. It is compiled, never run.
import {
  type GrpoModel,
  grpoStep,
  type LinearHead,
  type LinearLogProbsBackwardArgs,
  type LinearPolicyLossArgs,
  linearLogProbs,
  linearLogProbsBackward,
  linearPolicyLoss,
  type RowResultOptions,
  type RowSquaredProbs,
  type Tensor,
  type WeightGradients,
} from 'p2r-kernels'

export function evaluate(head: LinearHead, dLogProbs: Tensor, into: WeightGradients): Tensor[] {
  using forward = linearLogProbs({ ...head, temperature: 0.7, entropy: true })
  const { logProbs, stats, entropy } = forward
  const back: LinearLogProbsBackwardArgs = { ...head, stats, dLogProbs, into }
  const { dHidden, dWeight, dBias } = linearLogProbsBackward(back)
  return [logProbs, entropy ?? stats, dHidden, dWeight, ...(dBias ? [dBias] : [])]
}

export function energies(head: LinearHead): RowSquaredProbs {
  const options: RowResultOptions = { squaredProbs: true }
  linearLogProbs({ ...head, ...options }).dispose()
  return linearLogProbs({ ...head, squaredProbs: true })
}

export async function train(head: LinearHead, advantages: Tensor): Promise<number> {
  const a: LinearPolicyLossArgs = { ...head, advantages, cuSeqlens: [0, 8], objective: 'cispo' }
  using step = linearPolicyLoss(a)
  const tensors: Tensor[] = [step.loss, step.logProbs, step.dHidden, step.dWeight]
  return (await step.metrics()).loss + tensors.length
}

export function step(head: LinearHead<'bf16'>, rewards: Tensor): Tensor | undefined {
  const model: GrpoModel = head
  return grpoStep({ ...model, rewards, groups: [0, 0], cuSeqlens: [0, 4, 8] }).dHidden
}

// @ts-expect-error targets are needed
export const wrong = (hidden: Tensor, weight: Tensor) => linearLogProbs({ hidden, weight })
