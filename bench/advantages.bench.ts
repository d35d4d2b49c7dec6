import { groupAdvantages, informativeGroups, type Tensor } from 'p2r-kernels'
import { integers } from './data.js'
import type { Benchmark, Workload } from './harness.js'

const sequences = 512 * 8

function workload(
  name: string,
  load: (a: { rewards: Tensor; groups: Int32Array }) => unknown,
): Workload {
  return {
    // Too small for any ceiling: this measures the latency of the queue.
    name: `${name}, 512 groups of 8`,
    inputs(seed) {
      const rewards = Float32Array.from(integers(sequences, 2, seed))
      const groups = Int32Array.from({ length: sequences }, (_, i) => i >> 3)
      return {
        byteLength: sequences * 8,
        load(device) {
          const a = { rewards: device.tensor(rewards, [sequences]), groups }
          return { run: () => load(a) }
        },
      }
    },
  }
}

export default {
  op: 'advantages',
  workloads: [
    workload('grpo', groupAdvantages),
    workload('pass@k', (a) => groupAdvantages({ ...a, estimator: 'grpo_passk' })),
    workload('informative', informativeGroups),
  ],
} satisfies Benchmark
