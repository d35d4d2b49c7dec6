import { layerNorm, layerNormBackward } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { layerNormalization } from './peers/onnxruntime.js'
import { type Custom, type Float, floats, standard, widths } from './shapes.js'

const eps = 1e-6

function workload(
  [rows, channels]: readonly [number, number],
  dtype: Float,
  backward: boolean,
): Workload {
  const size = rows * channels
  const bytes = size * widths[dtype]
  return {
    name: `${rows}x${channels} ${dtype} ${backward ? 'bwd' : 'fwd'}`,
    traffic: { read: bytes * (backward ? 2 : 1), write: bytes },
    inputs(seed) {
      const x = normals(size, seed)
      const weight = normals(channels, seed + 1)
      const bias = normals(channels, seed + 2)
      const gradient = normals(size, seed + 3)
      return {
        byteLength: bytes * (backward ? 2 : 1),
        load(device) {
          const a = {
            x: device.tensor(x, [rows, channels], dtype),
            weight: device.tensor(weight, [channels], dtype),
          }
          const layer = { ...a, bias: device.tensor(bias, [channels], dtype), eps }
          if (!backward)
            return { run: () => layerNorm(layer), answer: () => layerNorm(layer).out.toFloat32() }
          const { stats } = layerNorm(layer)
          const dOut = device.tensor(gradient, [rows, channels], dtype)
          return { run: () => layerNormBackward({ ...a, dOut, stats }) }
        },
        peers: backward || dtype !== 'f32' ? [] : [layerNormalization(x, weight, bias, eps)],
      }
    },
  }
}

const custom: Custom<'T' | 'C'> = {
  letters: { T: ['rows', 4096], C: ['channels', 1152] },
  dtypes: floats,
  workloads: ({ T, C }, dtype) => [workload([T, C], dtype, false), workload([T, C], dtype, true)],
}

export default {
  op: 'layer_norm',
  workloads: standard(custom),
  custom,
} satisfies Benchmark
