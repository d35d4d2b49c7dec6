import { concat, split, type Tensor, transpose } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { type Custom, type Float, floats, standard, widths } from './shapes.js'

function workload(
  name: string,
  shape: readonly number[],
  dtype: Float,
  load: (x: Tensor) => () => unknown,
): Workload {
  const size = shape.reduce((n, d) => n * d, 1)
  const all = size * widths[dtype]
  return {
    name: `${name} ${shape.join('x')} ${dtype}`,
    traffic: { read: all, write: all },
    inputs(seed) {
      const data = normals(size, seed)
      return {
        byteLength: all,
        load: (device) => ({ run: load(device.tensor(data, shape, dtype)) }),
      }
    },
  }
}

/** The halves of `columns`; the first is the larger of an odd number. */
const halves = (columns: number): number[] => [Math.ceil(columns / 2), Math.floor(columns / 2)]

const custom: Custom<'T' | 'H' | 'D'> = {
  letters: { T: ['rows', 8192], H: ['heads', 9], D: ['head dimension', 128] },
  dtypes: floats,
  workloads({ T, H, D }, dtype) {
    const matrix = [T, H * D]
    const sizes = halves(H * D)
    return [
      workload('concat of columns', matrix, dtype, (x) => {
        const tensors = split({ x, sizes, axis: 1 })
        return () => concat({ tensors, axis: 1 })
      }),
      workload('split of columns', matrix, dtype, (x) => () => split({ x, sizes, axis: 1 })),
      workload('transpose', matrix, dtype, (x) => () => transpose({ x })),
      workload('transpose heads', [T, H, D], dtype, (x) => () => transpose({ x, axes: [0, 1] })),
    ]
  },
}

export default {
  op: 'rearrange',
  workloads: standard(custom),
  custom,
} satisfies Benchmark
