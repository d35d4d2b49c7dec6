import { extname } from 'node:path'
import { setImmediate } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { types } from 'node:util'
import type { Sharp, SharpOptions } from 'sharp'
import { type AbortSignalLike, onAbort } from './abort.js'
import {
  checkArguments,
  checkBoolean,
  checkIntegerWithin,
  checkPositive,
  checkString,
  choice,
  describeValue,
  hostMemory,
  isObject,
  type Names,
} from './arguments.js'
import { BadBitmap, decodeBitmap, isBitmap } from './bmp.js'
import { checkDevice, type Device } from './device.js'
import { P2RError, refuse } from './errors.js'
import { readBytes, replaceFile, TooLarge } from './files.js'
import { imageSize, type Tensor } from './tensor.js'

const sharpModule = 'sharp' as string

// Loaded when first used, so that a program without images never loads libvips.
async function codec(op: string): Promise<typeof import('sharp').default> {
  try {
    // By a name that bundlers do not follow: they cannot take native modules in.
    return ((await import(sharpModule)) as typeof import('sharp')).default
  } catch (cause) {
    refuse('ERR_NATIVE', op, 'sharp, which decodes and encodes images, could not be loaded', {
      cause,
    })
  }
}

/** A file, as the global Blob and File have it. */
export interface BlobLike {
  /** Resolves to its bytes. */
  arrayBuffer(): Promise<ArrayBuffer>
}

/** The address of a file: URL objects have it. */
export interface UrlLike {
  /** file: or data:. */
  readonly href: string
}

/**
 * Where an encoded image is: a path, a file: or data: URL as an object or a text, its bytes, or a Blob. Data
 * URLs hold base64.
 */
export type ImageSource = string | UrlLike | Uint8Array | BlobLike

/** How an image file is decoded. */
export interface LoadImageOptions {
  /**
   * Applies the EXIF orientation; boxes then refer to the rotated image.
   *
   * @default false
   */
  autoOrient?: boolean
  /**
   * 'white' composites over white; 'drop' discards alpha only.
   *
   * @default 'white'
   */
  alpha?: 'white' | 'drop'
  /**
   * How 16-bit grey becomes 8-bit: 'high-byte' keeps the high byte, as 16-bit colour always does; 'clip' makes
   * every value above 255 white, as Pillow's convert('RGB') does.
   *
   * @default 'high-byte'
   */
  grey16?: 'high-byte' | 'clip'
  /**
   * Larger images are ERR_FORMAT, before they are decoded.
   *
   * @default 100 000 000
   */
  maxPixels?: number
  /** An abort rejects with the signal's reason. */
  signal?: AbortSignalLike
}

const loadNames: Names<LoadImageOptions> = {
  autoOrient: true,
  alpha: true,
  grey16: true,
  maxPixels: true,
  signal: true,
}

/**
 * An image decoded to u8 [height, width, 3]: JPEG, PNG, WebP, GIF, TIFF, AVIF or BMP; the first page or frame
 * where there are several (of an animated PNG its default image).
 *
 * Pixels are returned as stored, as Pillow reads them: EXIF orientation and colour profiles are not
 * applied; grey is repeated over the channels; CMYK becomes (255 - ink)(255 - black) / 255; of 16 bits a
 * channel the high byte is kept.
 *
 * @param source a path, a URL, the encoded bytes or a Blob; see ImageSource. Nothing is fetched over the network. Bytes
 *   are copied at the call; a file must be a regular one of at most 1 GiB.
 * @throws P2RError ERR_IO (with cause) for a file that cannot be read; ERR_FORMAT for anything but such an
 *   image, truncated, or of another depth or colour space; ERR_VALUE for wrong arguments;
 *   ERR_NATIVE where the package sharp cannot be loaded.
 * @example
 * ```js
 * import { encodeImage, loadImage, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const png = await encodeImage(device.zeros([4, 6, 3], 'u8'))
 * console.log((await loadImage(png, device)).shape) // [ 4, 6, 3 ]
 * device.dispose()
 * ```
 */
