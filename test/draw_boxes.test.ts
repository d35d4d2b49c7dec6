import { drawBoxes, type PixelBox } from 'p2r-kernels'
import { expect, test } from 'vitest'
import { golden } from './golden.js'
import { expectRefusal, onEveryBackend, Random, recorded } from './harness.js'

const exact = {}
const files = golden('image')
const cases = files.json('image/meta.json').cases

type Color = readonly [number, number, number]

// Pillow's ImagingDrawRectangle, line by line and pixel by pixel: coordinates in order, the end of a
// vertical line left out, and drawn upwards where it is above the start.
function rectangle(
  image: Uint8Array,
  [h, w]: readonly [number, number],
  [xa, ya, xb, yb]: PixelBox,
  color: Color,
  width: number,
): void {
  const [x0, x1] = [Math.min(xa, xb), Math.max(xa, xb)]
  const [y0, y1] = [Math.min(ya, yb), Math.max(ya, yb)]
  const point = (x: number, y: number) => {
    if (x >= 0 && x < w && y >= 0 && y < h) image.set(color, (y * w + x) * 3)
  }
  for (let i = 0; i < width; i++) {
    for (const y of [y0 + i, y1 - i]) for (let x = x0; x <= x1; x++) point(x, y)
    const end = y1 - width + 1
    for (const x of [x1 - i, x0 + i])
      for (let y = y0 + width; y !== end; y += end > y0 + width ? 1 : -1) point(x, y)
  }
}

onEveryBackend('drawBoxes', (b) => {
  test('draws as Pillow does', async () => {
    for (const c of cases.filter((c: { op: string }) => c.op === 'rectangle')) {
      const { height, width, file } = c.input
      let image = b.device.tensor(files.bytes(`image/${file}`), [height, width, 3], 'u8')
      for (const r of c.rects)
        image = recorded(b, `drawBoxes ${c.id}`, exact, () =>
          drawBoxes({ image, boxes: [r.xy], colors: [r.color], width: r.width }),
        )
      expect(Buffer.compare(await image.read(), files.bytes(`image/${c.expect.file}`)), c.id).toBe(
        0,
      )
    }
  })

  test('agrees with a direct implementation of Pillow, at any position, size and width', async () => {
    const random = new Random(7)
    for (let i = 0; i < 60; i++) {
      const [h, w] = [random.int(1, 40), random.int(1, 40)]
      const data = Uint8Array.from({ length: h * w * 3 }, () => random.int(0, 255))
      const width = random.int(0, 7)
      const boxes = Array.from(
        { length: random.int(0, 9) },
        () => Array.from({ length: 4 }, () => random.int(-20, 60)) as unknown as PixelBox,
      )
      const colors = Array.from({ length: random.int(1, 4) }, () =>
        [0, 1, 2].map(() => random.int(0, 255)),
      ) as unknown as Color[]
      const expected = data.slice()
      boxes.forEach((box, k) => {
        rectangle(expected, [h, w], box, colors[k % colors.length]!, width)
      })
      const draw = () =>
        drawBoxes({ image: b.device.tensor(data, [h, w, 3]), boxes, colors, width })
      const out = recorded(b, `drawBoxes ${i}`, exact, draw)
      expect(await out.read(), `image ${i}`).toEqual(expected)
    }
  })

  test('default colours and width are the reference’s', async () => {
    const image = b.device.zeros([64, 2000, 3], 'u8')
    const boxes = Array.from({ length: 9 }, (_, i): PixelBox => [i * 200, 10, i * 200 + 99, 50])
    const data = await drawBoxes({ image, boxes }).read()
    const color = (x: number, y: number) =>
      Array.from(data.subarray((y * 2000 + x) * 3).slice(0, 3))
    const expected = [
      [255, 0, 0],
      [0, 128, 0],
      [0, 0, 255],
      [255, 255, 0],
      [255, 165, 0],
      [128, 0, 128],
      [0, 255, 255],
      [255, 0, 255],
      [255, 0, 0],
    ]
    expect(boxes.map((box) => color(box[0], 30))).toEqual(expected)
    expect([5, 6].map((x) => color(x, 30))).toEqual([
      [255, 0, 0],
      [0, 0, 0],
    ])
    const narrow = await drawBoxes({
      image: b.device.zeros([9, 9, 3], 'u8'),
      boxes: [[0, 0, 8, 8]],
    }).read()
    expect([0, 2, 3].map((x) => narrow[(4 * 9 + x) * 3])).toEqual([255, 255, 0])
  })

  test('accepts distant coordinates, no boxes and empty images', async () => {
    const image = b.device.tensor(new Uint8Array(4 * 4 * 3), [4, 4, 3])
    const far = 2 ** 31
    const all = await drawBoxes({ image, boxes: [[-far, -far, far, far]], width: 3 }).read()
    expect(all.every((v) => v === 0)).toBe(true)
    const line = await drawBoxes({ image, boxes: [[-far, 1, far, 1]], width: 1 }).read()
    expect(Array.from(line.subarray(12, 24))).toEqual([255, 0, 0, 255, 0, 0, 255, 0, 0, 255, 0, 0])
    expect(await drawBoxes({ image, boxes: [] }).read()).toEqual(new Uint8Array(48))
    const empty = b.device.zeros([0, 5, 3], 'u8')
    expect(drawBoxes({ image: empty, boxes: [[0, 0, 1, 1]] }).shape).toEqual([0, 5, 3])
  })

  test('does not change the image and refuses other tensors', () => {
    const image = b.device.zeros([4, 4, 3], 'u8')
    const refused = (a: object, code: string, message?: RegExp) =>
      expectRefusal(
        () => drawBoxes({ image, boxes: [], ...a } as never),
        code,
        'drawBoxes',
        message,
      )
    refused({ image: b.device.zeros([4, 4, 3]) }, 'ERR_DTYPE', /u8, got f32/)
    refused({ image: b.device.zeros([4, 4], 'u8') }, 'ERR_SHAPE')
    refused({ image: b.device.zeros([4, 4, 4], 'u8') }, 'ERR_SHAPE', /\[height, width, 3\]/)
    refused({ boxes: [[0, 0, 1]] }, 'ERR_VALUE', /boxes\[0\] must be 4 numbers/)
    refused({ boxes: [[0, 0, 1, 1.5]] }, 'ERR_VALUE', /1\.5/)
    refused({ boxes: [[0, 0, 1, Number.NaN]] }, 'ERR_VALUE')
    refused({ boxes: [[0, 0, 1, '2']] }, 'ERR_VALUE', /must be a number, got '2'/)
    refused({ boxes: 'all' }, 'ERR_VALUE', /boxes must be an array/)
    refused({ boxes: [[0, 0, 1, 1]], colors: [] }, 'ERR_VALUE', /colors/)
    refused({ boxes: [[0, 0, 1, 1]], colors: [[0, 0, 256]] }, 'ERR_VALUE')
    refused({ width: -1 }, 'ERR_VALUE', /width/)
    refused({ width: 1.5 }, 'ERR_VALUE', /width/)
  })
})
