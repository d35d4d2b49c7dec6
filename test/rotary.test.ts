import { applyRotary, type Grid, visionRotary } from 'p2r-kernels'
import { expect, test } from 'vitest'
import { golden } from './golden.js'
import {
  expectClose,
  expectRefusal,
  floats,
  mergeBlockOrder,
  onEveryBackend,
  Random,
  recorded,
  rounded,
  roundoff,
} from './harness.js'

function tables(grids: readonly Grid[], d: number, theta: number, merge: number) {
  const cos: number[] = []
  const sin: number[] = []
  for (const { row, column } of mergeBlockOrder(grids, merge))
    for (let i = 0; i < d; i++) {
      const frequency = Math.fround(
        1 / Math.fround(theta ** Math.fround((2 * (i % (d / 4))) / (d / 2))),
      )
      const angle = Math.fround((i % (d / 2) < d / 4 ? row : column) * frequency)
      cos.push(Math.cos(angle))
      sin.push(Math.sin(angle))
    }
  return { cos, sin }
}

function rotate(
  x: ArrayLike<number>,
  cos: ArrayLike<number>,
  sin: ArrayLike<number>,
  heads: number,
  d: number,
): Float64Array {
  const out = new Float64Array(x.length)
  for (let at = 0; at < x.length; at++) {
    const i = at % d
    const table = Math.floor(at / (heads * d)) * d + i
    const other = i < d / 2 ? -x[at + d / 2]! : x[at - d / 2]!
    out[at] = x[at]! * cos[table]! + other * sin[table]!
  }
  return out
}