export async function loadImage(
  source: ImageSource,
  device: Device,
  options: LoadImageOptions = {},
): Promise<Tensor<'u8'>> {
  const op = 'loadImage'
  options = checkArguments(options, loadNames, op, 'options')
  const { autoOrient = false, alpha = 'white', grey16 = 'high-byte' } = options
  const { maxPixels = 100_000_000, signal } = options
  const input = inputOf(source, op)
  checkDevice(device, op)
  checkBoolean(autoOrient, 'autoOrient', op)
  choice(alpha, ['white', 'drop'], 'alpha', op)
  choice(grey16, ['high-byte', 'clip'], 'grey16', op)
  checkPositive(maxPixels, 'maxPixels', op)

  signal?.throwIfAborted()
  const decoding = decode(input, { autoOrient, grey16, maxPixels }, op, signal)
  const { data, width, height, channels } = await abortable(decoding, signal)
  return device.tensor(await toRgb(data, channels, alpha === 'white'), [height, width, 3], 'u8')
}

/** An image to decode: how errors name it, and how its bytes are read. */
interface Input {
  name: string
  read(signal: AbortSignalLike | undefined): Promise<Uint8Array>
}

/** Longer than any path; a text of this length is an image that was not decoded from base64. */
const maxPath = 4096

/** Bytes of an encoded image: more than one of the largest images has, and less than the codecs' limits. */
const maxFile = 2 ** 30

function inputOf(source: unknown, op: string): Input {
  if (types.isUint8Array(source)) {
    // A copy, since the caller may transfer or change the bytes while a thread of the codec's reads them.
    const bytes = hostMemory(() => new Uint8Array(source), op)
    return { name: 'the data', read: async () => bytes }
  }
  if (typeof source === 'string') {
    if (/^(data|file|https?):/i.test(source)) return fromUrl(source, op)
    if (source.length > maxPath)
      refuse(
        'ERR_VALUE',
        op,
        `source has ${source.length} characters, too many for a path; base64 is decoded by Buffer.from(text, 'base64')`,
      )
    return fromPath(source, op)
  }
  if (isObject(source)) {
    const { href, arrayBuffer } = source as Partial<UrlLike & BlobLike>
    if (typeof href === 'string') return fromUrl(href, op)
    if (typeof arrayBuffer === 'function')
      return {
        name: 'the Blob',
        read: () => blobBytes(source as BlobLike, op),
      }
  }
  refuse(
    'ERR_VALUE',
    op,
    `source must be a path or bytes, a URL or a Blob, got ${describeValue(source)}`,
  )
}

async function blobBytes(blob: BlobLike, op: string): Promise<Uint8Array> {
  let bytes: unknown
  try {
    bytes = await blob.arrayBuffer()
  } catch (cause) {
    refuse('ERR_IO', op, `the Blob could not be read: ${(cause as Error)?.message}`, { cause })
  }
  if (!types.isAnyArrayBuffer(bytes))
    refuse('ERR_VALUE', op, `the Blob must have an ArrayBuffer, got ${describeValue(bytes)}`)
  return hostMemory(() => new Uint8Array(new Uint8Array(bytes)), op)
}

function fromPath(path: string, op: string): Input {
  const name = describeValue(path)
  return {
    name,
    read: (signal) =>
      readBytes(path, maxFile, signal).catch((cause) => {
        if (signal?.aborted) throw cause
        if (cause instanceof TooLarge) refuse('ERR_FORMAT', op, `${name}: ${cause.message}`)
        // The system's message repeats the path.
        const why = cause.code === undefined ? cause.message : `${cause.code}`
        return refuse('ERR_IO', op, `${name} could not be read: ${why}`, { cause })
      }),
  }
}

function fromUrl(href: string, op: string): Input {
  const scheme = href.slice(0, href.indexOf(':')).toLowerCase()
  if (scheme === 'data') {
    const [head] = /^data:[^,]{0,200};base64,/i.exec(href) ?? []
    if (!head) refuse('ERR_VALUE', op, 'a data URL must hold base64: data:image/png;base64,...')
    const bytes = Buffer.from(href.slice(head.length).replaceAll('%2B', '+'), 'base64')
    return { name: 'the data URL', read: async () => bytes }
  }
  if (scheme !== 'file')
    refuse(
      'ERR_VALUE',
      op,
      `source must be a path, a file: or data: URL, got ${describeValue(href)}; download it first`,
    )
  let path: string
  try {
    path = fileURLToPath(href)
  } catch (cause) {
    refuse('ERR_VALUE', op, `${describeValue(href)} names no local file`, { cause })
  }
  return fromPath(path, op)
}

interface Decoded {
  data: Uint8Array
  width: number
  height: number
  channels: number
}

