import { describeValue } from '../arguments.js'
import { refuse } from '../errors.js'
import { native } from '../native.js'
import { handlesOf, type Tensor, wrap } from '../tensor.js'

/**
 * Scales the gradients in place so that their joint Euclidean norm is at most maxNorm, as
 * torch.nn.utils.clip_grad_norm_ does: by min(1, maxNorm / (norm + 1e-6)). Gradients that are not
 * finite are not refused: they make the norm infinite or NaN and every gradient 0 or NaN, so look
 * at the norm before the step.
 *
 * @param a.grads at least one tensor, f32 | f16 | bf16, without common memory.
 * @param a.maxNorm not negative; Infinity only measures.
 * @returns the norm before, f32 [1].
 */
export function clipGradNorm(a: { grads: readonly Tensor[]; maxNorm: number }): Tensor<'f32'> {
  const op = 'clipGradNorm'
  const grads = handlesOf(a.grads, 'grads', op)
  if (!grads.length) refuse('ERR_VALUE', op, 'grads must hold at least one Tensor, got none')
  const most = a.maxNorm === Number.POSITIVE_INFINITY ? Number.MAX_VALUE : a.maxNorm
  return wrap(a.grads[0]!.device, native().ops.clip_grad_norm!(grads, most))
}

/**
 * One step of AdamW (Loshchilov and Hutter, 2019) in place, as torch.optim.AdamW takes it: weight
 * decay apart from the gradient, moments corrected for their start at 0.
 *
 * @param a.params f32 | f16 | bf16. A half parameter is rounded at every step.
 * @param a.grads of the parameters' shapes, of their types or f32.
 * @param a.moments f32 [2, size] a parameter, zero before the first step.
 * @param a.step counts from 1.
 * @param a.betas 0.9 and 0.999 unless given.
 * @param a.eps 1e-8 unless given.
 * @param a.weightDecay 0.01 unless given.
 */
export function adamW(a: {
  params: readonly Tensor[]
  grads: readonly Tensor[]
  moments: readonly Tensor[]
  step: number
  lr: number
  betas?: readonly [number, number]
  eps?: number
  weightDecay?: number
}): void {
  const op = 'adamW'
  const params = handlesOf(a.params, 'params', op)
  const grads = handlesOf(a.grads, 'grads', op)
  const moments = handlesOf(a.moments, 'moments', op)
  const betas = a.betas ?? [0.9, 0.999]
  if (!Array.isArray(betas) || betas.length !== 2)
    refuse('ERR_VALUE', op, `betas must be two numbers, got ${describeValue(betas)}`)
  const rates = [betas[0], betas[1], a.eps ?? 1e-8, a.weightDecay ?? 0.01]
  if (!params.length && !grads.length && !moments.length) return
  native().ops.adam_w!(params, grads, moments, a.step, a.lr, ...rates)
}
