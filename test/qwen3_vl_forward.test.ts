import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { KvCache, Qwen3VL } from 'p2r-kernels'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import {
  goldenModels,
  modelF32,
  modelHas,
  modelI32,
  modelJson,
  packedOf,
  visionAt,
  visionOf,
  writeModel,
} from './golden_model.js'
import { expectRefusal, onEveryBackend, Random, relativeL2 } from './harness.js'

const root = mkdtempSync(join(tmpdir(), 'qwen3-vl-forward-'))
afterAll(() => rmSync(root, { recursive: true, force: true }))
for (const name of goldenModels) writeModel(join(root, name), name)

const largest = (a: Float32Array, b: Float32Array): number => {
  expect(a.length).toBe(b.length)
  return a.reduce((most, x, i) => Math.max(most, Math.abs(x - b[i]!)), 0)
}

onEveryBackend('Qwen3VL', (b) => {
  for (const name of goldenModels) {
    const meta = modelJson(name, 'meta.json')
    const layers: number = meta.text_layers
    const rel = meta.hf_bf16_vs_stored.rel_l2 as Record<string, number>
    // The gates of the goldens' README.
    describe.each(['f32', 'bf16'] as const)(`golden ${name} in %s`, (dtype) => {
      const gate = (tensor: string) => (dtype === 'f32' ? 1e-5 : 1.5 * rel[tensor]!)
      let model: Qwen3VL
      beforeAll(async () => {
        model = await Qwen3VL.load(join(root, name), b.device, { dtype })
      })
      afterAll(() => model.dispose())

      test('states and logits', async () => {
        const rows = modelHas(name, 'logits_rows') ? modelI32(name, 'logits_rows') : undefined
        using out = model.forward({
          ...packedOf(b.device, name),
          want: ['hiddenStates', 'final', 'logits'],
          ...(rows && { rows }),
        })
        const near = async (tensor: string, made: Promise<Float32Array>) =>
          expect(relativeL2(await made, modelF32(name, tensor)), tensor).toBeLessThan(
            gate(tensor === 'inputs_embeds' ? 'hidden_0' : tensor),
          )
        expect(out.hiddenStates).toHaveLength(layers + 1)
        await near('inputs_embeds', out.hiddenStates[0]!.toFloat32())
        for (let i = 1; i <= layers; i++)
          await near(`hidden_${i}`, out.hiddenStates[i]!.toFloat32())
        await near('final', out.final.toFloat32())
        expect(out.logits.shape).toEqual([rows?.length ?? meta.tokens, model.config.vocabSize])
        await near('logits', out.logits.toFloat32())
        expect(largest(await out.logits.toFloat32(), modelF32(name, 'logits'))).toBeLessThan(
          dtype === 'f32' ? 3e-4 : 1,
        )
      })

      test('log-probabilities and entropies', async () => {
        using out = model.logProbs(packedOf(b.device, name))
        const [logProbs, entropy] = [await out.logProbs.read(), await out.entropy.read()]
        const cuSeqlens = modelI32(name, 'cu_seqlens')
        const prompts = modelI32(name, 'prompt_lens')
        // The reference has those of the completions only.
        for (let s = 0; s + 1 < cuSeqlens.length; s++) {
          logProbs.fill(0, cuSeqlens[s]!, cuSeqlens[s]! + prompts[s]!)
          entropy.fill(0, cuSeqlens[s]!, cuSeqlens[s]! + prompts[s]!)
        }
        const bound = dtype === 'f32' ? 1e-4 : 0.3
        expect(largest(logProbs, modelF32(name, 'logprobs'))).toBeLessThan(bound)
        expect(largest(entropy, modelF32(name, 'entropy'))).toBeLessThan(bound)
      })

      test('its own tokens are the most probable where the reference is sure', async () => {
        const [prompts, cuSeqlens] = [modelI32(name, 'prompt_lens'), modelI32(name, 'cu_seqlens')]
        const greedy = modelI32(name, 'greedy_tokens')
        const margins = modelF32(name, 'greedy_margins')
        const ids = modelI32(name, 'input_ids')
        const each = prompts.length
        const tokens: number[] = []
        const bounds = [0]
        const rows: number[] = []
        for (let s = 0; s < each; s++) {
          tokens.push(...ids.subarray(cuSeqlens[s]!, cuSeqlens[s]! + prompts[s]!))
          for (let i = 0; i < 24; i++) {
            rows.push(tokens.length - 1)
            tokens.push(greedy[24 * s + i]!)
          }
          bounds.push(tokens.length)
        }
        using out = model.forward({
          ...packedOf(b.device, name),
          tokens,
          cuSeqlens: bounds,
          rows,
        })
        const logits = await out.logits.toFloat32()
        const { vocabSize } = model.config
        let sure = 0
        for (let row = 0; row < rows.length; row++) {
          const own = logits.subarray(row * vocabSize, (row + 1) * vocabSize)
          if (dtype === 'bf16' && margins[row]! <= 0.5) continue
          expect(own.indexOf(own.reduce((most, x) => Math.max(most, x)))).toBe(greedy[row])
          sure++
        }
        expect(sure).toBeGreaterThan(20)
      })
    })
  }

  const [name] = goldenModels
  describe('packed sequences', () => {
    let model: Qwen3VL
    beforeAll(async () => {
      model = await Qwen3VL.load(join(root, name), b.device)
    })
    afterAll(() => model.dispose())

    test('do not change each other, and nothing is left behind', async () => {
      const before = b.device.memory().liveBytes
      {
        using all = model.logProbs(packedOf(b.device, name))
        const together = await all.logProbs.read()
        const cuSeqlens = modelI32(name, 'cu_seqlens')
        const tokens = modelI32(name, 'input_ids')
        for (let s = 0; s + 1 < cuSeqlens.length; s++) {
          const [from, to] = [cuSeqlens[s]!, cuSeqlens[s + 1]!]
          using alone = model.logProbs({
            tokens: tokens.subarray(from, to),
            cuSeqlens: [0, to - from],
            ...visionOf(b.device, name, 'images', [s, s + 1]),
          })
          const own = await alone.logProbs.read()
          // On the CPU the order of sums does not depend on the batch.
          if (b.device.info.backend === 'cpu') expect(own).toEqual(together.slice(from, to))
          else expect(largest(own, together.slice(from, to))).toBeLessThan(0.3)
        }
      }
      expect(b.device.memory().liveBytes - before).toBeLessThan(2 ** 21)
    })

    test('in parts through a cache are those of one pass', async () => {
      const { imageToken } = model.config
      const [tokens, cuSeqlens] = [modelI32(name, 'input_ids'), modelI32(name, 'cu_seqlens')]
      const random = new Random(3)
      using kv = model.kvCache(400)
      const pages = kv.pagesFree
      using whole = model.forward({ ...packedOf(b.device, name), want: ['final', 'logits'] })
      const [all, logits] = [await whole.final.toFloat32(), await whole.logits.toFloat32()]
      const width = model.config.hiddenSize
      const near = (made: Float32Array, expected: Float32Array) => {
        if (b.device.info.backend === 'cpu') expect(made).toEqual(expected)
        else expect(relativeL2(made, expected)).toBeLessThan(2e-2)
      }
      for (let s = 0; s + 1 < cuSeqlens.length; s++) {
        const [from, to] = [cuSeqlens[s]!, cuSeqlens[s + 1]!]
        const own = tokens.subarray(from, to)
        const sequence = kv.add()
        const cache = { kv, sequences: [sequence] }
        for (let at = 0; at < own.length; ) {
          // An image stands in one part.
          let end = Math.min(own.length, at + random.int(1, 9))
          while (end < own.length && own[end] === imageToken) end++
          const part = own.subarray(at, end)
          const before = own.subarray(0, at)
          const runs = (ids: Int32Array) =>
            ids.filter((id, i) => id === imageToken && ids[i - 1] !== imageToken).length
          const first = modelJson(name, 'meta.json')
            .images_per_sequence.slice(0, s)
            .reduce((sum: number, n: number) => sum + n, runs(before))
          using out = model.forward({
            tokens: part,
            cuSeqlens: [0, part.length],
            ...visionAt(b.device, name, 'images', first, runs(part)),
            cache,
            want: ['final', 'logits'],
          })
          near(await out.final.toFloat32(), all.slice((from + at) * width, (from + end) * width))
          near(await out.logits.toFloat32(), logits.slice((from + at) * 512, (from + end) * 512))
          at = end
        }
        expect(kv.length(sequence)).toBe(own.length)
        // A fork has the positions too, and so has what is left after truncation.
        if (s > 0) {
          const [fork, cut] = [kv.add(sequence), Math.max(1, own.length - 3)]
          kv.truncate(fork, cut)
          using again = model.forward({
            tokens: own.subarray(cut),
            cuSeqlens: [0, own.length - cut],
            cache: { kv, sequences: [fork] },
          })
          near(await again.logits.toFloat32(), logits.slice((from + cut) * 512, to * 512))
          kv.remove(fork)
        }
        kv.remove(sequence)
      }
      expect(kv.pagesFree).toBe(pages)

      const id = kv.add()
      const part = { tokens: [1, 2], cuSeqlens: [0, 2] }
      const refused = (cache: object, message: RegExp, code = 'ERR_VALUE') =>
        expectRefusal(
          () => model.forward({ ...part, cache: cache as never }),
          code,
          'Qwen3VL',
          message,
        )
      refused(
        { kv, sequences: [99] },
        /cache\.sequences\[0\] must be a sequence of the cache, got 99/,
      )
      refused({ kv, sequences: [id, id] }, /as many as those of cuSeqlens, 1, got 2/)
      refused({ kv: 1, sequences: [0] }, /cache\.kv must be a KvCache/)
      refused({ sequences: [0] }, /cache\.kv must be a KvCache/)
      refused({ cache: kv, sequences: [0] }, /cache\.cache/)
      using other = new KvCache(b.device, { layers: 2, kvHeads: 2, headDim: 32, pages: 2 })
      refused({ kv: other, sequences: [other.add()] }, /3 layers of bf16, .* got 2 of f32/)
      using full = model.kvCache(16)
      const one = full.add()
      const live = b.device.memory().liveBytes
      expectRefusal(
        () =>
          model.forward({
            tokens: Array(17).fill(3),
            cuSeqlens: [0, 17],
            cache: { kv: full, sequences: [one] },
          }),
        'ERR_MEMORY',
        'cachedAttention',
        /the cache is full/,
      )
      expect([full.length(one), full.pagesFree]).toEqual([0, 1])
      expect(b.device.memory().liveBytes).toBe(live)
    })

    test('of no tokens give empty results', async () => {
      using out = model.forward({ tokens: [], cuSeqlens: [0], want: ['final', 'logits'] })
      expect(out.final.shape).toEqual([0, 64])
      expect(out.logits.shape).toEqual([0, 512])
      using probs = model.logProbs({ tokens: [], cuSeqlens: [0, 0] })
      expect(probs.logProbs.shape).toEqual([0])
    })

    test('are refused where they break a rule', () => {
      const good = packedOf(b.device, name)
      const refused = (change: object, message: RegExp, code = 'ERR_VALUE') => {
        expectRefusal(
          () => model.forward({ ...good, ...change } as never),
          code,
          'Qwen3VL',
          message,
        )
        const { want: _, rows: __, ...rest } = { want: 0, rows: 0, ...change }
        if (Object.keys(rest).length)
          expectRefusal(() => model.logProbs({ ...good, ...rest }), code, 'Qwen3VL', message)
      }
      const { tokens } = good
      refused(
        { tokens: [...tokens.slice(0, 5), 512, ...tokens.slice(6)] },
        /tokens\[5\].*511, got 512/,
      )
      refused({ tokens: tokens.map((t, i) => (i === 3 ? -1 : t)) }, /tokens\[3\]/)
      refused({ cuSeqlens: [0, 5] }, /cuSeqlens must end at 162/)
      refused({ images: undefined }, /is 505, the placeholder of images, but there are none left/)
      refused(
        { images: { ...good.images!, gridThw: [[1, 2, 2]] } },
        /must be \[4, 1536\]/,
        'ERR_SHAPE',
      )
      refused({ images: { pixelValues: 1, gridThw: [] } }, /images\.pixelValues/)
      refused({ videos: good.images }, /placeholders of 3 videos, got those of 0/)
      refused({ want: ['logit'] }, /want\[0\] must be/)
      refused({ rows: [162] }, /162/)
      const long = Array(4097).fill(7)
      refused(
        { tokens: long, cuSeqlens: [0, 4097], images: undefined },
        /sequence 0 has 4097 tokens, more than the model's context of 4096/,
      )
      expectRefusal(() => model.logProbs({ ...good, temperature: 0 }), 'ERR_VALUE', 'Qwen3VL')
    })
  })
})
