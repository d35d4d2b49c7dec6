import { applyRotary, visionRotary } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'

const side = 64
const [heads, headDim] = [16, 72]
const tokens = side * side
const size = tokens * heads * headDim
const tables = 2 * tokens * headDim

const bothTables = {
  name: `tables of ${side}x${side}, D ${headDim}`,
  traffic: { read: 0, write: 4 * tables },
  inputs: () => ({
    byteLength: 4 * tables,
    load: (device) => ({
      run: () => visionRotary({ gridThw: [[1, side, side]], headDim, device }),
    }),
  }),
} satisfies Workload

export default {
  op: 'rotary',
  workloads: [
    bothTables,
    {
      name: `apply ${tokens}x${heads}x${headDim} f32`,
      traffic: { read: 4 * (size + tables), write: 4 * size },
      inputs(seed) {
        const data = normals(size, seed)
        return {
          byteLength: 4 * size,
          load(device) {
            const { cos, sin } = visionRotary({ gridThw: [[1, side, side]], headDim, device })
            const x = device.tensor(data, [tokens, heads, headDim])
            return { run: () => applyRotary({ x, cos, sin }) }
          },
        }
      },
    },
  ],
} satisfies Benchmark
