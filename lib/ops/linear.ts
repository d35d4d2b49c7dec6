import { checkObject } from '../arguments.js'
import type { Device } from '../device.js'
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
 *   calls. The results are new handles on the same storage.
 * @returns dX as x; dWeight f32 [F, C]; dBias f32 [F] if a bias was given.
 */
export function linearBackward(a: {
  dOut: Tensor
  x: Tensor
  weight: Tensor
  bias?: Tensor
  into?: WeightGradients
}): Held<{ dX: Tensor; dWeight: Tensor; dBias?: Tensor }> {
  const op = 'linearBackward'
  const made = native().ops.linear_backward!(
    handleOf(a.dOut, 'dOut', op),
    handleOf(a.x, 'x', op),
    handleOf(a.weight, 'weight', op),
    maybeHandle(a.bias, 'bias', op),
    ...intoArguments(a.into, op),
  )
  return held(linearGradients(made, a.into, a.x.device))
}

/** Where the gradients of weight and bias are added: f32 tensors, for sums over several calls. */
export interface WeightGradients {
  dWeight: Tensor
  dBias?: Tensor
}

/** @internal The argument `into` as the addon takes it. */
export function intoArguments(into: WeightGradients | undefined, op: string) {
  if (into === undefined) return [null, null]
  const { dWeight, dBias } = checkObject(into, 'into', op, '{ dWeight, dBias }')
  return [handleOf(dWeight, 'into.dWeight', op), maybeHandle(dBias, 'into.dBias', op)]
}

/** @internal The addon's result or results; those added into `into` become new handles on its storage. */
export function linearGradients(
  made: unknown,
  into: WeightGradients | undefined,
  device: Device,
): { dX: Tensor; dWeight: Tensor; dBias?: Tensor } {
  const results = [made].flat().map((handle) => wrap(device, handle))
  const dX = results.shift()!
  const dWeight = into ? into.dWeight.reshape(into.dWeight.shape) : results.shift()!
  const dBias = into?.dBias ? into.dBias.reshape(into.dBias.shape) : results.shift()
  return dBias ? { dX, dWeight, dBias } : { dX, dWeight }
}
