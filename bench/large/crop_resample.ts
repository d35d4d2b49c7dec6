// Crops of an 8K image as a tower's patches: on a GPU, and scaling.
import { pixelValues } from 'p2r-kernels'
import { picture } from '../data.js'
import type { Backend, Series, Workload } from '../harness.js'
import { torchvisionResize } from '../peers/pytorch.js'

const height = 4320
const width = 7680

/** So many crops of 896 x 704 pixels, each resampled to the size; one is the whole image. */
export function cropsOf(
  count: number,
  to: { height: number; width: number },
  dtype: 'f32' | 'bf16',
  options: { backend?: Backend; series?: Series },
): Workload {
  const regions = Array.from({ length: count }, (_, i) => {
    const [x, y] = [(i % 8) * 960, Math.floor(i / 8) * 512]
    const box: [number, number, number, number] =
      count === 1 ? [0, 0, width, height] : [x, y, x + 896, y + 704]
    return { box, ...to }
  })
  const source = regions.reduce((n, { box: [a, b, c, d] }) => n + (c - a) * (d - b) * 3, 0)
  const what = count === 1 ? '7680x4320' : `${count} of 896x704`
  return {
    name: `${what} -> ${to.width}x${to.height} ${dtype} patches`,
    // Every patch is written twice, once for each of its two frames.
    traffic: {
      read: source,
      write: count * to.height * to.width * 6 * (dtype === 'f32' ? 4 : 2),
    },
    ...options,
    inputs(seed) {
      const data = picture(height, width, seed)
      return {
        byteLength: data.length,
        load(device) {
          const a = { image: device.tensor(data, [height, width, 3]), regions, dtype }
          return {
            run: () => pixelValues(a),
            answer: () => pixelValues(a).pixelValues.toFloat32(),
          }
        },
        peers: options.series
          ? []
          : [torchvisionResize({ data, height, width }, regions, { patches: true, dtype })],
      }
    },
  }
}

export const cropResampleOnCuda = [
  cropsOf(1, { height: 1056, width: 1920 }, 'bf16', { backend: 'cuda' }),
  cropsOf(8, { height: 480, width: 640 }, 'bf16', { backend: 'cuda' }),
]
