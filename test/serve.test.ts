import { mkdtempSync, rmSync } from 'node:fs'
import { request as httpRequest } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { OpenAI } from 'openai'
import {
  encodeImage,
  LocalPolicy,
  type ModelServer,
  OpenAIPolicy,
  openDevice,
  Perceiver,
  type PolicyRequest,
  Qwen3VL,
  Reasoner,
  serveModel,
} from 'p2r-kernels'
import { afterAll, beforeAll, describe, expect, onTestFinished, test, vi } from 'vitest'
import { ToolTexts } from '../dist/lib/serve/tool_texts.js'
import { writeModel } from './golden_model.js'
import { expectRefusal } from './harness.js'
import { ids, writeTokenizer } from './tiny_tokenizer.js'

const root = mkdtempSync(join(tmpdir(), 'serve-'))
afterAll(() => rmSync(root, { recursive: true, force: true }))
const device = openDevice('cpu')
afterAll(() => device.dispose())

let model: Qwen3VL
let server: ModelServer
beforeAll(async () => {
  const folder = writeModel(join(root, 'model'), 'm1_d32_gqa2_tied')
  writeTokenizer(folder)
  model = await Qwen3VL.load(folder, device)
  server = await serveModel(model, { name: 'tiny', port: 0, maxImages: 2, maxChoices: 8 })
})
afterAll(() => server.close())

// biome-ignore lint/suspicious/noExplicitAny: what the server answers
type Json = any
async function ask(path: string, body?: unknown, headers: Record<string, string> = {}) {
  const response = await fetch(`${server.baseURL.replace('/v1', '')}${path}`, {
    ...(body !== undefined && { method: 'POST', body: JSON.stringify(body) }),
    headers: { 'content-type': 'application/json', ...headers },
  })
  return { status: response.status, json: (await response.json()) as Json, response }
}
const complete = (body: object) => ask('/v1/chat/completions', { model: 'tiny', ...body })
const hello = { messages: [{ role: 'user', content: 'What does the sign say?' }], seed: 5 }

test('/health and /v1/models', async () => {
  expect((await ask('/health')).status).toBe(200)
  const { json } = await ask('/v1/models')
  expect(json.data).toMatchObject([{ id: 'tiny', object: 'model', max_model_len: 4096 }])
  expect((await ask('/v1/nothing')).status).toBe(404)
  expect(server.baseURL).toMatch(/^http:\/\/127\.0\.0\.1:\d+\/v1$/)
})

test('a completion has choices, tokens, log-probabilities and usage', async () => {
  const { status, json } = await complete({
    ...hello,
    n: 3,
    max_tokens: 9,
    temperature: 1,
    top_p: 1,
    top_k: -1,
    logprobs: true,
    return_token_ids: true,
  })
  expect(status).toBe(200)
  expect(json).toMatchObject({ object: 'chat.completion', model: 'tiny' })
  const tokenizer = await model.tokenizer()
  const prompt = json.prompt_token_ids
  expect(tokenizer.decode(prompt)).toBe('user\nWhat does the sign say?\nassistant\n')
  expect(json.choices).toHaveLength(3)
  let made = 0
  for (const [i, choice] of json.choices.entries()) {
    expect(choice.index).toBe(i)
    expect(tokenizer.decode(choice.token_ids)).toBe(choice.message.content)
    expect(choice.logprobs.content).toHaveLength(choice.token_ids.length)
    const all = [...prompt, ...choice.token_ids]
    using out = model.logProbs({ tokens: all, cuSeqlens: [0, all.length] })
    const again = [...(await out.logProbs.read()).slice(prompt.length)]
    expect(choice.logprobs.content.map((c: Json) => c.logprob)).toEqual(again)
    made += choice.token_ids.length
  }
  expect(json.usage).toEqual({
    prompt_tokens: prompt.length,
    completion_tokens: made,
    total_tokens: prompt.length + made,
  })
  const again = await complete({ ...hello, max_tokens: 9, temperature: 1, top_p: 1, top_k: 0 })
  expect(again.json.choices[0].message).toEqual(json.choices[0].message)
})

