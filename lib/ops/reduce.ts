import { checkArguments, hostInts, type Names } from '../arguments.js'
import type { FloatDType } from '../dtype.js'
import { native } from '../native.js'
import { handleOf, type Ints, type Tensor, wrap } from '../tensor.js'

/** The arguments of `sum` and `mean`. */
export interface ReduceArgs<D extends FloatDType = FloatDType> {
  /** Any shape, f32 | f16 | bf16. */
  x: Tensor<D>
  /**
   * The axes that are summed: integers from 0, or from -1 for the last, in any order, without repeats.
   *
   * @default all
   */
  axes?: Ints
  /**
   * Keeps the summed axes, with size 1.
   *
   * @default false
   */
  keepDims?: boolean
}

/** The arguments of `sum`. */
export type SumArgs<D extends FloatDType = FloatDType> = ReduceArgs<D>
/** The arguments of `mean`. */
export type MeanArgs<D extends FloatDType = FloatDType> = ReduceArgs<D>

const names: Names<ReduceArgs> = { x: true, axes: true, keepDims: true }

function reduce<D extends FloatDType>(op: 'sum' | 'mean', a: ReduceArgs<D>): Tensor<D> {
  a = checkArguments(a, names, op)
  const out = native().ops[op]!(
    handleOf(a.x, 'x', op),
    a.axes === undefined ? undefined : hostInts(a.axes, 'axes', op),
    a.keepDims ?? false,
  )
  return wrap(a.x.device, out)
}

/**
 * The sum over axes, in f32, rounded once, in a fixed order. Its gradient is dOut, repeated over them:
 * `add({ x: zeros, y: dOut })` with axes of size 1 in dOut. A sum of none is 0.
 *
 * @returns of x's type, without the summed axes unless `keepDims`; [] of all axes.
 * @throws P2RError ERR_DTYPE for another type; ERR_VALUE for axes that x does not have, or has once; ERR_DISPOSED.
 * @example
 * ```js
 * import { openDevice, sum } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const x = device.tensor([1, 2, 3, 4, 5, 6], [2, 3])
 * console.log(await sum({ x, axes: [0] }).read(), await sum({ x }).item()) // Float32Array(3) [ 5, 7, 9 ] 21
 * device.dispose()
 * ```
 */
export function sum<D extends FloatDType>(a: SumArgs<D>): Tensor<D> {
  return reduce('sum', a)
}

/**
 * The mean over axes: as `sum`, divided by the number of elements. A mean of none is NaN.
 *
 * @returns of x's type, without the averaged axes unless `keepDims`; [] of all axes.
 * @throws P2RError ERR_DTYPE for another type; ERR_VALUE for axes that x does not have, or has once; ERR_DISPOSED.
 * @example
 * ```js
 * import { mean, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const x = device.tensor([1, 2, 3, 4, 5, 6], [2, 3])
 * console.log(mean({ x, axes: [-1], keepDims: true }).shape, await mean({ x }).item()) // [ 2, 1 ] 3.5
 * device.dispose()
 * ```
 */
export function mean<D extends FloatDType>(a: MeanArgs<D>): Tensor<D> {
  return reduce('mean', a)
}
