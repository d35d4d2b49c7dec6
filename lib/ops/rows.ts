import { checkArguments, hostInts, type Names } from '../arguments.js'
import { composite } from '../composite.js'
import { checkFloatDType, type DType, type FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import { native } from '../native.js'
import { type Held, handleOf, held, type Ints, type Tensor, wrap } from '../tensor.js'

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
  a = checkArguments(a, gatherNames, op)
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
  a = checkArguments(a, gatherBackwardNames, op)
  const dX = native().ops.gather_rows_backward!(
    handleOf(a.dOut, 'dOut', op),
    a.rows,
    hostInts(a.index, 'index', op),
  )
  return wrap(a.dOut.device, dX)
}

/** The arguments of `scatterRows`. */
export interface ScatterRowsArgs<D extends DType = DType> {
  /** [R, ...], any type. */
  x: Tensor<D>
  /** [index.length, ...], of x's type: the rows that replace. */
  y: Tensor<NoInfer<D>>
  /** Which rows of x are replaced: host integers from 0 to R - 1, in any order, without repeats. */
  index: Ints
}

const scatterNames: Names<ScatterRowsArgs> = { x: true, y: true, index: true }

/**
 * x with the rows at indices replaced by those of y, bit for bit, as the embeddings of image tokens are by a
 * vision tower's features.
 *
 * @returns as x in shape and type.
 * @throws P2RError ERR_VALUE for an index out of range or repeated; ERR_SHAPE, ERR_DTYPE for a y that does not fit;
 *   ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { openDevice, scatterRows } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const [x, y] = [device.tensor([1, 2, 3], [3, 1]), device.tensor([10, 20], [2, 1])]
 * console.log(await scatterRows({ x, y, index: [2, 0] }).read()) // Float32Array(3) [ 20, 2, 10 ]
 * device.dispose()
 * ```
 */
export function scatterRows<D extends DType>(a: ScatterRowsArgs<D>): Tensor<D> {
  const op = 'scatterRows'
  a = checkArguments(a, scatterNames, op)
  const out = native().ops.scatter_rows!(
    handleOf(a.x, 'x', op),
    handleOf(a.y, 'y', op),
    hostInts(a.index, 'index', op),
  )
  return wrap(a.x.device, out)
}

/** The arguments of `scatterRowsBackward`. */
export interface ScatterRowsBackwardArgs<D extends FloatDType = FloatDType> {
  /** The gradient with respect to the result of `scatterRows`, [R, ...], f32 | f16 | bf16. */
  dOut: Tensor<D>
  /** As given to `scatterRows`. */
  index: Ints
}

/** The results of `scatterRowsBackward`. */
export interface ScatterRowsBackwardResult<D extends FloatDType = FloatDType> {
  /** [R, ...], of dOut's type: dOut, and 0 in the rows that were replaced. */
  dX: Tensor<D>
  /** [index.length, ...], of dOut's type: those rows of dOut. */
  dY: Tensor<D>
}

const scatterBackwardNames: Names<ScatterRowsBackwardArgs> = { dOut: true, index: true }

/**
 * The gradients of `scatterRows`.
 *
 * @throws P2RError ERR_VALUE for an index out of range or repeated; ERR_SHAPE, ERR_DTYPE for a dOut that does not
 *   fit; ERR_DISPOSED.
 * @example
 * ```js
 * import { openDevice, scatterRowsBackward } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const { dX, dY } = scatterRowsBackward({ dOut: device.tensor([1, 2, 3], [3, 1]), index: [1] })
 * console.log(await dX.read(), await dY.read()) // Float32Array(3) [ 1, 0, 3 ] Float32Array(1) [ 2 ]
 * device.dispose()
 * ```
 */
export function scatterRowsBackward<D extends FloatDType>(
  a: ScatterRowsBackwardArgs<D>,
): Held<ScatterRowsBackwardResult<D>> {
  const op = 'scatterRowsBackward'
  a = checkArguments(a, scatterBackwardNames, op)
  const dOut = handleOf(a.dOut, 'dOut', op)
  const { device } = a.dOut
  checkFloatDType(a.dOut.dtype, 'dOut', op)
  if (a.dOut.shape.length === 0) refuse('ERR_SHAPE', op, 'dOut must have at least 1 axis, got []')
  const index = hostInts(a.index, 'index', op)
  return composite(op, () => {
    const { ops } = native()
    const dX = wrap<D>(device, ops.scatter_rows!(dOut, undefined, index))
    try {
      return held({ dX, dY: wrap<D>(device, ops.gather_rows!(dOut, index)) })
    } catch (error) {
      dX.dispose()
      throw error
    }
  })
}

/** The arguments of `scatterAddRows`. */
export interface ScatterAddRowsArgs<D extends FloatDType = FloatDType> {
  /** [R, ...], f32 | f16 | bf16. */
  x: Tensor<D>
  /** [index.length, ...], of x's type: the rows that are added. */
  y: Tensor<NoInfer<D>>
  /** Where they are added: host integers from 0 to R - 1, in any order, repeats allowed. */
  index: Ints
}

/**
 * x with the rows of y added at indices, as DeepStack adds a vision tower's features to the hidden states of image
 * tokens: in f32, in the order of the indices, rounded once. Its gradients are dOut itself for x, and
 * `gatherRows({ x: dOut, index })` for y.
 *
 * @returns as x in shape and type.
 * @throws P2RError ERR_VALUE for an index out of range; ERR_SHAPE, ERR_DTYPE for tensors that do not fit;
 *   ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { openDevice, scatterAddRows } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const [x, y] = [device.tensor([1, 2, 3], [3, 1]), device.tensor([10, 20], [2, 1])]
 * console.log(await scatterAddRows({ x, y, index: [2, 2] }).read()) // Float32Array(3) [ 1, 2, 33 ]
 * device.dispose()
 * ```
 */
export function scatterAddRows<D extends FloatDType>(a: ScatterAddRowsArgs<D>): Tensor<D> {
  const op = 'scatterAddRows'
  a = checkArguments(a, scatterNames, op)
  const out = native().ops.scatter_add_rows!(
    handleOf(a.x, 'x', op),
    handleOf(a.y, 'y', op),
    hostInts(a.index, 'index', op),
  )
  return wrap(a.x.device, out)
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
  a = checkArguments(a, poolNames, op)
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
  a = checkArguments(a, poolBackwardNames, op)
  const dX = native().ops.mean_pool_backward!(
    handleOf(a.dOut, 'dOut', op),
    hostInts(a.cuSeqlens, 'cuSeqlens', op),
  )
  return wrap(a.dOut.device, dX)
}
