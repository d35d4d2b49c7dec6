// Files, texts, policies and servers of others: each is read or refused with a P2RError, in time and memory in
// proportion to its size, and no secret leaves for another server.
import { execFileSync } from 'node:child_process'
import { mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { inspect } from 'node:util'
import vm from 'node:vm'
import {
  answerReward,
  boxIoU,
  type EvidenceBox,
  encodeImage,
  formatReward,
  functionPolicy,
  loadImage,
  loadMetadata,
  loadRollouts,
  loadTensors,
  OpenAIPolicy,
  openDevice,
  PraGrpo,
  parseBoxes,
  perceptionFault,
  RecordedPolicy,
  saveTensors,
  type Tensor,
  VisionTower,
} from 'p2r-kernels'
import sharp from 'sharp'
import { afterAll, describe, expect, test } from 'vitest'
import { chatServer } from './chat_server.js'
import { Random } from './harness.js'

const device = openDevice('cpu')
const folder = mkdtempSync(join(tmpdir(), 'p2r-hostile-'))
afterAll(() => {
  device.dispose()
  rmSync(folder, { recursive: true })
})
const file = (name: string, content: string | Uint8Array): string => {
  const path = join(folder, name)
  writeFileSync(path, content)
  return path
}
const refused = (promise: Promise<unknown>, code: string, message: RegExp) =>
  expect(promise).rejects.toMatchObject({
    name: 'P2RError',
    code,
    message: expect.stringMatching(message),
  })

describe('files', () => {
  test('pipes and devices are refused at once', async () => {
    const pipe = join(folder, 'pipe')
    execFileSync('mkfifo', [pipe])
    const link = join(folder, 'link')
    symlinkSync(pipe, link)
    for (const path of [pipe, link, '/dev/zero']) {
      await refused(loadImage(path, device), 'ERR_IO', /not a regular file/)
      await refused(loadTensors(path, device), 'ERR_IO', /not a regular file/)
      await refused(loadMetadata(path), 'ERR_IO', /not a regular file/)
      await refused(RecordedPolicy.load(path), 'ERR_IO', /not a regular file/)
    }
  })

  test('a config asks for no more than a model has', async () => {
    const vision = {
      depth: 2,
      hidden_size: 32,
      num_heads: 2,
      out_hidden_size: 32,
      intermediate_size: 64,
      num_position_embeddings: 16,
    }
    for (const [name, value] of [
      ['depth', 1e9],
      ['depth', 1025],
      ['hidden_size', 2 ** 30],
      ['patch_size', 1e6],
      ['num_position_embeddings', 2 ** 40],
    ] as const) {
      file('config.json', JSON.stringify({ vision_config: { ...vision, [name]: value } }))
      await refused(VisionTower.load(folder, device), 'ERR_FORMAT', RegExp(`${name} must be`))
    }
    const deepstack_visual_indexes = new Array(100_000).fill(1)
    file('config.json', JSON.stringify({ vision_config: { ...vision, deepstack_visual_indexes } }))
    await refused(VisionTower.load(folder, device), 'ERR_FORMAT', /different blocks/)
    // Looking up the name behind every dot would read 10^12 characters.
    file('config.json', JSON.stringify({ vision_config: vision }))
    await saveTensors(join(folder, 'model.safetensors'), { ['a.'.repeat(1e6)]: device.zeros([1]) })
    await refused(VisionTower.load(folder, device), 'ERR_FORMAT', /there is no weight/)
    for (const name of ['../model.safetensors', '/etc/passwd', '..', 'a/b', 'a\\b', 'a\0b']) {
      const weight_map = { 'merger.norm.weight': name }
      file('model.safetensors.index.json', JSON.stringify({ weight_map }))
      await refused(VisionTower.load(folder, device), 'ERR_FORMAT', /a file of the folder/)
    }
  })
})

describe('images', () => {
  test('bytes may be transferred or changed after the call', async () => {
    const pixels = device.tensor(new Uint8Array(48).fill(77), [4, 4, 3])
    for (const spoil of [
      (bytes: Uint8Array) => structuredClone(bytes, { transfer: [bytes.buffer as ArrayBuffer] }),
      (bytes: Uint8Array) => bytes.fill(0),
    ]) {
      const bytes = await encodeImage(pixels)
      const loading = loadImage(bytes, device)
      spoil(bytes)
      expect(await (await loading).read()).toEqual(await pixels.read())
    }
  })

  test('bytes of another realm', async () => {
    const png = await encodeImage(device.zeros([2, 3, 3], 'u8'))
    const foreign = vm.runInNewContext('Uint8Array.from(list)', { list: [...png] })
    expect(foreign).not.toBeInstanceOf(Uint8Array)
    expect((await loadImage(foreign, device)).shape).toEqual([2, 3, 3])
  })

  test('a Blob that holds no bytes', async () => {
    const blob = (arrayBuffer: () => unknown) => ({ arrayBuffer }) as Blob
    const wrong = async () => 1e12
    await refused(loadImage(blob(wrong), device), 'ERR_VALUE', /an ArrayBuffer, got 1000000000000/)
    const failing = async () => Promise.reject(new Error('gone'))
    await refused(loadImage(blob(failing), device), 'ERR_IO', /gone/)
  })

  test('a file of few bytes with many pixels is refused by default', async () => {
    const large = { width: 10_001, height: 10_000, channels: 3, background: '#000' } as const
    const png = await sharp({ create: large, limitInputPixels: false }).png().toBuffer()
    await refused(loadImage(png, device), 'ERR_FORMAT', /more than maxPixels, 100000000/)
  })

  test('a format is known by the first bytes, before a decoder sees the file', async () => {
    const heic = Buffer.from('\0\0\0\x18ftypheic\0\0\0\0mif1heic', 'latin1')
    for (const data of [heic, Buffer.from('<?xml version="1.0"?><svg/>'), Buffer.from('%PDF-1.7')])
      await refused(loadImage(data, device), 'ERR_FORMAT', /must be JPEG, PNG/)
  })

  test('the event loop goes on while alpha is composited', async () => {
    const pixels = { width: 3000, height: 3000, channels: 4 } as const
    const png = await sharp({ create: { ...pixels, background: '#12345678' } })
      .png()
      .toBuffer()
    let turns = 0
    const counter = setInterval(() => turns++, 0)
    const loading = loadImage(png, device)
    await loading
    clearInterval(counter)
    // 9 million pixels are converted in 18 parts.
    expect(turns).toBeGreaterThan(8)
  })
})

describe('texts take linear time', () => {
  // Quadratic forms of these took from seconds to minutes.
  const long = 300_000

  test('strict labels', () => {
    const fault = (label: string) =>
      perceptionFault([{ bbox2d: [0, 0, 1, 1], label }], { rules: 'strict' })
    expect(fault('"'.repeat(long))).toBe('label')
    expect(fault(`${'"'.repeat(long)}!`)).toBe(null)
    expect(fault('<[description]>')).toBe('label')
    expect(fault('"\'>')).toBe('label')
    expect(fault('>description<')).toBe(null)
  })

  test('blanks, quotes and brackets', async () => {
    for (const unit of [' ', '\n', '"', "'", '{', '[', '\\', '<think>', '\\boxed{', 'A ', '1,']) {
      const text = unit.repeat(long / unit.length)
      for (const rules of ['reference', 'strict'] as const) {
        for (const shown of [text, `\`\`\`json${text}x`, `{"bbox_2d": [${text}`])
          expect(parseBoxes(shown, { rules })).toEqual([])
        for (const form of ['mca', 'na'] as const)
          expect([0, 1]).toContain(await answerReward({ answer: text, truth: 'B', form, rules }))
      }
      expect(formatReward(`\`\`\`json${text}x`, 'perceiver')).toBe(0)
    }
  })

  test('many boxes', () => {
    const boxes = Array.from({ length: 100_000 }, (_, i): EvidenceBox => {
      const [x, y] = [3 * (i % 300), 3 * Math.floor(i / 300)]
      return { bbox2d: [x, y, x + 4, y + 4], label: 'a' }
    })
    expect(perceptionFault(boxes)).toBe(null)
    expect(perceptionFault([...boxes, boxes[77]!])).toBe('overlap')
  })

  test('overlaps are those of all pairs', () => {
    const random = new Random(5)
    let overlaps = 0
    for (let round = 0; round < 2000; round++) {
      const size = 10 ** random.int(-3, 5)
      const boxes = Array.from({ length: random.int(2, 6) }, (): EvidenceBox => {
        const [x, y] = [random.int(-9, 9), random.int(-9, 9)]
        const [width, height] = [random.int(-1, 12), random.int(1, 12)]
        const corners = [x, y, x + width, y + height].map((at) => (at * size) / 10)
        return { bbox2d: corners as unknown as EvidenceBox['bbox2d'], label: 'a' }
      })
      const pairs = boxes.flatMap((a, i) =>
        boxes.slice(0, i).map((b) => boxIoU(a.bbox2d, b.bbox2d)),
      )
      const expected = pairs.some((iou) => iou > 0.5)
      overlaps += +expected
      expect(perceptionFault(boxes)).toBe(expected ? 'overlap' : null)
    }
    expect(overlaps).toBeGreaterThan(50)
  })
})

test('typed arrays of another realm are what their tags say', async () => {
  const foreign = (text: string) => vm.runInNewContext(text)
  const ints = foreign('Int32Array.of(7, -1)')
  expect(ints).not.toBeInstanceOf(Int32Array)
  const tensor = device.tensor(ints as Int32Array, [2])
  expect(tensor.dtype).toBe('i32')
  expect(await tensor.read()).toEqual(Int32Array.of(7, -1))
  expect(device.tensor(foreign('new Uint8ClampedArray(2)'), [2]).dtype).toBe('u8')
  const bits = foreign('Uint16Array.of(0x3c00, 0x4000).subarray(1)')
  expect(await device.tensor(bits, [1], 'f16').toFloat32()).toEqual(Float32Array.of(2))
  expect(() => device.tensor(bits, [1])).toThrow(/needs a dtype/)
})

describe('policies', () => {
  const sample = () => ({
    image: device.zeros([48, 64, 3], 'u8'),
    question: 'Which?',
    answerForm: 'mca' as const,
    truth: 'B',
  })

  test('token ids that are none are an error of their item', async () => {
    const good = { text: '[]', tokens: [1, 2], logProbs: [-1, -1] }
    const wrong = [
      { tokens: ['a', 1] },
      { tokens: [1.5, 2] },
      { tokens: [1e12, 2] },
      { tokens: [-1, 2] },
      { tokens: { length: 2 } },
      { tokens: new Array(2) },
      { logProbs: ['x', -1] },
      { mask: [2, 1] },
      { promptTokens: 'ids' },
    ].map((fields) => ({ ...good, ...fields }) as typeof good)
    const perceiver = functionPolicy(() => [good, ...wrong])
    const reasoner = functionPolicy(() => '<answer>B</answer>')
    const groupSize = 1 + wrong.length
    using batch = await new PraGrpo({ perceiver, reasoner, device, groupSize }).rollout([sample()])
    expect(batch.items.map(({ error }) => error !== undefined)).toEqual([
      false,
      ...wrong.map(() => true),
    ])
    expect(batch.tokens).toEqual(Int32Array.of(1, 2))
    expect(batch.items[1]!.error!.message).toMatch(/tokens that are no list of integers/)
  })

  test('recordings of wrong shapes', async () => {
    const line = { role: 'reasoner', prompt: 'p', completions: [{ text: 'three' }] }
    for (const wrong of [
      null,
      7,
      { ...line, completions: [null] },
      { ...line, completions: {} },
      { ...line, completions: [{ text: 'a', tokens: { length: 2 } }] },
      { ...line, completions: [{ text: 'a', logProbs: 'x' }] },
      { ...line, completions: [{ text: 'a', toolCalls: [null] }] },
      { ...line, images: [7] },
      { ...line, system: 7 },
    ]) {
      const path = file('recording.jsonl', `${JSON.stringify(line)}\n${JSON.stringify(wrong)}\n`)
      await refused(RecordedPolicy.load(path), 'ERR_FORMAT', /recording\.jsonl:2: /)
    }
    const missing = { ...line, completions: [{ text: 'a', tokens: [1], logProbs: [null] }] }
    const policy = await RecordedPolicy.load(file('recording.jsonl', JSON.stringify(missing)))
    const request = { role: 'reasoner', system: '', prompt: 'p', images: [] } as const
    expect((await policy.generate(request))[0]!.logProbs).toEqual([Number.NaN])
  })

  test('batches of wrong shapes', async () => {
    const path = join(folder, 'batch.safetensors')
    const ints = (...values: number[]) => device.tensor(Int32Array.from(values), [values.length])
    const item = { sample: 0, completion: { text: 'a' }, reward: 1 }
    const tensors: Record<string, Tensor> = {
      rewards: device.zeros([1]),
      advantages: device.zeros([1]),
      groups: ints(0),
      tokens: ints(1, 2),
      cu_seqlens: ints(0, 2),
    }
    const header = {
      format: 'p2r-rollouts',
      version: '1',
      role: 'perceiver',
      metrics: '{"faults":{}}',
      items: JSON.stringify([item]),
    }
    const loads = async (more: Record<string, Tensor>, other: Record<string, string> = {}) => {
      await saveTensors(path, { ...tensors, ...more }, { ...header, ...other })
      return loadRollouts(path, device)
    }
    using good = await loads({})
    expect(good.cuSeqlens).toEqual(Int32Array.of(0, 2))
    for (const more of [
      { advantages: device.zeros([7, 3]) },
      { rewards: device.zeros([1], 'f16') },
      { groups: ints(0, 1) },
      { cu_seqlens: ints(0, 9) },
      { cu_seqlens: ints(1, 2) },
      { cu_seqlens: ints(0, 1, 2) },
      { tokens: ints(-1, 2) },
      { mask: device.zeros([3], 'u8') },
      { mask: device.tensor(Uint8Array.of(0, 2), [2]) },
      { old_log_probs: device.zeros([2, 1]) },
    ])
      await refused(loads(more), 'ERR_FORMAT', /batch\.safetensors: /)
    for (const other of [
      { items: '[null]' },
      { items: '[]' },
      { items: JSON.stringify([{ ...item, completion: null }]) },
      { items: JSON.stringify([{ ...item, sample: 'x' }]) },
      { items: JSON.stringify([{ ...item, request: 5 }]) },
      { items: JSON.stringify([{ ...item, error: {} }]) },
      { items: '{' },
      { metrics: '7' },
      { metrics: '{"faults":{"overlap":"x"}}' },
      { requests: '[null]' },
      { requests: '[{"system":"","prompt":"","images":[{"sha256":"ab","height":-1,"width":2}]}]' },
      { sampling: '{"temperature":"hot"}' },
    ])
      await refused(
        loads({}, other as Record<string, string>),
        'ERR_FORMAT',
        /batch\.safetensors: /,
      )
  })
})

describe('servers', () => {
  const apiKey = 'sk-very-secret-key'
  const request = { role: 'reasoner', system: '', prompt: 'How many?', images: [] } as const
  const policyOf = (baseURL: string) =>
    new OpenAIPolicy({ baseURL, model: 'm', apiKey, maxRetries: 0 })
  const failure = (policy: OpenAIPolicy) =>
    policy.generate(request).then(
      () => new Error('answered'),
      (error: Error) => error,
    )

  test('a redirect to another server is not followed', async () => {
    const asked: string[] = []
    const other = createServer((message, response) => {
      asked.push(message.url ?? '')
      response.end('{}')
    })
    await new Promise<void>((resolve) => other.listen(0, '127.0.0.1', resolve))
    const { port } = other.address() as AddressInfo
    try {
      for (const status of [301, 302, 303, 307, 308]) {
        const headers = { location: `http://127.0.0.1:${port}/v1/chat/completions` }
        const server = await chatServer((_, response) => response.writeHead(status, headers).end())
        const error = await failure(policyOf(server.baseURL))
        await server.close()
        expect(error).toMatchObject({ name: 'P2RError', code: 'ERR_POLICY' })
        expect(error.message).toMatch(/redirects to http:\/\/127\.0\.0\.1:\d+, another server/)
      }
      await sleep(50)
      expect(asked).toEqual([])
    } finally {
      other.close()
    }
  })

  test('a redirect of the same server is followed, but not for ever', async () => {
    const answer = { choices: [{ message: { content: 'three' }, finish_reason: 'stop' }] }
    const redirect = (_: unknown, response: import('node:http').ServerResponse) =>
      response.writeHead(307, { location: '/v1/chat/completions' }).end()
    const server = await chatServer(redirect, (_, response) =>
      response.writeHead(200, { 'content-type': 'application/json' }).end(JSON.stringify(answer)),
    )
    const circle = await chatServer(redirect)
    const policy = new OpenAIPolicy({ baseURL: server.baseURL, model: 'm', tokens: false })
    expect((await policy.generate(request))[0]!.text).toBe('three')
    expect((await failure(policyOf(circle.baseURL))).message).toMatch(/redirects to/)
    expect(circle.requests).toHaveLength(4)
    await server.close()
    await circle.close()
  })

  test('a key that the server repeats is in no message, cause or text', async () => {
    for (const status of [400, 401, 500]) {
      const said = { error: { message: `no such key: ${apiKey}` } }
      for (const body of [JSON.stringify(said), `${apiKey} `.repeat(100)]) {
        const server = await chatServer((_, response) => response.writeHead(status).end(body))
        const error = await failure(policyOf(server.baseURL))
        await server.close()
        expect(error.message).toContain('[key]')
        expect(inspect(error, { depth: 10, showHidden: true })).not.toContain(apiKey)
      }
    }
    const choice = { message: { content: `Your key is ${apiKey}.` }, finish_reason: 'stop' }
    const answer = JSON.stringify({ choices: [choice] })
    const server = await chatServer((_, response) =>
      response.writeHead(200, { 'content-type': 'application/json' }).end(answer),
    )
    const [completion] = await policyOf(server.baseURL).generate(request)
    await server.close()
    expect(completion!.text).toBe('Your key is [key].')
  })

  test('a password in an address is refused, and not repeated', () => {
    const make = () => policyOf('http://user:PASSWORD@localhost:1/v1')
    expect(make).toThrow(/must not hold a password/)
    expect(make).not.toThrow(/PASSWORD/)
  })
})
