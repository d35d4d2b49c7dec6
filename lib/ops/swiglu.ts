import { checkArguments, type Names } from '../arguments.js'
import type { FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import { native, type TensorHandle } from '../native.js'
import { type Held, handleOf, held, type Tensor, wrap } from '../tensor.js'

/** Gate and up as two tensors. */
export interface SeparateGates<D extends FloatDType = FloatDType> {
  /** Any shape, f32 | f16 | bf16. */
  gate: Tensor<D>
  /** As gate in shape and type. */
  up: Tensor<NoInfer<D>>
  /** Excluded by gate and up. */
  gateUp?: never
}

/** Gate and up in one tensor, as a fused projection writes them. */
export interface PackedGates<D extends FloatDType = FloatDType> {
  /** [..., 2 F], f32 | f16 | bf16: each row holds F entries of gate, then F of up. */
  gateUp: Tensor<D>
  /** Excluded by gateUp. */
  gate?: never
  /** Excluded by gateUp. */
  up?: never
}

/** The arguments of `swiglu`: either gate and up, or gateUp. */
export type SwigluArgs<D extends FloatDType = FloatDType> = SeparateGates<D> | PackedGates<D>

const names: Names<SwigluArgs> = { gate: true, up: true, gateUp: true }

/** gateUp, or gate and up, as the addon takes them. */
function gates(a: SwigluArgs, op: string): [TensorHandle | null, TensorHandle?, TensorHandle?] {
  if (a.gateUp === undefined) return [null, handleOf(a.gate, 'gate', op), handleOf(a.up, 'up', op)]
  if (a.gate !== undefined || a.up !== undefined)
    refuse('ERR_VALUE', op, 'gateUp excludes gate and up')
  return [handleOf(a.gateUp, 'gateUp', op)]
}

/**
 * silu(gate) · up, the gated activation of Llama's and Qwen's MLPs (SwiGLU; Shazeer, 2020), with
 * silu(x) = x / (1 + e⁻ˣ), in f32, rounded once.
 *
 * @returns as gate in shape and type; of gateUp, [..., F].
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { openDevice, swiglu } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const gate = device.tensor([0, 100, -100], [3])
 * const up = device.tensor([5, 5, 5], [3])
 * console.log(await swiglu({ gate, up }).read()) // about 0, 500, 0
 * device.dispose()
 * ```
 */
export function swiglu<D extends FloatDType>(a: SwigluArgs<D>): Tensor<D> {
  const op = 'swiglu'
  a = checkArguments(a, names, op)
  const out = native().ops.swiglu!(...gates(a, op))
  return wrap((a.gateUp ?? a.gate).device, out)
}

/** What `swigluBackward` takes besides the arguments of `swiglu`. */
export interface SwigluGradient<D extends FloatDType = FloatDType> {
  /** The gradient with respect to the result of `swiglu`; as it in shape and type. */
  dOut: Tensor<NoInfer<D>>
}

/** The arguments of `swigluBackward`. */
export type SwigluBackwardArgs<D extends FloatDType = FloatDType> = SwigluArgs<D> &
  SwigluGradient<D>

/** The results of `swigluBackward` of gate and up. */
export interface SwigluBackwardResult<D extends FloatDType = FloatDType> {
  /** As gate in shape and type. */
  dGate: Tensor<D>
  /** As gate in shape and type. */
  dUp: Tensor<D>
}

/** The result of `swigluBackward` of gateUp. */
export interface PackedGatesGradient<D extends FloatDType = FloatDType> {
  /** As gateUp in shape and type. */
  dGateUp: Tensor<D>
}

const backwardNames: Names<SwigluBackwardArgs> = { dOut: true, ...names }

/**
 * The gradients of `swiglu`.
 *
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { openDevice, swigluBackward } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const [gate, up] = [device.tensor([0], [1]), device.tensor([6], [1])]
 * const { dGate, dUp } = swigluBackward({ dOut: device.tensor([1], [1]), gate, up })
 * console.log(await dGate.read(), await dUp.read()) // Float32Array(1) [ 3 ] Float32Array(1) [ 0 ]
 * device.dispose()
 * ```
 */
export function swigluBackward<D extends FloatDType>(
  a: SeparateGates<D> & SwigluGradient<D>,
): Held<SwigluBackwardResult<D>>
export function swigluBackward<D extends FloatDType>(
  a: PackedGates<D> & SwigluGradient<D>,
): Held<PackedGatesGradient<D>>
export function swigluBackward<D extends FloatDType>(
  a: SwigluBackwardArgs<D>,
): Held<SwigluBackwardResult<D>> | Held<PackedGatesGradient<D>>
export function swigluBackward<D extends FloatDType>(
  a: SwigluBackwardArgs<D>,
): Held<SwigluBackwardResult<D>> | Held<PackedGatesGradient<D>> {
  const op = 'swigluBackward'
  a = checkArguments(a, backwardNames, op)
  const out = native().ops.swiglu_backward!(handleOf(a.dOut, 'dOut', op), ...gates(a, op))
  const { device } = a.dOut
  if (a.gateUp !== undefined) return held({ dGateUp: wrap<D>(device, out) })
  const [dGate, dUp] = out as unknown[]
  return held({ dGate: wrap<D>(device, dGate), dUp: wrap<D>(device, dUp) })
}
