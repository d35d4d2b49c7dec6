import { swiglu, swigluBackward } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { type Custom, type Float, standard, widths } from './shapes.js'

function workload(
  rows: number,
  width: number,
  dtype: Float,
  kind: 'fwd' | 'fwd packed' | 'bwd',
): Workload {
  const size = rows * width
  const read = size * widths[dtype] * (kind === 'bwd' ? 3 : 2)
  return {
    name: `${rows}x${width} ${dtype} ${kind}`,
    traffic: { read, write: size * widths[dtype] * (kind === 'bwd' ? 2 : 1) },
    inputs(seed) {
      const [gate, up, d] = [0, 1, 2].map((i) => normals(size, seed + i)) as Float32Array[]
      return {
        byteLength: read,
        load(device) {
          const tensor = (x: Float32Array) => device.tensor(x, [rows, width], dtype)
          if (kind === 'fwd packed') {
            const both = new Float32Array(2 * size)
            both.set(gate!)
            both.set(up!, size)
            const gateUp = device.tensor(both, [rows, 2 * width], dtype)
            return { run: () => swiglu({ gateUp }) }
          }
          const a = { gate: tensor(gate!), up: tensor(up!) }
          if (kind === 'fwd') return { run: () => swiglu(a) }
          const dOut = tensor(d!)
          return { run: () => swigluBackward({ ...a, dOut }) }
        },
      }
    },
  }
}

const custom: Custom<'T' | 'C'> = {
  letters: { T: ['rows', 1024], C: ['channels', 6144] },
  dtypes: ['bf16', 'f32', 'f16'],
  workloads: ({ T, C }, dtype) =>
    (['fwd', 'fwd packed', 'bwd'] as const).map((kind) => workload(T, C, dtype, kind)),
}

export default {
  op: 'swiglu',
  workloads: standard(custom),
  custom,
} satisfies Benchmark
