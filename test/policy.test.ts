import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  functionPolicy,
  loadImage,
  OpenAIPolicy,
  openDevice,
  type PolicyRequest,
  RecordedPolicy,
  recordPolicy,
} from 'p2r-kernels'
import { Agent, getGlobalDispatcher, setGlobalDispatcher } from 'undici'
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from 'vitest'
import {
  type ChatServer,
  chatServer,
  choices,
  fails,
  type Reply,
  says,
  send,
} from './chat_server.js'
import { expectRefusal, Random } from './harness.js'

const device = openDevice('cpu')
afterAll(() => device.dispose())
const random = new Random(7)
const picture = (height = 24, width = 32) =>
  device.tensor(
    Uint8Array.from({ length: height * width * 3 }, () => random.int(0, 255)),
    [height, width, 3],
  )
const ask = (extra: Partial<PolicyRequest> = {}): PolicyRequest => ({
  role: 'reasoner',
  system: 'Be brief.',
  prompt: 'How many?',
  images: [],
  ...extra,
})

/** A completion as the server's choices give it. */
const said = (text: string) => ({ text, finishReason: 'stop' })

describe('OpenAIPolicy', () => {
  let server: ChatServer
  afterEach(() => server?.close())
  const serve = async (...script: Reply[]) => {
    server = await chatServer(...script)
    return server.baseURL
  }
  const policy = async (script: Reply[], options = {}) =>
    new OpenAIPolicy({ baseURL: await serve(...script), model: 'm', timeoutMs: 5000, ...options })
  const failure = (message: RegExp) =>
    expect.objectContaining({
      name: 'P2RError',
      code: 'ERR_POLICY',
      op: 'OpenAIPolicy',
      message: expect.stringMatching(message),
    })

  test('sends the request, with images that the server can decode', async () => {
    const image = picture()
    const all = [image, picture(8, 8)]
    const asked = ask({ images: all, n: 2, temperature: 0.5, maxTokens: 9 })
    const png = await policy([says('three')], { imageFormat: 'png', apiKey: 'key' })
    expect(await png.generate(asked)).toEqual([said('three'), said('three')])
    const [request] = server.requests
    expect(request!.headers.authorization).toBe('Bearer key')
    expect(request!.body).toMatchObject({ model: 'm', n: 2, temperature: 0.5, max_tokens: 9 })
    expect([request!.system, request!.prompt]).toEqual(['Be brief.', 'How many?'])
    expect(request!.images.length).toBe(2)
    using back = await loadImage(request!.images[0]!, device)
    expect(await back.read()).toEqual(await image.read())
    await server.close()

    const jpeg = await policy([says('four')])
    await jpeg.generate(ask({ images: all }))
    const url = server.requests[0]!.body.messages[1].content[0].image_url.url
    expect(url).toMatch(/^data:image\/jpeg;base64,\/9j\//)
    for (const key of ['n', 'temperature', 'max_tokens', 'stream'])
      expect(server.requests[0]!.body).not.toHaveProperty(key)
  })

  test('tokens and log-probabilities, from whichever field the server has', async () => {
    const reply: Reply = ({ at }, response) => {
      const [choice] = choices({ content: 'a', tokens: [5, 7] }) as Record<string, unknown>[]
      const plain = {
        content: [
          { token: 'a', logprob: -1 },
          { token: 'b', logprob: -2 },
        ],
      }
      if (at === 1) Object.assign(choice!, { logprobs: plain, token_ids: [1, 2] })
      if (at === 2) Object.assign(choice!, { logprobs: plain, response_token_ids: [3, 4] })
      if (at === 3) Object.assign(choice!, { logprobs: plain })
      if (at === 4) Object.assign(choice!, { logprobs: plain, token_ids: [1, 2, 3] })
      if (at === 5) Object.assign(choice!, { logprobs: { content: [null, { token: 4 }] } })
      if (at === 6) plain.content[1]!.logprob = null as never
      if (at === 6) Object.assign(choice!, { logprobs: plain, token_ids: [1, 2] })
      send(response, 200, { choices: [choice] })
    }
    const p = await policy([reply])
    const expected = [
      { ...said('a'), tokens: [5, 7], logProbs: [-0.05, -0.07] },
      { ...said('a'), tokens: [1, 2], logProbs: [-1, -2] },
      { ...said('a'), tokens: [3, 4], logProbs: [-1, -2] },
      { ...said('a'), logProbs: [-1, -2] },
      { ...said('a'), tokens: [1, 2, 3] },
      said('a'),
      { ...said('a'), tokens: [1, 2], logProbs: [-1, NaN] },
    ]
    for (const one of expected) expect(await p.generate(ask())).toEqual([one])
    expect(server.requests[0]!.body).toMatchObject({
      logprobs: true,
      return_token_ids: true,
      return_tokens_as_token_ids: true,
    })
    await p.generate(ask({ tokens: false }))
    expect(server.requests.at(-1)!.body).not.toHaveProperty('logprobs')
    expect(server.requests.at(-1)!.body).not.toHaveProperty('return_token_ids')
  })

  test('choices are sorted by index', async () => {
    const p = await policy([(_, r) => send(r, 200, { choices: choices('0', '1', '2').reverse() })])
    expect((await p.generate(ask({ n: 3 }))).map(({ text }) => text)).toEqual(['0', '1', '2'])
  })

  const cut: Reply = (_, response) => {
    response.writeHead(200, { 'content-type': 'application/json', 'content-length': 500 })
    response.write('{"choices": [{"mess')
    setTimeout(() => response.destroy(), 5)
  }
  const notJson: Reply = (_, response) =>
    response.writeHead(200, { 'content-type': 'application/json' }).end('{"choices": [{"mess')
  const page: Reply = (_, response) =>
    response.writeHead(200, { 'content-type': 'text/html' }).end('<html>busy</html>')
  const dropped: Reply = (_, response) => response.destroy()
  const empty: Reply = (_, response) => send(response, 200, { choices: [{ index: 0 }] })
  test.each<[string, Reply, RegExp]>([
    ['a body that ends early', cut, /connection failed/],
    ['a body that is cut off and says it is whole', notJson, /connection failed/],
    ['a page of text', page, /no choices.*text instead of JSON/],
    ['a connection that breaks', dropped, /connection failed/],
    ['a choice without a message', empty, /no message/],
    ['500', fails(500, 'overloaded'), /answered 500 overloaded/],
    ['503', fails(503, 'loading'), /answered 503 loading/],
    ['429', fails(429, 'slow down', { 'retry-after': '0' }), /answered 429 slow down/],
    ['408', fails(408, 'late'), /408/],
  ])('%s: retried, then reported', async (_, reply, message) => {
    vi.spyOn(Math, 'random').mockReturnValue(-0.7 / 0.5) // 25 ms instead of half a second
    const once = await policy([reply, says('fine')], { maxRetries: 1 })
    expect(await once.generate(ask())).toEqual([said('fine')])
    await server.close()
    const never = await policy([reply], { maxRetries: 1 })
    await expect(never.generate(ask())).rejects.toThrow(failure(message))
    await expect(never.generate(ask())).rejects.toThrow(failure(/after 2 attempts/))
    expect(server.requests.length).toBe(4)
    vi.restoreAllMocks()
  })

  test.each([400, 401, 403, 404, 422])('%d fails at once, with its cause', async (status) => {
    const p = await policy([fails(status, 'not so')])
    const error = await p.generate(ask()).catch((e) => e)
    expect(error).toEqual(failure(new RegExp(`model m: the server answered ${status} not so`)))
    expect(error.cause).toMatchObject({ status })
    expect(server.requests.length).toBe(1)
  })

  test.each<[object, RegExp]>([
    [{ error: { message: 'no such model' } }, /no such model/],
    [{ object: 'error', message: 'At most 1 image(s)', code: 400 }, /At most 1 image\(s\)/],
    [{ detail: 'Not authenticated' }, /Not authenticated/],
    [{ detail: [{ loc: ['body', 'n'], msg: 'too many' }] }, /\["body","n"\],"msg":"too many"/],
    [{ error: 'model "m" not found' }, /model "m" not found/],
    [{ error: { code: 7, metadata: { raw: 'busy' } } }, /"metadata":\{"raw":"busy"\}/],
    // Of no known form.
    [{ errors: [{ msg: 'listed' }] }, /\{"errors":\[\{"msg":"listed"\}\]\}/],
    [['a list'], /\["a list"\]/],
  ])('what the server says of an error is shown: %j', async (body, message) => {
    const refused = await policy([(_, r) => send(r, 400, body)])
    await expect(refused.generate(ask())).rejects.toThrow(failure(message))
    await expect(refused.generate(ask())).rejects.toThrow(failure(/the server answered 400 /))
    await server.close()
    const fine = await policy([(_, r) => send(r, 200, body)], { maxRetries: 0 })
    await expect(fine.generate(ask())).rejects.toThrow(failure(/no choices[:,] /))
    await expect(fine.generate(ask())).rejects.toThrow(failure(message))
  })

  test('an error of the request is not tried again, whatever the status of the response', async () => {
    const body = { object: 'error', message: 'too long', code: 400 }
    const p = await policy([(_, r) => send(r, 200, body)])
    await expect(p.generate(ask())).rejects.toThrow(failure(/too long/))
    expect(server.requests.length).toBe(1)
  })

  test('Retry-After in seconds and as a date is respected; one that is too long fails', async () => {
    const soon = new Date(Date.now() + 1500).toUTCString()
    const p = await policy([
      fails(429, 'x', { 'retry-after': '0.3' }),
      fails(503, 'x', { 'retry-after': soon }),
      says('fine'),
    ])
    const started = performance.now()
    expect(await p.generate(ask())).toEqual([said('fine')])
    expect(performance.now() - started).toBeGreaterThan(290)
    expect(Date.now()).toBeGreaterThanOrEqual(Date.parse(soon))
    await server.close()
    const late = await policy([fails(429, 'tomorrow', { 'retry-after': '86400' })])
    await expect(late.generate(ask())).rejects.toThrow(failure(/tomorrow$/))
  })

  test('a refused connection', async () => {
    const url = await serve(says('x'))
    await server.close()
    const p = new OpenAIPolicy({ baseURL: url, model: 'm', maxRetries: 0 })
    await expect(p.generate(ask())).rejects.toThrow(failure(/ECONNREFUSED/))
  })

  test('slow responses time out, before the headers and in the body', async () => {
    const begins: Reply = (_, response) =>
      response.writeHead(200, { 'content-type': 'application/json' }).write('{')
    for (const reply of [() => {}, begins]) {
      const p = await policy([reply], { timeoutMs: 80, maxRetries: 0 })
      const started = performance.now()
      await expect(p.generate(ask())).rejects.toThrow(failure(/no answer within 80 ms/))
      expect(performance.now() - started).toBeLessThan(2000)
      await server.close()
    }
  })

  test('time limits of Node’s own fetch do not apply', async () => {
    const global = getGlobalDispatcher()
    const hasty = new Agent({ headersTimeout: 1, bodyTimeout: 1 })
    setGlobalDispatcher(hasty)
    try {
      const late: Reply = async (request, response) => {
        await new Promise((resolve) => setTimeout(resolve, 2500))
        says('late')(request, response)
      }
      const p = await policy([late], { maxRetries: 0 })
      const body = JSON.stringify({ messages: [{ role: 'user', content: [{ type: 'text' }] }] })
      const plain = fetch(`${server.baseURL}/chat/completions`, { method: 'POST', body })
      await expect(plain).rejects.toThrow(/fetch failed/)
      expect(await p.generate(ask())).toEqual([said('late')])
    } finally {
      setGlobalDispatcher(global)
      await hasty.close()
    }
  })

  test('an abort rejects with its reason: before, during, while waiting and between attempts', async () => {
    const reason = new Error('enough')
    const p = await policy([fails(500, 'x'), () => {}], { concurrency: 1 })
    const early = AbortSignal.abort(reason)
    await expect(p.generate(ask({ signal: early }))).rejects.toBe(reason)
    expect(server.requests.length).toBe(0)
    const stop = new AbortController()
    const all = Array.from({ length: 30 }, () => p.generate(ask({ signal: stop.signal })))
    const ended = Promise.allSettled(all)
    await vi.waitFor(() => expect(server.requests.length).toBe(1))
    stop.abort(reason)
    for (const one of await ended) expect(one).toEqual({ status: 'rejected', reason })
    const after = new AbortController()
    const waiting = p.generate(ask({ signal: after.signal }))
    await vi.waitFor(() => expect(server.requests.length).toBe(2))
    after.abort(reason)
    await expect(waiting).rejects.toBe(reason)
  })

  test('requests are limited to concurrency, and all are answered', async () => {
    const slow: Reply = async (request, response) => {
      await new Promise((resolve) => setTimeout(resolve, 10))
      says(request.prompt)(request, response)
    }
    const p = await policy([slow], { concurrency: 3 })
    const prompts = Array.from({ length: 20 }, (_, i) => `${i}`)
    const all = await Promise.all(prompts.map((prompt) => p.generate(ask({ prompt }))))
    expect(all.map(([c]) => c!.text)).toEqual(prompts)
    expect(server.most).toBe(3)
  })

  test('several servers are used in turn, and a retry uses the next', async () => {
    const good = await chatServer(says('good'))
    const bad = await serve(fails(500, 'down', { 'retry-after': '0' }))
    const p = new OpenAIPolicy({ baseURL: [bad, good.baseURL], model: 'm' })
    for (let i = 0; i < 4; i++) expect(await p.generate(ask())).toEqual([said('good')])
    expect(server.requests.length).toBe(4)
    expect(good.requests.length).toBe(4)
    await good.close()
  })

  test('refusals of the model', async () => {
    const p = await policy([
      (_, r) => send(r, 200, { choices: choices({ refusal: 'I would rather not' }, 'yes') }),
    ])
    expect(await p.generate(ask({ n: 2 }))).toEqual([
      { ...said(''), refusal: 'I would rather not' },
      said('yes'),
    ])
    expect(server.requests.length).toBe(1)
  })

  const stream =
    (...events: unknown[]): Reply =>
    (_, response) => {
      response.writeHead(200, { 'content-type': 'text/event-stream' })
      for (const event of events)
        response.write(`data: ${typeof event === 'string' ? event : JSON.stringify(event)}\n\n`)
      response.end()
    }
  const delta = (index: number, delta: object, extra = {}) => ({
    choices: [{ index, delta, ...extra }],
  })
  const stop = { finish_reason: 'stop' }

  test('streams are assembled: texts, tokens and refusals of every choice', async () => {
    const logprobs = (id: number) => ({
      logprobs: { content: [{ token: `token_id:${id}`, logprob: -id }] },
    })
    const p = await policy(
      [
        stream(
          delta(0, { role: 'assistant', content: '' }),
          delta(1, { refusal: 'I ' }),
          delta(0, { content: 'th' }, logprobs(3)),
          delta(1, { refusal: 'decline' }, stop),
          delta(0, { content: 'ree' }, { ...logprobs(4), ...stop }),
          { choices: [], usage: {} },
          '[DONE]',
        ),
      ],
      { stream: true },
    )
    expect(await p.generate(ask({ n: 2 }))).toEqual([
      { ...said('three'), tokens: [3, 4], logProbs: [-3, -4] },
      { ...said(''), refusal: 'I decline' },
    ])
    expect(server.requests[0]!.body.stream).toBe(true)
  })

  test('streams of thoughts, of parts and of calls', async () => {
    const p = await policy(
      [
        stream(
          delta(0, { role: 'assistant', content: null }),
          delta(0, { reasoning: 'h' }),
          delta(0, { reasoning_content: 'm' }),
          delta(0, { content: [{ type: 'text', text: 'B' }] }),
          delta(0, {}, { finish_reason: 'length' }),
          delta(1, { tool_calls: [{ index: 0, function: { name: 'zoom', arguments: '' } }] }),
          delta(1, { tool_calls: [{ index: 0, function: { arguments: '{}' } }] }),
          delta(1, {}, { finish_reason: 'tool_calls' }),
          '[DONE]',
        ),
      ],
      { stream: true },
    )
    expect(await p.generate(ask({ n: 2 }))).toEqual([
      { text: 'B', finishReason: 'length', reasoning: 'hm' },
      {
        text: '',
        finishReason: 'tool_calls',
        failure: expect.stringMatching(/calls of the tools 'zoom', /),
      },
    ])
  })

  test.each<[string, Reply, RegExp]>([
    ['ends early', stream(delta(0, { content: 'th' })), /ended before the answer did/],
    [
      'breaks off with an error',
      stream(delta(0, { content: 'th' }), { error: { message: 'out of memory' } }),
      /out of memory/,
    ],
    [
      'breaks off with a flat error',
      stream(delta(0, { content: 'th' }), { object: 'error', message: 'out of memory', code: 500 }),
      /out of memory/,
    ],
    ['holds no JSON', stream('{"choices": [', '[DONE]'), /connection failed/],
    ['is refused by the server', fails(400, 'stream is not supported'), /stream is not supported/],
  ])('a stream that %s', async (_, reply, message) => {
    const p = await policy([reply], { stream: true, maxRetries: 0 })
    await expect(p.generate(ask())).rejects.toThrow(failure(message))
  })

  test('an unrequested stream is an invalid response', async () => {
    const p = await policy([stream(delta(0, { content: 'x' }, stop), '[DONE]')], { maxRetries: 0 })
    await expect(p.generate(ask())).rejects.toThrow(failure(/no choices/))
  })

  test('choices that are missing are asked for, with those that came kept', async () => {
    vi.spyOn(Math, 'random').mockReturnValue(-0.7 / 0.5) // 25 ms instead of half a second
    const some =
      (...texts: string[]): Reply =>
      (_, r) =>
        send(r, 200, { choices: choices(...texts) })
    const headless: Reply = (_, r) => send(r, 200, { choices: [...choices('c'), { index: 1 }] })
    const p = await policy([some('a', 'b'), some(), fails(500, 'busy'), headless, some('d')], {
      maxRetries: 2,
    })
    expect((await p.generate(ask({ n: 4 }))).map(({ text }) => text)).toEqual(['a', 'b', 'c', 'd'])
    expect(server.requests.map(({ body }) => body.n)).toEqual([4, 2, 2, 2, undefined])
    await server.close()
    // A server that knows no n.
    const one = await policy([(_, r) => send(r, 200, { choices: choices('a') })], { maxRetries: 0 })
    expect(await one.generate(ask({ n: 3 }))).toEqual(Array(3).fill(said('a')))
    expect(server.requests.length).toBe(3)
    await server.close()
    const never = await policy([some('a', 'b'), fails(500, 'down')], { maxRetries: 1 })
    const [a, b, c] = await never.generate(ask({ n: 3 }))
    expect([a, b]).toEqual([said('a'), said('b')])
    expect(c).toEqual({ text: '', failure: expect.stringMatching(/500 down \(after 2 attempts\)/) })
    await server.close()
    const none = await policy([some()], { maxRetries: 1 })
    await expect(none.generate(ask())).rejects.toThrow(failure(/empty list of choices.*2 attempts/))
    await server.close()
    const many = await policy([some('a', 'b', 'c')])
    await expect(many.generate(ask({ n: 2 }))).rejects.toThrow(
      failure(/must give 2 choices, got 3/),
    )
    expect(server.requests.length).toBe(1)
    vi.restoreAllMocks()
  })

  /** One choice with such a message, and the fields beside it. */
  const message = (message: object, extra: object = { finish_reason: 'stop' }) => ({
    index: 0,
    message,
    ...extra,
  })
  test.each<[string, object, object]>([
    [
      'a list of parts',
      message({
        content: [
          { type: 'text', text: 'B' },
          { type: 'output_text', text: 'C' },
        ],
      }),
      said('BC'),
    ],
    [
      'a list of parts with a thought',
      message({ content: [{ type: 'thinking', thinking: [{ type: 'text', text: 'hm' }] }, 'B'] }),
      { ...said('B'), reasoning: 'hm' },
    ],
    [
      'a part that declines',
      message({ content: [{ type: 'refusal', refusal: 'no' }] }),
      { ...said(''), refusal: 'no' },
    ],
    ['reasoning', message({ content: 'B', reasoning: 'hm' }), { ...said('B'), reasoning: 'hm' }],
    [
      'reasoning_content',
      message({ content: 'B', reasoning_content: 'hm' }),
      { ...said('B'), reasoning: 'hm' },
    ],
    [
      'a text that is cut off',
      message({ content: 'The' }, { finish_reason: 'length' }),
      { text: 'The', finishReason: 'length' },
    ],
    ['a text beside a call', message({ content: 'B', tool_calls: [{}] }), said('B')],
    ['nothing, by a model that ended at once', message({ content: '' }), said('')],
  ])('content: %s', async (_, choice, expected) => {
    const p = await policy([(_, r) => send(r, 200, { choices: [choice] })])
    expect(await p.generate(ask())).toEqual([expected])
  })

  test.each<[string, object, RegExp]>([
    [
      'a thought that is cut off',
      message({ content: null, reasoning: 'hm' }, { finish_reason: 'length' }),
      /no text: got reasoning of 2 characters, finish_reason 'length': maxTokens cut it off/,
    ],
    ['a thought alone', message({ content: '', reasoning_content: 'hm' }), /reasoning of 2 char/],
    [
      'a tool call',
      message(
        { content: null, tool_calls: [{ function: { name: 'zoom', arguments: '{}' } }] },
        { finish_reason: 'tool_calls' },
      ),
      /calls of the tools 'zoom', finish_reason 'tool_calls'/,
    ],
    [
      'filtered content',
      message({ content: 'The' }, { finish_reason: 'content_filter' }),
      /content that the server filtered/,
    ],
    [
      'a call of the older form',
      message({ content: null, function_call: { name: 'zoom' } }),
      /calls of the tools 'zoom'/,
    ],
    ['no content', message({ content: null }), /got content null/],
    ['no parts', message({ content: [] }), /got no parts, finish_reason 'stop'/],
    ['content of another type', message({ content: { text: 'B' } }), /got content an object/],
    ['parts without a text', message({ content: [{ type: 'image' }] }), /parts of type 'image'/],
    ['a limit of no tokens', message({ content: '' }, { finish_reason: 'length' }), /cut it off/],
  ])('no answer: %s', async (_, choice, why) => {
    const p = await policy([
      ({ body }, r) =>
        send(r, 200, { choices: [choice, ...choices('B').slice(0, (body.n ?? 1) - 1)] }),
    ])
    await expect(p.generate(ask())).rejects.toThrow(failure(why))
    expect(server.requests.length).toBe(1)
    // Beside an answer it is a completion of its own.
    const [none, some] = await p.generate(ask({ n: 2 }))
    expect(none).toMatchObject({ text: '', failure: expect.stringMatching(why) })
    expect(some).toEqual(said('B'))
  })

  test('no image leaks', async () => {
    const p = await policy([fails(400, 'x')])
    const before = device.memory().liveBytes
    using image = picture()
    await p.generate(ask({ images: [image] })).catch(() => {})
    expect(device.memory().liveBytes).toBeLessThanOrEqual(before + image.byteLength)
  })

  test('refuses wrong options and requests', async () => {
    const good = { baseURL: 'http://localhost:1/v1', model: 'm' }
    for (const [wrong, message] of [
      [{ baseURL: 'localhost' }, /baseURL/],
      [{ baseURL: [] }, /at least one/],
      [{ model: '' }, /model/],
      [{ timeoutMs: 0 }, /timeoutMs/],
      [{ maxRetries: -1 }, /maxRetries/],
      [{ concurrency: 1.5 }, /concurrency/],
      [{ imageFormat: 'gif' }, /imageFormat/],
      [{ imageQuality: 101 }, /imageQuality/],
    ] as const)
      expectRefusal(
        () => new OpenAIPolicy({ ...good, ...wrong } as never),
        'ERR_VALUE',
        'OpenAIPolicy',
        message,
      )
    const p = new OpenAIPolicy(good)
    for (const wrong of [{ n: 0 }, { prompt: 3 }, { images: ['a.png'] }])
      await expect(p.generate(ask(wrong as never))).rejects.toMatchObject({ code: 'ERR_VALUE' })
  })
})

describe('functionPolicy', () => {
  test('a text, a completion, or a list of them', async () => {
    const given = async (made: unknown, n: number) =>
      functionPolicy(() => made as string).generate(ask({ n }))
    expect(await given('a', 2)).toEqual([{ text: 'a' }, { text: 'a' }])
    expect(await given({ text: 'a', tokens: [1] }, 1)).toEqual([{ text: 'a', tokens: [1] }])
    expect(await given(['a', { text: 'b' }], 2)).toEqual([{ text: 'a' }, { text: 'b' }])
    await expect(given(['a'], 2)).rejects.toMatchObject({ code: 'ERR_POLICY' })
    await expect(given(3, 1)).rejects.toMatchObject({ code: 'ERR_POLICY' })
    expectRefusal(() => functionPolicy('x' as never), 'ERR_VALUE', 'functionPolicy')
  })

  test('an aborted signal', async () => {
    const reason = new Error('enough')
    const f = functionPolicy(() => 'a')
    await expect(f.generate(ask({ signal: AbortSignal.abort(reason) }))).rejects.toBe(reason)
  })
})

describe('recordings', () => {
  let folder: string
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'p2r-policy-'))
  })
  afterAll(() => rm(folder, { recursive: true }))

  test('recordings are replayed by role, prompt and images', async () => {
    const path = join(folder, 'a.jsonl')
    let count = 0
    const live = functionPolicy(({ n = 1, role }) =>
      Array.from({ length: n }, () => ({
        text: `${role} ${count++}`,
        tokens: [1],
        logProbs: [-1],
      })),
    )
    const recorded = recordPolicy(live, path)
    const [one, two] = [picture(), picture()]
    const requests = [
      ask({ images: [one], n: 2 }),
      ask({ images: [two] }),
      ask({ images: [one] }),
      ask({ role: 'perceiver' }),
    ]
    const said = await Promise.all(requests.map((r) => recorded.generate(r)))
    expect((await readFile(path, 'utf8')).trim().split('\n').length).toBe(4)
    const replay = await RecordedPolicy.load(path)
    const again = []
    for (const r of requests) again.push(await replay.generate(r))
    expect(again.flat().sort()).toEqual(said.flat().sort())
    expect(again[1]).toEqual(said[1])
    expect(again[3]).toEqual(said[3])
    // From the first again.
    expect((await replay.generate(ask({ images: [one], n: 3 }))).length).toBe(3)
    expect(await replay.generate(ask({ role: 'perceiver' }))).toEqual(said[3])
    await expect(replay.generate(ask({ prompt: 'else' }))).rejects.toMatchObject({
      code: 'ERR_POLICY',
    })
    await expect(replay.generate(ask({ images: [picture()] }))).rejects.toMatchObject({
      code: 'ERR_POLICY',
    })
  })

  test('a line without images matches any', async () => {
    const path = join(folder, 'hand.jsonl')
    const line = { role: 'reasoner', prompt: 'How many?', completions: [{ text: 'two' }] }
    await writeFile(path, `\n${JSON.stringify(line)}\n`)
    const policy = await RecordedPolicy.load(path)
    expect(await policy.generate(ask({ images: [picture()] }))).toEqual([{ text: 'two' }])
  })

  test('other files are refused', async () => {
    const path = join(folder, 'bad.jsonl')
    for (const [text, message] of [
      ['{', /bad.jsonl:1 is not JSON/],
      ['\n{"role": "reasoner"}', /bad.jsonl:2: a line must have/],
      ['{"role": "cook", "prompt": "", "completions": []}', /:1: a (line|completion) must have/],
      [
        '{"role": "reasoner", "prompt": "", "completions": [{}]}',
        /:1: a (line|completion) must have/,
      ],
      ['null', /:1: a (line|completion) must have/],
    ] as const) {
      await writeFile(path, text)
      await expect(RecordedPolicy.load(path)).rejects.toMatchObject({
        code: 'ERR_FORMAT',
        message: expect.stringMatching(message),
      })
    }
    await expect(RecordedPolicy.load(join(folder, 'none'))).rejects.toMatchObject({
      code: 'ERR_IO',
    })
    await expect(
      recordPolicy(
        functionPolicy(() => 'a'),
        join(folder, 'no/where'),
      ).generate(ask()),
    ).rejects.toMatchObject({ code: 'ERR_IO' })
  })
})
