import { mkdtempSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import fc from 'fast-check'
import {
  answer,
  type Completion,
  cropResample,
  evaluate,
  functionPolicy,
  type GrpoStep,
  loadRollouts,
  OpenAIPolicy,
  type OpenAIPolicyOptions,
  openDevice,
  Perceiver,
  type PolicyFunction,
  type PolicyRequest,
  PraGrpo,
  type PraGrpoOptions,
  policyLoss,
  Reasoner,
  RecordedPolicy,
  recordPolicy,
  saveRollouts,
  smartResize,
  type Tensor,
  ZoomAgent,
  type ZoomAgentOptions,
  zoomPrompt,
  zoomTool,
} from 'p2r-kernels'
import sharp from 'sharp'
import { afterAll, afterEach, describe, expect, test } from 'vitest'
import {
  type ChatServer,
  call,
  callsTools,
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
const servers: ChatServer[] = []
afterEach(async () => {
  for (const server of servers.splice(0)) await server.close()
})
const serve = async (...script: Reply[]): Promise<ChatServer> => {
  const server = await chatServer(...script)
  servers.push(server)
  return server
}

const [height, width] = [480, 640]
const random = new Random(3)
const image = device.tensor(
  Uint8Array.from({ length: height * width * 3 }, () => random.int(0, 255)),
  [height, width, 3],
)
const question = 'What does the sign say?'
const asked = { image, question, answerForm: 'free_form' as const }
const small = { minPixels: 4096, maxPixels: 65_536 }
const name = 'image_zoom_in_tool'
const zoomTo = (bbox_2d: unknown, more: object = {}) => call(name, { bbox_2d, ...more })
const agentOf = (
  { baseURL }: ChatServer,
  options: ZoomAgentOptions = {},
  policy: Partial<OpenAIPolicyOptions> = {},
) =>
  new ZoomAgent(
    new OpenAIPolicy({
      baseURL,
      model: 'm',
      imageFormat: 'png',
      maxRetries: 0,
      tokens: false,
      ...policy,
    }),
    { ...small, ...options },
  )
const pixelsOf = async (png: Buffer) => {
  const { data, info } = await sharp(png).raw().toBuffer({ resolveWithObject: true })
  return { data: new Uint8Array(data), height: info.height, width: info.width }
}
/** The box resampled as the tool should. */
const expectedCrop = async (
  box: readonly [number, number, number, number],
  limits: { minPixels: number; maxPixels: number } = small,
) => {
  const size = smartResize(box[3] - box[1], box[2] - box[0], limits)
  using crop = cropResample({ image, regions: [{ box, ...size }] })[0]!
  return { data: await crop.read(), ...size }
}
const answerIs = (text: string) => says(`<think>Seen.</think><answer>${text}</answer>`)
/** Zooms, and frees the evidence. */
const zoomed = async (agent: ZoomAgent, more: { n?: number } = {}) => {
  const all = await agent.zoom({ ...asked, ...more })
  for (const { evidence } of all) evidence.dispose()
  return all
}
const toolTexts = (request: { body: { messages: { role: string; content: unknown }[] } }) =>
  request.body.messages
    .filter(({ role }) => role === 'tool')
    .map(({ content }) =>
      typeof content === 'string' ? content : (content as { text?: string }[]).at(-1)!.text!,
    )

describe('a conversation', () => {
  test('the model gets crops of the full image until it answers', async () => {
    const server = await serve(
      callsTools(zoomTo([250, 250, 500, 500], { label: 'sign' })),
      // Of the crop, the lower right half.
      callsTools(zoomTo([500, 500, 1000, 1000], { img_idx: 1 })),
      answerIs('STOP'),
    )
    const [made] = await zoomed(agentOf(server))
    expect(made).toMatchObject({ answer: 'STOP', requests: 3, ended: 'answer', failedCalls: 0 })
    const boxes = [
      [0, 0, width, height],
      [160, 120, 320, 240],
      [240, 180, 320, 240],
    ] as const
    expect(made!.shown.map(({ box }) => box)).toEqual(boxes)
    const shown = server.requests[2]!.shown
    expect(shown).toHaveLength(3)
    let pixels = 0
    for (const [i, png] of shown.entries()) {
      const expected = await expectedCrop(boxes[i]!)
      expect(await pixelsOf(png)).toEqual(expected)
      pixels += expected.height * expected.width
    }
    expect(made!.pixels).toBe(pixels)
    expect(made!.turns.map(({ results }) => results.map(({ text }) => text))).toEqual([
      ['Image 1, a region of image 0.'],
      ['Image 2, a region of image 1.'],
    ])
  })

  test('requests as the API has them', async () => {
    const server = await serve(callsTools(zoomTo([0, 0, 500, 500])), answerIs('x'))
    await zoomed(agentOf(server, { maxTokens: 77, temperature: 0.5 }))
    const [first, second] = server.requests.map(({ body }) => body)
    expect(first).toMatchObject({
      model: 'm',
      max_tokens: 77,
      temperature: 0.5,
      tool_choice: 'auto',
      tools: [{ type: 'function', function: zoomTool('thousandths') }],
    })
    expect(first.messages[1].content.at(-1).text).toBe(
      zoomPrompt({ question, answerForm: 'free_form' }).prompt,
    )
    expect(second.messages.slice(0, 2)).toEqual(first.messages)
    const [said, result] = second.messages.slice(2)
    expect(said).toEqual({
      role: 'assistant',
      content: '',
      tool_calls: [zoomTo([0, 0, 500, 500])],
    })
    expect(result).toMatchObject({ role: 'tool', tool_call_id: 'call-1' })
    expect(result.content.map(({ type }: { type: string }) => type)).toEqual(['image_url', 'text'])
  })

  test('the tool in other words', async () => {
    const tool = { ...zoomTool('thousandths'), name: 'zoom', description: 'Looks closer.' }
    const server = await serve(
      callsTools(call('zoom', { bbox_2d: [0, 0, 500, 500] }), zoomTo([0, 0, 500, 500])),
      answerIs('x'),
    )
    const [made] = await zoomed(agentOf(server, { tool }))
    expect(server.requests[0]!.body.tools).toEqual([{ type: 'function', function: tool }])
    expect(made).toMatchObject({ answer: 'x', failedCalls: 1 })
    expect(made!.shown).toHaveLength(2)
  })

  test('the thought of a turn goes back to the server', async () => {
    const server = await serve(
      (_, response) =>
        send(response, 200, {
          choices: [
            {
              index: 0,
              finish_reason: 'tool_calls',
              message: {
                content: 'Look.',
                reasoning_content: 'It is small.',
                tool_calls: [zoomTo([0, 0, 500, 500])],
              },
            },
          ],
        }),
      answerIs('x'),
    )
    await zoomed(agentOf(server))
    expect(server.requests[1]!.body.messages[2]).toMatchObject({
      content: 'Look.',
      reasoning_content: 'It is small.',
    })
  })

  test("images of tools in a message of the user's", async () => {
    const server = await serve(
      callsTools(zoomTo([0, 0, 500, 500]), call(name, { bbox_2d: [500, 500, 900, 900] }, 'call-2')),
      answerIs('x'),
    )
    await zoomed(agentOf(server, {}, { toolImages: 'user' }))
    const { messages } = server.requests[1]!.body
    expect(messages.slice(3).map(({ role }: { role: string }) => role)).toEqual([
      'tool',
      'tool',
      'user',
      'user',
    ])
    expect(messages[3]).toMatchObject({ tool_call_id: 'call-1', content: expect.any(String) })
    expect(messages[4]).toMatchObject({ tool_call_id: 'call-2', content: expect.any(String) })
    expect(messages[5].content[0].type).toBe('image_url')
  })

  test('streams', async () => {
    const piece = (delta: object, finish_reason: string | null = null) =>
      `data: ${JSON.stringify({ choices: [{ index: 0, delta, finish_reason }] })}\n\n`
    const [start, rest] = ['{"bbox_2d": [0, 0,', ' 500, 500]}']
    const server = await serve(
      (_, response) => {
        response.writeHead(200, { 'content-type': 'text/event-stream' })
        response.write(
          piece({ tool_calls: [{ index: 0, id: 'a', function: { name, arguments: '' } }] }),
        )
        response.write(piece({ tool_calls: [{ index: 0, function: { arguments: start } }] }))
        response.write(
          piece({
            tool_calls: [{ index: 1, id: 'b', function: { name: 'other', arguments: '{}' } }],
          }),
        )
        // An index out of order, as no server should send it.
        response.write(piece({ tool_calls: [{ index: 10 ** 9, function: { arguments: 'x' } }] }))
        response.write(
          piece({ tool_calls: [{ index: 0, function: { arguments: rest } }, null, 7] }),
        )
        response.end(`${piece({}, 'tool_calls')}data: [DONE]\n\n`)
      },
      (_, response) => {
        response.writeHead(200, { 'content-type': 'text/event-stream' })
        response.end(`${piece({ content: '<answer>x</answer>' }, 'stop')}data: [DONE]\n\n`)
      },
    )
    const [made] = await zoomed(agentOf(server, {}, { stream: true }))
    expect(made).toMatchObject({ answer: 'x', failedCalls: 1 })
    expect(made!.turns[0]!.completion.toolCalls).toEqual([
      { id: 'a', name, arguments: start + rest },
      { id: 'b', name: 'other', arguments: '{}' },
    ])
  })

  test('absolute coordinates are pixels of the image that is named, as it is shown', async () => {
    const size = smartResize(height, width, small)
    const server = await serve(
      callsTools(zoomTo([0, 0, size.width / 2, size.height / 2])),
      callsTools(zoomTo([0, 0, 16, 16], { img_idx: 1 })),
      answerIs('x'),
    )
    const [made] = await zoomed(agentOf(server, { coordinates: 'absolute' }))
    expect(made!.shown[1]!.box).toEqual([0, 0, width / 2, height / 2])
    const crop = made!.shown[1]!
    const [w, h] = [(16 * 320) / crop.width, (16 * 240) / crop.height].map(Math.ceil)
    expect(made!.shown[2]!.box).toEqual([0, 0, Math.max(32, w!), Math.max(32, h!)])
    expect(zoomTool('absolute').parameters).not.toEqual(zoomTool('thousandths').parameters)
  })

  test('evidence holds what was cropped', async () => {
    const server = await serve(callsTools(zoomTo([250, 250, 500, 500])), answerIs('x'))
    const [made] = await agentOf(server).zoom(asked)
    const { evidence } = made!
    expect(evidence.boxes).toEqual([{ bbox2d: [250, 250, 500, 500], label: 'crop' }])
    const expected = await expectedCrop([160, 120, 320, 240])
    expect(await evidence.crops[0]!.read()).toEqual(expected.data)
    expect(evidence.pixelValues({ dtype: 'u8' }).gridThw).toHaveLength(2)
    evidence.dispose()
  })
})

describe('budgets', () => {
  test('the last turn has no tool, and is told so', async () => {
    const server = await serve(callsTools(zoomTo([0, 0, 500, 500])))
    const [made] = await zoomed(agentOf(server, { maxTurns: 3 }))
    expect(server.requests.map(({ body }) => body.tool_choice)).toEqual(['auto', 'auto', 'none'])
    // The prompt stays the same, so that the server's cache of it does.
    for (const { body } of server.requests) expect(body.tools).toHaveLength(1)
    expect(toolTexts(server.requests[1]!)[0]).not.toMatch(/answer now/)
    expect(toolTexts(server.requests[2]!)[1]).toMatch(/answer now/)
    // It calls all the same: there is no answer.
    expect(made).toMatchObject({ requests: 3, ended: 'turns', answer: '' })
    expect(made!.shown).toHaveLength(3)
  })

  test('one turn is an answer without the tool', async () => {
    const server = await serve(answerIs('x'))
    const [made] = await zoomed(agentOf(server, { maxTurns: 1 }))
    expect(server.requests[0]!.body.tool_choice).toBe('none')
    expect(made).toMatchObject({ answer: 'x', requests: 1, turns: [] })
  })

  test('crops are made smaller where they do not fit, then refused', async () => {
    const server = await serve(
      callsTools(zoomTo([0, 0, 1000, 1000])),
      callsTools(zoomTo([0, 0, 1000, 1000])),
      callsTools(zoomTo([0, 0, 1000, 1000])),
      callsTools(zoomTo([0, 0, 1000, 1000])),
      answerIs('x'),
    )
    const whole = smartResize(height, width, small)
    const pixelBudget = Math.floor(2.5 * whole.height * whole.width)
    const [made] = await zoomed(agentOf(server, { maxTurns: 9, pixelBudget }))
    const sizes = made!.shown.map((each) => each.height * each.width)
    expect(sizes.slice(0, 2)).toEqual([sizes[0], sizes[0]])
    expect(sizes[2]).toBeLessThan(sizes[0]!)
    expect(made!.pixels).toBe(sizes.reduce((a, b) => a + b))
    expect(made!.pixels).toBeLessThanOrEqual(pixelBudget)
    expect(made!.failedCalls).toBeGreaterThan(0)
    const texts = toolTexts(server.requests.at(-1)!)
    expect(texts.at(-1)).toMatch(/the budget of pixels is spent.*answer now/)
    expect(server.requests.at(-1)!.body.tool_choice).toBe('none')
  })

  test('no sequence of boxes exceeds the budget or leaves the image', async () => {
    const number = fc.oneof(fc.integer({ min: -50, max: 1100 }), fc.double(), fc.constant(null))
    const given = fc.record({
      bbox_2d: fc.array(number, { minLength: 3, maxLength: 5 }),
      img_idx: fc.oneof(fc.integer({ min: -1, max: 5 }), fc.constant('1')),
    })
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.array(given, { minLength: 1, maxLength: 3 }), { maxLength: 5 }),
        fc.constantFrom('thousandths' as const, 'absolute' as const),
        async (script, coordinates) => {
          const policy = functionPolicy(({ turns = [] }): Completion => {
            const calls = script[turns.length]
            return calls
              ? {
                  text: '',
                  toolCalls: calls.map((each) => ({ name, arguments: JSON.stringify(each) })),
                }
              : { text: '<answer>x</answer>' }
          })
          const limits = { ...small, pixelBudget: 150_000, coordinates }
          const [made] = await zoomed(new ZoomAgent(policy, limits))
          expect(made!.answer).toBe('x')
          expect(made!.pixels).toBeLessThanOrEqual(150_000)
          const calls = script.flat().length
          expect(made!.shown.length - 1 + made!.failedCalls).toBe(calls)
          for (const { box } of made!.shown) {
            const [x0, y0, x1, y1] = box
            expect(x0 >= 0 && y0 >= 0 && x1 <= width && y1 <= height && x0 < x1 && y0 < y1).toBe(
              true,
            )
          }
        },
      ),
      { numRuns: 60 },
    )
  })

  test('small boxes get 32 pixels a side, and thin ones are refused', async () => {
    const server = await serve(
      callsTools(
        zoomTo([0, 0, 1, 1]),
        zoomTo([999, 999, 1000, 1000]),
        zoomTo([500, 500, 501, 501]),
      ),
      answerIs('x'),
    )
    const [made] = await zoomed(agentOf(server))
    expect(made!.shown.slice(1).map(({ box }) => box)).toEqual([
      [0, 0, 32, 32],
      [width - 32, height - 32, width, height],
      [305, 225, 337, 257],
    ])
    using flat = device.zeros([8, 4000, 3], 'u8')
    const thin = await serve(callsTools(zoomTo([0, 0, 1000, 1000])), answerIs('x'))
    await expect(agentOf(thin).zoom({ ...asked, image: flat })).rejects.toMatchObject({
      code: 'ERR_VALUE',
    })
  })
})

