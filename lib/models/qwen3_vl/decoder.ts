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
import type { Gradients } from '../../gradients.js'
import { add } from '../../ops/elementwise.js'
import { linear } from '../../ops/linear.js'
import { linearLogProbs, linearLogProbsBackward } from '../../ops/linear_log_probs.js'
import type { QuantizedWeight } from '../../ops/quantize.js'
import { rmsNorm } from '../../ops/rms_norm.js'
import { applyRotary, mropeTables, type RotaryTables } from '../../ops/rotary.js'
import { gatherRows, gatherRowsBackward, scatterAddRows, scatterRows } from '../../ops/rows.js'
import { swiglu } from '../../ops/swiglu.js'
import { scope, unscoped } from '../../scope.js'
import { disposeAll, type Ints, Tensor } from '../../tensor.js'
import type { Qwen3VLConfig } from './config.js'
import {
  type DecoderParts,
  type DecoderRecord,
  type FeatureRows,
  type LayerActivations,
  type LayerRecord,
  layersBackward,
  type NormRecord,
  normBackward,
} from './decoder_backward.js'
import type { Attended } from './packed_attention.js'
import type { TextWeights } from './weights.js'

/** Before the names of the language model's weights but the head's, as Hugging Face stores them. */
export const textPrefix = 'model.language_model.'

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

/** How a layer's queries see keys: [T, heads, headDim], [T, kvHeads, headDim] twice. */
export type Attend = (layer: number, q: Tensor, k: Tensor, v: Tensor) => Attended

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
  /** What is kept for the backward pass. */
  keep?: Keep | undefined
}

/** What of which layers is kept: all activations, or each layer's input. */
export interface Keep {
  what: 'all' | 'inputs'
  /** The first layer. */
  from: number
}

/** The results of a pass. */
export interface PassResults {
  /** The states after the last norm, of all tokens or of those that were wanted. */
  final: Tensor
  /** The inputs of the first layer and the outputs of all, where they are wanted. */
  hidden: Tensor[]
  /** Where something is kept; only the layers that are have an entry. */
  record?: DecoderRecord
}

/** What the backward of log-probabilities needs besides the final states. */
export interface Scored {
  targets: Tensor<'i32'>
  stats: Tensor<'f32'>
}

/** What `logProbs` took and gave. */
export interface LogProbsGiven {
  final: Tensor
  entropy: Tensor<'f32'>
  temperature: number
}

/** The gradients of what `logProbs` gave. */
export interface LogProbGradients {
  dLogProbs: Tensor<'f32'>
  dEntropy?: Tensor<'f32'> | undefined
}

/** How a recorded pass goes backward. */
export interface PassGradients {
  /** The rows whose final states were wanted, of how many. */
  rows: Ints
  of: number
  features: readonly FeatureRows[]
  /** The first layer that is needed. */
  lowest: number
  attend: Attend
  attendBackward: DecoderParts['attendBackward']
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
  readonly #undrawn: readonly number[]
  /** [V]: -infinity for what is never drawn, else 0. */
  #mask: Tensor<'f32'> | undefined

  /** undrawn: the ids that are never drawn. */
  constructor(
    config: Qwen3VLConfig,
    device: Device,
    weights: TextWeights,
    undrawn: readonly number[],
  ) {
    this.#undrawn = undrawn
    this.#config = config
    this.#device = device
    this.#weights = weights
  }

