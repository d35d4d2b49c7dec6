import { type Device, linear, linearBackward, quantize } from 'p2r-kernels'
import { normals, randomBf16 } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { gemm } from './peers/onnxruntime.js'
import { type Custom, type Float, floats, widths } from './shapes.js'

function workload(
  rows: number,
  channels: number,
  features: number,
  backward: boolean,
  dtype: Float = 'f32',
): Workload {
  const width = widths[dtype]
  const sizes = [rows * channels, features * channels, features, rows * features] as const
  const elements = sizes.reduce((a, b) => a + b)
  return {
    name: `${rows}x${channels} -> ${features} ${dtype} ${backward ? 'bwd' : 'fwd'}`,
    flops: 2 * rows * channels * features * (backward ? 2 : 1),
    ...(dtype === 'bf16' ? { products: dtype } : {}),
    traffic: backward
      ? { read: width * (elements - features), write: width * (elements - sizes[3]) }
      : { read: width * (elements - sizes[3]), write: width * sizes[3] },
    inputs(seed) {
      const x = normals(sizes[0], seed)
      const weight = normals(sizes[1], seed + 1, channels ** -0.5)
      const bias = normals(sizes[2], seed + 2)
      const gradient = normals(sizes[3], seed + 3)
      return {
        byteLength: width * elements,
        load(device) {
          const a = {
            x: device.tensor(x, [rows, channels], dtype),
            weight: device.tensor(weight, [features, channels], dtype),
            bias: device.tensor(bias, [features], dtype),
          }
          if (!backward) return { run: () => linear(a), answer: () => linear(a).toFloat32() }
          const dOut = device.tensor(gradient, [rows, features], dtype)
          return { run: () => linearBackward({ ...a, dOut }) }
        },
        peers: backward || dtype !== 'f32' ? [] : [gemm(x, weight, bias, rows)],
      }
    },
  }
}

const hiddenSize = 2048
const bytesOf = { bf16: 2, int8: 1 + 2 / 32, int4: 0.5 + 2 / 32 } as const

/** Decoding: few rows, so that the weight is what is read. */
function decode(
  rows: number,
  features: number,
  format: keyof typeof bytesOf,
  channels = hiddenSize,
): Workload {
  const weightBytes = features * channels * bytesOf[format]
  return {
    name: `${rows}x${channels} -> ${features} ${format}`,
    flops: 2 * rows * channels * features,
    products: 'bf16',
    traffic: { read: weightBytes + 2 * rows * channels, write: 2 * rows * features },
    slow: features > 100_000,
    inputs(seed) {
      const weight = randomBf16(features * channels, seed)
      const x = randomBf16(rows * channels, seed + 1)
      return {
        byteLength: weightBytes,
        load(device) {
          const a = {
            x: device.tensor(x, [rows, channels], 'bf16'),
            weight: stored(device, weight, [features, channels], format),
          }
          return { run: () => linear(a) }
        },
      }
    },
  }
}

function stored(
  device: Device,
  bits: Uint16Array,
  shape: [number, number],
  format: keyof typeof bytesOf,
) {
  const weight = device.tensor(bits, shape, 'bf16')
  if (format === 'bf16') return weight
  const quantized = quantize({ weight, bits: format === 'int8' ? 8 : 4 })
  weight.dispose()
  return quantized
}

const quantizedLinear = (rows: number, features: number): Workload[] => [
  decode(rows, features, 'int8'),
  decode(rows, features, 'int4'),
]

const custom: Custom<'T' | 'C' | 'F'> = {
  letters: { T: ['rows', 1024], C: ['channels', 1152], F: ['features', 4304] },
  dtypes: floats,
  workloads: ({ T, C, F }, dtype) => [
    workload(T, C, F, false, dtype),
    workload(T, C, F, true, dtype),
    // Blocks of quantized values have 32.
    ...(dtype === 'bf16' && C % 32 === 0 ? [decode(T, F, 'int8', C), decode(T, F, 'int4', C)] : []),
  ],
}

export default {
  op: 'linear',
  workloads: [
    workload(1024, 1152, 4304, false),
    workload(1024, 1152, 4304, true),
    ...[6144, 151_936].flatMap((features) =>
      [1, 8].flatMap((rows) => [
        decode(rows, features, 'bf16'),
        ...quantizedLinear(rows, features),
      ]),
    ),
    decode(512, 6144, 'bf16'),
    ...quantizedLinear(512, 6144),
  ],
  custom,
} satisfies Benchmark
