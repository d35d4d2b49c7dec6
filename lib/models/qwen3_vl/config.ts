// config.json and generation_config.json of a Qwen3-VL checkpoint.
import { join } from 'node:path'
import { describeValue, isJsonObject } from '../../arguments.js'
import { ifThere, most, readJson } from '../../checkpoint.js'
import { refuse } from '../../errors.js'

/** The language model's sizes and a checkpoint's special tokens, from its config.json. */
export interface Qwen3VLConfig {
  /** Rows of the embedding and of the head. */
  vocabSize: number
  /** Width of a token's state. */
  hiddenSize: number
  /** Number of layers. */
  layers: number
  /** Heads of queries. */
  heads: number
  /** Heads of keys and values, which `heads` is a multiple of. */
  kvHeads: number
  /** Width of a head; not hiddenSize / heads in general. */
  headDim: number
  /** Width of a layer's MLP. */
  intermediateSize: number
  /** Of the RMS norms. */
  eps: number
  /** Base of the rotary frequencies. */
  ropeTheta: number
  /** Frequencies of time, rows and columns, interleaved; headDim / 2 in all. */
  ropeSections: readonly [time: number, rows: number, columns: number]
  /** The longest sequence. */
  maxPositions: number
  /** Whether the head is the embedding. */
  tied: boolean
  /** Stands for a merged patch of an image. */
  imageToken: number
  /** Stands for a merged patch of a video. */
  videoToken: number
  /** Before each image and frame. */
  visionStartToken: number
  /** After each image and frame. */
  visionEndToken: number
}

/** How a checkpoint's authors sample, from its generation_config.json; what the file leaves out is off. */
export interface Qwen3VLSampling {
  /** The tokens that end a text. */
  stopTokens: readonly number[]
  /** Divides the logits; 0 where the file says `do_sample: false`. */
  temperature: number
  /** Only the k most probable tokens are drawn; 0 for all. */
  topK: number
  /** Only the most probable tokens whose probabilities reach p; 1 for all. */
  topP: number
  /** Divides or multiplies the logits of tokens that the sequence has; 1 for none. */
  repetitionPenalty: number
}

/** How a checkpoint's images become patches, from its preprocessor_config.json. */
export interface Qwen3VLImageRules {
  /** Images of fewer pixels are enlarged. */
  minPixels: number
  /** Images of more pixels are reduced. */
  maxPixels: number
  /** Of each channel, from 0 to 1. */
  mean: readonly [number, number, number]
  /** Of each channel. */
  std: readonly [number, number, number]
}

type Bad = (why: string) => never
type Json = Record<string, unknown>

export async function readConfig(folder: string, op: string): Promise<Qwen3VLConfig> {
  const path = join(folder, 'config.json')
  const bad: Bad = (why) => refuse('ERR_FORMAT', op, `${path}: ${why}`)
  const json = await readJson(path, op)
  if (!isJsonObject(json)) return bad(`must hold an object, got ${describeValue(json)}`)
  return parseConfig(json, bad)
}

