import { refuse } from '../errors.js'
import { native } from '../native.js'
import { type Held, handleOf, held, maybeHandle, type Tensor, wrap } from '../tensor.js'

/**
 * A linear layer: x · weightᵀ + bias.
 *
 * @param a.x [..., C], f32 | f16 | bf16.
 * @param a.weight [F, C], of x's type.
 * @param a.bias [F], of x's type or f32; none unless given.
 * @returns [..., F], of x's type; sums are f32 and rounded once.
 */
export function linear(a: { x: Tensor; weight: Tensor; bias?: Tensor }): Tensor {
  const op = 'linear'
  const out = native().ops.linear!(
    handleOf(a.x, 'x', op),
    handleOf(a.weight, 'weight', op),
    maybeHandle(a.bias, 'bias', op),
  )
  return wrap(a.x.device, out)
}

/**
 * The gradients of a linear layer.
 *
 * @param a.dOut [..., F], the gradient of the result, of x's type.
 * @param a.bias the layer's bias, if it has one; its values are not read.
 * @param a.into f32 tensors to which the gradients of weight and bias are added, for sums over several
 *   calls. They come back as further handles on the same storage.
 * @returns dX as x; dWeight f32 [F, C]; dBias f32 [F] if a bias was given.
 */
export function linearBackward(a: {
  dOut: Tensor
  x: Tensor
  weight: Tensor
  bias?: Tensor
  into?: { dWeight: Tensor; dBias?: Tensor }
}): Held<{ dX: Tensor; dWeight: Tensor; dBias?: Tensor }> {
  const op = 'linearBackward'
  const { into } = a
  if (into !== undefined && (typeof into !== 'object' || into === null))
    refuse('ERR_VALUE', op, `into must be { dWeight, dBias }, got ${String(into)}`)
  const made = native().ops.linear_backward!(
    handleOf(a.dOut, 'dOut', op),
    handleOf(a.x, 'x', op),
    handleOf(a.weight, 'weight', op),
    maybeHandle(a.bias, 'bias', op),
    into ? handleOf(into.dWeight, 'into.dWeight', op) : null,
    into ? maybeHandle(into.dBias, 'into.dBias', op) : null,
  )
  const results = (Array.isArray(made) ? made : [made]).map((handle) => wrap(a.x.device, handle))
  const dX = results.shift()!
  const dWeight = into ? into.dWeight.reshape(into.dWeight.shape) : results.shift()!
  const dBias = into?.dBias ? into.dBias.reshape(into.dBias.shape) : results.shift()
  return held(dBias ? { dX, dWeight, dBias } : { dX, dWeight })
}
