/**
 * The language model of Qwen3-VL on the library's operations. Pre-norm layers of causal attention with grouped
 * key heads, whose queries and keys are normalised head by head and then rotated, and a gated MLP:
 *
 *   x += W_o · attention(rotary(norm(W_q a)), rotary(norm(W_k a)), W_v a)      a = rms(x)
 *   x += W_down · (silu(W_gate b) · W_up b)                                    b = rms(x)
 *
 * Both additions happen in the norm that follows, in one pass over the stream. After each of the first layers the
 * DeepStack features of images and videos are added to the rows of their placeholders.
 */
import type { Device } from '../../device.js'
import { add } from '../../ops/elementwise.js'
import { linear } from '../../ops/linear.js'
import { linearLogProbs } from '../../ops/linear_log_probs.js'
import { tokenLogProbs } from '../../ops/log_probs.js'
import type { QuantizedWeight } from '../../ops/quantize.js'
import { rmsNorm } from '../../ops/rms_norm.js'
import { applyRotary, mropeTables, type RotaryTables } from '../../ops/rotary.js'
import { gatherRows } from '../../ops/rows.js'
import { swiglu } from '../../ops/swiglu.js'
import { scope, unscoped } from '../../scope.js'
import { type Ints, Tensor } from '../../tensor.js'
import type { Qwen3VLConfig } from './config.js'
import type { TextWeights } from './weights.js'

/** Rows whose logits are held at once, where the head is quantized. */
const logitRows = 64

/** What an image or video gives the language model: rows of its merged tokens, and of each DeepStack feature. */
export interface Features {
  merged: Tensor
  deepstack: readonly Tensor[]
}

/** Rows of the tokens that rows of features stand in for. */
export interface Placement {
  /** The first row. */
  at: number
  /** How many rows. */
  length: number
  features: Features
  /** The first row of the features. */
  from: number
}

/** How a layer's queries see keys: [T, heads, headDim], [T, kvHeads, headDim] twice; gives as q. */
export type Attend = (layer: number, q: Tensor, k: Tensor, v: Tensor) => Tensor

/** One pass of packed tokens through the layers. */
export interface Pass {
  /** [T] token ids. */
  tokens: Ints
  /** Positions [3, T]. */
  positions: Ints
  attend: Attend
  placements: readonly Placement[]
  /** The rows whose final states are wanted; all unless given. */
  rows?: Ints | undefined
  /** Whether the layers' states are wanted. */
  hiddenStates?: boolean | undefined
}

/** The residual stream: x, and what the next norm adds to it. */
interface Stream {
  x: Tensor
  pending?: Tensor
}

export class Decoder {
  readonly #config: Qwen3VLConfig
  readonly #device: Device
  readonly #weights: TextWeights
  /** [V]: -infinity for what is never drawn, else 0. */
  #mask: Tensor<'f32'> | undefined

  constructor(config: Qwen3VLConfig, device: Device, weights: TextWeights) {
    this.#config = config
    this.#device = device
    this.#weights = weights
  }

