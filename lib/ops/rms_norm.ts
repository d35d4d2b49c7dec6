import { checkArguments, type Names } from '../arguments.js'
import type { FloatDType } from '../dtype.js'
import { native } from '../native.js'
import { type Held, handleOf, held, maybeHandle, type Tensor, wrap } from '../tensor.js'

/** The arguments of `rmsNorm`. */
export interface RmsNormArgs<D extends FloatDType = FloatDType> {
  /** [..., C], f32 | f16 | bf16: normalised over the last axis. */
  x: Tensor<D>
  /** [C], of x's type. */
  weight: Tensor<NoInfer<D>>
  /**
   * Added to the mean of the squares, at least 0.
   *
   * @default 1e-6
   */
  eps?: number
  /**
   * As x in shape and type: added to x before, and the sum, rounded to the type, returned.
   *
   * @default x alone is normalised
   */
  residual?: Tensor<NoInfer<D>>
}

/** The results of `rmsNorm`. */
export interface RmsNormResult<D extends FloatDType = FloatDType> {
  /** As x in shape and type. */
  out: Tensor<D>
  /** f32, x's shape without the last axis: each row's 1 / √(mean of squares + eps), for `rmsNormBackward`. */
  rstd: Tensor<'f32'>
}

/** What `rmsNorm` returns besides where there is a residual. */
export interface ResidualSum<D extends FloatDType = FloatDType> {
  /** [..., C], of x's type: x + residual, the stream that goes on, and x for `rmsNormBackward`. */
  sum: Tensor<D>
}

const names: Names<RmsNormArgs> = { x: true, weight: true, eps: true, residual: true }

/**
 * Root mean square normalisation (Zhang and Sennrich, 2019) over the last axis, as in Llama and Qwen:
 * x / √(mean of x² + eps) · weight, in f32, rounded once. With a residual it is that of `add({ x, y: residual })`,
 * bit for bit, in one pass over memory. A row's result does not depend on the other rows.
 *
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { openDevice, rmsNorm } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const x = device.tensor([3, 4, 0, 0], [1, 4])
 * const weight = device.tensor([1, 1, 1, 1], [4])
 * console.log(await rmsNorm({ x, weight, eps: 0 }).out.read()) // about 1.2, 1.6, 0, 0
 * device.dispose()
 * ```
 */
export function rmsNorm<D extends FloatDType>(
  a: RmsNormArgs<D> & { residual: Tensor<NoInfer<D>> },
): Held<RmsNormResult<D> & ResidualSum<D>>
export function rmsNorm<D extends FloatDType>(
  a: RmsNormArgs<D>,
): Held<RmsNormResult<D> & Partial<ResidualSum<D>>>
export function rmsNorm<D extends FloatDType>(
  a: RmsNormArgs<D>,
): Held<RmsNormResult<D> & Partial<ResidualSum<D>>> {
  const op = 'rmsNorm'
  a = checkArguments(a, names, op)
  const [out, rstd, sum] = native().ops.rms_norm!(
    handleOf(a.x, 'x', op),
    handleOf(a.weight, 'weight', op),
    a.eps ?? 1e-6,
    maybeHandle(a.residual, 'residual', op),
  ) as unknown[]
  const { device } = a.x
  return held({
    out: wrap<D>(device, out),
    rstd: wrap<'f32'>(device, rstd),
    ...(sum === undefined ? {} : { sum: wrap<D>(device, sum) }),
  })
}

/** The arguments of `rmsNormBackward`. */
export interface RmsNormBackwardArgs<D extends FloatDType = FloatDType> {
  /** The gradient with respect to `out`; as x in shape and type. */
  dOut: Tensor<NoInfer<D>>
  /** [..., C], what was normalised: the x given to `rmsNorm`, or the `sum` that it returned. */
  x: Tensor<D>
  /** As given to `rmsNorm`. */
  weight: Tensor<NoInfer<D>>
  /** As `rmsNorm` returned it. */
  rstd: Tensor<'f32'>
  /**
   * The gradient with respect to `sum`, which is added to dX; as x in shape and type.
   *
   * @default dX is that of the normalisation alone
   */
  dSum?: Tensor<NoInfer<D>>
}

/** The results of `rmsNormBackward`. */
export interface RmsNormBackwardResult<D extends FloatDType = FloatDType> {
  /** As x in shape and type: the gradient of x, and of the residual. */
  dX: Tensor<D>
  /** f32 [C]. */
  dWeight: Tensor<'f32'>
}

const backwardNames: Names<RmsNormBackwardArgs> = {
  dOut: true,
  x: true,
  weight: true,
  rstd: true,
  dSum: true,
}

/**
 * The gradients of `rmsNorm`. Sums over rows are taken in f32 in a fixed order.
 *
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { openDevice, rmsNorm, rmsNormBackward } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const x = device.tensor([3, 4], [1, 2])
 * const weight = device.tensor([1, 1], [2])
 * const { rstd } = rmsNorm({ x, weight, eps: 0 })
 * const dOut = device.tensor([1, 1], [1, 2])
 * console.log(await rmsNormBackward({ dOut, x, weight, rstd }).dWeight.read()) // about 0.85, 1.13
 * device.dispose()
 * ```
 */
export function rmsNormBackward<D extends FloatDType>(
  a: RmsNormBackwardArgs<D>,
): Held<RmsNormBackwardResult<D>> {
  const op = 'rmsNormBackward'
  a = checkArguments(a, backwardNames, op)
  const [dX, dWeight] = native().ops.rms_norm_backward!(
    handleOf(a.dOut, 'dOut', op),
    handleOf(a.x, 'x', op),
    handleOf(a.weight, 'weight', op),
    handleOf(a.rstd, 'rstd', op),
    maybeHandle(a.dSum, 'dSum', op),
  ) as unknown[]
  const { device } = a.x
  return held({ dX: wrap<D>(device, dX), dWeight: wrap<'f32'>(device, dWeight) })
}
