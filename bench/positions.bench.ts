import { type Grid, visionPositions } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark } from './harness.js'

// The table of the 8B tower over a 2048 x 2048 image.
const [side, channels, patches] = [48, 1152, 128]
const gridThw: Grid[] = [[1, patches, patches]]
const table = side * side * channels

export default {
  op: 'positions',
  workloads: [
    {
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
    },
  ],
} satisfies Benchmark
