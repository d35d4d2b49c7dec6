import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type Device, loadTensors, Qwen3VL, quantize, saveTensors, type Tensor } from 'p2r-kernels'
import { afterAll, expect, test } from 'vitest'
import { type GoldenModel, goldenModels, modelI32, visionOf, writeModel } from './golden_model.js'
import { onEveryBackend, relativeL2 } from './harness.js'

const root = mkdtempSync(join(tmpdir(), 'qwen3-vl-quantize-'))
afterAll(() => rmSync(root, { recursive: true, force: true }))
for (const name of goldenModels) writeModel(join(root, name), name)

/** The model whose weights are those that a quantized one has, in f32; its head is not tied. */
async function dequantized(device: Device, name: GoldenModel, bits: 8 | 4): Promise<string> {
  const folder = writeModel(mkdtempSync(join(root, 'wide-')), name)
  const stored = await loadTensors(join(folder, 'model.safetensors'), device)
  const embedding = 'model.language_model.embed_tokens.weight'
  const wide: Record<string, Tensor> = {}
  for (const [key, tensor] of Object.entries(stored)) {
    const isMatrix = /language_model\.layers|lm_head/.test(key) && tensor.shape.length === 2
    wide[key] = isMatrix ? quantize({ weight: tensor, bits }).dequantize() : tensor.cast('f32')
  }
  wide['lm_head.weight'] ??= quantize({ weight: stored[embedding]!, bits }).dequantize()
  await saveTensors(join(folder, 'model.safetensors'), wide)
  const path = join(folder, 'config.json')
  const config = JSON.parse(readFileSync(path, 'utf8'))
  config.tie_word_embeddings = false
  config.text_config.tie_word_embeddings = false
  writeFileSync(path, JSON.stringify(config))
  return folder
}

onEveryBackend('Qwen3VL, quantized', (b) => {
  test.each(goldenModels.flatMap((name) => [[name, 8] as const, [name, 4] as const]))(
    '%s in %i bits is the model of the weights that it has',
    async (name, bits) => {
      using device = b.open()
      const wide = await Qwen3VL.load(await dequantized(device, name, bits), device)
      const narrow = await Qwen3VL.load(join(root, name), device, { dtype: 'f32', quantize: bits })
      const packed = {
        tokens: modelI32(name, 'input_ids'),
        cuSeqlens: modelI32(name, 'cu_seqlens'),
        ...visionOf(device, name, 'images'),
        ...visionOf(device, name, 'videos'),
      }
      const [one, other] = [wide.forward(packed).logits, narrow.forward(packed).logits]
      expect(relativeL2(await other.read(), await one.read())).toBeLessThan(1e-5)
      const [p, q] = [wide.logProbs(packed), narrow.logProbs(packed)]
      expect(relativeL2(await q.logProbs.read(), await p.logProbs.read())).toBeLessThan(1e-5)
      expect(relativeL2(await q.entropy.read(), await p.entropy.read())).toBeLessThan(1e-5)

      const prompts = [{ tokens: [3, 1, 4, 1, 5] }]
      const [made] = await narrow.generate({ prompts, n: 3, maxTokens: 9, seed: 2, stopTokens: [] })
      for (const { tokens, logProbs } of made!) {
        const all = [...prompts[0]!.tokens, ...tokens]
        const again = narrow.logProbs({ tokens: all, cuSeqlens: [0, all.length] })
        const own = [...(await again.logProbs.read()).slice(5)]
        if (b.device.info.backend === 'cpu') expect(logProbs).toEqual(own)
        else expect(relativeL2(logProbs, own)).toBeLessThan(1e-4)
      }
      narrow.dispose()
      wide.dispose()
    },
  )

  test('takes a fraction of the memory, and 8 or 4 bits alone', async () => {
    using device = b.open()
    const bytes: number[] = []
    for (const options of [{}, { quantize: 8 as const }, { quantize: 4 as const }]) {
      using _ = await Qwen3VL.load(join(root, goldenModels[1]), device, options)
      bytes.push(device.memory().liveBytes)
    }
    expect(device.memory().liveBytes).toBe(0)
    expect(bytes[0]! - bytes[1]!).toBeGreaterThan(bytes[1]! - bytes[2]!)
    expect(bytes[1]! - bytes[2]!).toBeGreaterThan(0)
    await expect(
      Qwen3VL.load(join(root, goldenModels[1]), device, { quantize: 6 as never }),
    ).rejects.toMatchObject({ code: 'ERR_VALUE', op: 'Qwen3VL' })
  })
})
