// Benchmarks by name and methods side by side, by the command against a server on loopback; samples are made up.
import { existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import fc from 'fast-check'
import sharp from 'sharp'
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest'
import { bootstrap, meanAndStd, pairedBootstrap, wilson } from '../dist/lib/cli/statistics.js'
import { readSpan, readTsv } from '../dist/lib/cli/tsv.js'
import { type ChatServer, call, callsTools, chatServer, type Reply, says } from './chat_server.js'
import { results, start } from './command.js'

let folder: string
let server: ChatServer | undefined
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'p2r-benchmarks-'))
})
afterEach(async () => {
  await server?.close()
  server = undefined
})
afterAll(() => rm(folder, { recursive: true }))

const png = (value: number): Promise<Buffer> =>
  sharp({ create: { width: 80, height: 60, channels: 3, background: { r: value, g: 9, b: 9 } } })
    .png()
    .toBuffer()
const at = (...parts: string[]): string => {
  const path = join(folder, ...parts)
  mkdirSync(join(path, '..'), { recursive: true })
  return path
}
const evaluate = async (data: string, ...args: string[]) => {
  const all = ['evaluate', data, '--base-url', server!.baseURL, '--model', 'm', ...args]
  return start(folder, ...all, '--min-pixels', '1024').ended
}
/** A perceiver without boxes, and a reasoner that says what the question asks it to say. */
const obliging: Reply = (request, response) =>
  says(
    /JSON/.test(request.prompt)
      ? '[]'
      : `<answer>${/say (\S+)/.exec(request.prompt)?.[1]}</answer>`,
  )(request, response)
const cells = (out: string): string[][] => out.split('\n').map((line) => line.trim().split(/ {2,}/))
/** Categories with questions, correct and accuracy. */
const scores = (out: string): string[][] =>
  cells(out)
    .filter((row) => row.length > 5 && row[0] !== 'category')
    .map((row) => row.slice(0, 4))

describe('V-Star', () => {
  const questions = [
    { text: 'Which colour? say A', label: 'A', category: 'direct_attributes' },
    { text: 'Which material? say B', label: 'A', category: 'direct_attributes' },
    { text: 'Which side? say A', label: 'A', category: 'relative_position' },
  ]

  test('as JSON Lines beside the folders of images', async () => {
    for (const [i, { category }] of questions.entries())
      writeFileSync(at('vstar', category, `sa_${i}.jpg`), await png(i))
    const rows = questions.map((row, i) => ({
      ...row,
      text: `${row.text}\n(A) x\n(B) y\nAnswer with the option's letter from the given choices directly.`,
      image: `${row.category}/sa_${i}.jpg`,
      question_id: i,
    }))
    writeFileSync(
      at('vstar', 'test_questions.jsonl'),
      rows.map((row) => JSON.stringify(row)).join('\n'),
    )
    server = await chatServer(obliging)
    const { code, out, err } = await evaluate('vstar', '--benchmark', 'vstar', '--json', 'v.json')
    expect({ code, err }).toEqual({ code: 0, err: '' })
    // In the paper's words and order.
    expect(scores(out)).toEqual([
      ['Attribute', '2', '1', '50.0 %'],
      ['Spatial', '1', '1', '100.0 %'],
      ['all', '3', '2', '66.7 %'],
    ])
    expect(out).toMatch(/95 % intervals are Wilson scores/)
    const { overall } = JSON.parse(readFileSync(join(folder, 'v.json'), 'utf8'))
    expect(overall.interval).toMatchObject({ method: 'wilson', low: expect.closeTo(20.77, 2) })
    expect(results(join(folder, 'vstar.results.jsonl'))).toHaveLength(3)
    // Again: nothing is asked; as another benchmark the results are refused.
    const asked = server.requests.length
    expect((await evaluate('vstar', '--benchmark', 'vstar')).code).toBe(0)
    expect(server.requests.length).toBe(asked)
  })

  test('as folders of an image and a JSON each, the first option right', async () => {
    for (let i = 0; i < 3; i++) {
      writeFileSync(at('plain', 'direct_attributes', `sa_${i}.jpg`), await png(i))
      writeFileSync(
        at('plain', 'direct_attributes', `sa_${i}.json`),
        JSON.stringify({
          target_object: ['sign'],
          bbox: [[1, 2, 3, 4]],
          question: 'say C',
          options: ['right', 'wrong', 'worse'],
        }),
      )
    }
    server = await chatServer(obliging)
    const { code, out } = await evaluate('plain', '--benchmark', 'vstar')
    expect(code).toBe(0)
    const made = results(join(folder, 'plain.results.jsonl')).sort((a, b) => a.line - b.line)
    expect(made.map(({ truth }) => truth)).toEqual(['A', 'B', 'C'])
    for (const { question, truth } of made) expect(question).toContain(`${truth}. right`)
    expect(scores(out)).toEqual([
      ['Attribute', '3', '1', '33.3 %'],
      ['all', '3', '1', '33.3 %'],
    ])
  })

  test('as VLMEvalKit’s table', async () => {
    const image = (await png(1)).toString('base64')
    writeFileSync(
      at('VStarBench.tsv'),
      [
        'index\timage\tquestion\tA\tB\tanswer\tcategory',
        `0\t${image}\t"say ""B"", a\nsecond line"\tred\tblue\tB\tdirect_attributes`,
        // A short image is the index of the row that has it.
        '1\t0\tsay A\tleft\tright\tA\trelative_position\r',
        '',
      ].join('\n'),
    )
    server = await chatServer((request, response) =>
      says(/JSON/.test(request.prompt) ? '[]' : '<answer>B</answer>')(request, response),
    )
    const { code, out } = await evaluate('VStarBench.tsv', '--benchmark', 'vstar')
    expect(code).toBe(0)
    expect(scores(out)).toEqual([
      ['Attribute', '1', '1', '100.0 %'],
      ['Spatial', '1', '0', '0.0 %'],
      ['all', '2', '1', '50.0 %'],
    ])
    const made = results(join(folder, 'VStarBench.results.jsonl')).sort((a, b) => a.line - b.line)
    expect(made[0].question).toBe('say "B", a\nsecond line\nOptions:\nA. red\nB. blue')
    expect(made.map((row) => row.image)).toEqual(['0', '0'])
    const [first, second] = server.requests.map(({ images }) => images[0])
    expect(first!.equals(second!)).toBe(true)
  })
})

