import {
  gatherRows,
  gatherRowsBackward,
  meanPool,
  meanPoolBackward,
  scatterAddRows,
  scatterRows,
  type Tensor,
} from 'p2r-kernels'
import { integers, normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { type Custom, type Float, floats, standard, widths } from './shapes.js'

function workload(
  name: string,
  [rows, channels]: readonly [number, number],
  dtype: Float,
  traffic: { read: number; write: number },
  load: (x: Tensor, seed: number) => () => unknown,
): Workload {
  const size = rows * channels
  return {
    name: `${name} ${rows}x${channels} ${dtype}`,
    traffic,
    inputs(seed) {
      const x = normals(size, seed)
      return {
        byteLength: size * widths[dtype],
        load: (device) => ({ run: load(device.tensor(x, [rows, channels], dtype), seed) }),
      }
    },
  }
}

/** The ends of sequences of 64 rows; the last may be shorter. */
function sequencesOf64(rows: number): Int32Array {
  const n = Math.ceil(rows / 64)
  return Int32Array.from({ length: n + 1 }, (_, i) => Math.min(64 * i, rows))
}

const custom: Custom<'T' | 'C'> = {
  letters: { T: ['rows', 8192], C: ['columns', 1152] },
  dtypes: floats,
  workloads({ T: rows, C: channels }, dtype) {
    const all = rows * channels * widths[dtype]
    const [quarter, half] = [Math.floor(rows / 4), Math.floor(rows / 2)]
    const cuSeqlens = sequencesOf64(rows)
    const sequences = cuSeqlens.length - 1
    const part = sequences * channels * widths[dtype]
    const row = (
      name: string,
      traffic: { read: number; write: number },
      load: (x: Tensor, seed: number) => () => unknown,
    ) => workload(name, [rows, channels], dtype, traffic, load)
    return [
      row('gather', { read: all, write: all }, (x, seed) => {
        const index = integers(rows, rows, seed)
        return () => gatherRows({ x, index })
      }),
      row('gather bwd', { read: all, write: all }, (dOut, seed) => {
        const index = integers(rows, rows, seed)
        return () => gatherRowsBackward({ dOut, index, rows })
      }),
      row('scatter a quarter', { read: all, write: all }, (x) => {
        const index = Int32Array.from({ length: quarter }, (_, i) => i)
        const y = x.slice(half, half + quarter)
        return () => scatterRows({ x, y, index })
      }),
      row('scatter-add a quarter', { read: all + all / 4, write: all }, (x) => {
        const index = Int32Array.from({ length: quarter }, (_, i) => i)
        const y = x.slice(half, half + quarter)
        return () => scatterAddRows({ x, y, index })
      }),
      row('mean of 64 tokens', { read: all, write: part }, (x) => {
        return () => meanPool({ x, cuSeqlens })
      }),
      row('mean of 64 tokens bwd', { read: part, write: all }, (x) => {
        const dOut = x.slice(0, sequences)
        return () => meanPoolBackward({ dOut, cuSeqlens })
      }),
    ]
  },
}

export default {
  op: 'rows',
  workloads: standard(custom),
  custom,
} satisfies Benchmark
