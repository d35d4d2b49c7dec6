import { type DType, type HostArray, openDevice, type Tensor } from 'p2r-kernels'
import { expect, test } from 'vitest'
import { expectRefusal, floats, onEveryBackend, Random, recorded, rounded } from './harness.js'

/** The bits of a float32. */
const f32 = (bits: number): number => new Float32Array(Uint32Array.of(bits).buffer)[0]!
const bitsOf = (x: number): number => new Uint32Array(Float32Array.of(x).buffer)[0]!

// Numbers of a 16-bit type in order, from their definition: sign, exponent, fraction.
function numberOf(bits: number, dtype: 'f16' | 'bf16'): number {
  if (dtype === 'bf16') return f32(bits << 16)
  const sign = bits & 0x8000 ? -1 : 1
  const exponent = (bits >> 10) & 31
  const fraction = bits & 0x3ff
  if (exponent === 31) return fraction ? NaN : sign * Infinity
  return exponent === 0
    ? sign * fraction * 2 ** -24
    : sign * (1024 + fraction) * 2 ** (exponent - 25)
}

onEveryBackend('tensor', (b) => {
  const numbers = [0, 1, 2, 200, 3, 255]
  const all: DType[] = ['f32', 'f16', 'bf16', 'i32', 'u8']

  // What each type of host data may become; everything else is refused.
  const sources: [string, Exclude<HostArray, Uint16Array>][] = [
    ['number[]', numbers],
    ['Float32Array', Float32Array.from(numbers)],
    ['Float64Array', Float64Array.from(numbers)],
    ['Int32Array', Int32Array.from(numbers)],
    ['Uint8Array', Uint8Array.from(numbers)],
    ['Uint8ClampedArray', Uint8ClampedArray.from(numbers)],
  ]
  test.each(sources)('%s is converted to every type by value', async (_, data) => {
    for (const dtype of all) {
      using x = b.device.tensor(data, [2, 3], dtype)
      expect(x).toMatchObject({ dtype, shape: [2, 3], size: 6 })
      expect(x.byteLength).toBe({ f32: 24, f16: 12, bf16: 12, i32: 24, u8: 6 }[dtype])
      expect(Array.from(await x.toFloat32())).toEqual(numbers)
      using y = b.device.zeros([6], dtype)
      y.write(data)
      expect(await y.read()).toEqual(await x.read())
    }
  })

  test('a Uint16Array is raw bits of f16 and bf16 only', async () => {
    const bits = Uint16Array.of(0x3c00, 0xbf80, 1, 0x7c01, 0xffff)
    for (const dtype of ['f16', 'bf16'] as const) {
      using x = b.device.tensor(bits, [5], dtype)
      expect(await x.read()).toEqual(bits)
      const wide = await x.toFloat32()
      expect(Array.from(wide)).toEqual(Array.from(bits, (u) => numberOf(u, dtype)))
    }
    expectRefusal(() => b.device.tensor(bits as never, [5]), 'ERR_DTYPE', 'tensor', /needs a dtype/)
    for (const dtype of ['f32', 'i32', 'u8'] as const)
      expectRefusal(() => b.device.tensor(bits, [5], dtype), 'ERR_DTYPE', 'tensor', /raw bits/)
  })

  test('the default dtype follows from the data', () => {
    const types = sources.map(([name, data]) => {
      using x = b.device.tensor(data as number[], [6])
      return [name, x.dtype]
    })
    expect(Object.fromEntries(types)).toEqual({
      'number[]': 'f32',
      Float32Array: 'f32',
      Float64Array: 'f32',
      Int32Array: 'i32',
      Uint8Array: 'u8',
      Uint8ClampedArray: 'u8',
    })
    using zeros = b.device.zeros([2])
    expect(zeros.dtype).toBe('f32')
  })

  test('read returns the typed array of the dtype', async () => {
    const kinds = { f32: Float32Array, f16: Uint16Array, bf16: Uint16Array, i32: Int32Array }
    for (const [dtype, kind] of Object.entries({ ...kinds, u8: Uint8Array })) {
      using x = b.device.zeros([3], dtype as DType)
      const data = await x.read()
      expect(data).toBeInstanceOf(kind)
      expect(Array.from(data)).toEqual([0, 0, 0])
    }
  })

  test('views of buffers, shared ones too, are read at their offset', async () => {
    const whole = Float32Array.from({ length: 10 }, (_, i) => i)
    using x = b.device.tensor(whole.subarray(3, 6), [3])
    expect(Array.from(await x.read())).toEqual([3, 4, 5])
    const shared = new Float32Array(new SharedArrayBuffer(40))
    shared.set(whole)
    using y = b.device.tensor(shared.subarray(4, 6), [2])
    expect(Array.from(await y.read())).toEqual([4, 5])
    whole.fill(-1)
    expect(Array.from(await x.read())).toEqual([3, 4, 5])
  })

  test.each(['f16', 'bf16'] as const)(
    'every %s value comes through f32 unchanged',
    async (dtype) => {
      const bits = Uint16Array.from({ length: 65536 }, (_, i) => i)
      const values = Float32Array.from(bits, (u) => numberOf(u, dtype))
      using x = b.device.tensor(bits, [65536], dtype)
      using wide = x.cast('f32')
      expect(await wide.read()).toEqual(values)
      using back = wide.cast(dtype)
      using from = b.device.tensor(values, [65536], dtype)
      for (const got of [await back.read(), await from.read()])
        for (let i = 0; i < 65536; i++)
          if (Number.isNaN(values[i])) expect(numberOf(got[i]!, dtype)).toBeNaN()
          else if (got[i] !== i) expect.fail(`${i} became ${got[i]}`)
    },
  )

  test.each(['f16', 'bf16'] as const)('%s rounds to nearest even', async (dtype) => {
    // Between each two neighbours: the middle goes to the even one, what is beside it does not.
    // Past the largest, infinity is the neighbour, as if the exponent went on.
    const infinity = dtype === 'f16' ? 0x7c00 : 0x7f80
    const data: number[] = []
    const expected: number[] = []
    const random = new Random(3)
    for (let n = 0; n < 4000; n++) {
      const low = n < 600 ? n : n < 602 ? infinity - 1 - (n - 600) : random.int(0, infinity - 1)
      const at = numberOf(low, dtype)
      const above =
        low + 1 === infinity ? 2 * at - numberOf(low - 1, dtype) : numberOf(low + 1, dtype)
      const middle = (at + above) / 2
      const sign = n % 2 ? -1 : 1
      const signBit = n % 2 ? 0x8000 : 0
      const even = low % 2 ? low + 1 : low
      const exact = Math.fround(middle)
      if (exact !== middle) continue
      data.push(sign * middle, sign * f32(bitsOf(middle) - 1), sign * f32(bitsOf(middle) + 1))
      expected.push(signBit | even, signBit | low, signBit | (low + 1))
    }
    expect(data.length).toBeGreaterThan(9000)
    data.push(Infinity, -Infinity, -0, 3e38)
    expected.push(infinity, infinity | 0x8000, 0x8000, dtype === 'f16' ? 0x7c00 : 0x7f62)
    const source = Float32Array.from(data)
    using host = b.device.tensor(source, [data.length], dtype)
    using wide = b.device.tensor(source, [data.length])
    using onDevice = wide.cast(dtype)
    expect(Array.from(await host.read())).toEqual(expected)
    expect(Array.from(await onDevice.read())).toEqual(expected)
    using nan = b.device.tensor(Float32Array.of(NaN, -NaN), [2], dtype)
    for (const bits of await nan.read()) expect(numberOf(bits, dtype)).toBeNaN()
  })

  test('float64 is rounded once', async () => {
    // Just above a tie of the 16-bit type, by less than float32 can tell.
    for (const [dtype, digits, up] of [
      ['f16', 11, 0x3c01],
      ['bf16', 8, 0x3f81],
    ] as const) {
      const tie = 1 + 2 ** -digits
      const data = [tie + 2 ** -40, tie, tie - 2 ** -40, -tie - 2 ** -40, 1e300, 1e-300, NaN]
      using x = b.device.tensor(data, [7], dtype)
      using y = b.device.tensor(Float64Array.from(data), [7], dtype)
      const bits = Array.from(await x.read())
      expect(Array.from(await y.read())).toEqual(bits)
      expect(bits.slice(0, 4)).toEqual([up, up - 1, up - 1, up | 0x8000])
      expect(bits.slice(4, 6)).toEqual([dtype === 'f16' ? 0x7c00 : 0x7f80, 0])
    }
  })

  test('integers outside the range of the type are refused', () => {
    for (const [data, dtype] of [
      [[256], 'u8'],
      [[-1], 'u8'],
      [[0.5], 'i32'],
      [[NaN], 'i32'],
      [[2 ** 31], 'i32'],
      [Float32Array.of(1.5), 'u8'],
      [Int32Array.of(300), 'u8'],
    ] as [HostArray, DType][])
      expectRefusal(
        () => b.device.tensor(data, [1], dtype),
        'ERR_VALUE',
        'tensor',
        /not a value of/,
      )
  })

  test('data of the wrong kind or size is refused', () => {
    const make = (data: unknown, shape: unknown, dtype?: unknown) => () =>
      b.device.tensor(data as never, shape as never, dtype as never)
    for (const data of [null, undefined, 1, 'abc', {}, new DataView(new ArrayBuffer(4))])
      expectRefusal(make(data, [1]), 'ERR_VALUE', 'tensor', /data must be/)
    expectRefusal(make(BigInt64Array.of(1n), [1]), 'ERR_VALUE', 'tensor')
    expectRefusal(make([1, '2'], [2]), 'ERR_VALUE', 'tensor', /data\[1\] must be a number/)
    expectRefusal(make([1, 2, 3], [2]), 'ERR_SHAPE', 'tensor', /2 elements, got 3/)
    expectRefusal(make(new Float32Array(3), [4]), 'ERR_SHAPE', 'tensor')
    expectRefusal(make([1], [1], 'f64'), 'ERR_DTYPE', 'tensor', /dtype/)
    expectRefusal(make([1], [1], 'toString'), 'ERR_DTYPE', 'tensor', /dtype/)
    for (const shape of [[-1], [1.5], ['1'], [NaN], [undefined], new Array(9).fill(1)])
      expectRefusal(make([1], shape), 'ERR_SHAPE', 'tensor')
    for (const shape of [1, null, undefined, '1', { length: 1 }])
      expectRefusal(make([1], shape), 'ERR_VALUE', 'tensor')
    expectRefusal(() => b.device.zeros([-1]), 'ERR_SHAPE', 'zeros')
    expectRefusal(() => b.device.zeros([1], 'f8' as never), 'ERR_DTYPE', 'zeros')
    using x = b.device.zeros([2, 2])
    expectRefusal(() => x.write([1, 2, 3]), 'ERR_SHAPE', 'write')
    expectRefusal(() => x.write('abcd' as never), 'ERR_VALUE', 'write')
    expectRefusal(() => x.cast('f64' as never), 'ERR_DTYPE', 'cast')
    expectRefusal(() => x.cast('toString' as never), 'ERR_DTYPE', 'cast')
  })

  test('views share their storage', async () => {
    using x = b.device.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [4, 3])
    using flat = x.reshape([12])
    using rows = x.slice(1, 3)
    using last = flat.slice(10)
    expect([rows.shape, last.shape]).toEqual([[2, 3], [2]])
    rows.write([30, 31, 32, 40, 41, 42])
    last.write([-1, -2])
    expect(Array.from(await x.read())).toEqual([0, 1, 2, 30, 31, 32, 40, 41, 42, 9, -1, -2])
    using inner = rows.slice(1).reshape([3, 1]).slice(1, 2)
    expect(inner.shape).toEqual([1, 1])
    expect(Array.from(await inner.read())).toEqual([41])
    x.dispose()
    expect(Array.from(await last.read())).toEqual([-1, -2])
    expect(Object.isFrozen(x.shape)).toBe(true)
  })

  test('slices and shapes out of range are refused', () => {
    using x = b.device.zeros([4, 3])
    expect(x.slice(4).shape).toEqual([0, 3])
    expect(x.slice(2, 2).shape).toEqual([0, 3])
    for (const [start, end] of [
      [-1, 2],
      [3, 2],
      [0, 5],
      [0.5, 2],
      [NaN, 2],
      ['0', 2],
      [{}, 2],
    ] as [number, number][])
      expectRefusal(() => x.slice(start, end), 'ERR_VALUE', 'slice')
    expectRefusal(() => x.reshape([5]), 'ERR_SHAPE', 'reshape', /12 elements/)
    expectRefusal(() => x.reshape([-1, 3]), 'ERR_SHAPE', 'reshape')
    expectRefusal(() => b.device.zeros([]).slice(0), 'ERR_SHAPE', 'slice')
  })

  test('a tensor without axes has one element', async () => {
    using x = b.device.tensor([7], [])
    expect(x).toMatchObject({ shape: [], size: 1, byteLength: 4 })
    expect(Array.from(await x.reshape([1, 1]).read())).toEqual([7])
    using y = x.cast('i32')
    expect(Array.from(await y.read())).toEqual([7])
  })

  test('item is the value of a tensor of one element', async () => {
    const of = (dtype: (typeof all)[number], value: number) =>
      b.device.tensor([value], [], dtype).item()
    expect(await of('f32', 0.1)).toBe(Math.fround(0.1))
    expect(await of('f16', 65504)).toBe(65504)
    expect(await of('bf16', -2.5)).toBe(-2.5)
    // Beyond what f32 holds.
    expect(await of('i32', 2 ** 31 - 1)).toBe(2 ** 31 - 1)
    expect(await of('u8', 255)).toBe(255)
    expect(await b.device.tensor([4], [1, 1, 1]).item()).toBe(4)
    const refusal = { code: 'ERR_SHAPE', op: 'item' }
    await expect(b.device.zeros([2]).item()).rejects.toMatchObject(refusal)
    await expect(b.device.zeros([0]).item()).rejects.toMatchObject(refusal)
    const gone = b.device.zeros([1])
    gone.dispose()
    await expect(gone.item()).rejects.toMatchObject({ code: 'ERR_DISPOSED' })
  })

  test('sizes of 0 are legal everywhere', async () => {
    const other = openDevice('cpu')
    for (const dtype of all) {
      using x = b.device.zeros([3, 0, 2], dtype)
      expect(x).toMatchObject({ size: 0, byteLength: 0 })
      expect(x.slice(1, 2).shape).toEqual([1, 0, 2])
      x.write([])
      x.copyFrom(b.device.tensor([], [3, 0, 2], dtype))
      for (const y of [x, x.reshape([0]), x.cast('f16'), x.to(b.device), x.to(other)])
        expect((await y.toFloat32()).length).toBe(0)
    }
    other.dispose()
  })

  test('write, copyFrom and reads keep the order of the queue', async () => {
    const n = 1 << 16
    using x = b.device.zeros([n])
    using y = b.device.zeros([n])
    const reads: Promise<Float32Array>[] = []
    const source = new Float32Array(n)
    for (let i = 0; i < 20; i++) {
      source.fill(i)
      x.write(source)
      reads.push(x.read())
      y.copyFrom(x)
      source.fill(-1)
      x.write(source)
      reads.push(y.read())
    }
    const got = await Promise.all(reads)
    got.forEach((data, i) => {
      const wrong = data.findIndex((v) => v !== i >> 1)
      expect(wrong, `read ${i}`).toBe(-1)
    })
  })

  test('copyFrom takes the same shape, type and device, and may overlap', async () => {
    using x = b.device.tensor([0, 1, 2, 3, 4, 5, 6, 7], [8])
    expectRefusal(() => x.copyFrom(b.device.zeros([2, 4])), 'ERR_SHAPE', 'copyFrom')
    expectRefusal(() => x.copyFrom(b.device.zeros([8], 'i32') as never), 'ERR_DTYPE', 'copyFrom')
    expectRefusal(() => x.copyFrom([1] as never), 'ERR_VALUE', 'copyFrom', /must be a Tensor/)
    x.slice(1, 8).copyFrom(x.slice(0, 7))
    expect(Array.from(await x.read())).toEqual([0, 0, 1, 2, 3, 4, 5, 6])
    x.slice(0, 7).copyFrom(x.slice(1, 8))
    expect(Array.from(await x.read())).toEqual([0, 1, 2, 3, 4, 5, 6, 6])
    x.copyFrom(x)
    x.slice(4).copyFrom(x.slice(0, 4))
    expect(Array.from(await x.read())).toEqual([0, 1, 2, 3, 0, 1, 2, 3])
  })

  test('to copies between devices, ordered on both queues', async () => {
    using other = openDevice('cpu', { threads: 1 })
    const n = 1 << 18
    using x = b.device.zeros([n], 'i32')
    const there: Tensor<'i32'>[] = []
    for (let i = 0; i < 8; i++) {
      x.write(new Int32Array(n).fill(i))
      there.push(x.to(other))
    }
    x.write(new Int32Array(n).fill(-1))
    for (let i = 0; i < 8; i++) {
      const back = there[i]!.to(b.device)
      there[i]!.write(new Int32Array(n))
      expect(there[i]!.device).toBe(other)
      expect((await back.read()).every((v) => v === i)).toBe(true)
    }
    using copy = x.to(b.device)
    x.write(new Int32Array(n))
    expect((await copy.read())[0]).toBe(-1)
    for (const device of [undefined, null, {}, 'cpu', x])
      expectRefusal(() => x.to(device as never), 'ERR_VALUE', 'to', /Device/)
    const gone = openDevice('cpu')
    gone.dispose()
    expectRefusal(() => x.to(gone), 'ERR_DISPOSED', 'to')
  })

  test('cast truncates and saturates to integers, NaN becomes 0', async () => {
    const data = [0.9, -0.9, 254.99, 255.5, 300, -1, 3e9, -3e9, Infinity, -Infinity, NaN, 1.5]
    using x = b.device.tensor(data, [12])
    const top = 2147483647
    expect(Array.from(await x.cast('u8').read())).toEqual([
      0, 0, 254, 255, 255, 0, 255, 0, 255, 0, 0, 1,
    ])
    expect(Array.from(await x.cast('i32').read())).toEqual([
      0,
      0,
      254,
      255,
      300,
      -1,
      top,
      -top - 1,
      top,
      -top - 1,
      0,
      1,
    ])
    using i = b.device.tensor(Int32Array.of(-5, 0, 255, 256, top, -top - 1, 16777217), [7])
    expect(Array.from(await i.cast('u8').read())).toEqual([0, 0, 255, 255, 255, 0, 255])
    expect(Array.from(await i.cast('f32').read())).toEqual([
      -5, 0, 255, 256, 2147483648, -2147483648, 16777216,
    ])
    expect(Array.from(await i.cast('i32').read())).toEqual(Array.from(await i.read()))
    using u = b.device.tensor(Uint8Array.of(0, 1, 255), [3])
    for (const dtype of floats)
      expect(Array.from(await u.cast(dtype).toFloat32())).toEqual([0, 1, 255])
    expect(Array.from(await u.cast('i32').read())).toEqual([0, 1, 255])
  })

  test('cast between all types, at every length of a tail', async () => {
    const random = new Random(5)
    for (const n of [1, 7, 8, 15, 16, 17, 31, 33, 4095, 4096, 4097, 10_000]) {
      const data = Float32Array.from({ length: n }, () => random.int(0, 255))
      using x = b.device.tensor(data, [n])
      for (const from of all)
        for (const to of all) {
          using y = x.cast(from)
          const cast = () => y.cast(to)
          using z = n === 33 ? recorded(b, `cast ${from} ${to}`, {}, cast) : cast()
          expect(z.dtype).toBe(to)
          expect(await z.toFloat32()).toEqual(data)
          // A view that begins between multiples of 16 bytes.
          if (n !== 33) continue
          using inner = recorded(b, `cast of a view ${from} ${to}`, {}, () => y.slice(1).cast(to))
          expect(await inner.toFloat32()).toEqual(data.subarray(1))
        }
    }
    const normal = random.normals(1000)
    using x = b.device.tensor(normal, [1000])
    for (const dtype of ['f16', 'bf16'] as const)
      expect(await x.cast(dtype).toFloat32()).toEqual(rounded(normal, dtype))
  })

  test('a disposed tensor refuses, keeps its shape and type, and may be disposed again', async () => {
    const x = b.device.tensor([1, 2, 3, 4], [2, 2], 'f16')
    const y = b.device.zeros([2, 2], 'f16')
    const pending = x.toFloat32()
    x.dispose()
    x.dispose()
    x[Symbol.dispose]()
    expect(Array.from(await pending)).toEqual([1, 2, 3, 4])
    expect(x).toMatchObject({ shape: [2, 2], dtype: 'f16', size: 4, byteLength: 8 })
    expectRefusal(() => x.reshape([4]), 'ERR_DISPOSED', 'reshape')
    expectRefusal(() => x.slice(0), 'ERR_DISPOSED', 'slice')
    expectRefusal(() => x.cast('f32'), 'ERR_DISPOSED', 'cast')
    expectRefusal(() => x.write([1, 2, 3, 4]), 'ERR_DISPOSED', 'write')
    expectRefusal(() => x.copyFrom(y), 'ERR_DISPOSED', 'copyFrom')
    expectRefusal(() => y.copyFrom(x), 'ERR_DISPOSED', 'copyFrom')
    expectRefusal(() => x.to(b.device), 'ERR_DISPOSED', 'to')
    await expect(x.read()).rejects.toMatchObject({ code: 'ERR_DISPOSED', op: 'read' })
    await expect(x.toFloat32()).rejects.toMatchObject({ code: 'ERR_DISPOSED' })
  })
})