test('HR-Bench: FSP and FCP over the four orders of the options', async () => {
  const options = ['red', 'green', 'blue', 'white']
  const image = (await png(7)).toString('base64')
  const rows = ['index\tquestion\tA\tB\tC\tD\tanswer\tcategory\tcycle_category\timage']
  // Question 0 is answered by 'red' in every order, question 1 by 'A'.
  for (const [q, category] of ['single', 'single', 'cross'].entries())
    for (let turn = 0; turn < 4; turn++) {
      const turned = options.map((_, i) => options[(i + turn) % 4])
      const truth = 'ABCD'[turned.indexOf('red')]
      const index = rows.length - 1
      rows.push(
        `${index}\tq${q}: say ${q === 0 ? 'red' : 'A'}\t${turned.join('\t')}\t${truth}\t${category}\tcycle_${turn}\t${turn ? index - turn : image}`,
      )
    }
  writeFileSync(at('hr', 'hr_bench_4k.tsv'), `${rows.join('\n')}\n`)
  server = await chatServer((request, response) => {
    const letter = /([A-D])\. red/.exec(request.prompt)?.[1]
    const said = /say red/.test(request.prompt) ? letter : 'A'
    says(/JSON/.test(request.prompt) ? '[]' : `<answer>${said}</answer>`)(request, response)
  })
  const { code, out, err } = await evaluate('hr', '--benchmark', 'hr-bench-4k', '--json', 'hr.json')
  expect({ code, err }).toEqual({ code: 0, err: '' })
  expect(scores(out)).toEqual([
    ['FSP', '8', '5', '62.5 %'],
    ['FCP', '4', '1', '25.0 %'],
    ['all', '12', '6', '50.0 %'],
  ])
  expect(out).toMatch(/all orders/)
  expect(out).toMatch(/percentiles of a bootstrap over questions/)
  const { overall, categories } = JSON.parse(readFileSync(join(folder, 'hr.json'), 'utf8'))
  // Right in all four orders: one question of two, and none of one.
  expect(categories.FSP.allOrders).toBe(50)
  expect(categories.FCP.allOrders).toBe(0)
  expect(overall.allOrders).toBeCloseTo(100 / 3, 9)
  // Three questions, not twelve: the interval has their spread.
  expect(overall.interval).toEqual({ low: 25, high: 100, method: 'bootstrap' })
  // The other size is another file.
  expect(await evaluate('hr', '--benchmark', 'hr-bench-8k')).toMatchObject({
    code: 2,
    err: expect.stringMatching(/does not hold hr-bench-8k.*hr_bench_8k.tsv.*Parquet/),
  })
})

