import { checkArguments, checkArray, checkInteger, hostInts, type Names } from '../arguments.js'
import type { DType } from '../dtype.js'
import { refuse } from '../errors.js'
import { native } from '../native.js'
import { handleOf, handlesOf, type Ints, type Tensor, wrap } from '../tensor.js'

/** The arguments of `concat`. */
export interface ConcatArgs<D extends DType = DType> {
  /** At least one, of one type, and of one shape but for the size of the axis. */
  tensors: readonly Tensor<D>[]
  /**
   * Along which they are joined: from 0, or from -1 for the last.
   *
   * @default 0
   */
  axis?: number
}

const concatNames: Names<ConcatArgs> = { tensors: true, axis: true }

/**
 * Tensors one after another along an axis, copied bit for bit. Its gradient is `split`.
 *
 * @returns of their type.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for none, or another axis; ERR_DEVICE;
 *   ERR_DISPOSED.
 * @example
 * ```js
 * import { concat, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const tensors = [device.tensor([1, 2], [2, 1]), device.tensor([3, 4], [2, 1])]
 * console.log(await concat({ tensors, axis: 1 }).read()) // Float32Array(4) [ 1, 3, 2, 4 ]
 * device.dispose()
 * ```
 */
export function concat<D extends DType>(a: ConcatArgs<D>): Tensor<D> {
  const op = 'concat'
  a = checkArguments(a, concatNames, op)
  const tensors = checkArray(a.tensors, 'tensors', op, 'an array of Tensors')
  const handles = handlesOf(tensors, 'tensors', op)
  if (handles.length === 0) refuse('ERR_VALUE', op, 'tensors must not be empty')
  return wrap(tensors[0]!.device, native().ops.concat!(handles, a.axis ?? 0))
}

/** The arguments of `split`. */
export interface SplitArgs<D extends DType = DType> {
  /** [...], any type; at least one axis. */
  x: Tensor<D>
  /** The parts' sizes along the axis, which add up to x's. */
  sizes: Ints
  /**
   * Along which x is cut: from 0, or from -1 for the last.
   *
   * @default 0
   */
  axis?: number
}

const splitNames: Names<SplitArgs> = { x: true, sizes: true, axis: true }

/**
 * The parts of a tensor along an axis, copied bit for bit. Its gradient is `concat`. Along the first axis,
 * `slice` is a view without a copy.
 *
 * @returns one tensor for each size, of x's type.
 * @throws P2RError ERR_SHAPE for a scalar; ERR_VALUE for another axis, or sizes that do not add up; ERR_DISPOSED.
 * @example
 * ```js
 * import { openDevice, split } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const x = device.tensor([1, 2, 3, 4, 5, 6], [2, 3])
 * const [left, right] = split({ x, sizes: [2, 1], axis: 1 })
 * console.log(await left.read(), await right.read()) // Float32Array(4) [ 1, 2, 4, 5 ] Float32Array(2) [ 3, 6 ]
 * device.dispose()
 * ```
 */
export function split<D extends DType>(a: SplitArgs<D>): Tensor<D>[] {
  const op = 'split'
  a = checkArguments(a, splitNames, op)
  const parts = native().ops.split!(
    handleOf(a.x, 'x', op),
    a.axis ?? 0,
    hostInts(a.sizes, 'sizes', op),
  )
  return [parts].flat().map((part) => wrap<D>(a.x.device, part))
}

/** The arguments of `transpose`. */
export interface TransposeArgs<D extends DType = DType> {
  /** [...], any type; at least one axis. */
  x: Tensor<D>
  /**
   * The two axes that are exchanged: from 0, or from -1 for the last.
   *
   * @default [-2, -1]
   */
  axes?: readonly [number, number]
}

const transposeNames: Names<TransposeArgs> = { x: true, axes: true }

/**
 * x with two axes exchanged, copied bit for bit. Its gradient is itself.
 *
 * @returns of x's type.
 * @throws P2RError ERR_SHAPE for too few axes; ERR_VALUE for axes that x does not have; ERR_DISPOSED.
 * @example
 * ```js
 * import { openDevice, transpose } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const x = device.tensor([1, 2, 3, 4, 5, 6], [2, 3])
 * console.log(await transpose({ x }).read()) // Float32Array(6) [ 1, 4, 2, 5, 3, 6 ]
 * device.dispose()
 * ```
 */
export function transpose<D extends DType>(a: TransposeArgs<D>): Tensor<D> {
  const op = 'transpose'
  a = checkArguments(a, transposeNames, op)
  const x = handleOf(a.x, 'x', op)
  const axes = checkArray(a.axes ?? [-2, -1], 'axes', op, 'two axes')
  if (axes.length !== 2) refuse('ERR_VALUE', op, `axes must be two axes, got ${axes.length}`)
  for (const [k, axis] of axes.entries()) checkInteger(axis, -8, `axes[${k}]`, op)
  return wrap(a.x.device, native().ops.transpose!(x, axes[0], axes[1]))
}
