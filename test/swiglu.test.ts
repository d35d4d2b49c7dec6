import { swiglu, swigluBackward, type Tensor } from 'p2r-kernels'
import { expect, test } from 'vitest'
import { golden } from './golden.js'
import {
  expectClose,
  expectGradient,
  expectRefusal,
  type Float,
  floats,
  onEveryBackend,
  Random,
  recorded,
  relativeL2,
  rounded,
  roundoff,
} from './harness.js'

const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x))
// At -infinity the limits.
const silu = (x: number): number => (x === Number.NEGATIVE_INFINITY ? 0 : x * sigmoid(x))
function derivative(x: number): number {
  if (Math.abs(x) === Number.POSITIVE_INFINITY) return x > 0 ? 1 : 0
  return sigmoid(x) * (1 + x * sigmoid(-x))
}

/** [..., F] and [..., F] as [..., 2 F]. */
function packed(gate: Float32Array, up: Float32Array, width: number): Float32Array {
  const out = new Float32Array(2 * gate.length)
  for (let at = 0; at < gate.length; at += width) {
    out.set(gate.subarray(at, at + width), 2 * at)
    out.set(up.subarray(at, at + width), 2 * at + width)
  }
  return out
}

// Widths with and without whole vectors of 16 bytes, and more than one task.
const sizes = [
  [1, 1],
  [3, 7],
  [5, 96],
  [40, 1000],
  [0, 8],
  [4, 0],
] as const

