// Random cases on every path: P2R_CASES=100000 P2R_SEED=7 npx vitest run --project package test/crop_resample.test.ts
import fc from 'fast-check'
import {
  cropResample,
  cudaStatus,
  type DType,
  drawBoxes,
  type Filter,
  normalizePatches,
  openDevice,
  type PixelBox,
  pixelValues,
  type Region,
  scopeAsync,
  smartResize,
} from 'p2r-kernels'
import { afterAll, describe, expect, test } from 'vitest'
import { golden } from './golden.js'
import {
  cpuPaths,
  expectRefusal,
  floats,
  onEveryBackend,
  Random,
  recorded,
  rounded,
} from './harness.js'

const exact = {}
const files = golden('image')
const meta = files.json('image/meta.json')
const bytes = (file: string) => files.bytes(`image/${file}`)
const filters: Filter[] = ['box', 'bilinear', 'bicubic', 'lanczos']

const kernels: Record<Filter, { support: number; f: (x: number) => number }> = {
  box: { support: 0.5, f: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) },
  bilinear: { support: 1, f: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    support: 2,
    f: (v) => {
      const x = Math.abs(v)
      if (x < 1) return (1.5 * x - 2.5) * x * x + 1
      return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0
    },
  },
  lanczos: { support: 3, f: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
}
const sinc = (x: number) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI))

interface Image {
  data: Uint8Array
  height: number
  width: number
}

// Pillow's Image.crop: black outside.
function crop(image: Image, [x0, y0, x1, y1]: PixelBox): Image {
  const out = { data: new Uint8Array((y1 - y0) * (x1 - x0) * 3), height: y1 - y0, width: x1 - x0 }
  for (let y = Math.max(0, y0); y < Math.min(image.height, y1); y++)
    for (let x = Math.max(0, x0); x < Math.min(image.width, x1); x++)
      for (let c = 0; c < 3; c++)
        out.data[((y - y0) * out.width + x - x0) * 3 + c] =
          image.data[(y * image.width + x) * 3 + c]!
  return out
}

// Pillow's Image.resize along one axis of `line` groups of `count` values, `step` apart.
function resizeAxis(
  data: Uint8Array,
  [outer, n, inner]: readonly [number, number, number],
  out: number,
  filter: Filter,
): Uint8Array {
  if (n === out) return data
  const { support, f } = kernels[filter]
  const scale = n / out
  const widen = Math.max(scale, 1)
  const result = new Uint8Array(outer * out * inner)
  for (let x = 0; x < out; x++) {
    const center = (x + 0.5) * scale
    const begin = Math.max(0, Math.trunc(center - support * widen + 0.5))
    const end = Math.min(n, Math.trunc(center + support * widen + 0.5))
    const w = Array.from({ length: end - begin }, (_, i) =>
      f((i + begin - center + 0.5) * (1 / widen)),
    )
    const sum = w.reduce((s, v) => s + v, 0)
    const k = w.map((v) => {
      const scaled = (sum !== 0 ? v / sum : v) * 2 ** 22
      return Math.trunc(scaled < 0 ? scaled - 0.5 : scaled + 0.5)
    })
    for (let o = 0; o < outer; o++)
      for (let i = 0; i < inner; i++) {
        let acc = 2 ** 21
        for (let t = begin; t < end; t++) acc += data[(o * n + t) * inner + i]! * k[t - begin]!
        result[(o * out + x) * inner + i] = Math.max(0, Math.min(255, acc >> 22))
      }
  }
  return result
}

function oracle(image: Image, r: Region, filter: Filter): Uint8Array {
  const cut = crop(image, r.box)
  const rows = resizeAxis(cut.data, [cut.height, cut.width, 3], r.width, filter)
  return resizeAxis(rows, [1, cut.height, r.width * 3], r.height, filter)
}

function randomImage(random: Random, height: number, width: number): Image {
  // Noise, and hard edges that make the filters overshoot.
  const edges = random.uniform() < 0.3
  const data = Uint8Array.from({ length: height * width * 3 }, () =>
    edges ? 255 * random.int(0, 1) : random.int(0, 255),
  )
  return { data, height, width }
}

