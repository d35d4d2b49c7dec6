import { checkArguments, choice, hostInts, type Names } from '../arguments.js'
import type { FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import { native } from '../native.js'
import { type Held, handleOf, held, type Ints, maybeHandle, type Tensor, wrap } from '../tensor.js'
import { type BiasGradient, intoArguments, linearGradients } from './linear.js'
import type { HeadGradients, IntoOption } from './linear_log_probs.js'

/**
 * A divergence of the student's distribution p from the teacher's q. 'reverse_kl': KL(p‖q), which seeks the teacher's
 * modes (Gu et al. 2024, MiniLLM); 'forward_kl': KL(q‖p), which covers them (Hinton et al. 2015); 'jsd':
 * beta KL(q‖m) + (1 - beta) KL(p‖m) with m = beta q + (1 - beta) p (Agarwal et al. 2024, GKD).
 */
export type DistillationObjective = 'reverse_kl' | 'forward_kl' | 'jsd'

/** Options of the divergence between a student and a teacher. */
export interface DistillationOptions {
  /**
   * Which divergence.
   *
   * @default 'reverse_kl'
   */
  objective?: DistillationObjective
  /**
   * The teacher's weight in 'jsd', between 0 and 1, exclusively. TRL's beta, which has 'forward_kl' at 0 and
   * 'reverse_kl' at 1.
   *
   * @default 0.5
   */
  beta?: number
  /**
   * Divides the logits of both; greater than 0. The divergence is not multiplied by its square.
   *
   * @default 1
   */
  temperature?: number
  /**
   * u8 [N]: 1 keeps a row, 0 skips it, which then costs nothing and gives 0; any other value makes the wait throw
   * ERR_VALUE.
   *
   * @default every row is kept
   */
  mask?: Tensor<'u8'>
}

/** The arguments of `distillation`. */
export interface DistillationArgs<D extends FloatDType = FloatDType> extends DistillationOptions {
  /** [N, V], f32 | f16 | bf16: the student's. */
  logits: Tensor<D>
  /** [N, V], of logits' type: the teacher's, for the same tokens. */
  teacherLogits: Tensor<NoInfer<D>>
}

const optionNames: Names<DistillationOptions> = {
  objective: true,
  beta: true,
  temperature: true,
  mask: true,
}
const names: Names<DistillationArgs> = { ...optionNames, logits: true, teacherLogits: true }

/**
 * The divergence, over the whole vocabulary, of a student's distribution from a teacher's, of each row of their
 * logits. Nothing of the logits' size is made. For a loss and its gradient call `distillationBackward` alone.
 *
 * A row with NaN or +inf in either, or of -inf alone, is NaN. Where one has probability 0 and the other, by which
 * its divergence weights, has not, a KL divergence is infinite.
 *
 * @returns f32 [N], in nats.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for options and, where the result
 *   is read, for a mask value other than 0 and 1; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { distillation, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const logits = device.tensor([0, 0], [1, 2]) // 1/2, 1/2
 * const teacherLogits = device.tensor([0, Math.log(3)], [1, 2]) // 1/4, 3/4
 * console.log(await distillation({ logits, teacherLogits }).read()) // about 0.144
 * device.dispose()
 * ```
 */
export function distillation<D extends FloatDType>(a: DistillationArgs<D>): Tensor<'f32'> {
  const op = 'distillation'
  a = checkArguments(a, names, op)
  const out = native().ops.distillation!(
    handleOf(a.logits, 'logits', op),
    handleOf(a.teacherLogits, 'teacherLogits', op),
    ...optionArguments(op, a),
  )
  return wrap(a.logits.device, out)
}

/** The arguments of `distillationBackward`. */
export interface DistillationBackwardArgs<D extends FloatDType = FloatDType>
  extends DistillationArgs<D> {
  /** f32 [N]: the gradient with respect to each row's divergence: for a mean, 1 / N. */
  dDivergence: Tensor<'f32'>
  /**
   * Writes the gradient over `logits`, of which the result is then a new handle; nothing is allocated.
   *
   * @default false
   */
  inPlace?: boolean
}

/** The results of `distillationBackward`. */
export interface DistillationBackwardResult<D extends FloatDType = FloatDType> {
  /** f32 [N]: as `distillation` returns it. */
  divergence: Tensor<'f32'>
  /** The gradient, as the logits in shape and type. */
  dLogits: Tensor<D>
}

const backwardNames: Names<DistillationBackwardArgs> = {
  ...names,
  dDivergence: true,
  inPlace: true,
}

/**
 * The divergence of each row, as `distillation` has it, with its gradient with respect to the student's logits:
 * all of a training step, since the weights of the rows are known before it.
 *
 * @returns the divergence and the gradient.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for options and, where a result
 *   is read, for a mask value other than 0 and 1; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { distillationBackward, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const step = distillationBackward({
 *   logits: device.tensor([0, 0], [1, 2]),
 *   teacherLogits: device.tensor([0, Math.log(3)], [1, 2]),
 *   objective: 'forward_kl',
 *   dDivergence: device.tensor([1], [1]),
 * })
 * console.log(await step.dLogits.read()) // about 0.25, -0.25
 * device.dispose()
 * ```
 */
export function distillationBackward<D extends FloatDType>(
  a: DistillationBackwardArgs<D>,
): Held<DistillationBackwardResult<D>> {
  const op = 'distillationBackward'
  a = checkArguments(a, backwardNames, op)
  const inPlace = a.inPlace ?? false
  const results = native().ops.distillation_backward!(
    inPlace,
    handleOf(a.logits, 'logits', op),
    handleOf(a.teacherLogits, 'teacherLogits', op),
    ...optionArguments(op, a),
    handleOf(a.dDivergence, 'dDivergence', op),
  )
  const { device } = a.logits
  const [divergence, dLogits] = inPlace ? [results] : (results as unknown[])
  return held({
    divergence: wrap<'f32'>(device, divergence),
    dLogits: inPlace ? a.logits.reshape(a.logits.shape) : wrap<D>(device, dLogits),
  })
}

/** Two linear heads over one vocabulary, and the options of their divergence. */
export interface LinearDistillationArgs<
  D extends FloatDType = FloatDType,
  E extends FloatDType = FloatDType,
> extends DistillationOptions {
  /** [N, C], f32 | f16 | bf16: the student's hidden states. */
  hidden: Tensor<D>
  /** [V, C], of hidden's type: the student's head. */
  weight: Tensor<NoInfer<D>>
  /** [V], of hidden's type or f32; added to the student's logits if given. */
  bias?: Tensor<NoInfer<D> | 'f32'>
  /** [N, C'], f32 | f16 | bf16: the teacher's hidden states for the same tokens, of any size and type. */
  teacherHidden: Tensor<E>
  /** [V, C'], of teacherHidden's type: the teacher's head. */
  teacherWeight: Tensor<NoInfer<E>>
  /** [V], of teacherHidden's type or f32; added to the teacher's logits if given. */
  teacherBias?: Tensor<NoInfer<E> | 'f32'>
}

const linearNames: Names<LinearDistillationArgs> = {
  ...optionNames,
  hidden: true,
  weight: true,
  bias: true,
  teacherHidden: true,
  teacherWeight: true,
  teacherBias: true,
}

/**
 * `distillation` of the logits hidden · weightᵀ + bias and teacherHidden · teacherWeightᵀ + teacherBias, which are
 * computed a chunk of rows at a time: besides its results it takes 128 MB, or 640 MB on tensor cores. Logits
 * are never rounded to 16 bits. For a loss and its gradient call `linearDistillationBackward` alone.
 *
 * @returns f32 [N], in nats.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for options and, where the result
 *   is read, for a mask value other than 0 and 1; ERR_DEVICE; ERR_MEMORY; ERR_DISPOSED.
 * @example
 * ```js
 * import { linearDistillation, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const divergence = linearDistillation({
 *   hidden: device.tensor([1], [1, 1]),
 *   weight: device.zeros([2, 1]), // 1/2, 1/2
 *   teacherHidden: device.tensor([1, 1], [1, 2]),
 *   teacherWeight: device.tensor([0, 0, 0, Math.log(3)], [2, 2]), // 1/4, 3/4
 * })
 * console.log(await divergence.read()) // about 0.144
 * device.dispose()
 * ```
 */
export function linearDistillation<D extends FloatDType, E extends FloatDType>(
  a: LinearDistillationArgs<D, E>,
): Tensor<'f32'> {
  const op = 'linearDistillation'
  a = checkArguments(a, linearNames, op)
  const out = native().ops.linear_distillation!(...headArguments(op, a), ...optionArguments(op, a))
  return wrap(a.hidden.device, out)
}

/** The arguments of `linearDistillationBackward`. */
export interface LinearDistillationBackwardArgs<
  D extends FloatDType = FloatDType,
  E extends FloatDType = FloatDType,
> extends LinearDistillationArgs<D, E>,
    IntoOption {
  /** f32 [N]: the gradient with respect to each row's divergence: for a mean, 1 / N. */
  dDivergence: Tensor<'f32'>
}

/** The results of `linearDistillationBackward`; with a bias also `BiasGradient`. */
export interface LinearDistillationBackwardResult<D extends FloatDType = FloatDType>
  extends HeadGradients<D> {
  /** f32 [N]: as `linearDistillation` returns it. */
  divergence: Tensor<'f32'>
}

const linearBackwardNames: Names<LinearDistillationBackwardArgs> = {
  ...linearNames,
  dDivergence: true,
  into: true,
}

/**
 * The divergence of each row, as `linearDistillation` has it, with its gradient with respect to the student's hidden
 * states and head: all of a training step, which computes each logit once. It takes what
 * `linearDistillation` takes, and for the products what `linearLogProbsBackward` does, whose rounding it has too.
 * Rows whose mask or dDivergence is 0 get 0.
 *
 * @returns divergence, dHidden and dWeight; dBias exactly if a bias is given.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for options and, where a result
 *   is read, for a mask value other than 0 and 1; ERR_DEVICE; ERR_MEMORY; ERR_DISPOSED.
 * @example
 * ```js
 * import { linearDistillationBackward, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const step = linearDistillationBackward({
 *   hidden: device.tensor([2], [1, 1]),
 *   weight: device.zeros([2, 1]), // 1/2, 1/2
 *   teacherHidden: device.tensor([1], [1, 1]),
 *   teacherWeight: device.tensor([0, Math.log(3)], [2, 1]), // 1/4, 3/4
 *   objective: 'forward_kl',
 *   dDivergence: device.tensor([1], [1]),
 * })
 * console.log(await step.dWeight.read()) // about 0.5, -0.5
 * device.dispose()
 * ```
 */
export function linearDistillationBackward<D extends FloatDType, E extends FloatDType>(
  a: LinearDistillationBackwardArgs<D, E> & { bias: Tensor },
): Held<LinearDistillationBackwardResult<D> & BiasGradient>
export function linearDistillationBackward<D extends FloatDType, E extends FloatDType>(
  a: LinearDistillationBackwardArgs<D, E> & { bias?: never },
): Held<LinearDistillationBackwardResult<D>>
export function linearDistillationBackward<D extends FloatDType, E extends FloatDType>(
  a: LinearDistillationBackwardArgs<D, E>,
): Held<LinearDistillationBackwardResult<D> & Partial<BiasGradient>>
export function linearDistillationBackward<D extends FloatDType, E extends FloatDType>(
  a: LinearDistillationBackwardArgs<D, E>,
): Held<LinearDistillationBackwardResult<D> & Partial<BiasGradient>> {
  const op = 'linearDistillationBackward'
  a = checkArguments(a, linearBackwardNames, op)
  const [divergence, ...gradients] = native().ops.linear_distillation_backward!(
    ...headArguments(op, a),
    ...optionArguments(op, a),
    handleOf(a.dDivergence, 'dDivergence', op),
    ...intoArguments(a.into, op),
  ) as unknown[]
  const { device } = a.hidden
  const { dX: dHidden, ...rest } = linearGradients<D>(gradients, a.into, device)
  return held({ divergence: wrap<'f32'>(device, divergence), dHidden, ...rest })
}

/** The arguments of `distillationAdvantages`. */
export interface DistillationAdvantagesArgs {
  /** f32 [T], packed by cuSeqlens: log-probabilities of the sampled tokens under the student that sampled them. */
  logProbs: Tensor<'f32'>
  /** f32 [T]: of the same tokens under the teacher. */
  teacherLogProbs: Tensor<'f32'>
  /** Where the sequences begin and end: 0 = c₀ ≤ c₁ ≤ … ≤ c_B = T. */
  cuSeqlens: Ints
  /**
   * u8 [T]: 1 keeps a token, 0 drops it, whose advantage is then 0; any other value makes the wait throw ERR_VALUE.
   *
   * @default every token is kept
   */
  mask?: Tensor<'u8'>
  /**
   * f32 [B], one a sequence, or [T], one a token: what the penalty is added to, such as the advantages of rewards.
   *
   * @default 0
   */
  advantages?: Tensor<'f32'>
  /**
   * Whether `advantages` holds one value a sequence or a token.
   *
   * @default by its size; 'sequence' where both fit
   */
  advantagesPer?: 'sequence' | 'token'
  /**
   * Multiplies the penalty; at least 0.
   *
   * @default 1
   */
  coef?: number
  /**
   * What a token is charged of the next one's penalty, and so on to the end of its sequence; from 0 to 1.
   *
   * @default 0: of its own alone
   */
  discount?: number
  /**
   * Bounds a token's log-ratio, which is infinite where the teacher's probability is 0; greater than 0; false for no
   * bound.
   *
   * @default false
   */
  clamp?: number | false
}

const advantagesNames: Names<DistillationAdvantagesArgs> = {
  logProbs: true,
  teacherLogProbs: true,
  cuSeqlens: true,
  mask: true,
  advantages: true,
  advantagesPer: true,
  coef: true,
  discount: true,
  clamp: true,
}

/**
 * On-policy distillation (Lu and Thinking Machines Lab 2025): minus the reverse KL to a teacher, estimated at each
 * sampled token, as its advantage: coef (teacherLogProbs - logProbs), and a discounted sum of it over the tokens
 * that follow. The defaults are those of tinker-cookbook. They are the per-token `advantages` of `policyLoss` and
 * `grpoStep`; no gradient goes through them.
 *
 * @returns f32 [T].
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for options and, where the result
 *   is read, for a mask value other than 0 and 1; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { distillationAdvantages, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const logProbs = device.tensor([-1, -1], [2])
 * const teacherLogProbs = device.tensor([-0.5, -3], [2])
 * const advantages = distillationAdvantages({ logProbs, teacherLogProbs, cuSeqlens: [0, 2] })
 * console.log(await advantages.read()) // Float32Array(2) [ 0.5, -2 ]
 * device.dispose()
 * ```
 */
export function distillationAdvantages(a: DistillationAdvantagesArgs): Tensor<'f32'> {
  const op = 'distillationAdvantages'
  a = checkArguments(a, advantagesNames, op)
  if ((a.clamp as unknown) === true)
    refuse('ERR_VALUE', op, 'clamp must be a number or false, got true')
  const out = native().ops.distillation_advantages!(
    handleOf(a.logProbs, 'logProbs', op),
    handleOf(a.teacherLogProbs, 'teacherLogProbs', op),
    hostInts(a.cuSeqlens, 'cuSeqlens', op),
    maybeHandle(a.mask, 'mask', op),
    maybeHandle(a.advantages, 'advantages', op),
    a.advantagesPer === undefined
      ? null
      : choice(a.advantagesPer, ['sequence', 'token'], 'advantagesPer', op) === 'token',
    a.coef ?? 1,
    a.discount ?? 0,
    a.clamp === false ? null : a.clamp,
  )
  return wrap(a.logProbs.device, out)
}

function optionArguments(op: string, a: DistillationOptions): unknown[] {
  return [
    maybeHandle(a.mask, 'mask', op),
    a.objective ?? 'reverse_kl',
    a.beta ?? 0.5,
    a.temperature ?? 1,
  ]
}

function headArguments(op: string, a: LinearDistillationArgs): unknown[] {
  return [
    handleOf(a.hidden, 'hidden', op),
    handleOf(a.weight, 'weight', op),
    maybeHandle(a.bias, 'bias', op),
    handleOf(a.teacherHidden, 'teacherHidden', op),
    handleOf(a.teacherWeight, 'teacherWeight', op),
    maybeHandle(a.teacherBias, 'teacherBias', op),
  ]
}