test('streams what it answers at once, to OpenAI’s own client', async () => {
  const client = new OpenAI({ baseURL: server.baseURL, apiKey: 'EMPTY', maxRetries: 0 })
  const asked = {
    model: 'tiny',
    messages: [{ role: 'user' as const, content: 'What does the sign say?' }],
    seed: 8,
    n: 2,
    max_tokens: 15,
    temperature: 0.9,
    logprobs: true,
  }
  const whole = await client.chat.completions.create(asked)
  const texts = ['', '']
  const logProbs: number[][] = [[], []]
  const reasons: (string | null)[] = [null, null]
  let usage: unknown
  let chunks = 0
  const stream = await client.chat.completions.create({
    ...asked,
    stream: true,
    stream_options: { include_usage: true },
  })
  for await (const chunk of stream) {
    chunks++
    for (const { index, delta, logprobs, finish_reason } of chunk.choices) {
      texts[index] += delta.content ?? ''
      logProbs[index]!.push(...(logprobs?.content ?? []).map(({ logprob }) => logprob))
      reasons[index] = finish_reason ?? reasons[index]!
    }
    if (chunk.usage) usage = chunk.usage
  }
  expect(chunks).toBeGreaterThan(10)
  expect(texts).toEqual(whole.choices.map(({ message }) => message.content))
  expect(reasons).toEqual(whole.choices.map(({ finish_reason }) => finish_reason))
  expect(logProbs).toEqual(
    whole.choices.map(({ logprobs }) => logprobs!.content!.map(({ logprob }) => logprob)),
  )
  expect(usage).toEqual(whole.usage)
})

test('a stop text ends an answer before it', async () => {
  const asked = { ...hello, max_tokens: 60, temperature: 1.2, ignore_eos: true }
  const { json: free } = await complete(asked)
  const text: string = free.choices[0].message.content
  const stop = text.slice(6, 9)
  const { json } = await complete({ ...asked, stop: [stop, '\u{0}never'] })
  expect(json.choices[0].message.content).toBe(text.slice(0, text.indexOf(stop)))
  expect(json.choices[0].finish_reason).toBe('stop')
})

describe.each([false, true])('our own policy, streaming: %s', (stream) => {
  const image = device.tensor(
    Uint8Array.from({ length: 64 * 96 * 3 }, (_, i) => (i * 7) % 256),
    [64, 96, 3],
    'u8',
  )
  const policy = () =>
    new OpenAIPolicy({ baseURL: server.baseURL, model: 'tiny', stream, imageFormat: 'png' })

  test('asks it as a LocalPolicy asks the model', async () => {
    const request: PolicyRequest = {
      role: 'reasoner',
      system: 'Look.',
      prompt: 'Where?',
      images: [image, image],
      n: 2,
      temperature: 0,
      maxTokens: 14,
    }
    const served = await policy().generate(request)
    const local = await new LocalPolicy(model).generate(request)
    expect(served.map(({ text }) => text)).toEqual(local.map(({ text }) => text))
    expect(served.map(({ tokens }) => tokens)).toEqual(local.map(({ tokens }) => tokens))
    expect(served.map(({ logProbs }) => logProbs)).toEqual(local.map(({ logProbs }) => logProbs))
    expect(served.map((c) => c.finishReason)).toEqual(local.map((c) => c.finishReason))
    expect(served[0]!.promptTokens).toEqual(local[0]!.promptTokens)
  })

  test('plays both roles with it', async () => {
    const perceiver = new Perceiver(policy(), { maxTokens: 8 })
    const reasoner = new Reasoner(policy(), { maxTokens: 8 })
    const perceptions = await perceiver.perceive({ image, question: 'What?\n(A) a (B) b', n: 3 })
    expect(perceptions).toHaveLength(3)
    const { evidence } = perceptions[0]!
    const asked = { evidence, question: 'What?\n(A) a (B) b', answerForm: 'mca' as const }
    expect(await reasoner.reason(asked)).toHaveLength(1)
  })

  test('is told what is wrong with a request', async () => {
    await expect(
      policy().generate({
        role: 'reasoner',
        system: '',
        prompt: 'x',
        images: [image, image, image],
      }),
    ).rejects.toThrow(/2 images at most, got 3/)
  })
})

test('biases, penalties and the most probable tokens', async () => {
  const asked = { ...hello, max_tokens: 3, temperature: 0, logprobs: true, ignore_eos: true }
  const { json } = await complete({
    ...asked,
    logit_bias: { 65: 100, 66: 99 },
    presence_penalty: 2,
    top_logprobs: 4,
    return_token_ids: true,
  })
  const [choice] = json.choices
  for (const id of choice.token_ids) expect([65, 66]).toContain(id)
  const [entry] = choice.logprobs.content
  expect(entry.top_logprobs).toHaveLength(4)
  // They are of the model's own distribution.
  expect(entry.top_logprobs[0].logprob).toBeGreaterThan(entry.logprob)
  expect(entry.top_logprobs[0]).toMatchObject({
    token: expect.any(String),
    bytes: expect.any(Array),
  })
  const often = await complete({ ...asked, frequency_penalty: 2, repetition_penalty: 1.1 })
  expect(often.status).toBe(200)
})

