import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  answer,
  evaluate,
  LocalPolicy,
  openDevice,
  Perceiver,
  type PolicyRequest,
  PraGrpo,
  Qwen3VL,
  Reasoner,
} from 'p2r-kernels'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { patchesOf } from '../dist/lib/models/qwen3_vl/chat.js'
import { writeModel } from './golden_model.js'
import { ids, tinyTokenizer, writeTokenizer } from './tiny_tokenizer.js'

const root = mkdtempSync(join(tmpdir(), 'local-policy-'))
afterAll(() => rmSync(root, { recursive: true, force: true }))
const device = openDevice('cpu')
afterAll(() => device.dispose())
const folder = writeModel(join(root, 'model'), 'm1_d32_gqa2_tied')
writeTokenizer(folder)

let model: Qwen3VL
beforeAll(async () => {
  model = await Qwen3VL.load(folder, device)
})

const image = device.tensor(
  Uint8Array.from({ length: 70 * 100 * 3 }, (_, i) => (i * 7) % 256),
  [70, 100, 3],
  'u8',
)
const request: PolicyRequest = {
  role: 'reasoner',
  system: 'Look.',
  prompt: 'What does the sign say?',
  images: [image],
  maxTokens: 12,
}

test('a completion has the text, the tokens and the log-probabilities of the model', async () => {
  const policy = new LocalPolicy(model, { seed: 4 })
  const [made] = await policy.generate({ ...request, temperature: 1 })
  const tokenizer = await model.tokenizer()
  const prompt = made!.promptTokens!
  // 70 x 100 pixels are enlarged to 65 536 at least: 224 x 320, 7 x 10 tokens.
  expect(prompt.filter((id) => id === model.config.imageToken)).toHaveLength(70)
  expect(tokenizer.decode(prompt)).toBe('system\nLook.\nuser\nWhat does the sign say?\nassistant\n')
  const { tokens, logProbs, finishReason, text } = made!
  expect(logProbs).toHaveLength(tokens!.length)
  expect(finishReason).toBe(tokens!.length === 12 ? 'length' : 'stop')
  expect(tokenizer.decode(tokens!)).toBe(text)
  const plain = await policy.generate({ ...request, temperature: 1, tokens: false })
  expect(Object.keys(plain[0]!).sort()).toEqual(['finishReason', 'text'])
})

test('requests at once are those that come one after another', async () => {
  const requests = Array.from({ length: 5 }, (_, i) => ({
    ...request,
    prompt: `Number ${i}?`,
    n: 1 + (i % 3),
    temperature: 1,
    images: i % 2 ? [image] : [],
  }))
  const together = new LocalPolicy(model)
  const all = await Promise.all(requests.map((one) => together.generate(one)))
  const apart = new LocalPolicy(model)
  for (const [i, one] of requests.entries()) expect(await apart.generate(one)).toEqual(all[i])
  // The same request again is another sample, and a greedy one the same text.
  expect(await apart.generate(requests[4]!)).not.toEqual(all[4])
  const greedy = { ...request, temperature: 0 }
  expect(await apart.generate(greedy)).toEqual(await apart.generate(greedy))
})

test('both roles, answers and evaluations work with it as with a server', async () => {
  const policy = new LocalPolicy(model)
  const perceiver = new Perceiver(policy, { maxTokens: 16 })
  const reasoner = new Reasoner(policy, { maxTokens: 16 })
  const question = 'What does the sign say?\n(A) Stop (B) Go'
  const before = device.memory().liveBytes
  {
    using made = await answer({ perceiver, reasoner, image, question, answerForm: 'mca' })
    expect(made.reasoning).toBeTypeOf('string')
    expect(made.truncated.length).toBeLessThanOrEqual(2)
  }
  expect(device.memory().liveBytes).toBeGreaterThanOrEqual(before)
  const questions = ['A', 'B', 'A'].map((truth) => ({
    question,
    truth,
    answerForm: 'mca' as const,
    load: async () => image.to(device),
  }))
  let judged = 0
  for await (const { error, reward } of evaluate({
    perceiver,
    reasoner,
    questions,
    concurrency: 3,
  })) {
    expect(error).toBeUndefined()
    expect(reward).toBeTypeOf('number')
    judged++
  }
  expect(judged).toBe(3)
})

