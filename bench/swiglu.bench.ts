import { swiglu, swigluBackward } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'

const width = 6144

function workload(rows: number, kind: 'fwd' | 'fwd packed' | 'bwd'): Workload {
  const size = rows * width
  const read = size * 2 * (kind === 'bwd' ? 3 : 2)
  return {
    name: `${rows}x${width} bf16 ${kind}`,
    traffic: { read, write: size * 2 * (kind === 'bwd' ? 2 : 1) },
    inputs(seed) {
      const [gate, up, d] = [0, 1, 2].map((i) => normals(size, seed + i)) as Float32Array[]
      return {
        byteLength: read,
        load(device) {
          const tensor = (x: Float32Array) => device.tensor(x, [rows, width], 'bf16')
          if (kind === 'fwd packed') {
            const both = new Float32Array(2 * size)
            both.set(gate!)
            both.set(up!, size)
            const gateUp = device.tensor(both, [rows, 2 * width], 'bf16')
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

export default {
  op: 'swiglu',
  workloads: [workload(1024, 'fwd'), workload(1024, 'fwd packed'), workload(1024, 'bwd')],
} satisfies Benchmark