function parseConfig(json: Json, bad: Bad): Qwen3VLConfig {
  const type = json.model_type
  if (type === 'qwen3_vl_moe')
    bad("model_type 'qwen3_vl_moe', a mixture of experts, is not supported; the dense models are")
  if (type !== 'qwen3_vl') bad(`model_type must be 'qwen3_vl', got ${describeValue(type)}`)
  if (json.quantization_config !== undefined && json.quantization_config !== null)
    bad('quantized checkpoints are not supported; load the bf16 one with the option quantize')
  const text = json.text_config
  if (!isJsonObject(text)) return bad(`text_config must be an object, got ${describeValue(text)}`)
  if (!isJsonObject(json.vision_config))
    bad(`vision_config must be an object, got ${describeValue(json.vision_config)}`)

  const integer = (from: Json, name: string, limit: number, least = 1): number => {
    const value = from[name]
    if (!Number.isInteger(value) || (value as number) < least || (value as number) > limit)
      return bad(
        `${name} must be an integer from ${least} to ${limit}, got ${describeValue(value)}`,
      )
    return value as number
  }
  const exactly = (name: string, wanted: unknown): void => {
    const value = text[name] ?? wanted
    if (value !== wanted) bad(`${name} must be ${wanted}, got ${describeValue(value)}`)
  }
  exactly('attention_bias', false)
  exactly('hidden_act', 'silu')
  exactly('use_sliding_window', false)
  const vocabSize = integer(text, 'vocab_size', most.vocabulary)
  const heads = integer(text, 'num_attention_heads', most.sizes)
  const kvHeads = integer(text, 'num_key_value_heads', most.sizes)
  if (heads % kvHeads !== 0)
    bad(
      `num_attention_heads must be a multiple of num_key_value_heads, got ${heads} and ${kvHeads}`,
    )
  const hiddenSize = integer(text, 'hidden_size', most.sizes)
  const headDim =
    text.head_dim === undefined ? hiddenSize / heads : integer(text, 'head_dim', most.sizes)
  if (!Number.isInteger(headDim) || headDim % 8 !== 0 || headDim > 128)
    bad(`head_dim must be a multiple of 8 from 8 to 128, got ${headDim}`)
  const eps = text.rms_norm_eps ?? 1e-6
  if (typeof eps !== 'number' || !(eps >= 0 && eps < 1))
    return bad(`rms_norm_eps must be a number from 0 to 1, got ${describeValue(eps)}`)
  const token = (name: string): number => integer(json, name, vocabSize - 1, 0)
  return {
    vocabSize,
    hiddenSize,
    layers: integer(text, 'num_hidden_layers', most.layers),
    heads,
    kvHeads,
    headDim,
    intermediateSize: integer(text, 'intermediate_size', most.sizes),
    eps,
    ...rotaryOf(text, headDim, bad),
    maxPositions: integer(text, 'max_position_embeddings', most.positions),
    tied: tiedIn(json, text, bad),
    imageToken: token('image_token_id'),
    videoToken: token('video_token_id'),
    visionStartToken: token('vision_start_token_id'),
    visionEndToken: token('vision_end_token_id'),
  }
}

/** Of transformers 4: rope_theta beside rope_scaling; of 5: all of it in rope_parameters. */
function rotaryOf(
  text: Json,
  headDim: number,
  bad: Bad,
): Pick<Qwen3VLConfig, 'ropeTheta' | 'ropeSections'> {
  const name = text.rope_parameters ? 'rope_parameters' : 'rope_scaling'
  const given = text[name] ?? {}
  if (!isJsonObject(given)) return bad(`${name} must be an object, got ${describeValue(given)}`)
  const type = given.rope_type ?? given.type ?? 'default'
  if (type !== 'default' && type !== 'mrope')
    bad(
      `${name}.rope_type must be 'default', got ${describeValue(type)}: longer contexts than the model was trained on are not supported`,
    )
  if (given.mrope_interleaved === false)
    bad(
      `${name}.mrope_interleaved must be true, as in Qwen3-VL; Qwen2-VL's sections are contiguous`,
    )
  const ropeTheta = given.rope_theta ?? text.rope_theta
  if (typeof ropeTheta !== 'number' || !(ropeTheta > 0) || !Number.isFinite(ropeTheta))
    return bad(`rope_theta must be a number greater than 0, got ${describeValue(ropeTheta)}`)
  const sections: unknown = given.mrope_section ?? [24, 20, 20]
  const whole =
    Array.isArray(sections) &&
    sections.length === 3 &&
    sections.every((n) => Number.isInteger(n) && n >= 0) &&
    sections.reduce((sum, n) => sum + n, 0) === headDim / 2
  if (!whole)
    bad(
      `${name}.mrope_section must be three integers with the sum ${headDim / 2}, half of head_dim`,
    )
  return { ropeTheta, ropeSections: Object.freeze(sections as [number, number, number]) }
}

