import { linearLogProbs, linearLogProbsBackward } from 'p2r-kernels'
import { integers, normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { headOf, linearLogProbsOnCuda } from './large/linear_log_probs.js'
import type { Custom } from './shapes.js'

type Sizes = readonly [rows: number, channels: number, vocabulary: number]

function workload(
  [rows, channels, vocabulary]: Sizes,
  backward: boolean,
  dtype: 'f32' | 'bf16' = 'f32',
): Workload {
  const width = dtype === 'f32' ? 4 : 2
  const weightBytes = vocabulary * channels * width
  const hiddenBytes = rows * channels * width
  return {
    name: `${rows}x${channels} x ${vocabulary} ${dtype} ${backward ? 'fwd+bwd' : 'fwd'}`,
    // Two more products for the gradients; logits that a kernel computes again do not count.
    flops: 2 * rows * channels * vocabulary * (backward ? 3 : 1),
    products: dtype,
    traffic: {
      read: weightBytes + hiddenBytes,
      write: backward ? vocabulary * channels * 4 + hiddenBytes : 0,
    },
    inputs(seed) {
      const hidden = normals(rows * channels, seed)
      const weight = normals(vocabulary * channels, seed + 1, channels ** -0.5)
      const targets = integers(rows, vocabulary, seed)
      return {
        byteLength: weightBytes + hiddenBytes,
        load(device) {
          const a = {
            hidden: device.tensor(hidden, [rows, channels], dtype),
            weight: device.tensor(weight, [vocabulary, channels], dtype),
            targets: device.tensor(targets, [rows]),
          }
          if (!backward) return { run: () => linearLogProbs(a) }
          const dLogProbs = device.tensor(new Float32Array(rows).fill(1), [rows])
          return {
            run() {
              const { stats } = linearLogProbs(a)
              linearLogProbsBackward({ ...a, stats, dLogProbs })
            },
          }
        },
      }
    },
  }
}

const sizes: Sizes = [256, 1024, 32_000]

const custom: Custom<'T' | 'C' | 'V'> = {
  letters: { T: ['rows', sizes[0]], C: ['channels', sizes[1]], V: ['vocabulary', sizes[2]] },
  dtypes: ['f32', 'bf16'],
  workloads({ T, C, V }, dtype) {
    const products = dtype === 'bf16' ? 'bf16' : 'f32'
    return [
      headOf(T, C, V, products, false),
      workload([T, C, V], true, products),
      // Its rollouts have 128 tokens.
      ...(T % 128 ? [] : [headOf(T, C, V, products, true)]),
    ]
  },
}

export default {
  op: 'linear_log_probs',
  workloads: [
    workload(sizes, false),
    workload(sizes, true),
    workload(sizes, false, 'bf16'),
    workload(sizes, true, 'bf16'),
    headOf(...sizes, 'f32', true),
    headOf(sizes[0], sizes[1], 151_936, 'f32', false, { slow: true }),
    headOf(sizes[0], sizes[1], 151_936, 'bf16', false, { slow: true }),
    ...linearLogProbsOnCuda,
  ],
  custom,
} satisfies Benchmark
