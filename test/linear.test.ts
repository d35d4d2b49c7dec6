import {
  type Device,
  type DType,
  linear,
  linearBackward,
  linearLogProbs,
  openDevice,
  type Tensor,
} from 'p2r-kernels'
import { expect, test } from 'vitest'
import {
  type Backend,
  expectClose,
  expectGradient,
  expectRefusal,
  type Float,
  floats,
  onEveryBackend,
  Random,
  recorded,
  rounded,
  roundoff,
} from './harness.js'

const u = roundoff.f32
// Of several tiles of tensor cores.
const work = 2 ** 24

/** Σ_l a(i, l) b(l, j) in float64, and the bound on a sum of k f32 products in any order. */
function product(
  m: number,
  n: number,
  k: number,
  a: (i: number, l: number) => number,
  b: (l: number, j: number) => number,
  start: (j: number) => number = () => 0,
): { values: Float64Array; bound: number } {
  const values = new Float64Array(m * n)
  let largest = 0
  for (let i = 0; i < m; i++)
    for (let j = 0; j < n; j++) {
      let sum = start(j)
      let magnitude = Math.abs(sum)
      for (let l = 0; l < k; l++) {
        const p = a(i, l) * b(l, j)
        sum += p
        magnitude += Math.abs(p)
      }
      values[i * n + j] = sum
      largest = Math.max(largest, magnitude)
    }
  // Each product is rounded at most once and takes part in at most k + 1 additions.
  return { values, bound: (k + 2) * u * largest }
}

interface Layer {
  rows: number
  c: number
  f: number
  x: Float32Array
  w: Float32Array
  b: Float32Array
  d: Float32Array
}

function layer(seed: number, rows: number, c: number, f: number, dtype: Float, bias: Float): Layer {
  const random = new Random(seed)
  return {
    rows,
    c,
    f,
    x: rounded(random.normals(rows * c), dtype),
    w: rounded(random.normals(f * c, 1 / Math.sqrt(c + 1)), dtype),
    b: rounded(random.normals(f), bias),
    d: rounded(random.normals(rows * f), dtype),
  }
}

const forward = (l: Layer, bias: boolean) =>
  product(
    l.rows,
    l.f,
    l.c,
    (i, k) => l.x[i * l.c + k]!,
    (k, j) => l.w[j * l.c + k]!,
    (j) => (bias ? l.b[j]! : 0),
  )
const gradients = (l: Layer) => ({
  x: product(
    l.rows,
    l.c,
    l.f,
    (i, k) => l.d[i * l.f + k]!,
    (k, j) => l.w[k * l.c + j]!,
  ),
  weight: product(
    l.f,
    l.c,
    l.rows,
    (i, k) => l.d[k * l.f + i]!,
    (k, j) => l.x[k * l.c + j]!,
  ),
  bias: product(
    1,
    l.f,
    l.rows,
    () => 1,
    (k, j) => l.d[k * l.f + j]!,
  ),
})

interface Shape {
  title: string
  lead: number[]
  c: number
  f: number
  bias: 'none' | 'own' | 'f32'
}
const shapes: Shape[] = [
  { title: 'one row', lead: [], c: 5, f: 3, bias: 'own' },
  { title: 'ragged', lead: [3, 5], c: 7, f: 11, bias: 'f32' },
  { title: 'one column', lead: [70], c: 33, f: 1, bias: 'none' },
  { title: 'one channel', lead: [2, 1, 9], c: 1, f: 37, bias: 'own' },
  { title: 'whole tiles', lead: [96], c: 64, f: 64, bias: 'own' },
  { title: 'several tiles', lead: [203], c: 49, f: 81, bias: 'f32' },
  { title: 'deep', lead: [6], c: 1100, f: 70, bias: 'own' },
  { title: 'many rows', lead: [1301], c: 12, f: 20, bias: 'own' },
  // Of whole 16-byte lines, as the tensor cores' kernels want them: several tiles with ragged ends,
  // more steps than a ring has stages, and k cut into slices (of each product in turn).
  { title: 'ragged wide tiles', lead: [150], c: 136, f: 328, bias: 'f32' },
  { title: 'deep lines', lead: [6], c: 1096, f: 72, bias: 'own' },
  { title: 'many features', lead: [5], c: 24, f: 1096, bias: 'none' },
  { title: 'many rows of lines', lead: [1100], c: 16, f: 24, bias: 'own' },
]

