import { sample } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark } from './harness.js'

const rows = 64
const vocabulary = 151_936
const bytes = rows * vocabulary * 4

export default {
  op: 'sampling',
  workloads: [1, 0].map((temperature) => ({
    name: `${rows}x${vocabulary} f32 temperature ${temperature}`,
    traffic: { read: bytes, write: 0 },
    inputs(seed: number) {
      const data = normals(rows * vocabulary, seed, 3)
      return {
        byteLength: bytes,
        load(device) {
          const logits = device.tensor(data, [rows, vocabulary])
          return { run: () => sample({ logits, temperature, seed }) }
        },
      }
    },
  })),
} satisfies Benchmark
