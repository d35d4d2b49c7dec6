// The vision tower of Qwen3-VL and Qwen3.5 in float64, written plainly.
import type { Grid } from 'p2r-kernels'
import { mergeBlockOrder } from './harness.js'

export interface TowerConfig {
  depth: number
  hidden_size: number
  num_heads: number
  intermediate_size: number
  out_hidden_size: number
  num_position_embeddings: number
  patch_size: number
}

type Matrix = Float64Array[]

const dot = (a: ArrayLike<number>, b: ArrayLike<number>): number => {
  let sum = 0
  for (let i = 0; i < a.length; i++) sum += a[i]! * b[i]!
  return sum
}
const rowsOf = (data: ArrayLike<number>, width: number): Matrix =>
  Array.from({ length: data.length / width }, (_, i) =>
    Float64Array.from({ length: width }, (_, j) => data[i * width + j]!),
  )

/** Simpson's rule, with 2000 steps: far more digits than f32 has. */
function normalCdf(x: number): number {
  const [n, width] = [2000, x / 2000]
  let sum = 0
  for (let i = 0; i <= n; i++) {
    const weight = i === 0 || i === n ? 1 : i % 2 ? 4 : 2
    sum += weight * Math.exp(-((i * width) ** 2) / 2)
  }
  return 0.5 + (sum * width) / 3 / Math.sqrt(2 * Math.PI)
}
const geluTanh = (x: number) =>
  0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)))

/** merged [T / 4, out_hidden_size], of images and videos; mergers join 2 x 2 patches. */
export function encodeVision(
  c: TowerConfig,
  weights: Readonly<Record<string, ArrayLike<number>>>,
  pixels: ArrayLike<number>,
  grids: readonly Grid[],
): number[] {
  const D = c.hidden_size / c.num_heads
  const linear = (name: string, x: Matrix): Matrix => {
    const weight = rowsOf(weights[`${name}.weight`]!, x[0]!.length)
    const bias = weights[`${name}.bias`]!
    return x.map((row) => Float64Array.from(weight, (w, i) => dot(w, row) + bias[i]!))
  }
  const norm = (name: string, x: Matrix): Matrix =>
    x.map((row) => {
      const mean = row.reduce((s, v) => s + v, 0) / row.length
      const variance = row.reduce((s, v) => s + (v - mean) ** 2, 0) / row.length
      const [w, b] = [weights[`${name}.weight`]!, weights[`${name}.bias`]!]
      return row.map((v, i) => ((v - mean) / Math.sqrt(variance + 1e-6)) * w[i]! + b[i]!)
    })
  const plus = (a: Matrix, b: Matrix): Matrix => a.map((row, t) => row.map((v, i) => v + b[t]![i]!))

  const places = [...mergeBlockOrder(grids, 2)]
  // Bilinear between the entries of a square table whose corners are the image's.
  const side = Math.sqrt(c.num_position_embeddings)
  const table = rowsOf(weights['pos_embed.weight']!, c.hidden_size)
  const between = (i: number, n: number): [number, number, number] => {
    const at = n > 1 ? (i * (side - 1)) / (n - 1) : 0
    const low = Math.floor(at)
    return [low, Math.min(low + 1, side - 1), at - low]
  }
  const positions = places.map(({ row, column, h, w }) => {
    const [top, bottom, y] = between(row, h)
    const [left, right, x] = between(column, w)
    const at = (r: number, k: number) => table[r * side + k]!
    return Float64Array.from({ length: c.hidden_size }, (_, i) => {
      const above = at(top, left)[i]! * (1 - x) + at(top, right)[i]! * x
      const below = at(bottom, left)[i]! * (1 - x) + at(bottom, right)[i]! * x
      return above * (1 - y) + below * y
    })
  })
  // The first half of the angles turns with the row, the second with the column; the halves of a head pair up.
  const angles = places.map(({ row, column }) =>
    Float64Array.from({ length: D / 2 }, (_, j) => {
      const quarter = D / 4
      return (j < quarter ? row : column) * 10_000 ** -((j % quarter) / quarter)
    }),
  )
  const rotated = (head: Float64Array, t: number): Float64Array =>
    head.map((v, i) => {
      const j = i % (D / 2)
      const other = i < D / 2 ? -head[i + D / 2]! : head[i - D / 2]!
      return v * Math.cos(angles[t]![j]!) + other * Math.sin(angles[t]![j]!)
    })

  const patches = rowsOf(pixels, 6 * c.patch_size ** 2)
  let x = plus(linear('patch_embed.proj', patches), positions)
  for (let layer = 0; layer < c.depth; layer++) {
    const block = `blocks.${layer}`
    const qkv = linear(`${block}.attn.qkv`, norm(`${block}.norm1`, x))
    const attended = x.map(() => new Float64Array(c.hidden_size))
    for (let head = 0; head < c.num_heads; head++) {
      const part = (t: number, which: number): Float64Array => {
        const from = which * c.hidden_size + head * D
        return qkv[t]!.slice(from, from + D)
      }
      const [q, k, v] = [0, 1, 2].map((which) =>
        x.map((_, t) => (which < 2 ? rotated(part(t, which), t) : part(t, which))),
      ) as [Matrix, Matrix, Matrix]
      let start = 0
      for (const [frames, h, w] of grids)
        for (let frame = 0; frame < frames; frame++, start += h * w) {
          const keys = Array.from({ length: h * w }, (_, i) => start + i)
          for (const t of keys) {
            const scores = keys.map((s) => dot(q[t]!, k[s]!) / Math.sqrt(D))
            const most = Math.max(...scores)
            const powers = scores.map((s) => Math.exp(s - most))
            const sum = powers.reduce((s, p) => s + p, 0)
            for (let i = 0; i < D; i++)
              attended[t]![head * D + i] = keys.reduce(
                (s, key, n) => s + (powers[n]! / sum) * v[key]![i]!,
                0,
              )
          }
        }
    }
    x = plus(x, linear(`${block}.attn.proj`, attended))
    const inner = linear(`${block}.mlp.linear_fc1`, norm(`${block}.norm2`, x))
    x = plus(
      x,
      linear(
        `${block}.mlp.linear_fc2`,
        inner.map((row) => row.map(geluTanh)),
      ),
    )
  }
  const joined = rowsOf(
    norm('merger.norm', x).flatMap((row) => [...row]),
    4 * c.hidden_size,
  )
  const inner = linear('merger.linear_fc1', joined).map((row) => row.map((v) => v * normalCdf(v)))
  return linear('merger.linear_fc2', inner).flatMap((row) => [...row])
}