test('MME-RealWorld-Lite: tasks, domains and their means', async () => {
  const entry = (Task: string, Subtask: string, said: string, truth: string, i: number) => ({
    Question_id: `${Task}/${Subtask}/${i}`,
    Image: `d/i${i}.png`,
    Text: `say ${said}`,
    'Question Type': 'Multiple Choice',
    'Answer choices': ['(A) 1', '(B) 2', '(C) 3', '(D) 4', '(E) The image does not feature it.'],
    'Ground truth': truth,
    Category: 'count',
    Subtask,
    Task,
  })
  const rows = [
    entry('Perception', 'Monitoring', 'E', 'E', 0),
    entry('Perception', 'OCR with Complex Context', 'A', 'A', 1),
    entry('Perception', 'OCR with Complex Context', 'A', 'B', 2),
    entry('Perception', 'OCR with Complex Context', 'A', 'B', 3),
    entry('Reasoning', 'Autonomous_Driving', 'C', 'C', 4),
  ]
  for (const { Image } of rows) writeFileSync(at('mme', 'data', 'imgs', Image), await png(3))
  writeFileSync(at('mme', 'data', 'MME-RealWorld-Lite.json'), JSON.stringify(rows))
  server = await chatServer(obliging)
  const { code, out, err } = await evaluate('mme', '--benchmark', 'mme-realworld-lite')
  expect({ code, err }).toEqual({ code: 0, err: '' })
  expect(scores(out)).toEqual([
    ['Perception/OCR', '3', '1', '33.3 %'],
    ['Perception/MO', '1', '1', '100.0 %'],
    ['Reasoning/AD', '1', '1', '100.0 %'],
    ['Perception', '4', '2', '50.0 %'],
    ['Reasoning', '1', '1', '100.0 %'],
    ['all', '5', '3', '60.0 %'],
  ])
  expect(out).toMatch(/Perception, mean of categories +66.7 %/)
  // VLMEvalKit's table of the same.
  const image = (await png(3)).toString('base64')
  writeFileSync(
    at('mme-table', 'MME-RealWorld-Lite.tsv'),
    [
      'index\timage\tquestion\tmulti-choice options\tanswer\tcategory\tl2-category',
      `0\t${image}\tsay B\t"['(A) it\\'s 1', ""(B) 2""]"\tB\tperception/Remote Sensing\tcount`,
    ].join('\n'),
  )
  const table = await evaluate('mme-table', '--benchmark', 'mme-realworld-lite')
  expect(scores(table.out)[0]).toEqual(['Perception/RS', '1', '1', '100.0 %'])
  expect(results(join(folder, 'mme-table.results.jsonl'))[0].question).toBe(
    "say B\nOptions:\n(A) it's 1\n(B) 2",
  )
})

test('ZoomBench: letters, numbers, and words that a model judges', async () => {
  writeFileSync(at('zb', 'images', 'image_0.png'), await png(1))
  const entry = (query: string, response: string) => ({
    images: ['images/image_0.png'],
    crop_images: [],
    query: `<image>${query}`,
    response,
  })
  writeFileSync(
    at('zb', 'zoombench.json'),
    JSON.stringify([
      entry('say C\n(A) 0\n(B) 2\n(C) 1', 'C'),
      entry('say 4', '4'),
      entry('say stop', 'STOP'),
    ]),
  )
  server = await chatServer((request, response) =>
    (/Reply "Yes"/.test(request.prompt) ? says('Yes') : obliging)(request, response),
  )
  const { code, out, err } = await evaluate('zb', '--benchmark', 'zoombench')
  expect({ code, err }).toEqual({ code: 0, err: '' })
  expect(scores(out).at(-1)).toEqual(['all', '3', '3', '100.0 %'])
  const made = results(join(folder, 'zb.results.jsonl')).sort((a, b) => a.line - b.line)
  expect(made[0].question).toBe('say C\n(A) 0\n(B) 2\n(C) 1')
})