describe('calls that cannot be executed', () => {
  const bbox_2d = [0, 0, 500, 500]
  test.each([
    ['no JSON', call(name, '{"bbox_2d": [0, 0'), /must be a JSON object/],
    ['a list', call(name, [1, 2]), /must be a JSON object/],
    ['nothing', call(name, ''), /must be a JSON object/],
    ['very long', call(name, `{"bbox_2d": [${'0,'.repeat(5000)}0]}`), /must be a JSON object/],
    ['no box', call(name, { label: 'x' }), /four numbers/],
    ['three numbers', zoomTo([1, 2, 3]), /four numbers/],
    ['texts', zoomTo(['a', 'b', 'c', 'd']), /four numbers/],
    ['nulls', zoomTo([null, null, null, null]), /four numbers/],
    ['numbers beyond float64', call(name, '{"bbox_2d": [0, 0, 1e999, 5]}'), /four numbers/],
    ['an inverted box', zoomTo([500, 0, 0, 500]), /x1 < x2/],
    ['an empty box', zoomTo([5, 5, 5, 5]), /x1 < x2/],
    ['pixels for thousandths', zoomTo([1200, 100, 1900, 500]), /outside of image 0.*1000/],
    ['a negative box', zoomTo([-500, -500, -10, -10]), /outside of image 0/],
    ['an unknown image', zoomTo(bbox_2d, { img_idx: 1 }), /img_idx.*0 to 0/],
    ['a prototype', zoomTo(bbox_2d, { img_idx: 'length' }), /img_idx/],
    ['half an image', zoomTo(bbox_2d, { img_idx: 0.5 }), /img_idx/],
    ['another tool', call('image_rotate_tool', { angle: 90 }), /no tool of this name.*image_zoom/],
    ['no name', call('', {}), /name and arguments/],
    ['a call without a function', { id: 'call-1' }, /name and arguments/],
  ])('%s', async (_, made, message) => {
    const server = await serve(callsTools(made), answerIs('x'))
    const [done] = await zoomed(agentOf(server))
    expect(done).toMatchObject({ answer: 'x', failedCalls: 1, requests: 2 })
    expect(done!.shown).toHaveLength(1)
    const [text] = toolTexts(server.requests[1]!)
    expect(text).toMatch(message)
    // What a model writes is not repeated to it at length.
    expect(text!.length).toBeLessThan(300)
  })

  test('what is clear enough is executed', async () => {
    const server = await serve(
      callsTools(
        call(name, { bbox: [0, 0, 500, 500] }, 'a'),
        call(name, { bbox_2d: '[0, 0, 500, 500]' }, 'b'),
        // Beyond the image on one side: what is left of it.
        call(name, { bbox_2d: [-100, 0, 500, 500] }, 'c'),
        { id: 'd', function: { name, arguments: { bbox_2d: [0, 0, 500, 500] } } },
        { function: { name, arguments: '{"bbox_2d": [0, 0, 500, 500]}' } },
      ),
      answerIs('x'),
    )
    const [made] = await zoomed(agentOf(server, { pixelBudget: 10 ** 7 }))
    expect(made!.failedCalls).toBe(0)
    expect(new Set(made!.shown.slice(1).map(({ box }) => `${box}`))).toEqual(
      new Set(['0,0,320,240']),
    )
    const ids = server.requests[1]!.body.messages.slice(3).map(
      (m: { tool_call_id: string }) => m.tool_call_id,
    )
    expect(ids).toEqual(['a', 'b', 'c', 'd', 'call_4'])
  })

  test('many calls at once', async () => {
    const many = Array.from({ length: 20 }, (_, i) => call(name, { bbox_2d }, `call-${i}`))
    const server = await serve(callsTools(...many), answerIs('x'))
    const [made] = await zoomed(agentOf(server, { pixelBudget: 10 ** 7 }))
    expect(made!.shown).toHaveLength(1 + 8)
    expect(made!.failedCalls).toBe(12)
    // The API wants a result for each.
    expect(toolTexts(server.requests[1]!)).toHaveLength(20)
  })
})

