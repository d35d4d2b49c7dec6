// Seeded inputs, generated quickly: a block of normal numbers of prime length, repeated.
import type { Device, DType, Tensor } from 'p2r-kernels'

const block = 65_537

/** Numbers in [0, 1): Marsaglia's xorshift32. */
export function uniforms(seed: number): () => number {
  let x = Math.imul(seed + 1, 0x9e3779b1) | 1
  return () => {
    x ^= x << 13
    x ^= x >>> 17
    x ^= x << 5
    return (x >>> 0) / 2 ** 32
  }
}

export function normals(n: number, seed: number, scale = 1): Float32Array {
  const uniform = uniforms(seed)
  for (let i = 0; i < 8; i++) uniform()
  const one = new Float32Array(Math.min(n, block))
  for (let i = 0; i < one.length; i++)
    one[i] = scale * Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform())
  const out = new Float32Array(n)
  for (let i = 0; i < n; i += block) out.set(one.subarray(0, Math.min(block, n - i)), i)
  return out
}

export function integers(n: number, below: number, seed: number): Int32Array {
  const uniform = uniforms(seed)
  for (let i = 0; i < 8; i++) uniform()
  return Int32Array.from({ length: n }, () => Math.floor(uniform() * below))
}

/** An RGB image with something to resample: slow waves and a little noise. */
export function picture(height: number, width: number, seed: number): Uint8Array {
  const out = new Uint8Array(height * width * 3)
  const noise = normals(block, seed, 2)
  const wave = (n: number, period: number) =>
    Float32Array.from({ length: n }, (_, i) => 55 * Math.sin((2 * Math.PI * i) / period + seed))
  const across = [wave(width, 211), wave(width, 97), wave(width, 53)] as const
  const down = [wave(height, 131), wave(height, 71), wave(height, 173)] as const
  let at = 0
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      for (let c = 0; c < 3; c++) {
        const value = 128 + across[c]![x]! + down[c]![y]! + noise[at % block]!
        out[at++] = Math.min(Math.max(value, 0), 255)
      }
  return out
}

export function evenly(sequences: number, length: number): Int32Array {
  return Int32Array.from({ length: sequences + 1 }, (_, i) => i * length)
}

/** Host data of a tensor: all of it, or its first rows, which the tensor repeats. */
export interface Block {
  data: Float32Array | Uint16Array | Int32Array | Uint8Array
  dtype: DType
  shape: readonly number[]
}

const width = (shape: readonly number[]): number => shape.slice(1).reduce((n, d) => n * d, 1)

/** Normal numbers of a limited number of rows, for a tensor that may have many more. */
export function normalBlock(
  shape: readonly number[],
  dtype: 'f32' | 'bf16',
  seed: number,
  scale = 1,
  rows = 1024,
): Block {
  const data = normals(Math.min(rows, shape[0]!) * width(shape), seed, scale)
  return { data: dtype === 'bf16' ? bf16Bits(data) : data, dtype, shape }
}

/** The bits of the nearest bf16, ties to even. */
export function bf16Bits(x: Float32Array): Uint16Array {
  const bits = new Uint32Array(x.buffer, x.byteOffset, x.length)
  const out = new Uint16Array(x.length)
  for (let i = 0; i < out.length; i++) out[i] = (bits[i]! + 0x7fff + ((bits[i]! >>> 16) & 1)) >>> 16
  return out
}

/** The tensor; repetitions are copied on the device. */
export function tiled(device: Device, { data, dtype, shape }: Block): Tensor {
  const rows = data.length / width(shape)
  const all = shape[0]!
  if (rows === all) return device.tensor(data, shape, dtype)
  const out = device.zeros(shape, dtype)
  out.slice(0, rows).write(data)
  for (let filled = rows; filled < all; filled *= 2) {
    const more = Math.min(filled, all - filled)
    out.slice(filled, filled + more).copyFrom(out.slice(0, more))
  }
  return out
}

/** Numbers of magnitude 2^-7 to 2^-5 as bf16 bits: fast to make for weights of gigabytes. */
export function randomBf16(n: number, seed: number): Uint16Array {
  const bits = new Uint16Array(n)
  let state = seed + 1
  for (let i = 0; i < n; i++) {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    bits[i] = 0x3c00 | ((state >>> 16) & 0x80ff)
  }
  return bits
}
