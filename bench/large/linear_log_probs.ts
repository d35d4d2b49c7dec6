// The head of a model over a training step's tokens.
import { linearLogProbs, linearPolicyLoss, type Tensor } from 'p2r-kernels'
import { type Block, evenly, integers, normalBlock, normals, tiled } from '../data.js'
import type { Backend, Workload } from '../harness.js'
import { linearLogSoftmax } from '../peers/onnxruntime.js'
import { torchLinearLogProbs, torchLinearPolicyLoss } from '../peers/pytorch.js'

/** Tokens of one rollout. */
const length = 128

export function headOf(
  rows: number,
  channels: number,
  vocabulary: number,
  dtype: 'f32' | 'bf16',
  loss: boolean,
  options: { backend?: Backend; slow?: boolean } = {},
): Workload {
  const width = dtype === 'f32' ? 4 : 2
  const read = width * (rows + vocabulary) * channels
  return {
    name: `${rows}x${channels} x ${vocabulary} ${dtype} ${loss ? 'policy loss' : 'fwd'}`,
    // Logits, dHidden and dWeight: three products.
    flops: 2 * rows * channels * vocabulary * (loss ? 3 : 1),
    products: dtype,
    traffic: { read, write: loss ? (width * rows + 4 * vocabulary) * channels : 0 },
    ...options,
    inputs(seed) {
      // All rows for onnxruntime, which has no repeated blocks.
      const some = dtype === 'f32' ? vocabulary : 4748
      const hidden = normalBlock([rows, channels], dtype, seed, 1, dtype === 'f32' ? rows : 1024)
      const weight = normalBlock([vocabulary, channels], dtype, seed + 1, channels ** -0.5, some)
      const targets: Block = { data: integers(rows, vocabulary, seed), dtype: 'i32', shape: [rows] }
      const perSequence = normals(rows / length, seed + 2)
      const advantages: Block = {
        data: Float32Array.from({ length: rows }, (_, i) => perSequence[Math.floor(i / length)]!),
        dtype: 'f32',
        shape: [rows],
      }
      return {
        byteLength: read,
        load(device) {
          const a = {
            hidden: tiled(device, hidden),
            weight: tiled(device, weight),
            targets: tiled(device, targets),
          }
          if (!loss)
            return { run: () => linearLogProbs(a), answer: () => linearLogProbs(a).logProbs.read() }
          const b: typeof a & { advantages: Tensor; cuSeqlens: Int32Array } = {
            ...a,
            advantages: device.tensor(perSequence, [rows / length]),
            cuSeqlens: evenly(rows / length, length),
          }
          return {
            run: () => linearPolicyLoss(b),
            answer: () => linearPolicyLoss(b).dHidden.toFloat32(),
          }
        },
        peers: loss
          ? [torchLinearPolicyLoss(hidden, weight, targets, advantages)]
          : [
              ...(hidden.data instanceof Float32Array && weight.data instanceof Float32Array
                ? [linearLogSoftmax(hidden.data, weight.data, Int32Array.from(targets.data))]
                : []),
              torchLinearLogProbs(hidden, weight, targets),
            ],
      }
    },
  }
}

/** Qwen3-VL's vocabulary, and that of Qwen3.5. */
export const linearLogProbsOnCuda = [151_936, 248_320].flatMap((vocabulary) =>
  [false, true].map((loss) =>
    headOf(16_384, 2560, vocabulary, 'bf16', loss, {
      backend: 'cuda',
      slow: vocabulary > 151_936,
    }),
  ),
)
