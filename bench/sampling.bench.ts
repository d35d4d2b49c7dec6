import { sample, sampleTokens, type Tensor } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { type Custom, type Float, floats, standard, widths } from './shapes.js'

type Run = (logits: Tensor, seed: number) => { dispose(): void }

const workload = (
  [rows, vocabulary]: readonly [number, number],
  dtype: Float,
  name: string,
  run: Run,
): Workload => ({
  name: `${rows}x${vocabulary} ${dtype} ${name}`,
  traffic: { read: rows * vocabulary * widths[dtype], write: 0 },
  inputs(seed: number) {
    const data = normals(rows * vocabulary, seed, 3)
    return {
      byteLength: rows * vocabulary * widths[dtype],
      load(device) {
        const logits = device.tensor(data, [rows, vocabulary], dtype)
        return { run: () => run(logits, seed) }
      },
    }
  },
})

const custom: Custom<'T' | 'V'> = {
  letters: { T: ['rows', 64], V: ['vocabulary', 151_936] },
  dtypes: floats,
  workloads({ T, V }, dtype) {
    const seeds = Array.from({ length: T }, (_, i) => i)
    const row = (name: string, run: Run) => workload([T, V], dtype, name, run)
    return [
      row('temperature 1', (logits, seed) => sample({ logits, seed })),
      row('temperature 0', (logits, seed) => sample({ logits, temperature: 0, seed })),
      row('with log-probs', (logits) => sampleTokens({ logits, seeds })),
      row('top-k 20, top-p 0.8', (logits) =>
        sampleTokens({ logits, seeds, temperature: 0.7, topK: Math.min(20, V), topP: 0.8 }),
      ),
      row('top-p 0.9', (logits) => sampleTokens({ logits, seeds, topP: 0.9 })),
    ]
  },
}

export default {
  op: 'sampling',
  workloads: standard(custom),
  custom,
} satisfies Benchmark