function randomRegion(random: Random, image: Image, largest = 60): Region {
  const side = (n: number) => {
    const at = random.int(-8, n + 4)
    return [at, at + random.int(1, n + 8)] as const
  }
  const [x0, x1] = side(image.width)
  const [y0, y1] = side(image.height)
  // Every third keeps an axis, which is then not filtered.
  const keep = random.int(0, 5)
  return {
    box: [x0, y0, x1, y1],
    height: keep === 0 ? y1 - y0 : random.int(1, largest),
    width: keep === 1 ? x1 - x0 : random.int(1, largest),
  }
}

// The layout from its definition: patches in merge blocks, then [channel, time, y, x].
function layOut(
  pixels: Uint8Array,
  height: number,
  width: number,
  { patch, temporal, merge }: { patch: number; temporal: number; merge: number },
  value: (v: number, c: number) => number,
): number[] {
  const out: number[] = []
  const block = patch * merge
  for (let by = 0; by < height; by += block)
    for (let bx = 0; bx < width; bx += block)
      for (let py = by; py < by + block; py += patch)
        for (let px = bx; px < bx + block; px += patch)
          for (let c = 0; c < 3; c++)
            for (let t = 0; t < temporal; t++)
              for (let y = py; y < py + patch; y++)
                for (let x = px; x < px + patch; x++)
                  out.push(value(pixels[(y * width + x) * 3 + c]!, c))
  return out
}

onEveryBackend('cropResample', (b) => {
  const tensor = (image: Image) => b.device.tensor(image.data, [image.height, image.width, 3])

  for (const c of meta.cases.filter(
    (c: { op: string; box?: unknown }) => c.op === 'resize' && !c.box,
  ))
    test(c.id, async () => {
      using image = b.device.tensor(bytes(c.input.file), [c.input.height, c.input.width, 3])
      const box = c.crop ?? [0, 0, c.input.width, c.input.height]
      const regions = [{ box, height: c.out_height, width: c.out_width }]
      const [out] = recorded(b, `cropResample ${c.id}`, exact, () =>
        cropResample({ image, regions, filter: c.filter }),
      )
      expect(out!.shape).toEqual(c.expect.shape)
      expect(Buffer.compare(await out!.read(), bytes(c.expect.file))).toBe(0)
    })

  test.each(filters)('%s agrees with a direct implementation of Pillow', async (filter) => {
    const random = new Random(filters.indexOf(filter))
    for (let i = 0; i < 12; i++) {
      const image = randomImage(random, random.int(1, 50), random.int(1, 50))
      const regions = Array.from({ length: 14 }, () => randomRegion(random, image))
      const resample = () => cropResample({ image: tensor(image), regions, filter })
      const out = recorded(b, `cropResample ${filter} ${i}`, exact, resample)
      for (const [k, r] of regions.entries()) {
        const data = await out[k]!.read()
        if (Buffer.compare(data, oracle(image, r, filter)) !== 0)
          expect.fail(`image ${i} ${image.height} x ${image.width}, region ${JSON.stringify(r)}`)
      }
    }
  })

  test('large images are processed in strips without seams', async () => {
    const random = new Random(31)
    const image = randomImage(random, 700, 400)
    for (const [height, width] of [
      [300, 170],
      [900, 61],
      [700, 333],
      [97, 400],
    ] as const) {
      const r: Region = { box: [0, 0, 400, 700], height, width }
      const [out] = cropResample({ image: tensor(image), regions: [r] })
      expect(Buffer.compare(await out!.read(), oracle(image, r, 'bicubic'))).toBe(0)
    }
  })

  test('an image over 100 times as tall as wide takes its rows first', async () => {
    const image = randomImage(new Random(32), 400, 3)
    const r: Region = { box: [0, 0, 3, 400], height: 384, width: 32 }
    const [out] = cropResample({ image: tensor(image), regions: [r] })
    expect(Buffer.compare(await out!.read(), oracle(image, r, 'bicubic'))).toBe(0)
  })

  test('pixels outside the image are black, empty images are legal', async () => {
    const image = tensor(randomImage(new Random(33), 6, 6))
    const regions: Region[] = [
      { box: [10, 10, 20, 14], height: 5, width: 5 },
      { box: [-9, 0, 0, 6], height: 6, width: 9 },
    ]
    for (const out of cropResample({ image, regions }))
      expect((await out.read()).every((v) => v === 0)).toBe(true)
    expect(cropResample({ image, regions: [] })).toEqual([])
    const none = b.device.zeros([0, 0, 3], 'u8')
    const [black] = cropResample({
      image: none,
      regions: [{ box: [0, 0, 2, 2], height: 3, width: 3 }],
    })
    expect(await black!.read()).toEqual(new Uint8Array(27))
  })

  test('refuses empty boxes and impossible sizes', () => {
    const image = b.device.zeros([8, 8, 3], 'u8')
    const good = { box: [0, 0, 4, 4], height: 4, width: 4 }
    const refused = (a: object, message: RegExp, code = 'ERR_VALUE', region: object = {}) =>
      expectRefusal(
        () => cropResample({ image, regions: [good, { ...good, ...region }], ...a } as never),
        code,
        'cropResample',
        message,
      )
    const region = (r: object, message: RegExp) => refused({}, message, 'ERR_VALUE', r)
    region({ box: [4, 0, 4, 4] }, /regions\[1\]\.box is empty or inverted/)
    region({ box: [0, 5, 4, 4] }, /inverted/)
    region({ box: [0, 0, 4.5, 4] }, /regions\[1\]\.box must be an integer .* got 4\.5/)
    region({ box: [0, 0, Number.NaN, 4] }, /regions\[1\]\.box/)
    region({ box: [0, 0, 4] }, /4 numbers/)
    region({ box: [0, 0, 2 ** 21, 4] }, /too large/)
    region({ height: 0 }, /regions\[1\]\.height must be an integer from 1/)
    region({ width: 2 ** 40 }, /width/)
    region({ width: 2 ** 20, height: 2 ** 20 }, /at most 268435456 pixels/)
    region({ height: '4' }, /height must be a number/)
    refused({ filter: 'nearest' }, /filter must be/)
    refused({ regions: {} }, /regions must be an array/)
    refused({ regions: [null] }, /regions\[0\] must be an object/)
    refused({ image: b.device.zeros([8, 8, 3]) }, /u8/, 'ERR_DTYPE')
    refused({ image: b.device.zeros([8, 8, 1], 'u8') }, /height, width, 3/, 'ERR_SHAPE')
    refused({ image: 1 }, /must be a Tensor/)
  })
})

