import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { encodeImage, loadImage, openDevice, saveImage } from 'p2r-kernels'
import sharp from 'sharp'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { Random } from './harness.js'

const device = openDevice('cpu')
let folder: string
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'p2r-image-'))
})
afterAll(async () => {
  await rm(folder, { recursive: true })
  device.dispose()
})

const [height, width] = [37, 52]
const random = new Random(3)
const noise = (channels: number) =>
  Uint8Array.from({ length: height * width * channels }, () => random.int(0, 255))
const rgb = noise(3)
const raw = (data: Uint8Array, channels: 1 | 2 | 3 | 4, w = width, h = height) =>
  sharp(data, { raw: { width: w, height: h, channels } })
const refused = (promise: Promise<unknown>, code: string, op: string, message: RegExp) =>
  expect(promise).rejects.toMatchObject({
    name: 'P2RError',
    code,
    op,
    message: expect.stringMatching(message),
  })
const refusesToLoad = (source: string | Uint8Array, code: string, message: RegExp, options = {}) =>
  refused(loadImage(source, device, options), code, 'loadImage', message)

describe('loadImage', () => {
  test.each(['png', 'tiff', 'webp', 'jpeg', 'avif'] as const)(
    '%s from bytes and from a file',
    async (format) => {
      const lossless = { png: {}, tiff: { compression: 'lzw' }, webp: { lossless: true } }
      const encoded = await raw(rgb, 3)
        .toFormat(format, lossless[format as 'png'])
        .toBuffer()
      const path = join(folder, `a.${format}`)
      await writeFile(path, encoded)
      using fromBytes = await loadImage(new Uint8Array(encoded), device)
      using fromFile = await loadImage(path, device)
      expect(fromBytes.shape).toEqual([height, width, 3])
      expect(fromBytes.dtype).toBe('u8')
      const data = await fromBytes.read()
      expect(await fromFile.read()).toEqual(data)
      if (format in lossless) expect(data).toEqual(rgb)
    },
  )

  test('grey is repeated over three channels', async () => {
    const grey = noise(1)
    for (const encoded of [
      await raw(grey, 1).toColourspace('b-w').png().toBuffer(),
      await raw(grey, 1).toColourspace('b-w').tiff({ compression: 'lzw' }).toBuffer(),
      await raw(grey, 1).toColourspace('b-w').webp({ lossless: true }).toBuffer(),
    ]) {
      const data = await (await loadImage(encoded, device)).read()
      expect(data).toEqual(
        Uint8Array.from({ length: data.length }, (_, i) => grey[Math.floor(i / 3)]!),
      )
    }
  })

  test('a grey JPEG has equal channels', async () => {
    const encoded = await raw(noise(1), 1).toColourspace('b-w').jpeg().toBuffer()
    const data = await (await loadImage(encoded, device)).read()
    expect(data.length).toBe(height * width * 3)
    expect(data.every((v, i) => v === data[i - (i % 3)])).toBe(true)
  })

  test('alpha over white, or dropped', async () => {
    const rgba = noise(4)
    rgba.set([1, 2, 3, 0, 4, 5, 6, 255])
    const encoded = await raw(rgba, 4).png().toBuffer()
    const dropped = Uint8Array.from(
      { length: rgb.length },
      (_, i) => rgba[Math.floor(i / 3) * 4 + (i % 3)]!,
    )
    const white = dropped.map((v, i) => {
      const a = rgba[Math.floor(i / 3) * 4 + 3]!
      return Math.round((v * a + 255 * (255 - a)) / 255)
    })
    expect(await (await loadImage(encoded, device)).read()).toEqual(white)
    expect(await (await loadImage(encoded, device, { alpha: 'drop' })).read()).toEqual(dropped)
    const greyAlpha = await raw(noise(2), 2).toColourspace('b-w').png().toBuffer()
    const data = await (await loadImage(greyAlpha, device)).read()
    expect(data.every((v, i) => v === data[i - (i % 3)])).toBe(true)
  })

  test('pixels as stored, unless autoOrient', async () => {
    const turned = await raw(rgb, 3).withMetadata({ orientation: 6 }).png().toBuffer()
    expect(await (await loadImage(turned, device)).read()).toEqual(rgb)
    using upright = await loadImage(turned, device, { autoOrient: true })
    expect(upright.shape).toEqual([width, height, 3])
    const data = await upright.read()
    // Orientation 6: the stored left column, read upwards, is the upright top row.
    for (let x = 0; x < height; x++) expect(data[x * 3]).toBe(rgb[(height - 1 - x) * width * 3])
  })

  test('no colour profile is applied', async () => {
    const p3 = await raw(rgb, 3).withIccProfile('p3').png().toBuffer()
    const plain = await sharp(p3, { ignoreIcc: true }).raw().toBuffer()
    expect((await sharp(p3).metadata()).hasProfile).toBe(true)
    expect(await (await loadImage(p3, device)).read()).toEqual(new Uint8Array(plain))
  })

  test('refuses other files', async () => {
    const png = await raw(rgb, 3).png().toBuffer()
    const jpeg = await raw(rgb, 3).jpeg().toBuffer()
    await refusesToLoad(join(folder, 'none.png'), 'ERR_IO', /none\.png/)
    await refusesToLoad(folder, 'ERR_IO', /could not be read/)
    await expect(loadImage(join(folder, 'none.png'), device)).rejects.toMatchObject({
      cause: { code: 'ENOENT' },
    })
    await refusesToLoad(new Uint8Array(0), 'ERR_FORMAT', /./)
    await refusesToLoad(new TextEncoder().encode('no image at all'), 'ERR_FORMAT', /decoded/)
    await refusesToLoad(
      new TextEncoder().encode('<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"/>'),
      'ERR_FORMAT',
      /got svg/,
    )
    await refusesToLoad(png.subarray(0, png.length / 2), 'ERR_FORMAT', /decoded/)
    await refusesToLoad(jpeg.subarray(0, jpeg.length / 2), 'ERR_FORMAT', /decoded/)
    await refusesToLoad(
      await raw(rgb, 3).toColourspace('cmyk').jpeg().toBuffer(),
      'ERR_FORMAT',
      /cmyk/,
    )
    await refusesToLoad(
      await raw(rgb, 3).toColourspace('rgb16').png().toBuffer(),
      'ERR_FORMAT',
      /8 bits/,
    )
    await refusesToLoad(await raw(rgb, 3).gif().toBuffer(), 'ERR_FORMAT', /got gif/)
    for (const encoded of [
      await raw(rgb, 3).webp().toBuffer(),
      await raw(rgb, 3).tiff({ compression: 'lzw' }).toBuffer(),
      await raw(rgb, 3).avif().toBuffer(),
    ])
      await refusesToLoad(encoded.subarray(0, encoded.length / 2), 'ERR_FORMAT', /decoded/)
    await refusesToLoad(
      await raw(rgb, 3).toColourspace('cmyk').tiff().toBuffer(),
      'ERR_FORMAT',
      /cmyk/,
    )
    await refusesToLoad(
      await raw(rgb, 3).toColourspace('rgb16').tiff({ compression: 'lzw' }).toBuffer(),
      'ERR_FORMAT',
      /8 bits/,
    )
    const frames = new Uint8Array(8 * 16 * 3).map((_, i) => (i < 192 ? 0 : 200))
    const animated = await sharp(frames, {
      raw: { width: 8, height: 16, channels: 3, pageHeight: 8 },
    })
      .webp()
      .toBuffer()
    await refusesToLoad(animated, 'ERR_FORMAT', /animated/)
    await refusesToLoad(png, 'ERR_FORMAT', /more than maxPixels, 1000/, { maxPixels: 1000 })
    await refusesToLoad(png, 'ERR_VALUE', /maxPixels/, { maxPixels: 0 })
    await refusesToLoad(png, 'ERR_VALUE', /alpha/, { alpha: 'black' })
    await refusesToLoad(png, 'ERR_VALUE', /autoOrient/, { autoOrient: 1 })
    await refusesToLoad(7 as never, 'ERR_VALUE', /path or bytes/)
    await refused(loadImage(png, {} as never), 'ERR_VALUE', 'loadImage', /Device/)
  })

  test('an abort rejects with its reason', async () => {
    const reason = new Error('enough')
    const png = await raw(rgb, 3).png().toBuffer()
    await expect(loadImage(png, device, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason)
    const path = join(folder, 'late.png')
    await writeFile(path, png)
    for (const source of [png, path]) {
      const late = new AbortController()
      const loading = loadImage(source, device, { signal: late.signal })
      late.abort(reason)
      await expect(loading).rejects.toBe(reason)
    }
    const { signal } = new AbortController()
    expect((await loadImage(png, device, { signal })).shape).toEqual([height, width, 3])
  })
})

describe('saveImage and encodeImage', () => {
  const image = device.tensor(rgb, [height, width, 3])

  test.each(['png', 'tif', 'TIFF', 'jpg', 'jpeg', 'webp', 'avif'])('.%s', async (extension) => {
    const path = join(folder, `out.${extension}`)
    await saveImage(image, path)
    using back = await loadImage(path, device)
    expect(back.shape).toEqual([height, width, 3])
    if (/png|tif/i.test(extension)) expect(await back.read()).toEqual(rgb)
  })

  test('as bytes', async () => {
    expect(await (await loadImage(await encodeImage(image), device)).read()).toEqual(rgb)
    for (const format of ['jpeg', 'webp'] as const) {
      const small = await encodeImage(image, { format, quality: 10 })
      expect(small).toBeInstanceOf(Uint8Array)
      expect((await sharp(small).metadata()).format).toBe(format)
      expect(small.length).toBeLessThan((await encodeImage(image, { format })).length)
    }
  })

  test('refuses invalid arguments', async () => {
    const save = (a: unknown, path: unknown, code: string, message: RegExp) =>
      refused(saveImage(a as never, path as never), code, 'saveImage', message)
    await save(image, join(folder, 'x.bmp'), 'ERR_VALUE', /must end in/)
    await save(image, 3, 'ERR_VALUE', /path/)
    await save(image, join(folder, 'no/such/x.png'), 'ERR_IO', /could not be written/)
    await save(device.zeros([4, 4, 3]), join(folder, 'x.png'), 'ERR_DTYPE', /u8/)
    await save(device.zeros([4, 4], 'u8'), join(folder, 'x.png'), 'ERR_SHAPE', /height, width, 3/)
    await save(device.zeros([0, 4, 3], 'u8'), join(folder, 'x.png'), 'ERR_SHAPE', /not empty/)
    await save('x', join(folder, 'x.png'), 'ERR_VALUE', /Tensor/)
    const encode = (options: object, message: RegExp) =>
      refused(encodeImage(image, options), 'ERR_VALUE', 'encodeImage', message)
    await encode({ format: 'gif' }, /format/)
    await encode({ format: 'jpeg', quality: 101 }, /quality/)
    await encode({ format: 'jpeg', quality: 1.5 }, /quality/)
    await expect(readFile(join(folder, 'x.png'))).rejects.toThrow()
  })
})
