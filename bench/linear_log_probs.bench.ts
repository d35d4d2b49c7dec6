import { linearLogProbs, linearLogProbsBackward } from 'p2r-kernels'
import { integers, normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'

const rows = 256
const channels = 1024
const vocabulary = 32_000
const product = 2 * rows * channels * vocabulary

function workload(backward: boolean, dtype: 'f32' | 'bf16' = 'f32'): Workload {
  const width = dtype === 'f32' ? 4 : 2
  const weightBytes = vocabulary * channels * width
  const hiddenBytes = rows * channels * width
  return {
    name: `${rows}x${channels} x ${vocabulary} ${dtype} ${backward ? 'fwd+bwd' : 'fwd'}`,
    // Two more products for the gradients; logits that a kernel computes again do not count.
    flops: product * (backward ? 3 : 1),
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

export default {
  op: 'linear_log_probs',
  workloads: [workload(false), workload(true), workload(false, 'bf16'), workload(true, 'bf16')],
} satisfies Benchmark
