import { attention, attentionBackward, attentionMass, type Tensor } from 'p2r-kernels'
import { type Block, bf16Bits, evenly, normalBlock, normals, tiled } from './data.js'
import type { Backend, Benchmark, Workload } from './harness.js'
import { attentionOnCuda } from './large/attention.js'
import { attentions } from './peers/onnxruntime.js'
import { attentionPeer } from './peers/pytorch.js'
import type { Custom } from './shapes.js'

interface Shape {
  batch: number
  length: number
  heads: number
  headDim: number
}

const shape = (batch: number, length: number, heads: number, headDim: number): Shape => ({
  batch,
  length,
  heads,
  headDim,
})

/** 4 S² H D forward: two products; 8 more backward, the logits not counted twice. */
const products = ({ batch, length, heads, headDim }: Shape): number =>
  2 * batch * length ** 2 * heads * headDim

function workload(
  s: Shape,
  backward: boolean,
  options: { dtype?: 'f32' | 'bf16'; slow?: boolean; backend?: Backend; kernel?: string } = {},
): Workload {
  const { dtype = 'f32', kernel } = options
  const width = dtype === 'f32' ? 4 : 2
  const tokens = s.batch * s.length
  const size = tokens * s.heads * s.headDim
  const dims = [tokens, s.heads, s.headDim]
  const cuSeqlens = evenly(s.batch, s.length)
  return {
    name: `${s.batch}x${s.length}x${s.heads}x${s.headDim} ${dtype} ${backward ? 'fwd+bwd' : 'fwd'}${kernel ? ` by ${kernel}` : ''}`,
    flops: products(s) * (backward ? 6 : 2),
    products: dtype,
    traffic: { read: size * width * (backward ? 4 : 3), write: size * width * (backward ? 4 : 1) },
    ...options,
    inputs(seed) {
      const [q, k, v, dOut] = [0, 1, 2, 3].map((i) => normals(size, 4 * seed + i)) as [
        Float32Array,
        Float32Array,
        Float32Array,
        Float32Array,
      ]
      const block = (data: Float32Array): Block => ({
        data: dtype === 'f32' ? data : bf16Bits(data),
        dtype,
        shape: dims,
      })
      return {
        byteLength: size * width * (backward ? 4 : 3),
        load(device) {
          const a = {
            q: device.tensor(q, dims, dtype),
            k: device.tensor(k, dims, dtype),
            v: device.tensor(v, dims, dtype),
            cuSeqlens,
            ...(kernel ? { kernel } : {}),
          }
          const gradient: Tensor | undefined = backward
            ? device.tensor(dOut, dims, dtype)
            : undefined
          return {
            run() {
              const { out, lse } = attention(a)
              if (gradient) attentionBackward({ ...a, dOut: gradient, out, lse })
            },
            answer() {
              const { out, lse } = attention(a)
              if (!gradient) return out.toFloat32()
              return attentionBackward({ ...a, dOut: gradient, out, lse }).dK.toFloat32()
            },
          }
        },
        // Peers are compared with the default kernel only.
        peers: kernel
          ? []
          : [
              ...(backward || dtype !== 'f32' || s.batch > 1000 ? [] : attentions(s, q, k, v)),
              attentionPeer(
                'sdpa',
                { q: block(q), k: block(k), v: block(v), dOut: block(dOut) },
                { sequences: s.batch, pass: backward ? 'fwd+bwd' : 'fwd', last: 0 },
              ),
            ],
      }
    },
  }
}

/** The column sums: half a forward pass. */
function mass(s: Shape): Workload {
  const { inputs, ...rest } = workload(s, false)
  const size = s.batch * s.length * s.heads * s.headDim
  return {
    ...rest,
    name: rest.name.replace('fwd', 'mass'),
    flops: products(s),
    traffic: { read: size * 8, write: s.batch * s.length * s.heads * 4 },
    inputs: (seed) => ({
      byteLength: size * 8,
      load(device) {
        const dims = [s.batch * s.length, s.heads, s.headDim]
        const [q, k] = [
          device.tensor(normals(size, seed), dims),
          device.tensor(normals(size, seed + 1), dims),
        ]
        const cuSeqlens = evenly(s.batch, s.length)
        const { lse } = attention({ q, k, v: k, cuSeqlens })
        return { run: () => attentionMass({ q, k, lse, cuSeqlens }) }
      },
    }),
  }
}

