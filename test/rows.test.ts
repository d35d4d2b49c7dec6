import {
  add,
  gatherRows,
  gatherRowsBackward,
  meanPool,
  meanPoolBackward,
  openDevice,
  scatterAddRows,
  scatterRows,
  scatterRowsBackward,
} from 'p2r-kernels'
import { describe, expect, test } from 'vitest'
import { golden } from './golden.js'
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

const u = roundoff.f32

onEveryBackend('rows', (b) => {
  test('reference data: an embedding and its gradient', async () => {
    const files = golden('lm_ops')
    const f = (name: string) => files.f32(`lm_ops/embedding/e1/${name}.bin`)
    const { vocab, tensors } = files.json('lm_ops/embedding/e1/meta.json')
    const index = files.i32('lm_ops/embedding/e1/ids.bin')
    for (const dtype of ['f32', 'bf16'] as const) {
      const x = b.device.tensor(f('weight'), [vocab, tensors.weight.shape[1]], dtype)
      expect(await gatherRows({ x, index }).toFloat32()).toEqual(f('out'))
      const dOut = b.device.tensor(f('dout'), tensors.dout.shape, dtype)
      const dWeight = gatherRowsBackward({ dOut, index, rows: vocab })
      // Sums of up to 91 bf16 numbers are exact in f32; in bf16 they are rounded once.
      expect(await dWeight.toFloat32()).toEqual(rounded(f('dweight'), dtype))
    }
  })

  test('rows of every alignment are replaced', async () => {
    // 16, 4, 2 and 1 bytes divide the rows and their places.
    for (const [dtype, width] of [
      ['f32', 8],
      ['f32', 3],
      ['bf16', 5],
      ['u8', 7],
    ] as const) {
      const x = b.device.tensor(
        Float32Array.from({ length: 4 * width }, (_, i) => i).map(Number),
        [4 * width],
        'f32',
      )
      const typed = x.cast(dtype).reshape([4, width])
      using out = recorded(b, `scatterRows words ${dtype} ${width}`, {}, () =>
        scatterRows({ x: typed, y: typed.slice(0, 2), index: [3, 1] }),
      )
      const expected = [...(await typed.toFloat32())]
      expected.splice(3 * width, width, ...expected.slice(0, width))
      expected.splice(width, width, ...expected.slice(width, 2 * width))
      expect([...(await out.toFloat32())]).toEqual(expected)
    }
  })

  test('the gradients of scattered rows match finite differences', async () => {
    const [R, C] = [5, 3]
    const index = [4, 1]
    const random = new Random(6)
    const [x, y, d] = [random.normals(R * C), random.normals(2 * C), random.normals(R * C)]
    const replaced = (x: ArrayLike<number>, y: ArrayLike<number>) =>
      d.reduce((s, v, i) => {
        const at = index.indexOf(Math.floor(i / C))
        return s + v * (at < 0 ? x[i]! : y[at * C + (i % C)]!)
      }, 0)
    const added = (x: ArrayLike<number>, y: ArrayLike<number>) =>
      d.reduce((s, v, i) => {
        const at = index.indexOf(Math.floor(i / C))
        return s + v * (x[i]! + (at < 0 ? 0 : y[at * C + (i % C)]!))
      }, 0)
    const dOut = b.device.tensor(d, [R, C])
    const { dX, dY } = scatterRowsBackward({ dOut, index })
    // Both are linear: central differences have the rounding of f32 data alone.
    const bound = { absolute: 1e-6, relative: 1e-6 }
    expectGradient((v) => replaced(v, y), x, await dX.read(), bound)
    expectGradient((v) => replaced(x, v), y, await dY.read(), bound)
    expectGradient((v) => added(v, y), x, await dOut.read(), bound)
    expectGradient((v) => added(x, v), y, await gatherRows({ x: dOut, index }).read(), bound)
  })

  test('scattered rows: none, empty ones, and refusals', async () => {
    const x = b.device.tensor([1, 2, 3, 4], [2, 2])
    const y = b.device.tensor([5, 6], [1, 2])
    const none = b.device.zeros([0, 2])
    expect(await scatterRows({ x, y: none, index: [] }).read()).toEqual(await x.read())
    expect(await scatterAddRows({ x, y: none, index: [] }).read()).toEqual(await x.read())
    const flat = b.device.zeros([3, 0])
    expect(scatterRows({ x: flat, y: flat, index: [2, 1, 0] }).shape).toEqual([3, 0])
    expect(scatterAddRows({ x: flat, y: flat, index: [2, 2, 0] }).shape).toEqual([3, 0])
    const replace = (a: object) => () => scatterRows({ x, y, index: [1], ...a } as never)
    const op = 'scatterRows'
    expectRefusal(replace({ index: [2] }), 'ERR_VALUE', op, /index\[0\]/)
    expectRefusal(replace({ index: [0, 0], y: x }), 'ERR_VALUE', op, /row 0 is in it more than/)
    expectRefusal(replace({ index: [0, 1] }), 'ERR_SHAPE', op, /\[2, 2\], got \[1, 2\]/)
    expectRefusal(replace({ y: b.device.zeros([1, 2], 'f16') }), 'ERR_DTYPE', op)
    expectRefusal(replace({ y: undefined }), 'ERR_VALUE', op, /y must be a Tensor/)
    expectRefusal(replace({ x: b.device.zeros([]) }), 'ERR_SHAPE', op)
    const bytes = b.device.zeros([2, 2], 'u8')
    expectRefusal(
      () => scatterAddRows({ x: bytes, y: bytes, index: [0, 1] } as never),
      'ERR_DTYPE',
      'scatterAddRows',
    )
    const back = (dOut: unknown) => () => scatterRowsBackward({ dOut, index: [0] } as never)
    expectRefusal(back(bytes), 'ERR_DTYPE', 'scatterRowsBackward', /dOut/)
    expectRefusal(back(b.device.zeros([])), 'ERR_SHAPE', 'scatterRowsBackward', /dOut/)
    expectRefusal(
      () => scatterRowsBackward({ dOut: x, index: [2] }),
      'ERR_VALUE',
      'scatterRowsBackward',
    )
  })

  for (const dtype of floats) {
    const random = new Random(3)
    const [T, C] = [301, 77]
    const x = rounded(random.normals(T * C), dtype)

    const index = Array.from({ length: 500 }, () => random.int(0, 40) * random.int(0, 5))
    test(`gatherRowsBackward ${dtype}`, async () => {
      const d = rounded(random.normals(500 * C), dtype)
      const expected = new Float64Array(T * C)
      const size = new Float64Array(T * C)
      index.forEach((r, i) => {
        for (let c = 0; c < C; c++) {
          expected[r * C + c]! += d[i * C + c]!
          size[r * C + c]! += Math.abs(d[i * C + c]!)
        }
      })
      // At most 20 additions in a row of what is summed, up to 200 normals: their sizes add up to 200.
      const bound = { absolute: 20 * u * 200, relative: roundoff[dtype] + u }
      const dOut = b.device.tensor(d, [500, C], dtype)
      using dX = recorded(b, `gatherRowsBackward ${dtype}`, bound, () =>
        gatherRowsBackward({ dOut, index, rows: T }),
      )
      expect([dX.shape, dX.dtype]).toEqual([[T, C], dtype])
      expectClose(await dX.toFloat32(), expected, bound)
    })

    const targets = [7, 300, 0, 41, 8, 150]
    test(`scatterAddRows ${dtype}`, async () => {
      const twice = [...targets, 41, 41, 0]
      const y = rounded(random.normals(twice.length * C), dtype)
      const expected = Float64Array.from(x)
      twice.forEach((r, i) => {
        for (let c = 0; c < C; c++) expected[r * C + c]! += y[i * C + c]!
      })
      // At most three additions of normals, rounded once to the type.
      const bound = { absolute: 24 * u, relative: roundoff[dtype] }
      const tx = b.device.tensor(x, [T, C], dtype)
      const ty = b.device.tensor(y, [twice.length, C], dtype)
      using out = recorded(b, `scatterAddRows ${dtype}`, bound, () =>
        scatterAddRows({ x: tx, y: ty, index: twice }),
      )
      expect([out.shape, out.dtype]).toEqual([[T, C], dtype])
      expectClose(await out.toFloat32(), expected, bound)
      // The rows that are not named are copied, and one that is added alone is add's.
      const got = await out.read()
      const rowOf = (data: ArrayLike<number>, r: number) =>
        Array.prototype.slice.call(data, r * C, (r + 1) * C)
      expect(rowOf(got, 1)).toEqual(rowOf(await tx.read(), 1))
      const one = add({ x: tx.slice(7, 8), y: ty.slice(0, 1) })
      expect(rowOf(got, 7)).toEqual([...(await one.read())])
    })

    test(`scatterRows ${dtype}`, async () => {
      const tx = b.device.tensor(x, [T, C], dtype)
      const ty = b.device.tensor(rounded(random.normals(6 * C), dtype), [6, C], dtype)
      using out = recorded(b, `scatterRows ${dtype}`, {}, () =>
        scatterRows({ x: tx, y: ty, index: targets }),
      )
      expect([out.shape, out.dtype]).toEqual([[T, C], dtype])
      const expected = await tx.read()
      const rows = await ty.read()
      targets.forEach((r, i) => {
        expected.set(rows.subarray(i * C, (i + 1) * C), r * C)
      })
      expect(await out.read()).toEqual(expected)

      using back = recorded(b, `scatterRows backward ${dtype}`, {}, () =>
        scatterRowsBackward({ dOut: tx, index: targets }),
      )
      const dX = await tx.read()
      for (const r of targets) dX.fill(0, r * C, (r + 1) * C)
      expect(await back.dX.read()).toEqual(dX)
      expect(await back.dY.read()).toEqual(await gatherRows({ x: tx, index: targets }).read())
    })

    test(`meanPool ${dtype}`, async () => {
      const cuSeqlens = [0, 0, 1, 100, 100, 300, T]
      const expected = new Float64Array(6 * C)
      for (let s = 0; s < 6; s++)
        for (let t = cuSeqlens[s]!; t < cuSeqlens[s + 1]!; t++)
          for (let c = 0; c < C; c++)
            expected[s * C + c]! += x[t * C + c]! / (cuSeqlens[s + 1]! - cuSeqlens[s]!)
      // As many additions as a run and the runs have, of means of |x| of about 1.
      const bound = { absolute: 80 * u, relative: roundoff[dtype] + 2 * u }
      using out = recorded(b, `meanPool ${dtype}`, bound, () =>
        meanPool({ x: b.device.tensor(x, [T, C], dtype), cuSeqlens }),
      )
      expect([out.shape, out.dtype]).toEqual([[6, C], dtype])
      expectClose(await out.toFloat32(), expected, bound)

      const d = rounded(random.normals(6 * C), dtype)
      const gradient = new Float64Array(T * C)
      for (let s = 0; s < 6; s++)
        for (let t = cuSeqlens[s]!; t < cuSeqlens[s + 1]!; t++)
          for (let c = 0; c < C; c++)
            gradient[t * C + c] = d[s * C + c]! / (cuSeqlens[s + 1]! - cuSeqlens[s]!)
      // One division and one rounding; the quotients of f16 can be below its normal numbers.
      const one = { absolute: 2 ** -25, relative: roundoff[dtype] + u }
      using dX = recorded(b, `meanPoolBackward ${dtype}`, one, () =>
        meanPoolBackward({ dOut: b.device.tensor(d, [6, C], dtype), cuSeqlens }),
      )
      expectClose(await dX.toFloat32(), gradient, one)
    })
  }

  test('a mean over many rows is accurate', async () => {
    const T = 100_000
    const data = Float32Array.from({ length: T }, (_, i) => 1 + (i % 7))
    const x = b.device.tensor(data, [T, 1])
    const mean = data.reduce((s, v) => s + v, 0) / T
    // Runs of 64 on the CPU, threads' shares in runs on CUDA: nowhere near the 1e-3 of a plain f32 sum.
    expectClose(await meanPool({ x, cuSeqlens: [0, T] }).read(), [mean], { relative: 1600 * u })
  })

  test('gatherRows copies bit for bit', async () => {
    const index = [4, 0, 4, 2, 2, 2, 1]
    for (const dtype of ['f32', 'f16', 'bf16', 'i32', 'u8'] as const)
      for (const shape of [[5], [5, 3], [5, 16], [5, 2, 8]]) {
        const size = shape.reduce((n, d) => n * d, 1)
        const width = size / 5
        const host = { f32: Float32Array, f16: Uint16Array, bf16: Uint16Array, i32: Int32Array }
        const count = Array.from({ length: size + width }, (_, i) => i)
        const data = (dtype === 'u8' ? Uint8Array : host[dtype]).from(count)
        const all = b.device.tensor(data, [6, ...shape.slice(1)], dtype)
        // A view that starts one row in, which moves its alignment.
        const x = all.slice(1)
        const bound = {}
        const out = recorded(b, `gatherRows ${dtype} ${width}`, bound, () =>
          gatherRows({ x, index }),
        )
        expect([out.shape, out.dtype]).toEqual([[7, ...shape.slice(1)], dtype])
        const expected = index.flatMap((r) => [...data.subarray((r + 1) * width, (r + 2) * width)])
        expect([...(await out.read())]).toEqual(expected)
      }
    const special = b.device.tensor(Uint16Array.of(0x7e01, 0xfc00, 0x0001), [3, 1], 'f16')
    expect([...(await gatherRows({ x: special, index: Int32Array.of(2, 0, 1) }).read())]).toEqual([
      1, 0x7e01, 0xfc00,
    ])
  })

  test('gatherRowsBackward is the transpose of gatherRows', async () => {
    // <gather(x), d> = <x, gatherBackward(d)>, exactly for small whole numbers.
    const random = new Random(9)
    const whole = (n: number) => Float32Array.from({ length: n }, () => random.int(-9, 9))
    const index = Array.from({ length: 64 }, () => random.int(0, 9))
    const [x, d] = [whole(10 * 5), whole(64 * 5)]
    const y = await gatherRows({ x: b.device.tensor(x, [10, 5]), index }).toFloat32()
    const g = gatherRowsBackward({ dOut: b.device.tensor(d, [64, 5]), index, rows: 10 })
    const dot = (p: Float32Array, q: Float32Array) => p.reduce((s, v, i) => s + v * q[i]!, 0)
    expect(dot(y, d)).toBe(dot(x, await g.toFloat32()))
  })

  test('accepts empty inputs', async () => {
    const none = b.device.zeros([0, 4])
    expect(gatherRows({ x: none, index: [] }).shape).toEqual([0, 4])
    expect(gatherRows({ x: b.device.zeros([3, 0]), index: [2] }).shape).toEqual([1, 0])
    const zeros = gatherRowsBackward({ dOut: none, index: [], rows: 2 })
    expect([...(await zeros.read())]).toEqual([0, 0, 0, 0, 0, 0, 0, 0])
    expect(gatherRowsBackward({ dOut: none, index: [], rows: 0 }).shape).toEqual([0, 4])
    expect(meanPool({ x: none, cuSeqlens: [0] }).shape).toEqual([0, 4])
    expect([...(await meanPool({ x: none, cuSeqlens: [0, 0] }).read())]).toEqual([0, 0, 0, 0])
    expect(meanPoolBackward({ dOut: none, cuSeqlens: [0] }).shape).toEqual([0, 4])
  })

  test('refuses mismatched arguments', () => {
    const x = b.device.zeros([4, 3])
    const at = (index: unknown) => () => gatherRows({ x, index: index as number[] })
    expectRefusal(at([0, 4]), 'ERR_VALUE', 'gatherRows', /index\[1\] .* from 0 to 3, got 4/)
    expectRefusal(at([-1]), 'ERR_VALUE', 'gatherRows')
    expectRefusal(at([0.5]), 'ERR_VALUE', 'gatherRows')
    expectRefusal(at([NaN]), 'ERR_VALUE', 'gatherRows')
    expectRefusal(at('012'), 'ERR_VALUE', 'gatherRows', /list of integers/)
    expectRefusal(() => gatherRows({ x: b.device.zeros([]), index: [] }), 'ERR_SHAPE', 'gatherRows')
    const back = (a: object) => () =>
      gatherRowsBackward({ dOut: x, index: [0, 0, 0, 1], rows: 2, ...a })
    expectRefusal(back({ rows: 1 }), 'ERR_VALUE', 'gatherRowsBackward', /index\[3\]/)
    expectRefusal(back({ rows: -1 }), 'ERR_VALUE', 'gatherRowsBackward')
    expectRefusal(back({ index: [0] }), 'ERR_SHAPE', 'gatherRowsBackward')
    expectRefusal(back({ dOut: b.device.zeros([4], 'i32') }), 'ERR_DTYPE', 'gatherRowsBackward')
    const pool = (cuSeqlens: unknown) => () => meanPool({ x, cuSeqlens: cuSeqlens as number[] })
    expectRefusal(pool([0, 3]), 'ERR_VALUE', 'meanPool', /number of tokens, 4, got 3/)
    expectRefusal(pool([0, 3, 2, 4]), 'ERR_VALUE', 'meanPool')
    expectRefusal(pool([1, 4]), 'ERR_VALUE', 'meanPool')
    expectRefusal(pool([]), 'ERR_VALUE', 'meanPool')
    expectRefusal(
      () => meanPool({ x: b.device.zeros([4]), cuSeqlens: [0, 4] }),
      'ERR_SHAPE',
      'meanPool',
    )
    const unpool = (cuSeqlens: number[]) => () => meanPoolBackward({ dOut: x, cuSeqlens })
    expectRefusal(unpool([0, 3]), 'ERR_SHAPE', 'meanPoolBackward', /each of the 1 sequences/)
    expectRefusal(unpool([0, 1, 0, 1, 2]), 'ERR_VALUE', 'meanPoolBackward')
  })
})

describe('rows', () => {
  for (const { name, options } of cpuPaths)
    test(`sums do not depend on the thread count (${name})`, async () => {
      const random = new Random(10)
      const data = random.normals(5000 * 130)
      const index = Array.from({ length: 5000 }, () => random.int(0, 19))
      const results: string[] = []
      for (const threads of [1, 2, 5]) {
        using device = openDevice('cpu', { ...options, threads })
        const x = device.tensor(data, [5000, 130])
        const sums = await gatherRowsBackward({ dOut: x, index, rows: 20 }).read()
        const mean = await meanPool({ x, cuSeqlens: [0, 2500, 5000] }).read()
        results.push(
          Buffer.concat([Buffer.from(sums.buffer), Buffer.from(mean.buffer)]).toString('hex'),
        )
      }
      expect(new Set(results).size).toBe(1)
    })
})
