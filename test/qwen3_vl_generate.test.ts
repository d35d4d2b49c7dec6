import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  type Device,
  type Generated,
  type GeneratedToken,
  type GenerationPrompt,
  Qwen3VL,
  scopeAsync,
} from 'p2r-kernels'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { StopTexts } from '../dist/lib/models/qwen3_vl/stop.js'
import {
  type GoldenModel,
  goldenModels,
  modelF32,
  modelI32,
  visionOf,
  writeModel,
} from './golden_model.js'
import { onEveryBackend, Random } from './harness.js'
import { ids, tinyTokenizer, writeTokenizer } from './tiny_tokenizer.js'

const root = mkdtempSync(join(tmpdir(), 'qwen3-vl-generate-'))
afterAll(() => rmSync(root, { recursive: true, force: true }))
for (const name of goldenModels) writeModel(join(root, name), name)
const tied = 'tied'
writeTokenizer(writeModel(join(root, tied), goldenModels[0]))

/** The prompts of the reference, with their images and videos. */
function promptsOf(device: Device, name: GoldenModel): GenerationPrompt[] {
  const [ids, cuSeqlens] = [modelI32(name, 'input_ids'), modelI32(name, 'cu_seqlens')]
  return [...modelI32(name, 'prompt_lens')].map((length, s) => ({
    tokens: ids.slice(cuSeqlens[s]!, cuSeqlens[s]! + length),
    ...visionOf(device, name, 'images', [s, s + 1]),
    ...visionOf(device, name, 'videos', [s, s + 1]),
  }))
}

/** The log-probabilities of a continuation by a pass over the whole sequence. */
async function rescored(
  model: Qwen3VL,
  prompt: GenerationPrompt,
  { tokens }: Generated,
  temperature: number,
): Promise<number[]> {
  const all = [...Array.from(prompt.tokens), ...tokens]
  const { images, videos } = prompt
  using out = model.logProbs({
    tokens: all,
    cuSeqlens: [0, all.length],
    ...(images && { images }),
    ...(videos && { videos }),
    temperature,
  })
  return [...(await out.logProbs.read()).slice(prompt.tokens.length)]
}