test('VisualProbe: hard, medium and easy', async () => {
  for (const [level, count] of [
    ['Easy', 2],
    ['Hard', 1],
  ] as const) {
    writeFileSync(at('vp', `VisualProbe_${level}`, 'a.png'), await png(1))
    const entry = (image: string) => ({
      images: [image],
      question: '<image>\nsay STOP',
      answer: 'Stop',
    })
    // Relative to the folder, or to the one above it.
    writeFileSync(
      at('vp', `VisualProbe_${level}`, 'val.json'),
      JSON.stringify([entry('a.png'), entry(`VisualProbe_${level}/a.png`)].slice(0, count)),
    )
  }
  server = await chatServer((request, response) =>
    (/Reply "Yes"/.test(request.prompt) ? says('Yes') : obliging)(request, response),
  )
  const { code, out, err } = await evaluate('vp', '--benchmark', 'visualprobe')
  expect({ code, err }).toEqual({ code: 0, err: '' })
  expect(scores(out)).toEqual([
    ['hard', '1', '1', '100.0 %'],
    ['easy', '2', '2', '100.0 %'],
    ['all', '3', '3', '100.0 %'],
  ])
  const one = await evaluate('vp/VisualProbe_Hard', '--benchmark', 'visualprobe')
  expect(scores(one.out)).toHaveLength(2)
  // A folder whose name has a dot.
  renameSync(join(folder, 'vp'), join(folder, 'vp.v1'))
  const renamed = await evaluate('vp.v1/', '--benchmark', 'visualprobe', '--out', 'vp1.jsonl')
  expect(scores(renamed.out)).toHaveLength(3)
})

test('files that are none', async () => {
  server = await chatServer(obliging)
  writeFileSync(at('bad', 'zoombench.json'), '{"images": []}')
  writeFileSync(at('worse', 'zoombench.json'), '[{')
  writeFileSync(at('half', 'VStarBench.tsv'), 'index\tquestion\n1\t"never ends')
  writeFileSync(at('lonely', 'direct_attributes', 'sa_1.json'), '{}')
  writeFileSync(at('table.csv'), 'a,b')
  for (const [data, name, message] of [
    ['nowhere', 'vstar', /there is no nowhere/],
    ['bad', 'zoombench', /must be a list of questions/],
    ['worse', 'zoombench', /is not JSON/],
    ['half', 'vstar', /ends within a field in quotes/],
    ['lonely', 'vstar', /has no image beside it/],
    ['table.csv', 'vstar', /end in .tsv, .json or .jsonl/],
    ['vstar', 'v-star', /Allowed choices are vstar, hr-bench-4k/],
  ] as const) {
    const { code, err } = await evaluate(data, '--benchmark', name)
    expect(code, data).toBeGreaterThan(0)
    expect(err).toMatch(message)
  }
  expect(server.requests).toHaveLength(0)
})

