// docs/serving.md's table of what each server gives, on answers of the forms that they have.
import { OpenAIPolicy, type OpenAIPolicyOptions } from 'p2r-kernels'
import { afterEach, describe, expect, test } from 'vitest'
import { type ChatServer, chatServer, send } from './chat_server.js'
import { expected, servers } from './served_models.js'

let server: ChatServer | undefined
afterEach(async () => {
  await server?.close()
  server = undefined
})

const request = { role: 'reasoner' as const, system: '', prompt: 'What is it?', images: [], n: 2 }
const policyOf = (options: Partial<OpenAIPolicyOptions> = {}) =>
  new OpenAIPolicy({ baseURL: server!.baseURL, model: 'm', maxRetries: 0, ...options })

describe.each([
  // Whether a response has all n choices; and the fields of its completions, whole and streamed.
  ['vllm', true, ['tokens', 'logProbs', 'promptTokens'], ['tokens', 'logProbs', 'promptTokens']],
  ['sglang', true, ['tokens', 'logProbs', 'promptTokens'], ['logProbs']],
  ['ollama', false, ['logProbs'], ['logProbs']],
  ['llamaCpp', false, ['tokens', 'logProbs'], ['logProbs']],
] as const)('%s', (name, hasAll, fields, streamed) => {
  const { whole, stream, refusal } = servers[name]
  const values = {
    tokens: expected.ids,
    logProbs: expected.logProbs,
    promptTokens: expected.prompt,
  }
  const completion = (given: readonly (keyof typeof values)[]) => ({
    text: 'A sign.',
    reasoning: 'I look.',
    finishReason: 'stop',
    ...Object.fromEntries(given.map((field) => [field, values[field]])),
  })

  test('an answer', async () => {
    server = await chatServer((_, response) => send(response, 200, whole))
    const got = await policyOf({ thinking: false }).generate(request)
    expect(got).toEqual([completion(fields), completion(fields)])
    expect(server.requests.length).toBe(hasAll ? 1 : 2)
    const { body } = server.requests[0]!
    expect(body).toMatchObject({ n: 2, chat_template_kwargs: { enable_thinking: false } })
    expect(body).toMatchObject({ logprobs: true, return_token_ids: true, return_meta_info: true })
  })

  test('a stream', async () => {
    server = await chatServer((_, response) => {
      response.writeHead(200, { 'content-type': 'text/event-stream' })
      for (const event of stream) response.write(`data: ${JSON.stringify(event)}\n\n`)
      response.end('data: [DONE]\n\n')
    })
    const got = await policyOf({ stream: true }).generate(request)
    expect(got).toEqual([completion(streamed), completion(streamed)])
    // SGLang refuses a stream with these.
    expect(server.requests[0]!.body).not.toHaveProperty('return_meta_info')
  })

  test('a refusal', async () => {
    const [status, body, said] = refusal
    server = await chatServer((_, response) => send(response, status, body))
    await expect(policyOf().generate(request)).rejects.toMatchObject({
      code: 'ERR_POLICY',
      message: expect.stringContaining(`${status} ${said}`),
    })
  })
})

test('ids of llama.cpp are taken where they are those of all tokens', async () => {
  const { whole } = servers.llamaCpp as { whole: Record<string, unknown> }
  for (const [sampled, complete] of [
    [3, true],
    // The end of the text.
    [4, true],
    // Two tokens of one character, of which the list has none.
    [5, false],
    [undefined, false],
  ] as const) {
    const usage = sampled === undefined ? null : { completion_tokens: sampled }
    server = await chatServer((_, response) => send(response, 200, { ...whole, usage }))
    const [completion] = await policyOf().generate({ ...request, n: 1 })
    expect(completion!.tokens).toEqual(complete ? expected.ids : undefined)
    await server.close()
  }
})

test('thinking is switched beside the template’s other arguments, or left alone', async () => {
  server = await chatServer((_, response) => send(response, 200, servers.vllm.whole))
  const extraBody = { top_k: 20, chat_template_kwargs: { add_vision_id: true } }
  for (const options of [{ thinking: true, extraBody }, { extraBody }, { thinking: false }, {}])
    await policyOf(options).generate(request)
  expect(server.requests.map(({ body }) => [body.top_k, body.chat_template_kwargs])).toEqual([
    [20, { add_vision_id: true, enable_thinking: true }],
    [20, { add_vision_id: true }],
    [undefined, { enable_thinking: false }],
    [undefined, undefined],
  ])
  for (const wrong of [
    { thinking: 'off' },
    { thinking: true, extraBody: { chat_template_kwargs: 3 } },
  ])
    expect(() => policyOf(wrong as never)).toThrow(expect.objectContaining({ code: 'ERR_VALUE' }))
})