onEveryBackend('Qwen3VL.generate', (b) => {
  const load = (name: string, options: object = {}) =>
    Qwen3VL.load(join(root, name), b.device, options)

  test.each(goldenModels)('the greedy texts of %s in f32', async (name) => {
    using model = await load(name, { dtype: 'f32' })
    const prompts = promptsOf(b.device, name)
    const free = await model.generate({ prompts, maxTokens: 24, temperature: 0, stopTokens: [] })
    const [tokens, logProbs] = [modelI32(name, 'greedy_tokens'), modelF32(name, 'greedy_logprobs')]
    const lengths = modelI32(name, 'greedy_stop_len')
    free.forEach(([made], s) => {
      expect(made!.tokens).toEqual([...tokens.slice(24 * s, 24 * s + 24)])
      expect(made!.finishReason).toBe('length')
      made!.logProbs.forEach((value, i) => {
        expect(Math.abs(value - logProbs[24 * s + i]!)).toBeLessThan(1e-4)
      })
    })
    const ended = await model.generate({ prompts, maxTokens: 24, temperature: 0 })
    ended.forEach(([made], s) => {
      expect(made!.tokens).toEqual(free[s]![0]!.tokens.slice(0, lengths[s]))
      const last = made!.tokens.at(-1)!
      const stops = model.sampling.stopTokens.includes(last)
      expect(made!.finishReason).toBe(stops ? 'stop' : 'length')
    })
  })

  // The kernels of a GPU choose their tiles by the batch, so there only tokens of sure draws agree.
  describe.skipIf(b.name.startsWith('cuda'))('on the CPU', () => {
    test.each(goldenModels.flatMap((name) => [[name, 'f32'] as const, [name, 'bf16'] as const]))(
      'log-probabilities of %s in %s are those of a later pass, bit for bit, in any batch',
      async (name, dtype) => {
        using model = await load(name, { dtype })
        // So small that parts of prompts wait and rollouts are computed again.
        using narrow = await load(name, { dtype, cacheTokens: 160 })
        using threaded = b.open({ threads: 3 })
        using other = await Qwen3VL.load(join(root, name), threaded, { dtype })
        const random = new Random(5)
        const golden = promptsOf(b.device, name)
        for (let round = 0; round < 2; round++) {
          const words: GenerationPrompt[] = Array.from({ length: 2 }, () => ({
            tokens: Array.from({ length: random.int(1, 40) }, () => random.int(0, 299)),
          }))
          const order = [...golden, ...words].map((_, i) => i)
          const picked = order.sort(() => random.uniform() - 0.5).slice(0, 4)
          const pick = (all: GenerationPrompt[]) => picked.map((i) => [...all, ...words][i]!)
          const prompts = pick(golden)
          const options = {
            n: random.int(1, 4),
            maxTokens: random.int(1, 20),
            temperature: round === 0 ? 1 : 0.3 + random.uniform(),
            seed: random.int(0, 1e9),
          }
          const all = await model.generate({ prompts, ...options })
          expect(await narrow.generate({ prompts, ...options })).toEqual(all)
          const elsewhere = pick(promptsOf(threaded, name))
          expect(await other.generate({ prompts: elsewhere, ...options })).toEqual(all)
          for (const [i, prompt] of prompts.entries()) {
            const [alone] = await model.generate({ prompts: [prompt], ...options })
            expect(alone).toEqual(all[i])
            for (const made of alone!)
              expect(made.logProbs).toEqual(
                await rescored(model, prompt, made, options.temperature),
              )
          }
        }
      },
      60_000,
    )
  })

  describe('one model', () => {
    let model: Qwen3VL
    beforeAll(async () => {
      model = await load(tied)
    })
    afterAll(() => model.dispose())
    const prompt: GenerationPrompt = { tokens: [5, 6, 7, 8, 9] }
    const ask = (change: object = {}) =>
      model.generate({ prompts: [prompt], maxTokens: 12, stopTokens: [], ...change })

    test('rollouts differ, repeats of a prompt too, and a seed repeats both', async () => {
      const [first] = await ask({ n: 6, seed: 3 })
      expect(new Set(first!.map(({ tokens }) => String(tokens))).size).toBe(6)
      const [again, other] = await ask({ prompts: [prompt, prompt], n: 6, seed: 3 })
      expect(again).toEqual(first)
      expect(other).not.toEqual(first)
      expect(await ask({ n: 6, seed: 4 })).not.toEqual([first])
      // The first rollouts do not depend on how many there are.
      expect(await ask({ n: 2, seed: 3 })).toEqual([first!.slice(0, 2)])
    })

    test('calls at once are one batch, and none changes another', async () => {
      const calls = [1, 2, 3, 4, 5].map((seed) => ({
        prompts: [{ tokens: Array.from({ length: 3 * seed }, (_, i) => i + seed) }],
        seed,
        n: seed % 3,
        maxTokens: 4 * seed,
      }))
      const valid = calls.filter(({ n }) => n > 0)
      const together = await Promise.all(valid.map((call) => ask(call)))
      for (const [i, call] of valid.entries()) expect(await ask(call)).toEqual(together[i])
    })

    test('log-probabilities only where they are wanted', async () => {
      const [[made]] = (await ask({ logProbs: false, seed: 1 })) as [[Generated]]
      const [[full]] = (await ask({ seed: 1 })) as [[Generated]]
      expect(made).toEqual({ ...full, logProbs: [] })
      expect(full.logProbs).toHaveLength(12)
    })

    test('the most probable tokens of each place, as the whole distribution has them', async () => {
      const options = { seed: 5, maxTokens: 4, temperature: 0.7, topLogProbs: 5, n: 2 }
      for (const made of (await ask(options))[0]!) {
        const all = [...Array.from(prompt.tokens), ...made.tokens]
        using out = model.forward({ tokens: all, cuSeqlens: [0, all.length] })
        const logits = await out.logits.toFloat32()
        expect(made.topLogProbs).toHaveLength(4)
        made.topLogProbs!.forEach((top, i) => {
          const row = [...logits.subarray((i + 4) * 512, (i + 5) * 512)].map((z) => z / 0.7)
          const lse = Math.log(row.reduce((sum, z) => sum + Math.exp(z), 0))
          expect(top).toHaveLength(5)
          top.forEach(({ token, logProb }, k) => {
            // Logits of forward are rounded to the model's type.
            expect(Math.abs(logProb - (row[token]! - lse))).toBeLessThan(0.05)
            if (k) expect(logProb).toBeLessThanOrEqual(top[k - 1]!.logProb)
            if (token === made.tokens[i]) expect(logProb).toBe(made.logProbs[i])
          })
        })
      }
      const steps: GeneratedToken[] = []
      for await (const step of model.stream({ prompts: [prompt], stopTokens: [], ...options }))
        if (step.index === 0) steps.push(step)
      const [[first]] = (await ask(options)) as [[Generated]]
      expect(steps.map(({ topLogProbs }) => topLogProbs)).toEqual(first.topLogProbs)
    })

    test('ids that the tokenizer has no token for are never drawn', async () => {
      const known = new Set<number>(Object.values(tinyTokenizer().model.vocab))
      for (const id of Object.values(ids)) known.add(id)
      const { imageToken, videoToken, vocabSize } = model.config
      for (const id of [imageToken, videoToken]) known.delete(id)
      expect(known.size).toBeLessThan(vocabSize - 2)
      const [made] = await ask({ n: 40, maxTokens: 30, temperature: 50 })
      const drawn = new Set(made!.flatMap(({ tokens }) => tokens))
      expect(drawn.size).toBeGreaterThan(known.size / 2)
      for (const token of drawn) expect(known).toContain(token)
    })

    test('biases and penalties change what is drawn, and no log-probability', async () => {
      const greedy = { temperature: 0, maxTokens: 12 }
      const [[free]] = (await ask(greedy)) as [[Generated]]
      const [token] = free.tokens as [number]
      const [[without]] = (await ask({
        ...greedy,
        logitBias: { [token]: Number.NEGATIVE_INFINITY },
      })) as [[Generated]]
      expect(without.tokens).not.toContain(token)
      const [[only]] = (await ask({ ...greedy, logitBias: { 7: 1000 } })) as [[Generated]]
      expect(only.tokens).toEqual(Array(12).fill(7))
      expect(only.logProbs).toEqual(await rescored(model, prompt, only, 1))
      // Each time that 7 has come counts: it is below 8 after three.
      const both = { 7: 1000, 8: 997.5 }
      const counted = await ask({ ...greedy, logitBias: both, frequencyPenalty: 400 })
      expect(new Set(counted[0]![0]!.tokens)).not.toEqual(new Set([7]))
      const [[present]] = (await ask({
        ...greedy,
        maxTokens: 3,
        logitBias: { 7: 1000, 8: 990, 9: 980 },
        presencePenalty: 100,
      })) as [[Generated]]
      expect(present.tokens).toEqual([7, 8, 9])
      expect(present.logProbs).toEqual(await rescored(model, prompt, present, 1))
      // The prompt's tokens are not penalised, nor those of another rollout.
      const [spared] = await ask({
        ...greedy,
        n: 2,
        maxTokens: 1,
        logitBias: { 5: 1000, 8: 990 },
        presencePenalty: 100,
      })
      expect(spared!.map(({ tokens }) => tokens)).toEqual([[5], [5]])
      // In one batch with others.
      const together = await Promise.all([
        ask(greedy),
        ask({ ...greedy, logitBias: { 7: 1000 } }),
        ask({ ...greedy, logProbsTemperature: 0.5 }),
      ])
      expect(together.slice(0, 2)).toEqual([[[free]], [[only]]])
      const [[cold]] = together[2] as [[Generated]]
      expect(cold.logProbs).toEqual(await rescored(model, prompt, cold, 0.5))
    })

    test('streams what generate gives', async () => {
      const options = { prompts: [prompt, { tokens: [3] }], n: 2, maxTokens: 7, seed: 9 }
      const all = await ask(options)
      const made = options.prompts.map(() =>
        Array.from(
          { length: 2 },
          (): Generated => ({
            tokens: [],
            logProbs: [],
            finishReason: 'stop',
          }),
        ),
      )
      const order: string[] = []
      for await (const step of model.stream({ ...options, stopTokens: [] })) {
        const own = made[step.prompt]![step.index]!
        own.tokens.push(step.token)
        own.logProbs.push(step.logProb!)
        if (step.finishReason) own.finishReason = step.finishReason
        order.push(`${step.prompt}.${step.index}`)
      }
      expect(made).toEqual(all)
      // They come while the others go on.
      expect(new Set(order.slice(0, 8)).size).toBeGreaterThan(1)
      const one: GeneratedToken[] = []
      for await (const step of model.stream({
        prompts: [prompt],
        maxTokens: 50,
        logProbs: false,
      })) {
        one.push(step)
        if (one.length === 3) break
      }
      expect(one).toHaveLength(3)
      expect(one[0]).not.toHaveProperty('logProb')
    })

    test('an abort ends its request alone, and frees what it had', async () => {
      const stop = new AbortController()
      const others = ask({ n: 3, seed: 2 })
      let steps = 0
      const aborted = (async () => {
        const signal = stop.signal
        for await (const _ of model.stream({
          prompts: [prompt],
          maxTokens: 500,
          stopTokens: [],
          signal,
        }))
          if (++steps === 4) stop.abort(new Error('enough'))
      })()
      await expect(aborted).rejects.toThrow('enough')
      expect(steps).toBeGreaterThanOrEqual(4)
      expect(steps).toBeLessThan(20)
      expect(await others).toEqual(await ask({ n: 3, seed: 2 }))
      await expect(ask({ signal: AbortSignal.abort(new Error('before')) })).rejects.toThrow(
        'before',
      )
    })

    test('stop texts end a continuation', async () => {
      const tokenizer = await model.tokenizer()
      const options = { seed: 12, maxTokens: 40 }
      const [[free]] = (await ask(options)) as [[Generated]]
      const text = tokenizer.decode(free.tokens)
      const stop = text.slice(5, 8)
      const [[ended]] = (await ask({ ...options, stop: ['never so', stop] })) as [[Generated]]
      expect(ended.finishReason).toBe('stop')
      expect(ended.tokens).toEqual(free.tokens.slice(0, ended.tokens.length))
      expect(tokenizer.decode(ended.tokens)).toContain(stop)
      expect(tokenizer.decode(ended.tokens.slice(0, -1))).not.toContain(stop)
    })

    test('leaves nothing behind, whatever scope it is called in', async () => {
      const images = promptsOf(b.device, goldenModels[0]).slice(1, 3)
      await ask({ prompts: images, n: 2 })
      const before = b.device.memory().liveBytes
      const [first] = await Promise.all([
        scopeAsync(() => ask({ prompts: images, n: 2 })),
        ask({ prompts: images, n: 2, seed: 2 }),
      ])
      expect(b.device.memory().liveBytes).toBe(before)
      expect(await ask({ prompts: images, n: 2 })).toEqual(first)
    })

    test('refuses what cannot be continued', async () => {
      const refused = async (change: object, message: RegExp, code = 'ERR_VALUE') => {
        const error = await ask(change).then(
          () => expect.fail('it generated'),
          (e) => e,
        )
        expect(error).toMatchObject({ name: 'P2RError', code, op: 'Qwen3VL' })
        expect(error.message).toMatch(message)
      }
      await refused({ prompts: [{ tokens: [] }] }, /prompts\[0\]\.tokens must have at least one/)
      await refused({ prompts: [prompt, { tokens: [1, 600] }] }, /prompts\[1\]\.tokens\[1\]/)
      await refused({ prompts: [{ tokens: [1, 505] }] }, /placeholder of images/)
      await refused({ prompts: [{ token: [1] }] }, /did you mean 'prompts\[0\]\.tokens'/)
      await refused({ maxTokens: 4092 }, /5 tokens, and with maxTokens 4092 more than .* 4096/)
      await refused({ maxTokens: 0 }, /maxTokens/)
      await refused({ n: 0 }, /n must be/)
      await refused({ temperature: -1 }, /temperature/)
      await refused({ topP: 0 }, /topP must be a number greater than 0/)
      await refused({ topK: 1.5 }, /topK/)
      await refused({ minP: 2 }, /minP/)
      await refused({ repetitionPenalty: 0 }, /repetitionPenalty/)
      await refused({ presencePenalty: Infinity }, /presencePenalty must be a finite number/)
      await refused({ frequencyPenalty: '1' }, /frequencyPenalty/)
      await refused(
        { logitBias: { 512: 1 } },
        /logitBias has '512', which is no token id below 512/,
      )
      await refused({ logitBias: { a: 1 } }, /logitBias has 'a'/)
      await refused({ logitBias: { 1: Infinity } }, /logitBias\[1\] must be a number/)
      await refused({ logitBias: [1] }, /logitBias must be an object/)
      await refused({ topLogProbs: 65 }, /topLogProbs/)
      await refused({ topLogProbs: 1, logProbs: false }, /topLogProbs needs logProbs/)
      await refused({ stopTokens: [512] }, /stopTokens\[0\]/)
      await refused({ stop: [''] }, /stop\[0\]/)
      await refused({ seed: -1 }, /seed/)
      expect(await ask({ prompts: [] })).toEqual([])
    })
  })

  test('a full cache is an error of the request that fills it alone', async () => {
    using model = await load(tied, { cacheTokens: 64 })
    const long = { tokens: Array.from({ length: 40 }, (_, i) => i) }
    const ask = (prompt: GenerationPrompt, maxTokens: number, n = 1) =>
      model.generate({ prompts: [prompt], maxTokens, n, stopTokens: [], logProbs: false })
    const small = ask({ tokens: [1, 2, 3] }, 20, 2)
    await expect(ask(long, 100)).rejects.toMatchObject({
      code: 'ERR_MEMORY',
      op: 'Qwen3VL',
      message: expect.stringMatching(/the cache of 64 tokens is full after 64 of this request/),
    })
    expect(await small).toEqual(await ask({ tokens: [1, 2, 3] }, 20, 2))
    await expect(ask({ tokens: Array(64).fill(3) }, 1)).rejects.toThrow(
      /a prompt of 64 tokens does not fit into the cache of 64/,
    )
    expect((await ask(long, 10))[0]![0]!.tokens).toHaveLength(10)
  })

  test('a disposed model ends its requests', async () => {
    const model = await load(tied)
    const going = model.generate({ prompts: [{ tokens: [1] }], maxTokens: 400, stopTokens: [] })
    setTimeout(() => model.dispose(), 20)
    await expect(going).rejects.toMatchObject({ code: 'ERR_DISPOSED' })
    await expect(
      model.generate({ prompts: [{ tokens: [1] }], maxTokens: 1 }),
    ).rejects.toMatchObject({ code: 'ERR_DISPOSED' })
  })
})

test('texts are shown up to a stop text, and what may become one is held back', () => {
  const shown = (pieces: string[], stop: string[]) => {
    const texts = new StopTexts(stop)
    const out = pieces.map((piece) => texts.push(piece))
    return [...out, texts.end(), texts.stopped]
  }
  expect(shown(['ab', 'c</', 'an', 's', 'wer> x'], ['</answer>'])).toEqual([
    ...['ab', 'c', '', '', '', ''],
    true,
  ])
  expect(shown(['ab', '</', 'b>', '</'], ['</answer>'])).toEqual([
    'ab',
    '',
    '</b>',
    '',
    '</',
    false,
  ])
  expect(shown(['aaab'], ['ab', 'aab'])).toEqual(['a', '', true])
  expect(shown(['x', 'y'], [])).toEqual(['x', 'y', '', false])
})
