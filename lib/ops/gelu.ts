import { checkArguments, choice, type Names } from '../arguments.js'
import type { FloatDType } from '../dtype.js'
import { native } from '../native.js'
import { handleOf, type Tensor, wrap } from '../tensor.js'

/** The forms of GELU: exact, and the approximation by tanh. */
export type GeluForm = 'none' | 'tanh'

/** The arguments of `gelu`. */
export interface GeluArgs<D extends FloatDType = FloatDType> {
  /** Any shape, f32 | f16 | bf16. */
  x: Tensor<D>
  /**
   * 'none': x Φ(x), by erf; 'tanh': x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2. PyTorch's names.
   *
   * @default 'none'
   */
  approximate?: GeluForm
}

const names: Names<GeluArgs> = { x: true, approximate: true }

/**
 * GELU (Hendrycks and Gimpel, 2016), element by element: x Φ(x), in f32, rounded once.
 *
 * @returns as x in shape and type.
 * @throws P2RError ERR_DTYPE for a type that is not floating point; ERR_VALUE; ERR_DISPOSED.
 * @example
 * ```js
 * import { gelu, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const x = device.tensor([-1, 0, 1], [3])
 * console.log(await gelu({ x }).read()) // about -0.159, 0, 0.841
 * device.dispose()
 * ```
 */
export function gelu<D extends FloatDType>(a: GeluArgs<D>): Tensor<D> {
  const op = 'gelu'
  a = checkArguments(a, names, op)
  const out = native().ops.gelu!(handleOf(a.x, 'x', op), usesTanh(a.approximate, op))
  return wrap(a.x.device, out)
}

/** The arguments of `geluBackward`. */
export interface GeluBackwardArgs<D extends FloatDType = FloatDType> {
  /** The gradient with respect to the result; as x in shape and type. */
  dOut: Tensor<NoInfer<D>>
  /** As given to `gelu`. */
  x: Tensor<D>
  /**
   * As given to `gelu`.
   *
   * @default 'none'
   */
  approximate?: GeluForm
}

const backwardNames: Names<GeluBackwardArgs> = { dOut: true, x: true, approximate: true }

/**
 * The gradient of `gelu` with respect to x: dOut · GELU'(x).
 *
 * @returns as x in shape and type.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { geluBackward, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const x = device.tensor([-1, 0, 1], [3])
 * const dOut = device.tensor([1, 1, 1], [3])
 * console.log(await geluBackward({ dOut, x }).read()) // about -0.083, 0.5, 1.083
 * device.dispose()
 * ```
 */
export function geluBackward<D extends FloatDType>(a: GeluBackwardArgs<D>): Tensor<D> {
  const op = 'geluBackward'
  a = checkArguments(a, backwardNames, op)
  const dX = native().ops.gelu_backward!(
    handleOf(a.dOut, 'dOut', op),
    handleOf(a.x, 'x', op),
    usesTanh(a.approximate, op),
  )
  return wrap(a.x.device, dX)
}

function usesTanh(approximate: GeluForm = 'none', op: string): boolean {
  return choice(approximate, ['none', 'tanh'], 'approximate', op) === 'tanh'
}