/** The format by a file's first bytes, so that no decoder of another one, such as SVG's, sees it. */
function formatOf(bytes: Uint8Array): string | undefined {
  const text = (from: number, to: number): string =>
    String.fromCharCode(...bytes.subarray(from, to))
  const start = text(0, 4)
  if (start.startsWith('\xff\xd8\xff')) return 'jpeg'
  if (text(0, 8) === '\x89PNG\r\n\x1a\n') return 'png'
  if (start === 'RIFF' && text(8, 12) === 'WEBP') return 'webp'
  if (/^GIF8[79]a$/.test(text(0, 6))) return 'gif'
  // With 43 it is BigTIFF.
  if (['II*\0', 'MM\0*', 'II+\0', 'MM\0+'].includes(start)) return 'tiff'
  if (text(4, 8) !== 'ftyp') return undefined
  // The box of a file's type: its length, 'ftyp', the major brand, a version, the other brands.
  const brands = text(8, Math.min(64, 256 * bytes[2]! + bytes[3]!))
  return /^(?:.{4})*(?:avif|avis)/s.test(brands) ? 'avif' : undefined
}

/** The longest side that AVIF can have: a grid of 256 frames, each of 65536 pixels. */
const longestAvifSide = 2 ** 24

/**
 * Whether an AVIF file claims a side that no AVIF image has, by its size ('ispe') or its crop ('clap'). Beyond 10^8
 * libvips prints a message of GLib's on standard error, which nothing in sharp turns off.
 */
function hasImpossibleSide(file: Uint8Array): boolean {
  const bytes = Buffer.from(file.buffer, file.byteOffset, file.byteLength)
  let start = 0
  while (start + 8 <= bytes.length) {
    // A length of 0 reaches to the end of the file; with 1 the length is in the 8 bytes after the type.
    let length = bytes.readUInt32BE(start) || bytes.length
    if (length === 1 && start + 16 <= bytes.length)
      length = Number(bytes.readBigUInt64BE(start + 8))
    if (length < 8) return false
    const box = bytes.subarray(start, start + length)
    // Compressed pixels may hold anything. In other boxes order and depth are the decoder's matter.
    if (box.toString('latin1', 4, 8) !== 'mdat' && namesImpossibleSide(box)) return true
    start += length
  }
  return false
}

function namesImpossibleSide(box: Buffer): boolean {
  for (const type of ['ispe', 'clap'])
    for (let at = box.indexOf(type, 4); at >= 0; at = box.indexOf(type, at + 4)) {
      const body = at + (box.readUInt32BE(at - 4) === 1 ? 12 : 4)
      if (body + (type === 'ispe' ? 12 : 16) > box.length) continue
      const int = (i: number): number => box.readInt32BE(body + 4 * i)
      // After its version, ispe has two sides; clap begins with two fractions.
      const sides =
        type === 'ispe' ? [int(1) >>> 0, int(2) >>> 0] : [int(0) / int(1), int(2) / int(3)]
      if (sides.some((side) => Math.abs(side) > longestAvifSide)) return true
    }
  return false
}

async function decode(
  { name, read }: Input,
  a: Required<Pick<LoadImageOptions, 'autoOrient' | 'grey16' | 'maxPixels'>>,
  op: string,
  signal: AbortSignalLike | undefined,
): Promise<Decoded> {
  const bytes = await read(signal)
  signal?.throwIfAborted()
  const reject = (reason: string): never => refuse('ERR_FORMAT', op, `${name} ${reason}`)
  if (isBitmap(bytes))
    try {
      return decodeBitmap(bytes, a.maxPixels)
    } catch (error) {
      if (error instanceof BadBitmap) reject(`is a BMP that ${error.message}`)
      throw error
    }
  const format = formatOf(bytes)
  if (!format) reject('must be JPEG, PNG, WebP, GIF, TIFF, AVIF or BMP')
  if (format === 'avif' && hasImpossibleSide(bytes))
    reject(`claims a side of more than ${longestAvifSide} pixels, which no AVIF image has`)
  const sharp = await codec(op)
  const input: SharpOptions = {
    limitInputPixels: false,
    failOn: 'error',
    ignoreIcc: true,
    autoOrient: a.autoOrient,
  }
  try {
    const meta = await sharp(bytes, input).metadata()
    const found = meta.format === 'heif' && meta.compression === 'av1' ? 'avif' : meta.format
    if (found !== format) reject(`begins as ${format}, but is ${found}`)
    const { depth, space = '' } = meta
    if (depth !== 'uchar' && depth !== 'ushort')
      reject(`must have 8 or 16 bits a channel, got ${depth}`)
    const known = depth === 'uchar' ? ['srgb', 'rgb', 'b-w', 'cmyk'] : ['rgb16', 'grey16']
    if (!known.includes(space)) reject(`must be RGB, grey or 8-bit CMYK, got ${space}`)
    if (meta.width * meta.height > a.maxPixels)
      reject(`has ${meta.width} x ${meta.height} pixels, more than maxPixels, ${a.maxPixels}`)
    signal?.throwIfAborted()
    const image = sharp(bytes, input)
    const clip = space === 'grey16' && a.grey16 === 'clip' && meta.channels === 1
    if (space === 'cmyk') image.toColourspace('cmyk').raw()
    else if (clip) image.toColourspace('grey16').raw({ depth: 'ushort' })
    else image.raw()
    const { data, info } = await image.toBuffer({ resolveWithObject: true })
    const { width, height, channels } = info
    if (space === 'cmyk') {
      if (channels !== 4) reject(`must have four channels of CMYK, got ${channels}`)
      return { data: await cmykToRgb(data), width, height, channels: 3 }
    }
    return { data: clip ? await clipped(data) : data, width, height, channels }
  } catch (cause) {
    if (cause instanceof P2RError || signal?.aborted) throw cause
    refuse('ERR_FORMAT', op, `${name} could not be decoded: ${(cause as Error).message}`, { cause })
  }
}

