// sharp, with JavaScript for normalisation and patches, which it does not have.
import { createRequire } from 'node:module'
import type sharpType from 'sharp'
import { type Peer, PeerAbsent } from '../harness.js'

export interface Cut {
  box: readonly [number, number, number, number]
  height: number
  width: number
}

export interface Picture {
  data: Uint8Array
  height: number
  width: number
}

function sharp(): typeof sharpType {
  try {
    return createRequire(import.meta.url)('sharp')
  } catch {
    throw new PeerAbsent('sharp does not load here, so it was skipped.')
  }
}

/**
 * Every crop as bytes, in order: crops run concurrently on the threads, since sharp's pipelines have a
 * pool of their own; remaining threads work within a crop.
 */
async function resized(
  image: Picture,
  cuts: readonly Cut[],
  threads: number,
): Promise<Uint8Array[]> {
  const { height, width } = image
  const lanes = Math.min(threads, cuts.length)
  sharp().concurrency(Math.floor(threads / lanes))
  const out: Uint8Array[] = []
  let next = 0
  const lane = async () => {
    while (next < cuts.length) {
      const at = next++
      const {
        box: [x0, y0, x1, y1],
        ...size
      } = cuts[at]!
      out[at] = await sharp()(image.data, {
        raw: { width, height, channels: 3 },
        limitInputPixels: false,
      })
        .extract({ left: x0, top: y0, width: x1 - x0, height: y1 - y0 })
        .resize({ ...size, fit: 'fill', kernel: 'cubic' })
        .raw()
        .toBuffer()
    }
  }
  await Promise.all(Array.from({ length: lanes }, lane))
  return out
}

/** Tolerance against Pillow: libvips differs, it shrinks by boxes before it resamples. */
const tolerance = 0.05

export function sharpResize(image: Picture, cuts: readonly Cut[]): Peer {
  return {
    name: 'sharp',
    tolerance,
    async open(threads) {
      sharp().cache(false)
      return { run: async () => joined(await resized(image, cuts, threads)) }
    },
  }
}

export function sharpPatches(image: Picture, cuts: readonly Cut[]): Peer {
  return {
    name: 'sharp + JavaScript',
    tolerance,
    async open(threads) {
      sharp().cache(false)
      const size = cuts.reduce((n, cut) => n + cut.height * cut.width * 6, 0)
      const out = new Float32Array(size)
      return {
        async run() {
          let at = 0
          for (const [i, data] of (await resized(image, cuts, threads)).entries())
            at = patches(data, cuts[i]!.height, cuts[i]!.width, out, at)
          return out
        },
      }
    },
  }
}

function joined(parts: readonly Uint8Array[]): Uint8Array {
  const out = new Uint8Array(parts.reduce((n, part) => n + part.length, 0))
  let at = 0
  for (const part of parts) {
    out.set(part, at)
    at += part.length
  }
  return out
}

/** (x / 255 - 0.5) / 0.5 in Qwen-VL's order: patches of 16, merged 2 x 2, each frame twice. */
function patches(
  data: Uint8Array,
  height: number,
  width: number,
  out: Float32Array,
  start: number,
): number {
  const value = Float32Array.from({ length: 256 }, (_, x) => (x / 255 - 0.5) / 0.5)
  let at = start
  for (let by = 0; by < height; by += 32)
    for (let bx = 0; bx < width; bx += 32)
      for (let my = by; my < by + 32; my += 16)
        for (let mx = bx; mx < bx + 32; mx += 16)
          for (let c = 0; c < 3; c++) {
            const plane = at
            for (let y = my; y < my + 16; y++) {
              let from = (y * width + mx) * 3 + c
              for (let x = 0; x < 16; x++, from += 3) out[at++] = value[data[from]!]!
            }
            out.copyWithin(at, plane, at)
            at += 256
          }
  return at
}