onEveryBackend('pixelValues', (b) => {
  for (const c of meta.cases.filter((c: { op: string }) => c.op === 'pixel_values'))
    test(c.id, async () => {
      const { height, width } = c.input
      const image = b.device.tensor(bytes(c.input.file), [height, width, 3])
      const out = recorded(b, `pixelValues ${c.id}`, exact, () =>
        pixelValues({ image, regions: [{ box: [0, 0, width, height], height, width }] }),
      )
      expect(out.gridThw).toEqual([c.image_grid_thw])
      expect(out.pixelValues.shape).toEqual(c.expect.shape)
      expect(
        Buffer.compare(new Uint8Array((await out.pixelValues.read()).buffer), bytes(c.expect.file)),
      ).toBe(0)
    })

  test('values are computed in float64 and rounded once', async () => {
    const all = Uint8Array.from({ length: 256 * 3 }, (_, i) => Math.floor(i / 3))
    const image = b.device.tensor(all, [16, 16, 3])
    const lut = new Float32Array(bytes(meta.luts.f64_rounded.file).buffer)
    const a = {
      image,
      regions: [{ box: [0, 0, 16, 16] as const, height: 16, width: 16 }],
      mergeSize: 1,
      temporalPatchSize: 1 as const,
    }
    const out = await pixelValues(a).pixelValues.read()
    for (let c = 0; c < 3; c++) expect(out.subarray(c * 256, c * 256 + 256)).toEqual(lut)

    const [mean, std] = [
      [0.48145466, 0.4578275, 0.40821073],
      [0.26862954, 0.26130258, 0.27577711],
    ] as const
    for (const dtype of ['f16', 'bf16'] as const) {
      const values = await pixelValues({ ...a, mean, std, dtype }).pixelValues.toFloat32()
      for (let i = 0; i < 768; i++) {
        const c = Math.floor(i / 256)
        const exactly = ((i % 256) / 255 - mean[c]!) / std[c]!
        // One rounding: no value of the type is nearer, the next ones included.
        const error = Math.abs(values[i]! - exactly)
        const up = rounded([values[i]! * (1 + 2 ** (dtype === 'f16' ? -10 : -7))], dtype)[0]!
        const down = rounded([values[i]! * (1 - 2 ** (dtype === 'f16' ? -10 : -7))], dtype)[0]!
        expect(error).toBeLessThanOrEqual(
          Math.min(Math.abs(up - exactly), Math.abs(down - exactly)),
        )
      }
    }
  })

  test.each(floats)('%s is cropResample, normalised and cut into patches', async (dtype) => {
    const random = new Random(41)
    for (const [patch, temporal, merge] of [
      [8, 2, 2],
      [16, 1, 2],
      [4, 2, 1],
      [3, 2, 3],
      [1, 1, 1],
    ] as const) {
      const images = [randomImage(random, 40, 33), randomImage(random, 21, 64)]
      const unit = patch * merge
      const regions = Array.from({ length: 5 }, (): Region => {
        const image = random.int(0, 1)
        const region = randomRegion(random, images[image]!)
        const whole = (n: number) => Math.max(1, Math.round(n / unit)) * unit
        return { ...region, image, height: whole(region.height), width: whole(region.width) }
      })
      // An identity, which is only laid out.
      regions.push({ image: 1, box: [2, 3, 2 + unit, 3 + unit], height: unit, width: unit })
      const mean = [0.5, 0.25, 0.125] as const
      const std = [0.5, 1, 0.25] as const
      const expected = regions.flatMap((r) =>
        layOut(
          oracle(images[r.image!]!, r, 'bicubic'),
          r.height,
          r.width,
          { patch, temporal, merge },
          (v, c) => (v / 255 - mean[c]!) / std[c]!,
        ),
      )
      const out = recorded(b, `pixelValues ${dtype} ${patch} ${temporal} ${merge}`, exact, () =>
        pixelValues({
          images: images.map((i) => b.device.tensor(i.data, [i.height, i.width, 3])),
          regions,
          patchSize: patch,
          temporalPatchSize: temporal,
          mergeSize: merge,
          mean,
          std,
          dtype,
        }),
      )
      expect(out.pixelValues.dtype).toBe(dtype)
      expect(out.gridThw).toEqual(regions.map((r) => [1, r.height / patch, r.width / patch]))
      expect(await out.pixelValues.toFloat32()).toEqual(rounded(expected, dtype))
    }
  })

  test('u8 patches are the bytes of cropResample', async () => {
    const random = new Random(43)
    for (const [patch, temporal, merge] of [
      [16, 2, 2],
      [14, 2, 2],
      [16, 1, 1],
      [5, 2, 3],
      [1, 1, 1],
    ] as const) {
      const images = [randomImage(random, 40, 33), randomImage(random, 21, 64)]
      const unit = patch * merge
      const regions = Array.from({ length: 4 }, (_, k): Region => {
        const region = randomRegion(random, images[k % 2]!)
        const whole = (n: number) => Math.max(1, Math.round(n / unit)) * unit
        return {
          ...region,
          image: k % 2,
          height: whole(region.height),
          width: whole(region.width),
        }
      })
      // An identity, which is only laid out.
      regions.push({ image: 1, box: [2, 3, 2 + unit, 3 + unit], height: unit, width: unit })
      const expected = regions.flatMap((r) =>
        layOut(
          oracle(images[r.image!]!, r, 'lanczos'),
          r.height,
          r.width,
          { patch, temporal, merge },
          (v) => v,
        ),
      )
      const out = recorded(b, `pixelValues u8 ${patch} ${temporal} ${merge}`, exact, () =>
        pixelValues({
          images: images.map((i) => b.device.tensor(i.data, [i.height, i.width, 3])),
          regions,
          filter: 'lanczos',
          patchSize: patch,
          temporalPatchSize: temporal,
          mergeSize: merge,
          dtype: 'u8',
        }),
      )
      expect(out.pixelValues.dtype).toBe('u8')
      expect(out.gridThw).toEqual(regions.map((r) => [1, r.height / patch, r.width / patch]))
      expect(await out.pixelValues.read()).toEqual(Uint8Array.from(expected))
    }
  })

  test('an overlay gives the result of drawBoxes without a copy', async () => {
    const random = new Random(51)
    for (let i = 0; i < 8; i++) {
      const sources = [randomImage(random, 50, 44), randomImage(random, 30, 70)]
      const images = sources.map((s) => b.device.tensor(s.data, [s.height, s.width, 3]))
      const boxes = Array.from(
        { length: 5 },
        () => Array.from({ length: 4 }, () => random.int(-10, 70)) as unknown as PixelBox,
      )
      const width = random.int(0, 5)
      const overlay = width
        ? { boxes, width, colors: [[9, 200, 77] as const, [1, 2, 3] as const] }
        : { boxes }
      const drawn = images.map((image) => drawBoxes({ image, ...overlay }))
      const regions = Array.from({ length: 6 }, (_, k): Region => {
        const image = k % 2
        const region = randomRegion(random, sources[image]!)
        const whole = (n: number) => Math.ceil(n / 8) * 8
        const kept = { image, ...region, height: whole(region.height), width: whole(region.width) }
        return k > 3 ? { ...kept, overlay: false } : kept
      })
      const sizes = { patchSize: 4, filter: filters[i % 4]! }
      const out = recorded(b, `pixelValues overlay ${i}`, exact, () =>
        pixelValues({ images, regions, overlay, ...sizes }),
      )
      const expected = pixelValues({
        images: [...drawn, ...images],
        regions: regions.map((r) => ({ ...r, image: r.image! + (r.overlay === false ? 2 : 0) })),
        ...sizes,
      })
      expect(await out.pixelValues.read()).toEqual(await expected.pixelValues.read())
      const bytes = pixelValues({ images, regions, overlay, ...sizes, dtype: 'u8' })
      const values = normalizePatches({ patches: bytes.pixelValues })
      expect(await values.read()).toEqual(await expected.pixelValues.read())
    }
  })

  test('no regions, and refusals', () => {
    const image = b.device.zeros([32, 32, 3], 'u8')
    const none = pixelValues({ image, regions: [] })
    expect(none.pixelValues.shape).toEqual([0, 1536])
    expect(none.gridThw).toEqual([])
    const region = { box: [0, 0, 32, 32], height: 32, width: 32 }
    const refused = (a: object, message: RegExp, code = 'ERR_VALUE') =>
      expectRefusal(
        () => pixelValues({ image, regions: [region], ...a } as never),
        code,
        'pixelValues',
        message,
      )
    refused(
      { regions: [{ ...region, height: 48 }] },
      /multiples of patchSize \* mergeSize = 32, got 48 x 32/,
    )
    refused({ regions: [{ ...region, image: 1 }] }, /regions\[0\]\.image/)
    refused({ regions: [{ ...region, image: 0.5 }] }, /regions\[0\]\.image/)
    refused({ std: [0.5, 0, 0.5] }, /std/)
    refused({ mean: [0.5, Number.NaN, 0.5] }, /mean/)
    refused({ mean: [0.5] }, /mean/)
    refused({ dtype: 'i32' }, /dtype must be f32, f16, bf16 or u8/, 'ERR_DTYPE')
    refused({ dtype: 'u8', mean: [0, 0, 0] }, /normalizePatches/)
    refused({ dtype: 'u8', std: [1, 1, 1] }, /normalizePatches/)
    refused({ temporalPatchSize: 3 }, /temporalPatchSize/)
    refused({ patchSize: 0 }, /patchSize/)
    refused({ mergeSize: 1.5 }, /mergeSize/)
    refused({ overlay: { boxes: [[0, 0, 0.5, 1]] } }, /boxes/)
    refused({ overlay: 7 }, /overlay/)
    refused({ overlay: {} }, /boxes must be an array/)
    refused({ images: [], regions: [] }, /./)
  })
})

