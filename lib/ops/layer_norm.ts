import { native } from '../native.js'
import { type Held, handleOf, held, type Tensor, wrap } from '../tensor.js'

/**
 * Layer normalisation (Ba, Kiros and Hinton, 2016) over the last axis:
 * (x - mean) / sqrt(variance + eps) · weight + bias.
 *
 * @param a.x [..., C], f32 | f16 | bf16.
 * @param a.weight [C], of the type of x.
 * @param a.bias [C], of the type of x or f32.
 * @param a.eps 1e-6 unless given.
 * @returns out, as x; stats f32 [rows, 2], the mean and the reciprocal standard deviation of each
 * row, which `layerNormBackward` takes.
 */
export function layerNorm(a: {
  x: Tensor
  weight: Tensor
  bias: Tensor
  eps?: number
}): Held<{ out: Tensor; stats: Tensor }> {
  const op = 'layerNorm'
  const [out, stats] = native().ops.layer_norm!(
    handleOf(a.x, 'x', op),
    handleOf(a.weight, 'weight', op),
    handleOf(a.bias, 'bias', op),
    a.eps ?? 1e-6,
  ) as unknown[]
  const { device } = a.x
  return held({ out: wrap(device, out), stats: wrap(device, stats) })
}

/**
 * The gradients of `layerNorm`: dX as x, dWeight and dBias f32 [C].
 *
 * @param a.stats as `layerNorm` returned them for this x.
 */
export function layerNormBackward(a: {
  dOut: Tensor
  x: Tensor
  weight: Tensor
  stats: Tensor
}): Held<{ dX: Tensor; dWeight: Tensor; dBias: Tensor }> {
  const op = 'layerNormBackward'
  const [dX, dWeight, dBias] = native().ops.layer_norm_backward!(
    handleOf(a.dOut, 'dOut', op),
    handleOf(a.x, 'x', op),
    handleOf(a.weight, 'weight', op),
    handleOf(a.stats, 'stats', op),
  ) as unknown[]
  const { device } = a.x
  return held({
    dX: wrap(device, dX),
    dWeight: wrap(device, dWeight),
    dBias: wrap(device, dBias),
  })
}