describe('a server without tools', () => {
  const written = (given: unknown, around = ['', '']) =>
    `${around[0]}<tool_call>\n${JSON.stringify({ name, arguments: given })}\n</tool_call>${around[1]}`

  test('calls in text', async () => {
    const server = await serve(
      says(written({ bbox_2d: [0, 0, 500, 500] }, ['<think>Small.</think> ', '\n'])),
      answerIs('x'),
    )
    const [made] = await zoomed(agentOf(server, { toolCalls: 'text' }))
    expect(made).toMatchObject({ answer: 'x', failedCalls: 0, requests: 2 })
    const [first, second] = server.requests.map(({ body }) => body)
    for (const body of [first, second])
      for (const field of ['tools', 'tool_choice']) expect(body).not.toHaveProperty(field)
    expect(first.messages[0].content).toMatch(/<tools>\n\{.*image_zoom_in_tool.*\}\n<\/tools>/)
    const [said, result] = second.messages.slice(2)
    expect(said.content).toContain('<tool_call>')
    expect(result.role).toBe('user')
    expect(result.content.at(-1).text).toMatch(/^<tool_response>\nImage 1.*\n<\/tool_response>$/)
    expect(server.requests[1]!.shown).toHaveLength(2)
  })

  test('a server that leaves calls in the text', async () => {
    const server = await serve(says(written({ bbox_2d: [0, 0, 500, 500] })), answerIs('x'))
    const [made] = await zoomed(agentOf(server))
    expect(made).toMatchObject({ answer: 'x', failedCalls: 0 })
    expect(server.requests[1]!.body.messages[3].role).toBe('user')
  })

  test.each([
    ['no JSON', '<tool_call>{"name": </tool_call>', /must be JSON with a name/],
    ['no name', '<tool_call>{"arguments": {}}</tool_call>', /must be JSON with a name/],
    ['a text', '<tool_call>"zoom"</tool_call>', /must be JSON with a name/],
    ['no arguments', `<tool_call>{"name": "${name}"}</tool_call>`, /four numbers/],
  ])('a call in text: %s', async (_, text, message) => {
    const server = await serve(says(text), answerIs('x'))
    const [made] = await zoomed(agentOf(server, { toolCalls: 'text' }))
    expect(made).toMatchObject({ answer: 'x', failedCalls: 1 })
    expect(server.requests[1]!.body.messages[3].content.at(-1).text).toMatch(message)
  })

  test('Qwen3.5’s tags', async () => {
    const server = await serve(
      says(
        `<think>\nSmall.\n</think>\n<tool_call>\n<function=${name}>\n<parameter=bbox_2d>\n[0, 0, 500, 500]\n</parameter>\n` +
          '<parameter=label>\na sign\n</parameter>\n<parameter=img_idx>\n0\n</parameter>\n</function>\n</tool_call>',
      ),
      says('<tool_call><function=other></function></tool_call>'),
      answerIs('x'),
    )
    const [made] = await zoomed(agentOf(server, { toolCalls: 'text' }))
    expect(made).toMatchObject({ answer: 'x', failedCalls: 1 })
    expect(made!.shown[1]!.box).toEqual([0, 0, 320, 240])
    expect(made!.turns[1]!.results[0]!.text).toMatch(/no tool of this name/)
  })

  test('a text of nothing but calls', async () => {
    const one = written({ bbox_2d: [0, 0, 500, 500] })
    const server = await serve(says(one.repeat(2000)), answerIs('x'))
    const [made] = await zoomed(agentOf(server, { toolCalls: 'text', pixelBudget: 10 ** 7 }))
    expect(made).toMatchObject({ answer: 'x', failedCalls: 1 })
    expect(made!.shown).toHaveLength(1 + 8)
    expect(server.requests[1]!.body.messages).toHaveLength(3 + 9)
  })

  test('a call in a thought, and one that was cut off, are none', async () => {
    for (const text of [
      `<think>${written({ bbox_2d: [0, 0, 500, 500] })}</think><answer>x</answer>`,
      '<answer>x</answer><tool_call>{"name": ',
    ]) {
      const server = await serve(says(text))
      const [made] = await zoomed(agentOf(server, { toolCalls: 'text' }))
      expect(made).toMatchObject({ answer: 'x', requests: 1 })
    }
  })

  test('one that refuses tools says so', async () => {
    const message = '"auto" tool choice requires --enable-auto-tool-choice'
    const server = await serve(fails(400, message))
    await expect(agentOf(server).zoom(asked)).rejects.toMatchObject({
      code: 'ERR_POLICY',
      message: expect.stringContaining(message),
    })
  })

  test('one that ignores tools answers at once', async () => {
    const server = await serve(answerIs('x'))
    expect(await zoomed(agentOf(server))).toMatchObject([{ answer: 'x', requests: 1 }])
  })

  test('calls without tools in the request are no answer', async () => {
    const server = await serve(callsTools(zoomTo([0, 0, 500, 500])))
    await expect(agentOf(server, { toolCalls: 'text' }).zoom(asked)).rejects.toMatchObject({
      code: 'ERR_POLICY',
      message: expect.stringMatching(/calls of the tools 'image_zoom_in_tool'/),
    })
  })
})

