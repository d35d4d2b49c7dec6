import type { DType } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'

const size = 1 << 23
const widths = { f32: 4, f16: 2, bf16: 2, i32: 4, u8: 1 } as const

function workload(from: DType, to: DType): Workload {
  const bytes = size * widths[from]
  return {
    name: `8 Mi ${from} -> ${to}`,
    traffic: { read: bytes, write: size * widths[to] },
    inputs(seed) {
      const data = normals(size, seed)
      return {
        byteLength: bytes,
        load(device) {
          const x = device.tensor(data, [size], from)
          return { run: () => x.cast(to) }
        },
      }
    },
  }
}

export default {
  op: 'cast',
  workloads: [workload('f32', 'bf16'), workload('bf16', 'f32'), workload('f32', 'f16')],
} satisfies Benchmark
