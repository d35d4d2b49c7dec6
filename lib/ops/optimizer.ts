import { checkArguments, describeValue, type Names } from '../arguments.js'
import type { FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import { native } from '../native.js'
import { handlesOf, type Tensor, wrap } from '../tensor.js'

/** The arguments of `clipGradNorm`. */
export interface ClipGradNormArgs {
  /** At least one tensor of any shape, f32 | f16 | bf16, without common memory; scaled in place. */
  grads: readonly Tensor<FloatDType>[]
  /** The largest joint norm, at least 0; Infinity only measures. */
  maxNorm: number
}

const clipNames: Names<ClipGradNormArgs> = { grads: true, maxNorm: true }

/**
 * Scales the gradients in place so that their joint Euclidean norm is at most maxNorm, as
 * torch.nn.utils.clip_grad_norm_ does: by min(1, maxNorm / (norm + 1e-6)). Gradients that are not
 * finite are not refused: they make the norm infinite or NaN and every gradient 0 or NaN, so look
 * at the norm before the step.
 *
 * @returns the norm before, f32 [1].
 * @throws P2RError ERR_DTYPE for another type; ERR_VALUE for no gradient, a negative norm or common memory;
 *   ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { clipGradNorm, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const grad = device.tensor([3, 4], [2])
 * console.log(await clipGradNorm({ grads: [grad], maxNorm: 1 }).read()) // Float32Array(1) [ 5 ]
 * console.log(await grad.read()) // about 0.6, 0.8
 * device.dispose()
 * ```
 */
export function clipGradNorm(a: ClipGradNormArgs): Tensor<'f32'> {
  const op = 'clipGradNorm'
  a = checkArguments(a, clipNames, op)
  const grads = handlesOf(a.grads, 'grads', op)
  if (!grads.length) refuse('ERR_VALUE', op, 'grads must hold at least one Tensor, got none')
  const most = a.maxNorm === Number.POSITIVE_INFINITY ? Number.MAX_VALUE : a.maxNorm
  return wrap(a.grads[0]!.device, native().ops.clip_grad_norm!(grads, most))
}

/** The arguments of `adamW`. */
export interface AdamWArgs {
  /** Any shapes, f32 | f16 | bf16; updated in place. A half parameter is rounded at every step. */
  params: readonly Tensor<FloatDType>[]
  /** One of each parameter's shape, of its type or f32. */
  grads: readonly Tensor<FloatDType>[]
  /** f32 [2, size] for each parameter: both moments, zero before the first step; updated in place. */
  moments: readonly Tensor<'f32'>[]
  /** Counts from 1. */
  step: number
  /** The learning rate, at least 0. */
  lr: number
  /**
   * Decay rates of the moments, from 0 to below 1.
   *
   * @default [0.9, 0.999]
   */
  betas?: readonly [number, number]
  /**
   * Added to the square root of the second moment.
   *
   * @default 1e-8
   */
  eps?: number
  /**
   * Each parameter loses lr · weightDecay of itself.
   *
   * @default 0.01
   */
  weightDecay?: number
}

const adamNames: Names<AdamWArgs> = {
  params: true,
  grads: true,
  moments: true,
  step: true,
  lr: true,
  betas: true,
  eps: true,
  weightDecay: true,
}

/**
 * One step of AdamW (Loshchilov and Hutter, 2019) in place, as torch.optim.AdamW takes it: weight
 * decay apart from the gradient, moments corrected for their start at 0. f32 arithmetic.
 *
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for rates out of range, lists
 *   of different lengths or common memory; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { adamW, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const [param, grad] = [device.tensor([1], [1]), device.tensor([0.5], [1])]
 * adamW({ params: [param], grads: [grad], moments: [device.zeros([2, 1])], step: 1, lr: 0.1 })
 * console.log(await param.read()) // about 0.899: one step of lr, and the weight decay
 * device.dispose()
 * ```
 */
export function adamW(a: AdamWArgs): void {
  const op = 'adamW'
  a = checkArguments(a, adamNames, op)
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
