import { mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { openDevice, Qwen3VL } from 'p2r-kernels'
import { afterAll, describe, expect, test } from 'vitest'
import { type FolderOptions, modelJson, writeModel } from './golden_model.js'

const root = mkdtempSync(join(tmpdir(), 'qwen3-vl-'))
afterAll(() => rmSync(root, { recursive: true, force: true }))
const device = openDevice('cpu')
afterAll(() => device.dispose())

const [tied, untied] = ['m1_d32_gqa2_tied', 'm2_d128_mqa_untied'] as const
const folderOf = (name: typeof tied | typeof untied, options: FolderOptions = {}) =>
  writeModel(mkdtempSync(join(root, 'model-')), name, options)

// biome-ignore lint/suspicious/noExplicitAny: a config of any content
type Json = any

describe('Qwen3VL.load', () => {
  test('reads both forms of config', async () => {
    using first = await Qwen3VL.load(folderOf(tied), device)
    expect(first.config).toEqual({
      vocabSize: 512,
      hiddenSize: 64,
      layers: 3,
      heads: 4,
      kvHeads: 2,
      headDim: 32,
      intermediateSize: 96,
      eps: 1e-6,
      ropeTheta: 5e6,
      ropeSections: [6, 5, 5],
      maxPositions: 4096,
      tied: true,
      imageToken: 505,
      videoToken: 506,
      visionStartToken: 503,
      visionEndToken: 504,
    })
    expect(first.sampling).toEqual({
      stopTokens: [501, 511],
      temperature: 0.7,
      topK: 20,
      topP: 0.8,
      repetitionPenalty: 1,
    })
    expect(first.dtype).toBe('bf16')
    expect(first.tower.dtype).toBe('bf16')
    using second = await Qwen3VL.load(folderOf(untied), device, { dtype: 'f32' })
    const { ropeSections, ropeTheta, heads, headDim, hiddenSize, tied: isTied } = second.config
    expect({ ropeSections, ropeTheta, heads, headDim, hiddenSize, isTied }).toEqual({
      ropeSections: [24, 20, 20],
      ropeTheta: 5e6,
      heads: 4,
      headDim: 128,
      hiddenSize: 96,
      isTied: false,
    })
    expect(second.dtype).toBe('f32')
  })

  test.each([
    ['2B', 2048, 28, 16, 6144, true],
    ['4B', 2560, 36, 32, 9728, true],
    ['8B', 4096, 36, 32, 12288, false],
    ['32B', 5120, 64, 64, 25600, false],
  ])(
    'takes the config of the %s, whose weights it then misses',
    async (_, h, layers, heads, f, is) => {
      const folder = folderOf(tied, {
        config(json: Json) {
          Object.assign(json.text_config, {
            hidden_size: h,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: 8,
            head_dim: 128,
            intermediate_size: f,
            vocab_size: 151936,
            max_position_embeddings: 262144,
            tie_word_embeddings: is,
            rope_scaling: { rope_type: 'default', mrope_section: [24, 20, 20] },
          })
          json.tie_word_embeddings = is
          json.vision_config.out_hidden_size = h
        },
      })
      await expect(Qwen3VL.load(folder, device)).rejects.toMatchObject({ code: 'ERR_FORMAT' })
      // The tower's weights are too small already.
      await expect(Qwen3VL.load(folder, device)).rejects.toThrow(/linear_fc2.*must be \[\d+, 256\]/)
    },
  )

  test('takes other prefixes, shards, and what a tied model’s trainer saved too much', async () => {
    const bytes: number[] = []
    const before = device.memory().liveBytes
    for (const options of [
      {},
      { shards: 3 },
      {
        rename: (name: string) =>
          name
            .replace('model.language_model.', 'language_model.model.')
            .replace('model.visual.', 'visual.'),
      },
      { rename: (name: string) => name.replace('model.language_model.', 'model.') },
      { rename: (name: string) => `base_model.model.${name}`, shards: 2 },
      { copies: { 'lm_head.weight': 'model.language_model.embed_tokens.weight' } },
    ]) {
      using _ = await Qwen3VL.load(folderOf(tied, options), device)
      bytes.push(device.memory().liveBytes - before)
    }
    expect(new Set(bytes).size).toBe(1)
    expect(device.memory().liveBytes).toBe(before)
  })

  test('reports progress up to the last byte, and converts weight by weight', async () => {
    using own = openDevice('cpu')
    const steps: [number, number][] = []
    own.resetPeak()
    using model = await Qwen3VL.load(folderOf(untied, { shards: 2 }), own, {
      dtype: 'f32',
      onProgress: (done, of) => steps.push([done, of]),
    })
    const { liveBytes, peakBytes } = own.memory()
    expect(
      steps.every(([done, of], i) => done > (steps[i - 1]?.[0] ?? 0) && of === steps[0]![1]),
    ).toBe(true)
    expect(steps.at(-1)![0]).toBe(steps[0]![1])
    // bf16 in the file; the table of positions and the embedding are the largest.
    expect(liveBytes).toBe(2 * steps[0]![1])
    expect(peakBytes).toBeLessThan(1.3 * liveBytes)
    expect(model.config.vocabSize).toBe(1000)
  })

  const refused = async (folder: string, code: string, message: RegExp) => {
    const error = await Qwen3VL.load(folder, device).then(
      () => expect.fail('it loaded'),
      (e) => e,
    )
    expect(error).toMatchObject({ name: 'P2RError', code })
    expect(error.message).toMatch(message)
  }

  test.each<[RegExp, (json: Json) => void]>([
    [
      /'qwen3_vl_moe', a mixture of experts, is not supported/,
      (c) => {
        c.model_type = 'qwen3_vl_moe'
      },
    ],
    [
      /model_type must be 'qwen3_vl', got 'qwen3_5'/,
      (c) => {
        c.model_type = 'qwen3_5'
      },
    ],
    [
      /rope_scaling\.rope_type must be 'default', got 'yarn'/,
      (c) => {
        c.text_config.rope_scaling.rope_type = 'yarn'
      },
    ],
    [
      /mrope_interleaved must be true/,
      (c) => {
        c.text_config.rope_scaling.mrope_interleaved = false
      },
    ],
    [
      /mrope_section must be three integers with the sum 16/,
      (c) => {
        c.text_config.rope_scaling.mrope_section = [24, 20, 20]
      },
    ],
    [
      /hidden_size must be an integer from 1 to 1048576, got 1e\+30/,
      (c) => {
        c.text_config.hidden_size = 1e30
      },
    ],
    [
      /num_hidden_layers must be an integer from 1 to 1024, got -1/,
      (c) => {
        c.text_config.num_hidden_layers = -1
      },
    ],
    [
      /vocab_size must be an integer from 1 to 16777216, got 'many'/,
      (c) => {
        c.text_config.vocab_size = 'many'
      },
    ],
    [
      /num_attention_heads must be a multiple of num_key_value_heads, got 4 and 3/,
      (c) => {
        c.text_config.num_key_value_heads = 3
      },
    ],
    [
      /head_dim must be a multiple of 8 from 8 to 128, got 36/,
      (c) => {
        c.text_config.head_dim = 36
      },
    ],
    [
      /attention_bias must be false, got true/,
      (c) => {
        c.text_config.attention_bias = true
      },
    ],
    [
      /hidden_act must be silu, got 'gelu'/,
      (c) => {
        c.text_config.hidden_act = 'gelu'
      },
    ],
    [
      /rope_theta must be a number greater than 0, got undefined/,
      (c) => {
        delete c.text_config.rope_theta
      },
    ],
    [
      /image_token_id must be an integer from 0 to 511, got 512/,
      (c) => {
        c.image_token_id = 512
      },
    ],
    [
      /tie_word_embeddings is true, but false in text_config/,
      (c) => {
        c.text_config.tie_word_embeddings = false
      },
    ],
    [
      /no weight 'lm_head\.weight', and tie_word_embeddings is not true/,
      (c) => {
        c.tie_word_embeddings = false
        c.text_config.tie_word_embeddings = false
      },
    ],
    [
      /out_hidden_size/,
      (c) => {
        c.text_config.hidden_size = 128
      },
    ],
    [
      /'layers\.\d\.mlp\.down_proj\.weight' must be \[64, 48\], got \[64, 96\]/,
      (c) => {
        c.text_config.intermediate_size = 48
      },
    ],
    [
      /no weight 'layers\.3\./,
      (c) => {
        c.text_config.num_hidden_layers = 4
      },
    ],
    [
      /quantized checkpoints are not supported/,
      (c) => {
        c.quantization_config = { quant_method: 'fp8' }
      },
    ],
    [
      /text_config must be an object, got undefined/,
      (c) => {
        delete c.text_config
      },
    ],
  ])('refuses %s', async (message, config) => {
    const before = device.memory().liveBytes
    await refused(folderOf(tied, { config }), 'ERR_FORMAT', message)
    expect(device.memory().liveBytes).toBe(before)
  })

  test('reports files that are missing, truncated or elsewhere', async () => {
    await refused(join(root, 'nowhere'), 'ERR_IO', /config\.json could not be read/)
    const cut = folderOf(tied)
    truncateSync(join(cut, 'model.safetensors'), 200_000)
    await refused(cut, 'ERR_FORMAT', /bytes of data/)
    const lost = folderOf(tied, { shards: 2 })
    rmSync(join(lost, 'model-2-of-2.safetensors'))
    await refused(lost, 'ERR_IO', /model-2-of-2\.safetensors could not be read/)
    const index = join(lost, 'model.safetensors.index.json')
    const json = JSON.parse(readFileSync(index, 'utf8'))
    for (const file of ['../model.safetensors', '/etc/passwd', 'a\\b', '..', '']) {
      json.weight_map['model.language_model.norm.weight'] = file
      writeFileSync(index, JSON.stringify(json))
      await refused(lost, 'ERR_FORMAT', /must be in a file of the folder/)
    }
    const bad = folderOf(tied)
    writeFileSync(join(bad, 'generation_config.json'), '{"eos_token_id": [501, 512]}')
    await refused(bad, 'ERR_FORMAT', /eos_token_id must hold token ids from 0 to 511/)
    writeFileSync(join(bad, 'generation_config.json'), '{"top_p": 0}')
    await refused(bad, 'ERR_FORMAT', /top_p is 0/)
    rmSync(join(bad, 'generation_config.json'))
    using plain = await Qwen3VL.load(bad, device)
    expect(plain.sampling).toEqual({
      stopTokens: [modelJson(tied, 'config.json').text_config.eos_token_id],
      temperature: 1,
      topK: 0,
      topP: 1,
      repetitionPenalty: 1,
    })
  })
})