  run(pass: Pass): PassResults {
    const { layers, headDim, ropeTheta: theta, ropeSections: sections } = this.#config
    return scope(() => {
      const { positions, placements, rows } = pass
      const rotary = mropeTables({ positions, headDim, theta, sections, device: this.#device })
      const hidden: Tensor[] = []
      const records: LayerRecord[] = []
      const kept = new Set<Tensor>()
      const drop = (tensor?: Tensor): void => {
        if (tensor && !kept.has(tensor)) tensor.dispose()
      }
      let stream: Stream = { x: this.#embed(pass.tokens, placements) }
      for (let i = 0; i < layers; i++) {
        const before = stream
        const keep = pass.keep && i >= pass.keep.from ? pass.keep.what : undefined
        const made = scope(() => {
          const { pending, activations } = this.#layer(i, before, rotary, pass.attend)
          const [input, x] = [activations.first.x, activations.second.x]
          return { input, x, pending, ...(keep === 'all' && { activations }) }
        })
        const { input, x, pending, activations } = made
        stream = { x, pending }
        if (pass.hiddenStates) hidden.push(input)
        if (keep) records[i] = { input, ...(activations && { activations }) }
        if (pass.hiddenStates || keep) kept.add(input)
        if (activations) kept.add(x)
        for (const tensor of [before.pending, before.x, input]) drop(tensor)
        if (placements.some(({ features }) => i < features.deepstack.length)) {
          const summed = addDeepstack(stream, i, placements)
          drop(pending)
          drop(x)
          stream = summed
        }
      }
      if (pass.hiddenStates) {
        stream = { x: sumOf(stream) }
        hidden.push(stream.x)
      }
      const { x, pending } = stream
      const wanted = (y: Tensor): Tensor => (rows ? gatherRows({ x: y, index: rows }) : y)
      const last = this.#norm('norm', wanted(x), pending && wanted(pending))
      const record = { rotary, layers: records, last }
      return { final: last.out, hidden, ...(pass.keep && { record }) }
    })
  }

  /**
   * The gradients of the layers' weights from that of a recorded pass's final states, and those of the inputs of the
   * first layer that is needed and of features. Uses up the record.
   */
  backward(
    record: DecoderRecord,
    dFinal: Tensor,
    { rows, of, features, lowest, attend, attendBackward }: PassGradients,
    all: Gradients,
  ): { d: Tensor; deepstack: Tensor[][] } {
    const gradients = all.under(textPrefix)
    const parts: DecoderParts = {
      weight: (name) => this.#weight(name),
      layer: (i, input) => this.#layer(i, { x: input }, record.rotary, attend).activations,
      attendBackward,
    }
    const { dOut } = scope(() => {
      const dOut = gatherRowsBackward({
        dOut: normBackward(parts, 'norm', record.last, dFinal, gradients),
        index: rows,
        rows: of,
      })
      return { dOut, gradients }
    })
    disposeAll(record.last)
    return layersBackward(parts, record, dOut, features, lowest, gradients)
  }

  /** Adds the head's gradient, and returns that of the final states that `logProbs` had. */
  logProbsBackward(
    { final, entropy, temperature, targets, stats }: Scored & LogProbsGiven,
    { dLogProbs, dEntropy }: LogProbGradients,
    gradients: Gradients,
  ): Tensor {
    const untied = this.#weights['lm_head.weight'] as Tensor | undefined
    const name = untied ? 'lm_head.weight' : `${textPrefix}embed_tokens.weight`
    const weight = untied ?? this.#weight('embed_tokens')
    const dWeight = gradients.sum(name)
    const made = linearLogProbsBackward({
      ...{ hidden: final, weight, targets, temperature, stats, dLogProbs },
      ...(dEntropy && { entropy, dEntropy }),
      ...(dWeight && { into: { dWeight } }),
    })
    if (!dWeight) gradients.add(name, made.dWeight)
    return made.dHidden
  }

  /** Adds the gradient of the embedding, from those of some rows of tokens. */
  embedBackward(d: Tensor, tokens: Int32Array, gradients: Gradients): void {
    const wide: Tensor<'f32'> = d.dtype === 'f32' ? d : d.cast('f32')
    const { vocabSize } = this.#config
    gradients.addRows(`${textPrefix}embed_tokens.weight`, wide, tokens, vocabSize)
  }

  /** The weights by Hugging Face's names; their halves where they are held as one. */
  parameters(): Map<string, Tensor> {
    const named = new Map<string, Tensor>()
    for (const [name, weight] of Object.entries(this.#weights))
      if (Tensor.is(weight) && !name.endsWith('.gate_up_proj.weight'))
        named.set(name === 'lm_head.weight' ? name : textPrefix + name, weight)
    return named
  }

  /** [N, V]: the logits of final states. */
  logits(final: Tensor): Tensor {
    return linear({ x: final, weight: this.#head })
  }

  /** [N, V] twice: the logits as the sums are, not rounded; and the same without what is never drawn. */
  drawable(final: Tensor): { logits: Tensor<'f32'>; drawable: Tensor<'f32'> } {
    const logits = linear({ x: final, weight: this.#head, dtype: 'f32' })
    this.#mask ??= unscoped(() => {
      const { vocabSize } = this.#config
      const mask = new Float32Array(vocabSize)
      for (const token of this.#undrawn) mask[token] = Number.NEGATIVE_INFINITY
      return this.#device.tensor(mask, [vocabSize])
    })
    return { logits, drawable: add({ x: logits, y: this.#mask }) }
  }

  /** Whether some of its weights are, which then have no gradients. */
  get quantized(): boolean {
    return Object.values(this.#weights).some((weight) => !Tensor.is(weight))
  }

  /** What belongs to the decoder. */
  weights(): Iterable<Tensor | QuantizedWeight> {
    return Object.values(this.#weights)
  }

  dispose(): void {
    this.#mask?.dispose()
    for (const weight of this.weights()) weight.dispose()
  }

  /**
   * The log-probability of a target in each final state, and the entropy; 0 for a target of -100. No logits are held.
   * `scored` is what the backward needs.
   */
  logProbs(
    final: Tensor,
    targets: Int32Array,
    temperature: number,
  ): { logProbs: Tensor<'f32'>; entropy: Tensor<'f32'>; scored: Scored } {
    return scope(() => {
      const ids: Tensor<'i32'> = this.#device.tensor(targets, [targets.length])
      const rows = { hidden: final, weight: this.#head, targets: ids }
      const { logProbs, entropy, stats } = linearLogProbs({ ...rows, temperature, entropy: true })
      return { logProbs, entropy, scored: { targets: ids, stats } }
    })
  }

  #embed(tokens: Ints, placements: readonly Placement[]): Tensor {
    return scope(() => {
      let x = gatherRows({ x: this.#weight('embed_tokens'), index: tokens })
      for (const { y, index } of rowsOf(placements, ({ merged }) => merged))
        x = scatterRows({ x, y: y.dtype === x.dtype ? y : y.cast(x.dtype), index })
      return x
    })
  }

  #layer(
    i: number,
    { x, pending }: Stream,
    rotary: RotaryTables,
    attend: Attend,
  ): { pending: Tensor; activations: LayerActivations } {
    const { heads, kvHeads, headDim } = this.#config
    const layer = `layers.${i}`
    const first = this.#norm(`${layer}.input_layernorm`, x, pending)
    const split = (name: string, count: number): Tensor => {
      const y = this.#linear(`${layer}.self_attn.${name}_proj`, first.out)
      return y.reshape([x.shape[0]!, count, headDim])
    }
    const normal = (name: string, count: number): NormRecord =>
      this.#norm(`${layer}.self_attn.${name}_norm`, split(name, count))
    const [qNorm, kNorm] = [normal('q', heads), normal('k', kvHeads)]
    const q = applyRotary({ x: qNorm.out, ...rotary })
    const k = applyRotary({ x: kNorm.out, ...rotary })
    const v = split('v', kvHeads)
    const attended = attend(i, q, k, v)
    const joined = attended.out.reshape([x.shape[0]!, heads * headDim])
    const mixed = this.#linear(`${layer}.self_attn.o_proj`, joined)
    const second = this.#norm(`${layer}.post_attention_layernorm`, mixed, first.x)
    const { gateUp, gated } = this.#gated(`${layer}.mlp`, second.out)
    const down = this.#linear(`${layer}.mlp.down_proj`, gated)
    const seen = { q, k, v, ...attended }
    const activations = { first, qNorm, kNorm, heads: seen, second, ...(gateUp && { gateUp }) }
    return { pending: down, activations }
  }

  /** The norm of x, or of x and what is to be added to it. */
  #norm(name: string, x: Tensor, pending?: Tensor): NormRecord {
    const weight = this.#weight(name)
    const { eps } = this.#config
    if (!pending) return { x, ...rmsNorm({ x, weight, eps }) }
    const { out, rstd, sum } = rmsNorm({ x: pending, residual: x, weight, eps })
    return { x: sum, out, rstd }
  }

  #gated(mlp: string, x: Tensor): { gateUp?: Tensor; gated: Tensor } {
    const fused = this.#weights[`${mlp}.gate_up_proj.weight`]
    if (fused) {
      const gateUp = linear({ x, weight: fused })
      return { gateUp, gated: swiglu({ gateUp }) }
    }
    const [gate, up] = [this.#linear(`${mlp}.gate_proj`, x), this.#linear(`${mlp}.up_proj`, x)]
    return { gated: swiglu({ gate, up }) }
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
  return scope(() => {
    let x = sumOf(stream)
    for (const { y, index } of rowsOf(placements, ({ deepstack }) => deepstack[layer]))
      x = scatterAddRows({ x, y: y.dtype === x.dtype ? y : y.cast(x.dtype), index })
    return { x }
  })
}

/** Rows of features, and of the tokens that they stand in for; those of one image or video in one piece. */
function rowsOf(
  placements: readonly Placement[],
  pick: (features: Features) => Tensor | undefined,
): { y: Tensor; index: number[] }[] {
  const parts = new Map<Tensor, { index: number[]; from: number[] }>()
  for (const { at, length, features, from } of placements) {
    const tensor = pick(features)
    if (!tensor) continue
    const part = parts.get(tensor) ?? { index: [], from: [] }
    parts.set(tensor, part)
    for (let i = 0; i < length; i++) {
      part.index.push(at + i)
      part.from.push(from + i)
    }
  }
  return [...parts].map(([tensor, { index, from }]) => {
    const first = from[0]!
    const whole = from.every((row, i) => row === first + i)
    const y = whole
      ? tensor.slice(first, first + from.length)
      : gatherRows({ x: tensor, index: from })
    return { y, index }
  })
}
