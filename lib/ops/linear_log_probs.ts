import { checkArguments, type Names } from '../arguments.js'
import type { FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import { native } from '../native.js'
import { type Held, handleOf, held, maybeHandle, type Tensor, wrap } from '../tensor.js'
import {
  type BiasGradient,
  intoArguments,
  linearGradients,
  quantizedArguments,
  type WeightGradients,
} from './linear.js'
import {
  logProbResults,
  type RowEntropy,
  type RowGradients,
  type RowResultOptions,
  type RowSquaredProbs,
  type TokenLogProbsResult,
} from './log_probs.js'
import {
  type LossMetrics,
  lossArguments,
  lossNames,
  type PolicyLossInputs,
  withMetrics,
} from './policy_loss.js'
import { QuantizedWeight } from './quantize.js'

/** A linear head over a vocabulary, and the target tokens. */
export interface LinearHead<D extends FloatDType = FloatDType> {
  /** [N, C], f32 | f16 | bf16. */
  hidden: Tensor<D>
  /** [V, C], of hidden's type. */
  weight: Tensor<NoInfer<D>>
  /** [V], of hidden's type or f32; added to the logits if given. */
  bias?: Tensor<NoInfer<D> | 'f32'>
  /**
   * i32 [N], from 0 to V - 1; -100 skips its row. Any other value makes its row NaN and the wait throw
   * ERR_VALUE.
   */
  targets: Tensor<'i32'>
  /**
   * Divides the logits; greater than 0.
   *
   * @default 1
   */
  temperature?: number
}

/** The arguments of `linearLogProbs`. A quantised weight is for inference: it has no gradients. */
export interface LinearLogProbsArgs<D extends FloatDType = FloatDType>
  extends Omit<LinearHead<D>, 'weight'>,
    RowResultOptions {
  /** [V, C], of hidden's type; or quantised, for hidden states of any type. */
  weight: Tensor<NoInfer<D>> | QuantizedWeight
}

const headNames: Names<LinearHead> = {
  hidden: true,
  weight: true,
  bias: true,
  targets: true,
  temperature: true,
}
const names: Names<LinearLogProbsArgs> = { ...headNames, entropy: true, squaredProbs: true }

/**
 * tokenLogProbs of the logits hidden · weightᵀ + bias, which are never materialized: besides its results it takes
 * some 5 MB and less than 1 MB a thread on the CPU; on CUDA 7 MB where tensor cores take the product (16
 * bits, and C a multiple of 8), and 128 MB elsewhere. Sums are f32, and logits are never rounded to 16
 * bits. A row whose target is -100 is not read, and on the CPU costs nothing. On the CPU results are the bits of
 * `tokenLogProbs` of the logits that `linear` makes in f32. A quantised weight counts with its values as they are; on
 * CUDA it is written out in hidden's type where there are more than 16 rows.
 *
 * @returns logProbs and stats; entropy or squaredProbs exactly if it is requested.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for the options and, where a
 *   result is read, for a target outside the vocabulary; ERR_DEVICE; ERR_MEMORY; ERR_DISPOSED.
 * @example
 * ```js
 * import { linearLogProbs, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const hidden = device.tensor([1, 0], [1, 2])
 * const weight = device.zeros([4, 2]) // a vocabulary of 4
 * const targets = device.tensor(Int32Array.of(2), [1])
 * console.log(await linearLogProbs({ hidden, weight, targets }).logProbs.read()) // about -1.386
 * device.dispose()
 * ```
 */
export function linearLogProbs<D extends FloatDType>(
  a: LinearLogProbsArgs<D> & { entropy: true; squaredProbs?: false },
): Held<TokenLogProbsResult & RowEntropy>
export function linearLogProbs<D extends FloatDType>(
  a: LinearLogProbsArgs<D> & { entropy?: false; squaredProbs: true },
): Held<TokenLogProbsResult & RowSquaredProbs>
export function linearLogProbs<D extends FloatDType>(
  a: LinearLogProbsArgs<D> & { entropy?: false; squaredProbs?: false },
): Held<TokenLogProbsResult>
export function linearLogProbs<D extends FloatDType>(
  a: LinearLogProbsArgs<D>,
): Held<TokenLogProbsResult & Partial<RowEntropy & RowSquaredProbs>>
export function linearLogProbs<D extends FloatDType>(
  a: LinearLogProbsArgs<D>,
): Held<TokenLogProbsResult & Partial<RowEntropy & RowSquaredProbs>> {
  const op = 'linearLogProbs'
  a = checkArguments(a, names, op)
  const { weight } = a
  const wanted = [a.entropy ?? false, a.squaredProbs ?? false]
  const results =
    weight instanceof QuantizedWeight
      ? native().ops.quantized_linear_log_probs!(
          handleOf(a.hidden, 'hidden', op),
          ...quantizedArguments(op, { weight, bias: a.bias }),
          handleOf(a.targets, 'targets', op),
          a.temperature ?? 1,
          ...wanted,
        )
      : native().ops.linear_log_probs!(...headArguments(op, { ...a, weight }), ...wanted)
  return logProbResults(results, a.hidden.device, a.squaredProbs)
}

/** Where the head's gradients go. */
export interface IntoOption {
  /**
   * The gradients of weight and bias are added to these tensors, f32 [V, C] and [V], for sums over several
   * calls; the results are new handles on the same storage.
   *
   * @default new tensors
   */
  into?: WeightGradients
}

/** The arguments of `linearLogProbsBackward`. */
export type LinearLogProbsBackwardArgs<D extends FloatDType = FloatDType> = LinearHead<D> &
  RowGradients &
  IntoOption

/** The gradients of a head; with a bias also `BiasGradient`. */
export interface HeadGradients<D extends FloatDType = FloatDType> {
  /** As hidden in shape and type. */
  dHidden: Tensor<D>
  /** f32 [V, C]. */
  dWeight: Tensor<'f32'>
}

const backwardNames: Names<LinearLogProbsBackwardArgs> = {
  ...headNames,
  entropy: true,
  stats: true,
  dLogProbs: true,
  dEntropy: true,
  into: true,
}

/**
 * The gradients of linearLogProbs. The logits are computed again, a chunk at a time: beside its
 * results it takes some 50 MB on the CPU, and on CUDA 128 MB, or 1.2 GB where tensor cores take the
 * products (16-bit hidden and weight, and C a multiple of 8). There the gradient of the logits is rounded to
 * 16 bits, elsewhere, and always for f32, it is f32. How much is taken follows from the shapes alone, as
 * the order of sums does, not from what is free: where it doesn't fit, ERR_MEMORY; fewer rows at a time, added
 * up by `into`, take less. Rows whose target is -100, or whose gradients are 0, get 0 and are not read.
 *
 * @returns dHidden and dWeight; dBias exactly if a bias is given.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for the temperature and, where a
 *   result is read, for a target outside the vocabulary; ERR_DEVICE; ERR_MEMORY; ERR_DISPOSED.
 * @example
 * ```js
 * import { linearLogProbs, linearLogProbsBackward, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const head = {
 *   hidden: device.tensor([1, 0], [1, 2]),
 *   weight: device.zeros([2, 2]),
 *   targets: device.tensor(Int32Array.of(1), [1]),
 * }
 * const { stats } = linearLogProbs(head)
 * const back = linearLogProbsBackward({ ...head, stats, dLogProbs: device.tensor([1], [1]) })
 * console.log(await back.dWeight.read()) // about -0.5, 0, 0.5, 0
 * device.dispose()
 * ```
 */
export function linearLogProbsBackward<D extends FloatDType>(
  a: LinearLogProbsBackwardArgs<D> & { bias: Tensor },
): Held<HeadGradients<D> & BiasGradient>
export function linearLogProbsBackward<D extends FloatDType>(
  a: LinearLogProbsBackwardArgs<D> & { bias?: never },
): Held<HeadGradients<D>>
export function linearLogProbsBackward<D extends FloatDType>(
  a: LinearLogProbsBackwardArgs<D>,
): Held<HeadGradients<D> & Partial<BiasGradient>>
export function linearLogProbsBackward<D extends FloatDType>(
  a: LinearLogProbsBackwardArgs<D>,
): Held<HeadGradients<D> & Partial<BiasGradient>> {
  const op = 'linearLogProbsBackward'
  a = checkArguments(a, backwardNames, op)
  const results = native().ops.linear_log_probs_backward!(
    ...headArguments(op, a),
    handleOf(a.stats, 'stats', op),
    handleOf(a.dLogProbs, 'dLogProbs', op),
    maybeHandle(a.entropy, 'entropy', op),
    maybeHandle(a.dEntropy, 'dEntropy', op),
    ...intoArguments(a.into, op),
  )
  return held(gradients<D>(a, results))
}

/** The arguments of `linearPolicyLoss`. */
export interface LinearPolicyLossArgs<D extends FloatDType = FloatDType>
  extends LinearHead<D>,
    PolicyLossInputs,
    IntoOption {}

/** The results of `linearPolicyLoss`; with a bias also `BiasGradient`. */
export interface LinearPolicyLossResult<D extends FloatDType = FloatDType>
  extends HeadGradients<D> {
  /** f32 [1]. */
  loss: Tensor<'f32'>
  /** f32 [T], in nats; masked tokens have theirs too, unless their target is -100. */
  logProbs: Tensor<'f32'>
  /** Reads the numbers that describe the step, once it is done. */
  metrics: () => Promise<LossMetrics>
}

const policyLossNames: Names<LinearPolicyLossArgs> = { ...headNames, ...lossNames, into: true }

/**
 * linearLogProbs, policyLoss and linearLogProbsBackward in one pass over the vocabulary, which computes
 * each logit once: three matrix products instead of four. For objectives whose gradient at a token needs
 * no other token's log-probability; 'gspo', 'luspo', 'gmpo', 'vespo', 'clip_cov', 'kl_cov' and topEntropyQuantile are
 * ERR_VALUE. It takes 128 MB of scratch for logits beside some 20 MB on the CPU, and on CUDA what
 * linearLogProbsBackward takes, whose rounding it has too.
 *
 * With entropyCoef the entropy is computed, and the metrics have it. Which tokens count is for the mask to
 * say: a target of -100 alone has log-probability 0 and counts.
 *
 * @returns the loss, log-probabilities and gradients; dBias exactly if a bias is given.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for options and, where a result
 *   is read, for a target outside the vocabulary or a mask value other than 0 and 1; ERR_DEVICE; ERR_MEMORY;
 *   ERR_DISPOSED.
 * @example
 * ```js
 * import { linearPolicyLoss, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const step = linearPolicyLoss({
 *   hidden: device.tensor([1, 0, 0, 1], [2, 2]),
 *   weight: device.zeros([4, 2]),
 *   targets: device.tensor(Int32Array.of(1, 2), [2]),
 *   advantages: device.tensor([1], [1]),
 *   cuSeqlens: [0, 2],
 * })
 * console.log((await step.metrics()).tokens, step.dWeight.shape) // 2 [ 4, 2 ]
 * device.dispose()
 * ```
 */
export function linearPolicyLoss<D extends FloatDType>(
  a: LinearPolicyLossArgs<D> & { bias: Tensor },
): Held<LinearPolicyLossResult<D> & BiasGradient>
export function linearPolicyLoss<D extends FloatDType>(
  a: LinearPolicyLossArgs<D> & { bias?: never },
): Held<LinearPolicyLossResult<D>>
export function linearPolicyLoss<D extends FloatDType>(
  a: LinearPolicyLossArgs<D>,
): Held<LinearPolicyLossResult<D> & Partial<BiasGradient>>
export function linearPolicyLoss<D extends FloatDType>(
  a: LinearPolicyLossArgs<D>,
): Held<LinearPolicyLossResult<D> & Partial<BiasGradient>> {
  const op = 'linearPolicyLoss'
  a = checkArguments(a, policyLossNames, op)
  return linearLossAs(op, a)
}

/** @internal For composites, under their name; unknown fields are ignored. */
export function linearLossAs<D extends FloatDType>(
  op: string,
  a: LinearPolicyLossArgs<D>,
): Held<LinearPolicyLossResult<D> & Partial<BiasGradient>> {
  const [logProbs, loss, metrics, ...rest] = native().ops.linear_policy_loss!(
    ...headArguments(op, a),
    ...lossArguments(op, a),
    ...intoArguments(a.into, op),
  ) as unknown[]
  const { device } = a.hidden
  const results = {
    loss: wrap<'f32'>(device, loss),
    logProbs: wrap<'f32'>(device, logProbs),
    ...gradients<D>(a, rest),
  }
  return withMetrics(results, wrap<'f32'>(device, metrics))
}

function headArguments<D extends FloatDType>(op: string, a: LinearHead<D>) {
  if ((a.weight as unknown) instanceof QuantizedWeight)
    refuse('ERR_VALUE', op, 'weight is quantised, and has no gradients; expected a Tensor')
  return [
    handleOf(a.hidden, 'hidden', op),
    handleOf(a.weight, 'weight', op),
    maybeHandle(a.bias, 'bias', op),
    handleOf(a.targets, 'targets', op),
    a.temperature ?? 1,
  ]
}

function gradients<D extends FloatDType>(
  a: LinearHead<D> & IntoOption,
  made: unknown,
): HeadGradients<D> & Partial<BiasGradient> {
  const { dX: dHidden, ...rest } = linearGradients<D>(made, a.into, a.hidden.device)
  return { dHidden, ...rest }
}
