import fc from 'fast-check'
import {
  collectEvidence,
  drawBoxes,
  type EvidenceBox,
  normalizePatches,
  parseBoxes,
  scope,
  smartResize,
  type Tensor,
} from 'p2r-kernels'
import { describe, expect, test } from 'vitest'
import { golden } from './golden.js'
import { expectRefusal, onEveryBackend } from './harness.js'

const files = golden('image')
const bytes = (file: string) => files.bytes(`image/${file}`)
const meta = files.json('image/meta.json')

// How the tables write what JSON cannot.
// biome-ignore lint/suspicious/noExplicitAny: rows of the tables
const number = (v: any): number =>
  v !== null && typeof v === 'object' ? Number(v.$num) : Number(v)
// biome-ignore lint/suspicious/noExplicitAny: rows of the tables
function boxes(rows: any[]): EvidenceBox[] {
  return rows
    .map((r) => ({ bbox2d: r.bbox_2d.map(number), label: r.label ?? '' }))
    .filter((box) => box.bbox2d.every(Number.isFinite))
}
const box = (...bbox2d: [number, number, number, number]): EvidenceBox => ({ bbox2d, label: '' })

describe('parseBoxes', () => {
  test('parses every string as the reference does', () => {
    for (const row of files.json('image/parse_bboxes.json'))
      expect(parseBoxes(row.text), row.text).toStrictEqual(boxes(row.expect ?? []))
    for (const row of golden('grpo').json('grpo/bbox_parse.rows.json'))
      expect(parseBoxes(row.text), row.text).toStrictEqual(boxes(row.boxes))
  })

  test.each<[string, string, EvidenceBox[]]>([
    ['null beside a box', '[{"bbox_2d": null}, {"bbox_2d": [1,2,3,4]}]', [box(1, 2, 3, 4)]],
    ['a number beside a box', '[{"bbox_2d": 7}, {"bbox_2d": [1,2,3,4]}]', [box(1, 2, 3, 4)]],
    ['NaN', '[{"bbox_2d": [NaN,2,3,4]}]', []],
    ['an overflow', '[{"bbox_2d": [1,2,3,1e999]}]', []],
    ['a label that is no string', '[{"bbox_2d": [1,2,3,4], "label": 5}]', []],
    ['a label null', '[{"bbox_2d": [1,2,3,4], "label": null}]', []],
    [
      'other keys',
      '{"bbox_2d": [1,2,3,4], "label": "a", "x": {"y": NaN}}',
      [{ ...box(1, 2, 3, 4), label: 'a' }],
    ],
    [
      'escapes',
      '[{"bbox_2d": [1,2,3,4], "label": "\\u00e9\\n\\ud83d\\udc08\\/"}]',
      [{ ...box(1, 2, 3, 4), label: 'é\n🐈/' }],
    ],
    ['a bad escape', '[{"bbox_2d": [1,2,3,4], "label": "\\x"}]', []],
    ['a leading zero', '[{"bbox_2d": [01,2,3,4]}]', []],
    ['no digits after the point', '[{"bbox_2d": [1.,2,3,4]}]', []],
    ['a byte order mark', '\ufeff{"bbox_2d": [1,2,3,4]}', [box(1, 2, 3, 4)]],
    [
      "Python's blanks around",
      '\u00a0\u001f{"bbox_2d": [1,2,3,4], "y": {}}\u2003',
      [box(1, 2, 3, 4)],
    ],
    ['braces within, in prose', 'x {"bbox_2d": [1,2,3,4], "y": {}}', []],
    ['the last key of a run', 'x {"bbox_2d": [1,2,3,4], "bbox_2d": [5,6,7,8]}', [box(5, 6, 7, 8)]],
    ['a list that closes far away', 'x {"bbox_2d": [{"bbox_2d": [1,2,3,4]} y', []],
    ['an empty list in prose', 'x {"bbox_2d": []}', []],
    ['a JSON string that holds a box', '"{\\"bbox_2d\\": [1,2,3,4]}"', []],
    [
      'nesting deeper than Python reads',
      `{"bbox_2d": [1,2,3,4], "x": ${'['.repeat(5000)}${']'.repeat(5000)}}`,
      [],
    ],
    ['toString as a key', '{"toString": 1, "__proto__": {"bbox_2d": [1,2,3,4]}}', []],
  ])('%s', (_, text, expected) => {
    expect(parseBoxes(text)).toStrictEqual(expected)
  })

  const sign = { ...box(100, 100, 300, 300), label: 'sign' }
  const draft = '{"bbox_2d": [100, 100, 300, 300], "label": "sign"}'
  test.each<[string, string, EvidenceBox[]]>([
    ['a draft in the thought', `about ${draft}\n</think>\n[${draft}]`, [sign]],
    ['a thought in both tags', `<think>${draft}</think>${draft}`, [sign]],
    ['two thoughts', `<think>${draft}</think> <think>${draft}</think>[${draft}]`, [sign]],
    ['an unfinished thought', `<think>Perhaps ${draft}`, []],
    ['a thought and no boxes', `${draft}</think>[]`, []],
    ['single quotes', draft.replaceAll('"', "'"), [sign]],
    ['typographic quotes', '{“bbox_2d”: [100, 100, 300, 300], “label”: “sign”}', [sign]],
    ['trailing commas', '[{"bbox_2d": [100, 100, 300, 300,], "label": "sign",},]', [sign]],
    ['keys without quotes', '{bbox_2d: [100, 100, 300, 300], label: "sign"}', [sign]],
    ['a tuple', "{'bbox_2d': (100, 100, 300, 300), 'label': 'sign'}", [sign]],
    ['Python’s None', "[{'bbox_2d': [1, 2, 3, 4], 'label': None}]", [box(1, 2, 3, 4)]],
    ['JSON’s null', '[{"bbox_2d": [1, 2, 3, 4], "label": null}]', [box(1, 2, 3, 4)]],
    [
      'other literals of Python',
      "{'bbox_2d': [1, 2, 3, 4], 'seen': True, 'score': nan, 'hidden': False}",
      [box(1, 2, 3, 4)],
    ],
    [
      'comments',
      `[\n  // the first\n  ${draft}, # found\n  {"bbox_2d": [1, 2, 3, 4] /* two\nlines */}\n]`,
      [sign, box(1, 2, 3, 4)],
    ],
    [
      'braces in a fenced label',
      '```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "a {curly} [sign]}"}]\n```',
      [{ ...box(1, 2, 3, 4), label: 'a {curly} [sign]}' }],
    ],
    [
      'quotes within a label',
      'The sign: {"bbox_2d": [1, 2, 3, 4], "label": "the "STOP" sign"}.',
      [{ ...box(1, 2, 3, 4), label: 'the "STOP" sign' }],
    ],
    [
      'an apostrophe in single quotes',
      "{'bbox_2d': [1, 2, 3, 4], 'label': 'Bob's \\'big\\' car'}",
      [{ ...box(1, 2, 3, 4), label: "Bob's 'big' car" }],
    ],
    [
      'an escape in a fence',
      '```\n{"bbox_2d": [1, 2, 3, 4], "label": "caf\\u00e9\\n\\x"}\n```',
      [{ ...box(1, 2, 3, 4), label: 'café\nx' }],
    ],
    [
      'a list that maxTokens cut off',
      '[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5, 6, 7, 8], "lab',
      [{ ...box(1, 2, 3, 4), label: 'a' }],
    ],
    ['an object around', `{"boxes": [${draft}], "note": {"n": 1}}`, [sign]],
    ['an object around, in a fence', `\`\`\`\n{'boxes': [${draft}]}\n\`\`\``, [sign]],
    ['numbers in quotes', '[{"bbox_2d": ["100", "100", "300", "300"], "label": "sign"}]', [sign]],
    [
      'a number as label',
      '[{"bbox_2d": [1, 2, 3, 4], "label": 7}]',
      [{ ...box(1, 2, 3, 4), label: '7' }],
    ],
    ['numbers as Python has them', "{'bbox_2d': [1., .5, +3, 4e0]}", [box(1, 0.5, 3, 4)]],
    ['blanks in quotes', '[{"bbox_2d": ["", "1", "2", "3"]}]', []],
    ['NaN', "[{'bbox_2d': [nan, 2, 3, 4]}]", []],
    ['the corners turned', "[{'bbox_2d': [3, 4, 1, 2]}]", []],
    ['five numbers', "[{'bbox_2d': [1, 2, 3, 4, 5]}]", []],
    ['code', 'for (const a of b) { f(a) } { } {}', []],
    ['nesting', '{"a":'.repeat(5000), []],
  ])("'strict': %s", (_, text, expected) => {
    expect(parseBoxes(text, { rules: 'strict' })).toStrictEqual(expected)
  })

  test("'strict' reads valid lists as 'reference' does", () => {
    const label = fc.string({ unit: 'grapheme', maxLength: 30 })
    const some = fc.array(fc.tuple(fc.nat(999), fc.nat(999), label), { maxLength: 4 })
    fc.assert(
      fc.property(some, fc.constantFrom('', '```json\n', 'Here: '), (rows, before) => {
        const all = rows.map(([x, y, label]) => ({ bbox_2d: [x, y, x + 1, y + 1], label }))
        const got = parseBoxes(before + JSON.stringify(all), { rules: 'strict' })
        expect(got).toEqual(all.map(({ bbox_2d: bbox2d, label }) => ({ bbox2d, label })))
      }),
      { numRuns: 1000, seed: 3 },
    )
    expectRefusal(() => parseBoxes('', { rules: 'lax' as never }), 'ERR_VALUE', 'parseBoxes')
  })

  test.each([
    '{"',
    "{'a{",
    '{a:',
    '{a:{',
    '{"\\',
    '{#',
    '{/*',
    '{//',
    '{a:[',
    '{a:1,',
    '"{',
    '{   ',
    '{"a":"b',
  ])("'strict' takes linear time on %s", (piece) => {
    const text = `<think></think>${piece.repeat(100_000 / piece.length)}`
    const start = performance.now()
    expect(parseBoxes(`${text}":"`, { rules: 'strict' })).toEqual([])
    // Quadratic time would be minutes.
    expect(performance.now() - start).toBeLessThan(10_000)
  })

  test('never throws, and returns only valid boxes', () => {
    const piece = fc.constantFrom(
      '{',
      '}',
      '[',
      ']',
      ',',
      ':',
      '"bbox_2d"',
      '"label"',
      '"a',
      '"',
      '\\',
      '\\u12',
      'NaN',
      '-Infinity',
      'null',
      'true',
      '1',
      '-0',
      '1e400',
      '1.5',
      ' ',
      '\n',
      '\u00a0',
      '\u0000',
      '```json',
      '{"bbox_2d": [1,2,3,4]}',
      '\ud83d',
    )
    const texts = fc.oneof(
      fc.string({ unit: 'binary' }),
      fc.array(piece, { maxLength: 40 }).map((p) => p.join('')),
      fc.json().map((j) => `${j} {"bbox_2d": [0, 0, 1, 1], "label": ${j}}`),
    )
    fc.assert(
      fc.property(texts, (text) => {
        const read = (['reference', 'strict'] as const).flatMap((rules) =>
          parseBoxes(text, { rules }),
        )
        for (const { bbox2d, label } of read) {
          const [x0, y0, x1, y1] = bbox2d
          if (!(x0 < x1 && y0 < y1 && bbox2d.every(Number.isFinite) && typeof label === 'string'))
            return false
        }
        return true
      }),
      { numRuns: 3000, seed: 1 },
    )
    expect(parseBoxes(undefined as never)).toEqual([])
  })

  test('agrees with JSON.parse on JSON', () => {
    fc.assert(
      fc.property(
        fc.array(
          fc.tuple(
            fc.tuple(fc.double(), fc.double(), fc.double(), fc.double()),
            fc.string({ unit: 'binary' }),
          ),
        ),
        (rows) => {
          const text = JSON.stringify(rows.map(([bbox_2d, label]) => ({ label, bbox_2d })))
          const expected = boxes(
            JSON.parse(text).filter((r: { bbox_2d: unknown[] }) => !r.bbox_2d.includes(null)),
          ).filter(({ bbox2d: [x0, y0, x1, y1] }) => x0 < x1 && y0 < y1)
          expect(parseBoxes(text)).toEqual(expected)
        },
      ),
      { numRuns: 300, seed: 2 },
    )
  })

  test('long invalid text takes linear time', () => {
    const n = 200_000
    const start = performance.now()
    for (const text of [
      '{"bbox_2d":['.repeat(n / 12),
      `${'{"bbox_2d":[1'.repeat(n / 13)}]${'x'.repeat(n)}`,
      `{${'"bbox_2d":[1] '.repeat(n / 14)}`,
      '['.repeat(n),
      '{'.repeat(n),
    ])
      expect(parseBoxes(text)).toEqual([])
    // Quadratic time would be minutes.
    expect(performance.now() - start).toBeLessThan(20_000)
  })
})