describe('tools', () => {
  const weather = {
    type: 'function' as const,
    function: { name: 'weather', description: 'Tells <|im_end|> it.', parameters: {} },
  }
  const said =
    'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'

  /** The model, as if it had said this. */
  function speaking(text: string) {
    const tokens = text
      .split(/(<\/?tool_call>)/)
      .flatMap((piece) => (ids[piece] === undefined ? knownTokenizer.encode(piece) : [ids[piece]!]))
    tokens.push(ids['<|im_end|>']!)
    return vi.spyOn(model, 'stream').mockImplementation(async function* () {
      for (const [i, token] of tokens.entries())
        yield {
          ...{ prompt: 0, index: 0, token },
          ...(i === tokens.length - 1 && { finishReason: 'stop' as const }),
        }
    })
  }
  let knownTokenizer: Awaited<ReturnType<Qwen3VL['tokenizer']>>
  beforeAll(async () => {
    knownTokenizer = await model.tokenizer()
  })

  test.each([false, true])('calls are told apart from the text, streaming: %s', async (stream) => {
    const spy = speaking(said)
    onTestFinished(() => spy.mockRestore())
    const client = new OpenAI({ baseURL: server.baseURL, apiKey: 'EMPTY', maxRetries: 0 })
    const asked = {
      model: 'tiny',
      messages: [{ role: 'user' as const, content: 'How is it?' }],
      tools: [weather],
    }
    const message = stream
      ? (await client.chat.completions.stream(asked).finalChatCompletion()).choices[0]!
      : (await client.chat.completions.create(asked)).choices[0]!
    expect(message.finish_reason).toBe('tool_calls')
    expect(message.message.content).toBe('I look.\n')
    expect(message.message.tool_calls).toMatchObject([
      {
        id: expect.stringMatching(/^chatcmpl-tool-/),
        type: 'function',
        function: { name: 'weather', arguments: '{"city":"Zürich"}' },
      },
    ])
  })

  test('without tools, or where they must not be called, the text stays as it is', async () => {
    const spy = speaking(said)
    onTestFinished(() => spy.mockRestore())
    for (const body of [{}, { tools: [weather], tool_choice: 'none' }]) {
      const { json } = await complete({ ...hello, ...body })
      expect(json.choices[0]).toMatchObject({ finish_reason: 'stop', message: { content: said } })
      expect(json.choices[0].message).not.toHaveProperty('tool_calls')
    }
  })

  test('earlier calls and their results stand in the prompt, and tools open no turn', async () => {
    const calls = [
      { id: 'a', type: 'function', function: { name: 'weather', arguments: '{"city": "Bern"}' } },
    ]
    const { json } = await complete({
      messages: [
        { role: 'user', content: 'How is it?' },
        { role: 'assistant', content: null, tool_calls: calls },
        { role: 'tool', tool_call_id: 'a', content: 'dry' },
      ],
      tools: [weather],
      max_tokens: 1,
      return_token_ids: true,
    })
    expect(knownTokenizer.decode(json.prompt_token_ids)).toBe(
      'user\nHow is it?\nassistant\n' +
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>\n' +
        'tool\ndry\nassistant\n',
    )
    const turns = json.prompt_token_ids.filter((id: number) => id === ids['<|im_end|>'])
    expect(turns).toHaveLength(3)
  })

  test('pieces of a text become calls as they come', () => {
    const read = (...pieces: string[]) => {
      const tools = new ToolTexts()
      return [...pieces.map((piece) => tools.push(piece)), tools.end()].map(({ text, calls }) =>
        calls.length ? [text, ...calls.map((call) => `${call.name}${call.arguments}`)] : text,
      )
    }
    const call = '{"name": "f", "arguments": {"x": [1]}}'
    expect(read('a<tool', '_call>', call, '</tool_call>', '\n')).toEqual([
      ...['a', '', ''],
      ['', 'f{"x":[1]}'],
      ...['', ''],
    ])
    expect(read('a < b <', 'c')).toEqual(['a < b ', '<c', ''])
    // Cut off by the end: whole JSON is a call, all else stays text.
    expect(read(`<tool_call>${call}`)).toEqual(['', ['', 'f{"x":[1]}']])
    expect(read('<tool_call>{"name"')).toEqual(['', '<tool_call>{"name"'])
    expect(read('<tool_call>no</tool_call> then')).toEqual(['<tool_call>no</tool_call> then', ''])
    expect(read(`<tool_call>${call}</tool_call>\n<tool_call>{"name": "g"}</tool_call>`)).toEqual([
      ['', 'f{"x":[1]}', 'g{}'],
      '',
    ])
  })
})

