import { hostInts } from '../arguments.js'
import { native } from '../native.js'
import { handleOf, type Ints, type Tensor, wrap } from '../tensor.js'

/**
 * x + y. y may lack leading axes of x and is then repeated over them, as a position embedding is over
 * a batch. Its gradient is the sum over them: `gatherRowsBackward` with an index of zeros and one row.
 *
 * @param a.x any shape, f32 | f16 | bf16.
 * @param a.y of x's type; its shape is x's or the end of it.
 * @returns as x.
 */
export function add(a: { x: Tensor; y: Tensor }): Tensor {
  const out = native().ops.add!(handleOf(a.x, 'x', 'add'), handleOf(a.y, 'y', 'add'))
  return wrap(a.x.device, out)
}

/**
 * Rows of x at indices, in their order: [index.length, ...].
 *
 * @param a.x [R, ...], any type.
 * @param a.index host integers from 0 to R - 1, repeats allowed.
 */
export function gatherRows(a: { x: Tensor; index: Ints }): Tensor {
  const op = 'gatherRows'
  const out = native().ops.gather_rows!(handleOf(a.x, 'x', op), hostInts(a.index, 'index', op))
  return wrap(a.x.device, out)
}

/**
 * The gradient of `gatherRows`: row r of the result [rows, ...] is the sum of the rows of dOut whose
 * index is r, added in f32 in a fixed order; 0 where there is none.
 *
 * @param a.dOut [index.length, ...], f32 | f16 | bf16.
 * @param a.rows the number of rows that x had.
 */
export function gatherRowsBackward(a: { dOut: Tensor; index: Ints; rows: number }): Tensor {
  const op = 'gatherRowsBackward'
  const dX = native().ops.gather_rows_backward!(
    handleOf(a.dOut, 'dOut', op),
    a.rows,
    hostInts(a.index, 'index', op),
  )
  return wrap(a.dOut.device, dX)
}

/**
 * The mean of each packed sequence: [T, C] -> [B, C]. An empty sequence's mean is 0.
 *
 * @param a.x [T, C], f32 | f16 | bf16.
 * @param a.cuSeqlens [B + 1], from 0 to T, not falling.
 */
export function meanPool(a: { x: Tensor; cuSeqlens: Ints }): Tensor {
  const op = 'meanPool'
  const out = native().ops.mean_pool!(
    handleOf(a.x, 'x', op),
    hostInts(a.cuSeqlens, 'cuSeqlens', op),
  )
  return wrap(a.x.device, out)
}

/** The gradient of `meanPool`: each token of a sequence gets dOut's row divided by its length. */
export function meanPoolBackward(a: { dOut: Tensor; cuSeqlens: Ints }): Tensor {
  const op = 'meanPoolBackward'
  const dX = native().ops.mean_pool_backward!(
    handleOf(a.dOut, 'dOut', op),
    hostInts(a.cuSeqlens, 'cuSeqlens', op),
  )
  return wrap(a.dOut.device, dX)
}