onEveryBackend('swiglu', (b) => {
  // A sum, a quotient and two products of f32, and an exponential that is good to 2 ulps but for the
  // rounding of its argument, of up to 20 here; then one rounding to the type.
  const bounds = (dtype: Float) => ({ absolute: 1e-6, relative: 2e-6 + roundoff[dtype] })
  for (const dtype of floats)
    for (const [rows, width] of sizes) {
      const n = rows * width
      const random = new Random(n)
      const gate = rounded(random.normals(n, 4), dtype)
      const up = rounded(random.normals(n), dtype)
      const d = rounded(random.normals(n), dtype)
      const bound = bounds(dtype)
      const of = (x: Float32Array) => b.device.tensor(x, [rows, width], dtype)

      test(`${dtype} [${rows}, ${width}]`, async () => {
        const expected = Float64Array.from(gate, (x, i) => silu(x) * up[i]!)
        const out = recorded(b, `swiglu ${dtype} ${rows} ${width}`, bound, () =>
          swiglu({ gate: of(gate), up: of(up) }),
        )
        expect([out.shape, out.dtype]).toEqual([[rows, width], dtype])
        expectClose(await out.toFloat32(), expected, bound)
        const gateUp = b.device.tensor(packed(gate, up, width), [rows, 2 * width], dtype)
        const same = recorded(b, `swiglu packed ${dtype} ${rows} ${width}`, bound, () =>
          swiglu({ gateUp }),
        )
        expect(same.shape).toEqual([rows, width])
        expect(await same.read()).toEqual(await out.read())
      })

      test(`${dtype} [${rows}, ${width}] backward`, async () => {
        const dOut = of(d)
        using r = recorded(b, `swiglu backward ${dtype} ${rows} ${width}`, bound, () =>
          swigluBackward({ dOut, gate: of(gate), up: of(up) }),
        )
        const dGate = Float64Array.from(gate, (x, i) => d[i]! * up[i]! * derivative(x))
        const dUp = Float64Array.from(gate, (x, i) => d[i]! * silu(x))
        // Near -1.278 the derivative is a difference that cancels.
        expectClose(await r.dGate.toFloat32(), dGate, { ...bound, absolute: 4e-6 })
        expectClose(await r.dUp.toFloat32(), dUp, bound)
        const gateUp = b.device.tensor(packed(gate, up, width), [rows, 2 * width], dtype)
        using both = recorded(b, `swiglu backward packed ${dtype} ${rows} ${width}`, bound, () =>
          swigluBackward({ dOut, gateUp }),
        )
        const halves = packed(await r.dGate.toFloat32(), await r.dUp.toFloat32(), width)
        expect(await both.dGateUp.toFloat32()).toEqual(halves)
      })
    }

  test('the gradient matches finite differences', async () => {
    const random = new Random(2)
    const [gate, up, d] = [random.normals(12, 2), random.normals(12), random.normals(12)]
    const at = (gate: ArrayLike<number>, up: ArrayLike<number>) =>
      d.reduce((sum, v, i) => sum + v * silu(gate[i]!) * up[i]!, 0)
    const of = (x: Float32Array): Tensor<'f32'> => b.device.tensor(x, [3, 4])
    const r = swigluBackward({ dOut: of(d), gate: of(gate), up: of(up) })
    // Central differences of step 1e-4 are good to some 1e-8; the gradient is f32.
    const bound = { absolute: 2e-6, relative: 2e-6 }
    expectGradient((v) => at(v, up), gate, await r.dGate.read(), bound)
    expectGradient((v) => at(gate, v), up, await r.dUp.read(), bound)
  })

  const files = golden('lm_ops')
  test.each(['s1', 's2_extremes'])('reference data: %s', async (name) => {
    const folder = `lm_ops/swiglu/${name}/`
    const meta = files.json(`${folder}meta.json`)
    const shape: number[] = meta.tensors.gate.shape
    const f = (name: string) => files.f32(`${folder}${name}.bin`)
    const extremes = name.endsWith('extremes')
    for (const dtype of extremes ? (['f32', 'bf16'] as const) : (['f32'] as const)) {
      const of = (name: string) => b.device.tensor(f(name), shape, dtype)
      const a = { gate: of('gate'), up: of('up') }
      const r = swigluBackward({ ...a, dOut: of('dout') })
      const results = { out: swiglu(a), dgate: r.dGate, dup: r.dUp }
      for (const [name, tensor] of Object.entries(results)) {
        const got = await tensor.toFloat32()
        // The gates of the reference data: entry by entry for the extremes.
        if (extremes)
          expectClose(got, f(name), {
            absolute: 1e-6,
            relative: 1e-5 + (dtype === 'f32' ? 0 : roundoff.bf16),
          })
        else expect(relativeL2(got, f(name)), name).toBeLessThan(name === 'out' ? 2e-6 : 5e-6)
      }
    }
  })

  test('infinities have their limits, NaN stays', async () => {
    const gate = b.device.tensor([-Infinity, Infinity, NaN, -1e30, 1e30], [5])
    const up = b.device.tensor([2, 2, 2, 2, 2], [5])
    const dOut = b.device.tensor([1, 1, 1, 1, 1], [5])
    const out = await swiglu({ gate, up }).read()
    expect([...out]).toEqual([-0, Infinity, NaN, -0, Math.fround(2 * Math.fround(1e30))])
    const r = swigluBackward({ dOut, gate, up })
    expectClose(await r.dGate.read(), [0, 2, NaN, 0, 2], { absolute: 1e-30 })
    expectClose(await r.dUp.read(), [0, Infinity, NaN, 0, 1e30], { relative: 1e-6 })
  })

  test('takes views that begin between multiples of 16 bytes', async () => {
    for (const dtype of floats) {
      const data = rounded(new Random(9).normals(3 * 8, 2), dtype)
      const whole = b.device.tensor(data, [24], dtype)
      const [gate, up] = [whole.slice(1, 9), whole.slice(10, 18)]
      const out = recorded(b, `swiglu views ${dtype}`, bounds(dtype), () => swiglu({ gate, up }))
      const expected = Array.from(data.slice(1, 9), (x, i) => silu(x) * data[10 + i]!)
      expectClose(await out.toFloat32(), expected, bounds(dtype))
    }
  })

  test('refuses mismatched arguments', () => {
    const [gate, other] = [b.device.zeros([2, 3]), b.device.zeros([2, 4])]
    const call = (a: object) => () => swiglu(a as never)
    expectRefusal(call({ gate }), 'ERR_VALUE', 'swiglu', /up must be a Tensor/)
    expectRefusal(call({ gate, up: other }), 'ERR_SHAPE', 'swiglu', /\[2, 3\], got \[2, 4\]/)
    expectRefusal(call({ gate, up: b.device.zeros([2, 3], 'f16') }), 'ERR_DTYPE', 'swiglu')
    expectRefusal(call({ gateUp: gate }), 'ERR_SHAPE', 'swiglu', /even/)
    expectRefusal(call({ gateUp: b.device.zeros([]) }), 'ERR_SHAPE', 'swiglu', /even/)
    expectRefusal(call({ gateUp: other, up: gate }), 'ERR_VALUE', 'swiglu', /excludes/)
    expectRefusal(
      () => swigluBackward({ dOut: gate, gateUp: other }),
      'ERR_SHAPE',
      'swigluBackward',
      /\[2, 2\], got \[2, 3\]/,
    )
  })
})