describe('failures', () => {
  test('of several trajectories each for itself', async () => {
    let later = 0
    const server = await serve((request, response) => {
      const n = request.body.n ?? 1
      if (n === 4)
        return send(response, 200, {
          choices: [
            ...choices('<answer>x</answer>', { refusal: 'no' }),
            ...[2, 3].map((index) => ({
              index,
              finish_reason: 'tool_calls',
              message: { content: null, tool_calls: [zoomTo([0, 0, 500, 500])] },
            })),
          ],
        })
      return later++
        ? answerIs('y')(request, response)
        : fails(400, 'too many images')(request, response)
    })
    const all = await zoomed(agentOf(server), { n: 4 })
    expect(all.map(({ answer }) => answer).sort()).toEqual(['', '', 'x', 'y'])
    expect(all[1]!.completion.refusal).toBe('no')
    expect(all.find(({ completion }) => completion.failure)!.completion.failure).toMatch(
      /too many images/,
    )
  })

  test('of the only one it rejects, and frees what it made', async () => {
    const before = device.memory().liveBytes
    const server = await serve(callsTools(zoomTo([0, 0, 500, 500])), fails(400, 'no'))
    await expect(agentOf(server).zoom(asked)).rejects.toMatchObject({ code: 'ERR_POLICY' })
    const refusing = await serve(callsTools(zoomTo([0, 0, 9, 9])), says({ refusal: 'unsafe' }))
    await expect(agentOf(refusing).zoom(asked)).rejects.toThrow(/refused to answer: unsafe/)
    expect(device.memory().liveBytes).toBe(before)
    const fine = await serve(callsTools(zoomTo([0, 0, 500, 500])), answerIs('x'))
    await zoomed(agentOf(fine))
    expect(device.memory().liveBytes).toBe(before)
  })

  test('an abort between turns', async () => {
    const stop = new AbortController()
    const server = await serve((request, response) => {
      callsTools(zoomTo([0, 0, 500, 500]))(request, response)
      if (request.at === 1) stop.abort(new Error('enough'))
    })
    await expect(agentOf(server).zoom({ ...asked, signal: stop.signal })).rejects.toThrow('enough')
    expect(server.requests.length).toBeLessThanOrEqual(3)
  })

  test('wrong options', async () => {
    const policy = functionPolicy(() => 'x')
    const refuses = (options: object, message: RegExp) =>
      expectRefusal(
        () => new ZoomAgent(policy, options as never),
        'ERR_VALUE',
        'ZoomAgent',
        message,
      )
    refuses({ maxTurn: 3 }, /did you mean 'maxTurns'/)
    refuses({ maxTurns: 0 }, /maxTurns/)
    refuses({ maxPixels: 65_536, pixelBudget: 65_535 }, /pixelBudget must be at least maxPixels/)
    refuses({ minPixels: 70_000, maxPixels: 65_536 }, /minPixels/)
    refuses({ coordinates: 'pixels' }, /coordinates/)
    refuses({ toolCalls: 'xml' }, /toolCalls/)
    refuses({ resizeRules: 'pillow' }, /rules/)
    refuses({ tool: { name: 'zoom' } }, /tool.description/)
    refuses({ tool: { name: '', description: '', parameters: {} } }, /tool.name/)
    refuses({ tool: { ...zoomTool('absolute'), strict: true } }, /tool.strict/)
    refuses({ rules: 'lenient' }, /rules/)
    expectRefusal(() => new ZoomAgent({} as never), 'ERR_VALUE', 'ZoomAgent', /policy/)
    await expect(new ZoomAgent(policy).zoom({ image, question } as never)).rejects.toMatchObject({
      code: 'ERR_VALUE',
    })
  })
})

