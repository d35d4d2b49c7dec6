import { choice } from '../arguments.js'
import { native } from '../native.js'
import { handleOf, type Tensor, wrap } from '../tensor.js'

type Approximate = 'none' | 'tanh'

/**
 * GELU (Hendrycks and Gimpel, 2016), element by element.
 *
 * @param a.x any shape, f32 | f16 | bf16.
 * @param a.approximate 'none' (default): x Φ(x) by erf; 'tanh': the tanh form.
 * @returns as x in shape and type.
 */
export function gelu(a: { x: Tensor; approximate?: Approximate }): Tensor {
  const out = native().ops.gelu!(handleOf(a.x, 'x', 'gelu'), usesTanh(a.approximate, 'gelu'))
  return wrap(a.x.device, out)
}

/** The gradient with respect to x: dOut · GELU'(x), as x in shape and type. */
export function geluBackward(a: { dOut: Tensor; x: Tensor; approximate?: Approximate }): Tensor {
  const op = 'geluBackward'
  const dX = native().ops.gelu_backward!(
    handleOf(a.dOut, 'dOut', op),
    handleOf(a.x, 'x', op),
    usesTanh(a.approximate, op),
  )
  return wrap(a.x.device, dX)
}

function usesTanh(approximate: Approximate = 'none', op: string): boolean {
  return choice(approximate, ['none', 'tanh'], 'approximate', op) === 'tanh'
}
