// The language model's weights: their names and shapes, and how they come onto a device.
import { loadWeights } from '../../checkpoint.js'
import type { Device } from '../../device.js'
import { type FloatDType, isFloatDType } from '../../dtype.js'
import { refuse } from '../../errors.js'
import { type QuantizedWeight, quantize } from '../../ops/quantize.js'
import type { StoredTensor } from '../../safetensors.js'
import type { Tensor } from '../../tensor.js'
import type { Qwen3VLConfig } from './config.js'

/**
 * Weights by Hugging Face's names without prefix: 'layers.0.mlp.up_proj.weight', 'lm_head.weight'. gate_proj and
 * up_proj are the two halves of 'layers.0.mlp.gate_up_proj.weight', so that one product makes both; of a quantized model
 * they are alone, and a tied head is a quantized copy of the embedding.
 */
export type TextWeights = Record<string, Tensor | QuantizedWeight>

/** Every weight with its shape, [outputs, inputs]. A tied head is the embedding. */
export function textShapes(c: Qwen3VLConfig): Map<string, readonly number[]> {
  const shapes = new Map<string, readonly number[]>()
  const weight = (name: string, ...shape: number[]) => shapes.set(`${name}.weight`, shape)
  weight('embed_tokens', c.vocabSize, c.hiddenSize)
  for (let i = 0; i < c.layers; i++) {
    const layer = `layers.${i}`
    weight(`${layer}.input_layernorm`, c.hiddenSize)
    weight(`${layer}.self_attn.q_proj`, c.heads * c.headDim, c.hiddenSize)
    weight(`${layer}.self_attn.k_proj`, c.kvHeads * c.headDim, c.hiddenSize)
    weight(`${layer}.self_attn.v_proj`, c.kvHeads * c.headDim, c.hiddenSize)
    weight(`${layer}.self_attn.q_norm`, c.headDim)
    weight(`${layer}.self_attn.k_norm`, c.headDim)
    weight(`${layer}.self_attn.o_proj`, c.hiddenSize, c.heads * c.headDim)
    weight(`${layer}.post_attention_layernorm`, c.hiddenSize)
    weight(`${layer}.mlp.gate_proj`, c.intermediateSize, c.hiddenSize)
    weight(`${layer}.mlp.up_proj`, c.intermediateSize, c.hiddenSize)
    weight(`${layer}.mlp.down_proj`, c.hiddenSize, c.intermediateSize)
  }
  weight('norm', c.hiddenSize)
  if (!c.tied) weight('lm_head', c.vocabSize, c.hiddenSize)
  return shapes
}

/**
 * A stored name without the prefixes of Hugging Face ('model.language_model.'), of its older versions
 * ('language_model.model.') and of trainers' exports ('model.', 'base_model.model.'); undefined for weights that
 * the language model does not have, the vision tower's among them.
 */
export function textName(stored: string, wanted: ReadonlyMap<string, unknown>): string | undefined {
  const name = stored.replace(/^(?:(?:base_model|model|language_model|module)\.)+/, '')
  return wanted.has(name) ? name : undefined
}

/** The type of the stored embedding, which is that of all weights but in odd checkpoints. */
export function storedType(
  stored: readonly StoredTensor[],
  folder: string,
  op: string,
): FloatDType {
  const embedding = stored.find(({ name }) => name === 'embed_tokens.weight')
  if (!embedding) refuse('ERR_FORMAT', op, `${folder}: there is no weight 'embed_tokens.weight'`)
  const { dtype } = embedding
  if (!isFloatDType(dtype))
    refuse('ERR_FORMAT', op, `${folder}: 'embed_tokens.weight' must be of type f32, f16 or bf16`)
  return dtype
}

/**
 * Loads each weight once and converts it as it comes, so that the device never holds two copies of them all, not even
 * in its cache of freed blocks.
 */
export async function loadText(
  op: string,
  folder: string,
  device: Device,
  wanted: ReadonlyMap<string, readonly number[]>,
  dtype: FloatDType,
  bits: 8 | 4 | undefined,
  onProgress: (done: number, of: number) => void,
): Promise<TextWeights> {
  const fused: Record<string, Tensor> = {}
  const keep = (name: string, tensor: Tensor): Tensor | QuantizedWeight => {
    const shape = wanted.get(name)!
    if (!isFloatDType(tensor.dtype))
      refuse('ERR_FORMAT', op, `${folder}: '${name}' must be of a float type, got ${tensor.dtype}`)
    if (String(tensor.shape) !== String(shape))
      refuse(
        'ERR_FORMAT',
        op,
        `${folder}: '${name}' must be [${shape.join(', ')}], got [${tensor.shape.join(', ')}]`,
      )
    const converted = tensor.dtype === dtype ? tensor : tensor.cast(dtype)
    const [, mlp, half] = /^(.*\.mlp)\.(gate|up)_proj\.weight$/.exec(name) ?? []
    const quantized = bits && shape.length === 2 && name !== 'embed_tokens.weight'
    if (!quantized && (mlp === undefined || bits)) return converted
    let part: Tensor | undefined
    try {
      if (quantized) return quantize({ weight: converted, bits })
      const [rows, columns] = shape as [number, number]
      const whole = `${mlp}.gate_up_proj.weight`
      fused[whole] ??= device.zeros([2 * rows, columns], dtype)
      const from = half === 'gate' ? 0 : rows
      part = fused[whole].slice(from, from + rows)
      part.copyFrom(converted)
      return part
    } catch (error) {
      part?.dispose()
      throw error
    } finally {
      if (converted !== tensor) converted.dispose()
    }
  }
  const weights: TextWeights = {}
  try {
    const rename = (name: string) => textName(name, wanted)
    Object.assign(weights, await loadWeights(op, folder, device, rename, { keep, onProgress }))
    for (const name of wanted.keys())
      if (!weights[name])
        refuse(
          'ERR_FORMAT',
          op,
          `${folder}: there is no weight '${name}'${
            name === 'lm_head.weight' ? ', and tie_word_embeddings is not true' : ''
          }`,
        )
    const embedding = weights['embed_tokens.weight'] as Tensor
    if (bits && !weights['lm_head.weight'])
      weights['lm_head.weight'] = quantize({ weight: embedding, bits })
    return Object.assign(weights, fused)
  } catch (error) {
    for (const tensor of [...Object.values(weights), ...Object.values(fused)]) tensor.dispose()
    throw error
  }
}
