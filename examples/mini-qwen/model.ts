/** A Qwen3-VL of 400 000 random weights, written as a checkpoint's folder and loaded as any other. */
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { type Device, Qwen3VL, saveTensors, type Tensor } from 'p2r-kernels'
import { Rng } from '../mini-p2r/rng.js'
import { END, IMAGE, VIDEO, VISION_END, VISION_START, WORDS } from './vocabulary.js'

const WIDTH = 64
const TEXT = { layers: 3, heads: 4, kvHeads: 2, headDim: 16, mlp: 192 } as const
const VISION = { depth: 2, width: 64, heads: 4, mlp: 256, patch: 16, merge: 2, side: 8 } as const

/** Of the pixels; an overview's own deviation is .07 of full scale. */
export const PIXELS = { mean: [0.25, 0.25, 0.25], std: [0.1, 0.1, 0.1] } as const
export const PATCH = VISION.patch
export const MERGE = VISION.merge

const config = {
  architectures: ['Qwen3VLForConditionalGeneration'],
  model_type: 'qwen3_vl',
  image_token_id: IMAGE,
  video_token_id: VIDEO,
  vision_start_token_id: VISION_START,
  vision_end_token_id: VISION_END,
  tie_word_embeddings: true,
  text_config: {
    model_type: 'qwen3_vl_text',
    vocab_size: WORDS.length,
    hidden_size: WIDTH,
    num_hidden_layers: TEXT.layers,
    num_attention_heads: TEXT.heads,
    num_key_value_heads: TEXT.kvHeads,
    head_dim: TEXT.headDim,
    intermediate_size: TEXT.mlp,
    rms_norm_eps: 1e-6,
    rope_theta: 1000,
    rope_scaling: { mrope_interleaved: true, mrope_section: [3, 3, 2], rope_type: 'default' },
    max_position_embeddings: 256,
    eos_token_id: END,
  },
  vision_config: {
    model_type: 'qwen3_vl',
    depth: VISION.depth,
    hidden_size: VISION.width,
    num_heads: VISION.heads,
    intermediate_size: VISION.mlp,
    out_hidden_size: WIDTH,
    patch_size: VISION.patch,
    temporal_patch_size: 1,
    spatial_merge_size: VISION.merge,
    num_position_embeddings: VISION.side ** 2,
    deepstack_visual_indexes: [],
  },
}

const generation = { eos_token_id: END, do_sample: false }
const preprocessor = {
  size: { shortest_edge: 64 * 64, longest_edge: 128 * 128 },
  image_mean: PIXELS.mean,
  image_std: PIXELS.std,
}

/** Writes the folder; the weights depend on the seed alone. */
export async function writeModel(folder: string, device: Device, seed: number): Promise<void> {
  await mkdir(folder, { recursive: true })
  const json = { 'config.json': config, 'generation_config.json': generation }
  for (const [name, value] of Object.entries({ ...json, 'preprocessor_config.json': preprocessor }))
    await writeFile(join(folder, name), `${JSON.stringify(value, null, 2)}\n`)
  const weights = randomWeights(device, new Rng(seed, 20))
  await saveTensors(join(folder, 'model.safetensors'), weights)
  for (const tensor of Object.values(weights)) tensor.dispose()
}

export async function loadModel(folder: string, device: Device): Promise<Qwen3VL> {
  return Qwen3VL.load(folder, device, { dtype: 'f32' })
}

/** By Hugging Face's names. What adds to a residual stream begins at half scale. */
function randomWeights(device: Device, rng: Rng): Record<string, Tensor<'f32'>> {
  const weights: Record<string, Tensor<'f32'>> = {}
  const put = (name: string, shape: number[], value: () => number): void => {
    const size = shape.reduce((product, n) => product * n, 1)
    weights[name] = device.tensor(Float32Array.from({ length: size }, value), shape)
  }
  const matrix = (name: string, outputs: number, inputs: number, gain = 1): void =>
    put(`${name}.weight`, [outputs, inputs], () => (gain * rng.normal()) / Math.sqrt(inputs))
  const biased = (name: string, outputs: number, inputs: number, gain = 1): void => {
    matrix(name, outputs, inputs, gain)
    put(`${name}.bias`, [outputs], () => 0)
  }
  const scale = (name: string, width: number, value = 1): void =>
    put(`${name}.weight`, [width], () => value)
  const norm = (name: string, width: number): void => {
    scale(name, width)
    put(`${name}.bias`, [width], () => 0)
  }

  const text = 'model.language_model'
  put(`${text}.embed_tokens.weight`, [WORDS.length, WIDTH], () => 0.5 * rng.normal())
  const { heads, kvHeads, headDim, mlp } = TEXT
  for (let i = 0; i < TEXT.layers; i++) {
    const layer = `${text}.layers.${i}`
    scale(`${layer}.input_layernorm`, WIDTH)
    matrix(`${layer}.self_attn.q_proj`, heads * headDim, WIDTH)
    matrix(`${layer}.self_attn.k_proj`, kvHeads * headDim, WIDTH)
    matrix(`${layer}.self_attn.v_proj`, kvHeads * headDim, WIDTH)
    matrix(`${layer}.self_attn.o_proj`, WIDTH, heads * headDim, 0.5)
    scale(`${layer}.self_attn.q_norm`, headDim)
    scale(`${layer}.self_attn.k_norm`, headDim)
    scale(`${layer}.post_attention_layernorm`, WIDTH)
    matrix(`${layer}.mlp.gate_proj`, mlp, WIDTH)
    matrix(`${layer}.mlp.up_proj`, mlp, WIDTH)
    matrix(`${layer}.mlp.down_proj`, WIDTH, mlp, 0.5)
  }
  // The head is the embedding: logits of a deviation of 1.
  scale(`${text}.norm`, WIDTH, 2 / Math.sqrt(WIDTH))

  const visual = 'model.visual'
  const { width, merge, patch } = VISION
  put(
    `${visual}.patch_embed.proj.weight`,
    [width, 3, 1, patch, patch],
    () => rng.normal() / Math.sqrt(3 * patch ** 2),
  )
  put(`${visual}.patch_embed.proj.bias`, [width], () => 0)
  put(`${visual}.pos_embed.weight`, [VISION.side ** 2, width], () => 0.05 * rng.normal())
  for (let i = 0; i < VISION.depth; i++) {
    const block = `${visual}.blocks.${i}`
    norm(`${block}.norm1`, width)
    norm(`${block}.norm2`, width)
    biased(`${block}.attn.qkv`, 3 * width, width)
    biased(`${block}.attn.proj`, width, width, 0.5)
    biased(`${block}.mlp.linear_fc1`, VISION.mlp, width)
    biased(`${block}.mlp.linear_fc2`, width, VISION.mlp, 0.5)
  }
  norm(`${visual}.merger.norm`, width)
  biased(`${visual}.merger.linear_fc1`, width * merge ** 2, width * merge ** 2)
  biased(`${visual}.merger.linear_fc2`, WIDTH, width * merge ** 2)
  return weights
}
