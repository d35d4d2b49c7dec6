// Small random inputs that the library's functions accept.
import type { Device, DType, FloatDType, Tensor } from 'p2r-kernels'
import { uniforms } from '../bench/data.js'

/** Floats, from a seed: the same seed gives the same inputs. */
export class Gen {
  readonly device: Device
  readonly uniform: () => number
  /** Where files may be written. */
  readonly folder: string

  constructor(device: Device, seed: number, folder: string) {
    this.device = device
    this.uniform = uniforms(seed)
    for (let i = 0; i < 8; i++) this.uniform()
    this.folder = folder
  }

  int(low: number, high: number): number {
    return low + Math.floor(this.uniform() * (high - low + 1))
  }

  pick<T>(list: readonly T[]): T {
    return list[this.int(0, list.length - 1)] as T
  }

  /** The value, or nothing as often as not: an option that may be left out. */
  maybe<T>(value: T): T | undefined {
    return this.uniform() < 0.5 ? value : undefined
  }

  float(): FloatDType {
    return this.pick(['f32', 'f32', 'f16', 'bf16'] as const)
  }

  list(length: number, low: number, high: number): number[] {
    return Array.from({ length }, () => this.int(low, high))
  }

  /** Integers in one of the forms that the library takes. */
  ints(values: readonly number[]): ArrayLike<number> {
    return this.pick([
      (v: readonly number[]) => [...v],
      (v: readonly number[]) => Int32Array.from(v),
    ])(values)
  }

  f32(shape: readonly number[], scale = 1): Tensor<'f32'> {
    const size = shape.reduce((product, n) => product * n, 1)
    const data = Float32Array.from({ length: size }, () => scale * (2 * this.uniform() - 1))
    return this.device.tensor(data, shape)
  }

  tensor(shape: readonly number[], dtype: DType = 'f32'): Tensor {
    if (dtype === 'u8') return this.u8(shape)
    if (dtype === 'i32') return this.i32(shape, 4)
    return this.f32(shape).cast(dtype) as Tensor
  }

  u8(shape: readonly number[], below = 256): Tensor<'u8'> {
    const size = shape.reduce((product, n) => product * n, 1)
    return this.device.tensor(
      Uint8Array.from({ length: size }, () => this.int(0, below - 1)),
      shape,
    )
  }

  i32(shape: readonly number[], below: number): Tensor<'i32'> {
    const size = shape.reduce((product, n) => product * n, 1)
    return this.device.tensor(
      Int32Array.from({ length: size }, () => this.int(0, below - 1)),
      shape,
    )
  }

  /** Ends of sequences of 0 to 5 rows, and how many rows they have. */
  packed(): { cuSeqlens: ArrayLike<number>; sequences: number; rows: number } {
    const lengths = this.list(this.int(0, 4), 0, 5)
    const ends = [0]
    for (const length of lengths) ends.push(ends.at(-1)! + length)
    return { cuSeqlens: this.ints(ends), sequences: lengths.length, rows: ends.at(-1)! }
  }
}
