/**
 * The backward pass of the language model's layers: what their forward pass keeps, and each step in reverse. Gradients
 * of activations have the model's type, those of weights are f32.
 */
import type { Gradients } from '../../gradients.js'
import { add } from '../../ops/elementwise.js'
import { split } from '../../ops/rearrange.js'
import { rmsNormBackward } from '../../ops/rms_norm.js'
import { applyRotary, type RotaryTables } from '../../ops/rotary.js'
import { gatherRows } from '../../ops/rows.js'
import { swiglu, swigluBackward } from '../../ops/swiglu.js'
import { scope } from '../../scope.js'
import { disposeAll, type Tensor } from '../../tensor.js'
import type { AttendedHeads } from './packed_attention.js'

/** What a norm's backward needs. */
export interface NormRecord {
  /** What was normalised: the sum, where there was one. */
  x: Tensor
  rstd: Tensor<'f32'>
  out: Tensor
}

/** What a layer's backward needs of its forward. */
export interface LayerActivations {
  first: NormRecord
  /** Before the rotation, by heads. */
  qNorm: NormRecord
  kNorm: NormRecord
  /** Rotated. */
  heads: AttendedHeads
  second: NormRecord
  /**
   * [T, 2 · intermediateSize], before the gate, which is computed again. Absent of quantized weights, which have no
   * backward.
   */
  gateUp?: Tensor
}

/** A layer: its input alone where it is to be computed again. */
export interface LayerRecord {
  input: Tensor
  activations?: LayerActivations
}

/** One pass through the layers. */
export interface DecoderRecord {
  rotary: RotaryTables
  layers: LayerRecord[]
  /** The last norm, of the rows that were wanted. */
  last: NormRecord
}

/** The decoder as its backward pass needs it. */
export interface DecoderParts {
  weight(name: string): Tensor
  /** The layer again, from its input. */
  layer(i: number, input: Tensor): LayerActivations
  attendBackward(heads: AttendedHeads, dOut: Tensor): { dQ: Tensor; dK: Tensor; dV: Tensor }
}

/** Rows of the tokens that an image's or video's features stand in for, with the gradients to be collected. */
export interface FeatureRows {
  /** The rows, in the features' order. */
  index: Int32Array
  /** How many DeepStack features there are. */
  deepstack: number
}

/**
 * From the gradient of the last layer's output to that of the first layer that is needed, or further: the gradient of
 * its input. The gradients of DeepStack features are read off on the way. What a layer has kept is disposed after it.
 */
export function layersBackward(
  decoder: DecoderParts,
  { layers, rotary }: DecoderRecord,
  dOut: Tensor,
  features: readonly FeatureRows[],
  lowest: number,
  gradients: Gradients,
): { d: Tensor; deepstack: Tensor[][] } {
  const deepstack = features.map((): Tensor[] => [])
  let d = dOut
  for (let i = layers.length - 1; i >= lowest; i--) {
    for (const [f, { index, deepstack: count }] of features.entries())
      if (i < count) deepstack[f]![i] = gatherRows({ x: d, index })
    const after = d
    ;({ d } = scope(() => ({
      d: layerBackward(decoder, i, layers[i]!, rotary, after, gradients),
      gradients,
    })))
    after.dispose()
    disposeAll(layers[i])
  }
  return { d, deepstack }
}

function layerBackward(
  decoder: DecoderParts,
  i: number,
  record: LayerRecord,
  rotary: RotaryTables,
  d: Tensor,
  gradients: Gradients,
): Tensor {
  const layer = `layers.${i}`
  const activations = record.activations ?? decoder.layer(i, record.input)
  const { first, qNorm, kNorm, heads, second } = activations
  const gateUp = activations.gateUp!
  const step = (name: string, dOut: Tensor, x: Tensor): Tensor =>
    gradients.linear(`${layer}.${name}`, { dOut, x, weight: decoder.weight(`${layer}.${name}`) })
  const middle = scope(() => {
    const dGated = step('mlp.down_proj', d, swiglu({ gateUp }))
    const { dGateUp } = swigluBackward({ dOut: dGated, gateUp })
    const dOut = gateUpBackward(decoder, `${layer}.mlp`, dGateUp, second.out, gradients)
    const name = `${layer}.post_attention_layernorm`
    return { dX: normBackward(decoder, name, second, dOut, gradients, d), gradients }
  }).dX
  const dNormed = scope(() => {
    const { out } = heads
    const dJoined = step(
      'self_attn.o_proj',
      middle,
      out.reshape([d.shape[0]!, out.shape[1]! * out.shape[2]!]),
    )
    const { dQ, dK, dV } = decoder.attendBackward(heads, dJoined.reshape(out.shape))
    const projected = (name: string, dHeads: Tensor): Tensor =>
      step(
        `self_attn.${name}_proj`,
        dHeads.reshape([d.shape[0]!, dHeads.shape[1]! * dHeads.shape[2]!]),
        first.out,
      )
    const rotated = (name: string, norm: NormRecord, dHeads: Tensor): Tensor => {
      const back = applyRotary({ x: dHeads, ...rotary, inverse: true })
      const dX = normBackward(decoder, `${layer}.self_attn.${name}_norm`, norm, back, gradients)
      return projected(name, dX)
    }
    const queries = rotated('q', qNorm, dQ)
    const keys = rotated('k', kNorm, dK)
    const dX = add({ x: add({ x: queries, y: keys }), y: projected('v', dV) })
    return { dX, gradients }
  }).dX
  return normBackward(decoder, `${layer}.input_layernorm`, first, dNormed, gradients, middle)
}

/** Both halves of gate_up_proj, whose gradients are one product where they are new. */
function gateUpBackward(
  decoder: DecoderParts,
  mlp: string,
  dGateUp: Tensor,
  x: Tensor,
  gradients: Gradients,
): Tensor {
  const halves = [`${mlp}.gate_proj`, `${mlp}.up_proj`] as const
  const whole = halves.map((name) => `${name}.weight`)
  const fused = decoder.weight(`${mlp}.gate_up_proj`)
  if (!whole.some((name) => gradients.sum(name)))
    return gradients.halves(whole as [string, string], { dOut: dGateUp, x, weight: fused })
  const width = fused.shape[0]! / 2
  const [dGate, dUp] = split({ x: dGateUp, sizes: [width, width], axis: 1 }) as [Tensor, Tensor]
  const half = (name: string, dOut: Tensor): Tensor =>
    gradients.linear(name, { dOut, x, weight: decoder.weight(name) })
  return add({ x: half(halves[0], dGate), y: half(halves[1], dUp) })
}

/** The gradient of what was normalised; dSum is that of the same by another way. */
export function normBackward(
  decoder: Pick<DecoderParts, 'weight'>,
  name: string,
  { x, rstd }: NormRecord,
  dOut: Tensor,
  gradients: Gradients,
  dSum?: Tensor,
): Tensor {
  const weight = decoder.weight(name)
  const { dX, dWeight } = rmsNormBackward({ dOut, x, weight, rstd, ...(dSum && { dSum }) })
  gradients.add(`${name}.weight`, dWeight)
  return dX
}
