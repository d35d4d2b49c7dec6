import { type Grid, visionPositions } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { type Custom, standard } from './shapes.js'

function workload(side: number, channels: number, patches: number): Workload {
  const gridThw: Grid[] = [[1, patches, patches]]
  const table = side * side * channels
  return {
    name: `${side}x${side}x${channels} over ${patches}x${patches} f32`,
    traffic: { read: 4 * table, write: 4 * patches * patches * channels },
    inputs(seed) {
      const data = normals(table, seed)
      return {
        byteLength: 4 * table,
        load(device) {
          const x = device.tensor(data, [side * side, channels])
          return { run: () => visionPositions({ table: x, gridThw }) }
        },
      }
    },
  }
}

/** The table of the 8B tower over a 2048 x 2048 image. */
const custom: Custom<'S' | 'C' | 'P'> = {
  letters: {
    S: ['side of the table', 48],
    C: ['channels', 1152],
    P: ['side of the image in patches, even', 128],
  },
  dtypes: ['f32'],
  workloads: ({ S, C, P }) => [workload(S, C, P)],
}

export default {
  op: 'positions',
  workloads: standard(custom),
  custom,
} satisfies Benchmark