onEveryBackend('normalizePatches', (b) => {
  const clip = {
    mean: [0.48145466, 0.4578275, 0.40821073],
    std: [0.26862954, 0.26130258, 0.27577711],
  } as const

  test.each(floats)('%s: (v / 255 - mean) / std in float64, rounded once', async (dtype) => {
    const random = new Random(61)
    // Columns of a channel: whole steps of 32, what is left of them, and less than one.
    for (const [rows, run] of [
      [3, 512],
      [7, 256],
      [5, 45],
      [2, 33],
      [4, 1],
      [700, 12],
    ] as const) {
      const bytes = Uint8Array.from({ length: rows * run * 3 }, (_, i) =>
        i < 256 ? i : random.int(0, 255),
      )
      const patches = b.device.tensor(bytes, [rows, run * 3])
      const expected = Array.from(bytes, (v, i) => {
        const c = Math.floor(i / run) % 3
        return (v / 255 - clip.mean[c]!) / clip.std[c]!
      })
      const out = recorded(b, `normalizePatches ${dtype} ${run}`, exact, () =>
        normalizePatches({ patches, ...clip, dtype }),
      )
      expect(out.shape).toEqual([rows, run * 3])
      expect(out.dtype).toBe(dtype)
      expect(await out.toFloat32()).toEqual(rounded(expected, dtype))
    }
  })

  test.each(floats)('%s: a result that no cache holds', async (dtype) => {
    const random = new Random(63)
    const rows = dtype === 'f32' ? 1400 : 2800
    const patches = b.device.tensor(
      Uint8Array.from({ length: rows * 1536 }, () => random.int(0, 255)),
      [rows, 1536],
    )
    const out = normalizePatches({ patches, ...clip, dtype })
    expect(out.byteLength).toBeGreaterThan(8 << 20)
    // In pieces, which are stored in another way.
    const all = Buffer.from((await out.read()).buffer)
    for (let row = 0; row < rows; row += rows / 4) {
      const piece = patches.slice(row, row + rows / 4)
      const some = await normalizePatches({ patches: piece, ...clip, dtype }).read()
      const bytes = Buffer.from(some.buffer)
      const at = row * 1536 * some.BYTES_PER_ELEMENT
      expect(all.compare(bytes, 0, bytes.length, at, at + bytes.length)).toBe(0)
    }
  })

  test.each(floats)('%s: after bytes as pixelValues by itself, bit for bit', async (dtype) => {
    const random = new Random(67)
    for (const [patchSize, temporalPatchSize, mergeSize] of [
      [16, 2, 2],
      [14, 2, 2],
      [16, 1, 1],
      [3, 2, 3],
      [1, 1, 1],
    ] as const)
      for (const filter of filters) {
        const source = randomImage(random, 61, 90)
        const image = b.device.tensor(source.data, [61, 90, 3])
        const unit = patchSize * mergeSize
        const regions = Array.from({ length: 3 }, (): Region => {
          const region = randomRegion(random, source)
          const whole = (n: number) => Math.max(1, Math.round(n / unit)) * unit
          return { ...region, height: whole(region.height), width: whole(region.width) }
        })
        const sizes = { image, regions, filter, patchSize, temporalPatchSize, mergeSize }
        const direct = pixelValues({ ...sizes, ...clip, dtype }).pixelValues
        const { pixelValues: patches } = pixelValues({ ...sizes, dtype: 'u8' })
        expect(4 * patches.byteLength).toBe(pixelValues(sizes).pixelValues.byteLength)
        const after = normalizePatches({ patches, ...clip, dtype })
        expect(after.shape).toEqual(direct.shape)
        expect(await after.read()).toEqual(await direct.read())
      }
  })

  test('views that begin anywhere', async () => {
    const bytes = Uint8Array.from({ length: 9 * 15 }, (_, i) => (i * 37) % 256)
    const whole = b.device.tensor(bytes, [9, 15])
    const all = await normalizePatches({ patches: whole }).read()
    for (const from of [1, 2, 3])
      expect(await normalizePatches({ patches: whole.slice(from) }).read()).toEqual(
        all.slice(from * 15),
      )
    const wide = b.device.tensor(
      Uint8Array.from({ length: 3 * 98 }, (_, i) => i % 256),
      [98, 3],
    )
    const some = normalizePatches({ patches: wide.slice(2).reshape([24, 12]) })
    const aligned = b.device.tensor(
      Uint8Array.from({ length: 288 }, (_, i) => (i + 6) % 256),
      [24, 12],
    )
    expect(await some.read()).toEqual(await normalizePatches({ patches: aligned }).read())
  })

  test('empty sizes, and refusals', () => {
    for (const shape of [
      [0, 1536],
      [5, 0],
      [0, 0],
    ]) {
      const patches = b.device.zeros(shape, 'u8')
      expect(normalizePatches({ patches, dtype: 'f16' }).shape).toEqual(shape)
    }
    const patches = b.device.zeros([2, 6], 'u8')
    const refused = (a: object, message: RegExp, code = 'ERR_VALUE') =>
      expectRefusal(
        () => normalizePatches({ patches, ...a } as never),
        code,
        'normalizePatches',
        message,
      )
    refused({ patches: b.device.zeros([2, 5], 'u8') }, /multiple of 3 columns.*got 5/, 'ERR_SHAPE')
    refused({ patches: b.device.zeros([6], 'u8') }, /patches/, 'ERR_SHAPE')
    refused({ patches: b.device.zeros([2, 6]) }, /patches/, 'ERR_DTYPE')
    refused({ dtype: 'u8' }, /dtype must be f32, f16 or bf16/, 'ERR_DTYPE')
    refused({ std: [0.5, -1, 0.5] }, /std/)
    refused({ mean: [0.5, Number.POSITIVE_INFINITY, 0.5] }, /mean/)
    refused({ mean: 'x' }, /mean/)
    refused({ means: [0, 0, 0] }, /did you mean 'mean'/)
  })
})

