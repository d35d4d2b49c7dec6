// Plain JavaScript loops, as one would write them without a library.
import type { Peer } from '../harness.js'

const loop = (tolerance: number, run: () => ArrayLike<number>, slow = false): Peer => ({
  name: 'JavaScript, 1 thread',
  threads: 1,
  slow,
  tolerance,
  open: async () => ({ run }),
})

export function logProbsLoop(logits: Float32Array, targets: Int32Array): Peer {
  const out = new Float32Array(targets.length)
  const vocabulary = logits.length / targets.length
  return loop(
    1e-5,
    () => {
      for (let n = 0; n < out.length; n++) {
        const start = n * vocabulary
        let max = -Infinity
        for (let i = start; i < start + vocabulary; i++) if (logits[i]! > max) max = logits[i]!
        let sum = 0
        for (let i = start; i < start + vocabulary; i++) sum += Math.exp(logits[i]! - max)
        out[n] = logits[start + targets[n]!]! - max - Math.log(sum)
      }
      return out
    },
    true,
  )
}

/** PPO with token-mean, on-policy (a ratio of 1) without old log-probs: the gradient of the loss. */
export function policyLossLoop(
  logProbs: Float32Array,
  oldLogProbs: Float32Array | undefined,
  advantages: Float32Array,
  mask: Uint8Array,
): Peer {
  const gradient = new Float32Array(logProbs.length)
  const length = logProbs.length / advantages.length
  const old = oldLogProbs ?? logProbs
  return loop(1e-5, () => {
    let tokens = 0
    for (let t = 0; t < mask.length; t++) tokens += mask[t]!
    let loss = 0
    for (let b = 0; b < advantages.length; b++)
      for (let t = b * length; t < (b + 1) * length; t++) {
        if (!mask[t]) {
          gradient[t] = 0
          continue
        }
        const ratio = Math.exp(logProbs[t]! - old[t]!)
        const clipped = Math.min(Math.max(ratio, 0.8), 1.2)
        const plain = -advantages[b]! * ratio
        const bounded = -advantages[b]! * clipped
        const most = advantages[b]! < 0 ? -3 * advantages[b]! : Infinity
        loss += Math.min(Math.max(plain, bounded), most)
        gradient[t] = (plain >= bounded && plain <= most ? plain : 0) / tokens
      }
    // Returned, so that the compiler cannot remove the sum.
    gradient[0]! += 0 * loss
    return gradient
  })
}

export function geluLoop(x: Float32Array): Peer {
  const out = new Float32Array(x.length)
  const c = Math.sqrt(2 / Math.PI)
  return loop(1e-5, () => {
    for (let i = 0; i < x.length; i++) {
      const v = x[i]!
      out[i] = 0.5 * v * (1 + Math.tanh(c * (v + 0.044715 * v * v * v)))
    }
    return out
  })
}
