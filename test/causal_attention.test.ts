// attention and attentionBackward with causal, grouped key heads, cuSeqlensK and sharedKeys.
import {
  applyRotary,
  attention,
  attentionBackward,
  kernels,
  openDevice,
  type Tensor,
} from 'p2r-kernels'
import { expect, test } from 'vitest'
import { golden } from './golden.js'
import {
  type Backend,
  cpuPaths,
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

/** A sequence's queries, and the rows of k and v that are its keys, in order. */
interface Sequence {
  queries: number
  shared: readonly [start: number, length: number]
  own: readonly [start: number, length: number]
}
interface Case {
  d: number
  heads: number
  kv: number
  causal: boolean
  /** Rows of k and v. */
  rows: number
  sequences: Sequence[]
  /** What is given to attention beside q, k and v. */
  keys: { cuSeqlensK?: number[]; sharedKeys?: (readonly [number, number])[] }
  scale?: number
}

function cumulative(lengths: readonly number[], from = 0): number[] {
  let end = from
  return [from, ...lengths.map((n) => (end += n))]
}

/** Sequences of [queries, own keys, shared range]; own keys stand behind `before` rows. */
function makeCase(
  shape: Pick<Case, 'd' | 'heads' | 'kv' | 'causal' | 'scale'>,
  sequences: readonly (readonly [number, number?, (readonly [number, number])?])[],
  { before = 0, after = 0 } = {},
): Case {
  const lengths = sequences.map(([queries, own]) => own ?? queries)
  const cuSeqlensK = cumulative(lengths, before)
  const shares = sequences.some(([, , shared]) => shared)
  return {
    ...shape,
    rows: cuSeqlensK.at(-1)! + after,
    sequences: sequences.map(([queries, , shared], s) => ({
      queries,
      shared: shared ?? [0, 0],
      own: [cuSeqlensK[s]!, lengths[s]!],
    })),
    keys: {
      ...(before || after || sequences.some(([, own]) => own !== undefined) ? { cuSeqlensK } : {}),
      ...(shares ? { sharedKeys: sequences.map(([, , shared]) => shared ?? [0, 0]) } : {}),
    },
  }
}

const cases: [string, Case][] = [
  ['one token', makeCase({ d: 8, heads: 1, kv: 1, causal: true }, [[1]])],
  ['causal', makeCase({ d: 16, heads: 3, kv: 3, causal: true }, [[5], [64], [0], [1], [33]])],
  ['grouped', makeCase({ d: 64, heads: 4, kv: 2, causal: true }, [[65], [1], [70]])],
  ['one key head', makeCase({ d: 128, heads: 6, kv: 1, causal: true }, [[40], [0], [9]])],
  ['grouped, not causal', makeCase({ d: 72, heads: 4, kv: 2, causal: false }, [[30], [35]])],
  [
    'more keys than queries',
    makeCase({ d: 64, heads: 2, kv: 1, causal: true }, [
      [5, 37],
      [1, 1],
      [0, 9],
      [16, 80],
      [1, 130],
    ]),
  ],
  [
    'fewer keys than queries, and none',
    makeCase({ d: 32, heads: 2, kv: 2, causal: true }, [
      [7, 3],
      [4, 0],
      [2, 2],
    ]),
  ],
  [
    'other keys, not causal',
    makeCase({ d: 80, heads: 2, kv: 2, causal: false, scale: -0.2 }, [
      [7, 90],
      [20, 3],
      [5, 0],
    ]),
  ],
  [
    'a shared prefix',
    makeCase(
      { d: 64, heads: 4, kv: 2, causal: true },
      [
        [9, 9, [0, 50]],
        [17, 17, [0, 50]],
        [3, 3],
        [1, 1, [0, 50]],
      ],
      { before: 50 },
    ),
  ],
  [
    'ranges that overlap and rows of none, on either side',
    makeCase(
      { d: 40, heads: 2, kv: 1, causal: true },
      [
        [5, 8, [2, 20]],
        [6, 6, [10, 15]],
        [2, 0, [60, 7]],
        [4, 4, [2, 20]],
      ],
      { before: 30, after: 40 },
    ),
  ],
  [
    'long ones in several blocks and chunks',
    makeCase(
      { d: 128, heads: 2, kv: 1, causal: true },
      [
        [20, 20, [0, 800]],
        [3, 190, [400, 400]],
      ],
      { before: 800 },
    ),
  ],
  [
    'tiles of 128 rows on tensor cores',
    makeCase({ d: 64, heads: 2, kv: 1, causal: true }, [[125], [3, 130]]),
  ],
  ['scale 0', makeCase({ d: 24, heads: 2, kv: 2, causal: true, scale: 0 }, [[6], [20]])],
]

function random(c: Case, dtype: Float, seed = 1) {
  const cu = cumulative(c.sequences.map((s) => s.queries))
  const tokens = cu.at(-1)!
  const r = new Random(seed)
  const make = (n: number) => rounded(r.normals(n), dtype)
  const [q, dOut] = [make(tokens * c.heads * c.d), make(tokens * c.heads * c.d)]
  const [k, v] = [make(c.rows * c.kv * c.d), make(c.rows * c.kv * c.d)]
  return { q, k, v, dOut, cu, tokens, scale: c.scale ?? 1 / Math.sqrt(c.d) }
}
type Data = Omit<ReturnType<typeof random>, 'q' | 'k' | 'v' | 'dOut'> &
  Record<'q' | 'k' | 'v' | 'dOut', ArrayLike<number>>

function keysOf(s: Sequence): number[] {
  const rows = ([start, length]: readonly [number, number]) =>
    Array.from({ length }, (_, i) => start + i)
  return [...rows(s.shared), ...rows(s.own)]
}

/** From the definition, in float64, a query at a time. */
function oracle(c: Case, x: Data) {
  const { d, heads, kv } = c
  const of = (n: number) => new Float64Array(n)
  const [out, dq] = [of(x.q.length), of(x.q.length)]
  const [dk, dv] = [of(x.k.length), of(x.k.length)]
  const lse = of(heads * x.tokens).fill(-Infinity)
  const dot = (a: ArrayLike<number>, i: number, b: ArrayLike<number>, j: number) => {
    let sum = 0
    for (let e = 0; e < d; e++) sum += a[i + e]! * b[j + e]!
    return sum
  }
  c.sequences.forEach((s, at) => {
    const all = keysOf(s)
    for (let i = 0; i < s.queries; i++) {
      const own = Math.min(Math.max(i + 1 + s.own[1] - s.queries, 0), s.own[1])
      const seen = c.causal ? all.slice(0, s.shared[1] + own) : all
      if (seen.length === 0) continue
      for (let h = 0; h < heads; h++) {
        const query = x.cu[at]! + i
        const row = (query * heads + h) * d
        const places = seen.map((key) => (key * kv + Math.floor(h / (heads / kv))) * d)
        const logits = places.map((place) => x.scale * dot(x.q, row, x.k, place))
        const top = logits.reduce((m, z) => Math.max(m, z), -Infinity)
        const sum = logits.reduce((total, z) => total + Math.exp(z - top), 0)
        lse[h * x.tokens + query] = top + Math.log(sum)
        const p = logits.map((z) => Math.exp(z - top) / sum)
        places.forEach((place, j) => {
          for (let e = 0; e < d; e++) out[row + e]! += p[j]! * x.v[place + e]!
        })
        const delta = dot(x.dOut, row, out, row)
        places.forEach((place, j) => {
          const ds = p[j]! * (dot(x.dOut, row, x.v, place) - delta) * x.scale
          for (let e = 0; e < d; e++) {
            dv[place + e]! += p[j]! * x.dOut[row + e]!
            dk[place + e]! += ds * x.q[row + e]!
            dq[row + e]! += ds * x.k[place + e]!
          }
        })
      }
    }
  })
  return { out, lse, dq, dk, dv }
}

function upload(b: Pick<Backend, 'device'>, c: Case, x: Data, dtype: Float) {
  const put = (values: ArrayLike<number>, heads: number) =>
    b.device.tensor(Float32Array.from(values), [values.length / (heads * c.d), heads, c.d], dtype)
  const given = {
    q: put(x.q, c.heads),
    k: put(x.k, c.kv),
    v: put(x.v, c.kv),
    cuSeqlens: x.cu,
    causal: c.causal,
    ...c.keys,
    ...(c.scale === undefined ? {} : { scale: c.scale }),
  }
  return { given, dOut: put(x.dOut, c.heads) }
}

/** The kernels that take these arguments. */
const kernelsFor = (b: Backend, dtype: Float) =>
  kernels('attention', b.device).filter(
    (name) => name !== 'wgmma' && (dtype !== 'f32' || name !== 'mma'),
  )
const roundsWeights = (b: Backend, dtype: Float, kernel: string) =>
  kernel === 'mma' || (dtype === 'bf16' && b.name.startsWith('cpu'))

// As in attention.test.ts, where the reasons stand.
const forwardBound = (dtype: Float, rounds: boolean) => ({
  absolute: 1e-5 + (rounds ? 2 * roundoff[dtype] : 0),
  relative: roundoff[dtype] * 1.01,
})
// A key's gradient is a sum over all query heads of its group, and over all who share it: some forty
// terms of a roundoff's size each, of either sign.
const backwardBound = (dtype: Float, rounds: boolean) => ({
  absolute: 4e-5 + (dtype === 'f32' ? 0 : rounds ? 8 : 4) * roundoff[dtype],
  relative: roundoff[dtype] * 1.01,
})
const tilesWork = 2 ** 25

onEveryBackend('causal attention', (b) => {
  for (const [name, c] of cases)
    for (const dtype of floats)
      test(`${name}, D ${c.d}, ${c.heads} heads of ${c.kv}, ${dtype}`, async () => {
        const x = random(c, dtype)
        const expected = oracle(c, x)
        const { given, dOut } = upload(b, c, x, dtype)
        for (const kernel of kernelsFor(b, dtype)) {
          const rounds = roundsWeights(b, dtype, kernel)
          const { out, lse } = recorded(
            b,
            `causal attention ${name} ${dtype}`,
            forwardBound(dtype, dtype !== 'f32'),
            () => attention({ ...given, kernel }),
            tilesWork,
          )
          expect(out.shape).toEqual(given.q.shape)
          expect(lse.shape).toEqual([c.heads, x.tokens])
          expectClose(await out.toFloat32(), expected.out, forwardBound(dtype, rounds))
          expectClose(await lse.read(), expected.lse, { absolute: 1e-5 })

          const back = recorded(
            b,
            `causal attention backward ${name} ${dtype}`,
            backwardBound(dtype, dtype !== 'f32'),
            () => attentionBackward({ ...given, dOut, out, lse, kernel }),
            tilesWork,
          )
          expect([back.dQ.shape, back.dK.shape]).toEqual([given.q.shape, given.k.shape])
          const bound = backwardBound(dtype, rounds)
          expectClose(await back.dQ.toFloat32(), expected.dq, bound)
          expectClose(await back.dK.toFloat32(), expected.dk, bound)
          expectClose(await back.dV.toFloat32(), expected.dv, bound)
        }
      })

  test('the gradient matches finite differences', async () => {
    const c = makeCase(
      { d: 8, heads: 4, kv: 2, causal: true },
      [
        [3, 3, [0, 4]],
        [2, 3, [1, 2]],
        [1, 0, [0, 4]],
      ],
      { before: 4 },
    )
    const x = random(c, 'f32', 3)
    const { given, dOut } = upload(b, c, x, 'f32')
    const { out, lse } = attention(given)
    const back = attentionBackward({ ...given, dOut, out, lse })
    const gradients = { q: back.dQ, k: back.dK, v: back.dV }
    for (const name of ['q', 'k', 'v'] as const)
      expectGradient(
        (at) => oracle(c, { ...x, [name]: at }).out.reduce((s, o, i) => s + o * x.dOut[i]!, 0),
        x[name],
        await gradients[name].read(),
        { absolute: 2e-5, relative: 1e-5, entries: 160 },
      )
  })

  for (const dtype of floats)
    for (const d of [64, 128])
      for (const names of [['k', 'v'], ['v']] as const)
        test(`values of ${names.join(' and ')} that a query does not see do not reach it, D ${d}, ${dtype}`, async () => {
          // From some token on, everything is NaN or infinite; those before see nothing of it.
          const c = makeCase({ d, heads: 4, kv: 2, causal: true }, [[45], [130], [1]])
          const clean = random(c, dtype, 3)
          const dirty = random(c, dtype, 3)
          const wrong = [NaN, Infinity, -Infinity]
          for (const [from, to] of [
            [22, 45],
            [45 + 85, 45 + 130],
          ] as const) {
            for (const name of names)
              for (let i = from * 2 * d; i < to * 2 * d; i++) dirty[name][i] = wrong[i % 3]!
          }
          for (const kernel of kernelsFor(b, dtype)) {
            const run = (x: Data) =>
              recorded(
                b,
                `causal attention unseen ${names.join(' ')} D ${d} ${dtype}`,
                forwardBound(dtype, dtype !== 'f32'),
                () => attention({ ...upload(b, c, x, dtype).given, kernel }),
                tilesWork,
              )
            const [one, two] = [run(clean), run(dirty)]
            const part = async (t: Tensor, from: number, to: number) =>
              (await t.slice(from, to).toFloat32()) as Float32Array
            for (const [from, to] of [
              [0, 22],
              [45, 45 + 85],
              [45 + 130, 45 + 131],
            ] as const)
              expect(await part(two.out, from, to)).toEqual(await part(one.out, from, to))
            for (const [from, to] of [
              [22, 45],
              [45 + 85, 45 + 130],
            ] as const)
              expect([...(await part(two.out, from, to))].some(Number.isFinite)).toBe(false)
            const [logs, expected] = [await two.lse.read(), await one.lse.read()]
            const seen = names.length === 1 ? 45 : 22
            for (let h = 0; h < 4; h++)
              expect(logs.subarray(h * 176, h * 176 + seen)).toEqual(
                expected.subarray(h * 176, h * 176 + seen),
              )
          }
        })

  test('packed qkv is the same as its parts, with rotary too', async () => {
    const [tokens, heads, d] = [70, 2, 32]
    const r = new Random(5)
    for (const dtype of floats) {
      const qkv = b.device.tensor(r.normals(tokens * 3 * heads * d), [tokens, 3, heads, d], dtype)
      const values = await qkv.toFloat32()
      const inner = heads * d
      const part = (i: number) =>
        b.device.tensor(
          values.filter((_, at) => Math.floor(at / inner) % 3 === i),
          [tokens, heads, d],
          dtype,
        )
      const angles = r
        .normals(tokens * d, 3)
        .map((a, i, all) => (i % d < d / 2 ? a : all[i - d / 2]!))
      const table = (f: (a: number) => number) => b.device.tensor(angles.map(f), [tokens, d])
      const rotary = { cos: table(Math.cos), sin: table(Math.sin) }
      const options = { cuSeqlens: [0, 3, tokens], causal: true }
      const [q, k, v] = [part(0), part(1), part(2)]
      const plain = [attention({ qkv, ...options }), attention({ q, k, v, ...options })] as const
      const turned = [
        attention({ qkv, rotary, ...options }),
        attention({
          q: applyRotary({ x: q, ...rotary }),
          k: applyRotary({ x: k, ...rotary }),
          v,
          ...options,
        }),
      ] as const
      for (const [one, two] of [plain, turned]) {
        expect(await one.out.read()).toEqual(await two.out.read())
        expect(await one.lse.read()).toEqual(await two.lse.read())
      }
      const dOut = b.device.tensor(r.normals(tokens * inner), [tokens, heads, d], dtype)
      const { dQkv } = attentionBackward({ qkv, ...options, ...plain[0], dOut })
      const back = attentionBackward({ q, k, v, ...options, ...plain[1], dOut })
      const packed = await dQkv.toFloat32()
      for (const [i, part] of [back.dQ, back.dK, back.dV].entries())
        expect(packed.filter((_, at) => Math.floor(at / inner) % 3 === i)).toEqual(
          await part.toFloat32(),
        )
      // Computed separately, the gradient is rounded before the inverse rotation and again after it.
      const rotated = attentionBackward({ qkv, rotary, ...options, ...turned[0], dOut })
      const apart = attentionBackward({
        q: applyRotary({ x: q, ...rotary }),
        k: applyRotary({ x: k, ...rotary }),
        v,
        ...options,
        ...turned[1],
        dOut,
      })
      const all = await rotated.dQkv.toFloat32()
      const twice = 1e-6 + 3 * roundoff[dtype]
      for (const [i, g] of [apart.dQ, apart.dK].entries())
        expectClose(
          all.filter((_, at) => Math.floor(at / inner) % 3 === i),
          await applyRotary({ x: g, ...rotary, inverse: true }).toFloat32(),
          { absolute: twice, relative: twice },
        )
      expect(await plain[0].out.read()).not.toEqual(await turned[0].out.read())
    }
  })

  test('accepts empty inputs', async () => {
    const empty = b.device.zeros([0, 2, 16])
    const keys = b.device.zeros([5, 1, 16])
    const none = attention({ q: empty, k: keys, v: keys, cuSeqlens: [0, 0], cuSeqlensK: [0, 5] })
    expect([none.out.shape, none.lse.shape]).toEqual([
      [0, 2, 16],
      [2, 0],
    ])
    const q = b.device.tensor(new Random(1).normals(64), [2, 2, 16])
    const nothing = b.device.zeros([0, 2, 16])
    const blind = attention({ q, k: nothing, v: nothing, cuSeqlens: [0, 2], cuSeqlensK: [0, 0] })
    expect(await blind.out.read()).toEqual(new Float32Array(64))
    expect(await blind.lse.read()).toEqual(new Float32Array(4).fill(-Infinity))
    const headless = b.device.zeros([3, 0, 16])
    const given = { q: headless, k: headless, v: headless, cuSeqlens: [0, 3], causal: true }
    expect(attention(given).out.shape).toEqual([3, 0, 16])
    await b.device.synchronize()
  })

  const files = golden('lm_ops')
  for (const path of files.list().filter((p) => /^(causal|prefill)_attention.*meta/.test(p))) {
    const meta = files.json(path)
    for (const dtype of meta.input_rounding === 'bf16'
      ? (['f32', 'bf16'] as const)
      : (['f32'] as const))
      test(`reference ${meta.name}, ${dtype}`, async () => {
        const folder = path.slice(0, -'meta.json'.length)
        const read = (name: string) => files.f32(`${folder}${name}.bin`)
        const cu = (name: string) => files.i32(`${folder}${name}.bin`)
        const put = (name: string) => b.device.tensor(read(name), meta.tensors[name].shape, dtype)
        const given = {
          q: put('q'),
          k: put('k'),
          v: put('v'),
          ...(meta.kind === 'causal_attention'
            ? { cuSeqlens: cu('cu_seqlens') }
            : { cuSeqlens: cu('cu_seqlens_q'), cuSeqlensK: cu('cu_seqlens_kv') }),
          causal: true,
          scale: meta.softmax_scale,
        }
        const errors = meta.reference_error_of_other_precisions
        const gate = (name: string) =>
          dtype === 'f32'
            ? ['out', 'lse'].includes(name)
              ? 2e-6
              : 5e-6
            : 2 * (errors.sim_bf16_P_dS_and_outputs ?? errors.sim_bf16_P_and_outputs)[name].rel_l2
        for (const kernel of kernelsFor(b, dtype)) {
          const { out, lse } = attention({ ...given, kernel })
          expect(relativeL2(await out.toFloat32(), read('out'))).toBeLessThanOrEqual(gate('out'))
          expect(relativeL2(await lse.read(), read('lse'))).toBeLessThanOrEqual(2e-6)
          if (meta.kind !== 'causal_attention') continue
          const back = attentionBackward({ ...given, out, lse, dOut: put('dout'), kernel })
          for (const [name, tensor] of Object.entries({ dq: back.dQ, dk: back.dK, dv: back.dV }))
            expect(
              relativeL2(await tensor.toFloat32(), read(name)),
              `${name} by ${kernel}`,
            ).toBeLessThanOrEqual(gate(name))
        }
      })
  }

  test('refuses invalid arguments', () => {
    const x = b.device.zeros([6, 4, 16])
    const half = b.device.zeros([6, 2, 16])
    const run = (a: object) => () =>
      attention({ q: x, k: half, v: half, cuSeqlens: [0, 2, 6], ...a } as never)
    const refused = (f: () => unknown, code: string, message: RegExp) =>
      expectRefusal(f, code, 'attention', message)
    const third = b.device.zeros([6, 3, 16])
    const none = b.device.zeros([6, 0, 16])
    refused(run({ k: third, v: third }), 'ERR_SHAPE', /heads of k must divide those of q, 4, got 3/)
    refused(run({ k: none, v: none }), 'ERR_SHAPE', /heads of k must divide/)
    refused(run({ v: x }), 'ERR_SHAPE', /v must have shape \[6, 2, 16\]/)
    const more = b.device.zeros([9, 2, 16])
    const keys = { k: more, v: more }
    refused(run(keys), 'ERR_SHAPE', /as many rows as q, 6, .*got 9/)
    refused(run({ ...keys, cuSeqlensK: [0, 9] }), 'ERR_VALUE', /as long as cuSeqlens, 3, got 2/)
    refused(run({ ...keys, cuSeqlensK: [0, 5, 8] }), 'ERR_VALUE', /number of keys, 9, got 8/)
    refused(run({ ...keys, cuSeqlensK: [1, 5, 9] }), 'ERR_VALUE', /must start with 0/)
    refused(run({ ...keys, cuSeqlensK: [0, 10, 9] }), 'ERR_VALUE', /must not decrease/)
    refused(run({ ...keys, cuSeqlensK: [0, 5, 9.5] }), 'ERR_VALUE', /cuSeqlensK\[2\]/)
    refused(run({ causal: 1 }), 'ERR_VALUE', /causal must be true or false/)
    refused(run({ casual: true }), 'ERR_VALUE', /did you mean 'causal'/)
    refused(
      run({ ...keys, sharedKeys: [[6, 3]] }),
      'ERR_VALUE',
      /range for each sequence, 2, got 1/,
    )
    refused(
      run({
        ...keys,
        sharedKeys: [
          [6, 3],
          [7, 3],
        ],
      }),
      'ERR_VALUE',
      /sharedKeys\[1\].*within/,
    )
    refused(
      run({
        ...keys,
        sharedKeys: [
          [6, 3],
          [5, 2],
        ],
      }),
      'ERR_VALUE',
      /sharedKeys\[1\].*outside/,
    )
    refused(run({ ...keys, sharedKeys: [[6, 3], [5]] }), 'ERR_VALUE', /\[start, length\]/)
    refused(
      run({
        ...keys,
        sharedKeys: [
          [6, 3],
          [-1, 2],
        ],
      }),
      'ERR_VALUE',
      /sharedKeys/,
    )
    refused(run({ ...keys, sharedKeys: 3 }), 'ERR_VALUE', /sharedKeys must be an array/)
    refused(
      run({
        ...keys,
        cuSeqlensK: [3, 6, 10],
        sharedKeys: [
          [0, 3],
          [0, 3],
        ],
      }),
      'ERR_VALUE',
      /within the rows of k, 9, got 10/,
    )
    const packed = { qkv: b.device.zeros([6, 3, 2, 16]), cuSeqlens: [0, 6] }
    for (const option of [{ cuSeqlensK: [0, 6] }, { sharedKeys: [[0, 0]] }])
      refused(() => attention({ ...packed, ...option } as never), 'ERR_VALUE', /need q, k and v/)
  })
})

/** A random sequence with keys of its own, and a length of keys that come before its first query. */
function randomSequence(r: Random, dtype: Float, heads: number, kv: number, d: number) {
  const keys = r.int(1, r.uniform() < 0.3 ? 1000 : 250)
  const queries = r.int(1, Math.min(keys, 40))
  const make = (n: number) => rounded(r.normals(n), dtype)
  return {
    keys,
    queries,
    q: make(queries * heads * d),
    k: make(keys * kv * d),
    v: make(keys * kv * d),
  }
}

const pathsAndTypes = cpuPaths.flatMap((path) => floats.map((dtype) => ({ ...path, dtype })))
test.for(pathsAndTypes)(
  'a row depends on its own query and keys alone on $name, $dtype',
  async ({ options, dtype }) => {
    const r = new Random(dtype.length)
    for (let round = 0; round < 6; round++) {
      const kv = r.int(1, 3)
      const heads = kv * r.int(1, 5)
      const d = 8 * r.int(1, 16)
      using device = openDevice('cpu', { ...options, threads: r.int(1, 5) })
      const one = randomSequence(r, dtype, heads, kv, d)
      const rowsOf = (x: Float32Array, width: number, from: number, to: number) =>
        x.subarray(from * width, to * width)
      const tensor = (parts: Float32Array[], h: number) => {
        const all = Float32Array.from(parts.flatMap((p) => [...p]))
        return device.tensor(all, [all.length / (h * d), h, d], dtype)
      }
      const bits = async (result: { out: Tensor; lse: Tensor }, from: number, to: number) => {
        const tokens = result.lse.shape[1]!
        const logs = (await result.lse.read()) as Float32Array
        const picked = Array.from({ length: heads }, (_, h) => [
          ...logs.subarray(h * tokens + from, h * tokens + to),
        ])
        return [await result.out.slice(from, to).toFloat32(), picked] as const
      }

      // All queries at once.
      const whole = attention({
        q: tensor([one.q], heads),
        k: tensor([one.k], kv),
        v: tensor([one.v], kv),
        cuSeqlens: [0, one.queries],
        cuSeqlensK: [0, one.keys],
        causal: true,
      })

      // In chunks, each a sequence with the keys up to its end, of which a part is shared.
      const cuts = [0]
      while (cuts.at(-1)! < one.queries)
        cuts.push(cuts.at(-1)! + r.int(1, one.queries - cuts.at(-1)!))
      const before = one.keys - one.queries
      const shared = r.int(0, before)
      const lengths = cuts.slice(1).map((end) => before + end - shared)
      const chunks = attention({
        q: tensor([one.q], heads),
        ...(Object.fromEntries(
          (['k', 'v'] as const).map((name) => [
            name,
            tensor(
              [
                rowsOf(one[name], kv * d, 0, shared),
                ...lengths.map((n) => rowsOf(one[name], kv * d, shared, shared + n)),
              ],
              kv,
            ),
          ]),
        ) as { k: Tensor<Float>; v: Tensor<Float> }),
        cuSeqlens: cuts,
        cuSeqlensK: cumulative(lengths, shared),
        sharedKeys: lengths.map(() => [0, shared] as const),
        causal: true,
      } as Parameters<typeof attention>[0])
      expect(await bits(chunks, 0, one.queries)).toEqual(await bits(whole, 0, one.queries))

      // Among others, one query at a time, not causal, on another number of threads.
      const others = [0, 1].map(() => randomSequence(r, dtype, heads, kv, d))
      const query = r.int(0, one.queries - 1)
      const last = {
        keys: before + query + 1,
        queries: 1,
        q: rowsOf(one.q, heads * d, query, query + 1),
        k: rowsOf(one.k, kv * d, 0, before + query + 1),
        v: rowsOf(one.v, kv * d, 0, before + query + 1),
      }
      const batch = [others[0]!, last, others[1]!]
      const among = attention({
        q: tensor(
          batch.map((s) => s.q),
          heads,
        ),
        k: tensor(
          batch.map((s) => s.k),
          kv,
        ),
        v: tensor(
          batch.map((s) => s.v),
          kv,
        ),
        cuSeqlens: cumulative(batch.map((s) => s.queries)),
        cuSeqlensK: cumulative(batch.map((s) => s.keys)),
        causal: r.uniform() < 0.5,
      })
      const at = others[0]!.queries
      expect(await bits(among, at, at + 1)).toEqual(await bits(whole, query, query + 1))
    }
  },
)

test.for(pathsAndTypes)(
  'causal attention does not depend on the number of threads on $name, $dtype',
  async (path) => {
    // Few queries and many keys, so that keys are divided among threads; and many queries.
    for (const [sequences, before] of [
      [[[2, 3000]], 0],
      [[[40, 40, [0, 300]], [900], [20, 20, [0, 300]]], 300],
    ] as [Parameters<typeof makeCase>[1], number][]) {
      const c = makeCase({ d: 64, heads: 4, kv: 2, causal: true }, sequences, { before })
      const x = random(c, path.dtype, 11)
      const run = async (threads: number) => {
        using device = openDevice('cpu', { ...path.options, threads })
        const { given, dOut } = upload({ device }, c, x, path.dtype)
        const { out, lse } = attention(given)
        const { dQ, dK, dV } = attentionBackward({ ...given, dOut, out, lse })
        const bytes = async (t: Tensor) => Buffer.from((await t.toFloat32()).buffer)
        return Promise.all([out, lse, dQ, dK, dV].map(bytes))
      }
      const [many, one] = [await run(13), await run(1)]
      expect(many.map((bytes, i) => bytes.equals(one[i]!))).toEqual(many.map(() => true))
    }
  },
)
