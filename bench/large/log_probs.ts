// Log-probabilities of many rows: a training step on a GPU, and scaling.
import { tokenLogProbs, tokenLogProbsBackward } from 'p2r-kernels'
import { type Block, integers, normalBlock, tiled } from '../data.js'
import type { Backend, Series, Workload } from '../harness.js'
import { crossEntropy, lastRows, torchLogSoftmaxGather, tritonLogProbs } from '../peers/pytorch.js'

interface Options {
  backend?: Backend
  slow?: boolean
  series?: Series
}

export function logProbsOf(
  rows: number,
  vocabulary: number,
  dtype: 'f32' | 'bf16',
  backward: boolean,
  options: Options = {},
): Workload {
  const bytes = rows * vocabulary * (dtype === 'f32' ? 4 : 2)
  return {
    name: `${rows}x${vocabulary} ${dtype} ${backward ? 'bwd in place' : 'fwd'}`,
    traffic: backward ? { read: bytes, write: bytes, inPlace: true } : { read: bytes, write: 0 },
    ...options,
    inputs(seed) {
      const shape = [rows, vocabulary]
      const logits = normalBlock(shape, dtype, seed, 3, 64)
      const targets: Block = { data: integers(rows, vocabulary, seed), dtype: 'i32', shape: [rows] }
      return {
        byteLength: bytes,
        load(device) {
          const original = tiled(device, logits)
          const a = { logits: original, targets: tiled(device, targets) }
          if (!backward)
            return { run: () => tokenLogProbs(a), answer: () => tokenLogProbs(a).logProbs.read() }
          const dLogProbs = device.tensor(new Float32Array(rows).fill(1), [rows])
          const work = device.zeros(shape, dtype)
          const { stats } = tokenLogProbs(a)
          const run = () =>
            tokenLogProbsBackward({ ...a, logits: work, stats, dLogProbs, inPlace: true })
          return {
            before: () => work.copyFrom(original as typeof work),
            run,
            answer: () =>
              run()
                .slice(Math.max(0, rows - lastRows))
                .toFloat32(),
          }
        },
        peers: backward
          ? [crossEntropy(logits, targets)]
          : [torchLogSoftmaxGather(logits, targets), tritonLogProbs(logits, targets)],
      }
    },
  }
}

/** With Qwen3-VL's vocabulary, and with that of Qwen3.5. */
export const logProbsOnCuda = [
  logProbsOf(16_384, 248_320, 'bf16', false, { backend: 'cuda', slow: true }),
  logProbsOf(16_384, 248_320, 'bf16', true, { backend: 'cuda', slow: true }),
  logProbsOf(16_384, 151_936, 'bf16', false, { backend: 'cuda' }),
  logProbsOf(16_384, 151_936, 'bf16', true, { backend: 'cuda' }),
]
