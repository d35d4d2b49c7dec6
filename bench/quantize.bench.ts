import { linearLogProbs, quantize } from 'p2r-kernels'
import { randomBf16 } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import type { Custom } from './shapes.js'

// The linear layer of a quantised weight is among the rows of `linear`.
type Sizes = readonly [features: number, channels: number]
const sizes: Sizes = [6144, 2048]

function workload(bits: 8 | 4, back: boolean, [features, channels] = sizes): Workload {
  const weights = features * channels
  const quantized = (weights * (bits + 16 / 32)) / 8
  return {
    name: `${features}x${channels} ${back ? `int${bits} to f32` : `bf16 to int${bits}`}`,
    traffic: back
      ? { read: quantized, write: 4 * weights }
      : { read: 2 * weights, write: quantized },
    inputs(seed) {
      const bits16 = randomBf16(weights, seed)
      return {
        byteLength: (back ? 4 : 2) * weights + quantized,
        load(device) {
          const weight = device.tensor(bits16, [features, channels], 'bf16')
          if (!back) return { run: () => quantize({ weight, bits }) }
          const stored = quantize({ weight, bits })
          weight.dispose()
          const dequantize = () => stored.dequantize()
          return { run: dequantize }
        },
      }
    },
  }
}

/** The head of a model: its log-probabilities, without the logits. */
function quantizedLinearLogProbs(rows: number): Workload {
  const [features, channels] = sizes
  const weights = features * channels
  const quantized = (weights * (8 + 16 / 32)) / 8
  return {
    name: `${rows} log-probabilities of ${features}x${channels} int8`,
    traffic: { read: quantized + 2 * rows * channels, write: 12 * rows },
    inputs(seed) {
      const bits16 = randomBf16(weights, seed)
      return {
        byteLength: quantized + 2 * rows * channels,
        load(device) {
          using wide = device.tensor(bits16, [features, channels], 'bf16')
          const weight = quantize({ weight: wide, bits: 8 })
          const hidden = wide.slice(0, rows).cast('f32').cast('bf16')
          const targets = device.zeros([rows], 'i32')
          return { run: () => linearLogProbs({ hidden, weight, targets }) }
        },
      }
    },
  }
}

const custom: Custom<'F' | 'C'> = {
  letters: { F: ['features', sizes[0]], C: ['channels, in blocks of 32', sizes[1]] },
  dtypes: ['bf16'],
  workloads: ({ F, C }) =>
    ([8, 4] as const).flatMap((bits) => [
      workload(bits, false, [F, C]),
      workload(bits, true, [F, C]),
    ]),
}

export default {
  op: 'quantize',
  workloads: [
    workload(8, false),
    workload(4, false),
    workload(8, true),
    quantizedLinearLogProbs(1),
    quantizedLinearLogProbs(64),
  ],
  custom,
} satisfies Benchmark