/** A decoder's prefill, as Qwen3-VL-2B's: each key head for two query heads, half of the logits masked. */
function causal(
  length: number,
  dtype: 'f32' | 'bf16',
  backward: boolean,
  options: Pick<Workload, 'slow' | 'backend'> = {},
  [heads, kvHeads, headDim] = [16, 8, 128] as readonly [number, number, number],
): Workload {
  const width = dtype === 'f32' ? 4 : 2
  const bytes = (count: number): number => length * count * headDim * width
  return {
    name: `1x${length}x${heads}(${kvHeads})x${headDim} ${dtype} causal ${backward ? 'fwd+bwd' : 'fwd'}`,
    ...options,
    flops: products({ batch: 1, length, heads, headDim }) * (backward ? 3 : 1),
    products: dtype,
    traffic: {
      read: (bytes(heads) + 2 * bytes(kvHeads)) * (backward ? 2 : 1),
      write: bytes(heads) + (backward ? bytes(heads) + 2 * bytes(kvHeads) : 0),
    },
    inputs(seed) {
      const rows = (count: number, at: number): Block =>
        normalBlock([length, count, headDim], dtype, 4 * seed + at)
      return {
        byteLength: bytes(heads) + 2 * bytes(kvHeads),
        load(device) {
          const a = {
            q: tiled(device, rows(heads, 0)),
            k: tiled(device, rows(kvHeads, 1)),
            v: tiled(device, rows(kvHeads, 2)),
            cuSeqlens: [0, length],
            causal: true,
          }
          const dOut = tiled(device, rows(heads, 3))
          return {
            run() {
              const { out, lse } = attention(a)
              if (backward) attentionBackward({ ...a, dOut, out, lse })
            },
          }
        },
      }
    },
  }
}

const custom: Custom<'B' | 'T' | 'H' | 'K' | 'D'> = {
  letters: {
    B: ['sequences', 1],
    T: ['tokens of each', 1024],
    H: ['heads', 16],
    K: ['heads of keys, which divide H, in the causal rows', 8],
    D: ['head dimension', 64],
  },
  dtypes: ['f32', 'bf16'],
  workloads({ B, T, H, K, D }, type) {
    const dtype = type === 'bf16' ? 'bf16' : 'f32'
    const all = [false, true].map((backward) => workload(shape(B, T, H, D), backward, { dtype }))
    // Those are of one sequence.
    const masked = H % K === 0 && B === 1
    return [...all, ...(masked ? [false, true].map((b) => causal(T, dtype, b, {}, [H, K, D])) : [])]
  },
}

export default {
  op: 'attention',
  workloads: [
    workload(shape(1, 1024, 16, 64), false),
    workload(shape(1, 4096, 16, 64), false, { slow: true }),
    workload(shape(16, 256, 16, 72), false),
    workload(shape(1, 2048, 16, 80), false),
    workload(shape(4096, 64, 2, 80), false),
    workload(shape(1, 1024, 16, 64), true),
    workload(shape(1, 1024, 16, 64), false, { dtype: 'bf16' }),
    workload(shape(1, 4096, 16, 64), false, { dtype: 'bf16', slow: true }),
    workload(shape(16, 256, 16, 72), false, { dtype: 'bf16' }),
    workload(shape(1, 2048, 16, 80), false, { dtype: 'bf16' }),
    workload(shape(4096, 64, 2, 80), false, { dtype: 'bf16' }),
    workload(shape(1, 1024, 16, 64), true, { dtype: 'bf16' }),
    mass(shape(1, 1024, 16, 64)),
    causal(2048, 'f32', false),
    causal(2048, 'bf16', false),
    causal(2048, 'bf16', true),
    causal(4096, 'bf16', false, { slow: true, backend: 'cuda' }),
    causal(4096, 'bf16', true, { slow: true, backend: 'cuda' }),
    ...attentionOnCuda,
    // Windows for which 'wgmma' is not the default, on Hopper.
    ...[false, true].map((backward) =>
      workload(shape(4096, 64, 2, 80), backward, {
        dtype: 'bf16',
        slow: true,
        backend: 'cuda',
        kernel: 'wgmma',
      }),
    ),
    workload(shape(4096, 64, 2, 80), true, { dtype: 'bf16', slow: true, backend: 'cuda' }),
  ],
  custom,
} satisfies Benchmark
