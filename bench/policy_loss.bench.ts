import { applyKlPenalty, type PolicyLossOptions, policyLoss } from 'p2r-kernels'
import { evenly, normals, uniforms } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { policyLossLoop } from './peers/loops.js'
import { type Custom, standard } from './shapes.js'

type Sizes = readonly [sequences: number, length: number]

/** Another policy's log-probabilities of the same tokens: their logits against all others are moved by noise. */
function moved(logProbs: Float32Array, noise: Float32Array): Float32Array {
  return logProbs.map((x, t) => {
    const logit = x - Math.log(-Math.expm1(x)) + noise[t]!
    return -Math.log1p(Math.exp(-logit))
  })
}

/** Without a reference policy. Log-probabilities and mask in, the gradient out. */
function loss(
  [sequences, length]: Sizes,
  name: string,
  onPolicy: boolean,
  cached: boolean,
  objective: NonNullable<PolicyLossOptions['objective']> = 'ppo',
): Workload {
  const tokens = sequences * length
  const cuSeqlens = evenly(sequences, length)
  const inputBytes = tokens * (onPolicy ? 5 : 9)
  return {
    name: `${sequences}x${length} ${name}`,
    traffic: { read: inputBytes, write: tokens * 4 },
    cached,
    inputs(seed) {
      const logProbs = normals(tokens, seed, 0.5).map((x) => -Math.abs(x))
      const old = onPolicy ? undefined : moved(logProbs, normals(tokens, seed + 2, 0.1))
      const advantages = normals(sequences, seed + 1)
      const uniform = uniforms(seed)
      const mask = Uint8Array.from({ length: tokens }, () => (uniform() < 0.9 ? 1 : 0))
      return {
        byteLength: inputBytes,
        load(device) {
          const a = {
            logProbs: device.tensor(logProbs, [tokens]),
            ...(old ? { oldLogProbs: device.tensor(old, [tokens]) } : {}),
            advantages: device.tensor(advantages, [sequences]),
            mask: device.tensor(mask, [tokens]),
            cuSeqlens,
            objective,
          }
          return { run: () => policyLoss(a), answer: () => policyLoss(a).dLogProbs.read() }
        },
        ...(objective === 'ppo' && { peers: [policyLossLoop(logProbs, old, advantages, mask)] }),
      }
    },
  }
}

/** The KL of each sequence from a reference policy, off its reward. */
function klPenalty([sequences, length]: Sizes): Workload {
  const tokens = sequences * length
  const cuSeqlens = evenly(sequences, length)
  const inputBytes = tokens * 8 + sequences * 4
  return {
    name: `${sequences}x${length} KL in the reward`,
    traffic: { read: inputBytes, write: sequences * 4 },
    inputs(seed) {
      const logProbs = normals(tokens, seed, 0.5).map((x) => -Math.abs(x))
      const reference = moved(logProbs, normals(tokens, seed + 2, 0.1))
      const rewards = normals(sequences, seed + 1)
      return {
        byteLength: inputBytes,
        load(device) {
          const a = {
            rewards: device.tensor(rewards, [sequences]),
            logProbs: device.tensor(logProbs, [tokens]),
            refLogProbs: device.tensor(reference, [tokens]),
            cuSeqlens,
            klCoef: 0.01,
          }
          return { run: () => applyKlPenalty(a), answer: () => applyKlPenalty(a).read() }
        },
      }
    },
  }
}

const custom: Custom<'B' | 'T'> = {
  letters: { B: ['sequences', 512], T: ['tokens of each', 1024] },
  dtypes: ['f32'],
  workloads: ({ B, T }) => [
    loss([B, T], 'ppo, inputs in the cache', false, true),
    loss([B, T], 'ppo, on-policy', true, false),
    ...(['dppo_tv', 'dppo_kl', 'gmpo', 'vespo', 'luspo', 'clip_cov', 'kl_cov'] as const).map(
      (objective) => loss([B, T], `${objective}, inputs in the cache`, false, true, objective),
    ),
    klPenalty([B, T]),
  ],
}

export default {
  op: 'policy_loss',
  workloads: standard(custom),
  custom,
} satisfies Benchmark
