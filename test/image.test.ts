import { spawnSync } from 'node:child_process'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { crc32 } from 'node:zlib'
import { encodeImage, type ImageSource, loadImage, openDevice, saveImage } from 'p2r-kernels'
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
const refusesToLoad = (source: ImageSource, code: string, message: RegExp, options = {}) =>
  refused(loadImage(source, device, options), code, 'loadImage', message)

/** Two PNGs as one animation, of which the first is also the default image. */
function animatedPng(first: Uint8Array, second: Uint8Array): Uint8Array {
  const chunk = (type: string, ...parts: Uint8Array[]) => {
    const body = Buffer.concat([Buffer.from(type), ...parts])
    const ends = Buffer.alloc(8)
    ends.writeUInt32BE(body.length - 4)
    ends.writeUInt32BE(crc32(body), 4)
    return Buffer.concat([ends.subarray(0, 4), body, ends.subarray(4)])
  }
  const words = (...values: number[]) => {
    const bytes = Buffer.alloc(4 * values.length)
    for (const [i, value] of values.entries()) bytes.writeUInt32BE(value, 4 * i)
    return bytes
  }
  const chunks = (png: Uint8Array) => {
    const bytes = Buffer.from(png)
    const found = new Map<string, Buffer>()
    for (let at = 8; at < bytes.length; at += 12 + bytes.readUInt32BE(at))
      found.set(
        bytes.toString('latin1', at + 4, at + 8),
        bytes.subarray(at + 8, at + 8 + bytes.readUInt32BE(at)),
      )
    return found
  }
  const [a, b] = [chunks(first), chunks(second)]
  const size = a.get('IHDR')!.subarray(0, 8)
  const control = (n: number) =>
    chunk('fcTL', words(n), size, words(0, 0), Uint8Array.of(0, 1, 0, 10, 0, 0))
  return Buffer.concat([
    first.subarray(0, 8),
    chunk('IHDR', a.get('IHDR')!),
    chunk('acTL', words(2, 0)),
    control(0),
    chunk('IDAT', a.get('IDAT')!),
    control(1),
    chunk('fdAT', words(2), b.get('IDAT')!),
    chunk('IEND'),
  ])
}

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

  test('of 16 bits the high byte; grey can be clipped', async () => {
    const wide = (channels: 1 | 2 | 3 | 4) =>
      Uint16Array.from(noise(channels), (v, i) => v * 256 + ((i * 37) % 256))
    const encode = (
      data: Uint16Array,
      channels: 1 | 2 | 3 | 4,
      space: string,
      format: 'png' | 'tiff',
    ) =>
      sharp(data, { raw: { width, height, channels } })
        .toColourspace(space)
        .toFormat(format, format === 'tiff' ? { compression: 'lzw' } : {})
        .toBuffer()
    const options = { grey16: 'clip', alpha: 'drop' } as const
    for (const format of ['png', 'tiff'] as const) {
      const color = wide(3)
      const high = Uint8Array.from(color, (v) => v >> 8)
      const encoded = await encode(color, 3, 'rgb16', format)
      expect((await sharp(encoded).metadata()).depth).toBe('ushort')
      expect(await (await loadImage(encoded, device)).read()).toEqual(high)
      expect(await (await loadImage(encoded, device, options)).read()).toEqual(high)
      const grey = wide(1)
      grey.set([0, 7, 255, 256])
      const thrice = (f: (v: number) => number) =>
        Uint8Array.from({ length: grey.length * 3 }, (_, i) => f(grey[Math.floor(i / 3)]!))
      const greyFile = await encode(grey, 1, 'grey16', format)
      expect(await (await loadImage(greyFile, device)).read()).toEqual(thrice((v) => v >> 8))
      expect(await (await loadImage(greyFile, device, options)).read()).toEqual(
        thrice((v) => Math.min(v, 255)),
      )
    }
    const alpha = wide(4)
    const encoded = await encode(alpha, 4, 'rgb16', 'png')
    expect(await (await loadImage(encoded, device, { alpha: 'drop' })).read()).toEqual(
      Uint8Array.from(
        { length: rgb.length },
        (_, i) => alpha[Math.floor(i / 3) * 4 + (i % 3)]! >> 8,
      ),
    )
  })

  test('CMYK, as Pillow converts it', async () => {
    for (const format of ['jpeg', 'tiff'] as const) {
      const encoded = await raw(rgb, 3).toColourspace('cmyk').toFormat(format).toBuffer()
      expect((await sharp(encoded).metadata()).space).toBe('cmyk')
      const inks = await sharp(encoded).toColourspace('cmyk').raw().toBuffer()
      const data = await (await loadImage(encoded, device)).read()
      for (let i = 0; i < data.length; i++) {
        const at = Math.floor(i / 3) * 4
        const light = 255 - inks[at + 3]!
        expect(data[i]).toBe(light - Math.round((inks[at + (i % 3)]! * light) / 255))
      }
    }
  })

  test('the first frame of what is animated', async () => {
    const [w, h] = [8, 6]
    const frames = new Uint8Array(w * h * 2 * 3).map((_, i) => (i < w * h * 3 ? 40 : 200))
    const animation = () =>
      sharp(frames, { raw: { width: w, height: 2 * h, channels: 3, pageHeight: h } })
    const still = await raw(frames.subarray(0, w * h * 3), 3, w, h)
      .png()
      .toBuffer()
    for (const encoded of [
      await animation().webp({ lossless: true }).toBuffer(),
      await animation().gif().toBuffer(),
      animatedPng(
        still,
        await raw(frames.subarray(w * h * 3), 3, w, h)
          .png()
          .toBuffer(),
      ),
    ]) {
      using image = await loadImage(encoded, device)
      expect(image.shape).toEqual([h, w, 3])
      expect(new Set(await image.read())).toEqual(new Set([40]))
    }
    const single = await raw(rgb, 3).gif().toBuffer()
    expect((await loadImage(single, device)).shape).toEqual([height, width, 3])
  })

  describe('BMP', () => {
    interface Parts {
      bits: number
      width: number
      height: number
      compression?: number
      /** Red, green, blue and alpha masks, behind a header of 40 bytes or inside a longer one. */
      masks?: number[]
      palette?: number[][]
      pixels: number[]
      header?: 12 | 40 | 56 | 108 | 124
    }
    const bmp = (a: Parts): Uint8Array => {
      const { header = 40, masks = [], palette = [] } = a
      const bytes = new Uint8Array(14 + header + 4 * 5 + 4 * palette.length + a.pixels.length)
      const view = new DataView(bytes.buffer)
      bytes.set([0x42, 0x4d])
      view.setUint32(14, header, true)
      let at = 14 + header
      if (header === 12) {
        for (const [i, v] of [a.width, a.height, 1, a.bits].entries())
          view.setUint16(18 + 2 * i, v, true)
      } else {
        view.setInt32(18, a.width, true)
        view.setInt32(22, a.height, true)
        view.setUint16(28, a.bits, true)
        view.setUint32(30, a.compression ?? 0, true)
        view.setUint32(46, palette.length, true)
        for (const [i, mask] of masks.entries()) view.setUint32(54 + 4 * i, mask, true)
        if (header === 40) at += 4 * masks.length
      }
      for (const [r, g, b] of palette as [number, number, number][]) {
        bytes.set([b, g, r], at)
        at += header === 12 ? 3 : 4
      }
      // Some writers leave a gap before the pixels.
      at += 4
      view.setUint32(10, at, true)
      bytes.set(a.pixels, at)
      return bytes.subarray(0, at + a.pixels.length)
    }
    const load = async (bytes: Uint8Array, options = {}) => {
      using image = await loadImage(bytes, device, options)
      return [...(await image.read())]
    }
    const [red, green, blue] = [
      [255, 0, 0],
      [0, 255, 0],
      [0, 0, 255],
    ]
    const palette = [red, green, blue, [9, 8, 7]]
    // 3 x 2 pixels; the bottom row comes first, rows are padded to 4 bytes.
    const picture = [red, green, blue, blue, red, green].flat()
    const size = { width: 3, height: 2 }
    const rows24 = [255, 0, 0, 0, 0, 255, 0, 255, 0, 0, 0, 0]
    const top24 = [0, 0, 255, 0, 255, 0, 255, 0, 0, 0, 0, 0]

    test.each<[string, Parts, number[]]>([
      ['24 bits', { ...size, bits: 24, pixels: [...rows24, ...top24] }, picture],
      [
        'the top row first',
        { ...size, height: -2, bits: 24, pixels: [...top24, ...rows24] },
        picture,
      ],
      ['OS/2’s header', { ...size, bits: 24, header: 12, pixels: [...rows24, ...top24] }, picture],
      [
        'a header of 124 bytes',
        { ...size, bits: 24, header: 124, pixels: [...rows24, ...top24] },
        picture,
      ],
      [
        'no padding at the end',
        { ...size, bits: 24, pixels: [...rows24, ...top24.slice(0, 9)] },
        picture,
      ],
      ['8 bits', { ...size, bits: 8, palette, pixels: [2, 0, 1, 0, 0, 1, 2, 0] }, picture],
      // The rows behind one of odd width.
      [
        '4 bits',
        { ...size, bits: 4, palette, pixels: [0x20, 0x10, 0, 0, 0x01, 0x20, 0, 0] },
        picture,
      ],
      [
        '1 bit',
        { width: 9, height: 1, bits: 1, palette: [red!, green!], pixels: [0x80, 0x80, 0, 0] },
        [green, red, red, red, red, red, red, red, green].flat() as number[],
      ],
      [
        '4 bits of OS/2',
        {
          width: 2,
          height: 1,
          bits: 4,
          header: 12,
          palette: Array(16).fill(blue),
          pixels: [0, 0, 0, 0],
        },
        [blue, blue].flat() as number[],
      ],
      [
        '16 bits: 5 a channel',
        { width: 2, height: 1, bits: 16, pixels: [0x00, 0x7c, 0x21, 0x04] },
        // 1 of 31 is 8 of 255, as Pillow rounds it.
        [255, 0, 0, 8, 8, 8],
      ],
      [
        '16 bits: 5, 6 and 5',
        {
          width: 2,
          height: 1,
          bits: 16,
          compression: 3,
          masks: [0xf800, 0x7e0, 0x1f],
          pixels: [0xe0, 0x07, 0x1f, 0xf8],
        },
        [0, 255, 0, 255, 0, 255],
      ],
      [
        '32 bits: the fourth byte is nothing',
        { width: 2, height: 1, bits: 32, pixels: [0, 0, 255, 0, 255, 0, 0, 128] },
        [255, 0, 0, 0, 0, 255],
      ],
      [
        '32 bits with masks',
        {
          width: 1,
          height: 1,
          bits: 32,
          compression: 3,
          masks: [0xff, 0xff00, 0xff0000],
          pixels: [1, 2, 3, 0],
        },
        [1, 2, 3],
      ],
      [
        'runs of 8 bits',
        {
          ...size,
          bits: 8,
          compression: 1,
          palette,
          pixels: [1, 2, 1, 0, 1, 1, 0, 0, 0, 3, 0, 1, 2, 0, 0, 1],
        },
        picture,
      ],
      [
        'runs of 4 bits',
        {
          ...size,
          bits: 4,
          compression: 2,
          palette,
          pixels: [0, 3, 0x20, 0x10, 0, 0, 2, 0x01, 1, 0x20, 0, 1],
        },
        picture,
      ],
      [
        'runs with a jump',
        { ...size, bits: 8, compression: 1, palette, pixels: [0, 2, 2, 1, 1, 2, 0, 1] },
        [red, red, blue, red, red, red].flat() as number[],
      ],
    ])('%s', async (_, parts, expected) => {
      expect(await load(bmp(parts))).toEqual(expected)
    })

    test('alpha is laid over white, where a mask has it', async () => {
      const masks = [0xff0000, 0xff00, 0xff, 0xff000000]
      const parts = { width: 2, height: 1, bits: 32, compression: 3, masks, header: 108 as const }
      const bytes = bmp({ ...parts, pixels: [0, 0, 200, 0, 0, 0, 200, 255] })
      expect(await load(bytes)).toEqual([255, 255, 255, 200, 0, 0])
      expect(await load(bytes, { alpha: 'drop' })).toEqual([200, 0, 0, 200, 0, 0])
      const behind = bmp({
        ...parts,
        header: 40,
        compression: 6,
        pixels: [0, 0, 200, 0, 0, 0, 200, 255],
      })
      expect(await load(behind)).toEqual([255, 255, 255, 200, 0, 0])
    })

    test('is refused where it is broken or unknown', async () => {
      const good: Parts = { ...size, bits: 24, pixels: [...rows24, ...top24] }
      for (const [bytes, message] of [
        [bmp({ ...good, pixels: rows24 }), /ends within its pixels/],
        [bmp(good).subarray(0, 30), /ends within its header/],
        [bmp({ ...good, bits: 5 }), /5 bits a pixel in compression 0/],
        [bmp({ ...good, compression: 4 }), /compression 4/],
        [bmp({ ...good, width: 0 }), /0 x 2 pixels/],
        [bmp({ ...good, width: 30_000, height: 30_000 }), /more than maxPixels/],
        [
          bmp({ ...size, bits: 8, compression: 1, palette, pixels: [1, 2, 3] }),
          /ends within its pixels/,
        ],
        [
          bmp({ ...size, height: -2, bits: 8, compression: 1, palette, pixels: [0, 1] }),
          /compression 1/,
        ],
      ] as const)
        await refusesToLoad(bytes, 'ERR_FORMAT', message)
    })
  })

  test('URLs and Blobs', async () => {
    const png = await raw(rgb, 3).png().toBuffer()
    const path = join(folder, 'with space.png')
    await writeFile(path, png)
    const data = `data:image/png;base64,${png.toString('base64')}`
    for (const source of [
      pathToFileURL(path),
      pathToFileURL(path).href,
      data,
      data.replaceAll('+', '%2B'),
      new URL(data),
      new Blob([png]),
    ])
      expect(await (await loadImage(source, device)).read()).toEqual(rgb)
    await refusesToLoad('data:image/png,abc', 'ERR_VALUE', /must hold base64/)
    await refusesToLoad('https://example.com/a.png', 'ERR_VALUE', /download it first/)
    await refusesToLoad(new URL('https://example.com/a.png'), 'ERR_VALUE', /download it first/)
    await refusesToLoad('file://elsewhere/a.png', 'ERR_VALUE', /no local file/)
    await refusesToLoad(new Blob(['no image']), 'ERR_FORMAT', /the Blob must be JPEG, PNG/)
  })

  test('no error repeats the data', async () => {
    const base64 = 'A'.repeat(1e6)
    for (const [source, code, message] of [
      [`data:image/png;base64,${base64}`, 'ERR_FORMAT', /the data URL must be JPEG, PNG/],
      [`data:image/png,${base64}`, 'ERR_VALUE', /base64/],
      [base64, 'ERR_VALUE', /1000000 characters, .* Buffer\.from\(text, 'base64'\)/],
      [base64.slice(0, 3000), 'ERR_IO', /\(3000 characters\) could not be read/],
      [`https://example.com/${base64}`, 'ERR_VALUE', /download it first/],
    ] as const) {
      const error = await loadImage(source, device).catch((e: unknown) => e as Error)
      expect(error).toMatchObject({ name: 'P2RError', code, op: 'loadImage' })
      expect((error as Error).message).toMatch(message)
      expect((error as Error).message.length).toBeLessThan(400)
      expect((error as Error).message).not.toContain('\n')
    }
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
    await refusesToLoad(new TextEncoder().encode('no image at all'), 'ERR_FORMAT', /must be JPEG/)
    await refusesToLoad(
      new TextEncoder().encode('<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"/>'),
      'ERR_FORMAT',
      /must be JPEG, PNG, WebP/,
    )
    await refusesToLoad(png.subarray(0, png.length / 2), 'ERR_FORMAT', /decoded/)
    await refusesToLoad(jpeg.subarray(0, jpeg.length / 2), 'ERR_FORMAT', /decoded/)
    await refusesToLoad(
      Buffer.concat([Buffer.from('BM'), new Uint8Array(60)]),
      'ERR_FORMAT',
      /the data is a BMP that has a header of 0 bytes/,
    )
    for (const encoded of [
      await raw(rgb, 3).webp().toBuffer(),
      await raw(rgb, 3).tiff({ compression: 'lzw' }).toBuffer(),
      await raw(rgb, 3).avif().toBuffer(),
    ])
      await refusesToLoad(encoded.subarray(0, encoded.length / 2), 'ERR_FORMAT', /decoded/)
    const lab = await raw(rgb, 3).toColourspace('lab').tiff({ compression: 'lzw' }).toBuffer()
    await refusesToLoad(lab, 'ERR_FORMAT', /must be RGB, grey or 8-bit CMYK, got lab|8 or 16 bits/)
    await refusesToLoad(png, 'ERR_FORMAT', /more than maxPixels, 1000/, { maxPixels: 1000 })
    await refusesToLoad(png, 'ERR_VALUE', /maxPixels/, { maxPixels: 0 })
    await refusesToLoad(png, 'ERR_VALUE', /alpha/, { alpha: 'black' })
    await refusesToLoad(png, 'ERR_VALUE', /autoOrient/, { autoOrient: 1 })
    await refusesToLoad(png, 'ERR_VALUE', /grey16/, { grey16: 'low' })
    await refusesToLoad(7 as never, 'ERR_VALUE', /path or bytes/)
    await refused(loadImage(png, {} as never), 'ERR_VALUE', 'loadImage', /Device/)
  })

  test('an AVIF with a side that libvips would print about is refused in silence', async () => {
    const whole = await raw(rgb, 3).avif().toBuffer()
    const sized = (offset: number, side: number): Buffer => {
      const bytes = Buffer.from(whole)
      bytes.writeUInt32BE(side, bytes.indexOf('ispe') + offset)
      return bytes
    }
    // In place of the box of bit depths one that crops, of 40 bytes.
    const pixi = whole.indexOf('pixi') - 4
    const more = 40 - whole.readUInt32BE(pixi)
    const cropped = (...fractions: number[]): Buffer => {
      const clap = Buffer.alloc(40)
      clap.writeUInt32BE(40)
      clap.write('clap', 4)
      for (const [i, value] of fractions.entries()) clap.writeInt32BE(value, 8 + 4 * i)
      const bytes = Buffer.concat([whole.subarray(0, pixi), clap, whole.subarray(pixi + 40 - more)])
      for (const type of ['meta', 'iprp', 'ipco']) {
        const at = whole.indexOf(type) - 4
        bytes.writeUInt32BE(whole.readUInt32BE(at) + more, at)
      }
      // Where the pixels begin, in the box of items' places.
      const place = Buffer.alloc(4)
      place.writeUInt32BE(whole.indexOf('mdat') + 4)
      const at = whole.indexOf(place, whole.indexOf('iloc'))
      bytes.writeUInt32BE(whole.readUInt32BE(at) + more, at)
      return bytes
    }
    expect((await loadImage(cropped(20, 1, 10, 1, 0, 1, 0, 1), device)).shape).toEqual([10, 20, 3])
    const broken = [
      sized(8, 822083584),
      sized(12, 1879048209),
      sized(8, 2 ** 32 - 1),
      cropped(2e8, 1, 10, 1, 0, 1, 0, 1),
      cropped(10, 1, -2e8, -1, 0, 1, 0, 1),
    ]
    // The message goes to the process's own standard error, past Node.
    const code = `
      import { loadImage, openDevice } from '${new URL('../dist/lib/index.js', import.meta.url).href}'
      const device = openDevice('cpu')
      for (const text of JSON.parse(process.argv[1]))
        await loadImage(Buffer.from(text, 'base64'), device).catch((e) => console.log(e.code, e.message))`
    const texts = JSON.stringify(broken.map((bytes) => bytes.toString('base64')))
    const child = spawnSync(process.execPath, ['--input-type=module', '-e', code, texts], {
      encoding: 'utf8',
    })
    expect(child.stderr).toBe('')
    const lines = child.stdout.trim().split('\n')
    expect(lines).toHaveLength(broken.length)
    for (const line of lines) expect(line).toMatch(/^ERR_FORMAT .*claims a side/)
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
