// The command against a server on loopback.
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import {
  collectEvidence,
  loadImage,
  loadTensors,
  openDevice,
  parseBoxes,
  saveImage,
} from 'p2r-kernels'
import sharp from 'sharp'
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from 'vitest'
import { loadDigits } from '../dist/examples/mini-p2r/digits.js'
import { cellOf, Perceiver, Reasoner } from '../dist/examples/mini-p2r/policy.js'
import { Rng } from '../dist/examples/mini-p2r/rng.js'
import {
  CANVAS,
  Canvases,
  CELL,
  COLOURS,
  LATTICE,
  OVERVIEW,
  THUMBNAIL,
} from '../dist/examples/mini-p2r/scene.js'
import { copyParams } from '../dist/examples/mini-p2r/vit.js'
import {
  type ChatRequest,
  type ChatServer,
  chatServer,
  choices,
  fails,
  type Reply,
  says,
  send,
} from './chat_server.js'
import { type Ended, results, start as startIn } from './command.js'

let folder: string
let server: ChatServer | undefined
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'p2r-cli-'))
})
afterEach(async () => {
  await server?.close()
  server = undefined
})
afterAll(() => rm(folder, { recursive: true }))

const start = (...args: string[]) => startIn(folder, ...args)
const run = (...args: string[]): Promise<Ended> => start(...args).ended

const boxes = '[{"bbox_2d": [0, 0, 500, 500], "label": "a"}]'
/** A perceiver that names one box, and a reasoner that says what the question asks it to say. */
const obliging = says(({ prompt }) =>
  /JSON/.test(prompt) ? boxes : `<answer>${/say (\S+)/.exec(prompt)?.[1]}</answer>`,
)

async function picture(name: string, height = 60, width = 80): Promise<string> {
  const path = join(folder, name)
  const device = openDevice('cpu')
  const data = Uint8Array.from({ length: height * width * 3 }, (_, i) => i % 251)
  await saveImage(device.tensor(data, [height, width, 3]), path)
  device.dispose()
  return path
}

