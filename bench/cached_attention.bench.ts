import { cachedAttention, KvCache } from 'p2r-kernels'
import { type Block, evenly, normalBlock, tiled } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import type { Custom } from './shapes.js'

/** Qwen3-VL-2B's. */
const modelSizes = [16, 8, 128] as const
const pageSize = 16

/** One more token for each sequence of `length` tokens, which have all of them in common if `shared`. */
function decode(
  sequences: number,
  length: number,
  shared: boolean,
  options: Pick<Workload, 'slow' | 'backend'> = {},
  [heads, kvHeads, headDim]: readonly [number, number, number] = modelSizes,
): Workload {
  const rowBytes = 2 * kvHeads * headDim * 2
  return {
    name: `${sequences}x${length}x${heads}x${headDim} bf16 decode${shared ? ', shared prompt' : ''}`,
    ...options,
    flops: 4 * sequences * length * heads * headDim,
    products: 'bf16',
    // A shared prompt is read for each of its readers.
    traffic: { read: sequences * length * rowBytes, write: sequences * rowBytes },
    inputs(seed) {
      const rows = (count: number, width: number, at: number): Block =>
        normalBlock([count, width, headDim], 'bf16', 4 * seed + at)
      return {
        byteLength: sequences * length * rowBytes,
        load(device) {
          const perSequence = Math.ceil((length + 1) / pageSize)
          const pages = shared ? perSequence + 2 * sequences : sequences * perSequence
          const cache = new KvCache(device, {
            layers: 1,
            kvHeads,
            headDim,
            pages,
            pageSize,
            dtype: 'bf16',
          })
          const prompt = (): number => {
            const sequence = cache.add()
            cachedAttention({
              q: tiled(device, rows(length, heads, 0)),
              k: tiled(device, rows(length, kvHeads, 1)),
              v: tiled(device, rows(length, kvHeads, 2)),
              cuSeqlens: [0, length],
              cache,
              layer: 0,
              sequences: [sequence],
            })
            return sequence
          }
          const first = prompt()
          const list = Array.from({ length: sequences }, (_, i) => {
            if (shared) return cache.add(first)
            return i === 0 ? first : prompt()
          })
          const a = {
            q: tiled(device, rows(sequences, heads, 0)),
            k: tiled(device, rows(sequences, kvHeads, 1)),
            v: tiled(device, rows(sequences, kvHeads, 2)),
            cuSeqlens: evenly(sequences, 1),
            cache,
            layer: 0,
            sequences: list,
          }
          return {
            before: () => {
              for (const sequence of list) cache.truncate(sequence, length)
            },
            run: () => cachedAttention(a),
          }
        },
      }
    },
  }
}

const custom: Custom<'B' | 'T' | 'H' | 'K' | 'D'> = {
  letters: {
    B: ['sequences', 1],
    T: ['cached tokens of each', 1500],
    H: ['heads', modelSizes[0]],
    K: ['heads of keys, which divide H', modelSizes[1]],
    D: ['head dimension', modelSizes[2]],
  },
  dtypes: ['bf16'],
  workloads: ({ B, T, H, K, D }) => [
    decode(B, T, false, {}, [H, K, D]),
    ...(B > 1 ? [decode(B, T, true, {}, [H, K, D])] : []),
  ],
}

export default {
  op: 'cached_attention',
  workloads: [
    decode(1, 1500, false),
    decode(1, 4096, false),
    decode(8, 1500, true),
    decode(64, 4096, false, { slow: true, backend: 'cuda' }),
  ],
  custom,
} satisfies Benchmark
