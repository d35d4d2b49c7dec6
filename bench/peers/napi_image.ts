// @napi-rs/image, whose resizer is Rust's fast_image_resize, if the project that runs the benches has it.
import { type Peer, PeerAbsent } from '../harness.js'
import { peerModule } from './install.js'
import type { Cut, Picture } from './sharp.js'

interface Transformer {
  fastResize(options: { width: number; height: number; filter: number; fit: number }): Transformer
  rawPixels(): Promise<Uint8Array>
}

interface Library {
  Transformer: { fromRgbaPixels(data: Uint8Array, width: number, height: number): Transformer }
  FastResizeFilter: { CatmullRom: number }
  ResizeFit: { Fill: number }
}

function library(): Library {
  try {
    return peerModule('@napi-rs/image') as Library
  } catch {
    throw new PeerAbsent('@napi-rs/image is not installed here, so it was skipped.')
  }
}

/** The crop with the fourth channel that the library asks for. */
function opaque({ data, width }: Picture, [x0, y0, x1, y1]: Cut['box']): Uint8Array {
  const out = new Uint8Array((y1 - y0) * (x1 - x0) * 4).fill(255)
  let at = 0
  for (let y = y0; y < y1; y++)
    for (let from = (y * width + x0) * 3; from < (y * width + x1) * 3; from += 3, at += 4)
      for (let c = 0; c < 3; c++) out[at + c] = data[from + c]!
  return out
}

/** Red, green and blue of pixels that may have a fourth channel. */
function coloursOf(pixels: Uint8Array, count: number): Uint8Array {
  if (pixels.length === 3 * count) return pixels
  const out = new Uint8Array(3 * count)
  for (let i = 0; i < count; i++) out.set(pixels.subarray(4 * i, 4 * i + 3), 3 * i)
  return out
}

/**
 * Resampling alone: crops are cut and given their fourth channel before. They run side by side on as many of
 * libuv's threads.
 */
export function napiResize(image: Picture, cuts: readonly Cut[]): Peer {
  return {
    name: '@napi-rs/image',
    // The same kernel as ours, rounded elsewhere.
    tolerance: 0.01,
    async open(threads) {
      const { Transformer, FastResizeFilter, ResizeFit } = library()
      const crops = cuts.map(({ box, height, width }) => ({
        pixels: opaque(image, box),
        from: [box[2] - box[0], box[3] - box[1]] as const,
        to: { width, height, filter: FastResizeFilter.CatmullRom, fit: ResizeFit.Fill },
      }))
      const resized = async (): Promise<Uint8Array[]> => {
        const out: Uint8Array[] = []
        let next = 0
        const lane = async () => {
          while (next < crops.length) {
            const at = next++
            const { pixels, from, to } = crops[at]!
            out[at] = await Transformer.fromRgbaPixels(pixels, ...from)
              .fastResize(to)
              .rawPixels()
          }
        }
        await Promise.all(Array.from({ length: Math.min(threads, crops.length) }, lane))
        return out
      }
      return {
        async run() {
          const parts = await resized()
          return Uint8Array.from(
            parts.flatMap((part, i) => [...coloursOf(part, cuts[i]!.height * cuts[i]!.width)]),
          )
        },
        async time(runs) {
          const start = performance.now()
          for (let i = 0; i < runs; i++) await resized()
          return (performance.now() - start) / runs
        },
      }
    },
  }
}
