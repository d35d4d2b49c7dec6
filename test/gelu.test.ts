import { gelu, geluBackward, type Tensor } from 'p2r-kernels'
import { expect, test } from 'vitest'
import {
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

// Φ to float64: the Taylor series of erf near 0, the continued fraction of erfc beyond (Abramowitz
// and Stegun 7.1.6 and 7.1.14), where the series would cancel.
function cdf(x: number): number {
  const z = Math.abs(x) / Math.SQRT2
  let tail: number
  if (z < 2) {
    let term = z
    let sum = z
    for (let n = 1; n < 80; n++) {
      term *= (-z * z) / n
      sum += term / (2 * n + 1)
    }
    tail = 0.5 - sum / Math.sqrt(Math.PI)
  } else {
    let fraction = z
    for (let k = 120; k > 0; k--) fraction = z + k / 2 / fraction
    tail = Math.exp(-z * z) / Math.sqrt(Math.PI) / fraction / 2
  }
  return x > 0 ? 1 - tail : tail
}
const forms = {
  none: (x: number) => x * cdf(x),
  tanh: (x: number) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
}

onEveryBackend('gelu', (b) => {
  for (const approximate of ['none', 'tanh'] as const)
    for (const dtype of floats) {
      // The result is of x's size: a few f32 roundings inside (erf and tanh are good to some
      // 2e-7), and one to the type.
      const bound = { absolute: 2e-6, relative: 4e-6 + roundoff[dtype] }
      const data = rounded(new Random(1).normals(5003, 2), dtype)
      data.set([0, -0, 10, -10, 30, -30, 1e-20, -1e-8], 0)
      data.set([1e4, -1e4, 3e4, -3e4], 5000 - 4)

      test(`${approximate} ${dtype}`, async () => {
        using x = b.device.tensor(data, [5003], dtype)
        using y = recorded(b, `gelu ${approximate} ${dtype}`, bound, () => gelu({ x, approximate }))
        expectClose(await y.toFloat32(), data.map(forms[approximate]), bound)
      })

      test(`${approximate} ${dtype} backward`, async () => {
        const d = rounded(new Random(2).normals(5003), dtype)
        using x = b.device.tensor(data, [5003], dtype)
        using dOut = b.device.tensor(d, [5003], dtype)
        using dX = recorded(b, `gelu backward ${approximate} ${dtype}`, bound, () =>
          geluBackward({ dOut, x, approximate }),
        )
        const gradient = await dX.toFloat32()
        const at = data.subarray(8, 200)
        expectGradient(
          (v) => v.reduce((s, xi, i) => s + forms[approximate](xi) * d[8 + i]!, 0),
          at,
          gradient.subarray(8, 200),
          { absolute: 1e-5, relative: 1e-5 + 2 * roundoff[dtype], entries: 192 },
        )
      })
    }

  test.each(floats)('%s of views that begin anywhere: the bits of other tensors', async (dtype) => {
    const [x, dOut] = [3, 4].map((seed) =>
      b.device.tensor(rounded(new Random(seed).normals(38), dtype), [38], dtype),
    ) as [Tensor<Float>, Tensor<Float>]
    const copy = (view: Tensor<Float>) => {
      const whole = b.device.zeros([37], dtype)
      whole.copyFrom(view)
      return whole
    }
    const [viewX, viewDOut] = [x.slice(1), dOut.slice(1)]
    const bound = { absolute: 2e-6, relative: 4e-6 + roundoff[dtype] }
    for (const approximate of ['none', 'tanh'] as const) {
      const [forward, backward] = recorded(
        b,
        `gelu of views ${approximate} ${dtype}`,
        bound,
        () => [
          gelu({ x: viewX, approximate }),
          geluBackward({ dOut: viewDOut, x: viewX, approximate }),
        ],
      )
      expect(await forward!.read()).toEqual(await gelu({ x: copy(viewX), approximate }).read())
      expect(await backward!.read()).toEqual(
        await geluBackward({ dOut: copy(viewDOut), x: copy(viewX), approximate }).read(),
      )
    }
  })

  test('propagates NaN and accepts empty inputs', async () => {
    using x = b.device.tensor([NaN, Infinity, -Infinity], [3])
    for (const approximate of ['none', 'tanh'] as const) {
      expect(Array.from(await gelu({ x, approximate }).read())).toEqual([NaN, Infinity, -0])
      const dOut = b.device.tensor([1, 1, 1], [3])
      expect(Array.from(await geluBackward({ dOut, x, approximate }).read(), Math.abs)).toEqual([
        NaN,
        1,
        0,
      ])
    }
    expect(gelu({ x: b.device.zeros([0, 4]) }).shape).toEqual([0, 4])
  })

  test('refuses other than float tensors of one shape', () => {
    using x = b.device.zeros([4])
    expectRefusal(
      () => gelu({ x: b.device.zeros([2], 'u8') as Tensor }),
      'ERR_DTYPE',
      'gelu',
      /got u8/,
    )
    expectRefusal(() => gelu({ x: [1] as never }), 'ERR_VALUE', 'gelu', /must be a Tensor/)
    expectRefusal(() => gelu({ x, approximate: 'fast' as never }), 'ERR_VALUE', 'gelu')
    expectRefusal(
      () => geluBackward({ dOut: b.device.zeros([5]), x }),
      'ERR_SHAPE',
      'geluBackward',
      /\[4\], got \[5\]/,
    )
  })
})
