import { mean, sum } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'

const rows = 8192
const channels = 1152
const all = rows * channels * 4

const workload = (
  name: string,
  axes: readonly number[],
  f: typeof sum | typeof mean,
): Workload => ({
  name: `${name} ${rows}x${channels} f32`,
  traffic: { read: all, write: 0 },
  inputs(seed) {
    const data = normals(rows * channels, seed)
    return {
      byteLength: all,
      load(device) {
        const x = device.tensor(data, [rows, channels])
        return { run: () => f({ x, axes }) }
      },
    }
  },
})

export default {
  op: 'reduce',
  workloads: [
    workload('sum of rows', [1], sum),
    workload('sum of columns', [0], sum),
    workload('mean of all', [0, 1], mean),
  ],
} satisfies Benchmark
