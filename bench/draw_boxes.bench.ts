import { drawBoxes, type PixelBox } from 'p2r-kernels'
import { picture } from './data.js'
import type { Benchmark, Workload } from './harness.js'
import { type Custom, standard } from './shapes.js'

function workload(height: number, width: number): Workload {
  const bytes = height * width * 3
  return {
    name: `8 boxes on ${width}x${height}`,
    // The result is a copy of the image.
    traffic: { read: bytes, write: bytes },
    inputs(seed) {
      const data = picture(height, width, seed)
      const boxes = Array.from(
        { length: 8 },
        (_, i): PixelBox => [400 * i, 200 * i, 400 * i + 900, 200 * i + 700],
      )
      return {
        byteLength: bytes,
        load(device) {
          const image = device.tensor(data, [height, width, 3])
          return { run: () => drawBoxes({ image, boxes }) }
        },
      }
    },
  }
}

const custom: Custom<'H' | 'W'> = {
  letters: { H: ['height', 4320], W: ['width', 7680] },
  dtypes: [],
  workloads: ({ H, W }) => [workload(H, W)],
}

export default {
  op: 'draw_boxes',
  workloads: standard(custom),
  custom,
} satisfies Benchmark
