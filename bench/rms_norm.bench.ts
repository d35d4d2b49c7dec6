import { rmsNorm, rmsNormBackward } from 'p2r-kernels'
import { normals } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { type Custom, type Float, widths } from './shapes.js'

// Qwen3-VL-2B: a prompt's and one token's hidden states, and the queries of a prompt, each head alone.
const prompt: [number, number] = [4096, 2048]
const token: [number, number] = [1, 2048]
const queries: [number, number] = [4096 * 16, 128]

function workload(
  name: string,
  [rows, channels]: readonly [number, number],
  kind: 'fwd' | 'fwd of a sum' | 'bwd' = 'fwd',
  dtype: Float = 'bf16',
): Workload {
  const size = rows * channels
  const tensors = { fwd: [1, 1], 'fwd of a sum': [2, 2], bwd: [2, 1] } as const
  const [read, write] = tensors[kind].map((n) => n * size * widths[dtype]) as [number, number]
  return {
    name: `${name} ${rows}x${channels} ${dtype} ${kind}`,
    traffic: { read, write },
    inputs(seed) {
      const x = normals(size, seed)
      const second = normals(size, seed + 1)
      return {
        byteLength: read,
        load(device) {
          const tensor = (data: Float32Array) => device.tensor(data, [rows, channels], dtype)
          const weight = device.tensor(normals(channels, seed + 2), [channels], dtype)
          const a = { x: tensor(x), weight }
          if (kind === 'fwd') return { run: () => rmsNorm(a) }
          const other = tensor(second)
          if (kind === 'fwd of a sum') return { run: () => rmsNorm({ ...a, residual: other }) }
          const { rstd } = rmsNorm(a)
          return { run: () => rmsNormBackward({ ...a, dOut: other, rstd }) }
        },
      }
    },
  }
}

const custom: Custom<'T' | 'C'> = {
  letters: { T: ['rows', prompt[0]], C: ['channels', prompt[1]] },
  dtypes: ['bf16', 'f32', 'f16'],
  workloads: ({ T, C }, dtype) =>
    (['fwd', 'fwd of a sum', 'bwd'] as const).map((kind) => workload('rows', [T, C], kind, dtype)),
}

export default {
  op: 'rms_norm',
  workloads: [
    workload('prompt', prompt),
    workload('prompt', prompt, 'fwd of a sum'),
    workload('prompt', prompt, 'bwd'),
    workload('queries', queries),
    workload('token', token, 'fwd of a sum'),
  ],
  custom,
} satisfies Benchmark