describe('methods and seeds', () => {
  const write = async (name: string, count: number): Promise<string> => {
    writeFileSync(at(`${name}.png`), await png(1))
    const rows = Array.from({ length: count }, (_, i) => ({
      image: `${name}.png`,
      question: `${i}: say ${i % 2 ? 'A' : 'B'}`,
      answer: 'A',
    }))
    writeFileSync(at(`${name}.jsonl`), rows.map((row) => JSON.stringify(row)).join('\n'))
    return `${name}.jsonl`
  }
  const area = async (images: readonly Buffer[]): Promise<number> => {
    const sizes = await Promise.all(images.map((image) => sharp(image).metadata()))
    return sizes.reduce((sum, { width, height }) => sum + width * height, 0)
  }

  test('both methods by one command, with equal budgets', async () => {
    const data = await write('both', 6)
    // With the tool it is always right, after one crop.
    server = await chatServer((request, response) => {
      if (!request.body.tools) return obliging(request, response)
      return request.shown.length < 2
        ? callsTools(call('image_zoom_in_tool', { bbox_2d: [0, 0, 500, 500] }))(request, response)
        : says('<answer>A</answer>')(request, response)
    })
    const args = ['--method', 'both', '--json', 'both.json', '--pixel-budget', '50000']
    const { code, out, err } = await evaluate(data, ...args)
    expect({ code, err }).toEqual({ code: 0, err: '' })
    expect(scores(out).filter(([name]) => name === 'all')).toEqual([
      ['all', '6', '3', '50.0 %'],
      ['all', '6', '3', '50.0 %'],
      ['all', '6', '6', '100.0 %'],
      ['all', '6', '6', '100.0 %'],
    ])
    expect(out).toMatch(
      /zoom less two-stage: \+50.0 points on 6 questions, 95 % interval \d.* \(paired bootstrap/,
    )
    const { methods, comparison } = JSON.parse(readFileSync(join(folder, 'both.json'), 'utf8'))
    expect(comparison).toMatchObject({ questions: 6, difference: 50 })
    expect(methods.zoom.overall).toMatchObject({ requests: 2, outOfTurns: 0 })
    // What each was shown for a question is within the budget, and no image beyond its share.
    const own = { 'two-stage': [] as Buffer[], zoom: [] as Buffer[] }
    for (const { prompt, shown, body } of server.requests) {
      if (!/^Question: 0:/.test(prompt)) continue
      if (body.tools) own.zoom = shown
      else own['two-stage'].push(...shown)
    }
    for (const [method, images] of Object.entries(own)) {
      expect(await area(images)).toBeLessThanOrEqual(50_000)
      for (const image of images) expect(await area([image])).toBeLessThanOrEqual(10_000)
      const [first] = results(
        join(folder, method === 'zoom' ? 'both.zoom.results.jsonl' : 'both.results.jsonl'),
      ).filter(({ line }) => line === 1)
      expect(first.pixels).toBe(await area(images))
    }
    // Each has its own file, and another method's is refused.
    const other = await evaluate(data, '--method', 'zoom', '--out', 'both.results.jsonl')
    expect(other).toMatchObject({
      code: 2,
      err: expect.stringMatching(/other settings \(method: "two-stage", now "zoom"/),
    })
    const again = await evaluate(data, ...args)
    expect(again).toMatchObject({ code: 0, out })
  })

  test('seeds: a run each, with mean and standard deviation', async () => {
    const data = await write('seeds', 4)
    // Seed 1 gets one question more.
    server = await chatServer((request, response) => {
      const lucky = request.body.seed === 1 && /^Question: 0:/.test(request.prompt)
      return (lucky && !/JSON/.test(request.prompt) ? says('<answer>A</answer>') : obliging)(
        request,
        response,
      )
    })
    const { code, out, err } = await evaluate(data, '--seeds', '1,2,3', '--json', 'seeds.json')
    expect({ code, err }).toEqual({ code: 0, err: '' })
    expect(new Set(server.requests.map(({ body }) => body.seed))).toEqual(new Set([1, 2, 3]))
    const { overall } = JSON.parse(readFileSync(join(folder, 'seeds.json'), 'utf8'))
    expect(overall).toMatchObject({ questions: 4, correct: 7, interval: { method: 'bootstrap' } })
    expect(overall.accuracy).toBeCloseTo((75 + 50 + 50) / 3, 9)
    expect(overall.std).toBeCloseTo(meanAndStd([75, 50, 50]).std, 9)
    expect(out).toMatch(/all +4 +7 +58.3 ± 14.4 %/)
    for (const seed of [1, 2, 3])
      expect(existsSync(join(folder, `seeds.seed-${seed}.results.jsonl`))).toBe(true)
    expect(await evaluate(data, '--seeds', '1,1')).toMatchObject({ code: 2 })
    expect(await evaluate(data, '--seeds', '1,x')).toMatchObject({ code: 2 })
  })

  test('turns that run out are counted, and a budget that no image fits is refused', async () => {
    const data = await write('out', 2)
    server = await chatServer(callsTools(call('image_zoom_in_tool', { bbox_2d: [0, 0, 9, 9] })))
    const { code, out, err } = await evaluate(data, '--method', 'zoom', '--max-turns', '2')
    expect(code).toBe(0)
    expect(out).toMatch(/all +2 +0 +0.0 %/)
    expect(err).toMatch(/2 of 2 questions ran out of turns/)
    expect(await evaluate(data, '--pixel-budget', '5000', '--out', 'x.jsonl')).toMatchObject({
      code: 2,
      err: expect.stringMatching(/--pixel-budget must be at least 5 times --min-pixels, 5120/),
    })
  })

  test('answer by an agent', async () => {
    const image = at('answer.png')
    writeFileSync(image, await png(5))
    server = await chatServer(
      callsTools(call('image_zoom_in_tool', { bbox_2d: [0, 0, 500, 500] })),
      says('<answer>B</answer>'),
      callsTools(call('image_zoom_in_tool', { bbox_2d: [0, 0, 500, 500] })),
    )
    const args = ['answer', image, 'Which?', '--base-url', server.baseURL, '--model', 'm']
    const zoom = [...args, '--method', 'zoom', '--json', '--out', 'crops']
    const { code, out, err } = await start(folder, ...zoom).ended
    expect({ code, err }).toEqual({ code: 0, err: '' })
    expect(JSON.parse(out)).toMatchObject({
      answer: 'B',
      requests: 2,
      turns: [
        {
          toolCalls: [{ name: 'image_zoom_in_tool' }],
          results: [expect.stringMatching(/Image 1/)],
        },
      ],
      files: expect.arrayContaining([expect.stringMatching(/crop-1.png$/)]),
    })
    const none = await start(folder, ...args, '--method', 'zoom', '--max-turns', '2').ended
    expect(none).toMatchObject({
      code: 1,
      err: expect.stringMatching(/no answer after 2 turns; see --max-turns/),
    })
  })
})

describe('statistics', () => {
  test('Wilson’s interval', () => {
    // Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for (const [x, n, low, high] of [
      [81, 263, 0.2553, 0.3662],
      [15, 148, 0.0624, 0.1605],
      [0, 20, 0, 0.1611],
      [1, 29, 0.0061, 0.1718],
    ] as const) {
      const interval = wilson(x, n)
      expect(interval.low).toBeCloseTo(low, 4)
      expect(interval.high).toBeCloseTo(high, 4)
    }
    expect(wilson(29, 29).low).toBeCloseTo(1 - wilson(0, 29).high, 12)
    expect(wilson(29, 29).high).toBe(1)
  })

  test('the bootstrap covers as it should, and resamples whole questions', () => {
    // One answer a question: about Wilson's. Four equal answers a question: as wide as one answer each.
    const single = Array.from({ length: 200 }, (_, i) => ({ sum: +(i < 140), count: 1 }))
    const { low, high } = bootstrap(single)
    const expected = wilson(140, 200)
    expect(low).toBeCloseTo(expected.low, 1.7)
    expect(high).toBeCloseTo(expected.high, 1.7)
    expect(bootstrap(single.map(({ sum }) => ({ sum: 4 * sum, count: 4 })))).toEqual(
      bootstrap(single),
    )
    // Pairs that always differ by the same have no spread.
    const pairs = [...Array(30)].map(
      () =>
        [
          { sum: 0, count: 1 },
          { sum: 2, count: 2 },
        ] as const,
    )
    expect(pairedBootstrap(pairs)).toEqual({ low: 1, high: 1 })
  })

  test('mean and sample standard deviation', () => {
    expect(meanAndStd([2, 4, 4, 4, 5, 5, 7, 9])).toEqual({
      mean: 5,
      std: expect.closeTo(Math.sqrt(32 / 7), 12),
    })
    expect(meanAndStd([3])).toEqual({ mean: 3, std: 0 })
  })
})

