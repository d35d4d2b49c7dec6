import {
  answer,
  collectEvidence,
  defaultPrompts,
  functionPolicy,
  OpenAIPolicy,
  Perceiver,
  type PerceiverOptions,
  type Policy,
  type PolicyRequest,
  Reasoner,
} from 'p2r-kernels'
import { describe, expect, test, vi } from 'vitest'
import { chatServer, says } from './chat_server.js'
import { expectRefusal, onEveryBackend } from './harness.js'

const twoBoxes =
  '[{"bbox_2d": [0, 0, 250, 500], "label": "a"}, {"bbox_2d": [500, 500, 900, 900], "label": "b"}]'
const question = 'What is $& {question}?'

/** A policy that says these texts in turn, and what it was asked. */
function scripted(...texts: string[]) {
  const asked: (PolicyRequest & { shapes: (readonly number[])[] })[] = []
  const policy: Policy = {
    async generate(request) {
      asked.push({ ...request, shapes: request.images.map(({ shape }) => shape) })
      for (const image of request.images) await image.read()
      const text = texts[Math.min(asked.length, texts.length) - 1]!
      return Array.from({ length: request.n ?? 1 }, () => ({ text }))
    },
  }
  return { policy, asked }
}

onEveryBackend('Perceiver and Reasoner', (b) => {
  const picture = (height = 80, width = 100) =>
    b.device.tensor(
      Uint8Array.from({ length: height * width * 3 }, (_, i) => i % 251),
      [height, width, 3],
    )

  test('requests, and the crops of the boxes', async () => {
    using image = picture()
    const sees = scripted(twoBoxes)
    const [perceived] = await new Perceiver(sees.policy).perceive({ image, question })
    expect(sees.asked[0]).toMatchObject({
      role: 'perceiver',
      n: 1,
      temperature: 0,
      maxTokens: 1024,
    })
    expect(sees.asked[0]!.system).toBe(defaultPrompts.system)
    expect(sees.asked[0]!.prompt).toMatch(/^Question: What is \$& \{question\}\?\n.*bbox_2d.*\[\]/s)
    expect(sees.asked[0]!.shapes).toEqual([[80, 100, 3]])
    const { evidence } = perceived!
    using expected = collectEvidence({ image, boxes: evidence.boxes })
    expect(evidence.crops.length).toBe(2)
    for (const [i, crop] of evidence.crops.entries())
      expect(await crop.read()).toEqual(await expected.crops[i]!.read())

    const thinks = scripted('<think>t</think><answer> B </answer>')
    const reasoner = new Reasoner(thinks.policy)
    const [reasoned] = await reasoner.reason({ evidence, question, answerForm: 'mca' })
    expect(reasoned!.answer).toBe('B')
    expect(thinks.asked[0]).toMatchObject({ role: 'reasoner', temperature: 0, maxTokens: 2048 })
    expect(thinks.asked[0]!.prompt).toMatch(/outlined.*step by step.*<answer>.*letter/s)
    expect(thinks.asked[0]!.shapes.length).toBe(3)
    evidence.dispose()
  })

  test('without evidence: the image itself, and the prompt without regions', async () => {
    using image = picture()
    for (const text of [
      '[]',
      'nothing to see',
      '[{"bbox_2d": [1500, 0, 1600, 9], "label": "x"}]',
    ]) {
      const thinks = scripted('<answer>7</answer>')
      const { answer: said } = await answer({
        perceiver: new Perceiver(scripted(text).policy),
        reasoner: new Reasoner(thinks.policy),
        image,
        question,
        answerForm: 'na',
      })
      expect(said).toBe('7')
      expect(thinks.asked[0]!.prompt).not.toMatch(/outlined/)
      expect(thinks.asked[0]!.prompt).toMatch(/a number/)
      expect(thinks.asked[0]!.shapes).toEqual([[80, 100, 3]])
    }
  })

  test('sizes: the policy sees a reduced image, crops are taken from the full one', async () => {
    using image = picture(640, 960)
    const sees = scripted(twoBoxes)
    const perceiver = new Perceiver(sees.policy, {
      maxPixels: 65536,
      cropMaxPixels: 8192,
      maxEvidence: 1,
    })
    const [{ evidence }] = (await perceiver.perceive({ image, question })) as [never]
    const { annotated, crops } = evidence as ReturnType<typeof collectEvidence>
    expect(sees.asked[0]!.shapes).toEqual([[192, 288, 3]])
    expect(annotated.shape).toEqual([192, 288, 3])
    expect(crops.length).toBe(1)
    expect(crops[0]!.size).toBeLessThanOrEqual(3 * 8192)
    ;(evidence as ReturnType<typeof collectEvidence>).dispose()
  })

  test('templates, temperatures, and n', async () => {
    using image = picture()
    const { policy, asked } = scripted(twoBoxes, '<answer>x</answer>')
    const prompts = {
      system: 'S',
      perceive: 'P {question}{question}',
      reason: 'R ',
      forms: { na: 'N' },
    }
    const perceived = await new Perceiver(policy, { prompts }).perceive({
      image,
      question: 'q',
      n: 3,
    })
    const evidence = perceived[0]!.evidence
    const reasoner = new Reasoner(policy, { prompts, temperature: 0.3, maxTokens: 5 })
    const given = await reasoner.reason({ evidence, question: 'q', answerForm: 'na', n: 2 })
    expect([perceived.length, given.length]).toEqual([3, 2])
    expect(asked[0]).toMatchObject({ system: 'S', prompt: 'P qq', n: 3, temperature: 1 })
    expect(asked[1]).toMatchObject({ prompt: 'R N', n: 2, temperature: 0.3, maxTokens: 5 })
    for (const { evidence } of perceived) evidence.dispose()
  })

  test('nothing leaks, whatever fails', async () => {
    using image = picture()
    const before = b.device.memory().liveBytes
    const down = functionPolicy(() => {
      throw new Error('down')
    })
    const good = scripted(twoBoxes).policy
    const a = { image, question, answerForm: 'mca' as const }
    const once = (perceiver: Policy, reasoner: Policy, extra = {}) =>
      answer({
        perceiver: new Perceiver(perceiver, { maxPixels: 8192 }),
        reasoner: new Reasoner(reasoner),
        ...a,
        ...extra,
      })
    for (const [p, r] of [
      [down, good],
      [good, down],
    ] as const)
      await expect(once(p, r)).rejects.toMatchObject({
        code: 'ERR_POLICY',
        message: expect.stringContaining('down'),
        cause: expect.objectContaining({ message: 'down' }),
      })
    const stop = new AbortController()
    const aborts = functionPolicy(() => {
      stop.abort(new Error('enough'))
      return 'x'
    })
    await expect(once(good, aborts, { signal: stop.signal })).rejects.toThrow('enough')
    const { evidence } = await once(good, good)
    evidence.dispose()
    expect(b.device.memory().liveBytes).toBeLessThanOrEqual(before)
  })

  test('a refusal is an error for one rollout, and is marked among several', async () => {
    using image = picture()
    const refuses: Policy = {
      generate: async ({ n = 1 }) => Array.from({ length: n }, () => ({ text: '', refusal: 'no' })),
    }
    const perceiver = new Perceiver(refuses)
    await expect(perceiver.perceive({ image, question })).rejects.toMatchObject({
      code: 'ERR_POLICY',
      message: '[perceive] the perceiver refused to answer: no',
    })
    const two = await perceiver.perceive({ image, question, n: 2 })
    expect(two.map(({ completion }) => completion.refusal)).toEqual(['no', 'no'])
    expect(two[0]!.evidence.hasEvidence).toBe(false)
  })

  test('with a served policy', async () => {
    using image = picture()
    const server = await chatServer(
      says(({ prompt, images }) =>
        /JSON/.test(prompt) ? twoBoxes : `<answer>${images.length}</answer>`,
      ),
    )
    const policy = new OpenAIPolicy({ baseURL: server.baseURL, model: 'm' })
    const made = await answer({
      perceiver: new Perceiver(policy),
      reasoner: new Reasoner(policy),
      image,
      question,
      answerForm: 'na',
    })
    expect(made).toMatchObject({
      answer: '3',
      perception: twoBoxes,
      reasoning: '<answer>3</answer>',
    })
    made.evidence.dispose()
    await server.close()
  })

  test('boxRules choose how boxes are read, rules how images are resized', async () => {
    using image = picture()
    const { policy } = scripted(twoBoxes.replaceAll('"', "'"))
    const count = async (options: PerceiverOptions) => {
      const [perceived] = await new Perceiver(policy, options).perceive({ image, question })
      using evidence = perceived!.evidence
      return evidence.boxes.length
    }
    expect(await count({ rules: 'transformers' })).toBe(0)
    expect(await count({ rules: 'transformers', boxRules: 'strict' })).toBe(2)
  })

  test('refuses invalid arguments', async () => {
    using image = picture()
    const { policy } = scripted('x')
    expectRefusal(() => new Perceiver({} as never), 'ERR_VALUE', 'Perceiver', /policy/)
    expectRefusal(
      () => new Reasoner(policy, { prompts: { forms: { mca: 3 } } as never }),
      'ERR_VALUE',
      'Reasoner',
      /mca/,
    )
    for (const [options, message] of [
      [{ boxRules: 'transformers' }, /boxRules/],
      [{ rules: 'strict' }, /rules must be 'qwen-vl-utils'/],
    ] as const)
      expectRefusal(
        () => new Perceiver(policy, options as never),
        'ERR_VALUE',
        'Perceiver',
        message,
      )
    const evidence = collectEvidence({ image, boxes: [] })
    for (const [wrong, message] of [
      [{ question: 3 }, /question/],
      [{ answerForm: 'x' }, /answerForm/],
    ] as const)
      await expect(
        new Reasoner(policy).reason({ evidence, question, answerForm: 'mca', ...wrong } as never),
      ).rejects.toMatchObject({ code: 'ERR_VALUE', message: expect.stringMatching(message) })
    const few: Policy = { generate: async () => [] }
    await expect(new Perceiver(few).perceive({ image, question })).rejects.toMatchObject({
      code: 'ERR_POLICY',
      message: expect.stringMatching(/1 completion, got 0/),
    })
  })
})

describe('many calls with one signal', () => {
  test('no warning is printed', async () => {
    const warned = vi.fn()
    process.on('warning', warned)
    const { device } = await import('p2r-kernels').then((p) => ({ device: p.openDevice('cpu') }))
    const server = await chatServer(says('[]'))
    const policy = new OpenAIPolicy({ baseURL: server.baseURL, model: 'm', concurrency: 4 })
    const { signal } = new AbortController()
    const perceiver = new Perceiver(policy)
    await Promise.all(
      Array.from({ length: 40 }, async () => {
        using image = device.zeros([8, 8, 3], 'u8')
        await perceiver.perceive({ image, question, signal })
      }),
    )
    await new Promise((resolve) => setImmediate(resolve))
    expect(warned).not.toHaveBeenCalled()
    process.off('warning', warned)
    await server.close()
    device.dispose()
  })
})
