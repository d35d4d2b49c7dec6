import { attention, cachedAttention, KvCache, openDevice, scope, type Tensor } from 'p2r-kernels'
import { describe, expect, test } from 'vitest'
import { golden } from './golden.js'
import {
  cpuPaths,
  expectClose,
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

const cumulative = (lengths: readonly number[]): number[] => {
  let end = 0
  return [0, ...lengths.map((n) => (end += n))]
}

interface Shape {
  heads: number
  kv: number
  d: number
}
/** q, k and v of some tokens, in one layer. */
interface Tokens {
  n: number
  q: Float32Array
  k: Float32Array
  v: Float32Array
}
function tokens(r: Random, { heads, kv, d }: Shape, n: number, dtype: Float): Tokens {
  const make = (h: number) => rounded(r.normals(n * h * d), dtype)
  return { n, q: make(heads), k: make(kv), v: make(kv) }
}
const joined = (parts: readonly Tokens[]): Tokens => {
  const all = (name: 'q' | 'k' | 'v') => Float32Array.from(parts.flatMap((p) => [...p[name]]))
  return { n: parts.reduce((n, p) => n + p.n, 0), q: all('q'), k: all('k'), v: all('v') }
}

type Device = ReturnType<typeof openDevice>
function upload(device: Device, { heads, kv, d }: Shape, x: Tokens, dtype: Float) {
  const put = (values: Float32Array, h: number) => device.tensor(values, [x.n, h, d], dtype)
  return { q: put(x.q, heads), k: put(x.k, kv), v: put(x.v, kv) }
}

/** out and lse of some rows, as plain lists. */
async function rows(result: { out: Tensor; lse: Tensor }, from: number, to: number) {
  const logs = await result.lse.toFloat32()
  const [heads, all] = result.lse.shape as [number, number]
  return {
    out: await result.out.slice(from, to).toFloat32(),
    lse: Array.from({ length: heads }, (_, h) => [...logs.subarray(h * all + from, h * all + to)]),
  }
}

/** Causal attention over a whole sequence: all of its tokens as queries. */
const whole = (device: Device, shape: Shape, x: Tokens, dtype: Float) =>
  attention({ ...upload(device, shape, x, dtype), cuSeqlens: [0, x.n], causal: true })

onEveryBackend('cachedAttention', (b) => {
  const shapes: Shape[] = [
    { heads: 4, kv: 2, d: 64 },
    { heads: 1, kv: 1, d: 8 },
    { heads: 8, kv: 1, d: 128 },
    { heads: 3, kv: 3, d: 72 },
  ]
  for (const shape of shapes)
    for (const dtype of floats)
      test(`prefill in chunks and decoding, ${shape.heads} heads of ${shape.kv}, D ${shape.d}, ${dtype}`, async () => {
        const r = new Random(3)
        using cache = new KvCache(b.device, {
          layers: 2,
          kvHeads: shape.kv,
          headDim: shape.d,
          pages: 20,
          pageSize: 20,
          dtype,
        })
        const ids = [cache.add(), cache.add(), cache.add()]
        const held: Tokens[][][] = [0, 1].map(() => ids.map(() => []))
        // Steps of new tokens for each sequence; none for some.
        for (const step of [
          [30, 0, 1],
          [33, 50, 0],
          [1, 1, 1],
          [1, 2, 1],
        ])
          for (const layer of [0, 1]) {
            const parts = step.map((n) => tokens(r, shape, n, dtype))
            for (const [s, part] of parts.entries()) held[layer]![s]!.push(part)
            const cuSeqlens = cumulative(step)
            const bound = {
              absolute: 1e-5 + (dtype === 'f32' ? 0 : 2 * roundoff[dtype]),
              relative: roundoff[dtype] * 1.01,
            }
            const result = recorded(b, `cachedAttention D ${shape.d} ${dtype}`, bound, () =>
              cachedAttention({
                ...upload(b.device, shape, joined(parts), dtype),
                cuSeqlens,
                cache,
                layer,
                sequences: ids,
              }),
            )
            for (const [s, n] of step.entries()) {
              const all = joined(held[layer]![s]!)
              const expected = await rows(whole(b.device, shape, all, dtype), all.n - n, all.n)
              const got = await rows(result, cuSeqlens[s]!, cuSeqlens[s + 1]!)
              // On the CPU the same bits; on CUDA another kernel may have computed the one.
              if (b.name !== 'cuda') expect(got).toEqual(expected)
              expectClose(got.out, expected.out, bound)
              expectClose(got.lse.flat(), expected.lse.flat(), { absolute: 1e-5 })
            }
          }
        expect(ids.map((id) => cache.length(id))).toEqual([65, 53, 3])
        expect(cache.pagesFree).toBe(20 - 4 - 3 - 1)
      })

  // On the CPU a kernel of its own computes few rows that see the same keys.
  for (const [heads, kv, d] of [
    [2, 1, 128],
    [8, 1, 72],
    [9, 1, 16],
    [6, 2, 64],
    [2, 2, 8],
  ] as const)
    for (const dtype of floats)
      test.skipIf(b.name.startsWith('cuda'))(
        `a single query has the bits of a row among many, ${heads} heads of ${kv}, D ${d}, ${dtype}`,
        async () => {
          const shape = { heads, kv, d }
          const n = 1600
          const x = tokens(new Random(d), shape, n, dtype)
          // Logits and values that are not finite stay in their rows.
          x.k[700 * kv * d] = Number.POSITIVE_INFINITY
          x.v[780 * kv * d + 3] = Number.NaN
          using cache = new KvCache(b.device, {
            layers: 1,
            kvHeads: kv,
            headDim: d,
            pages: 100,
            pageSize: 18,
            dtype,
          })
          const id = cache.add()
          const all = upload(b.device, shape, x, dtype)
          for (const scale of [0.3, -0.2]) {
            cache.truncate(id, 0)
            const many = { ...all, cuSeqlens: [0, n], scale }
            const { out, lse } = cachedAttention({ ...many, cache, layer: 0, sequences: [id] })
            // Around the ends of vectors, blocks and chunks.
            for (const length of [
              1599, 1537, 1536, 800, 769, 768, 699, 385, 193, 192, 191, 33, 17, 2, 1,
            ]) {
              cache.truncate(id, length - 1)
              const [q, k, v] = [all.q, all.k, all.v].map((y) => y.slice(length - 1, length))
              const one = { q: q!, k: k!, v: v!, cuSeqlens: [0, 1], scale }
              expect(
                await rows(cachedAttention({ ...one, cache, layer: 0, sequences: [id] }), 0, 1),
              ).toEqual(await rows({ out, lse }, length - 1, length))
            }
          }
        },
      )

  for (const shape of [
    { heads: 4, kv: 2, d: 64 },
    { heads: 6, kv: 1, d: 128 },
  ])
    for (const dtype of floats)
      test(`decoding over many keys, ${shape.heads} heads of ${shape.kv}, D ${shape.d}, ${dtype}`, async () => {
        const r = new Random(5)
        using cache = new KvCache(b.device, {
          layers: 1,
          kvHeads: shape.kv,
          headDim: shape.d,
          pages: 70,
          dtype,
        })
        const ids = [cache.add(), cache.add(), cache.add()]
        const held: Tokens[][] = ids.map(() => [])
        // Of the last step, each sequence's last value is not a number: tokens before do not see it.
        for (const [at, step] of [
          [540, 255, 3],
          [1, 1, 3],
          [3, 2, 0],
        ].entries()) {
          const parts = step.map((n) => tokens(r, shape, n, dtype))
          const width = shape.kv * shape.d
          if (at === 2) for (const part of parts) if (part.n) part.v.fill(NaN, (part.n - 1) * width)
          for (const [s, part] of parts.entries()) held[s]!.push(part)
          const cuSeqlens = cumulative(step)
          const bound = {
            absolute: 1e-5 + (dtype === 'f32' ? 0 : 2 * roundoff[dtype]),
            relative: roundoff[dtype] * 1.01,
          }
          const result = recorded(
            b,
            `cachedAttention many D ${shape.d} ${dtype}`,
            bound,
            () =>
              cachedAttention({
                ...upload(b.device, shape, joined(parts), dtype),
                cuSeqlens,
                cache,
                layer: 0,
                sequences: ids,
              }),
            2 ** 23,
          )
          for (const [s, n] of step.entries()) {
            const all = joined(held[s]!)
            const expected = await rows(whole(b.device, shape, all, dtype), all.n - n, all.n)
            const got = await rows(result, cuSeqlens[s]!, cuSeqlens[s + 1]!)
            if (b.name !== 'cuda') expect(got).toEqual(expected)
            expectClose(got.out, expected.out, bound)
            expectClose(got.lse.flat(), expected.lse.flat(), { absolute: 1e-5 })
          }
        }
      })

  const files = golden('lm_ops')
  for (const path of files.list().filter((p) => /^decode_attention.*meta/.test(p))) {
    const meta = files.json(path)
    for (const dtype of ['f32', 'bf16'] as const)
      test(`reference ${meta.name}, ${dtype}`, async () => {
        const folder = path.slice(0, -'meta.json'.length)
        const read = (name: string) => files.f32(`${folder}${name}.bin`)
        const lengths = files.i32(`${folder}kv_lens.bin`)
        const table = files.i32(`${folder}block_table.bin`)
        const [batch, columns] = meta.tensors.block_table.shape
        const { heads, kv_heads: kv, head_dim: d, page_size: size } = meta
        const [keys, values] = [read('k_pages'), read('v_pages')]
        const pages = Math.ceil(Math.max(...lengths) / size) * batch
        const cache = new KvCache(b.device, {
          layers: 1,
          kvHeads: kv,
          headDim: d,
          pages,
          pageSize: size,
          dtype,
        })
        const sequences = Array.from(lengths, () => cache.add())
        // All but the last token of each sequence first, then one query each.
        const inner = kv * d
        const slot = (s: number, j: number) => {
          const page = table[s * columns + Math.floor(j / size)]!
          return (page * size + (j % size)) * inner
        }
        const take = (from: Float32Array, s: number, j: number) => [
          ...from.subarray(slot(s, j), slot(s, j) + inner),
        ]
        const list = (from: Float32Array, of: (n: number) => number[]) =>
          Float32Array.from([...lengths].flatMap((n, s) => of(n).flatMap((j) => take(from, s, j))))
        const append = (of: (n: number) => number[], q: Float32Array) => {
          const counts = [...lengths].map((n) => of(n).length)
          const total = counts.reduce((a, n) => a + n, 0)
          return cachedAttention({
            q: b.device.tensor(q, [total, heads, d], dtype),
            k: b.device.tensor(list(keys, of), [total, kv, d], dtype),
            v: b.device.tensor(list(values, of), [total, kv, d], dtype),
            cuSeqlens: cumulative(counts),
            cache,
            layer: 0,
            sequences,
            scale: meta.softmax_scale,
          })
        }
        const before = (n: number) => Array.from({ length: n - 1 }, (_, j) => j)
        const total = [...lengths].reduce((a, n) => a + n - 1, 0)
        append(before, new Float32Array(total * heads * d))
        const { out, lse } = append((n) => [n - 1], read('q'))
        const errors = meta.reference_error_of_other_precisions
        const gate = dtype === 'f32' ? 2e-6 : 2 * errors.sim_bf16_P_and_outputs.out.rel_l2
        expect(relativeL2(await out.toFloat32(), read('out'))).toBeLessThanOrEqual(gate)
        // The reference's lse is [H, B] in one case and [B, H] transposed in none.
        expect(relativeL2(await lse.read(), read('lse'))).toBeLessThanOrEqual(2e-6)
        cache.dispose()
      })
  }

  test('memory that holds no token is never read', async () => {
    // A page that was full of NaN comes back to another sequence.
    const shape = { heads: 2, kv: 1, d: 16 }
    using cache = new KvCache(b.device, { layers: 1, kvHeads: 1, headDim: 16, pages: 2 })
    const r = new Random(7)
    const first = cache.add()
    const bad = tokens(r, shape, 32, 'f32')
    bad.k.fill(NaN)
    bad.v.fill(NaN)
    const run = (id: number, x: Tokens) =>
      cachedAttention({
        ...upload(b.device, shape, x, 'f32'),
        cuSeqlens: [0, x.n],
        cache,
        layer: 0,
        sequences: [id],
      })
    run(first, bad)
    cache.truncate(first, 0)
    expect(cache.pagesFree).toBe(2)
    const good = tokens(r, shape, 19, 'f32')
    const result = await rows(run(first, good), 0, 19)
    const expected = await rows(whole(b.device, shape, good, 'f32'), 0, 19)
    expectClose(result.out, expected.out, { absolute: 1e-5 })
    expectClose(result.lse.flat(), expected.lse.flat(), { absolute: 1e-5 })
  })

  test('a full cache is an error for that call alone', async () => {
    const shape = { heads: 2, kv: 1, d: 16 }
    using cache = new KvCache(b.device, { layers: 1, kvHeads: 1, headDim: 16, pages: 3 })
    const r = new Random(8)
    const [one, two] = [cache.add(), cache.add()]
    const run = (ids: number[], parts: Tokens[]) =>
      cachedAttention({
        ...upload(b.device, shape, joined(parts), 'f32'),
        cuSeqlens: cumulative(parts.map((p) => p.n)),
        cache,
        layer: 0,
        sequences: ids,
      })
    const held = tokens(r, shape, 20, 'f32')
    run([one], [held])
    expect(cache.pagesFree).toBe(1)
    // The first of the two would fit.
    const parts = [tokens(r, shape, 2, 'f32'), tokens(r, shape, 17, 'f32')]
    expectRefusal(
      () => run([one, two], parts),
      'ERR_MEMORY',
      'cachedAttention',
      /the cache is full: sequence 1 /,
    )
    expect([cache.length(one), cache.length(two), cache.pagesFree]).toEqual([20, 0, 1])
    // A call that is refused for its tensors changes nothing either.
    const wrong = () =>
      cachedAttention({
        ...upload(b.device, { ...shape, d: 24 }, tokens(r, { ...shape, d: 24 }, 5, 'f32'), 'f32'),
        cuSeqlens: [0, 5],
        cache,
        layer: 0,
        sequences: [two],
      })
    expectRefusal(wrong, 'ERR_SHAPE', 'cachedAttention')
    expect([cache.length(two), cache.pagesFree]).toEqual([0, 1])
    // And the sequences go on.
    const more = tokens(r, shape, 3, 'f32')
    const got = await rows(run([one], [more]), 0, 3)
    const expected = await rows(whole(b.device, shape, joined([held, more]), 'f32'), 20, 23)
    expectClose(got.out, expected.out, { absolute: 1e-5 })
    cache.remove(one)
    expect(cache.pagesFree).toBe(3)
    expectRefusal(() => cache.length(one), 'ERR_VALUE', 'length', /must be a sequence of the cache/)
  })
})

const pathsAndTypes = cpuPaths.flatMap((path) => floats.map((dtype) => ({ ...path, dtype })))
test.for(pathsAndTypes)(
  'random appends, forks, truncations and removals give the bits of attention on $name, $dtype',
  async ({ options, dtype }) => {
    const r = new Random(17 + dtype.length)
    for (let round = 0; round < 2; round++) {
      const kv = r.int(1, 3)
      const shape = { kv, heads: kv * r.int(1, 4), d: 8 * r.int(1, 16) }
      const pageSize = r.int(16, 64)
      const layers = r.int(1, 2)
      using device = openDevice('cpu', { ...options, threads: r.int(1, 5) })
      using reference = openDevice('cpu', { ...options, threads: r.int(1, 5) })
      const pages = 60
      const cache = new KvCache(device, {
        layers,
        kvHeads: kv,
        headDim: shape.d,
        pages,
        pageSize,
        dtype,
      })
      const bytes = device.memory().liveBytes
      const held = new Map<number, Tokens[][]>()
      const lengthOf = (id: number) => held.get(id)![0]!.length
      const pick = () => [...held.keys()][r.int(0, held.size - 1)]!
      for (let step = 0; step < 14; step++) {
        const what = r.uniform()
        if (held.size === 0 || (what < 0.2 && held.size < 5)) {
          const from = held.size > 0 && r.uniform() < 0.7 ? pick() : undefined
          const id = from === undefined ? cache.add() : cache.add(from)
          held.set(
            id,
            from === undefined
              ? Array.from({ length: layers }, () => [])
              : held.get(from)!.map((layer) => [...layer]),
          )
        } else if (what < 0.3) {
          const id = pick()
          const length = r.int(0, lengthOf(id))
          cache.truncate(id, length)
          for (const layer of held.get(id)!) layer.length = length
        } else if (what < 0.36) {
          const id = pick()
          cache.remove(id)
          held.delete(id)
        } else {
          const ids = [...held.keys()].filter(() => r.uniform() < 0.7)
          const counts = ids.map(() => (r.uniform() < 0.5 ? r.int(0, 2) : r.int(0, 70)))
          const needed = ids.reduce((sum, id, i) => sum + cache.pagesNeeded(id, counts[i]!), 0)
          if (needed > cache.pagesFree) continue
          const cuSeqlens = cumulative(counts)
          for (let layer = 0; layer < layers; layer++) {
            const parts = ids.map((id, i) => {
              const list = held.get(id)![layer]!
              const added = Array.from({ length: counts[i]! }, () => tokens(r, shape, 1, dtype))
              list.push(...added)
              return joined(added)
            })
            const result = cachedAttention({
              ...upload(device, shape, joined(parts), dtype),
              cuSeqlens,
              cache,
              layer,
              sequences: ids,
            })
            const i = ids.length > 0 ? r.int(0, ids.length - 1) : -1
            if (i < 0 || counts[i] === 0) continue
            const all = joined(held.get(ids[i]!)![layer]!)
            const expected = whole(reference, shape, all, dtype)
            expect(await rows(result, cuSeqlens[i]!, cuSeqlens[i + 1]!)).toEqual(
              await rows(expected, all.n - counts[i]!, all.n),
            )
          }
        }
        for (const [id, layersOf] of held) expect(cache.length(id)).toBe(layersOf[0]!.length)
      }
      for (const id of held.keys()) cache.remove(id)
      expect(cache.pagesFree).toBe(pages)
      expect(bytes).toBe(pages * layers * 2 * kv * pageSize * shape.d * (dtype === 'f32' ? 4 : 2))
      cache.dispose()
    }
  },
)

describe('KvCache', () => {
  const device = openDevice('cpu')
  const options = { layers: 2, kvHeads: 1, headDim: 16, pages: 4 }
  const append = (cache: KvCache, id: number, n: number, layers = [0, 1]) => {
    const x = device.zeros([n, 1, 16])
    for (const layer of layers)
      cachedAttention({ q: x, k: x, v: x, cuSeqlens: [0, n], cache, layer, sequences: [id] })
  }

  test('counts pages: shared, copied when written to, given back', () => {
    using cache = new KvCache(device, options)
    const one = cache.add()
    append(cache, one, 20)
    expect(cache.pagesFree).toBe(2)
    const two = cache.add(one)
    expect([cache.pagesFree, cache.length(two)]).toEqual([2, 20])
    expect([
      cache.pagesNeeded(two, 0),
      cache.pagesNeeded(two, 1),
      cache.pagesNeeded(two, 13),
    ]).toEqual([0, 1, 2])
    append(cache, two, 1) // copies the second page, once for both layers
    expect(cache.pagesFree).toBe(1)
    append(cache, one, 1) // alone in its own now
    expect(cache.pagesFree).toBe(1)
    cache.truncate(two, 16)
    expect(cache.pagesFree).toBe(2)
    cache.remove(one)
    expect(cache.pagesFree).toBe(3) // the first page is still two's
    cache.remove(two)
    expect(cache.pagesFree).toBe(4)
  })

  test('layers grow one after the other, also around a fork', () => {
    using cache = new KvCache(device, options)
    const one = cache.add()
    append(cache, one, 5, [0])
    expect(cache.length(one)).toBe(5)
    const two = cache.add(one) // five tokens in layer 0, none in layer 1
    append(cache, one, 5, [1])
    append(cache, two, 5, [1])
    expect([cache.length(one), cache.length(two), cache.pagesFree]).toEqual([5, 5, 2])
  })

  test('is kept by a scope that returns it', async () => {
    const cache = scope(() => new KvCache(device, options))
    append(cache, cache.add(), 3)
    expect(cache.pagesFree).toBe(3)
    cache.dispose()
    cache.dispose()
    expectRefusal(() => cache.add(), 'ERR_DISPOSED', 'add', /cache was disposed/)
    expectRefusal(() => append(cache, 0, 1), 'ERR_DISPOSED', 'cachedAttention')
    await device.synchronize()
  })

  test('refuses invalid arguments', () => {
    const make = (a: object) => () => new KvCache(device, { ...options, ...a } as never)
    const refused = (f: () => unknown, message: RegExp) =>
      expectRefusal(f, 'ERR_VALUE', 'KvCache', message)
    refused(make({ layers: 0 }), /layers must be an integer from 1/)
    refused(make({ pages: 1.5 }), /pages/)
    refused(make({ headDim: 12 }), /multiple of 8, got 12/)
    refused(make({ headDim: 136 }), /headDim/)
    refused(make({ pageSize: 8 }), /pageSize must be an integer from 16 to 64, got 8/)
    refused(make({ pagesize: 16 }), /did you mean 'pageSize'/)
    expectRefusal(make({ dtype: 'i32' }), 'ERR_DTYPE', 'KvCache', /f32, f16 or bf16/)

    using cache = new KvCache(device, options)
    using other = openDevice('cpu')
    const id = cache.add()
    expectRefusal(
      () => cache.add(7),
      'ERR_VALUE',
      'add',
      /from must be a sequence of the cache, got 7/,
    )
    expectRefusal(() => cache.truncate(id, 1), 'ERR_VALUE', 'truncate', /length/)
    expectRefusal(() => cache.pagesNeeded(id, -1), 'ERR_VALUE', 'pagesNeeded', /tokens/)
    const x = device.zeros([4, 2, 16])
    const keys = device.zeros([4, 1, 16])
    const run = (a: object) => () =>
      cachedAttention({
        q: x,
        k: keys,
        v: keys,
        cuSeqlens: [0, 4],
        cache,
        layer: 0,
        sequences: [id],
        ...a,
      } as never)
    const wrong = (f: () => unknown, code: string, message: RegExp) =>
      expectRefusal(f, code, 'cachedAttention', message)
    wrong(run({ k: x }), 'ERR_SHAPE', /k must have shape \[4, 1, 16\]/)
    wrong(run({ q: x.cast('bf16') }), 'ERR_DTYPE', /q must be f32, got bf16/)
    wrong(run({ layer: 2 }), 'ERR_VALUE', /layer must be an integer from 0 to 1/)
    wrong(run({ sequences: [id, id], cuSeqlens: [0, 2, 4] }), 'ERR_VALUE', /twice/)
    wrong(run({ sequences: [] }), 'ERR_VALUE', /as many as those of cuSeqlens, 1, got 0/)
    wrong(run({ sequences: [99] }), 'ERR_VALUE', /sequences\[0\] must be a sequence/)
    wrong(run({ cuSeqlens: [0, 3] }), 'ERR_VALUE', /number of tokens, 4, got 3/)
    wrong(run({ cache: {} }), 'ERR_VALUE', /cache must be a KvCache/)
    wrong(run({ scale: Number.NaN }), 'ERR_VALUE', /scale/)
    const foreign = other.zeros([4, 2, 16])
    wrong(run({ q: foreign }), 'ERR_DEVICE', /another device/)
    expect([cache.length(id), cache.pagesFree]).toEqual([0, 4])
  })
})
