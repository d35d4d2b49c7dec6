import { readFile, writeFile } from 'node:fs/promises'
import { extname } from 'node:path'
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
  type Names,
} from './arguments.js'
import { checkDevice, type Device } from './device.js'
import { P2RError, refuse } from './errors.js'
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
   * Larger images are ERR_FORMAT, before they are decoded.
   *
   * @default 268 402 689
   */
  maxPixels?: number
  /** An abort rejects with the signal's reason. */
  signal?: AbortSignalLike
}

const loadNames: Names<LoadImageOptions> = {
  autoOrient: true,
  alpha: true,
  maxPixels: true,
  signal: true,
}

/**
 * An image decoded to u8 [height, width, 3]: JPEG, PNG, WebP, TIFF (its first page) or AVIF.
 *
 * Pixels are returned as stored, as Pillow reads them: EXIF orientation and colour profiles are not
 * applied; grey is repeated over the channels.
 *
 * @param source a path, or the encoded bytes.
 * @throws P2RError ERR_IO (with cause) for a file that cannot be read; ERR_FORMAT for anything but such an
 *   image, truncated, animated, CMYK or of more than 8 bits a channel; ERR_VALUE for wrong arguments;
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
  source: string | Uint8Array,
  device: Device,
  options: LoadImageOptions = {},
): Promise<Tensor<'u8'>> {
  const op = 'loadImage'
  checkArguments(options, loadNames, op, 'options')
  const { autoOrient = false, alpha = 'white', maxPixels = 268_402_689, signal } = options
  if (typeof source !== 'string' && !(source instanceof Uint8Array))
    refuse('ERR_VALUE', op, `source must be a path or bytes, got ${describeValue(source)}`)
  checkDevice(device, op)
  checkBoolean(autoOrient, 'autoOrient', op)
  choice(alpha, ['white', 'drop'], 'alpha', op)
  checkPositive(maxPixels, 'maxPixels', op)

  signal?.throwIfAborted()
  const decoding = decode(source, autoOrient, maxPixels, op, signal)
  const { data, width, height, channels } = await abortable(decoding, signal)
  return device.tensor(toRgb(data, channels, alpha === 'white'), [height, width, 3], 'u8')
}

interface Decoded {
  data: Uint8Array
  width: number
  height: number
  channels: number
}

async function decode(
  source: string | Uint8Array,
  autoOrient: boolean,
  maxPixels: number,
  op: string,
  signal: AbortSignalLike | undefined,
): Promise<Decoded> {
  const name = typeof source === 'string' ? `'${source}'` : 'the data'
  const bytes =
    typeof source === 'string'
      ? await readFile(source, signal ? { signal: signal as AbortSignal } : {}).catch((cause) =>
          refuse('ERR_IO', op, `${name} could not be read: ${cause.message}`, { cause }),
        )
      : source
  signal?.throwIfAborted()
  const sharp = await codec(op)
  const input: SharpOptions = {
    limitInputPixels: false,
    failOn: 'error',
    ignoreIcc: true,
    autoOrient,
  }
  try {
    const meta = await sharp(bytes, input).metadata()
    const reject = (reason: string): never => refuse('ERR_FORMAT', op, `${name} ${reason}`)
    const format = meta.format === 'heif' && meta.compression === 'av1' ? 'avif' : meta.format
    if (!['jpeg', 'png', 'webp', 'tiff', 'avif'].includes(format as string))
      reject(`must be JPEG, PNG, WebP, TIFF or AVIF, got ${format}`)
    if (format === 'webp' && (meta.pages ?? 1) > 1) reject('is animated')
    if (meta.depth !== 'uchar') reject(`must have 8 bits a channel, got ${meta.depth}`)
    if (!['srgb', 'rgb', 'b-w'].includes(meta.space as string))
      reject(`must be RGB or grey, got ${meta.space}`)
    if (meta.width * meta.height > maxPixels)
      reject(`has ${meta.width} x ${meta.height} pixels, more than maxPixels, ${maxPixels}`)
    signal?.throwIfAborted()
    const { data, info } = await sharp(bytes, input).raw().toBuffer({ resolveWithObject: true })
    return { data, width: info.width, height: info.height, channels: info.channels }
  } catch (cause) {
    if (cause instanceof P2RError || signal?.aborted) throw cause
    refuse('ERR_FORMAT', op, `${name} could not be decoded: ${(cause as Error).message}`, { cause })
  }
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

/** One to four channels (grey, grey and alpha, RGB, RGB and alpha) to three. */
function toRgb(data: Uint8Array, channels: number, overWhite: boolean): Uint8Array {
  if (channels === 3) return data
  const pixels = data.length / channels
  const out = new Uint8Array(pixels * 3)
  const [green, blue] = channels >= 3 ? [1, 2] : [0, 0]
  const alphaAt = overWhite && channels % 2 === 0 ? channels - 1 : -1
  for (let i = 0, p = 0; i < out.length; i += 3, p += channels) {
    out[i] = data[p]!
    out[i + 1] = data[p + green]!
    out[i + 2] = data[p + blue]!
    if (alphaAt < 0) continue
    // Pillow's paste through a mask: (v a + 255 (255 - a)) / 255, rounded.
    const a = data[p + alphaAt]!
    if (a === 255) continue
    for (let c = i; c < i + 3; c++) {
      const sum = out[c]! * a + 255 * (255 - a) + 128
      out[c] = ((sum >> 8) + sum) >> 8
    }
  }
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
 * .avif. PNG and TIFF keep every pixel.
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
  await writeFile(path, bytes).catch((cause) =>
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
  checkArguments(options, encodeNames, op, 'options')
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
