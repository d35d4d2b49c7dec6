import { applyRotary, mropeTables, visionRotary } from 'p2r-kernels'
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

const prompt = 4096
const multimodal = {
  name: `multimodal tables of ${prompt}, D 128`,
  traffic: { read: 0, write: 4 * 2 * prompt * 128 },
  inputs: () => ({
    byteLength: 4 * 2 * prompt * 128,
    load: (device) => {
      const positions = Int32Array.from({ length: 3 * prompt }, (_, i) => i % prompt)
      const a = { positions, headDim: 128, theta: 5e6, sections: [24, 20, 20] as const, device }
      return { run: () => mropeTables(a) }
    },
  }),
} satisfies Workload

export default {
  op: 'rotary',
  workloads: [
    bothTables,
    multimodal,
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
