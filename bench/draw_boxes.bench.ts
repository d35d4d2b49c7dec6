import { drawBoxes, type PixelBox } from 'p2r-kernels'
import { picture } from './data.js'
import type { Benchmark } from './harness.js'

const height = 4320
const width = 7680
const bytes = height * width * 3

export default {
  op: 'draw_boxes',
  workloads: [
    {
      name: '8 boxes on 7680x4320',
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
    },
  ],
} satisfies Benchmark
