import { mean, sum, type Tensor } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { type Custom, type Float, floats, standard, widths } from './shapes.js'

const workload = (
  name: string,
  [rows, channels]: readonly [number, number],
  dtype: Float,
  axes: readonly number[],
  f: (a: { x: Tensor; axes: readonly number[] }) => Tensor,
): Workload => ({
  name: `${name} ${rows}x${channels} ${dtype}`,
  traffic: { read: rows * channels * widths[dtype], write: 0 },
  inputs(seed) {
    const data = normals(rows * channels, seed)
    return {
      byteLength: rows * channels * widths[dtype],
      load(device) {
        const x = device.tensor(data, [rows, channels], dtype)
        return { run: () => f({ x, axes }) }
      },
    }
  },
})

const custom: Custom<'T' | 'C'> = {
  letters: { T: ['rows', 8192], C: ['columns', 1152] },
  dtypes: floats,
  workloads: ({ T, C }, dtype) => [
    workload('sum of rows', [T, C], dtype, [1], sum),
    workload('sum of columns', [T, C], dtype, [0], sum),
    workload('mean of all', [T, C], dtype, [0, 1], mean),
  ],
}

export default {
  op: 'reduce',
  workloads: standard(custom),
  custom,
} satisfies Benchmark
