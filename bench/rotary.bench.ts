import { applyRotary, mropeTables, visionRotary } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { type Custom, type Float, floats, widths } from './shapes.js'

const side = 64
const [heads, headDim] = [16, 72]
const tokens = side * side
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

/** Of a grid of patches. */
function apply(
  [down, across]: readonly [number, number],
  heads: number,
  headDim: number,
  dtype: Float = 'f32',
): Workload {
  const tokens = down * across
  const bytes = tokens * heads * headDim * widths[dtype]
  return {
    name: `apply ${tokens}x${heads}x${headDim} ${dtype}`,
    traffic: { read: bytes + 4 * 2 * tokens * headDim, write: bytes },
    inputs(seed) {
      const data = normals(tokens * heads * headDim, seed)
      return {
        byteLength: bytes,
        load(device) {
          const { cos, sin } = visionRotary({ gridThw: [[1, down, across]], headDim, device })
          const x = device.tensor(data, [tokens, heads, headDim], dtype)
          return { run: () => applyRotary({ x, cos, sin }) }
        },
      }
    },
  }
}

const custom: Custom<'T' | 'H' | 'D'> = {
  letters: {
    T: ['tokens, a multiple of 4', tokens],
    H: ['heads', heads],
    D: ['head dimension, a multiple of 8', headDim],
  },
  dtypes: floats,
  workloads: ({ T, H, D }, dtype) => [apply([2, T / 2], H, D, dtype)],
}

export default {
  op: 'rotary',
  workloads: [bothTables, multimodal, apply([side, side], heads, headDim)],
  custom,
} satisfies Benchmark
