import { concat, type DType, split, transpose } from 'p2r-kernels'
import { expect, test } from 'vitest'
import { expectRefusal, onEveryBackend, recorded } from './harness.js'

const dtypes: readonly DType[] = ['f32', 'f16', 'bf16', 'i32', 'u8']
const sizeOf = (shape: readonly number[]): number => shape.reduce((n, d) => n * d, 1)
const counting = (n: number): Uint8Array => Uint8Array.from({ length: n }, (_, i) => (i * 7) % 251)

/** x with two axes exchanged, index by index. */
function transposed(x: ArrayLike<number>, shape: readonly number[], a: number, b: number) {
  const to = [...shape]
  to[a] = shape[b]!
  to[b] = shape[a]!
  const out = new Array<number>(x.length)
  for (let k = 0; k < x.length; k++) {
    const place: number[] = []
    for (let i = shape.length - 1, rest = k; i >= 0; i--) {
      place[i] = rest % shape[i]!
      rest = Math.floor(rest / shape[i]!)
    }
    const [i, j] = [place[a]!, place[b]!]
    place[a] = j
    place[b] = i
    out[to.reduce((at, n, axis) => at * n + place[axis]!, 0)] = x[k]!
  }
  return { out, to }
}

onEveryBackend('rearrange', (b) => {
  const tensorOf = (dtype: DType, shape: readonly number[]) =>
    b.device.tensor(counting(sizeOf(shape)), shape, 'u8').cast(dtype)

  for (const dtype of dtypes)
    test(`transpose ${dtype}`, async () => {
      for (const [shape, axes] of [
        [[3, 5], undefined],
        [
          [70, 33],
          [0, 1],
        ],
        [
          [2, 65, 3],
          [0, -2],
        ],
        [
          [3, 4, 5, 6],
          [1, 3],
        ],
        [
          [4, 3, 2, 5],
          [2, 0],
        ],
        // Runs of 8, of 2 and of 3 elements after the axes, so words of every size.
        [
          [4, 3, 8],
          [0, 1],
        ],
        [
          [2, 3, 2, 4, 2],
          [1, 3],
        ],
        [
          [5, 7, 3],
          [1, 0],
        ],
        [
          [2, 3],
          [1, 1],
        ],
        [[6], [0, 0]],
      ] as const) {
        const x = tensorOf(dtype, shape)
        const [a, c] = axes ?? [0, 1]
        const last = shape.length
        const { out, to } = transposed(
          await x.toFloat32(),
          shape,
          a < 0 ? a + last : a,
          c < 0 ? c + last : c,
        )
        using got = recorded(b, `transpose ${dtype} ${shape.join('x')} ${a} ${c}`, {}, () =>
          transpose({ x, ...(axes ? { axes } : {}) }),
        )
        expect([got.shape, got.dtype]).toEqual([to, dtype])
        expect([...(await got.toFloat32())]).toEqual(out)
        // Its gradient is itself.
        using back = transpose({ x: got, ...(axes ? { axes } : {}) })
        expect(await back.read()).toEqual(await x.read())
      }
    })

  for (const dtype of dtypes)
    test(`concat and split ${dtype}`, async () => {
      for (const [shape, sizes, axis] of [
        [[0, 3], [2, 0, 5], 0],
        [[4, 0], [1, 3, 2], 1],
        [[3, 0, 5], [2, 4], -2],
        [[7, 0, 8], [4, 4], 1],
        [[2, 0], [300_000, 5], 1],
        [[0], [3], -1],
      ] as const) {
        const at = axis < 0 ? axis + shape.length : axis
        const withSize = (n: number) => shape.map((d, i) => (i === at ? n : d))
        const whole = withSize(sizes.reduce<number>((s, n) => s + n, 0))
        const x = tensorOf(dtype, whole)
        const title = `${dtype} ${whole.join('x')} ${sizes.join(' ')}`
        const parts = recorded(b, `split ${title}`, {}, () => split({ x, sizes, axis }))
        expect(parts.map((p) => p.shape)).toEqual(sizes.map(withSize))
        const data = await x.toFloat32()
        const inner = sizeOf(shape.slice(at + 1))
        let first = 0
        for (const [k, part] of parts.entries()) {
          const expected = [...data].filter((_, i) => {
            const place = Math.floor(i / inner) % whole[at]!
            return place >= first && place < first + sizes[k]!
          })
          expect([...(await part.toFloat32())]).toEqual(expected)
          first += sizes[k]!
        }
        using joined = recorded(b, `concat ${title}`, {}, () => concat({ tensors: parts, axis }))
        expect([joined.shape, joined.dtype]).toEqual([whole, dtype])
        expect(await joined.read()).toEqual(await x.read())
      }
    })

  test('views, the same tensor twice, and empty ones', async () => {
    const x = tensorOf('u8', [9])
    const tensors = [x.slice(1, 3), x.slice(4, 9), x.slice(1, 3)]
    const expected = [1, 2, 4, 5, 6, 7, 8, 1, 2].map((i) => (i * 7) % 251)
    expect([...(await concat({ tensors }).read())]).toEqual(expected)
    const none = b.device.zeros([2, 0, 3])
    expect(transpose({ x: none }).shape).toEqual([2, 3, 0])
    expect(concat({ tensors: [none, none], axis: 2 }).shape).toEqual([2, 0, 6])
    expect(split({ x: none, sizes: [1, 1] }).map((p) => p.shape)).toEqual([
      [1, 0, 3],
      [1, 0, 3],
    ])
  })

  test('refuse mismatched arguments', () => {
    const [x, y] = [b.device.zeros([2, 3]), b.device.zeros([2, 4])]
    const joined = (a: object) => () => concat({ tensors: [x, y], axis: 1, ...a } as never)
    expectRefusal(joined({ axis: 0 }), 'ERR_SHAPE', 'concat', /tensors\[1\].*axis 0/)
    expectRefusal(joined({ axis: 2 }), 'ERR_VALUE', 'concat', /axis/)
    expectRefusal(joined({ tensors: [] }), 'ERR_VALUE', 'concat', /empty/)
    expectRefusal(joined({ tensors: [x, 1] }), 'ERR_VALUE', 'concat', /tensors\[1\]/)
    expectRefusal(joined({ tensors: [x, x.cast('f16')] }), 'ERR_DTYPE', 'concat', /tensors\[1\]/)
    expectRefusal(joined({ tensors: [b.device.zeros([])] }), 'ERR_SHAPE', 'concat', /no axes/)
    const cut = (a: object) => () => split({ x, sizes: [1, 2], axis: 1, ...a } as never)
    expectRefusal(cut({ sizes: [1, 1] }), 'ERR_VALUE', 'split', /3 of axis 1, got 2/)
    expectRefusal(cut({ sizes: [] }), 'ERR_VALUE', 'split', /empty/)
    expectRefusal(cut({ sizes: [4, -1] }), 'ERR_VALUE', 'split', /sizes\[1\]/)
    expectRefusal(cut({ axis: 0.5 }), 'ERR_VALUE', 'split', /axis/)
    const turned = (axes: unknown) => () => transpose({ x, axes } as never)
    expectRefusal(turned([0, 2]), 'ERR_VALUE', 'transpose', /axes\[1\]/)
    expectRefusal(turned([0]), 'ERR_VALUE', 'transpose', /two axes/)
    expectRefusal(turned('01'), 'ERR_VALUE', 'transpose', /axes/)
    expectRefusal(() => transpose({ x: b.device.zeros([3]) }), 'ERR_VALUE', 'transpose')
  })
})
