import { checkArguments, type Names } from '../arguments.js'
import type { FloatDType } from '../dtype.js'
import { native } from '../native.js'
import { handleOf, type Tensor, wrap } from '../tensor.js'

/** The operands of `add` and `mul`. */
export interface Operands<D extends FloatDType = FloatDType> {
  /** Any shape, f32 | f16 | bf16. */
  x: Tensor<D>
  /** Of x's type; its shape broadcasts with x's, as NumPy's do. */
  y: Tensor<NoInfer<D>>
}

/** The arguments of `add`. */
export type AddArgs<D extends FloatDType = FloatDType> = Operands<D>
/** The arguments of `mul`. */
export type MulArgs<D extends FloatDType = FloatDType> = Operands<D>

const names: Names<Operands> = { x: true, y: true }

/**
 * x + y, in f32, rounded once. Shapes are aligned at their last axes; an axis of size 1, or one that the other shape
 * has in addition, is repeated: a bias [C] over [T, C], a column [T, 1] over [T, C]. The gradient of a repeated
 * operand is the `sum` over the axes along which it was repeated.
 *
 * @returns of x's type, in the shape that x and y broadcast to.
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
  a = checkArguments(a, names, 'add')
  const out = native().ops.add!(handleOf(a.x, 'x', 'add'), handleOf(a.y, 'y', 'add'))
  return wrap(a.x.device, out)
}

/**
 * x · y, element by element, in f32, rounded once; shapes as in `add`. The gradient with respect to x is
 * `mul({ x: dOut, y })`, summed over the axes along which x was repeated.
 *
 * @returns of x's type, in the shape that x and y broadcast to.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { mul, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const row = device.tensor([1, 2, 3], [3])
 * const column = device.tensor([10, 20], [2, 1])
 * console.log(await mul({ x: row, y: column }).read()) // Float32Array(6) [ 10, 20, 30, 20, 40, 60 ]
 * device.dispose()
 * ```
 */
export function mul<D extends FloatDType>(a: MulArgs<D>): Tensor<D> {
  a = checkArguments(a, names, 'mul')
  const out = native().ops.mul!(handleOf(a.x, 'x', 'mul'), handleOf(a.y, 'y', 'mul'))
  return wrap(a.x.device, out)
}
