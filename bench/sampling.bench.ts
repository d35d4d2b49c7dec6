import { sample, sampleTokens, type Tensor } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'

const rows = 64
const vocabulary = 151_936
const bytes = rows * vocabulary * 4

type Run = (logits: Tensor<'f32'>, seed: number) => { dispose(): void }

const workload = (name: string, run: Run): Workload => ({
  name: `${rows}x${vocabulary} f32 ${name}`,
  traffic: { read: bytes, write: 0 },
  inputs(seed: number) {
    const data = normals(rows * vocabulary, seed, 3)
    return {
      byteLength: bytes,
      load(device) {
        const logits = device.tensor(data, [rows, vocabulary])
        return { run: () => run(logits, seed) }
      },
    }
  },
})

const seeds = Array.from({ length: rows }, (_, i) => i)

export default {
  op: 'sampling',
  workloads: [
    workload('temperature 1', (logits, seed) => sample({ logits, seed })),
    workload('temperature 0', (logits, seed) => sample({ logits, temperature: 0, seed })),
    workload('with log-probs', (logits) => sampleTokens({ logits, seeds })),
    workload('top-k 20, top-p 0.8', (logits) =>
      sampleTokens({ logits, seeds, temperature: 0.7, topK: 20, topP: 0.8 }),
    ),
    workload('top-p 0.9', (logits) => sampleTokens({ logits, seeds, topP: 0.9 })),
  ],
} satisfies Benchmark
