import { checkArguments, type Names } from '../arguments.js'
import type { FloatDType } from '../dtype.js'
import { native } from '../native.js'
import { type Held, handleOf, held, type Tensor, wrap } from '../tensor.js'

/** The arguments of `layerNorm`. */
export interface LayerNormArgs<D extends FloatDType = FloatDType> {
  /** [..., C], f32 | f16 | bf16: normalised over the last axis. */
  x: Tensor<D>
  /** [C], of x's type. */
  weight: Tensor<NoInfer<D>>
  /** [C], of x's type or f32. */
  bias: Tensor<NoInfer<D> | 'f32'>
  /**
   * Added to the variance, at least 0.
   *
   * @default 1e-6
   */
  eps?: number
}

/** The results of `layerNorm`. */
export interface LayerNormResult<D extends FloatDType = FloatDType> {
  /** As x in shape and type. */
  out: Tensor<D>
  /** f32 [rows, 2]: each row's mean and reciprocal standard deviation, for `layerNormBackward`. */
  stats: Tensor<'f32'>
}

const names: Names<LayerNormArgs> = { x: true, weight: true, bias: true, eps: true }

/**
 * Layer normalisation (Ba, Kiros and Hinton, 2016) over the last axis:
 * (x - mean) / √(variance + eps) · weight + bias, in f32, rounded once.
 *
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { layerNorm, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const x = device.tensor([1, 2, 3, 4], [2, 2])
 * const [weight, bias] = [device.tensor([1, 1], [2]), device.zeros([2])]
 * console.log(await layerNorm({ x, weight, bias }).out.read()) // about -1, 1, -1, 1
 * device.dispose()
 * ```
 */
export function layerNorm<D extends FloatDType>(a: LayerNormArgs<D>): Held<LayerNormResult<D>> {
  const op = 'layerNorm'
  a = checkArguments(a, names, op)
  const [out, stats] = native().ops.layer_norm!(
    handleOf(a.x, 'x', op),
    handleOf(a.weight, 'weight', op),
    handleOf(a.bias, 'bias', op),
    a.eps ?? 1e-6,
  ) as unknown[]
  const { device } = a.x
  return held({ out: wrap<D>(device, out), stats: wrap<'f32'>(device, stats) })
}

/** The arguments of `layerNormBackward`. */
export interface LayerNormBackwardArgs<D extends FloatDType = FloatDType> {
  /** The gradient with respect to `out`; as x in shape and type. */
  dOut: Tensor<NoInfer<D>>
  /** As given to `layerNorm`. */
  x: Tensor<D>
  /** As given to `layerNorm`. */
  weight: Tensor<NoInfer<D>>
  /** As `layerNorm` returned them for this x. */
  stats: Tensor<'f32'>
}

/** The results of `layerNormBackward`. */
export interface LayerNormBackwardResult<D extends FloatDType = FloatDType> {
  /** As x in shape and type. */
  dX: Tensor<D>
  /** f32 [C]. */
  dWeight: Tensor<'f32'>
  /** f32 [C]. */
  dBias: Tensor<'f32'>
}

const backwardNames: Names<LayerNormBackwardArgs> = {
  dOut: true,
  x: true,
  weight: true,
  stats: true,
}

/**
 * The gradients of `layerNorm`. Sums over rows are taken in f32 in a fixed order.
 *
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { layerNorm, layerNormBackward, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const x = device.tensor([1, 2, 3, 5], [2, 2])
 * const [weight, bias] = [device.tensor([1, 1], [2]), device.zeros([2])]
 * const { stats } = layerNorm({ x, weight, bias })
 * const dOut = device.tensor([1, 0, 0, 1], [2, 2])
 * console.log(await layerNormBackward({ dOut, x, weight, stats }).dBias.read()) // Float32Array(2) [ 1, 1 ]
 * device.dispose()
 * ```
 */
export function layerNormBackward<D extends FloatDType>(
  a: LayerNormBackwardArgs<D>,
): Held<LayerNormBackwardResult<D>> {
  const op = 'layerNormBackward'
  a = checkArguments(a, backwardNames, op)
  const [dX, dWeight, dBias] = native().ops.layer_norm_backward!(
    handleOf(a.dOut, 'dOut', op),
    handleOf(a.x, 'x', op),
    handleOf(a.weight, 'weight', op),
    handleOf(a.stats, 'stats', op),
  ) as unknown[]
  const { device } = a.x
  return held({
    dX: wrap<D>(device, dX),
    dWeight: wrap<'f32'>(device, dWeight),
    dBias: wrap<'f32'>(device, dBias),
  })
}
