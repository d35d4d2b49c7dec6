import { add, mul, sum, type Tensor } from 'p2r-kernels'
import { expect, test } from 'vitest'
import {
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

type Shape = readonly number[]
const sizeOf = (shape: Shape): number => shape.reduce((n, d) => n * d, 1)

/** f over the broadcast of two arrays, as NumPy defines it, index by index. */
function broadcast(
  x: ArrayLike<number>,
  xs: Shape,
  y: ArrayLike<number>,
  ys: Shape,
  f: (a: number, b: number) => number,
): { shape: number[]; values: Float64Array } {
  const rank = Math.max(xs.length, ys.length)
  const padded = (s: Shape) => [...Array<number>(rank - s.length).fill(1), ...s]
  const [a, b] = [padded(xs), padded(ys)]
  const shape = a.map((n, i) => (n === 1 ? b[i]! : n))
  const at = (sizes: number[], place: number[]) =>
    sizes.reduce((sum, n, i) => sum * n + (n === 1 ? 0 : place[i]!), 0)
  const values = new Float64Array(sizeOf(shape))
  const place = shape.map(() => 0)
  for (let k = 0; k < values.length; k++) {
    values[k] = f(x[at(a, place)]!, y[at(b, place)]!)
    for (let i = rank - 1; i >= 0; i--) {
      place[i]!++
      if (place[i]! < shape[i]!) break
      place[i] = 0
    }
  }
  return { shape, values }
}

// The same shape, missing axes, scalars, axes of 1 on either side and on both, runs longer than a
// vector and shorter, more than a task.
const shapes: [Shape, Shape][] = [
  [
    [7, 43, 77],
    [7, 43, 77],
  ],
  [
    [7, 43, 77],
    [43, 77],
  ],
  [[7, 43, 77], [77]],
  [[7, 43, 77], []],
  [[], [5, 3]],
  [
    [43, 1],
    [43, 77],
  ],
  [
    [1, 77],
    [43, 1],
  ],
  [[77], [2, 43, 1]],
  [
    [2, 1, 3, 1, 5],
    [4, 1, 6, 1],
  ],
  [
    [3, 1, 2, 2],
    [3, 4, 1, 2],
  ],
  [
    [1, 1, 9],
    [4, 1, 1],
  ],
  [[2, 3, 4, 5, 6], [6]],
  [
    [40, 1024],
    [40, 1],
  ],
]

onEveryBackend('elementwise', (b) => {
  const operations = [
    ['add', add, (x: number, y: number) => x + y],
    ['mul', mul, (x: number, y: number) => x * y],
  ] as const
  for (const [name, operation, definition] of operations)
    for (const dtype of floats)
      test(`${name} ${dtype}`, async () => {
        const random = new Random(3)
        // One operation, rounded to f32 and then to the type, where f16 has subnormals.
        const bound = { relative: 2 ** -24 + roundoff[dtype], absolute: 2 ** -25 }
        for (const [xs, ys] of shapes) {
          const x = rounded(random.normals(sizeOf(xs)), dtype)
          const y = rounded(random.normals(sizeOf(ys)), dtype)
          const a = { x: b.device.tensor(x, xs, dtype), y: b.device.tensor(y, ys, dtype) }
          const title = `${name} ${dtype} ${xs.join('x')} ${ys.join('x')}`
          using out = recorded(b, title, bound, () => operation(a))
          const expected = broadcast(x, xs, y, ys, definition)
          expect([out.shape, out.dtype]).toEqual([expected.shape, dtype])
          expectClose(await out.toFloat32(), expected.values, bound)
          using turned = operation({ x: a.y, y: a.x })
          expect(await turned.read()).toEqual(await out.read())
        }
      })

  test('gradients of repeated operands are sums over their axes', async () => {
    const [xs, ys] = [
      [4, 1, 3],
      [5, 1],
    ] as const
    const random = new Random(4)
    const [x, y, d] = [random.normals(12), random.normals(5), random.normals(60)]
    const [tx, ty] = [b.device.tensor(x, xs), b.device.tensor(y, ys)]
    const dOut = b.device.tensor(d, [4, 5, 3])
    const at =
      (f: (a: number, b: number) => number) => (x: ArrayLike<number>, y: ArrayLike<number>) =>
        broadcast(x, xs, y, ys, f).values.reduce((s, v, i) => s + v * d[i]!, 0)
    const overX = { axes: [1], keepDims: true }
    const overY = { axes: [0, 2] }
    // Central differences of a bilinear function have the rounding of f32 sums alone.
    const bound = { absolute: 4e-6, relative: 1e-6 }
    const added = at((a, b) => a + b)
    expectGradient((v) => added(v, y), x, await sum({ x: dOut, ...overX }).read(), bound)
    expectGradient((v) => added(x, v), y, await sum({ x: dOut, ...overY }).read(), bound)
    const product = at((a, b) => a * b)
    const dX = sum({ x: mul({ x: dOut, y: ty }), ...overX })
    const dY = sum({ x: mul({ x: dOut, y: tx }), ...overY })
    expectGradient((v) => product(v, y), x, await dX.read(), bound)
    expectGradient((v) => product(x, v), y, await dY.read(), bound)
  })

  test('infinities and NaN, empty tensors, views', async () => {
    const x = b.device.tensor([Infinity, NaN, -Infinity, 0], [4])
    const y = b.device.tensor([-Infinity, 1, 2, Infinity], [4])
    expect([...(await add({ x, y }).read())]).toEqual([NaN, NaN, -Infinity, Infinity])
    expect([...(await mul({ x, y }).read())]).toEqual([-Infinity, NaN, -Infinity, NaN])
    const none = b.device.zeros([0, 4])
    expect(add({ x: none, y: b.device.zeros([4]) }).shape).toEqual([0, 4])
    expect(mul({ x: none, y: b.device.zeros([1, 1]) }).shape).toEqual([0, 4])
    expect(add({ x: b.device.zeros([3, 0]), y: b.device.zeros([0]) }).shape).toEqual([3, 0])
    expect(add({ x: b.device.zeros([1]), y: b.device.zeros([2, 0]) }).shape).toEqual([2, 0])
    const whole = b.device.tensor([1, 2, 3, 4, 5], [5], 'bf16')
    const shifted = add({ x: whole.slice(1, 4), y: whole.slice(2, 5) })
    expect([...(await shifted.toFloat32())]).toEqual([5, 7, 9])
  })

  test('refuse mismatched arguments', () => {
    const x = b.device.zeros([4, 3])
    for (const [name, operation] of operations) {
      expectRefusal(() => operation({ x, y: b.device.zeros([4]) }), 'ERR_SHAPE', name, /got \[4\]/)
      expectRefusal(() => operation({ x, y: b.device.zeros([2, 4, 1, 2]) }), 'ERR_SHAPE', name)
      const half = b.device.zeros([3], 'f16') as Tensor
      expectRefusal(() => operation({ x, y: half }), 'ERR_DTYPE', name)
      expectRefusal(() => operation({ x, y: 1 as never }), 'ERR_VALUE', name, /y must be a Tensor/)
      const bytes = b.device.zeros([3], 'u8') as never
      expectRefusal(() => operation({ x: bytes, y: bytes }), 'ERR_DTYPE', name)
    }
  })
})
