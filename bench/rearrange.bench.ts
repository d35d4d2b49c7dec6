import { concat, split, type Tensor, transpose } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'

const rows = 8192
const channels = 1152
const all = rows * channels * 4

function workload(
  name: string,
  shape: readonly number[],
  load: (x: Tensor<'f32'>) => () => unknown,
): Workload {
  return {
    name: `${name} ${shape.join('x')} f32`,
    traffic: { read: all, write: all },
    inputs(seed) {
      const data = normals(rows * channels, seed)
      return {
        byteLength: all,
        load: (device) => ({ run: load(device.tensor(data, shape)) }),
      }
    },
  }
}

const halves = [channels / 2, channels / 2]

export default {
  op: 'rearrange',
  workloads: [
    workload('concat of columns', [rows, channels], (x) => {
      const tensors = split({ x, sizes: halves, axis: 1 })
      return () => concat({ tensors, axis: 1 })
    }),
    workload(
      'split of columns',
      [rows, channels],
      (x) => () => split({ x, sizes: halves, axis: 1 }),
    ),
    workload('transpose', [rows, channels], (x) => () => transpose({ x })),
    workload('transpose heads', [rows, 9, 128], (x) => () => transpose({ x, axes: [0, 1] })),
  ],
} satisfies Benchmark