describe('every instruction set gives the bytes of the scalar one', () => {
  const cases = Number(process.env.P2R_CASES ?? 2000)
  const seed = Number(process.env.P2R_SEED ?? 1)
  // The last of the list is the portable one; threads differ, since they must not matter either.
  const devices = cpuPaths.map(({ options }, i) =>
    openDevice('cpu', { ...options, threads: i + 1 }),
  )
  const portable = devices.pop()!
  if (cudaStatus().available) devices.push(openDevice('cuda'))
  afterAll(() => {
    for (const device of [portable, ...devices]) device.dispose()
  })

  const side = fc.oneof(
    { weight: 4, arbitrary: fc.integer({ min: 1, max: 70 }) },
    fc.constantFrom(300, 1111),
  )
  const places = fc.tuple(
    fc.double({ min: -0.2, max: 1, noNaN: true }),
    fc.double({ min: 0, max: 1.2, noNaN: true }),
  )
  const pixel = fc.integer({ min: -20, max: 90 })
  const arbitrary = fc.record({
    height: side,
    width: side,
    pixels: fc.nat(),
    regions: fc.array(
      fc.record({
        x: places,
        y: places,
        height: side,
        width: side,
        keep: fc.nat(5),
        overlay: fc.boolean(),
      }),
      { minLength: 1, maxLength: 2 },
    ),
    filter: fc.constantFrom(...filters),
    outlines: fc.option(fc.array(fc.tuple(pixel, pixel, pixel, pixel), { maxLength: 3 }), {
      nil: undefined,
    }),
    patchSize: fc.constantFrom(0, 1, 3, 14, 16),
    mergeSize: fc.constantFrom(1, 2),
    temporalPatchSize: fc.constantFrom(1 as const, 2 as const),
    dtype: fc.constantFrom(...floats, 'u8' as const),
  })

  test(`${cases} random boxes, sizes and filters`, { timeout: 60_000 + cases * 60 }, async () => {
    const run = (
      device: typeof portable,
      c: typeof arbitrary extends fc.Arbitrary<infer T> ? T : never,
    ) => {
      const image = device.tensor(randomImage(new Random(c.pixels), c.height, c.width).data, [
        c.height,
        c.width,
        3,
      ])
      const unit = Math.max(1, c.patchSize * c.mergeSize)
      const whole = (n: number) => Math.ceil(n / unit) * unit
      const regions = c.regions.map((r): Region => {
        const along = ([at, length]: readonly [number, number], n: number) => {
          const start = Math.round(at * n)
          return [start, start + Math.max(1, Math.round(length * n))] as const
        }
        const [x0, x1] = along(r.x, c.width)
        const [y0, y1] = along(r.y, c.height)
        const { overlay, keep } = r
        return {
          box: [x0, y0, x1, y1],
          height: whole(keep === 0 ? y1 - y0 : r.height),
          width: whole(keep <= 1 ? x1 - x0 : r.width),
          overlay,
        }
      })
      if (c.patchSize === 0) {
        const plain = regions.map(({ box, height, width }) => ({ box, height, width }))
        return cropResample({ image, regions: plain, filter: c.filter })
      }
      const { filter, patchSize, mergeSize, temporalPatchSize, dtype } = c
      const overlay = c.outlines && { boxes: c.outlines }
      const sizes = { patchSize, mergeSize, temporalPatchSize, dtype, filter }
      return [pixelValues({ image, regions, ...(overlay && { overlay }), ...sizes }).pixelValues]
    }
    const bytesOf = async (tensors: { read(): Promise<unknown> }[]) =>
      Promise.all(
        tensors.map(async (tensor) => {
          const data = (await tensor.read()) as Uint8Array
          return Buffer.from(data.buffer, data.byteOffset, data.byteLength)
        }),
      )
    await fc.assert(
      fc.asyncProperty(arbitrary, async (c) => {
        const expected = await scopeAsync(() => bytesOf(run(portable, c)))
        for (const device of devices) {
          const actual = await scopeAsync(() => bytesOf(run(device, c)))
          const same = actual.every((bytes, i) => bytes.equals(expected[i]!))
          if (!same) expect.fail(`${device.info.id} ${device.info.simd} ${device.info.features}`)
        }
      }),
      { numRuns: cases, seed },
    )
  })
})

