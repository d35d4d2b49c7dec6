import {
  gatherRows,
  gatherRowsBackward,
  meanPool,
  meanPoolBackward,
  scatterAddRows,
  scatterRows,
  type Tensor,
} from 'p2r-kernels'
import { evenly, integers, normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'

const rows = 8192
const channels = 1152
const size = rows * channels
const all = size * 4

function workload(
  name: string,
  traffic: { read: number; write: number },
  load: (x: Tensor, seed: number) => () => unknown,
): Workload {
  return {
    name: `${name} ${rows}x${channels} f32`,
    traffic,
    inputs(seed) {
      const x = normals(size, seed)
      return {
        byteLength: all,
        load: (device) => ({ run: load(device.tensor(x, [rows, channels]), seed) }),
      }
    },
  }
}

export default {
  op: 'rows',
  workloads: [
    workload('gather', { read: all, write: all }, (x, seed) => {
      const index = integers(rows, rows, seed)
      return () => gatherRows({ x, index })
    }),
    workload('gather bwd', { read: all, write: all }, (dOut, seed) => {
      const index = integers(rows, rows, seed)
      return () => gatherRowsBackward({ dOut, index, rows })
    }),
    workload('scatter a quarter', { read: all, write: all }, (x) => {
      const index = Int32Array.from({ length: rows / 4 }, (_, i) => i)
      const y = x.slice(rows / 2, rows / 2 + rows / 4)
      return () => scatterRows({ x, y, index })
    }),
    workload('scatter-add a quarter', { read: all + all / 4, write: all }, (x) => {
      const index = Int32Array.from({ length: rows / 4 }, (_, i) => i)
      const y = x.slice(rows / 2, rows / 2 + rows / 4)
      return () => scatterAddRows({ x, y, index })
    }),
    workload('mean of 64 tokens', { read: all, write: all / 64 }, (x) => {
      const cuSeqlens = evenly(rows / 64, 64)
      return () => meanPool({ x, cuSeqlens })
    }),
    workload('mean of 64 tokens bwd', { read: all / 64, write: all }, (x) => {
      const cuSeqlens = evenly(rows / 64, 64)
      const dOut = x.slice(0, rows / 64)
      return () => meanPoolBackward({ dOut, cuSeqlens })
    }),
  ],
} satisfies Benchmark
