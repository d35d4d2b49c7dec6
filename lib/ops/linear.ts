import { checkArguments, choice, type Names } from '../arguments.js'
import type { Device } from '../device.js'
import type { FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import { native, type TensorHandle } from '../native.js'
import { type Held, handleOf, held, maybeHandle, type Tensor, wrap } from '../tensor.js'
import { QuantizedWeight } from './quantize.js'

/** The arguments of `linear`. A quantised weight is for inference: it has no gradients. */
export interface LinearArgs<D extends FloatDType = FloatDType> {
  /** [..., C], f32 | f16 | bf16. */
  x: Tensor<D>
  /** [F, C], of x's type; or quantised, for an x of any type. */
  weight: Tensor<NoInfer<D>> | QuantizedWeight
  /** [F], of x's type or f32; added if given. */
  bias?: Tensor<NoInfer<D> | 'f32'>
  /**
   * The result's type, x's or f32. In f32 the sums are not rounded: logits so made are those that
   * `linearLogProbs` has inside, on the CPU to the bit.
   *
   * @default x's type
   */
  dtype?: NoInfer<D> | 'f32'
}

const names: Names<LinearArgs> = { x: true, weight: true, bias: true, dtype: true }

/**
 * A linear layer: x · weightᵀ + bias. Sums are f32 and rounded once. On the CPU a row has the same bits alone,
 * in any batch and with any number of threads; up to 16 rows take as long as reading the weight once. A quantised
 * weight counts with its values as they are, see `quantize`.
 *
 * @returns [..., F], of x's type or of `dtype`.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { linear, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const x = device.tensor([1, 2], [1, 2])
 * const weight = device.tensor([1, 0, 0, 1, 1, 1], [3, 2])
 * console.log(await linear({ x, weight }).read()) // Float32Array(3) [ 1, 2, 3 ]
 * device.dispose()
 * ```
 */
export function linear<D extends FloatDType>(a: LinearArgs<D> & { dtype?: NoInfer<D> }): Tensor<D>
export function linear<D extends FloatDType>(a: LinearArgs<D> & { dtype: 'f32' }): Tensor<'f32'>
export function linear<D extends FloatDType>(a: LinearArgs<D>): Tensor<D | 'f32'>
export function linear<D extends FloatDType>(a: LinearArgs<D>): Tensor<D | 'f32'> {
  const op = 'linear'
  a = checkArguments(a, names, op)
  const x = handleOf(a.x, 'x', op)
  const dtype = a.dtype === undefined ? x.dtype : choice(a.dtype, [x.dtype, 'f32'], 'dtype', op)
  if (a.weight instanceof QuantizedWeight) {
    const { weight, bias } = a
    const out = native().ops.quantized_linear!(
      x,
      ...quantizedArguments(op, { weight, bias }),
      dtype === 'f32',
    )
    return wrap(a.x.device, out)
  }
  const out = native().ops.linear!(
    x,
    handleOf(a.weight, 'weight', op),
    maybeHandle(a.bias, 'bias', op),
    dtype === 'f32',
  )
  return wrap(a.x.device, out)
}

/** @internal A layer of a quantised weight as the addon takes it. */
export function quantizedArguments(
  op: string,
  { weight, bias }: { weight: QuantizedWeight; bias: Tensor | undefined },
): unknown[] {
  const { values, scales, bits, group, shape } = weight
  return [
    handleOf(values, 'weight', op),
    handleOf(scales, 'weight', op),
    maybeHandle(bias, 'bias', op),
    bits,
    group,
    ...shape,
  ]
}

/** Where the gradients of weight and bias are added, for sums over several calls. */
export interface WeightGradients {
  /** f32, of the weight's shape. */
  dWeight: Tensor<'f32'>
  /** f32, of the bias's shape; only with a bias. */
  dBias?: Tensor<'f32'>
}

/** The arguments of `linearBackward`. */
export interface LinearBackwardArgs<D extends FloatDType = FloatDType> {
  /** [..., F], of x's type: the gradient with respect to the result. */
  dOut: Tensor<NoInfer<D>>
  /** As given to `linear`. */
  x: Tensor<D>
  /** As given to `linear`. */
  weight: Tensor<NoInfer<D>>
  /** [F], the layer's bias, if it has one: dBias is then a result. Its values are not read. */
  bias?: Tensor<NoInfer<D> | 'f32'>
  /**
   * The gradients of weight and bias are added to these tensors; the results are new handles on the same
   * storage.
   *
   * @default new tensors
   */
  into?: WeightGradients
}

/** The results of `linearBackward`. */
export interface LinearBackwardResult<D extends FloatDType = FloatDType> {
  /** As x in shape and type. */
  dX: Tensor<D>
  /** f32 [F, C]. */
  dWeight: Tensor<'f32'>
}

/** A further result of a layer with a bias. */
export interface BiasGradient {
  /** f32, of the bias's shape. */
  dBias: Tensor<'f32'>
}

const backwardNames: Names<LinearBackwardArgs> = {
  dOut: true,
  x: true,
  weight: true,
  bias: true,
  into: true,
}

/**
 * The gradients of `linear`. Sums are f32, in a fixed order; dX is rounded once.
 *
 * @returns dX and dWeight; dBias exactly if a bias is given.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { linearBackward, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const x = device.tensor([1, 2], [1, 2])
 * const weight = device.tensor([1, 0, 0, 1, 1, 1], [3, 2])
 * const dOut = device.tensor([1, 1, 1], [1, 3])
 * const { dX, dWeight } = linearBackward({ dOut, x, weight })
 * console.log(await dX.read(), dWeight.shape) // Float32Array(2) [ 2, 2 ] [ 3, 2 ]
 * device.dispose()
 * ```
 */
export function linearBackward<D extends FloatDType>(
  a: LinearBackwardArgs<D> & { bias: Tensor },
): Held<LinearBackwardResult<D> & BiasGradient>
export function linearBackward<D extends FloatDType>(
  a: LinearBackwardArgs<D> & { bias?: never },
): Held<LinearBackwardResult<D>>
export function linearBackward<D extends FloatDType>(
  a: LinearBackwardArgs<D>,
): Held<LinearBackwardResult<D> & Partial<BiasGradient>>
export function linearBackward<D extends FloatDType>(
  a: LinearBackwardArgs<D>,
): Held<LinearBackwardResult<D> & Partial<BiasGradient>> {
  const op = 'linearBackward'
  a = checkArguments(a, backwardNames, op)
  if ((a.weight as unknown) instanceof QuantizedWeight)
    refuse('ERR_VALUE', op, 'weight is quantised, and has no gradients; expected a Tensor')
  const made = native().ops.linear_backward!(
    handleOf(a.dOut, 'dOut', op),
    handleOf(a.x, 'x', op),
    handleOf(a.weight, 'weight', op),
    maybeHandle(a.bias, 'bias', op),
    ...intoArguments(a.into, op),
  )
  return held(linearGradients<D>(made, a.into, a.x.device))
}

const intoNames: Names<WeightGradients> = { dWeight: true, dBias: true }

/** @internal The argument `into` as the addon takes it. */
export function intoArguments(
  into: WeightGradients | undefined,
  op: string,
): (TensorHandle | null)[] {
  if (into === undefined) return [null, null]
  const { dWeight, dBias } = checkArguments(into, intoNames, op, 'into')
  return [handleOf(dWeight, 'into.dWeight', op), maybeHandle(dBias, 'into.dBias', op)]
}

/** @internal The addon's result or results; those added into `into` become new handles on its storage. */
export function linearGradients<D extends FloatDType>(
  made: unknown,
  into: WeightGradients | undefined,
  device: Device,
): LinearBackwardResult<D> & Partial<BiasGradient> {
  const results = [made].flat()
  const dX = wrap<D>(device, results.shift())
  const gradient = (accumulated: Tensor<'f32'> | undefined): Tensor<'f32'> | undefined => {
    if (accumulated) return accumulated.reshape(accumulated.shape)
    return results.length ? wrap<'f32'>(device, results.shift()) : undefined
  }
  const dWeight = gradient(into?.dWeight)!
  const dBias = gradient(into?.dBias)
  return dBias ? { dX, dWeight, dBias } : { dX, dWeight }
}
