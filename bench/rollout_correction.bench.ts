import { type RolloutCorrectionOptions, rolloutCorrection } from 'p2r-kernels'
import { evenly, normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { type Custom, standard } from './shapes.js'

type Sizes = readonly [sequences: number, length: number]

/** Two arrays of log-probabilities in, weights and mask out. */
function correction(
  [sequences, length]: Sizes,
  name: string,
  options: RolloutCorrectionOptions,
): Workload {
  const tokens = sequences * length
  const cuSeqlens = evenly(sequences, length)
  return {
    name: `${sequences}x${length} ${name}`,
    traffic: { read: tokens * 8, write: tokens * 5 },
    cached: true,
    inputs(seed) {
      const logProbs = normals(tokens, seed, 0.5).map((x) => -Math.abs(x))
      const noise = normals(tokens, seed + 1, 0.05)
      const rollout = logProbs.map((x, t) => x + noise[t]!)
      return {
        byteLength: tokens * 8,
        load(device) {
          const a = {
            logProbs: device.tensor(logProbs, [tokens]),
            rolloutLogProbs: device.tensor(rollout, [tokens]),
            cuSeqlens,
            ...options,
          }
          return {
            run: () => rolloutCorrection(a),
            answer: () => rolloutCorrection(a).importanceWeights.read(),
          }
        },
      }
    },
  }
}

const custom: Custom<'B' | 'T'> = {
  letters: { B: ['sequences', 512], T: ['tokens of each', 1024] },
  dtypes: ['f32'],
  workloads: ({ B, T }) => [
    correction([B, T], 'truncated, inputs in the cache', {}),
    correction([B, T], 'of sequences with rejection, inputs in the cache', {
      level: 'geometric',
      reject: [{ measure: 'k3', over: 'mean', high: 0.01 }],
    }),
  ],
}

export default {
  op: 'rollout_correction',
  workloads: standard(custom),
  custom,
} satisfies Benchmark