onEveryBackend('scratch of cropResample and pixelValues', (b) => {
  // What CUDA keeps between its two kernels is as large as the image made narrow.
  test.skipIf(b.name === 'cuda')('is under 4 MB a thread, whatever the shape', async () => {
    const measured = async (
      [height, width]: readonly [number, number],
      region: { height: number; width: number },
      dtype: DType,
    ) => {
      using device = b.open({ threads: 2 })
      const image = device.zeros([height, width, 3], 'u8')
      const regions = [{ box: [0, 0, width, height] as const, ...region }]
      await image.read()
      device.resetPeak()
      const before = device.memory().liveBytes
      const out =
        dtype === 'u8'
          ? cropResample({ image, regions })[0]!
          : pixelValues({ image, regions, dtype: dtype as 'f32' }).pixelValues
      await device.synchronize()
      return device.memory().peakBytes - before - out.byteLength
    }
    for (const [image, height, width] of [
      [[1080, 7680], 256, 1920],
      [[700, 900], 704, 896],
      [[16384, 64], 32, 1920],
      [[64, 16384], 1920, 32],
      [[32, 64], 32, 8192],
      [[16384, 256], 32, 256],
    ] as const)
      for (const dtype of ['u8', 'f32'] as const) {
        const scratch = await measured(image, { height, width }, dtype)
        expect(scratch, `${image} to ${height} x ${width} ${dtype}`).toBeGreaterThan(0)
        expect(scratch, `${image} to ${height} x ${width} ${dtype}`).toBeLessThan(2 * 4e6)
      }
  })
})

