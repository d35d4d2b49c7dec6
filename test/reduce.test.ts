import { mean, openDevice, sum } from 'p2r-kernels'
import { describe, expect, test } from 'vitest'
import {
  cpuPaths,
  expectClose,
  expectGradient,
  expectRefusal,
  floats,
  onEveryBackend,
  Random,
  recorded,
  rounded,
  roundoff,
} from './harness.js'

function reduced(x: ArrayLike<number>, shape: readonly number[], axes: readonly number[]) {
  const kept = shape.map((n, i) => (axes.includes(i) ? 1 : n))
  const sums = new Float64Array(kept.reduce((n, d) => n * d, 1))
  const sizes = new Float64Array(sums.length)
  for (let k = 0; k < x.length; k++) {
    let rest = k
    let at = 0
    let step = 1
    for (let i = shape.length - 1; i >= 0; i--) {
      const place = rest % shape[i]!
      rest = Math.floor(rest / shape[i]!)
      if (!axes.includes(i)) at += place * step
      step *= kept[i]!
    }
    sums[at]! += x[k]!
    sizes[at]! += Math.abs(x[k]!)
  }
  return { sums, sizes, kept }
}

// Last, first, middle, several and all axes; one slice, several, and slices of slices.
const cases: [shape: number[], axes: number[] | undefined][] = [
  [[5, 77], [1]],
  [[5, 77], [-2]],
  [[3, 4, 130], [1]],
  [
    [3, 4, 5, 6],
    [0, 2],
  ],
  [
    [3, 4, 5, 6],
    [3, -3],
  ],
  [[2, 3, 4], undefined],
  [[4, 5], []],
  [[], undefined],
  [[2, 3000], [1]],
  [[3000, 70], [0]],
  [[1_100_000], undefined],
  [[1, 7, 1], [0]],
]

onEveryBackend('reduce', (b) => {
  for (const dtype of floats)
    for (const [shape, axes] of cases)
      test(`${dtype} [${shape}] over ${axes ? `[${axes}]` : 'all'}`, async () => {
        const n = shape.reduce((n, d) => n * d, 1)
        const x = rounded(new Random(n).normals(n), dtype)
        const own = (axes ?? [...shape.keys()]).map((i) => (i < 0 ? i + shape.length : i))
        const { sums, sizes, kept } = reduced(x, shape, own)
        const count = n / sums.length
        const rest = shape.filter((_, i) => !own.includes(i))
        // A sum errs by the roundings on a term's way, which are below 100: 64 in a run, then its runs,
        // lanes and slices, each of at most half an ulp of the sum of the terms' sizes.
        const largest = Math.max(...sizes, 1)
        const bound = { absolute: 100 * 2 ** -24 * largest, relative: 2 ** -23 + roundoff[dtype] }
        const a = { x: b.device.tensor(x, shape, dtype), ...(axes ? { axes } : {}) }
        const title = `${dtype} ${shape.join('x')} over ${own.join(' ')}`
        using total = recorded(b, `sum ${title}`, bound, () => sum(a))
        expect([total.shape, total.dtype]).toEqual([rest, dtype])
        expectClose(await total.toFloat32(), sums, bound)
        const part = { ...bound, absolute: bound.absolute / count }
        using average = recorded(b, `mean ${title}`, part, () => mean({ ...a, keepDims: true }))
        expect(average.shape).toEqual(kept)
        expectClose(
          await average.toFloat32(),
          sums.map((v) => v / count),
          part,
        )
      })

  test('the gradient of a mean is a repeated part of dOut', async () => {
    const x = new Random(1).normals(24)
    const d = new Random(2).normals(4)
    const at = (v: ArrayLike<number>) =>
      reduced(v, [2, 3, 4], [0, 1]).sums.reduce((s, v, i) => s + (v / 6) * d[i]!, 0)
    const expected = Float64Array.from(x, (_, i) => d[i % 4]! / 6)
    expectGradient(at, x, expected, { absolute: 1e-9, relative: 1e-9 })
  })

  test('sums of none are 0, means NaN; NaN and infinity stay in their sums', async () => {
    const none = b.device.zeros([2, 0])
    expect([...(await sum({ x: none, axes: [1] }).read())]).toEqual([0, 0])
    expect([...(await mean({ x: none, axes: [1] }).read())]).toEqual([NaN, NaN])
    expect(await sum({ x: none }).item()).toBe(0)
    expect(sum({ x: none, axes: [0] }).shape).toEqual([0])
    const x = b.device.tensor([1, NaN, 2, Infinity, 5, 6], [3, 2])
    expect([...(await sum({ x, axes: [1] }).read())]).toEqual([NaN, Infinity, 11])
    expect([...(await mean({ x, axes: [0] }).read())]).toEqual([8 / 3, NaN].map(Math.fround))
  })

  test('refuse mismatched arguments', () => {
    const x = b.device.zeros([2, 3])
    for (const [name, f] of [
      ['sum', sum],
      ['mean', mean],
    ] as const) {
      const call = (a: object) => () => f({ x, ...a } as never)
      expectRefusal(call({ axes: [2] }), 'ERR_VALUE', name, /axes\[0\] must be an integer from -2/)
      expectRefusal(call({ axes: [0, -2] }), 'ERR_VALUE', name, /repeat/)
      expectRefusal(call({ axes: 0 }), 'ERR_VALUE', name, /axes/)
      expectRefusal(call({ axis: [0] }), 'ERR_VALUE', name, /'axes'/)
      expectRefusal(call({ keepDims: 1 }), 'ERR_VALUE', name, /keepDims/)
      expectRefusal(call({ x: b.device.zeros([2], 'i32') }), 'ERR_DTYPE', name)
    }
  })
})

describe('sum', () => {
  for (const { name, options } of cpuPaths)
    test(`does not depend on the thread count or on other rows (${name})`, async () => {
      const data = new Random(8).normals(6 * 20_000)
      const results = new Set<string>()
      for (const threads of [1, 2, 5]) {
        using device = openDevice('cpu', { ...options, threads })
        const x = device.tensor(data, [6, 20_000])
        const rows = await sum({ x, axes: [1] }).read()
        expect(await sum({ x: x.slice(3, 4), axes: [1] }).read()).toEqual(rows.slice(3, 4))
        results.add(String([...rows, ...(await sum({ x }).read())]))
      }
      expect(results.size).toBe(1)
    })
})