onEveryBackend('rotary', (b) => {
  const shapes: { gridThw: Grid[]; headDim: number; theta?: number; mergeSize?: number }[] = [
    { gridThw: [[1, 4, 6]], headDim: 8 },
    {
      gridThw: [
        [2, 4, 4],
        [0, 2, 2],
        [1, 2, 8],
      ],
      headDim: 72,
    },
    { gridThw: [[1, 2, 200]], headDim: 128, theta: 1e6 },
    {
      gridThw: [
        [1, 6, 3],
        [1, 3, 3],
      ],
      headDim: 16,
      mergeSize: 3,
    },
    { gridThw: [[3, 5, 1]], headDim: 64, mergeSize: 1 },
  ]
  for (const shape of shapes)
    test(`tables of ${JSON.stringify(shape)}`, async () => {
      // Cosines of the same f32 angles, to an ulp or two.
      const bound = { absolute: 4 * roundoff.f32 }
      using t = recorded(b, `rotary tables ${JSON.stringify(shape)}`, bound, () =>
        visionRotary({ ...shape, device: b.device }),
      )
      const expected = tables(
        shape.gridThw,
        shape.headDim,
        shape.theta ?? 1e4,
        shape.mergeSize ?? 2,
      )
      expect(t.cos.shape).toEqual([expected.cos.length / shape.headDim, shape.headDim])
      expectClose(await t.cos.read(), expected.cos, bound)
      expectClose(await t.sin.read(), expected.sin, bound)
    })

  for (const dtype of floats)
    for (const d of [8, 72, 128])
      test(`rotates and rotates back, ${dtype}, D ${d}`, async () => {
        const [tokens, heads] = [5, 3]
        const random = new Random(d)
        const x = rounded(random.normals(tokens * heads * d), dtype)
        // Any tables at all: the inverse is the transpose, whatever they hold.
        const cosines = random.normals(tokens * d)
        const sines = random.normals(tokens * d)
        // Two products and a sum of numbers up to 4, and the type's rounding.
        const bound = { absolute: 32 * roundoff.f32, relative: roundoff[dtype] }
        using xs = b.device.tensor(x, [tokens, heads, d], dtype)
        using cos = b.device.tensor(cosines, [tokens, d])
        using sin = b.device.tensor(sines, [tokens, d])
        using y = recorded(b, `rotary ${dtype} ${d}`, bound, () => applyRotary({ x: xs, cos, sin }))
        const rotated = rotate(x, cosines, sines, heads, d)
        expectClose(await y.toFloat32(), rotated, bound)

        // <R x, g> = <x, R' g>
        const g = rounded(random.normals(x.length), dtype)
        using gs = b.device.tensor(g, [tokens, heads, d], dtype)
        using back = recorded(b, `rotary inverse ${dtype} ${d}`, bound, () =>
          applyRotary({ x: gs, cos, sin, inverse: true }),
        )
        const dx = await back.toFloat32()
        let left = 0
        let right = 0
        let size = 0
        for (let i = 0; i < x.length; i++) {
          left += rotated[i]! * g[i]!
          right += x[i]! * dx[i]!
          size += Math.abs(x[i]! * dx[i]!)
        }
        expect(Math.abs(left - right)).toBeLessThan(size * (4 * roundoff.f32 + roundoff[dtype]))
      })

  for (const path of golden('rope')
    .list()
    .filter((p) => p.endsWith('meta.json'))) {
    const name = path.split('/')[1]!
    test(`the model's own: ${name}`, async () => {
      const files = golden('rope')
      const read = (file: string) => files.f32(`rope/${name}/${file}.bin`)
      const meta = files.json(path)
      using t = visionRotary({
        gridThw: meta.grid_thw,
        headDim: meta.head_dim,
        theta: meta.theta,
        mergeSize: meta.spatial_merge_size,
        device: b.device,
      })
      expectClose(await t.cos.read(), read('cos'), { absolute: 1e-6 })
      expectClose(await t.sin.read(), read('sin'), { absolute: 1e-6 })
      const shape = meta.tensors.q.shape
      for (const part of ['q', 'k']) {
        using x = b.device.tensor(read(part), shape)
        using y = applyRotary({ x, cos: t.cos, sin: t.sin })
        // The tables' 1e-6 on entries of up to some 4.
        expectClose(await y.toFloat32(), read(`${part}_rot`), { absolute: 5e-6 })
      }
    })
  }

  test('accepts empty inputs', () => {
    const t = visionRotary({ gridThw: [], headDim: 16, device: b.device })
    expect(t.cos.shape).toEqual([0, 16])
    expect(applyRotary({ x: b.device.zeros([0, 2, 16]), ...t }).shape).toEqual([0, 2, 16])
    const x = b.device.zeros([3, 0, 8])
    const cos = b.device.zeros([3, 8])
    expect(applyRotary({ x, cos, sin: cos }).shape).toEqual([3, 0, 8])
  })

  test('refuses invalid arguments', () => {
    const { device } = b
    const make = (a: object) => () =>
      visionRotary({ gridThw: [[1, 4, 4]], headDim: 64, device, ...a })
    expectRefusal(make({ headDim: 12 }), 'ERR_VALUE', 'visionRotary', /multiple of 8.*got 12/)
    expectRefusal(make({ headDim: 136 }), 'ERR_VALUE', 'visionRotary')
    expectRefusal(make({ headDim: 'x' }), 'ERR_VALUE', 'visionRotary')
    expectRefusal(make({ gridThw: [[1, 3, 4]] }), 'ERR_VALUE', 'visionRotary', /divides, got 3 x 4/)
    expectRefusal(make({ gridThw: [[1, -2, 4]] }), 'ERR_VALUE', 'visionRotary')
    expectRefusal(make({ gridThw: [[1, 4]] }), 'ERR_VALUE', 'visionRotary')
    expectRefusal(make({ gridThw: 3 }), 'ERR_VALUE', 'visionRotary')
    expectRefusal(make({ gridThw: [[2 ** 20, 2 ** 20, 2]] }), 'ERR_SHAPE', 'visionRotary')
    expectRefusal(make({ theta: 0 }), 'ERR_VALUE', 'visionRotary')
    expectRefusal(make({ mergeSize: 0 }), 'ERR_VALUE', 'visionRotary')
    expectRefusal(make({ device: {} }), 'ERR_VALUE', 'visionRotary', /must be a Device/)

    const x = device.zeros([4, 2, 16])
    const cos = device.zeros([4, 16])
    const turn = (a: object) => () => applyRotary({ x, cos, sin: cos, ...a })
    expectRefusal(turn({ sin: device.zeros([4, 8]) }), 'ERR_SHAPE', 'applyRotary', /sin must have/)
    expectRefusal(turn({ cos: device.zeros([4, 16], 'bf16') }), 'ERR_DTYPE', 'applyRotary')
    expectRefusal(turn({ x: device.zeros([4, 2, 12]) }), 'ERR_SHAPE', 'applyRotary')
    expectRefusal(turn({ x: device.zeros([4, 16]) }), 'ERR_SHAPE', 'applyRotary')
    expectRefusal(turn({ inverse: 1 }), 'ERR_VALUE', 'applyRotary')
  })
})
