import {
  applyRotary,
  attention,
  attentionBackward,
  type Grid,
  mropeTables,
  visionRotary,
} from 'p2r-kernels'
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
  relativeL2,
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

type Sections = readonly [number, number, number]

/** Tables of positions [3, T], or [T] without sections. */
function mrope(positions: ArrayLike<number>, d: number, theta: number, sections?: Sections) {
  const tokens = positions.length / (sections ? 3 : 1)
  const angles = new Float32Array(tokens * d)
  for (let t = 0; t < tokens; t++)
    for (let i = 0; i < d; i++) {
      const k = i % (d / 2)
      let axis = 0
      if (sections && k % 3 === 1 && k < 3 * sections[1]) axis = 1
      if (sections && k % 3 === 2 && k < 3 * sections[2]) axis = 2
      const frequency = Math.fround(1 / Math.fround(theta ** Math.fround((2 * k) / d)))
      angles[t * d + i] = Math.fround(positions[axis * tokens + t]!) * frequency
    }
  return { angles, cos: Array.from(angles, Math.cos), sin: Array.from(angles, Math.sin) }
}

onEveryBackend('rotary', (b) => {
  const mropes: { headDim: number; theta: number; sections?: Sections }[] = [
    { headDim: 8, theta: 1e4 },
    { headDim: 128, theta: 5e6 },
    { headDim: 128, theta: 5e6, sections: [24, 20, 20] },
    { headDim: 64, theta: 1e7, sections: [11, 11, 10] },
    // More frequencies than every third for the height: the rest turns with time, as in the models' code.
    { headDim: 16, theta: 100, sections: [0, 8, 0] },
  ]
  // Angles from 0 to the longest context of the models, whose sine needs an exact reduction.
  const positionsOf = (tokens: number, axes: number) => {
    const random = new Random(tokens)
    return Int32Array.from({ length: tokens * axes }, (_, i) =>
      i % 5 === 0 ? 262143 - (i % 7) : random.int(0, 10 ** (i % 6)),
    )
  }
  for (const shape of mropes)
    test(`multimodal tables of ${JSON.stringify(shape)}`, async () => {
      const positions = positionsOf(21, shape.sections ? 3 : 1)
      // Cosines of the same f32 angles, to an ulp or two.
      const bound = { absolute: 4 * roundoff.f32 }
      using t = recorded(b, `multimodal tables ${JSON.stringify(shape)}`, bound, () =>
        mropeTables({ ...shape, positions, device: b.device }),
      )
      const expected = mrope(positions, shape.headDim, shape.theta, shape.sections)
      expect([t.cos.shape, t.sin.shape]).toEqual([
        [21, shape.headDim],
        [21, shape.headDim],
      ])
      const [cos, sin] = [await t.cos.read(), await t.sin.read()]
      expectClose(cos, expected.cos, bound)
      expectClose(sin, expected.sin, bound)
      // One token's rows, as a step of decoding makes them, are those of the whole.
      for (const at of [0, 7, 20]) {
        const one = positions.filter((_, i) => i % 21 === at)
        using row = mropeTables({ ...shape, positions: one, device: b.device })
        const of = (table: Float32Array) =>
          table.slice(at * shape.headDim, (at + 1) * shape.headDim)
        expect(await row.cos.read()).toEqual(of(cos))
        expect(await row.sin.read()).toEqual(of(sin))
      }
      // Text, whose three positions are equal, has the tables of one position.
      if (shape.sections) {
        const text = positions.slice(0, 21)
        const three = mropeTables({
          ...shape,
          positions: Int32Array.from([...text, ...text, ...text]),
          device: b.device,
        })
        const { headDim, theta } = shape
        const plain = mropeTables({ headDim, theta, positions: text, device: b.device })
        expect(await three.cos.read()).toEqual(await plain.cos.read())
        expect(await three.sin.read()).toEqual(await plain.sin.read())
      }
    })

  const files = golden('lm_ops')
  test.each(['p1_d32', 'p2_d128', 'p3_d64_long'])('reference data: %s', async (name) => {
    const folder = `lm_ops/mrope/${name}/`
    const meta = files.json(`${folder}meta.json`)
    const f = (name: string) => files.f32(`${folder}${name}.bin`)
    const positions = files.i32(`${folder}position_ids.bin`)
    const { head_dim: headDim, theta, mrope_section: sections } = meta
    using t = mropeTables({ positions, headDim, theta, sections, device: b.device })
    const { angles } = mrope(positions, headDim, theta, sections)
    // The gate of the reference data: f32 angles are off by as much as that.
    for (const [got, name] of [
      [await t.cos.read(), 'cos'],
      [await t.sin.read(), 'sin'],
    ] as const) {
      const exact = f(name)
      got.forEach((v, i) => {
        const gate = 2 ** -22 * angles[i]! + 1e-6
        expect(Math.abs(v - exact[i]!), `${name} ${i}`).toBeLessThanOrEqual(gate)
      })
    }
    // Rotations by the stored tables, and back.
    const table = (name: string) => b.device.tensor(f(name), [positions.length / 3, headDim])
    const stored = { cos: table('cos'), sin: table('sin') }
    for (const [from, to, inverse] of [
      ['q', 'q_rot', false],
      ['k', 'k_rot', false],
      ['dq_rot', 'dq', true],
      ['dk_rot', 'dk', true],
    ] as const) {
      const x = b.device.tensor(f(from), meta.tensors[from].shape)
      const out = await applyRotary({ x, ...stored, inverse }).read()
      expect(relativeL2(out, f(to)), to).toBeLessThan(1e-6)
    }
  })

  test('attention rotates by multimodal tables of D 128 as applyRotary does', async () => {
    const [tokens, heads, d] = [20, 2, 128]
    const random = new Random(4)
    const device = b.device
    const rotary = mropeTables({
      positions: positionsOf(tokens, 3),
      headDim: d,
      theta: 5e6,
      sections: [24, 20, 20],
      device,
    })
    const parts = [0, 1, 2, 3].map(() => random.normals(tokens * heads * d))
    const [q, k, v, dOut] = parts.map((x) => device.tensor(x, [tokens, heads, d]))
    const packed = new Float32Array(3 * tokens * heads * d)
    for (let t = 0; t < tokens; t++)
      for (let part = 0; part < 3; part++)
        packed.set(
          parts[part]!.subarray(t * heads * d, (t + 1) * heads * d),
          (3 * t + part) * heads * d,
        )
    const qkv = device.tensor(packed, [tokens, 3, heads, d])
    const cuSeqlens = [0, 13, tokens]
    const fused = attention({ qkv, rotary, cuSeqlens })
    const a = { q: applyRotary({ x: q!, ...rotary }), k: applyRotary({ x: k!, ...rotary }), v: v! }
    const apart = attention({ ...a, cuSeqlens })
    expectClose(await fused.out.read(), await apart.out.read(), { absolute: 1e-6 })
    const gradients = attentionBackward({ qkv, rotary, cuSeqlens, ...fused, dOut: dOut! })
    const { dQ, dK, dV } = attentionBackward({ ...a, cuSeqlens, ...apart, dOut: dOut! })
    // The gradient of a rotation is the rotation by the negative angle.
    const expected = [
      applyRotary({ x: dQ, ...rotary, inverse: true }),
      applyRotary({ x: dK, ...rotary, inverse: true }),
      dV,
    ]
    const got = await gradients.dQkv.read()
    for (let part = 0; part < 3; part++) {
      const own = new Float32Array(tokens * heads * d)
      for (let t = 0; t < tokens; t++)
        own.set(
          got.subarray((3 * t + part) * heads * d, (3 * t + part + 1) * heads * d),
          t * heads * d,
        )
      expectClose(own, await expected[part]!.read(), { absolute: 1e-5 })
    }
  })

  test('multimodal tables: no tokens, and refusals', () => {
    const a = { positions: [0, 1, 2], headDim: 8, theta: 1e4, device: b.device }
    expect(mropeTables({ ...a, positions: [] }).cos.shape).toEqual([0, 8])
    const call = (more: object) => () => mropeTables({ ...a, ...more } as typeof a)
    const op = 'mropeTables'
    expectRefusal(call({ positions: [-1] }), 'ERR_VALUE', op, /positions\[0\]/)
    expectRefusal(call({ positions: [0.5] }), 'ERR_VALUE', op, /positions\[0\]/)
    expectRefusal(call({ headDim: 12 }), 'ERR_VALUE', op, /multiple of 8/)
    expectRefusal(call({ theta: 0 }), 'ERR_VALUE', op, /theta/)
    expectRefusal(call({ sections: [2, 2] }), 'ERR_VALUE', op, /3 numbers/)
    expectRefusal(call({ sections: [2, 2, 1] }), 'ERR_VALUE', op, /headDim \/ 2 = 4, got 5/)
    expectRefusal(call({ sections: [2, 1, 1], positions: [0] }), 'ERR_VALUE', op, /three/)
    expectRefusal(call({ section: [2, 1, 1] }), 'ERR_VALUE', op, /'sections'/)
  })

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

  test.each(floats)('%s of a view that begins anywhere: the bits of a tensor', async (dtype) => {
    const [tokens, heads, d] = [3, 2, 8]
    const random = new Random(9)
    const flat = b.device.tensor(random.normals(tokens * heads * d + 1), [49], dtype)
    const view = flat.slice(1).reshape([tokens, heads, d])
    const whole = b.device.zeros([tokens, heads, d], dtype)
    const bound = { absolute: 32 * roundoff.f32, relative: roundoff[dtype] }
    whole.copyFrom(view)
    const [cos, sin] = [0, 1].map(() => b.device.tensor(random.normals(tokens * d), [tokens, d]))
    const rotated = recorded(b, `rotary of a view ${dtype}`, bound, () =>
      applyRotary({ x: view, cos: cos!, sin: sin! }),
    )
    expect(await rotated.read()).toEqual(
      await applyRotary({ x: whole, cos: cos!, sin: sin! }).read(),
    )
  })

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
