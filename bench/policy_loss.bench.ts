import { policyLoss } from 'p2r-kernels'
import { evenly, normals, uniforms } from './data.js'
import type { Benchmark } from './harness.js'
import { policyLossLoop } from './peers/loops.js'

const sequences = 512
const length = 1024
const tokens = sequences * length
const cuSeqlens = evenly(sequences, length)

export default {
  op: 'policy_loss',
  workloads: [
    {
      name: `${sequences}x${length} ppo, on-policy`,
      // Log-probabilities and mask in, the gradient out.
      traffic: { read: tokens * 5, write: tokens * 4 },
      inputs(seed) {
        const logProbs = normals(tokens, seed, 0.5).map((x) => -Math.abs(x))
        const advantages = normals(sequences, seed + 1)
        const uniform = uniforms(seed)
        const mask = Uint8Array.from({ length: tokens }, () => (uniform() < 0.9 ? 1 : 0))
        return {
          byteLength: tokens * 5,
          load(device) {
            const a = {
              logProbs: device.tensor(logProbs, [tokens]),
              advantages: device.tensor(advantages, [sequences]),
              mask: device.tensor(mask, [tokens]),
              cuSeqlens,
            }
            return { run: () => policyLoss(a), answer: () => policyLoss(a).dLogProbs.read() }
          },
          peers: [policyLossLoop(logProbs, advantages, mask)],
        }
      },
    },
  ],
} satisfies Benchmark