/** Pixels that are converted before other work of the event loop has its turn; some 10 ms. */
const pixelsAtOnce = 1 << 19

/** Calls f for ranges of pixels, and lets other work go on between them. */
async function inParts(pixels: number, f: (from: number, to: number) => void): Promise<void> {
  for (let from = 0; from < pixels; from += pixelsAtOnce) {
    if (from) await setImmediate()
    f(from, Math.min(pixels, from + pixelsAtOnce))
  }
}

/** 16-bit values in native order, those above 255 as 255. */
async function clipped(data: Uint8Array): Promise<Uint8Array> {
  const wide = new Uint16Array(data.buffer, data.byteOffset, data.length / 2)
  const out = new Uint8Array(wide.length)
  await inParts(out.length, (from, to) => {
    for (let i = from; i < to; i++) out[i] = Math.min(wide[i]!, 255)
  })
  return out
}

/** a b / 255, rounded, as Pillow computes it. */
function scaled(a: number, b: number): number {
  const product = a * b + 128
  return ((product >> 8) + product) >> 8
}

/** As Pillow converts CMYK, without a profile. */
async function cmykToRgb(data: Uint8Array): Promise<Uint8Array> {
  const out = new Uint8Array((data.length / 4) * 3)
  await inParts(data.length / 4, (from, to) => {
    for (let i = 3 * from, p = 4 * from; p < 4 * to; i += 3, p += 4) {
      const light = 255 - data[p + 3]!
      for (let c = 0; c < 3; c++) out[i + c] = light - scaled(data[p + c]!, light)
    }
  })
  return out
}

// sharp cannot be interrupted, so an abort only ends the wait for it.
async function abortable<T>(work: Promise<T>, signal: AbortSignalLike | undefined): Promise<T> {
  let forget = () => {}
  const aborted = new Promise<never>((_, reject) => {
    forget = onAbort(signal, () => reject(signal?.reason))
  })
  try {
    return await Promise.race([work, aborted])
  } catch (error) {
    throw signal?.aborted ? signal.reason : error
  } finally {
    forget()
  }
}

/**
 * One to four channels (grey, grey and alpha, RGB, RGB and alpha) to three. Not sharp's own conversion, which rounds what
 * is composited in another way than Pillow.
 */
async function toRgb(data: Uint8Array, channels: number, overWhite: boolean): Promise<Uint8Array> {
  if (channels === 3) return data
  const pixels = data.length / channels
  const out = new Uint8Array(pixels * 3)
  const [green, blue] = channels >= 3 ? [1, 2] : [0, 0]
  const alphaAt = overWhite && channels % 2 === 0 ? channels - 1 : -1
  await inParts(pixels, (from, to) => {
    for (let i = 3 * from, p = channels * from; i < 3 * to; i += 3, p += channels) {
      out[i] = data[p]!
      out[i + 1] = data[p + green]!
      out[i + 2] = data[p + blue]!
      // Opaque pixels stay as they are.
      if (alphaAt < 0 || data[p + alphaAt] === 255) continue
      // Pillow's paste through a mask: (v a + 255 (255 - a)) / 255, rounded.
      const a = data[p + alphaAt]!
      for (let c = i; c < i + 3; c++) out[c] = scaled(out[c]!, a) + 255 - a
    }
  })
  return out
}

