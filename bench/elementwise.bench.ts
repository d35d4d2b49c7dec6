import { add, mul, type Tensor } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { type Custom, type Float, floats, standard, widths } from './shapes.js'

function workload(
  name: string,
  [rows, channels]: readonly [number, number],
  dtype: Float,
  shape: readonly number[],
  operation: (a: { x: Tensor; y: Tensor }) => Tensor,
): Workload {
  const size = rows * channels
  const all = size * widths[dtype]
  const second = shape.reduce((n, d) => n * d, 1)
  return {
    name: `${name} ${rows}x${channels} ${dtype}`,
    traffic: { read: all + widths[dtype] * second, write: all },
    inputs(seed) {
      const data = normals(size, seed)
      return {
        byteLength: all,
        load(device) {
          const x = device.tensor(data, [rows, channels], dtype)
          const y = device.tensor(normals(second, seed + 1), shape, dtype)
          return { run: () => operation({ x, y }) }
        },
      }
    },
  }
}

const custom: Custom<'T' | 'C'> = {
  letters: { T: ['rows', 8192], C: ['columns', 1152] },
  dtypes: floats,
  workloads: ({ T, C }, dtype) => [
    workload('add', [T, C], dtype, [T, C], add),
    workload('add a row to', [T, C], dtype, [C], add),
    workload('mul', [T, C], dtype, [T, C], mul),
    workload('mul a column with', [T, C], dtype, [T, 1], mul),
  ],
}

export default {
  op: 'elementwise',
  workloads: standard(custom),
  custom,
} satisfies Benchmark
