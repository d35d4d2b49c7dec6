import type { FloatDType } from '../dtype.js'
import { native } from '../native.js'
import { type Held, handleOf, held, maybeHandle, type Tensor, wrap } from '../tensor.js'
import { intoArguments, linearGradients, type WeightGradients } from './linear.js'
import { logProbResults } from './log_probs.js'
import {
  type LossMetrics,
  lossArguments,
  type PolicyLossInput,
  withMetrics,
} from './policy_loss.js'

/** A linear head over a vocabulary, and the target tokens. */
export interface LinearHead<D extends FloatDType = FloatDType> {
  /** [N, C], f32 | f16 | bf16. */
  hidden: Tensor<D>
  /** [V, C], of hidden's type. */
  weight: Tensor<NoInfer<D>>
  /** [V], of hidden's type or f32; none unless given. */
  bias?: Tensor<NoInfer<D> | 'f32'>
  /** i32 [N]: -100 skips a row. */
  targets: Tensor<'i32'>
  /** Divides the logits; 1 unless given. */
  temperature?: number
}

/** Where the gradients of weight and bias are added, f32 [V, C] and [V], for sums over several calls. */
export type HeadGradients = WeightGradients

/**
 * tokenLogProbs of the logits hidden · weightᵀ + bias, which are never materialized: besides its results it takes
 * some 5 MB and less than 1 MB a thread on the CPU; on CUDA 7 MB where tensor cores take the product (16
 * bits, and C a multiple of 8), and 128 MB elsewhere. Sums are f32, and logits are never rounded to 16
 * bits.
 *
 * A row whose target is -100 is not read, gives 0, and on the CPU costs nothing. Any other target
 * outside the vocabulary makes its row NaN and the wait throw ERR_VALUE.
 *
 * @param a.entropy whether to return the entropy of each row, in nats, too.
 * @returns logProbs and entropy f32 [N]; stats f32 [N, 2], for the backward pass.
 */
export function linearLogProbs(
  a: LinearHead & { entropy?: boolean },
): Held<{ logProbs: Tensor; stats: Tensor; entropy?: Tensor }> {
  const op = 'linearLogProbs'
  const results = native().ops.linear_log_probs!(...headArguments(op, a), a.entropy ?? false)
  return logProbResults(results, a.hidden.device)
}

export interface LinearLogProbsBackward extends LinearHead {
  /** As linearLogProbs returned them. */
  stats: Tensor
  /** f32 [N]: the gradient with respect to logProbs. */
  dLogProbs: Tensor
  /** f32 [N], together: the entropy and the gradient with respect to it. */
  entropy?: Tensor
  dEntropy?: Tensor
  /** The gradients are added to these; the results are new handles on the same storage. */
  into?: HeadGradients
}

/**
 * The gradients of linearLogProbs. The logits are computed again, a chunk at a time: beside its
 * results it takes some 50 MB on the CPU, and on CUDA 128 MB, or 1.2 GB where tensor cores take the
 * products (16-bit hidden and weight, and C a multiple of 8). There the gradient of the logits is rounded to
 * 16 bits, elsewhere, and always for f32, it is f32. How much is taken follows from the shapes alone, as
 * the order of sums does, not from what is free: where it doesn't fit, ERR_MEMORY; fewer rows at a time, added
 * up by `into`, take less. Rows whose target is -100, or whose gradients are 0, get 0 and are not read.
 *
 * @returns dHidden as hidden; dWeight f32 [V, C]; dBias f32 [V] if there is a bias.
 */
export function linearLogProbsBackward(
  a: LinearLogProbsBackward,
): Held<{ dHidden: Tensor; dWeight: Tensor; dBias?: Tensor }> {
  const op = 'linearLogProbsBackward'
  const results = native().ops.linear_log_probs_backward!(
    ...headArguments(op, a),
    handleOf(a.stats, 'stats', op),
    handleOf(a.dLogProbs, 'dLogProbs', op),
    maybeHandle(a.entropy, 'entropy', op),
    maybeHandle(a.dEntropy, 'dEntropy', op),
    ...intoArguments(a.into, op),
  )
  return held(gradients(a, results))
}

export interface LinearPolicyLoss
  extends LinearHead,
    Omit<PolicyLossInput, 'logProbs' | 'entropy'> {
  /** The gradients are added to these; the results are new handles on the same storage. */
  into?: HeadGradients
}

/**
 * linearLogProbs, policyLoss and linearLogProbsBackward in one pass over the vocabulary, which computes
 * each logit once: three matrix products instead of four. For objectives whose gradient at a token needs
 * no other token's log-probability; 'gspo' is ERR_VALUE. It takes 128 MB of scratch for logits beside some
 * 20 MB on the CPU, and on CUDA what linearLogProbsBackward takes, whose rounding it has too.
 *
 * With entropyCoef the entropy is computed, and the metrics have it. Masked tokens have their
 * log-probability too, unless their target is -100; which tokens count is the mask's to say.
 *
 * @returns loss f32 [1]; logProbs f32 [T]; the gradients as linearLogProbsBackward returns them.
 */
export function linearPolicyLoss(a: LinearPolicyLoss): Held<{
  loss: Tensor
  logProbs: Tensor
  dHidden: Tensor
  dWeight: Tensor
  dBias?: Tensor
  metrics: () => Promise<LossMetrics>
}> {
  return linearLossAs('linearPolicyLoss', a)
}

/** @internal For composites, under their name. */
export function linearLossAs(op: string, a: LinearPolicyLoss): ReturnType<typeof linearPolicyLoss> {
  const [logProbs, loss, metrics, ...rest] = native().ops.linear_policy_loss!(
    ...headArguments(op, a),
    ...lossArguments(op, a),
    ...intoArguments(a.into, op),
  ) as unknown[]
  const { device } = a.hidden
  const results = {
    loss: wrap(device, loss),
    logProbs: wrap(device, logProbs),
    ...gradients(a, rest),
  }
  return withMetrics(results, wrap<'f32'>(device, metrics))
}

function headArguments(op: string, a: LinearHead) {
  return [
    handleOf(a.hidden, 'hidden', op),
    handleOf(a.weight, 'weight', op),
    maybeHandle(a.bias, 'bias', op),
    handleOf(a.targets, 'targets', op),
    a.temperature ?? 1,
  ]
}

function gradients(
  a: LinearHead & { into?: HeadGradients },
  made: unknown,
): { dHidden: Tensor; dWeight: Tensor; dBias?: Tensor } {
  const { dX: dHidden, ...rest } = linearGradients(made, a.into, a.hidden.device)
  return { dHidden, ...rest }
}
