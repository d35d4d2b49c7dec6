import { groupAdvantages, informativeGroups, type Tensor } from 'p2r-kernels'
import { integers } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { type Custom, standard } from './shapes.js'

function workload(
  [groups, size]: readonly [number, number],
  name: string,
  load: (a: { rewards: Tensor; groups: Int32Array }) => unknown,
): Workload {
  const sequences = groups * size
  return {
    // Too small for any ceiling: this measures the latency of the queue.
    name: `${name}, ${groups} groups of ${size}`,
    inputs(seed) {
      const rewards = Float32Array.from(integers(sequences, 2, seed))
      const groupOf = Int32Array.from({ length: sequences }, (_, i) => Math.floor(i / size))
      return {
        byteLength: sequences * 8,
        load(device) {
          const a = { rewards: device.tensor(rewards, [sequences]), groups: groupOf }
          return { run: () => load(a) }
        },
      }
    },
  }
}

const custom: Custom<'B' | 'G'> = {
  letters: { B: ['groups', 512], G: ['samples of each', 8] },
  dtypes: ['f32'],
  workloads: ({ B, G }) => [
    workload([B, G], 'grpo', groupAdvantages),
    workload([B, G], 'pass@k', (a) => groupAdvantages({ ...a, estimator: 'grpo_passk' })),
    workload([B, G], 'informative', informativeGroups),
  ],
}

export default {
  op: 'advantages',
  workloads: standard(custom),
  custom,
} satisfies Benchmark
