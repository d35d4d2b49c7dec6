import { type Grid, visionPositions } from 'p2r-kernels'
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

// From the definition: positions by exact division, tokens in merge-block order.
function oracle(table: ArrayLike<number>, c: number, grids: readonly Grid[], merge: number) {
  const side = Math.sqrt(table.length / c)
  const axis = (i: number, n: number) => (n > 1 ? (i * (side - 1)) / (n - 1) : 0)
  const out: number[] = []
  for (const { row, column, h, w } of mergeBlockOrder(grids, merge)) {
    const [y, x] = [axis(row, h), axis(column, w)]
    for (let k = 0; k < c; k++) {
      let sum = 0
      for (const v of [Math.floor(y), Math.floor(y) + 1])
        for (const u of [Math.floor(x), Math.floor(x) + 1]) {
          const weight = (1 - Math.abs(y - v)) * (1 - Math.abs(x - u))
          if (weight > 0) sum += weight * table[(v * side + u) * c + k]!
        }
      out.push(sum)
    }
  }
  return out
}

const shapes: { grids: Grid[]; side: number; c: number; merge?: number }[] = [
  { grids: [[1, 4, 6]], side: 8, c: 5 },
  {
    grids: [
      [2, 4, 4],
      [0, 2, 2],
      [1, 2, 8],
    ],
    side: 5,
    c: 24,
  },
  // More patches than the table has, one, and a table of one entry.
  { grids: [[1, 20, 2]], side: 3, c: 600 },
  {
    grids: [
      [1, 1, 1],
      [1, 1, 7],
    ],
    side: 4,
    c: 3,
    merge: 1,
  },
  { grids: [[1, 6, 3]], side: 1, c: 8, merge: 3 },
]

onEveryBackend('visionPositions', (b) => {
  for (const dtype of floats)
    for (const { grids, side, c, merge = 2 } of shapes)
      test(`${dtype} ${side}² x ${c} over ${JSON.stringify(grids)}`, async () => {
        const values = rounded(new Random(side + c).normals(side * side * c), dtype)
        using table = b.device.tensor(values, [side * side, c], dtype)
        // A position up to 8 is off by two roundings of that size, times the difference of neighbours
        // up to 8 apart, on both axes; the sum's own roundings; and the type's.
        const bound = { absolute: 2 * 8 * 8 * 2 * roundoff.f32, relative: roundoff[dtype] }
        using out = recorded(b, `positions ${dtype} ${side} ${c}`, bound, () =>
          visionPositions({ table, gridThw: grids, mergeSize: merge }),
        )
        const expected = oracle(values, c, grids, merge)
        expect([out.shape, out.dtype]).toEqual([[expected.length / c, c], dtype])
        expectClose(await out.toFloat32(), expected, bound)
      })

  const files = golden('rope')
  for (const meta of files.list().filter((path) => path.endsWith('meta.json')))
    test(`golden ${meta.split('/')[1]}`, async () => {
      const folder = meta.slice(0, -'meta.json'.length)
      const { grid_thw: gridThw, num_position_embeddings: rows } = files.json(meta)
      const [index, weights] = [
        files.i32(`${folder}pos_embed_indices.bin`),
        files.f32(`${folder}pos_embed_weights.bin`),
      ]
      // A table of two digits that tell its rows: what comes out names the corners by their weights.
      const values = new Random(1).normals(rows * 2)
      using table = b.device.tensor(values, [rows, 2])
      using out = visionPositions({ table, gridThw })
      const tokens = index.length / 4
      const expected = Float64Array.from({ length: tokens * 2 }, (_, i) =>
        [0, 1, 2, 3].reduce((sum, k) => {
          const at = k * tokens + (i >> 1)
          return sum + weights[at]! * values[index[at]! * 2 + (i % 2)]!
        }, 0),
      )
      // As above, with positions up to 47.
      expectClose(await out.read(), expected, { absolute: 2 * 47 * 8 * 2 * roundoff.f32 })
    })

  test('accepts empty inputs', async () => {
    using table = b.device.zeros([4, 3])
    using out = visionPositions({ table, gridThw: [] })
    expect(out.shape).toEqual([0, 3])
    using frames = visionPositions({ table, gridThw: [[0, 2, 2]] })
    expect(await frames.read()).toEqual(new Float32Array(0))
  })

  test('refuses mismatched arguments', () => {
    using table = b.device.zeros([9, 4])
    const call = (a: object) => () =>
      visionPositions({ table, gridThw: [[1, 2, 2]], ...a } as Parameters<
        typeof visionPositions
      >[0])
    const op = 'visionPositions'
    expectRefusal(call({ table: b.device.zeros([8, 4]) }), 'ERR_SHAPE', op, /square/)
    expectRefusal(call({ table: b.device.zeros([0, 4]) }), 'ERR_SHAPE', op, /square/)
    expectRefusal(call({ table: b.device.zeros([9]) }), 'ERR_SHAPE', op)
    expectRefusal(call({ table: b.device.zeros([9, 4], 'i32') }), 'ERR_DTYPE', op)
    expectRefusal(call({ gridThw: [[1, 3, 2]] }), 'ERR_VALUE', op, /mergeSize 2 divides/)
    expectRefusal(call({ mergeSize: 0 }), 'ERR_VALUE', op, /mergeSize/)
    expectRefusal(call({ gridThw: [[2 ** 30, 2, 2]] }), 'ERR_SHAPE', op, /2147483647/)
  })
})
