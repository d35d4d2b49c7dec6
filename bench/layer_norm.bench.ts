import { layerNorm, layerNormBackward } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { layerNormalization } from './peers/onnxruntime.js'

const rows = 4096
const channels = 1152
const size = rows * channels
const eps = 1e-6

function workload(backward: boolean): Workload {
  return {
    name: `${rows}x${channels} f32 ${backward ? 'bwd' : 'fwd'}`,
    traffic: { read: size * 4 * (backward ? 2 : 1), write: size * 4 },
    inputs(seed) {
      const x = normals(size, seed)
      const weight = normals(channels, seed + 1)
      const bias = normals(channels, seed + 2)
      const gradient = normals(size, seed + 3)
      return {
        byteLength: size * 4 * (backward ? 2 : 1),
        load(device) {
          const a = {
            x: device.tensor(x, [rows, channels]),
            weight: device.tensor(weight, [channels]),
          }
          const layer = { ...a, bias: device.tensor(bias, [channels]), eps }
          if (!backward)
            return { run: () => layerNorm(layer), answer: () => layerNorm(layer).out.read() }
          const { stats } = layerNorm(layer)
          const dOut = device.tensor(gradient, [rows, channels])
          return { run: () => layerNormBackward({ ...a, dOut, stats }) }
        },
        peers: backward ? [] : [layerNormalization(x, weight, bias, eps)],
      }
    },
  }
}

export default {
  op: 'layer_norm',
  workloads: [workload(false), workload(true)],
} satisfies Benchmark
