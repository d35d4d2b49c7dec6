import { checkArguments, type Names } from '../arguments.js'
import type { Device } from '../device.js'
import type { FloatDType } from '../dtype.js'
import { P2RError } from '../errors.js'
import { native } from '../native.js'
import { handleOf, type Tensor, wrap } from '../tensor.js'

/** The arguments of `quantize`. */
export interface QuantizeArgs {
  /** [F, C], f32 | f16 | bf16: a linear layer's weight. */
  weight: Tensor<FloatDType>
  /** Of each weight: 8 or 4. */
  bits: 8 | 4
  /**
   * Columns of a row that share a scale: 32 or 64.
   *
   * @default 32
   */
  group?: 32 | 64
}

const construct: unique symbol = Symbol('construct')

/**
 * A linear layer's weight in 8 or 4 bits, as `quantize` makes it and `linear` takes it. It is on the device of
 * the weight that it was made of, and belongs to a scope as a tensor does.
 *
 * @example
 * ```js
 * import { linear, openDevice, quantize } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const weight = device.tensor([7, -3, 0.5, 2], [2, 2])
 * const quantized = quantize({ weight, bits: 4 })
 * console.log(quantized.shape, quantized.bits, quantized.group) // [ 2, 2 ] 4 32
 * console.log(await quantized.dequantize().slice(0, 1).read()) // Float32Array(2) [ 7, -3 ]
 * device.dispose()
 * ```
 */
export class QuantizedWeight implements Disposable {
  /** Where it is. */
  readonly device: Device
  /** [F, C], of the weight. */
  readonly shape: readonly number[]
  /** Of each weight. */
  readonly bits: 8 | 4
  /** Columns of a row that share a scale. */
  readonly group: 32 | 64
  /** Bytes of values and scales, with their padding. */
  readonly byteLength: number
  /** @internal Laid out as ops/quantize.h says. */
  readonly values: Tensor<'u8'>
  /** @internal */
  readonly scales: Tensor<'f16'>

  /** @internal Quantised weights are made by `quantize`. */
  constructor(
    key: typeof construct,
    weight: Tensor,
    bits: 8 | 4,
    group: 32 | 64,
    values: Tensor<'u8'>,
    scales: Tensor<'f16'>,
  ) {
    if (key !== construct)
      throw new P2RError('ERR_VALUE', 'Quantised weights are made by quantize()')
    this.device = weight.device
    this.shape = weight.shape
    this.bits = bits
    this.group = group
    this.byteLength = values.byteLength + scales.byteLength
    this.values = values
    this.scales = scales
    Object.freeze(this)
  }

  /**
   * The weight that the layer has now, in f32: each integer times its scale, exactly.
   *
   * @returns f32 [F, C].
   * @throws P2RError ERR_DISPOSED.
   */
  dequantize(): Tensor<'f32'> {
    const op = 'dequantize'
    const out = native().ops.dequantize!(
      handleOf(this.values, 'values', op),
      handleOf(this.scales, 'scales', op),
      this.bits,
      this.group,
      ...this.shape,
    )
    return wrap(this.device, out)
  }

  /** Gives its memory back. It cannot be used afterwards; disposing it again does nothing. */
  dispose(): void {
    this.values.dispose()
    this.scales.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

const names: Names<QuantizeArgs> = { weight: true, bits: true, group: true }

/**
 * Rounds a linear layer's weight to 8 or 4 bits for inference, in groups of columns with one f16 scale each, which
 * is that of the group's largest magnitude: 127 or 7 steps, to both sides. No weight is wrong by more than half a
 * step, its group's largest magnitude divided by 254 or 14 (and the scale's own rounding, 2⁻¹² of the weight).
 * `linear` takes the result as its weight; activations stay as they are.
 *
 * @returns The weight in `bits` + 16 / `group` bits each.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for a weight that is no float matrix; ERR_VALUE for other bits or groups, and
 *   at a read of what depends on a weight with NaN, infinity or magnitudes whose scale exceeds f16; ERR_DISPOSED.
 * @example
 * ```js
 * import { linear, openDevice, quantize } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const weight = device.tensor([127, 0, -50, 0, 127, 4], [2, 3])
 * const quantized = quantize({ weight, bits: 8 })
 * const x = device.tensor([1, 2, 3], [1, 3])
 * console.log(await linear({ x, weight: quantized }).read()) // Float32Array(2) [ -23, 266 ]
 * device.dispose()
 * ```
 */
export function quantize(a: QuantizeArgs): QuantizedWeight {
  const op = 'quantize'
  a = checkArguments(a, names, op)
  const { weight, bits, group = 32 } = a
  const [values, scales] = native().ops.quantize!(handleOf(weight, 'weight', op), bits, group) as [
    unknown,
    unknown,
  ]
  const { device } = weight
  return new QuantizedWeight(
    construct,
    weight,
    bits,
    group,
    wrap(device, values),
    wrap(device, scales),
  )
}
