// The language model of Qwen3-VL in float64, of text alone, written from its definition with plain loops.
import type { Qwen3VL } from 'p2r-kernels'

/** Weights by Hugging Face's names, in float64. */
export type Weights = ReadonlyMap<string, Float64Array>

type Config = Qwen3VL['config']
type Row = Float64Array

export async function weightsOf(model: Qwen3VL): Promise<Map<string, Float64Array>> {
  const weights = new Map<string, Float64Array>()
  for (const [name, weight] of model.parameters())
    weights.set(name, Float64Array.from(await weight.toFloat32()))
  return weights
}

/** The log-probability of each token but the first of a sequence, under the row before it. */
export function textLogProbs(c: Config, weights: Weights, tokens: readonly number[]): Float64Array {
  const prefix = 'model.language_model.'
  const w = (name: string): Float64Array => weights.get(`${prefix}${name}.weight`)!
  const table = w('embed_tokens')
  const { hiddenSize: h, heads, kvHeads, headDim: d } = c
  const norm = (x: Row, weight: Float64Array): Row => {
    let square = 0
    for (const v of x) square += v * v
    const scale = 1 / Math.sqrt(square / x.length + c.eps)
    return x.map((v, j) => v * scale * weight[j]!)
  }
  /** Every head normalised, then rotated: the pairs are (i, i + d/2), and text has one position on all axes. */
  const turned = (x: Row, weight: Float64Array, position: number): Row => {
    const out = new Float64Array(x.length)
    for (let at = 0; at < x.length; at += d) {
      const head = norm(x.subarray(at, at + d), weight)
      for (let i = 0; i < d / 2; i++) {
        const angle = position * c.ropeTheta ** ((-2 * i) / d)
        const [cos, sin] = [Math.cos(angle), Math.sin(angle)]
        out[at + i] = head[i]! * cos - head[i + d / 2]! * sin
        out[at + i + d / 2] = head[i + d / 2]! * cos + head[i]! * sin
      }
    }
    return out
  }
  let rows: Row[] = tokens.map((t) => table.slice(t * h, (t + 1) * h))
  for (let i = 0; i < c.layers; i++) {
    const of = (name: string) => w(`layers.${i}.${name}`)
    const a = rows.map((x) => norm(x, of('input_layernorm')))
    const project = (name: string) => a.map((x) => product(of(`self_attn.${name}_proj`), x))
    const q = project('q').map((x, t) => turned(x, of('self_attn.q_norm'), t))
    const k = project('k').map((x, t) => turned(x, of('self_attn.k_norm'), t))
    const v = project('v')
    rows = rows.map((x, t) => {
      const joined = new Float64Array(heads * d)
      for (let head = 0; head < heads; head++) {
        const shared = Math.floor((head * kvHeads) / heads) * d
        const scores = new Float64Array(t + 1)
        for (let s = 0; s <= t; s++)
          for (let j = 0; j < d; j++)
            scores[s]! += (q[t]![head * d + j]! * k[s]![shared + j]!) / Math.sqrt(d)
        const total = logSumExp(scores)
        for (let s = 0; s <= t; s++) {
          const p = Math.exp(scores[s]! - total)
          for (let j = 0; j < d; j++) joined[head * d + j]! += p * v[s]![shared + j]!
        }
      }
      const middle = sum(x, product(of('self_attn.o_proj'), joined))
      const b = norm(middle, of('post_attention_layernorm'))
      const gate = product(of('mlp.gate_proj'), b)
      const up = product(of('mlp.up_proj'), b)
      const gated = up.map((y, j) => (y * gate[j]!) / (1 + Math.exp(-gate[j]!)))
      return sum(middle, product(of('mlp.down_proj'), gated))
    })
  }
  const head = weights.get('lm_head.weight') ?? table
  return Float64Array.from(tokens.slice(1), (token, t) => {
    const logits = product(head, norm(rows[t]!, w('norm')))
    return logits[token]! - logSumExp(logits)
  })
}

/** [outputs, inputs] times a row of inputs. */
function product(weight: Float64Array, x: Row): Row {
  const out = new Float64Array(weight.length / x.length)
  for (let o = 0, at = 0; o < out.length; o++) {
    let total = 0
    for (let j = 0; j < x.length; j++, at++) total += weight[at]! * x[j]!
    out[o] = total
  }
  return out
}

const sum = (x: Row, y: Row): Row => x.map((value, j) => value + y[j]!)

function logSumExp(x: Float64Array): number {
  const most = x.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY)
  return most + Math.log(x.reduce((total, value) => total + Math.exp(value - most), 0))
}