test('a step of PRA-GRPO has the log-probabilities that the model gives again', async () => {
  const policy = new LocalPolicy(model)
  const trainer = new PraGrpo({
    perceiver: policy,
    reasoner: policy,
    device,
    groupSize: 3,
    maxTokens: { perceiver: 8, reasoner: 8 },
  })
  const batch = await trainer.rollout([
    { image, question: 'What?\n(A) a (B) b', answerForm: 'mca', truth: 'A' },
  ])
  expect(batch.items.length).toBe(3)
  const old = await batch.oldLogProbs!.read()
  const again: number[] = []
  for (const { completion, request } of batch.items) {
    const { promptTokens, tokens } = completion
    const all = [...promptTokens!, ...tokens!]
    const images = patchesOf(model, request!.images, 'test')!
    using out = model.logProbs({ tokens: all, cuSeqlens: [0, all.length], images })
    again.push(...(await out.logProbs.read()).slice(promptTokens!.length))
    images.pixelValues.dispose()
  }
  expect([...old]).toEqual(again)
  batch.dispose()
})

test('a conversation of several turns is one prompt, with the images of all', async () => {
  const policy = new LocalPolicy(model)
  const call = '<tool_call>{"name": "image_zoom_in_tool", "arguments": {}}</tool_call>'
  const [made] = await policy.generate({
    ...request,
    tools: [{ name: 'image_zoom_in_tool', description: 'Zooms.', parameters: {} }],
    turns: [
      { completion: { text: call }, results: [{ text: 'a crop', images: [image] }] },
      { completion: { text: 'So?' }, results: [] },
    ],
    temperature: 0,
  })
  const prompt = made!.promptTokens!
  expect(prompt.filter((id) => id === model.config.imageToken)).toHaveLength(140)
  expect((await model.tokenizer()).decode(prompt)).toBe(
    'system\nLook.\nuser\nWhat does the sign say?\n' +
      `assistant\n${call}\ntool\na crop\nassistant\nSo?\nassistant\n`,
  )
})

test('the tokens of earlier turns are kept as they were sampled', async () => {
  const policy = new LocalPolicy(model, { seed: 4 })
  const asked = { ...request, temperature: 1.5, maxTokens: 12 }
  const imEnd = ids['<|im_end|>']!
  for (const end of [[imEnd], []]) {
    const [sampled] = await policy.generate(asked)
    // Random tokens, which no tokenizer makes of their text again.
    const first = { ...sampled!, tokens: [...sampled!.tokens!.slice(0, 9), ...end] }
    const results = [{ text: 'a crop', images: [image] }]
    const [second] = await policy.generate({ ...asked, turns: [{ completion: first, results }] })
    const prefix = [...first.promptTokens!, ...first.tokens.filter((id) => id !== imEnd), imEnd]
    expect(second!.promptTokens!.slice(0, prefix.length)).toEqual(prefix)
    const rest = second!.promptTokens!.slice(prefix.length)
    expect((await model.tokenizer()).decode(rest)).toBe('\ntool\na crop\nassistant\n')
    expect(rest.filter((id) => id === model.config.imageToken)).toHaveLength(70)
    // A third turn goes on from the second.
    const turns = [
      { completion: first, results },
      { completion: second!, results: [] },
    ]
    const [third] = await policy.generate({ ...asked, turns })
    const kept = [...second!.promptTokens!, ...second!.tokens!]
    expect(third!.promptTokens!.slice(0, kept.length)).toEqual(kept)
  }
})

test('the context ends a completion, and a prompt beyond it is refused', async () => {
  const policy = new LocalPolicy(model, { maxTokens: 5000 })
  await expect(
    policy.generate({ ...request, prompt: 'x '.repeat(4096), images: [] }),
  ).rejects.toMatchObject({ code: 'ERR_VALUE', op: 'LocalPolicy' })
  const stop = new AbortController()
  const aborted = policy.generate({
    ...request,
    maxTokens: 4000,
    signal: stop.signal,
    temperature: 1,
  })
  setTimeout(() => stop.abort(new Error('enough')), 50)
  await aborted.then(
    ([made]) => expect(made!.finishReason).toBe('stop'),
    (error) => expect(error).toMatchObject({ message: 'enough' }),
  )
})

test('a tokenizer may be given where the checkpoint has none', async () => {
  const bare = writeModel(join(root, 'bare'), 'm1_d32_gqa2_tied')
  using other = await Qwen3VL.load(bare, device)
  await expect(new LocalPolicy(other).generate(request)).rejects.toMatchObject({ code: 'ERR_IO' })
  const given = new LocalPolicy(other, { tokenizer: tinyTokenizer() })
  const own = new LocalPolicy(model)
  expect(await given.generate(request)).toEqual(await own.generate(request))
})

test('without a temperature it samples as the checkpoint says', async () => {
  const policy = new LocalPolicy(model, { sampling: { temperature: 0 } })
  expect(await policy.generate(request)).toEqual(
    await policy.generate({ ...request, temperature: 0 }),
  )
  expect(() => new LocalPolicy(model, { sampling: { topP: 7 } })).toThrow(/topP/)
  expect(() => new LocalPolicy({} as never)).toThrow(/model must be a Qwen3VL/)
})