function tensors(b: Backend, l: Layer, lead: number[], dtype: Float, bias: Float) {
  return {
    x: b.device.tensor(l.x, [...lead, l.c], dtype) as Tensor,
    weight: b.device.tensor(l.w, [l.f, l.c], dtype) as Tensor,
    bias: b.device.tensor(l.b, [l.f], bias) as Tensor,
    dOut: b.device.tensor(l.d, [...lead, l.f], dtype) as Tensor,
  }
}

onEveryBackend('linear', (b) => {
  for (const { title, lead, c, f, bias: kind } of shapes)
    for (const dtype of floats) {
      const rows = lead.reduce((n, d) => n * d, 1)
      const biasType = kind === 'f32' ? 'f32' : dtype
      const l = layer(rows + c + f, rows, c, f, dtype, biasType)
      // f32 results have no further rounding; the others have one.
      const last = dtype === 'f32' ? 0 : roundoff[dtype]

      test(`${title} ${dtype}`, async () => {
        const t = tensors(b, l, lead, dtype, biasType)
        const bias = kind === 'none' ? {} : { bias: t.bias }
        const expected = forward(l, kind !== 'none')
        const bound = { absolute: expected.bound, relative: last }
        const out = recorded(
          b,
          `linear ${title} ${dtype}`,
          bound,
          () => linear({ x: t.x, weight: t.weight, ...bias }),
          work,
        )
        expect(out.shape).toEqual([...lead, f])
        expect(out.dtype).toBe(dtype)
        expectClose(await out.toFloat32(), expected.values, bound)
      })

      test(`${title} ${dtype} backward`, async () => {
        const t = tensors(b, l, lead, dtype, biasType)
        const bias = kind === 'none' ? {} : { bias: t.bias }
        const expected = gradients(l)
        const largest = Math.max(expected.x.bound, expected.weight.bound, expected.bias.bound)
        using g = recorded(
          b,
          `linear backward ${title} ${dtype}`,
          { absolute: largest, relative: last },
          () => linearBackward({ dOut: t.dOut, x: t.x, weight: t.weight, ...bias }),
          work,
        )
        expect([g.dX.shape, g.dX.dtype]).toEqual([[...lead, c], dtype])
        expect([g.dWeight.shape, g.dWeight.dtype]).toEqual([[f, c], 'f32'])
        expectClose(await g.dX.toFloat32(), expected.x.values, {
          absolute: expected.x.bound,
          relative: last,
        })
        expectClose(await g.dWeight.toFloat32(), expected.weight.values, {
          absolute: expected.weight.bound,
        })
        expect(g.dBias !== undefined).toBe(kind !== 'none')
        if (g.dBias) {
          expect([g.dBias.shape, g.dBias.dtype]).toEqual([[f], 'f32'])
          expectClose(await g.dBias.toFloat32(), expected.bias.values, {
            absolute: expected.bias.bound,
          })
        }
      })
    }

  test('the gradients match finite differences', async () => {
    const l = layer(5, 9, 6, 8, 'f32', 'f32')
    const t = tensors(b, l, [9], 'f32', 'f32')
    using g = linearBackward(t)
    const loss = (x: ArrayLike<number>, w: ArrayLike<number>, bias: ArrayLike<number>) => {
      let sum = 0
      for (let i = 0; i < l.rows; i++)
        for (let j = 0; j < l.f; j++) {
          let y = bias[j]!
          for (let k = 0; k < l.c; k++) y += x[i * l.c + k]! * w[j * l.c + k]!
          sum += y * l.d[i * l.f + j]!
        }
      return sum
    }
    // The loss is linear in each, so the slopes are exact but for the f32 sums.
    const bound = { absolute: 1e-5, relative: 1e-5, entries: 64 }
    expectGradient((x) => loss(x, l.w, l.b), l.x, await g.dX.toFloat32(), bound)
    expectGradient((w) => loss(l.x, w, l.b), l.w, await g.dWeight.toFloat32(), bound)
    expectGradient((v) => loss(l.x, l.w, v), l.b, await g.dBias!.toFloat32(), bound)
  })

  test('accumulates into given gradients', async () => {
    for (const [rows, c, f] of [
      [10, 12, 7],
      [1100, 20, 33],
      [40, 300, 200],
    ] as const) {
      const l = layer(rows, rows, c, f, 'bf16', 'bf16')
      const t = tensors(b, l, [rows], 'bf16', 'bf16')
      const expected = gradients(l)
      using dWeight = b.device.tensor(new Float32Array(f * c).fill(2), [f, c])
      using dBias = b.device.tensor(new Float32Array(f).fill(-3), [f])
      const into = { dWeight, dBias }
      const bound = { absolute: 2 * expected.weight.bound + 6 * u, relative: 2 * roundoff.bf16 }
      const g = recorded(b, `linear into ${rows}`, bound, () => linearBackward({ ...t, into }))
      expect(g.dWeight).not.toBe(dWeight)
      g.dispose()
      using again = linearBackward({ ...t, into })
      const twice = (x: ArrayLike<number>, start: number) => Array.from(x, (v) => start + 2 * v)
      for (const w of [dWeight, again.dWeight])
        expectClose(await w.toFloat32(), twice(expected.weight.values, 2), {
          absolute: 2 * expected.weight.bound + 4 * u,
          relative: 2 * u,
        })
      for (const v of [dBias, again.dBias!])
        expectClose(await v.toFloat32(), twice(expected.bias.values, -3), {
          absolute: 2 * expected.bias.bound + 6 * u,
          relative: 2 * u,
        })
      // Of the two, either may be given alone.
      using fresh = linearBackward({ ...t, into: { dWeight } })
      expectClose(await fresh.dBias!.toFloat32(), expected.bias.values, {
        absolute: expected.bias.bound,
      })
    }
  })

  test('large products, in slabs and slices', { timeout: 60_000 }, async () => {
    for (const dtype of ['f32', 'bf16'] as const) {
      // dWeight sums over 4300 rows; the layer with its roles exchanged has 4300 channels.
      const { l, xT, dT } = large()
      const { rows, c, f } = l
      const t = tensors(b, l, [rows], dtype, dtype)
      using g = linearBackward(t)
      using x = b.device.tensor(xT, [c, rows], dtype)
      using weight = b.device.tensor(dT, [f, rows], dtype)
      using deep = linear({ x, weight })
      using wide = linear({ x: t.x, weight: t.weight })
      const [dWeight, dX, y, yWide] = await Promise.all(
        [g.dWeight, g.dX, deep, wide].map((r) => r.toFloat32()),
      )
      const random = new Random(2)
      const sampled = (
        k: number,
        a: (k: number) => number,
        w: (k: number) => number,
        actual: number,
        last: number,
      ) => {
        const e = product(
          1,
          1,
          k,
          (_, i) => a(i),
          (i) => w(i),
        )
        expectClose([actual], e.values, { absolute: e.bound, relative: last })
      }
      const last = dtype === 'f32' ? 0 : roundoff[dtype]
      for (let s = 0; s < 300; s++) {
        const [i, j, o] = [random.int(0, rows - 1), random.int(0, c - 1), random.int(0, f - 1)]
        const xAt = (r: number, k: number) => l.x[r * c + k]!
        const dAt = (r: number, k: number) => l.d[r * f + k]!
        const wAt = (r: number, k: number) => l.w[r * c + k]!
        sampled(
          rows,
          (k) => dAt(k, o),
          (k) => xAt(k, j),
          dWeight![o * c + j]!,
          0,
        )
        sampled(
          rows,
          (k) => dAt(k, o),
          (k) => xAt(k, j),
          y![j * f + o]!,
          last,
        )
        sampled(
          f,
          (k) => dAt(i, k),
          (k) => wAt(k, j),
          dX![i * c + j]!,
          last,
        )
        sampled(
          c,
          (k) => xAt(i, k),
          (k) => wAt(o, k),
          yWide![i * f + o]!,
          last,
        )
      }
    }
  })

  test('accepts empty inputs', async () => {
    const z = (...shape: number[]) => b.device.zeros(shape)
    expect(linear({ x: z(0, 4), weight: z(3, 4) }).shape).toEqual([0, 3])
    expect(linear({ x: z(5, 4), weight: z(0, 4) }).shape).toEqual([5, 0])
    using bias = b.device.tensor([1, 2, 3], [3])
    using y = linear({ x: z(2, 0), weight: z(3, 0), bias })
    expect(Array.from(await y.read())).toEqual([1, 2, 3, 1, 2, 3])
    expect(Array.from(await linear({ x: z(2, 0), weight: z(3, 0) }).read())).toEqual(
      Array(6).fill(0),
    )
    using g = linearBackward({ dOut: z(0, 3), x: z(0, 4), weight: z(3, 4), bias })
    expect(g.dX.shape).toEqual([0, 4])
    expect(Array.from(await g.dWeight.read())).toEqual(Array(12).fill(0))
    expect(Array.from(await g.dBias!.read())).toEqual([0, 0, 0])
    using dWeight = b.device.tensor(new Float32Array(12).fill(7), [3, 4])
    linearBackward({ dOut: z(0, 3), x: z(0, 4), weight: z(3, 4), into: { dWeight } })
    expect(Array.from(await dWeight.read())).toEqual(Array(12).fill(7))
    using none = linearBackward({ dOut: z(2, 0), x: z(2, 4), weight: z(0, 4), bias: z(0) })
    expect(Array.from(await none.dX.read())).toEqual(Array(8).fill(0))
  })

  test('non-finite values affect their row only', async () => {
    const l = layer(3, 40, 20, 30, 'f32', 'f32')
    l.x[7 * 20 + 3] = NaN
    l.x[9 * 20 + 5] = Infinity
    const t = tensors(b, l, [40], 'f32', 'f32')
    const { dOut: _, ...inputs } = t
    const y = await linear(inputs).toFloat32()
    for (let i = 0; i < 40; i++)
      for (let j = 0; j < 30; j++) {
        const v = y[i * 30 + j]!
        expect(
          i === 7 ? Number.isNaN(v) : i === 9 ? Math.abs(v) === Infinity : Number.isFinite(v),
        ).toBe(true)
      }
  })

  test('refuses mismatched arguments', () => {
    const z = (shape: number[], dtype: DType = 'f32'): Tensor => b.device.zeros(shape, dtype)
    const x = z([2, 4])
    const weight = z([3, 4])
    const refused = (a: object, code: string, message: RegExp) =>
      expectRefusal(() => linear({ x, weight, ...a }), code, 'linear', message)
    refused({ x: [1] }, 'ERR_VALUE', /x must be a Tensor/)
    refused({ x: z([2, 4], 'i32') }, 'ERR_DTYPE', /got i32/)
    refused({ x: z([]), weight: z([3, 1]) }, 'ERR_SHAPE', /at least 1 axis/)
    refused({ weight: z([3, 4], 'f16') }, 'ERR_DTYPE', /weight must be f32, got f16/)
    refused({ weight: z([3, 5]) }, 'ERR_SHAPE', /x's last axis, 4, got \[3, 5\]/)
    refused({ weight: z([12]) }, 'ERR_SHAPE', /2 axes/)
    refused({ bias: z([4]) }, 'ERR_SHAPE', /\[3\], got \[4\]/)
    refused({ bias: z([3], 'bf16') }, 'ERR_DTYPE', /bias/)
    refused({ dtype: 'bf16' }, 'ERR_VALUE', /dtype must be 'f32'.*got 'bf16'/)
    using other = openDevice('cpu')
    refused({ weight: other.zeros([3, 4]) }, 'ERR_DEVICE', /another device/)

    const dOut = z([2, 3])
    const back = (a: object, code: string, message: RegExp) =>
      expectRefusal(
        () => linearBackward({ dOut, x, weight, ...a }),
        code,
        'linearBackward',
        message,
      )
    back({ dOut: z([2, 4]) }, 'ERR_SHAPE', /\[2, 3\], got \[2, 4\]/)
    back({ dOut: z([2, 3], 'f16') }, 'ERR_DTYPE', /dOut/)
    back({ into: 3 }, 'ERR_VALUE', /into/)
    back({ into: {} }, 'ERR_VALUE', /into\.dWeight must be a Tensor/)
    back({ into: { dWeight: z([4, 3]) } }, 'ERR_SHAPE', /into\.dWeight/)
    back({ into: { dWeight: z([3, 4], 'f16') } }, 'ERR_DTYPE', /into\.dWeight must be f32/)
    back({ into: { dWeight: z([3, 4]), dBias: z([3]) } }, 'ERR_VALUE', /into.dBias needs a bias/)
    back({ bias: z([3]), into: { dWeight: z([3, 4]), dBias: z([2]) } }, 'ERR_SHAPE', /into\.dBias/)
  })

  test('a row has the same bits alone, in any batch and by any number of threads', {
    timeout: 120_000,
  }, async () => {
    if (!b.name.startsWith('cpu')) return expect(b.name).toBe('cuda')
    const random = new Random(11)
    const devices = [1, 2, 5].map((threads) => b.open({ threads }))
    // Odd and even, of one block of k and of several, with and without a whole one at the end; past
    // 4096 a product of many rows takes k in slabs.
    const channels = [1, 7, 255, 512, 520, 1030, 2048, 5001]
    for (const [i, c] of channels.entries())
      for (const dtype of floats) {
        const [rows, f] = [200, random.int(1, 75)]
        const l = layer(random.int(0, 1e6), rows, c, f, dtype, dtype)
        const own = i % 2 === 0
        const run = async (device: Device, first: number, n: number) => {
          using x = device.tensor(l.x.subarray(first * c, (first + n) * c), [n, c], dtype)
          using weight = device.tensor(l.w, [f, c], dtype)
          using bias = device.tensor(l.b, [f], dtype)
          using y = linear({ x, weight, ...(own ? { bias } : {}), dtype: 'f32' })
          using small = linear({ x, weight, ...(own ? { bias } : {}) })
          const cast = small.dtype === 'f32' ? small : y.cast(dtype)
          expect(await small.read()).toEqual(await cast.read())
          return Buffer.from((await y.read()).buffer)
        }
        const all = await run(b.device, 0, rows)
        const some = [random.int(2, 8), random.int(9, 16), random.int(17, 20)]
        for (const n of [1, ...some, i % 2 ? 64 : 97]) {
          const first = random.int(0, rows - n)
          const part = await run(devices[random.int(0, 2)]!, first, n)
          const expected = all.subarray(4 * first * f, 4 * (first + n) * f)
          expect(part.equals(expected), `${n} of ${rows} rows, ${c} -> ${f} ${dtype}`).toBe(true)
        }
      }
    for (const device of devices) device.dispose()
  })

  test('has the logits of a linear head', async () => {
    if (!b.name.startsWith('cpu')) return expect(b.name).toBe('cuda')
    for (const [rows, c, v] of [
      [1, 1024, 130],
      [5, 601, 97],
      [33, 2500, 40],
      [100, 4099, 3],
    ] as const)
      for (const dtype of floats) {
        const l = layer(rows + c, rows, c, v, dtype, 'f32')
        const t = tensors(b, l, [rows], dtype, 'f32')
        using targets = b.device.tensor(new Int32Array(rows), [rows], 'i32')
        for (const bias of [{}, { bias: t.bias }]) {
          using logits = linear({ x: t.x, weight: t.weight, ...bias, dtype: 'f32' })
          using head = linearLogProbs({ hidden: t.x, weight: t.weight, ...bias, targets })
          const [z, stats] = await Promise.all([logits.read(), head.stats.read()])
          // Of a row's stats the first is its largest logit, not rounded at a temperature of 1.
          for (let i = 0; i < rows; i++)
            expect(stats[2 * i]).toBe(Math.max(...z.subarray(i * v, (i + 1) * v)))
        }
      }
  })

  test('in f32, sums are not rounded', async () => {
    for (const dtype of floats)
      for (const lead of [3, 40]) {
        const l = layer(lead, lead, 72, 24, dtype, 'f32')
        const t = tensors(b, l, [lead], dtype, 'f32')
        const expected = forward(l, true)
        const bound = { absolute: expected.bound }
        const { dOut: _, ...inputs } = t
        const out = recorded(b, `linear to f32 ${lead} ${dtype}`, bound, () =>
          linear({ ...inputs, dtype: 'f32' }),
        )
        expect(out.dtype).toBe('f32')
        expectClose(await out.read(), expected.values, bound)
      }
  })

  test('is bitwise independent of the number of threads', { timeout: 60_000 }, async () => {
    if (!b.name.startsWith('cpu')) return expect(b.name).toBe('cuda')
    for (const [rows, c, f] of [
      [300, 520, 130],
      [5000, 24, 50],
      [20, 700, 900],
      [700, 90, 800],
    ] as const) {
      const l = layer(rows, rows, c, f, 'f32', 'f32')
      const results: Buffer[] = []
      for (const threads of [1, 2, 5]) {
        using device = b.open({ threads })
        const t = tensors({ ...b, device }, l, [rows], 'f32', 'f32')
        const { dOut: _, ...inputs } = t
        const y = linear(inputs)
        const g = linearBackward(t)
        const all = await Promise.all([y, g.dX, g.dWeight, g.dBias!].map((r) => r.read()))
        results.push(Buffer.concat(all.map((r) => Buffer.from(r.buffer))))
      }
      expect(results[0]!.equals(results[1]!) && results[0]!.equals(results[2]!)).toBe(true)
    }
  })
})

interface Large {
  l: Layer
  xT: Float32Array
  dT: Float32Array
}
let made: Large | undefined

/** 4300 rows of 210 channels and 700 features, made once for all backends. */
function large(): Large {
  if (!made) {
    const [rows, c, f] = [4300, 210, 700]
    const random = new Random(1)
    // Of 8 bits, so that bf16 holds them too.
    const uniform = (n: number) => {
      const x = new Float32Array(n)
      for (let i = 0; i < n; i++) x[i] = Math.round(256 * (random.uniform() - 0.5)) / 256
      return x
    }
    const l = {
      rows,
      c,
      f,
      x: uniform(rows * c),
      w: uniform(f * c),
      b: uniform(f),
      d: uniform(rows * f),
    }
    made = { l, xT: transposed(l.x, rows, c), dT: transposed(l.d, rows, f) }
  }
  return made
}

function transposed(x: Float32Array, rows: number, columns: number): Float32Array {
  const out = new Float32Array(x.length)
  for (let i = 0; i < rows; i++)
    for (let j = 0; j < columns; j++) out[j * rows + i] = x[i * columns + j]!
  return out
}
