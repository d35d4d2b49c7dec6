import { linear, linearBackward } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { gemm } from './peers/onnxruntime.js'

function workload(rows: number, channels: number, features: number, backward: boolean): Workload {
  const sizes = [rows * channels, features * channels, features, rows * features] as const
  const floats = sizes.reduce((a, b) => a + b)
  return {
    name: `${rows}x${channels} -> ${features} f32 ${backward ? 'bwd' : 'fwd'}`,
    flops: 2 * rows * channels * features * (backward ? 2 : 1),
    traffic: backward
      ? { read: 4 * (floats - features), write: 4 * (floats - sizes[3]) }
      : { read: 4 * (floats - sizes[3]), write: 4 * sizes[3] },
    inputs(seed) {
      const x = normals(sizes[0], seed)
      const weight = normals(sizes[1], seed + 1, channels ** -0.5)
      const bias = normals(sizes[2], seed + 2)
      const gradient = normals(sizes[3], seed + 3)
      return {
        byteLength: 4 * floats,
        load(device) {
          const a = {
            x: device.tensor(x, [rows, channels]),
            weight: device.tensor(weight, [features, channels]),
            bias: device.tensor(bias, [features]),
          }
          if (!backward) return { run: () => linear(a), answer: () => linear(a).read() }
          const dOut = device.tensor(gradient, [rows, features])
          return { run: () => linearBackward({ ...a, dOut }) }
        },
        peers: backward ? [] : [gemm(x, weight, bias, rows)],
      }
    },
  }
}

export default {
  op: 'linear',
  workloads: [workload(1024, 1152, 4304, false), workload(1024, 1152, 4304, true)],
} satisfies Benchmark