const extensions: Record<string, string> = {
  '.png': 'png',
  '.jpg': 'jpeg',
  '.jpeg': 'jpeg',
  '.webp': 'webp',
  '.tif': 'tiff',
  '.tiff': 'tiff',
  '.avif': 'avif',
}

/**
 * Writes an image to a file, in the format of its extension: .png, .jpg, .jpeg, .webp, .tif, .tiff or
 * .avif. PNG and TIFF keep every pixel. A file that is there already stays until the new one is whole.
 *
 * @param image u8 [height, width, 3].
 * @throws P2RError ERR_VALUE for another extension; ERR_IO (with cause) when the file cannot be written;
 *   ERR_SHAPE and ERR_DTYPE for a tensor that is no image; ERR_NATIVE where the package sharp cannot be loaded.
 * @example
 * ```js
 * import { tmpdir } from 'node:os'
 * import { loadImage, openDevice, saveImage } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const path = `${tmpdir()}/p2r-example.png`
 * await saveImage(device.zeros([4, 6, 3], 'u8'), path)
 * console.log((await loadImage(path, device)).shape) // [ 4, 6, 3 ]
 * device.dispose()
 * ```
 */
export async function saveImage(image: Tensor<'u8'>, path: string): Promise<void> {
  const op = 'saveImage'
  checkString(path, 'path', op)
  const format = extensions[extname(path).toLowerCase()]
  if (!format)
    refuse('ERR_VALUE', op, `path must end in ${Object.keys(extensions).join(', ')}, got '${path}'`)
  const bytes = await encode(image, format, undefined, op)
  await replaceFile(path, [bytes]).catch((cause) =>
    refuse('ERR_IO', op, `'${path}' could not be written: ${cause.message}`, { cause }),
  )
}

/** How an image is encoded. */
export interface EncodeImageOptions {
  /**
   * 'png' keeps every pixel.
   *
   * @default 'png'
   */
  format?: 'png' | 'jpeg' | 'webp'
  /**
   * 1 to 100, for 'jpeg' and 'webp'.
   *
   * @default 90
   */
  quality?: number
}

const encodeNames: Names<EncodeImageOptions> = { format: true, quality: true }

/**
 * An image as the bytes of a file.
 *
 * @param image u8 [height, width, 3].
 * @throws P2RError ERR_SHAPE and ERR_DTYPE for a tensor that is no image; ERR_VALUE for wrong options;
 *   ERR_NATIVE where the package sharp cannot be loaded.
 * @example
 * ```js
 * import { encodeImage, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const jpeg = await encodeImage(device.zeros([4, 6, 3], 'u8'), { format: 'jpeg', quality: 80 })
 * console.log(jpeg[0] === 0xff && jpeg[1] === 0xd8) // true
 * device.dispose()
 * ```
 */
export async function encodeImage(
  image: Tensor<'u8'>,
  options: EncodeImageOptions = {},
): Promise<Uint8Array> {
  const op = 'encodeImage'
  options = checkArguments(options, encodeNames, op, 'options')
  const format = choice(options.format ?? 'png', ['png', 'jpeg', 'webp'], 'format', op)
  const { quality } = options
  if (quality !== undefined) checkIntegerWithin(quality, 1, 100, 'quality', op)
  return new Uint8Array(await encode(image, format, quality, op))
}

async function encode(
  image: Tensor<'u8'>,
  format: string,
  quality: number | undefined,
  op: string,
): Promise<Buffer> {
  const [height, width] = imageSize(image, op)
  const data = await image.read()
  const sharp = await codec(op)
  const raw: Sharp = sharp(data, { raw: { width, height, channels: 3 }, limitInputPixels: false })
  const encoders: Record<string, () => Sharp> = {
    png: () => raw.png(),
    jpeg: () => raw.jpeg({ quality: quality ?? 90 }),
    webp: () => raw.webp({ quality: quality ?? 90 }),
    tiff: () => raw.tiff({ compression: 'deflate' }),
    avif: () => raw.avif({ quality: quality ?? 90 }),
  }
  try {
    return await encoders[format]!().toBuffer()
  } catch (cause) {
    refuse('ERR_VALUE', op, `the image could not be encoded: ${(cause as Error).message}`, {
      cause,
    })
  }
}