describe('smartResize', () => {
  const rules = { qwen_vl_utils: 'qwen-vl-utils', hf_latest: 'transformers' } as const
  test.each(Object.entries(rules))('%s', (column, rule) => {
    for (const row of files.json('image/smart_resize.json')) {
      const run = () =>
        smartResize(row.height, row.width, {
          factor: row.factor,
          minPixels: row.min_pixels,
          maxPixels: row.max_pixels,
          rules: rule,
        })
      if (row[column].raises) expectRefusal(run, 'ERR_VALUE', 'smartResize')
      else
        expect(run(), JSON.stringify(row)).toEqual({
          height: row[column][0],
          width: row[column][1],
        })
    }
  })

  test('defaults and refusals', () => {
    expect(smartResize(4320, 7680, { maxPixels: 2097152 })).toEqual({ height: 1056, width: 1920 })
    expect(smartResize(48, 80)).toEqual({ height: 64, width: 64 })
    const refused = (a: Parameters<typeof smartResize>, message: RegExp) =>
      expectRefusal(() => smartResize(...a), 'ERR_VALUE', 'smartResize', message)
    refused([10, 2001], /aspect ratio must be at most 200/)
    refused([0, 10], /height must be a positive integer/)
    refused([10, 1.5], /width/)
    refused([Number.NaN, 10], /height/)
    refused([10, 10, { factor: 0 }], /factor/)
    refused([10, 10, { maxPixels: Number.POSITIVE_INFINITY }], /maxPixels/)
    refused([10, 10, { minPixels: 9000, maxPixels: 5000 }], /at least minPixels/)
    refused([10, 10, { rules: 'other' as never }], /rules/)
  })
})