describe('the command', () => {
  test('help, version and usage errors', async () => {
    const help = await run('--help')
    expect(help).toMatchObject({ code: 0, err: '' })
    for (const name of ['devices', 'answer', 'evidence', 'evaluate'])
      expect(help.out).toContain(name)
    const { version } = JSON.parse(
      readFileSync(new URL('../package.json', import.meta.url), 'utf8'),
    )
    expect(await run('--version')).toEqual({ code: 0, out: `${version}\n`, err: '' })
    const { code, out, err } = await run('evaluate')
    expect({ code, out }).toEqual({ code: 2, out: '' })
    expect(err).toMatch(/^p2r-kernels: missing required argument 'data'/)
    for (const [args, near] of [
      [['evaluate', 'a.jsonl', '--retris', '3'], '--retries'],
      [['answer', 'a.png', 'q', '--max-pixel', '9'], '--max-pixels'],
      [['evalute'], 'evaluate'],
    ] as const) {
      const misspelt = await run(...args)
      expect(misspelt.code).toBe(2)
      expect(misspelt.err).toContain(`Did you mean ${near}?`)
    }
    for (const args of [
      ['frobnicate'],
      ['answer', 'a.png', 'q', '--form', 'haiku'],
      ['answer', 'a.png', 'q', '--base-url', 'localhost:8000'],
      ['answer', 'a.png', 'q', '--concurrency', '0'],
      ['answer', 'a.png', 'q'],
    ])
      expect(await run(...args), args.join(' ')).toMatchObject({ code: 2, out: '' })
  })

  test('devices', async () => {
    expect((await run('devices')).out).toMatch(/^cpu .*GiB.*threads/)
    const { devices, cuda } = JSON.parse((await run('devices', '--json')).out)
    expect(devices[0].id).toBe('cpu')
    expect(cuda).toHaveProperty('reason')
  })

  test('evidence', async () => {
    const image = await picture('e.png')
    const text =
      '[{"bbox_2d": [100, 100, 400, 500], "label": "sign"}, {"bbox_2d": [500, 500, 900, 900]}]'
    const args = ['evidence', image, '--out', 'cut', '--max-pixels', '8192', '--min-pixels', '1024']
    const { code, out } = await run(...args, '--boxes', text)
    expect({ code, files: out.trim().split('\n').length }).toEqual({ code: 0, files: 4 })
    const device = openDevice('cpu')
    using source = await loadImage(image, device)
    const sizes = { maxPixels: 8192, minPixels: 1024 }
    using expected = collectEvidence({ image: source, boxes: parseBoxes(text), ...sizes })
    const all = [expected.annotated, ...expected.crops]
    for (const [i, name] of ['annotated.png', 'crop-1.png', 'crop-2.png'].entries()) {
      using got = await loadImage(join(folder, 'cut', name), device)
      expect(await got.read()).toEqual(await all[i]!.read())
    }
    expect(parseBoxes(readFileSync(join(folder, 'cut/boxes.json'), 'utf8'))).toEqual(expected.boxes)
    device.dispose()
    writeFileSync(join(folder, 'b.txt'), text)
    expect((await run(...args, '--boxes', '@b.txt')).code).toBe(0)
    expect(await run(...args, '--boxes', 'none')).toMatchObject({ code: 2 })
    expect(await run('evidence', 'no.png', '--boxes', text, '--out', 'cut')).toMatchObject({
      code: 1,
      err: expect.stringMatching(/no\.png.*could not be read/),
    })
  })

  test('--resize-rules, --coordinates and --rules', async () => {
    // Too low for 32 rows: by one of the rules it is shown as 32 x 384, by the other as 32 x 544.
    const image = await picture('rules.png', 12, 400)
    const sizes = { maxPixels: 65_536, minPixels: 8192 }
    const text = "{'bbox_2d': [10, 5, 200, 25], 'label': 'sign'}"
    const args = ['evidence', image, '--out', 'chosen', '--boxes', text, '--rules', 'strict']
    using device = openDevice('cpu')
    using source = await loadImage(image, device)
    const seen = new Set<string>()
    for (const rules of ['qwen-vl-utils', 'transformers'] as const)
      for (const coordinates of ['thousandths', 'absolute'] as const) {
        const more = ['--resize-rules', rules, '--coordinates', coordinates]
        const shown = ['--max-pixels', String(sizes.maxPixels), '--min-pixels', '8192']
        expect((await run(...args, ...more, ...shown)).code).toBe(0)
        const boxes = parseBoxes(text, { rules: 'strict' })
        using expected = collectEvidence({ image: source, boxes, rules, coordinates, ...sizes })
        const all = [expected.annotated, ...expected.crops]
        let shapes = ''
        for (const [i, name] of ['annotated.png', 'crop-1.png'].entries()) {
          using got = await loadImage(join(folder, 'chosen', name), device)
          expect(await got.read()).toEqual(await all[i]!.read())
          shapes += ` ${got.shape}`
        }
        seen.add(shapes)
      }
    expect(seen.size).toBe(4)
    expect((await run(...args.slice(0, -2))).err).toMatch(/there is no box in --boxes/)
    for (const wrong of ['--resize-rules', '--coordinates', '--rules'])
      expect((await run(...args, wrong, 'x')).code).toBe(2)
  })

  test('--auto-orient', async () => {
    const path = join(folder, 'turned.jpg')
    await sharp({ create: { width: 64, height: 96, channels: 3, background: 'red' } })
      .withMetadata({ orientation: 6 })
      .jpeg()
      .toFile(path)
    const box = '[{"bbox_2d": [100, 100, 400, 500], "label": "sign"}]'
    const args = ['evidence', path, '--boxes', box, '--out', 'turned', '--min-pixels', '1024']
    const shapes: number[][] = []
    using device = openDevice('cpu')
    for (const more of [[], ['--auto-orient']]) {
      expect((await run(...args, ...more)).code).toBe(0)
      shapes.push([...(await loadImage(join(folder, 'turned/annotated.png'), device)).shape])
    }
    expect(shapes).toEqual([
      [96, 64, 3],
      [64, 96, 3],
    ])
  })

  test('answer', async () => {
    const image = await picture('a.png')
    server = await chatServer(obliging)
    const args = ['answer', image, 'Now say B', '--base-url', server.baseURL, '--model', 'm']
    expect(await run(...args)).toEqual({ code: 0, out: 'B\n', err: '' })
    const { out } = await run(...args, '--json', '--out', 'shown', '--form', 'free_form')
    expect(JSON.parse(out)).toMatchObject({
      answer: 'B',
      boxes: [{ bbox2d: [0, 0, 500, 500], label: 'a' }],
      hasEvidence: true,
      perception: boxes,
    })
    expect(readdirSync(join(folder, 'shown')).sort()).toEqual([
      'annotated.png',
      'boxes.json',
      'crop-1.png',
    ])
    expect(server.requests[1]!.images.length).toBe(2)
    // Inference asks for no tokens.
    expect(server.requests[0]!.body).not.toHaveProperty('logprobs')
    // Without --model it is the only one that is served.
    expect((await run(...args.slice(0, -2))).out).toBe('B\n')
    expect(server.requests.at(-1)!.body.model).toBe('m')
    server.models.push('other')
    expect(await run(...args.slice(0, -2))).toMatchObject({
      code: 2,
      err: expect.stringMatching(/serves m, other; name the model by --model/),
    })
    await server.close()
    server = await chatServer((request, response) =>
      /JSON/.test(request.prompt)
        ? obliging(request, response)
        : send(response, 200, {
            choices: choices(/empty/.test(request.prompt) ? '' : '<answer>B').map((choice) => ({
              ...choice,
              finish_reason: /empty/.test(request.prompt) ? 'stop' : 'length',
            })),
          }),
    )
    const cut = (question: string) =>
      run('answer', image, question, '--base-url', server!.baseURL, '--model', 'm')
    expect(await cut('q')).toMatchObject({
      err: 'The limit of tokens cut off the output of the reasoner.\n',
    })
    expect(await cut('empty')).toMatchObject({
      code: 1,
      out: '',
      err: expect.stringMatching(/no answer in the reasoner's output/),
    })
    await server.close()
    expect(await run(...args, '--retries', '0')).toMatchObject({
      code: 1,
      out: '',
      err: expect.stringMatching(/^p2r-kernels: .*ECONNREFUSED/),
    })
  })
})

describe('evaluate', () => {
  const write = (name: string, rows: object[]) => {
    const path = join(folder, name)
    writeFileSync(path, rows.map((row) => `${JSON.stringify(row)}\n`).join(''))
    return path
  }

  test('V-Star’s and HR-Bench’s rows, options in every form, images by path and in base64', async () => {
    const image = await picture('v.png')
    const base64 = readFileSync(image).toString('base64')
    const end = "\nAnswer with the option's letter from the given choices directly."
    const data = write('rows.jsonl', [
      {
        question_id: 7,
        image: 'v.png',
        text: `say A\n(A) red${end}`,
        label: 'A',
        category: 'attr',
      },
      {
        index: 1,
        image: base64,
        question: 'say B',
        A: 'one',
        B: 'two',
        C: '',
        answer: 'B',
        category: 'single',
        benchmark: '4k',
      },
      {
        image: `data:image/png;base64,${base64}`,
        question: 'say C',
        options: ['x', 'B. y'],
        answer: 'B',
        category: 'single',
        benchmark: '4k',
      },
      { image: 'v.png', question: 'say 7', answer: 7, answer_form: 'na', category: 'count' },
      { image: 'v.png', question: 'say cap', options: {}, answer: 'a cap', form: 'free_form' },
    ])
    server = await chatServer((request, response) =>
      (/Yes/.test(request.prompt) ? says('Yes') : obliging)(request, response),
    )
    const { code, out, err } = await run(
      'evaluate',
      data,
      '--base-url',
      server.baseURL,
      '--model',
      'm',
      '--json',
      'summary.json',
    )
    expect({ code, err }).toEqual({ code: 0, err: '' })
    expect(out.split('\n').map((line) => line.trim().split(/ {2,}/))).toEqual([
      [
        'category',
        'questions',
        'correct',
        'accuracy',
        '95 % interval',
        'boxes',
        'Mpx',
        'requests',
        'failed',
      ],
      ['4k single', '2', '1', '50.0 %', '9.5 to 90.5', '1.00', '0.1', '2.0', '0'],
      ['all', '1', '1', '100.0 %', '20.7 to 100.0', '1.00', '0.1', '2.0', '0'],
      ['attr', '1', '1', '100.0 %', '20.7 to 100.0', '1.00', '0.1', '2.0', '0'],
      ['count', '1', '1', '100.0 %', '20.7 to 100.0', '1.00', '0.1', '2.0', '0'],
      ['all', '5', '4', '80.0 %', '37.6 to 96.4', '1.00', '0.1', '2.0', '0'],
      ['95 % intervals are Wilson scores.'],
      [''],
    ])
    const summary = JSON.parse(readFileSync(join(folder, 'summary.json'), 'utf8'))
    expect(summary.overall).toEqual({
      questions: 5,
      correct: 4,
      accuracy: 80,
      interval: { low: expect.closeTo(37.55, 2), high: expect.closeTo(96.38, 2), method: 'wilson' },
      boxes: 1,
      droppedBoxes: 0,
      // The image twice, of at least 16 times 32 x 32, and the crop.
      megapixels: expect.closeTo((2 * 128 * 160 + 128 * 160) / 1e6, 2),
      requests: 2,
      failed: 0,
      truncated: 0,
      outOfTurns: 0,
    })
    expect(summary.categories['4k single'].accuracy).toBe(50)
    const made = results(join(folder, 'rows.results.jsonl')).sort((a, b) => a.line - b.line)
    expect(made.map(({ id }) => id)).toEqual(['7', '1', '3', '4', '5'])
    expect(made.map(({ answer }) => answer)).toEqual(['A', 'B', 'C', '7', 'cap'])
    expect(made[0].question).toBe('say A\n(A) red')
    expect(made[1].question).toBe('say B\nOptions:\nA. one\nB. two')
    expect(made[2].question).toBe('say C\nOptions:\nA. x\nB. y')
  })

  test('resumes where it stopped, and retries failures', async () => {
    await picture('r.png')
    const data = write(
      'more.jsonl',
      Array.from({ length: 12 }, (_, i) => ({
        image: 'r.png',
        question: `${i}: say A`,
        answer: 'A',
      })),
    )
    let down = true
    server = await chatServer((request, response) =>
      (down && /^Question: 5:/.test(request.prompt) ? fails(400, 'not this one') : obliging)(
        request,
        response,
      ),
    )
    const args = ['evaluate', data, '--model', 'm', '--base-url', server.baseURL]
    expect((await run(...args, '--limit', '4')).code).toBe(0)
    expect(server.requests.length).toBe(8)
    // A run that was killed in the middle of a line.
    const path = join(folder, 'more.results.jsonl')
    writeFileSync(path, `${readFileSync(path, 'utf8').trimEnd()}\n{"line": 9, "ans`)
    const { code, out, err } = await run(...args)
    expect(code).toBe(1)
    expect(out).toMatch(/all +12 +11 +100.0 % +74.1 to 100.0 +1.00 +0.1 +2.0 +1\n/)
    expect(err).toMatch(/1 of 12 questions failed, first line 6: .*not this one/)
    expect(server.requests.length).toBe(8 + 7 * 2 + 1)
    expect(err).toMatch(/^Took over 4 of 12 results from .*more.results.jsonl/)
    down = false
    server.requests.length = 0
    expect(await run(...args)).toMatchObject({
      code: 0,
      err: expect.stringMatching(/^Took over 11 of 12 results from /),
    })
    expect(server.requests.length).toBe(2)
    const last = await run(...args)
    expect(last).toMatchObject({ code: 0, out: expect.stringMatching(/all +12 +12 /) })
    // Of fewer questions, the results of the others are no part of the table.
    expect((await run(...args, '--limit', '3')).out).toMatch(/all +3 +3 /)
    expect(server.requests.length).toBe(2)
    expect(new Set(results(path).map(({ line }) => line)).size).toBe(12)
  })

  test('Ctrl-C keeps the results so far, and the next run does the rest only', async () => {
    await picture('c.png')
    const rows = Array.from({ length: 40 }, (_, i) => ({
      image: 'c.png',
      question: `${i}: say A`,
      answer: 'A',
    }))
    const data = write('long.jsonl', rows)
    const slow: Reply = async (request, response) => {
      await new Promise((resolve) => setTimeout(resolve, 60))
      obliging(request, response)
    }
    let quick = false
    server = await chatServer((...a) => (quick ? obliging : slow)(...a))
    const args = [
      'evaluate',
      data,
      '--model',
      'm',
      '--base-url',
      server.baseURL,
      '--concurrency',
      '2',
    ]
    const { child, ended } = start(...args)
    const path = join(folder, 'long.results.jsonl')
    await vi.waitFor(() => expect(existsSync(path)).toBe(true), { timeout: 20_000 })
    child.kill('SIGINT')
    const { code, err } = await ended
    expect(code).toBe(130)
    expect(err).toMatch(/Stopped after \d+ of 40; run the same command to resume/)
    const done = results(path).length
    expect(done).toBeLessThan(40)
    quick = true
    server.requests.length = 0
    expect((await run(...args)).code).toBe(0)
    expect(server.requests.length).toBe(2 * (40 - done))
  })

  test('results of other settings are refused, by what differs', async () => {
    await picture('s.png')
    const rows = [{ image: 's.png', question: 'say A', answer: 'A' }]
    const data = write('settings.jsonl', rows)
    server = await chatServer(obliging)
    const other = await chatServer(obliging)
    const args = ['evaluate', data, '--model', 'm', '--base-url', server.baseURL]
    expect(await run(...args)).toMatchObject({ code: 0, err: '' })
    // What results do not depend on may change.
    const same = ['--timeout', '9', '--retries', '1', '--concurrency', '2', '--json', 's.json']
    expect(await run(...args, ...same)).toMatchObject({
      code: 0,
      err: expect.stringMatching(/^Took over 1 of 1 results from /),
    })
    const changed: [string[], RegExp][] = [
      [['--model', 'n'], /perceiver: .*"m".*, now .*"n".*; reasoner: /],
      [['--base-url', other.baseURL], new RegExp(`now .*${other.baseURL}`)],
      [['--temperature', '0.5'], /temperature: 0, now 0.5/],
      [['--rules', 'strict'], /rules: "reference", now "strict"/],
      [['--form', 'na'], /form: "mca", now "na"/],
      [['--max-pixels', '99999'], /maxPixels: 4194304, now 99999/],
      [['--min-pixels', '9999'], /minPixels: 16384, now 9999/],
      [['--max-evidence', '1'], /maxEvidence: 3, now 1/],
      [['--padding', '0.2'], /padding: 0.1, now 0.2/],
      [['--resize-rules', 'transformers'], /resizeRules: "qwen-vl-utils", now/],
      [['--coordinates', 'absolute'], /coordinates: "thousandths", now/],
      [['--auto-orient'], /autoOrient: false, now true/],
      [['--image-format', 'png'], /imageFormat: "jpeg", now "png"/],
      [['--no-thinking'], /thinking: true, now false/],
    ]
    const all = await run(...args, ...changed.flatMap(([more]) => more))
    for (const [, message] of changed) expect(all.err).toMatch(message)
    for (const [more, message] of [
      [['--reasoner-model', 'n'], /\(reasoner: [^;]*"m"[^;]*, now [^;]*"n"[^;]*\); name another/],
      [['--reproduction'], /\(reproduction: none, now true\)/],
    ] as const) {
      const { code, out, err } = await run(...args, ...more)
      expect({ code, out }).toEqual({ code: 2, out: '' })
      expect(err).toMatch(/settings.results.jsonl holds results of other settings/)
      expect(err).toMatch(message)
    }
    await other.close()
    expect(server.requests.length).toBe(2)

    // Another picture under the same question, as in HR-Bench 4K and 8K.
    await picture('t.png')
    write('settings.jsonl', [{ ...rows[0], image: 't.png' }])
    expect((await run(...args)).err).toMatch(/line 1 has another image/)
    write('settings.jsonl', rows)
    const path = join(folder, 'settings.results.jsonl')
    const [{ settings, ...result }] = results(path)
    expect(settings).toMatchObject({
      perceiver: { url: [server.baseURL], model: 'm' },
      padding: 0.1,
    })
    writeFileSync(path, `${JSON.stringify(result)}\n`)
    expect(await run(...args)).toMatchObject({
      code: 2,
      err: expect.stringMatching(/does not record the settings of its results/),
    })
  })

  test('--reproduction and --stream', async () => {
    await picture('p.png')
    const data = write('paper.jsonl', [{ image: 'p.png', question: 'say A', answer: 'A' }])
    server = await chatServer(({ prompt }, response) => {
      response.writeHead(200, { 'content-type': 'text/event-stream' })
      const content = /JSON/.test(prompt) ? boxes : '<answer>A</answer>'
      for (const choice of [{ delta: { content } }, { delta: {}, finish_reason: 'stop' }])
        response.write(`data: ${JSON.stringify({ choices: [{ index: 0, ...choice }] })}\n\n`)
      response.end('data: [DONE]\n\n')
    })
    const args = ['evaluate', data, '--model', 'm', '--base-url', server.baseURL, '--stream']
    expect(await run(...args, '--reproduction', '--no-thinking')).toMatchObject({
      code: 0,
      out: expect.stringMatching(/all +1 +1 /),
    })
    const sampling = {
      ...{ temperature: 0, top_p: 1, repetition_penalty: 1.05, stream: true },
      chat_template_kwargs: { enable_thinking: false },
    }
    expect(server.requests.map(({ body }) => body)).toMatchObject([
      { ...sampling, max_tokens: 256 },
      { ...sampling, max_tokens: 1024 },
    ])
    for (const { images } of server.requests)
      expect((await sharp(images[0]).metadata()).format).toBe('png')
    for (const more of [
      ['--temperature', '1'],
      ['--max-pixels', '9'],
      ['--image-format', 'jpeg'],
    ])
      expect(await run(...args, '--reproduction', ...more)).toMatchObject({
        code: 2,
        err: expect.stringMatching(/'--reproduction' cannot be used with/),
      })
  })

  test('boxes without a crop are counted', async () => {
    await picture('pixels.png')
    const data = write('pixels.jsonl', [{ image: 'pixels.png', question: 'say A', answer: 'A' }])
    server = await chatServer((request, response) =>
      (/JSON/.test(request.prompt)
        ? says('[{"bbox_2d": [1200, 1200, 1800, 1800], "label": "a"}]')
        : obliging)(request, response),
    )
    const args = ['evaluate', data, '--model', 'm', '--base-url', server.baseURL]
    const { code, err } = await run(...args, '--json', 'pixels.json')
    expect({ code, err }).toEqual({
      code: 0,
      err: expect.stringMatching(/^1 boxes lie outside.*--coordinates right/),
    })
    const { overall } = JSON.parse(readFileSync(join(folder, 'pixels.json'), 'utf8'))
    expect(overall).toMatchObject({ boxes: 1, droppedBoxes: 1 })
    expect(results(join(folder, 'pixels.results.jsonl'))[0]).toMatchObject({ droppedBoxes: 1 })
  })

  test('errors in the data are reported before the first request', async () => {
    await picture('m.png')
    server = await chatServer(obliging)
    const good = { image: 'm.png', question: 'say A', answer: 'A' }
    const expectError = async (
      rows: object[],
      code: number,
      message: RegExp,
      ...more: string[]
    ) => {
      const data = write('bad.jsonl', rows)
      const args = ['evaluate', data, '--model', 'm', '--base-url', server!.baseURL, ...more]
      expect(await run(...args)).toMatchObject({ code, err: expect.stringMatching(message) })
    }
    await expectError(
      [good, { ...good, image: 'none.png' }],
      1,
      /bad.jsonl:2: there is no image none.png/,
    )
    await expectError(
      [good, { image: 'm.png', answer: 'A' }],
      1,
      /bad.jsonl:2: there is no 'question'/,
    )
    await expectError([{ ...good, answer: null }], 1, /bad.jsonl:1: there is no 'answer'/)
    await expectError([{ ...good, form: 'x' }], 1, /bad.jsonl:1: the form/)
    await expectError([], 2, /holds no questions/)
    writeFileSync(join(folder, 'other.jsonl'), '{"line": 1, "question": "else", "truth": "A"}\n')
    await expectError([good], 2, /other questions/, '--out', 'other.jsonl')
    writeFileSync(join(folder, 'junk.jsonl'), 'hello\nworld\n')
    await expectError([good], 2, /not a result/, '--out', 'junk.jsonl')
    expect(server.requests.length).toBe(0)
    expect(await run('evaluate', 'none.jsonl')).toMatchObject({
      code: 1,
      err: expect.stringMatching(/none.jsonl could not be read/),
    })
  })
})

/** The miniature of examples/mini-p2r, trained by `npm run demo -- --seed 1`, as both roles. */
async function miniature() {
  const device = openDevice('cpu')
  const roles = { perceiver: new Perceiver(device, 0), reasoner: new Reasoner(device, 0) }
  const weights = fileURLToPath(new URL('./golden/mini_p2r.safetensors', import.meta.url))
  const loaded = await loadTensors(weights, device)
  for (const role of ['perceiver', 'reasoner'] as const)
    copyParams(
      roles[role].params,
      Object.fromEntries(
        Object.keys(roles[role].params).map((name) => [
          name,
          loaded[`${role}.${name}`]!.cast('f32'),
        ]),
      ),
    )
  const seeds = new Rng(0)
  const reduced = async (bytes: Buffer, side: number) =>
    device.tensor(
      new Uint8Array(
        await sharp(bytes).resize(side, side, { kernel: 'cubic' }).removeAlpha().raw().toBuffer(),
      ),
      [side, side, 3],
    )
  const colourOf = (prompt: string) => COLOURS.findIndex((c) => prompt.includes(`is ${c}?`))

  return {
    close: () => device.dispose(),
    /** Names the cell as a box in thousandths; a little inside it, so that it is cut out exactly. */
    async perceive({ prompt, images }: ChatRequest): Promise<string> {
      const seen = roles.perceiver.see(await reduced(images[0]!, OVERVIEW), [colourOf(prompt)])
      const cell = cellOf(await roles.perceiver.act(seen, [0], 0, seeds), 0)
      const [x, y] = [cell % LATTICE, Math.floor(cell / LATTICE)]
      const at = (i: number) => (i * CELL * 1000) / CANVAS + 0.001
      const bbox_2d = [at(x), at(y), at(x + 1), at(y + 1)]
      return JSON.stringify([{ bbox_2d, label: 'digit' }])
    },
    async reason({ prompt, images }: ChatRequest): Promise<string> {
      const [annotated, crop] = images as [Buffer, Buffer]
      const read = roles.reasoner.read(
        {
          crops: await reduced(crop, CELL),
          thumbnails: await reduced(annotated, THUMBNAIL),
          cells: [await outlinedCell(annotated)],
        },
        [colourOf(prompt)],
      )
      const [digit] = await roles.reasoner.act(read, [0], 0, seeds)
      return `<think>I see it.</think><answer>${digit}</answer>`
    },
  }
}

/** Where the red outline is: no digit is as pure a red. */
async function outlinedCell(bytes: Buffer): Promise<number> {
  const { data, info } = await sharp(bytes)
    .removeAlpha()
    .raw()
    .toBuffer({ resolveWithObject: true })
  const columns = new Int32Array(info.width)
  const rows = new Int32Array(info.height)
  for (let i = 0, p = 0; p < data.length; i++, p += 3)
    if (data[p]! > 150 && data[p + 1]! < 60 && data[p + 2]! < 60) {
      columns[i % info.width]!++
      rows[Math.floor(i / info.width)]!++
    }
  const middle = (counts: Int32Array) => {
    const lines = [...counts.keys()].filter((i) => counts[i]! >= CELL / 2)
    return Math.floor((lines[0]! + lines.at(-1)!) / 2 / CELL)
  }
  return middle(rows) * LATTICE + middle(columns)
}

test('evaluate scores the miniature, served in both roles, on 50 needle images', async () => {
  const canvases = new Canvases(loadDigits('test'), 11, 50)
  const rows = await Promise.all(
    Array.from({ length: 50 }, async (_, i) => {
      const { label, colour } = canvases.question(3 * i + (i % 3))
      const image = `needle-${i}.jpg`
      const raw = { width: CANVAS, height: CANVAS, channels: 3 as const }
      await sharp(canvases.canvas(i), { raw }).jpeg({ quality: 95 }).toFile(join(folder, image))
      const question = `Which digit is ${COLOURS[colour]}?`
      return { image, question, answer: String(label), category: COLOURS[colour] }
    }),
  )
  const data = join(folder, 'needles.jsonl')
  writeFileSync(data, rows.map((row) => JSON.stringify(row)).join('\n'))
  const mini = await miniature()
  server = await chatServer(async (request, response) => {
    const role = /JSON/.test(request.prompt) ? 'perceive' : 'reason'
    says(await mini[role](request))(request, response)
  })
  const { code, out, err } = await run(
    'evaluate',
    data,
    '--base-url',
    server.baseURL,
    '--model',
    'mini',
    '--form',
    'na',
    '--padding',
    '0',
    '--min-pixels',
    '1024',
    '--concurrency',
    '8',
    '--json',
    'needles.json',
  )
  expect({ code, err }).toEqual({ code: 0, err: '' })
  expect(server.requests.length).toBe(100)
  mini.close()
  const made = results(join(folder, 'needles.results.jsonl'))
  expect(made.length).toBe(50)
  const right = made.filter(({ line, answer }) => answer === rows[line - 1]!.answer).length
  const { overall, categories } = JSON.parse(readFileSync(join(folder, 'needles.json'), 'utf8'))
  expect(overall).toMatchObject({
    questions: 50,
    correct: right,
    accuracy: 2 * right,
    boxes: 1,
    droppedBoxes: 0,
    failed: 0,
    truncated: 0,
  })
  expect(Object.keys(categories)).toEqual(['blue', 'green', 'red'])
  expect(out).toMatch(new RegExp(`all +50 +${right} `))
  // On 768 questions asked without a server it gets 74 % right; guessing gets 10 %. JPEG costs some.
  expect(right).toBeGreaterThanOrEqual(25)
})