/** tie_word_embeddings, at the top, in text_config, or in both. */
function tiedIn(json: Json, text: Json, bad: Bad): boolean {
  const said = [json.tie_word_embeddings, text.tie_word_embeddings].filter(
    (value) => value !== undefined && value !== null,
  )
  for (const value of said)
    if (typeof value !== 'boolean')
      bad(`tie_word_embeddings must be true or false, got ${describeValue(value)}`)
  if (said.length === 2 && said[0] !== said[1])
    bad(`tie_word_embeddings is ${said[0]}, but ${said[1]} in text_config`)
  return said[0] === true
}

/** generation_config.json; without one, the text's own eos_token_id and plain sampling. */
export async function readSampling(
  folder: string,
  vocabSize: number,
  op: string,
): Promise<Qwen3VLSampling> {
  const path = join(folder, 'generation_config.json')
  const bad: Bad = (why) => refuse('ERR_FORMAT', op, `${path}: ${why}`)
  const json = (await ifThere(readJson(path, op))) ?? (await eosOf(folder, op))
  if (!isJsonObject(json)) return bad(`must hold an object, got ${describeValue(json)}`)
  const number = (name: string, otherwise: number, valid: (value: number) => boolean): number => {
    const value = json[name] ?? otherwise
    if (typeof value !== 'number' || !valid(value)) return bad(`${name} is ${describeValue(value)}`)
    return value
  }
  const stop = [json.eos_token_id ?? []].flat()
  if (
    !stop.every((id) => Number.isInteger(id) && (id as number) >= 0 && (id as number) < vocabSize)
  )
    bad(`eos_token_id must hold token ids from 0 to ${vocabSize - 1}`)
  const positive = (value: number) => value > 0 && Number.isFinite(value)
  const temperature = number('temperature', 1, (value) => value >= 0 && Number.isFinite(value))
  return Object.freeze({
    stopTokens: Object.freeze(stop as number[]),
    temperature: json.do_sample === false ? 0 : temperature,
    topK: number('top_k', 0, (value) => Number.isInteger(value) && value >= 0),
    topP: number('top_p', 1, (value) => value > 0 && value <= 1),
    repetitionPenalty: number('repetition_penalty', 1, positive),
  })
}

/** preprocessor_config.json; without one, the values of the released models. */
export async function readImageRules(folder: string, op: string): Promise<Qwen3VLImageRules> {
  const path = join(folder, 'preprocessor_config.json')
  const bad: Bad = (why) => refuse('ERR_FORMAT', op, `${path}: ${why}`)
  const json = (await ifThere(readJson(path, op))) ?? {}
  if (!isJsonObject(json)) return bad(`must hold an object, got ${describeValue(json)}`)
  // The names of `size` mislead: they are numbers of pixels.
  const size = isJsonObject(json.size) ? json.size : {}
  const pixels = (value: unknown, name: string): number => {
    if (!Number.isInteger(value) || (value as number) < 1 || (value as number) > 2 ** 28)
      return bad(`${name} must be a number of pixels, got ${describeValue(value)}`)
    return value as number
  }
  const channels = (name: string): readonly [number, number, number] => {
    const list = json[name] ?? [0.5, 0.5, 0.5]
    const whole = Array.isArray(list) && list.length === 3 && list.every(Number.isFinite)
    if (!whole || (name === 'image_std' && list.includes(0)))
      return bad(`${name} must hold three numbers`)
    return Object.freeze(list as [number, number, number])
  }
  const minPixels = pixels(json.min_pixels ?? size.shortest_edge ?? 65_536, 'size.shortest_edge')
  const maxPixels = pixels(json.max_pixels ?? size.longest_edge ?? 2 ** 24, 'size.longest_edge')
  if (maxPixels < minPixels) bad(`size.longest_edge is ${maxPixels}, below ${minPixels}`)
  return Object.freeze({
    minPixels,
    maxPixels,
    mean: channels('image_mean'),
    std: channels('image_std'),
  })
}

async function eosOf(folder: string, op: string): Promise<unknown> {
  const json = await readJson(join(folder, 'config.json'), op)
  const text = isJsonObject(json) && isJsonObject(json.text_config) ? json.text_config : {}
  return { eos_token_id: text.eos_token_id }
}
