import { add, mul, type Tensor } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'

const rows = 8192
const channels = 1152
const size = rows * channels
const all = size * 4

function workload(
  name: string,
  shape: readonly number[],
  operation: (a: { x: Tensor<'f32'>; y: Tensor<'f32'> }) => Tensor<'f32'>,
): Workload {
  const second = shape.reduce((n, d) => n * d, 1)
  return {
    name: `${name} ${rows}x${channels} f32`,
    traffic: { read: all + 4 * second, write: all },
    inputs(seed) {
      const data = normals(size, seed)
      return {
        byteLength: all,
        load(device) {
          const x = device.tensor(data, [rows, channels])
          const y = device.tensor(normals(second, seed + 1), shape)
          return { run: () => operation({ x, y }) }
        },
      }
    },
  }
}

export default {
  op: 'elementwise',
  workloads: [
    workload('add', [rows, channels], add),
    workload('add a row to', [channels], add),
    workload('mul', [rows, channels], mul),
    workload('mul a column with', [rows, 1], mul),
  ],
} satisfies Benchmark
