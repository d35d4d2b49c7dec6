// Distillation of a large head into a small one, as a strict consumer does it. It is compiled, never run.
import {
  type DistillationAdvantagesArgs,
  type DistillationArgs,
  type DistillationBackwardArgs,
  type DistillationBackwardResult,
  type DistillationObjective,
  type DistillationOptions,
  distillation,
  distillationAdvantages,
  distillationBackward,
  grpoStep,
  type LinearDistillationArgs,
  type LinearDistillationBackwardArgs,
  type LinearDistillationBackwardResult,
  linearDistillation,
  linearDistillationBackward,
  type Tensor,
} from 'p2r-kernels'

const objective: DistillationObjective = 'jsd'
export const options: DistillationOptions = { objective, beta: 0.1, temperature: 2 }

export function dense(a: DistillationArgs<'bf16'>, dDivergence: Tensor<'f32'>): Tensor[] {
  const back: DistillationBackwardArgs<'bf16'> = { ...a, ...options, dDivergence, inPlace: true }
  using step = distillationBackward(back)
  const { divergence, dLogits }: DistillationBackwardResult<'bf16'> = step
  return [divergence, dLogits, distillation(a)]
}

/** The two may differ in size and type. */
export function heads(
  a: LinearDistillationArgs<'f32', 'bf16'>,
  dDivergence: Tensor<'f32'>,
): LinearDistillationBackwardResult<'f32'> {
  const back: LinearDistillationBackwardArgs<'f32', 'bf16'> = { ...a, dDivergence }
  linearDistillation(a).dispose()
  return linearDistillationBackward(back)
}

export function onPolicy(a: DistillationAdvantagesArgs): Tensor<'f32'> {
  const advantages = distillationAdvantages({ ...a, discount: 0.9, clamp: 5 })
  const { logProbs, cuSeqlens } = a
  return grpoStep({ logProbs, advantages, cuSeqlens, advantagesPer: 'token' }).dLogProbs
}

export const wrong = (logits: Tensor<'f16'>, teacherLogits: Tensor<'f32'>): Tensor =>
  // @ts-expect-error both are of one type
  distillation({ logits, teacherLogits })
