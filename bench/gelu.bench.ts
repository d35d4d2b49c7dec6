import { gelu, geluBackward } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { geluLoop } from './peers/loops.js'
import { type Custom, type Float, floats, standard, widths } from './shapes.js'

function workload(
  [rows, channels]: readonly [number, number],
  dtype: Float,
  approximate: 'none' | 'tanh',
  backward: boolean,
): Workload {
  const size = rows * channels
  const bytes = size * widths[dtype]
  return {
    name: `${rows}x${channels} ${dtype} ${approximate === 'none' ? 'erf' : 'tanh'} ${backward ? 'bwd' : 'fwd'}`,
    traffic: { read: bytes * (backward ? 2 : 1), write: bytes },
    inputs(seed) {
      const x = normals(size, seed)
      const gradient = normals(size, seed + 1)
      return {
        byteLength: bytes * (backward ? 2 : 1),
        load(device) {
          const a = { x: device.tensor(x, [size], dtype), approximate }
          if (!backward) return { run: () => gelu(a), answer: () => gelu(a).toFloat32() }
          const dOut = device.tensor(gradient, [size], dtype)
          return { run: () => geluBackward({ ...a, dOut }) }
        },
        peers: backward || approximate === 'none' || dtype !== 'f32' ? [] : [geluLoop(x)],
      }
    },
  }
}

const custom: Custom<'T' | 'C'> = {
  letters: { T: ['rows', 1024], C: ['columns', 4304] },
  dtypes: floats,
  workloads: ({ T, C }, dtype) => [
    workload([T, C], dtype, 'none', false),
    workload([T, C], dtype, 'tanh', false),
    workload([T, C], dtype, 'tanh', true),
  ],
}

export default {
  op: 'gelu',
  workloads: standard(custom),
  custom,
} satisfies Benchmark
