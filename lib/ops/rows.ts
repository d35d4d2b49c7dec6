import { checkArguments, hostInts, type Names } from '../arguments.js'
import type { DType, FloatDType } from '../dtype.js'
import { native } from '../native.js'
import { handleOf, type Ints, type Tensor, wrap } from '../tensor.js'

/** The arguments of `add`. */
export interface AddArgs<D extends FloatDType = FloatDType> {
  /** Any shape, f32 | f16 | bf16. */
  x: Tensor<D>
  /** Of x's type; its shape is x's or the end of it. */
  y: Tensor<NoInfer<D>>
}

const addNames: Names<AddArgs> = { x: true, y: true }

/**
 * x + y. y may lack leading axes of x and is then repeated over them, as a position embedding is over
 * a batch. Its gradient is the sum over them: `gatherRowsBackward` with an index of zeros and one row.
 *
 * @returns as x in shape and type.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { add, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const x = device.tensor([1, 2, 3, 4], [2, 2])
 * const y = device.tensor([10, 20], [2])
 * console.log(await add({ x, y }).read()) // Float32Array(4) [ 11, 22, 13, 24 ]
 * device.dispose()
 * ```
 */
export function add<D extends FloatDType>(a: AddArgs<D>): Tensor<D> {
  checkArguments(a, addNames, 'add')
  const out = native().ops.add!(handleOf(a.x, 'x', 'add'), handleOf(a.y, 'y', 'add'))
  return wrap(a.x.device, out)
}

/** The arguments of `gatherRows`. */
export interface GatherRowsArgs<D extends DType = DType> {
  /** [R, ...], any type. */
  x: Tensor<D>
  /** Host integers from 0 to R - 1, in any order, repeats allowed. */
  index: Ints
}

const gatherNames: Names<GatherRowsArgs> = { x: true, index: true }

/**
 * Rows of x at indices, in their order, copied bit for bit.
 *
 * @returns [index.length, ...], of x's type.
 * @throws P2RError ERR_VALUE for an index out of range; ERR_SHAPE for a scalar; ERR_DISPOSED.
 * @example
 * ```js
 * import { gatherRows, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const x = device.tensor([1, 2, 3, 4], [2, 2])
 * console.log(await gatherRows({ x, index: [1, 1, 0] }).read()) // Float32Array(6) [ 3, 4, 3, 4, 1, 2 ]
 * device.dispose()
 * ```
 */
export function gatherRows<D extends DType>(a: GatherRowsArgs<D>): Tensor<D> {
  const op = 'gatherRows'
  checkArguments(a, gatherNames, op)
  const out = native().ops.gather_rows!(handleOf(a.x, 'x', op), hostInts(a.index, 'index', op))
  return wrap(a.x.device, out)
}

/** The arguments of `gatherRowsBackward`. */
export interface GatherRowsBackwardArgs<D extends FloatDType = FloatDType> {
  /** [index.length, ...], f32 | f16 | bf16. */
  dOut: Tensor<D>
  /** As given to `gatherRows`. */
  index: Ints
  /** The number of rows that x had. */
  rows: number
}

const gatherBackwardNames: Names<GatherRowsBackwardArgs> = { dOut: true, index: true, rows: true }

/**
 * The gradient of `gatherRows`: row r of the result is the sum of the rows of dOut whose index is r, added
 * in f32 in a fixed order; 0 where there is none.
 *
 * @returns [rows, ...], of dOut's type.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for an index out of range;
 *   ERR_DISPOSED.
 * @example
 * ```js
 * import { gatherRowsBackward, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const dOut = device.tensor([1, 10, 100], [3, 1])
 * console.log(await gatherRowsBackward({ dOut, index: [1, 1, 0], rows: 3 }).read()) // Float32Array(3) [ 100, 11, 0 ]
 * device.dispose()
 * ```
 */
export function gatherRowsBackward<D extends FloatDType>(a: GatherRowsBackwardArgs<D>): Tensor<D> {
  const op = 'gatherRowsBackward'
  checkArguments(a, gatherBackwardNames, op)
  const dX = native().ops.gather_rows_backward!(
    handleOf(a.dOut, 'dOut', op),
    a.rows,
    hostInts(a.index, 'index', op),
  )
  return wrap(a.dOut.device, dX)
}

/** The arguments of `meanPool`. */
export interface MeanPoolArgs<D extends FloatDType = FloatDType> {
  /** [T, C], f32 | f16 | bf16. */
  x: Tensor<D>
  /** Where the B sequences begin and end: 0 = c₀ ≤ c₁ ≤ … ≤ c_B = T. */
  cuSeqlens: Ints
}

const poolNames: Names<MeanPoolArgs> = { x: true, cuSeqlens: true }

/**
 * The mean of each packed sequence. An empty sequence's mean is 0.
 *
 * @returns [B, C], of x's type.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for a tensor that does not fit; ERR_VALUE for cuSeqlens that break
 *   their rule; ERR_DISPOSED.
 * @example
 * ```js
 * import { meanPool, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const x = device.tensor([1, 3, 10], [3, 1])
 * console.log(await meanPool({ x, cuSeqlens: [0, 2, 3] }).read()) // Float32Array(2) [ 2, 10 ]
 * device.dispose()
 * ```
 */
export function meanPool<D extends FloatDType>(a: MeanPoolArgs<D>): Tensor<D> {
  const op = 'meanPool'
  checkArguments(a, poolNames, op)
  const out = native().ops.mean_pool!(
    handleOf(a.x, 'x', op),
    hostInts(a.cuSeqlens, 'cuSeqlens', op),
  )
  return wrap(a.x.device, out)
}

/** The arguments of `meanPoolBackward`. */
export interface MeanPoolBackwardArgs<D extends FloatDType = FloatDType> {
  /** [B, C], f32 | f16 | bf16. */
  dOut: Tensor<D>
  /** As given to `meanPool`. */
  cuSeqlens: Ints
}

const poolBackwardNames: Names<MeanPoolBackwardArgs> = { dOut: true, cuSeqlens: true }

/**
 * The gradient of `meanPool`: each token of a sequence gets dOut's row divided by the sequence's length.
 *
 * @returns [T, C], of dOut's type.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for a tensor that does not fit; ERR_VALUE for cuSeqlens that break
 *   their rule; ERR_DISPOSED.
 * @example
 * ```js
 * import { meanPoolBackward, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const dOut = device.tensor([2, 10], [2, 1])
 * console.log(await meanPoolBackward({ dOut, cuSeqlens: [0, 2, 3] }).read()) // Float32Array(3) [ 1, 1, 10 ]
 * device.dispose()
 * ```
 */
export function meanPoolBackward<D extends FloatDType>(a: MeanPoolBackwardArgs<D>): Tensor<D> {
  const op = 'meanPoolBackward'
  checkArguments(a, poolBackwardNames, op)
  const dX = native().ops.mean_pool_backward!(
    handleOf(a.dOut, 'dOut', op),
    hostInts(a.cuSeqlens, 'cuSeqlens', op),
  )
  return wrap(a.dOut.device, dX)
}
