// Windows bitmaps, which sharp does not read. Of the packages that do, bmp-ts loses what follows a row of odd
// width in 4 bits and misplaces runs, and fast-bmp reads one kind of header.

/** Decoded pixels, the top row first. */
export interface Bitmap {
  width: number
  height: number
  /** 3 (RGB), or 4 where the file has a mask for alpha. */
  channels: 3 | 4
  data: Uint8Array
}

/** What is wrong with a file, as the end of a sentence. */
export class BadBitmap extends Error {}

interface Header {
  width: number
  height: number
  topDown: boolean
  bits: number
  compression: number
  /** Where the pixels begin. */
  start: number
  /** Of red, green, blue and alpha; 0 for none. */
  masks: readonly number[]
  /** Red, green and blue of each index. */
  palette: readonly (readonly [number, number, number])[]
}

const compressions = { none: 0, rle8: 1, rle4: 2, masks: 3, alphaMasks: 6 } as const
const depths = [1, 4, 8, 16, 24, 32]

export function isBitmap(bytes: Uint8Array): boolean {
  return bytes[0] === 0x42 && bytes[1] === 0x4d
}

/** The pixels of a bitmap of at most maxPixels; throws BadBitmap. */
export function decodeBitmap(bytes: Uint8Array, maxPixels: number): Bitmap {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  let header: Header
  try {
    header = headerOf(view)
  } catch (error) {
    if (error instanceof RangeError) throw new BadBitmap('ends within its header')
    throw error
  }
  const { width, height } = header
  if (width * height > maxPixels)
    throw new BadBitmap(`has ${width} x ${height} pixels, more than maxPixels, ${maxPixels}`)
  const indices =
    header.compression === compressions.rle8 || header.compression === compressions.rle4
  return indices ? fromRuns(bytes, header) : fromRows(view, header)
}

function headerOf(view: DataView): Header {
  const size = view.getUint32(14, true)
  // OS/2's header has no more than sizes.
  const old = size === 12
  if (!old && (size < 40 || size > 124)) throw new BadBitmap(`has a header of ${size} bytes`)
  const width = old ? view.getUint16(18, true) : view.getInt32(18, true)
  const rows = old ? view.getUint16(20, true) : view.getInt32(22, true)
  const bits = view.getUint16(old ? 24 : 28, true)
  const compression = old ? compressions.none : view.getUint32(30, true)
  const height = Math.abs(rows)
  if (width < 1 || height < 1) throw new BadBitmap(`has ${width} x ${rows} pixels`)
  const runs = { [compressions.rle8]: 8, [compressions.rle4]: 4 }[compression]
  const masked = compression === compressions.masks || compression === compressions.alphaMasks
  const known =
    runs !== undefined
      ? bits === runs && rows > 0
      : masked
        ? bits === 16 || bits === 32
        : compression === compressions.none
  if (!known || !depths.includes(bits))
    throw new BadBitmap(`has ${bits} bits a pixel in compression ${compression}`)

  let masks = bits === 16 ? [0x7c00, 0x03e0, 0x001f, 0] : [0xff0000, 0x00ff00, 0x0000ff, 0]
  // Behind a header of 40 bytes, which longer ones have inside.
  const count = compression === compressions.alphaMasks || size >= 56 ? 4 : 3
  if (masked) {
    masks = Array.from({ length: count }, (_, i) => view.getUint32(54 + 4 * i, true))
    if (count === 3) masks.push(0)
  }
  const after = 14 + size + (masked && size === 40 ? 4 * count : 0)
  const entry = old ? 3 : 4
  const colors = bits > 8 ? 0 : (old ? 0 : view.getUint32(46, true)) || 1 << bits
  if (colors > 256) throw new BadBitmap(`has a palette of ${colors} colours`)
  const palette = Array.from({ length: colors }, (_, i) => {
    const at = after + i * entry
    return [view.getUint8(at + 2), view.getUint8(at + 1), view.getUint8(at)] as const
  })
  const start = view.getUint32(10, true)
  return { width, height, topDown: rows < 0, bits, compression, start, masks, palette }
}

/** Uncompressed rows, each padded to 4 bytes. */
function fromRows(view: DataView, a: Header): Bitmap {
  const { width, height, bits, start, masks, palette } = a
  const stride = Math.ceil((width * bits) / 32) * 4
  // The last row's padding may be missing.
  if (start + stride * (height - 1) + Math.ceil((width * bits) / 8) > view.byteLength)
    throw new BadBitmap('ends within its pixels')
  const channels = masks[3] ? 4 : 3
  const data = new Uint8Array(width * height * channels)
  const fields = masks.slice(0, channels).map(fieldOf)
  for (let y = 0, to = 0; y < height; y++) {
    const row = start + stride * (a.topDown ? y : height - 1 - y)
    for (let x = 0; x < width; x++, to += channels) {
      if (bits <= 8) {
        const bit = x * bits
        const byte = view.getUint8(row + (bit >> 3))
        const index = (byte >> (8 - bits - (bit & 7))) & ((1 << bits) - 1)
        data.set(palette[index] ?? [0, 0, 0], to)
      } else if (bits === 24) {
        for (let c = 0; c < 3; c++) data[to + c] = view.getUint8(row + 3 * x + 2 - c)
      } else {
        const pixel =
          bits === 16 ? view.getUint16(row + 2 * x, true) : view.getUint32(row + 4 * x, true)
        for (let c = 0; c < channels; c++) data[to + c] = fields[c]!(pixel)
      }
    }
  }
  return { width, height, channels, data }
}

/** Reads the bits of a mask as 0 to 255, rounded down as Pillow does. */
function fieldOf(mask: number): (pixel: number) => number {
  const shift = mask === 0 ? 0 : 31 - Math.clz32(mask & -mask)
  const most = mask >>> shift
  return (pixel) => (most === 0 ? 0 : Math.floor((((pixel & mask) >>> shift) * 255) / most))
}

/** Run-length encoded indices; pixels that are skipped have the first colour. */
function fromRuns(bytes: Uint8Array, a: Header): Bitmap {
  const { width, height, bits, palette } = a
  const indices = new Uint8Array(width * height)
  let [at, x, y] = [a.start, 0, 0]
  const next = (): number => {
    if (at >= bytes.length) throw new BadBitmap('ends within its pixels')
    return bytes[at++]!
  }
  const put = (index: number): void => {
    if (x < width && y < height) indices[(height - 1 - y) * width + x] = index
    x++
  }
  const nibble = (byte: number, i: number): number => (i % 2 ? byte & 15 : byte >> 4)
  while (y < height) {
    const [count, value] = [next(), next()]
    if (count > 0) for (let i = 0; i < count; i++) put(bits === 8 ? value : nibble(value, i))
    else if (value === 0) [x, y] = [0, y + 1]
    else if (value === 1) break
    else if (value === 2) [x, y] = [x + next(), y + next()]
    else {
      let byte = 0
      for (let i = 0; i < value; i++) {
        if (bits === 8 || i % 2 === 0) byte = next()
        put(bits === 8 ? byte : nibble(byte, i))
      }
      // Literal runs are padded to 2 bytes.
      at += Math.ceil((value * bits) / 8) % 2
    }
  }
  const data = new Uint8Array(width * height * 3)
  for (const [i, index] of indices.entries()) data.set(palette[index] ?? [0, 0, 0], 3 * i)
  return { width, height, channels: 3, data }
}