test('wrong requests are refused by what is wrong with them', async () => {
  const image_url = { url: 'https://example.com/a.png' }
  const part = (content: unknown) => ({ messages: [{ role: 'user', content: [content] }] })
  const png = Buffer.from(await encodeImage(device.zeros([4, 4, 3], 'u8'))).toString('base64')
  for (const [body, status, message] of [
    [{ messages: [] }, 400, /messages must be a list, not empty/],
    [{}, 400, /messages/],
    [{ ...hello, model: 'other' }, 404, /the model 'other' does not exist; 'tiny' does/],
    [{ ...hello, n: 9 }, 400, /n must be at most 8, got 9/],
    [{ ...hello, temperature: -1 }, 400, /temperature has no meaning as -1/],
    [{ ...hello, top_p: 0 }, 400, /top_p/],
    [{ ...hello, seed: 'x' }, 400, /seed/],
    [{ ...hello, max_tokens: 5000 }, 400, /max_tokens is 5000: more than the model's context/],
    [{ ...hello, stop: [''] }, 400, /stop must be/],
    [
      { ...hello, tools: [{ type: 'function' }] },
      400,
      /tools\[0\] must be of type 'function', with/,
    ],
    [{ ...hello, tools: 'x' }, 400, /tools must be a list/],
    [{ ...hello, tool_choice: 'required' }, 400, /tool_choice 'required' is not supported/],
    [{ ...hello, presence_penalty: 2.5 }, 400, /presence_penalty has no meaning as 2.5/],
    [{ ...hello, frequency_penalty: 'x' }, 400, /frequency_penalty/],
    [{ ...hello, logit_bias: { a: 1 } }, 400, /logit_bias must have numbers from -100 to 100/],
    [{ ...hello, logit_bias: { 512: 1 } }, 400, /no token id below 512/],
    [{ ...hello, top_logprobs: 3 }, 400, /top_logprobs needs logprobs/],
    [{ ...hello, logprobs: true, top_logprobs: 21 }, 400, /top_logprobs has no meaning as 21/],
    [{ ...hello, best_of: 2 }, 400, /best_of is not supported/],
    [
      { messages: [{ role: 'assistant', tool_calls: [{}] }] },
      400,
      /messages\[0\]\.tool_calls\[0\] must have a function with a name/,
    ],
    [{ ...hello, response_format: { type: 'json_object' } }, 400, /response_format 'json_object'/],
    [{ ...hello, logprobs: 1 }, 400, /logprobs must be true or false/],
    [{ messages: [{ role: 'root', content: '' }] }, 400, /messages\[0\]\.role 'root'/],
    [part({ type: 'image_url', image_url }), 400, /must be a data URL .*; nothing is fetched/],
    [part({ type: 'video_url', video_url: {} }), 400, /content\[0\] of type 'video_url'/],
    [
      part({ type: 'image_url', image_url: { url: 'data:image/png;base64,AAAA' } }),
      400,
      /loadImage/,
    ],
    [
      part({ type: 'image_url', image_url: { url: `data:image/png;base64,${png.slice(0, 40)}` } }),
      400,
      /loadImage/,
    ],
    [[1], 400, /the body must be an object/],
  ] as const) {
    const { status: got, json } = await ask(
      '/v1/chat/completions',
      Array.isArray(body) ? body : { model: 'tiny', ...body },
    )
    expect([got, json.error.message]).toEqual([status, expect.stringMatching(message)])
  }
  const form = await ask('/v1/chat/completions', hello, { 'content-type': 'text/plain' })
  expect(form.status).toBe(415)
  // What is off needs no support.
  const off = { tools: [], presence_penalty: 0, response_format: { type: 'text' }, logit_bias: {} }
  expect((await complete({ ...hello, ...off, max_tokens: 1 })).status).toBe(200)
})

test('a body that is too large, or no JSON, ends with its request', async () => {
  await using small = await disposable({ port: 0, maxBytes: 1000 })
  const post = (body: string) =>
    fetch(`${small.baseURL}/chat/completions`, {
      method: 'POST',
      body,
      headers: { 'content-type': 'application/json' },
    }).then(
      ({ status }) => status,
      // The connection may be closed before all of it is sent.
      () => 413,
    )
  expect(await post('x'.repeat(5000))).toBe(413)
  expect(await post('{')).toBe(400)
  expect(await post(JSON.stringify({ ...hello, max_tokens: 1 }))).toBe(200)
})

async function disposable(options: Parameters<typeof serveModel>[1]) {
  const one = await serveModel(model, options)
  return Object.assign(one, { [Symbol.asyncDispose]: () => one.close() })
}

test('an API key is needed where there is one', async () => {
  await using locked = await disposable({ port: 0, apiKey: 'secret' })
  const status = async (headers: Record<string, string>, path = '/models') =>
    (await fetch(`${locked.baseURL}${path}`, { headers })).status
  expect(await status({})).toBe(401)
  expect(await status({ authorization: 'Bearer wrong' })).toBe(401)
  expect(await status({ authorization: 'Bearer secret' })).toBe(200)
  expect(await status({}, '/../health')).toBe(200)
})

test('more requests than it takes are told to come again', async () => {
  await using narrow = await disposable({ port: 0, maxRequests: 1 })
  const post = () =>
    fetch(`${narrow.baseURL}/chat/completions`, {
      method: 'POST',
      body: JSON.stringify({ ...hello, max_tokens: 200, ignore_eos: true }),
      headers: { 'content-type': 'application/json' },
    })
  const all = await Promise.all([post(), post(), post()])
  const statuses = all.map(({ status }) => status).sort()
  expect(statuses[0]).toBe(200)
  expect(statuses.at(-1)).toBe(503)
  expect(all.find(({ status }) => status === 503)!.headers.get('retry-after')).toBe('1')
})

test('what a client left is not computed to its end', async () => {
  const body = JSON.stringify({ ...hello, max_tokens: 4000, ignore_eos: true, stream: true })
  const before = device.memory().liveBytes
  await new Promise<void>((resolve, reject) => {
    const request = httpRequest(
      `${server.baseURL}/chat/completions`,
      { method: 'POST', headers: { 'content-type': 'application/json' } },
      (response) => {
        response.once('data', () => {
          response.destroy()
          resolve()
        })
      },
    )
    request.on('error', reject)
    request.end(body)
  })
  // The next answer would take its place behind 4000 steps.
  expect((await complete({ ...hello, max_tokens: 3 })).status).toBe(200)
  await expect.poll(() => device.memory().liveBytes).toBeLessThanOrEqual(before + 2 ** 16)
})

test('closing lets requests end, or breaks them off after the time given', async () => {
  const post = ({ baseURL }: ModelServer, maxTokens: number) =>
    fetch(`${baseURL}/chat/completions`, {
      method: 'POST',
      body: JSON.stringify({ ...hello, max_tokens: maxTokens, ignore_eos: true }),
      headers: { 'content-type': 'application/json' },
    })
  const one = await serveModel(model, { port: 0 })
  const going = post(one, 100)
  await new Promise((resolve) => setTimeout(resolve, 100))
  await one.close()
  expect((await going).status).toBe(200)
  await expect(fetch(`${one.baseURL}/models`)).rejects.toThrow()

  const two = await serveModel(model, { port: 0 })
  const long = post(two, 4000)
  await new Promise((resolve) => setTimeout(resolve, 100))
  await two.close(50)
  expect((await long).status).toBe(503)
})

test('refuses wrong options, and addresses that are taken', async () => {
  const refused = (options: object, message: RegExp) =>
    expect(serveModel(model, options)).rejects.toMatchObject({
      code: 'ERR_VALUE',
      op: 'serveModel',
      message: expect.stringMatching(message),
    })
  await refused({ port: 70_000 }, /port/)
  await refused({ logProbsMode: 'raw' }, /logProbsMode/)
  await refused({ apikey: 'x' }, /did you mean 'options\.apiKey'/)
  const port = Number(new URL(server.baseURL).port)
  await expect(serveModel(model, { port })).rejects.toMatchObject({ code: 'ERR_IO' })
  await expect(serveModel({} as never)).rejects.toMatchObject({ code: 'ERR_VALUE' })
  expectRefusal(() => model.forward({} as never), 'ERR_VALUE', 'Qwen3VL')
})
