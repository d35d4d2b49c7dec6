// Attention over one long sequence: the traces of large images on a GPU, and scaling.
import { attention, attentionBackward } from 'p2r-kernels'
import { normalBlock, tiled } from '../data.js'
import type { Backend, Series, Workload } from '../harness.js'
import { attentionPeer, lastRows } from '../peers/pytorch.js'

const heads = 16

type Pass = 'fwd' | 'bwd' | 'bwd, any order'

interface Options {
  backend?: Backend
  kernel?: string
  slow?: boolean
  series?: Series
}

/** The backward pass alone counts five products, as is customary: 10 T² D H. */
export function longAttention(
  length: number,
  headDim: number,
  dtype: 'f32' | 'bf16',
  pass: Pass,
  options: Options = {},
): Workload {
  const shape = [length, heads, headDim]
  const bytes = length * heads * headDim * (dtype === 'f32' ? 4 : 2)
  const backward = pass !== 'fwd'
  const deterministic = pass !== 'bwd, any order'
  const { kernel } = options
  const cuSeqlens = [0, length]
  return {
    name: `1x${length}x${heads}x${headDim} ${dtype} ${pass}${kernel ? ` by ${kernel}` : ''}`,
    flops: (backward ? 10 : 4) * length ** 2 * heads * headDim,
    products: dtype,
    traffic: { read: bytes * (backward ? 5 : 3), write: bytes * (backward ? 3 : 1) },
    ...options,
    inputs(seed) {
      const block = (i: number) => normalBlock(shape, dtype, 4 * seed + i)
      const arrays = { q: block(0), k: block(1), v: block(2), dOut: block(3) }
      const kinds =
        dtype === 'f32'
          ? (['sdpa'] as const)
          : (['flash3', 'cudnn', 'sdpa cudnn', 'sdpa flash'] as const)
      const peerOf = (kind: (typeof kinds)[number]) =>
        attentionPeer(kind, arrays, {
          sequences: 1,
          pass: backward ? 'bwd' : 'fwd',
          deterministic,
        })
      const last = Math.max(0, length - lastRows)
      return {
        byteLength: bytes * (backward ? 5 : 3),
        load(device) {
          const a = {
            q: tiled(device, arrays.q),
            k: tiled(device, arrays.k),
            v: tiled(device, arrays.v),
            cuSeqlens,
            ...(kernel ? { kernel } : {}),
          }
          if (!backward)
            return {
              run: () => attention(a),
              answer: () => attention(a).out.slice(last).toFloat32(),
            }
          const b = { ...a, ...attention(a), dOut: tiled(device, arrays.dOut), deterministic }
          return {
            run: () => attentionBackward(b),
            answer: () => attentionBackward(b).dK.slice(last).toFloat32(),
          }
        },
        // Peers are compared with the default kernel only.
        peers: kernel ? [] : kinds.map(peerOf),
      }
    },
  }
}

/** The sequences of large images, in tokens; the last is one of 8K. */
const traces = [8836, 15_376, 24_336, 35_344, 47_376, 62_500, 129_600]

const headDims = [64, 72, 80, 128]

export const attentionOnCuda = [
  ...headDims.flatMap((headDim) =>
    traces.flatMap((length) =>
      (['fwd', 'bwd', 'bwd, any order'] as const).map((pass) =>
        longAttention(length, headDim, 'bf16', pass, {
          backend: 'cuda',
          // In a quick run: one length for each head dimension, all lengths for the hardest.
          slow: headDim === 72 ? pass !== 'fwd' && length !== 15_376 : length !== 15_376,
        }),
      ),
    ),
  ),
  // The kernels that are not the default on Hopper.
  ...headDims.flatMap((headDim) =>
    ['mma', 'plain'].flatMap((kernel) =>
      (['fwd', 'bwd'] as const).map((pass) =>
        longAttention(traces[0]!, headDim, 'bf16', pass, { backend: 'cuda', kernel, slow: true }),
      ),
    ),
  ),
]
