import { attention, attentionBackward, attentionMass, type Tensor } from 'p2r-kernels'
import { evenly, normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { attentionOnCuda, longAttention } from './large/attention.js'
import { multiHeadAttention } from './peers/onnxruntime.js'
import { scaledDotProductAttention } from './peers/pytorch.js'

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

function workload(s: Shape, backward: boolean, slow = false): Workload {
  const tokens = s.batch * s.length
  const size = tokens * s.heads * s.headDim
  const dims = [tokens, s.heads, s.headDim]
  const cuSeqlens = evenly(s.batch, s.length)
  return {
    name: `${s.batch}x${s.length}x${s.heads}x${s.headDim} f32 ${backward ? 'fwd+bwd' : 'fwd'}`,
    flops: products(s) * (backward ? 6 : 2),
    traffic: { read: size * 4 * (backward ? 4 : 3), write: size * 4 * (backward ? 4 : 1) },
    slow,
    inputs(seed) {
      const [q, k, v, dOut] = [0, 1, 2, 3].map((i) => normals(size, 4 * seed + i)) as [
        Float32Array,
        Float32Array,
        Float32Array,
        Float32Array,
      ]
      return {
        byteLength: size * 4 * (backward ? 4 : 3),
        load(device) {
          const a = {
            q: device.tensor(q, dims),
            k: device.tensor(k, dims),
            v: device.tensor(v, dims),
            cuSeqlens,
          }
          const gradient: Tensor | undefined = backward ? device.tensor(dOut, dims) : undefined
          return {
            run() {
              const { out, lse } = attention(a)
              if (gradient) attentionBackward({ ...a, dOut: gradient, out, lse })
            },
            answer() {
              const { out, lse } = attention(a)
              if (!gradient) return out.read()
              return attentionBackward({ ...a, dOut: gradient, out, lse }).dK.read()
            },
          }
        },
        peers: [
          ...(backward ? [] : [multiHeadAttention(s, q, k, v)]),
          scaledDotProductAttention(
            '',
            {
              q: { data: q, dtype: 'f32', shape: dims },
              k: { data: k, dtype: 'f32', shape: dims },
              v: { data: v, dtype: 'f32', shape: dims },
              dOut: { data: dOut, dtype: 'f32', shape: dims },
            },
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

export default {
  op: 'attention',
  workloads: [
    workload(shape(1, 1024, 16, 64), false),
    workload(shape(1, 4096, 16, 64), false, true),
    workload(shape(16, 256, 16, 72), false),
    workload(shape(1, 2048, 16, 80), false),
    workload(shape(1, 1024, 16, 64), true),
    workload(shape(4096, 64, 16, 80), false, true),
    longAttention(1024, 64, 'bf16', 'fwd', { backend: 'cpu' }),
    mass(shape(1, 1024, 16, 64)),
    ...attentionOnCuda,
  ],
} satisfies Benchmark