  /**
   * The states after the last norm, of all tokens or of `rows`; and, where they are wanted, the inputs of the first
   * layer and the outputs of all.
   */
  run(pass: Pass): { final: Tensor; hidden: Tensor[] } {
    const { layers, headDim, ropeTheta: theta, ropeSections: sections } = this.#config
    return scope(() => {
      const { positions, placements, rows } = pass
      const rotary = mropeTables({ positions, headDim, theta, sections, device: this.#device })
      const hidden: Tensor[] = []
      let stream: Stream = { x: this.#embed(pass.tokens, placements) }
      for (let i = 0; i < layers; i++) {
        const before = stream
        const { input, ...after } = scope(() => this.#layer(i, before, rotary, pass.attend))
        stream = after
        before.pending?.dispose()
        if (before.x !== input) before.x.dispose()
        if (pass.hiddenStates) hidden.push(input)
        else input.dispose()
        if (placements.some(({ features }) => i < features.deepstack.length))
          stream = addDeepstack(stream, i, placements)
      }
      if (pass.hiddenStates) {
        stream = { x: sumOf(stream) }
        hidden.push(stream.x)
      }
      const { x, pending } = stream
      const wanted = (y: Tensor): Tensor => (rows ? gatherRows({ x: y, index: rows }) : y)
      const final = this.#norm('norm', wanted(x), pending && wanted(pending)).out
      return { final, hidden }
    })
  }

  /** [N, V]: the logits of final states. */
  logits(final: Tensor): Tensor {
    return linear({ x: final, weight: this.#head })
  }

  /** As logits, without the placeholders: only an image or a video can stand behind one. */
  drawable(final: Tensor): Tensor {
    const x = this.#wide(final)
    this.#mask ??= unscoped(() => {
      const { vocabSize, imageToken, videoToken } = this.#config
      const mask = new Float32Array(vocabSize)
      for (const token of [imageToken, videoToken]) mask[token] = Number.NEGATIVE_INFINITY
      return this.#device.tensor(mask, [vocabSize])
    })
    return add({ x, y: this.#mask })
  }

  /** What belongs to the decoder. */
  weights(): Iterable<Tensor | QuantizedWeight> {
    return Object.values(this.#weights)
  }

  dispose(): void {
    this.#mask?.dispose()
    for (const weight of this.weights()) weight.dispose()
  }

  /** The log-probability of a target in each final state, and the entropy; 0 for a target of -100. No logits are held. */
  logProbs(
    final: Tensor,
    targets: Int32Array,
    temperature: number,
  ): { logProbs: Tensor<'f32'>; entropy: Tensor<'f32'> } {
    const head = this.#head
    return scope(() => {
      const ids = this.#device.tensor(targets, [targets.length])
      if (Tensor.is(head)) {
        const rows = { hidden: final, weight: head, targets: ids }
        const { logProbs, entropy } = linearLogProbs({ ...rows, temperature, entropy: true })
        return { logProbs, entropy }
      }
      const made = {
        logProbs: this.#device.zeros([targets.length]),
        entropy: this.#device.zeros([targets.length]),
      }
      for (let at = 0; at < targets.length; at += logitRows)
        scope(() => {
          const end = Math.min(at + logitRows, targets.length)
          const logits = this.#wide(final.slice(at, end))
          const part = { logits, targets: ids.slice(at, end) }
          const { logProbs, entropy } = tokenLogProbs({ ...part, temperature, entropy: true })
          made.logProbs.slice(at, end).copyFrom(logProbs)
          made.entropy.slice(at, end).copyFrom(entropy)
        })
      return made
    })
  }

  /** The logits as the sums are, not rounded. */
  #wide(final: Tensor): Tensor<'f32'> {
    return linear({ x: final, weight: this.#head, dtype: 'f32' })
  }

  #embed(tokens: Ints, placements: readonly Placement[]): Tensor {
    const x = gatherRows({ x: this.#weight('embed_tokens'), index: tokens })
    scope(() => {
      for (const { at, length, features, from } of placements)
        x.slice(at, at + length).copyFrom(features.merged.slice(from, from + length).cast(x.dtype))
    })
    return x
  }

  #layer(
    i: number,
    { x, pending }: Stream,
    rotary: RotaryTables,
    attend: Attend,
  ): { input: Tensor; x: Tensor; pending: Tensor } {
    const { heads, kvHeads, headDim } = this.#config
    const layer = `layers.${i}`
    const first = this.#norm(`${layer}.input_layernorm`, x, pending)
    const split = (name: string, count: number): Tensor => {
      const y = this.#linear(`${layer}.self_attn.${name}_proj`, first.out)
      return y.reshape([x.shape[0]!, count, headDim])
    }
    const rotated = (name: string, count: number): Tensor => {
      const normal = this.#norm(`${layer}.self_attn.${name}_norm`, split(name, count)).out
      return applyRotary({ x: normal, ...rotary })
    }
    const q = rotated('q', heads)
    const out = attend(i, q, rotated('k', kvHeads), split('v', kvHeads))
    const joined = out.reshape([x.shape[0]!, heads * headDim])
    const attended = this.#linear(`${layer}.self_attn.o_proj`, joined)
    const second = this.#norm(`${layer}.post_attention_layernorm`, attended, first.sum)
    const down = this.#linear(`${layer}.mlp.down_proj`, this.#gated(`${layer}.mlp`, second.out))
    return { input: first.sum, x: second.sum, pending: down }
  }

  /** The norm of x, or of x and what is to be added to it, and that sum. */
  #norm(name: string, x: Tensor, pending?: Tensor): { out: Tensor; sum: Tensor } {
    const weight = this.#weight(name)
    const { eps } = this.#config
    if (!pending) return { out: rmsNorm({ x, weight, eps }).out, sum: x }
    return rmsNorm({ x: pending, residual: x, weight, eps })
  }

  #gated(mlp: string, x: Tensor): Tensor {
    const fused = this.#weights[`${mlp}.gate_up_proj.weight`]
    if (fused) return swiglu({ gateUp: linear({ x, weight: fused }) })
    const [gate, up] = [this.#linear(`${mlp}.gate_proj`, x), this.#linear(`${mlp}.up_proj`, x)]
    return swiglu({ gate, up })
  }

  #linear(name: string, x: Tensor): Tensor {
    return linear({ x, weight: this.#weights[`${name}.weight`]! })
  }

  /** The embedding where they are tied, unless that is quantized. */
  get #head(): Tensor | QuantizedWeight {
    return this.#weights['lm_head.weight'] ?? this.#weight('embed_tokens')
  }

  #weight(name: string): Tensor {
    return this.#weights[`${name}.weight`] as Tensor
  }
}

function sumOf({ x, pending }: Stream): Tensor {
  return pending ? add({ x, y: pending }) : x
}

/** Adds the layer's DeepStack features to the rows of their placeholders. */
function addDeepstack(stream: Stream, layer: number, placements: readonly Placement[]): Stream {
  const x = sumOf(stream)
  stream.pending?.dispose()
  if (x !== stream.x) stream.x.dispose()
  scope(() => {
    for (const { at, length, features, from } of placements) {
      const feature = features.deepstack[layer]?.slice(from, from + length)
      if (!feature) continue
      const rows = x.slice(at, at + length)
      rows.copyFrom(add({ x: rows, y: feature.cast(x.dtype) }))
    }
  })
  return { x }
}