onEveryBackend('collectEvidence', (b) => {
  test('a side of 0 becomes one factor, in images, crops and patches', () => {
    using thin = b.device.zeros([639, 31, 3], 'u8')
    expect(smartResize(639, 31, { maxPixels: 15_360 }).width).toBe(0)
    const sides: number[][] = []
    for (const rules of ['qwen-vl-utils', 'transformers'] as const) {
      const a = { image: thin, maxPixels: 15_360, rules }
      using none = collectEvidence({ ...a, boxes: [] })
      using all = collectEvidence({ ...a, boxes: [box(0, 0, 1000, 1000)] })
      expect([all.crops.length, all.dropped]).toEqual([1, 0])
      expect(all.crops[0]!.shape).toEqual(none.annotated.shape)
      const [h, w] = none.annotated.shape as [number, number]
      using patches = none.pixelValues()
      expect(patches.gridThw).toEqual([[1, h / 16, w / 16]])
      sides.push([h, w])
    }
    const { height, width } = smartResize(639, 31, { maxPixels: 15_360, rules: 'transformers' })
    expect(sides).toEqual([
      [height, width],
      [height, width],
    ])
  })

  test('the rules are those of smartResize', () => {
    // 10 rows are nearest to 0 multiples of 32: one in one rule, and a larger image in the other.
    using image = b.device.zeros([10, 1000, 3], 'u8')
    for (const rules of ['qwen-vl-utils', 'transformers'] as const) {
      using evidence = collectEvidence({ image, boxes: [], maxPixels: 1 << 20, rules })
      const { height, width } = smartResize(10, 1000, { maxPixels: 1 << 20, rules })
      expect(evidence.annotated.shape).toEqual([height, width, 3])
    }
  })

  test('absolute coordinates are pixels of the image shown', () => {
    using image = b.device.zeros([480, 640, 3], 'u8')
    const relative = { image, boxes: [box(400, 300, 600, 500)] }
    for (const [sizes, absolute] of [
      [{}, [256, 144, 384, 240]],
      // Shown as 192 x 288.
      [{ maxPixels: 65_536 }, [115.2, 57.6, 172.8, 96]],
    ] as const) {
      using expected = collectEvidence({ ...relative, ...sizes })
      using got = collectEvidence({
        image,
        boxes: [{ bbox2d: absolute, label: '' }],
        coordinates: 'absolute',
        ...sizes,
      })
      expect(got.crops[0]!.shape).toEqual(expected.crops[0]!.shape)
    }
  })

  test('boxes without a crop are counted', () => {
    using image = b.device.zeros([480, 640, 3], 'u8')
    const boxes = [box(1300, 1400, 1500, 1600), box(0, 0, 500, 500), box(2000, 0, 2100, 100)]
    expect(collectEvidence({ image, boxes }).dropped).toBe(2)
    expect(collectEvidence({ image, boxes, maxEvidence: 1 }).dropped).toBe(1)
    expect(collectEvidence({ image, boxes: [] }).dropped).toBe(0)
  })

  for (const c of meta.cases.filter((c: { op: string }) => c.op === 'evidence'))
    test(c.id, async () => {
      const source = bytes(c.input.file)
      const image = b.device.tensor(source, [c.input.height, c.input.width, 3])
      const parsed = parseBoxes(c.text)
      expect(parsed).toEqual(boxes(c.parsed))
      const asCut = collectEvidence({ image, boxes: parsed, maxEvidence: c.max_evidence })
      const sizes = { minPixels: c.min_pixels, maxPixels: c.max_pixels }
      const sized = collectEvidence({ image, boxes: parsed, ...sizes })
      const expected = { image: [], resized: [], pixel_values: [] } as Record<string, Uint8Array[]>
      for (const one of c.images)
        for (const [kind, list] of Object.entries(expected))
          list.push(one[kind].file ? bytes(one[kind].file) : source)

      expect(asCut.hasEvidence).toBe(c.has_evidence)
      expect(sized.boxes).toEqual(parsed)
      for (const [kind, evidence] of [
        ['image', asCut],
        ['resized', sized],
      ] as const) {
        const images = [evidence.annotated, ...evidence.crops]
        expect(images.length).toBe(c.images.length)
        for (const [i, one] of images.entries())
          expect(
            Buffer.compare((await one.read()) as Uint8Array, expected[kind]![i]!),
            `${kind} ${i}`,
          ).toBe(0)
      }
      const all = Buffer.concat(expected.pixel_values!)
      for (const made of [sized.pixelValues(), asCut.pixelValues(sizes)]) {
        expect(made.gridThw).toEqual(
          c.images.map((i: { image_grid_thw: number[] }) => i.image_grid_thw),
        )
        expect(Buffer.compare(Buffer.from((await made.pixelValues.read()).buffer), all)).toBe(0)
        made.dispose()
      }
    })

  test('annotates as the reference', async () => {
    for (const c of meta.cases.filter((c: { op: string }) => c.op === 'annotate')) {
      const image = b.device.tensor(bytes(c.input.file), [c.input.height, c.input.width, 3])
      const evidence = collectEvidence({
        image,
        boxes: c.boxes_0_1000.map((bbox2d: EvidenceBox['bbox2d']) => ({ bbox2d, label: '' })),
      })
      expect(
        Buffer.compare((await evidence.annotated.read()) as Uint8Array, bytes(c.expect.file)),
        c.id,
      ).toBe(0)
    }
  })

  test('crops where the reference crops', async () => {
    // One row of pixels that count their columns, and one of rows: the first and last tell the box.
    const axis = (n: number) =>
      Uint8Array.from({ length: n * 3 }, (_, i) => (Math.floor(i / 3) >> (8 * (i % 3))) & 255)
    const ends = async (size: number, vertical: boolean, bbox2d: EvidenceBox['bbox2d']) => {
      using image = b.device.tensor(axis(size), vertical ? [size, 1, 3] : [1, size, 3])
      using evidence = collectEvidence({
        image,
        boxes: [{ bbox2d, label: '' }],
        padding: vertical ? [1, 0.1] : [0.1, 1],
      })
      if (!evidence.hasEvidence) return null
      const data = (await evidence.crops[0]!.read()) as Uint8Array
      const at = (i: number) => data[i]! + data[i + 1]! * 256
      return [at(0), at(data.length - 3) + 1]
    }
    const check = async (width: number, height: number, bbox: number[], crop: number[]) => {
      const [x0, y0, x1, y1] = bbox as [number, number, number, number]
      const range = (low: number, high: number) => (high > low ? [low, high] : null)
      const message = `${width} x ${height} ${bbox}`
      expect(await ends(width, false, [x0, 0, x1, 1000]), message).toEqual(
        range(crop[0]!, crop[2]!),
      )
      expect(await ends(height, true, [0, y0, 1000, y1]), message).toEqual(
        range(crop[1]!, crop[3]!),
      )
    }
    for (const row of files.json('image/crop_boxes.json'))
      if (row.crop_box) await check(row.width, row.height, row.bbox_2d.map(number), row.crop_box)
    for (const row of golden('grpo').json('grpo/bbox_crop.rows.json'))
      await check(row.image_size[0], row.image_size[1], row.bbox_2d, row.crop)
  })

  test('draws where the reference draws', async () => {
    for (const row of files.json('image/crop_boxes.json')) {
      if (!row.draw_xy || row.width * row.height > 2e6 || row.crop !== 'ok') continue
      using image = b.device.zeros([row.height, row.width, 3], 'u8')
      using evidence = collectEvidence({
        image,
        boxes: [{ bbox2d: row.bbox_2d.map(number), label: '' }],
      })
      using expected = drawBoxes({ image, boxes: [row.draw_xy], width: row.draw_width })
      expect(
        Buffer.compare((await evidence.annotated.read()) as Uint8Array, await expected.read()),
      ).toBe(0)
    }
  })

  const image = () =>
    b.device.tensor(
      Uint8Array.from({ length: 100 * 80 * 3 }, (_, i) => i % 251),
      [80, 100, 3],
    )

  test('crops the first boxes and draws all', async () => {
    using source = image()
    const all = [
      box(0, 0, 200, 200),
      box(300, 0, 500, 200),
      box(600, 0, 800, 200),
      box(0, 500, 200, 900),
    ]
    using evidence = collectEvidence({ image: source, boxes: all })
    expect(evidence.crops.length).toBe(3)
    expect(evidence.boxes).toEqual(all)
    using drawn = drawBoxes({
      image: source,
      boxes: all.map(
        ({ bbox2d: [x0, y0, x1, y1] }) =>
          [x0 / 10, (y0 / 1000) * 80, x1 / 10, (y1 / 1000) * 80] as const,
      ),
    })
    expect(await evidence.annotated.read()).toEqual(await drawn.read())
    expect(collectEvidence({ image: source, boxes: all, maxEvidence: 1 }).crops.length).toBe(1)
  })

  test('without a usable crop it is the original image', async () => {
    using source = image()
    for (const boxes of [[], [box(-900, 0, -800, 100)], [box(1500, 1500, 1600, 1600)]]) {
      using evidence = collectEvidence({ image: source, boxes })
      expect(evidence.hasEvidence).toBe(false)
      expect(evidence.crops).toEqual([])
      expect(evidence.boxes).toEqual(boxes)
      expect(await evidence.annotated.read()).toEqual(await source.read())
      expect(evidence.pixelValues().gridThw).toEqual([[1, 4, 6]])
    }
    // One of two is left out.
    const one = collectEvidence({
      image: source,
      boxes: [box(-900, 0, -800, 100), box(0, 0, 500, 500)],
    })
    expect(one.crops.length).toBe(1)
  })

  test('sizes and types of pixelValues', async () => {
    using source = image()
    const evidence = collectEvidence({
      image: source,
      boxes: [box(0, 0, 900, 900)],
      maxPixels: 8192,
      cropMaxPixels: 4096,
    })
    expect(evidence.annotated.shape).toEqual([64, 96, 3])
    expect(evidence.crops[0]!.shape).toEqual([32, 64, 3])
    const made = evidence.pixelValues({ dtype: 'bf16' })
    expect(made.pixelValues.dtype).toBe('bf16')
    expect(made.gridThw).toEqual([
      [1, 4, 6],
      [1, 2, 4],
    ])
    const bytes = evidence.pixelValues({ dtype: 'u8' })
    expect(bytes.pixelValues.dtype).toBe('u8')
    expect(bytes.gridThw).toEqual(made.gridThw)
    expect(2 * bytes.pixelValues.byteLength).toBe(made.pixelValues.byteLength)
    const values = normalizePatches({ patches: bytes.pixelValues, dtype: 'bf16' })
    expect(await values.read()).toEqual(await made.pixelValues.read())
    expect(() => evidence.pixelValues({ dtype: 'i32' as never })).toThrow(
      expect.objectContaining({ code: 'ERR_DTYPE', op: 'pixelValues' }),
    )
    const larger = evidence.pixelValues({ maxPixels: 65536, cropMaxPixels: 16384 })
    expect(larger.gridThw).toEqual([
      [1, 4, 6],
      [1, 4, 6],
    ])
  })

  test('computes images lazily, and frees them', async () => {
    using source = image()
    const before = b.device.memory().liveBytes
    const live = () => b.device.memory().liveBytes - before
    const evidence = collectEvidence({ image: source, boxes: [box(0, 0, 500, 500)] })
    expect(live()).toBe(0)
    expect(evidence.crops).toBe(evidence.crops)
    expect(live()).toBe(60 * 48 * 3)
    expect(evidence.annotated).toBe(evidence.annotated)
    expect(live()).toBe(60 * 48 * 3 + 100 * 80 * 3)
    evidence.dispose()
    evidence.dispose()
    expect(live()).toBe(0)
    expect(() => evidence.crops).toThrow(expect.objectContaining({ code: 'ERR_DISPOSED' }))
    expect(evidence.hasEvidence).toBe(true)
    await source.read()
  })

  test('eight rollouts over one image hold no copy of it', async () => {
    // Its own: what other tests left is collected when it pleases.
    using device = b.open()
    using source = device.zeros([2000, 3000, 3], 'u8')
    await device.synchronize()
    const before = device.memory().liveBytes
    device.resetPeak()
    const rollouts = Array.from({ length: 8 }, (_, i) =>
      collectEvidence({
        image: source,
        boxes: [box(i * 100, 0, i * 100 + 150, 200), box(300, 300, 700, 700)],
        maxPixels: 65536,
      }),
    )
    let outputs = 0
    const made = rollouts.map((evidence) => evidence.pixelValues({ dtype: 'bf16' }))
    for (const { pixelValues } of made) outputs += pixelValues.byteLength
    await device.synchronize()
    const { peakBytes } = device.memory()
    // Scratch of two threads or, on CUDA, of the rows between two kernels; a copy is 18 MB.
    expect(peakBytes - before - outputs).toBeLessThan(source.byteLength / 2)
    for (const one of [...made, ...rollouts]) one.dispose()
    expect(device.memory().liveBytes).toBe(before)
  })

  test('can be returned from a scope', async () => {
    let other: Tensor | undefined
    const evidence = scope(() => {
      other = b.device.zeros([4])
      const made = collectEvidence({ image: image(), boxes: [box(0, 0, 500, 500)] })
      made.crops[0]!.shape
      return { made }
    }).made
    await expect(other!.read()).rejects.toMatchObject({ code: 'ERR_DISPOSED' })
    expect((await evidence.crops[0]!.read()).length).toBe(60 * 48 * 3)
    expect((await evidence.annotated.read()).length).toBe(100 * 80 * 3)
    evidence.dispose()
  })

  test('refuses invalid arguments', () => {
    const refused = (a: object, code: string, message: RegExp) =>
      expectRefusal(
        () => collectEvidence({ image: image(), boxes: [], ...a } as never),
        code,
        'collectEvidence',
        message,
      )
    refused({ image: b.device.zeros([4, 4, 3]) }, 'ERR_DTYPE', /u8/)
    refused({ image: b.device.zeros([4, 4], 'u8') }, 'ERR_SHAPE', /height, width, 3/)
    refused({ image: b.device.zeros([0, 4, 3], 'u8') }, 'ERR_SHAPE', /not empty/)
    refused({ image: 'x.png' }, 'ERR_VALUE', /Tensor/)
    refused(
      { boxes: [{ bbox2d: [0, 0, Number.NaN, 1] }] },
      'ERR_VALUE',
      /boxes\[0\]\.bbox2d\[2\] must be finite/,
    )
    refused({ boxes: [null] }, 'ERR_VALUE', /boxes\[0\]/)
    refused({ boxes: 3 }, 'ERR_VALUE', /boxes must be an array/)
    refused({ padding: [0.1] }, 'ERR_VALUE', /padding/)
    refused({ maxEvidence: -1 }, 'ERR_VALUE', /maxEvidence/)
    refused({ maxPixels: 0 }, 'ERR_VALUE', /maxPixels/)
    refused({ rules: 'strict' }, 'ERR_VALUE', /rules/)
    refused({ coordinates: 'pixels' }, 'ERR_VALUE', /coordinates/)
    refused({ maxPixels: 1000 }, 'ERR_VALUE', /at least minPixels/)
  })
})