test('a recording replays a conversation', async () => {
  const path = join(mkdtempSync(join(tmpdir(), 'p2r-')), 'zoom.jsonl')
  const script: PolicyFunction = ({ turns = [] }) =>
    turns.length < 2
      ? {
          text: '',
          toolCalls: [
            {
              id: `${Math.random()}`,
              name,
              arguments: `{"bbox_2d": [0, 0, ${500 - 100 * turns.length}, 500]}`,
            },
          ],
        }
      : '<answer>x</answer>'
  const [recorded] = await zoomed(new ZoomAgent(recordPolicy(functionPolicy(script), path), small))
  const [replayed] = await zoomed(new ZoomAgent(await RecordedPolicy.load(path), small))
  expect(replayed).toMatchObject({ answer: 'x', requests: 3, shown: recorded!.shown })
  // Other crops are another conversation.
  await expect(
    zoomed(new ZoomAgent(await RecordedPolicy.load(path), { ...small, cropMaxPixels: 8192 })),
  ).rejects.toMatchObject({ code: 'ERR_POLICY' })
})

describe('answer and evaluate', () => {
  test('answer by an agent', async () => {
    const server = await serve(callsTools(zoomTo([0, 0, 500, 500])), answerIs('STOP'))
    const made = await answer({ agent: agentOf(server), ...asked })
    expect(made).toMatchObject({ answer: 'STOP', perception: '', requests: 2, outOfTurns: false })
    expect(made.turns).toHaveLength(1)
    expect(made.evidence.crops).toHaveLength(1)
    made.dispose()
    const perceiver = new Perceiver(functionPolicy(() => '[]'))
    await expect(
      answer({ agent: agentOf(server), perceiver, ...asked } as never),
    ).rejects.toMatchObject({
      code: 'ERR_VALUE',
      message: expect.stringMatching(/either an agent/),
    })
    await expect(answer({ agent: perceiver, ...asked } as never)).rejects.toThrow(/ZoomAgent/)
  })

  test('both forms over the same questions, with their cost', async () => {
    const server = await serve((request, response) => {
      if (request.body.tools && request.shown.length < 3)
        return callsTools(zoomTo([0, 0, 500, 500]))(request, response)
      if (/thousandths/.test(request.prompt))
        return says('[{"bbox_2d": [0, 0, 500, 500], "label": "sign"}]')(request, response)
      return answerIs('A')(request, response)
    })
    const policy = new OpenAIPolicy({ baseURL: server.baseURL, model: 'm', tokens: false })
    const questions = ['A', 'B'].map((truth) => ({
      question,
      truth,
      answerForm: 'mca' as const,
      load: async () => image.reshape([height, width, 3]),
    }))
    const limits = { ...small, maxPixels: 65_536 }
    const forms = [
      { agent: new ZoomAgent(policy, { ...limits, pixelBudget: 5 * 65_536 }) },
      { perceiver: new Perceiver(policy, limits), reasoner: new Reasoner(policy) },
    ]
    for (const form of forms) {
      const rewards: number[] = []
      for await (const judged of evaluate({ ...form, questions })) {
        expect(judged.error).toBeUndefined()
        expect(judged.pixels).toBeGreaterThan(65_536)
        expect(judged.pixels).toBeLessThanOrEqual(5 * 65_536)
        expect(judged.requests).toBe(form.agent ? 3 : 2)
        rewards.push(judged.reward!)
      }
      expect(rewards.sort()).toEqual([0, 1])
    }
    // What is reported is what was sent.
    const sent = await Promise.all(server.requests.at(-1)!.shown.map(pixelsOf))
    expect(sent).toHaveLength(2)
  })

  test('turns that ran out are wrong, and counted', async () => {
    const server = await serve(callsTools(zoomTo([0, 0, 500, 500])))
    const questions = [
      {
        question,
        truth: '',
        answerForm: 'na' as const,
        load: async () => image.reshape([height, width, 3]),
      },
    ]
    for await (const judged of evaluate({ agent: agentOf(server, { maxTurns: 2 }), questions }))
      expect(judged).toMatchObject({ reward: 0, outOfTurns: true, answer: '' })
  })
})