test('tables of tab-separated values are read as they were written', async () => {
  const path = at('random.tsv')
  const text = fc.string({ unit: fc.constantFrom('a', '"', '\t', '\n', '\r', 'é', ' ', '0') })
  const quoted = (field: string): string =>
    /["\t\n\r]/.test(field) ? `"${field.replaceAll('"', '""')}"` : field
  await fc.assert(
    fc.asyncProperty(
      fc.array(fc.tuple(text, fc.nat(200), text), { minLength: 1, maxLength: 6 }),
      fc.constantFrom('\n', '\r\n'),
      fc.boolean(),
      async (rows, end, last) => {
        const all = rows.map(([a, length, b], i) => [`${i}${a}`, 'Q'.repeat(length), b] as const)
        const lines = [['id', 'image', 'more'], ...all].map((row) => row.map(quoted).join('\t'))
        writeFileSync(path, lines.join(end) + (last ? end : ''))
        const made: string[][] = []
        for await (const { fields, large } of readTsv(path, 'image')) {
          const image = large ? (await readSpan(large)).toString() : fields.get('image')!
          expect(!!large).toBe(image.length > 64)
          made.push([fields.get('id')!, image, fields.get('more')!])
        }
        expect(made).toEqual(all.map((row) => [...row]))
      },
    ),
    { numRuns: 150 },
  )
  // A field larger than a piece of the file, in quotes.
  const large = 'A'.repeat((5 << 20) + 3)
  writeFileSync(path, `index\timage\tx\n1\t"${large}"\ty\r\n2\t${large}\tz`)
  const made = []
  for await (const { fields, large: span } of readTsv(path, 'image'))
    made.push([fields.get('index'), fields.get('x'), (await readSpan(span!)).toString() === large])
  expect(made).toEqual([
    ['1', 'y', true],
    ['2', 'z', true],
  ])
})
