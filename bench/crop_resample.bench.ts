import { cropResample, normalizePatches, pixelValues } from 'p2r-kernels'
import { integers, picture, uniforms } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { cropResampleOnCuda } from './large/crop_resample.js'
import { napiResize } from './peers/napi_image.js'
import { opencvResize } from './peers/opencv.js'
import { pillowPatches, pillowResize } from './peers/pillow.js'
import { type Cut, sharpPatches, sharpResize } from './peers/sharp.js'
import type { Custom } from './shapes.js'

const [height, width] = [4320, 7680]

/** Crops of some 900 x 700 pixels, anywhere in the image. */
function crops(n: number, size: { height: number; width: number }, seed: number): Cut[] {
  const uniform = uniforms(seed)
  for (let i = 0; i < 8; i++) uniform()
  const between = (low: number, high: number) => low + Math.floor(uniform() * (high - low + 1))
  return Array.from({ length: n }, () => {
    const [w, h] = [between(860, 940), between(660, 740)]
    const [x, y] = [between(0, width - w), between(0, height - h)]
    return { box: [x, y, x + w, y + h], ...size }
  })
}

function workload(
  name: string,
  patches: boolean,
  cuts: (seed: number) => Cut[],
  size: readonly [number, number] = [height, width],
): Workload {
  const [height, width] = size
  const [example] = [cuts(1)]
  const source = example.reduce((n, { box }) => n + (box[2] - box[0]) * (box[3] - box[1]) * 3, 0)
  const pixels = example.reduce((n, cut) => n + cut.height * cut.width, 0)
  return {
    name,
    // Every patch is written twice, once for each of its two frames.
    traffic: { read: source, write: pixels * 3 * (patches ? 8 : 1) },
    inputs(seed) {
      const data = picture(height, width, seed)
      const regions = cuts(seed)
      const image = { data, height, width }
      return {
        byteLength: source,
        load(device) {
          const a = { image: device.tensor(data, [height, width, 3]), regions }
          return {
            run: () => (patches ? pixelValues(a) : cropResample(a)),
            async answer() {
              if (patches) return pixelValues(a).pixelValues.read()
              const parts = await Promise.all(cropResample(a).map((tensor) => tensor.read()))
              return Uint8Array.from(parts.flatMap((part) => [...part]))
            },
          }
        },
        peers: (patches
          ? [sharpPatches, pillowPatches]
          : [sharpResize, pillowResize, napiResize, opencvResize]
        ).map((peer) => peer(image, regions)),
      }
    },
  }
}

/** Patches of 1920 x 1056 by themselves: bytes in, values out. */
function normalizing(dtype: 'f32' | 'bf16'): Workload {
  const [rows, columns] = [120 * 66, 1536]
  const size = rows * columns
  return {
    name: `1920x1056 u8 patches -> ${dtype}`,
    traffic: { read: size, write: size * (dtype === 'f32' ? 4 : 2) },
    inputs(seed) {
      const bytes = Uint8Array.from(integers(size, 256, seed))
      return {
        byteLength: size,
        load(device) {
          const patches = device.tensor(bytes, [rows, columns])
          return { run: () => normalizePatches({ patches, dtype }) }
        },
        peers: [],
      }
    },
  }
}

const to = (h: number, w: number) => ({ height: h, width: w })

const custom: Custom<'H' | 'W' | 'h' | 'w'> = {
  letters: {
    H: ['height of the image', height],
    W: ['width of it', width],
    h: ['height of the result', 1056],
    w: ['width of it', 1920],
  },
  dtypes: [],
  workloads({ H, W, h, w }) {
    const whole = (): Cut[] => [{ box: [0, 0, W, H], ...to(h, w) }]
    const name = `${W}x${H} -> ${w}x${h}`
    return [
      workload(`${name} u8`, false, whole, [H, W]),
      // Patches of 16, merged 2 x 2.
      ...(h % 32 || w % 32 ? [] : [workload(`${name} f32 patches`, true, whole, [H, W])]),
    ]
  },
}

export default {
  op: 'crop_resample',
  workloads: [
    workload('7680x4320 -> 1920x1056 f32 patches', true, () => [
      { box: [0, 0, width, height], ...to(1056, 1920) },
    ]),
    workload('8 of 900x700 -> 640x480 f32 patches', true, (seed) => crops(8, to(480, 640), seed)),
    workload('8 of 900x700 -> 640x480 u8', false, (seed) => crops(8, to(480, 640), seed)),
    workload('8 of 900x700 -> 896x704 f32 patches', true, (seed) => crops(8, to(704, 896), seed)),
    normalizing('f32'),
    normalizing('bf16'),
    ...cropResampleOnCuda,
  ],
  custom,
} satisfies Benchmark