describe('training', () => {
  // A model with a chat template: the prompt of a turn is that of the turn before, its output, and the results.
  const prompt = [1, 2, 3]
  const template = [90, 91]
  const own = (turn: number, rollout: number): number[] => [10 * turn + rollout, 7, 8]
  const words = (turns: PolicyRequest['turns'], rollout: number, last: boolean): Completion => {
    const turn = turns?.length ?? 0
    const promptTokens = [
      ...prompt,
      ...(turns ?? []).flatMap(({ completion }) => [...completion.tokens!, ...template]),
    ]
    return {
      text: last ? `<answer>${'AB'[rollout % 2]}</answer>` : '',
      tokens: own(turn, rollout),
      logProbs: own(turn, rollout).map((id) => -id / 100),
      promptTokens,
      ...(!last && { toolCalls: [{ id: 'c', name, arguments: '{"bbox_2d": [0, 0, 500, 500]}' }] }),
    }
  }
  /** Rollout r calls the tool r times. */
  const model: PolicyFunction = ({ n = 1, turns }) => {
    if (!turns) return Array.from({ length: n }, (_, r) => words(turns, r, r === 0))
    const rollout = turns[0]!.completion.tokens![0]!
    return words(turns, rollout, turns.length === rollout)
  }
  const sample = { image, question, answerForm: 'mca' as const, truth: 'B' }
  const trainerOf = (f: PolicyFunction, options: Partial<PraGrpoOptions> = {}) =>
    new PraGrpo({
      reasoner: functionPolicy(f),
      zoom: small,
      device,
      groupSize: 3,
      ...options,
    })

  test('tokens of tool results are in the batch, and masked', async () => {
    const trainer = trainerOf(model)
    expect(trainer.role).toBe('reasoner')
    const batch = await trainer.rollout([sample])
    expect(batch.items.map(({ error, reward }) => error?.message ?? reward)).toEqual([0, 1, 0])
    expect(batch.role).toBe('reasoner')
    const expected = [
      own(0, 0),
      [...own(0, 1), ...template, ...own(1, 1)],
      [...own(0, 2), ...template, ...own(1, 2), ...template, ...own(2, 2)],
    ]
    expect(batch.cuSeqlens).toEqual(Int32Array.of(0, 3, 11, 24))
    expect(batch.tokens).toEqual(Int32Array.from(expected.flat()))
    const mask = await batch.mask!.read()
    expect(mask).toEqual(Uint8Array.from(expected.flat(), (id) => +!template.includes(id)))
    expect(await batch.oldLogProbs!.read()).toEqual(
      Float32Array.from(expected.flat(), (id) => (template.includes(id) ? 0 : -id / 100)),
    )
    // The prompt, and the images that its placeholders and those of the results stand for.
    const { request } = batch.items[2]!
    expect(request!.promptTokens).toEqual(prompt)
    expect(request!.images).toHaveLength(3)
    const crop = await expectedCrop([0, 0, 320, 240])
    expect(await request!.images[1]!.read()).toEqual(crop.data)
    batch.dispose()
  })

  test('a step has no gradient for them, and the loss of the model’s own tokens alone', async () => {
    const trainer = trainerOf(model)
    const batch = await trainer.rollout([sample])
    const mask = await batch.mask!.read()
    const old = await batch.oldLogProbs!.read()
    const values = old.map((x, i) => (mask[i] ? x + 0.1 * ((i % 3) - 1) : -5))
    const stepOn = (logProbs: Tensor<'f32'>): GrpoStep => trainer.step(batch, { logProbs })
    using logProbs = device.tensor(values, [values.length])
    using step = stepOn(logProbs)
    const gradient = await step.dLogProbs!.read()
    for (const [i, kept] of mask.entries()) {
      if (!kept) expect(gradient[i]).toBe(0)
      else if (i < 3 || i >= 11) expect(gradient[i]).not.toBe(0)
    }
    // The same without the other tokens.
    const kept = [...mask.keys()].filter((i) => mask[i])
    const pick = (from: Float32Array) =>
      device.tensor(
        Float32Array.from(kept, (i) => from[i]!),
        [kept.length],
      )
    using advantages = step.advantages.slice(0)
    using plain = policyLoss({
      logProbs: pick(values),
      oldLogProbs: pick(old),
      advantages,
      cuSeqlens: [0, 3, 9, 18],
    })
    expect((await plain.loss.read())[0]).toBeCloseTo((await step.loss.read())[0]!, 6)
    const metrics = (await trainer.metrics()).reasoner!
    const entropy = kept.reduce((sum, i) => sum - values[i]!, 0) / kept.length
    expect(metrics.sampledEntropy).toBeCloseTo(entropy, 5)
    batch.dispose()
  })

  test('the correction between trainer and server leaves them out', async () => {
    const trainer = trainerOf(model)
    const batch = await trainer.rollout([sample])
    const mask = await batch.mask!.read()
    const old = await batch.oldLogProbs!.read()
    // The trainer agrees on the model's own tokens; the server has 0 for the others.
    const own = old.map((x, i) => (mask[i] ? x : -9))
    using oldLogProbs = device.tensor(own, [own.length])
    using step = trainer.step(batch, { logProbs: oldLogProbs, oldLogProbs })
    await step.loss.read()
    const { correction } = (await trainer.metrics()).reasoner!
    expect(correction).toMatchObject({ k1: 0, k3: 0, cutShare: 0, rejectedShare: 0 })
    batch.dispose()
  })

  test('a batch in a file keeps its mask', async () => {
    const batch = await trainerOf(model).rollout([sample])
    const path = join(mkdtempSync(join(tmpdir(), 'p2r-')), 'batch.safetensors')
    await saveRollouts(path, batch, { images: 'files' })
    const loaded = await loadRollouts(path, device)
    expect(await loaded.mask!.read()).toEqual(await batch.mask!.read())
    expect(loaded.items[2]!.request!.images).toHaveLength(3)
    using logProbs = device.zeros([24])
    using step = trainerOf(model).step(loaded, { logProbs })
    expect(step.dLogProbs!.shape).toEqual([24])
    loaded.dispose()
    batch.dispose()
  })

  test('a template that rewrites earlier turns, and a server without ids of the prompt', async () => {
    const rewriting: PolicyFunction = (request) => {
      const made = model(request) as Completion | Completion[]
      if (!request.turns) return made
      const { promptTokens, ...rest } = made as Completion
      return { ...rest, promptTokens: [99, ...promptTokens!.slice(1)] }
    }
    const without: PolicyFunction = (request) =>
      [model(request) as Completion | Completion[]]
        .flat()
        .map(({ promptTokens: _, ...completion }) => completion)
    for (const [f, message] of [
      [rewriting, /does not begin with the tokens of turn 1/],
      [without, /no ids of the prompt/],
    ] as const) {
      const batch = await trainerOf(f).rollout([sample])
      expect(batch.items[0]!.reward).toBe(0)
      for (const item of batch.items.slice(1)) expect(item.error!.message).toMatch(message)
      expect(batch.metrics.errors).toBe(2)
      expect(batch.mask).toBeUndefined()
      batch.dispose()
    }
  })

  test('turns that ran out have reward 0', async () => {
    const forever: PolicyFunction = ({ n = 1, turns }) =>
      Array.from({ length: n }, () => words(turns, 1, false))
    const trainer = trainerOf(forever, { zoom: { ...small, maxTurns: 2 }, groupSize: 2 })
    const batch = await trainer.rollout([{ ...sample, truth: '' }])
    expect(batch.items).toMatchObject([
      { reward: 0, outOfTurns: true },
      { reward: 0, outOfTurns: true },
    ])
    expect(batch.metrics).toMatchObject({ outOfTurns: 2, errors: 0 })
    batch.dispose()
  })

  test('through a server, with vLLM’s fields', async () => {
    const server = await serve((request, response) => {
      const turn = request.body.messages.filter((m: { role: string }) => m.role === 'tool').length
      const promptTokens = [...prompt, ...(turn ? [...own(0, 1), ...template] : [])]
      send(response, 200, {
        prompt_token_ids: promptTokens,
        choices: Array.from({ length: request.body.n ?? 1 }, (_, index) => ({
          index,
          finish_reason: turn ? 'stop' : 'tool_calls',
          token_ids: own(turn, 1),
          logprobs: { content: own(turn, 1).map((id) => ({ token: 'x', logprob: -id / 100 })) },
          message: turn
            ? { content: '<answer>B</answer>' }
            : { content: null, tool_calls: [zoomTo([0, 0, 500, 500])] },
        })),
      })
    })
    const trainer = new PraGrpo({
      reasoner: new OpenAIPolicy({ baseURL: server.baseURL, model: 'm' }),
      zoom: small,
      device,
      groupSize: 2,
    })
    const batch = await trainer.rollout([sample])
    expect(batch.metrics).toMatchObject({ errors: 0, rewardMean: 1 })
    expect(await batch.mask!.read()).toEqual(
      Uint8Array.of(1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1),
    )
    expect(server.requests[0]!.body).toMatchObject({ n: 2, return_token_ids: true })
    batch.dispose()
  })

  test('wrong options', () => {
    const refuses = (options: object, message: RegExp) =>
      expectRefusal(() => trainerOf(model, options as never), 'ERR_VALUE', 'PraGrpo', message)
    refuses({ zoom: { maxTurn: 1 } }, /did you mean 'zoom.maxTurns'/)
    refuses({ zoom: 5 }, /zoom must be an object/)
    refuses({ schedule: { perceiver: 1, reasoner: 1 } }, /schedule.perceiver must be 0/)
    refuses({ perceiver: functionPolicy(() => 'x') }, /perceiver must be absent/)
    refuses({ evidence: {} }, /evidence must be absent/)
    expectRefusal(
      () => new PraGrpo({ reasoner: functionPolicy(model), device }),
      'ERR_VALUE',
      'PraGrpo',
      /perceiver must be a Policy/,
    )
  })
})
