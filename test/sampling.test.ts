import { openDevice, sample, sampleTokens, tokenLogProbs } from 'p2r-kernels'
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
  rounded,
} from './harness.js'

const mask = 0xffffffffn

// Philox4x32-10 as Salmon et al. (2011) define it: all four words.
function philox(counter: bigint[], key: bigint[]): bigint[] {
  let [c0, c1, c2, c3] = counter as [bigint, bigint, bigint, bigint]
  let [k0, k1] = key as [bigint, bigint]
  for (let round = 0; round < 10; round++) {
    const a = 0xd2511f53n * c0
    const b = 0xcd9e8d57n * c2
    ;[c0, c1, c2, c3] = [(b >> 32n) ^ c1 ^ k0, b & mask, (a >> 32n) ^ c3 ^ k1, a & mask]
    k0 = (k0 + 0x9e3779b9n) & mask
    k1 = (k1 + 0xbb67ae85n) & mask
  }
  return [c0, c1, c2, c3]
}

// The uniform number of a row, in [0, 1).
function uniform(seed: number, row: number): number {
  const key = [BigInt(seed) & mask, BigInt(seed) >> 32n]
  const [low, high] = philox([BigInt(row) & mask, BigInt(row) >> 32n, 0n, 0n], key)
  return (Number(high!) + Number(low!) / 2 ** 32) / 2 ** 32
}

/** Every draw is where the row's uniform number falls in the float64 distribution. */
function expectDraws(
  drawn: Int32Array,
  logits: Float32Array,
  vocabulary: number,
  temperature: number,
  seed: number,
): void {
  drawn.forEach((token, row) => {
    const x = logits.subarray(row * vocabulary, (row + 1) * vocabulary)
    const max = x.reduce((m, v) => Math.max(m, v), -Infinity)
    const p = Float64Array.from(x, (v) => Math.exp((v - max) / temperature))
    const total = p.reduce((s, v) => s + v, 0)
    const below = p.subarray(0, token).reduce((s, v) => s + v, 0) / total
    const u = uniform(seed, row)
    // Weights err by the three f32 roundings of their exponent, of up to 40 where they still count.
    const slack = 1e-5
    expect(u, `row ${row}: ${token}`).toBeGreaterThanOrEqual(below - slack)
    expect(u, `row ${row}: ${token}`).toBeLessThan(below + p[token]! / total + slack)
    expect(p[token]).toBeGreaterThan(0)
  })
}

const cases: {
  dtype: Float
  rows: number
  vocabulary: number
  temperature: number
  seed: number
}[] = [
  ...floats.map((dtype) => ({ dtype, rows: 64, vocabulary: 300, temperature: 1, seed: 7 })),
  { dtype: 'f32', rows: 5, vocabulary: 1, temperature: 0.5, seed: 0 },
  { dtype: 'f32', rows: 64, vocabulary: 31, temperature: 0.6, seed: Number.MAX_SAFE_INTEGER },
  { dtype: 'f32', rows: 9, vocabulary: 5000, temperature: 2.5, seed: 2 ** 32 },
  { dtype: 'bf16', rows: 3, vocabulary: 151_936, temperature: 1, seed: 3 },
]

test('the test’s Philox gives its authors’ known answers', () => {
  // The vectors of Random123's kat_vectors.
  expect(philox([0n, 0n, 0n, 0n], [0n, 0n])).toEqual([
    0x6627e8d5n,
    0xe169c58dn,
    0xbc57ac4cn,
    0x9b00dbd8n,
  ])
  expect(philox([mask, mask, mask, mask], [mask, mask])).toEqual([
    0x408f276dn,
    0x41c83b0en,
    0xa20bc7c6n,
    0x6d5451fdn,
  ])
})

onEveryBackend('sample', (b) => {
  for (const { dtype, rows, vocabulary, temperature, seed } of cases)
    test(`${dtype} [${rows}, ${vocabulary}] at ${temperature}, seed ${seed}`, async () => {
      const logits = rounded(new Random(rows + vocabulary).normals(rows * vocabulary, 3), dtype)
      const x = b.device.tensor(logits, [rows, vocabulary], dtype)
      // The draws are the same on every machine: no bound at all.
      using drawn = recorded(b, `sample ${dtype} ${rows} ${vocabulary}`, {}, () =>
        sample({ logits: x, temperature, seed }),
      )
      expect([drawn.shape, drawn.dtype]).toEqual([[rows], 'i32'])
      expectDraws(await drawn.read(), logits, vocabulary, temperature, seed)
    })

  test('frequencies match the distribution', async () => {
    // Chi-square over 10 tokens and 20 000 rows of one distribution: below 27.9, the 99.9th percentile
    // of 9 degrees of freedom. The seeds are fixed, so this passes always or never.
    const p = [0.3, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05, 0.03, 0.015, 0.005]
    const n = 20_000
    const logits = Float32Array.from({ length: n * 10 }, (_, i) => Math.log(p[i % 10]!) * 0.7)
    const x = b.device.tensor(logits, [n, 10])
    for (const seed of [1, 2, 3]) {
      const counts = new Float64Array(10)
      for (const token of await sample({ logits: x, temperature: 0.7, seed }).read())
        counts[token]!++
      const chi = p.reduce((s, v, i) => s + (counts[i]! - n * v) ** 2 / (n * v), 0)
      expect(chi, `seed ${seed}: ${counts}`).toBeLessThan(27.9)
    }
  })

  test('returns the maximum at temperature 0 and nearly 0', async () => {
    const logits = [1, 5, 5, -Infinity, 2, 2, 2, 2, -Infinity, -Infinity, -3, -Infinity]
    const x = b.device.tensor(logits, [3, 4])
    const greedy = recorded(b, 'sample greedy', {}, () =>
      sample({ logits: x, temperature: 0, seed: 1 }),
    )
    expect([...(await greedy.read())]).toEqual([1, 0, 2])
    // The larger one alone has a weight.
    const close = b.device.tensor([0, 1e-3, 5, -5], [2, 2])
    for (const temperature of [1e-6, 1e-30])
      expect([...(await sample({ logits: close, temperature, seed: 4 }).read())]).toEqual([1, 0])
    // Far apart, still finite: the difference overflows f32, the weight is 0.
    const far = b.device.tensor([-3e38, 3e38], [1, 2])
    expect([...(await sample({ logits: far, seed: 4 }).read())]).toEqual([1])
  })

  test('never draws -Infinity, even at a high temperature', async () => {
    const n = 512
    const logits = Float32Array.from({ length: n * 3 }, (_, i) => (i % 3 === 1 ? -Infinity : i % 3))
    for (const temperature of [1, 1e30]) {
      const drawn = await sample({
        logits: b.device.tensor(logits, [n, 3]),
        temperature,
        seed: 6,
      }).read()
      expect(new Set(drawn)).toEqual(new Set([0, 2]))
    }
  })

  test('draws differ by seed and row, and repeat for the same seed', async () => {
    const x = b.device.zeros([400, 1000])
    const draw = async (seed: number) => [...(await sample({ logits: x, seed }).read())]
    const [first, again, other] = [await draw(11), await draw(11), await draw(12)]
    expect(first).toEqual(again)
    const equal = first.filter((token, i) => token === other[i]).length
    expect(equal).toBeLessThan(10)
    expect(new Set(first).size).toBeGreaterThan(250)
  })

  test('refuses NaN, +Infinity and rows of -Infinity', async () => {
    const bad = [
      [1, NaN, 2],
      [NaN, NaN, NaN],
      [0, Infinity, 1],
      [-Infinity, -Infinity, -Infinity],
    ]
    for (const row of bad)
      for (const temperature of [0, 1]) {
        const logits = b.device.tensor([1, 2, 3, ...row], [2, 3])
        const drawn = recorded(b, `sample refuses ${row} ${temperature}`, {}, () =>
          sample({ logits, temperature, seed: 1 }),
        )
        await expect(drawn.read()).rejects.toMatchObject({ code: 'ERR_VALUE', op: 'sample' })
        await b.device.synchronize()
      }
  })

  test('accepts no rows and refuses mismatched arguments', () => {
    const logits = b.device.zeros([2, 3])
    expect(sample({ logits: b.device.zeros([0, 3]), seed: 1 }).shape).toEqual([0])
    expect(sample({ logits: b.device.zeros([0, 0]), seed: 1 }).shape).toEqual([0])
    const call = (a: object) => () => sample({ logits, seed: 1, ...a })
    expectRefusal(call({ logits: b.device.zeros([2, 0]) }), 'ERR_SHAPE', 'sample', /vocabulary/)
    expectRefusal(call({ logits: b.device.zeros([2]) }), 'ERR_SHAPE', 'sample')
    expectRefusal(call({ logits: b.device.zeros([2, 3], 'i32') }), 'ERR_DTYPE', 'sample')
    expectRefusal(call({ logits: null }), 'ERR_VALUE', 'sample', /logits must be a Tensor/)
    expectRefusal(call({ seed: -1 }), 'ERR_VALUE', 'sample', /seed/)
    expectRefusal(call({ seed: 0.5 }), 'ERR_VALUE', 'sample', /seed/)
    expectRefusal(call({ seed: 2 ** 53 }), 'ERR_VALUE', 'sample', /seed/)
    expectRefusal(call({ seed: undefined }), 'ERR_VALUE', 'sample', /seed/)
    expectRefusal(call({ temperature: -1 }), 'ERR_VALUE', 'sample', /temperature/)
    expectRefusal(call({ temperature: NaN }), 'ERR_VALUE', 'sample', /temperature/)
  })
})

interface Settings {
  temperature?: number
  topK?: number
  topP?: number
  minP?: number
  repetitionPenalty?: number
}

/** What is drawn from, in float64: the filters of Hugging Face's generation in its order. */
function filtered(x: ArrayLike<number>, s: Settings, history: readonly number[] = []) {
  const z = Float64Array.from(x)
  const penalty = s.repetitionPenalty ?? 1
  for (const token of new Set(history))
    z[token] = Math.fround(z[token]! >= 0 ? z[token]! / penalty : z[token]! * penalty)
  const max = z.reduce((m, v) => Math.max(m, v), -Infinity)
  const order = [...z.keys()].sort((i, j) => z[j]! - z[i]! || i - j)
  let kept = order.filter((i) => z[i]! > -Infinity)
  const { topK = 0, topP = 1, minP = 0, temperature = 1 } = s
  const weight = (i: number) => Math.exp((z[i]! - max) / temperature)
  if (topK > 0 && topK < kept.length) {
    const bound = z[kept[topK - 1]!]!
    kept = kept.filter((i) => z[i]! >= bound)
  }
  if (topP < 1) {
    const total = kept.reduce((sum, i) => sum + weight(i), 0)
    let before = 0
    kept = kept.filter((i, k) => {
      const stays = k === 0 || before < topP * total
      before += weight(i)
      return stays
    })
  }
  kept = kept.filter((i) => weight(i) >= minP)
  const p = new Float64Array(z.length)
  const total = kept.reduce((sum, i) => sum + weight(i), 0)
  for (const i of kept) p[i] = weight(i) / total
  return p
}

/** The token is where the seed's uniform number falls in the probabilities p. */
function expectToken(token: number, p: ArrayLike<number>, seed: number, what: string): void {
  let below = 0
  for (let i = 0; i < token; i++) below += p[i]!
  const u = uniform(seed, 0)
  // Weights err by the three f32 roundings of their exponent, of up to 40 where they still count.
  const slack = 1e-5
  expect(p[token], what).toBeGreaterThan(0)
  expect(u, what).toBeGreaterThanOrEqual(below - slack)
  expect(u, what).toBeLessThan(below + p[token]! + slack)
}

onEveryBackend('sampleTokens', (b) => {
  const settings: Settings[] = [
    {},
    { temperature: 0.7 },
    { topK: 20 },
    { topK: 1 },
    { topP: 0.8 },
    { topP: 0.999, temperature: 3 },
    { topP: 0 },
    { minP: 0.05 },
    { minP: 1 },
    { repetitionPenalty: 1.3 },
    { temperature: 0.7, topK: 20, topP: 0.8 },
    { temperature: 1.4, topK: 40, topP: 0.9, minP: 0.1, repetitionPenalty: 0.8 },
    { topK: 1e6, topP: 1, minP: 0 },
    { topK: 250, topP: 0.95 },
  ]
  // Log-probabilities: a logit's distance from the largest, of up to 40, in f32, and the logarithm of a sum.
  const bound = { absolute: 2e-5, relative: 1e-6 }
  for (const dtype of floats)
    for (const vocabulary of [1, 31, 1000, 5000])
      test(`${dtype}, ${vocabulary} tokens`, async () => {
        const random = new Random(vocabulary)
        const rows = settings.length
        const data = rounded(random.normals(rows * vocabulary, 3), dtype)
        const history = settings.map(() =>
          Array.from({ length: random.int(0, 9) }, () => random.int(0, vocabulary - 1)),
        )
        const seeds = settings.map(() => random.int(0, 2 ** 31))
        const each = (name: keyof Settings, other: number) => settings.map((s) => s[name] ?? other)
        const logits = b.device.tensor(data, [rows, vocabulary], dtype)
        const a = {
          logits,
          seeds,
          temperature: each('temperature', 1),
          topK: Int32Array.from(each('topK', 0)),
          topP: each('topP', 1),
          minP: each('minP', 0),
          repetitionPenalty: each('repetitionPenalty', 1),
          history,
        }
        using r = recorded(b, `sampleTokens ${dtype} ${vocabulary}`, bound, () => sampleTokens(a))
        const [tokens, logProbs, kept] = [
          await r.tokens.read(),
          await r.logProbs.read(),
          await r.logProbsFiltered.read(),
        ]
        const expected: number[][] = [[], []]
        settings.forEach((s, row) => {
          const x = data.subarray(row * vocabulary, (row + 1) * vocabulary)
          const token = tokens[row]!
          const p = filtered(x, s, history[row])
          expectToken(token, p, seeds[row]!, JSON.stringify(s))
          expected[0]!.push(Math.log(filtered(x, { temperature: s.temperature ?? 1 })[token]!))
          expected[1]!.push(Math.log(p[token]!))
        })
        expectClose(logProbs, expected[0]!, bound)
        expectClose(kept, expected[1]!, bound)

        // A row alone has the same results, bit for bit; on the CPU its log-probability is tokenLogProbs'.
        for (const row of [0, 4, 11]) {
          const s = settings[row]!
          const one = logits.slice(row, row + 1)
          using alone = sampleTokens({
            ...s,
            logits: one,
            seeds: [seeds[row]!],
            history: [history[row]!],
          })
          expect(await alone.tokens.read()).toEqual(tokens.slice(row, row + 1))
          expect(await alone.logProbs.read()).toEqual(logProbs.slice(row, row + 1))
          expect(await alone.logProbsFiltered.read()).toEqual(kept.slice(row, row + 1))
          const { temperature = 1 } = s
          using known = tokenLogProbs({ logits: one, targets: alone.tokens, temperature })
          if (b.name === 'cuda')
            expectClose(await alone.logProbs.read(), await known.logProbs.read(), bound)
          else expect(await alone.logProbs.read()).toEqual(await known.logProbs.read())
        }
      })

  test('a vocabulary of a language model, and equal logits at every bound', async () => {
    const vocabulary = 151_936
    const random = new Random(2)
    const normal = random.normals(vocabulary, 2)
    // Six values in all, so that thousands are equal where a filter cuts.
    const few = Float32Array.from({ length: vocabulary }, () => random.int(0, 5))
    const flat = new Float32Array(vocabulary)
    const rows = [normal, few, flat]
    const logits = b.device.tensor(Float32Array.from(rows.flatMap((x) => [...x])), [3, vocabulary])
    for (const s of [{}, { topK: 50 }, { topP: 0.7 }, { topK: 1000, topP: 0.5 }, { minP: 0.3 }]) {
      using r = sampleTokens({ logits, seeds: [5, 6, 7], ...s })
      const [tokens, kept] = [await r.tokens.read(), await r.logProbsFiltered.read()]
      rows.forEach((x, row) => {
        const p = filtered(x, s)
        expectToken(tokens[row]!, p, 5 + row, `${JSON.stringify(s)} ${row}`)
        expect(kept[row]).toBeCloseTo(Math.log(p[tokens[row]!]!), 4)
      })
    }
  })

  test('reference data: filters', async () => {
    const files = golden('lm_ops')
    const folder = 'lm_ops/sampling_filter/t1/'
    const meta = files.json(`${folder}meta.json`)
    const [rows, vocabulary] = meta.tensors.logits.shape as [number, number]
    const data = files.f32(`${folder}logits.bin`)
    const history = files.i32(`${folder}history.bin`)
    const probs = files.f32(`${folder}probs.bin`)
    const kept = files.i32(`${folder}kept.bin`)
    const draws = 40
    const copies = Array.from({ length: rows * draws }, (_, i) => Math.floor(i / draws))
    const logits = b.device.tensor(
      Float32Array.from(
        copies.flatMap((r) => [...data.subarray(r * vocabulary, (r + 1) * vocabulary)]),
      ),
      [copies.length, vocabulary],
    )
    const histories = copies.map((r) =>
      [...history.subarray(r * 12, (r + 1) * 12)].filter((token) => token >= 0),
    )
    for (const [c, config] of meta.configs.entries()) {
      using r = sampleTokens({
        logits,
        seeds: copies.map((_, i) => 1000 * c + i),
        temperature: config.temperature,
        topK: config.top_k,
        topP: config.top_p,
        minP: config.min_p,
        repetitionPenalty: config.repetition_penalty,
        history: histories,
      })
      const [tokens, logProbs] = [await r.tokens.read(), await r.logProbsFiltered.read()]
      tokens.forEach((token, i) => {
        const at = (c * rows + copies[i]!) * vocabulary
        const what = `config ${c}, row ${copies[i]}, token ${token}`
        expect(kept[at + token], what).toBe(1)
        const p = probs.subarray(at, at + vocabulary)
        expect(Math.abs(Math.exp(logProbs[i]!) - p[token]!), what).toBeLessThan(1e-6)
        expectToken(token, p, 1000 * c + i, what)
      })
    }
  })

  test('temperature 0 takes the first of the largest after the penalty', async () => {
    const logits = b.device.tensor([1, 5, 5, -Infinity, 2, 2, 2, 2, -1, -3, -2, -Infinity], [3, 4])
    const history = [[1], [], [0, 0]]
    using r = recorded(b, 'sampleTokens greedy', bound, () =>
      sampleTokens({
        logits,
        seeds: [1, 2, 3],
        temperature: 0,
        topP: 0.1,
        repetitionPenalty: 4,
        history,
      }),
    )
    expect([...(await r.tokens.read())]).toEqual([2, 0, 2])
    expect([...(await r.logProbsFiltered.read())]).toEqual([0, 0, 0])
    const expected = [
      [1, 5, 5, -Infinity],
      [2, 2, 2, 2],
      [-1, -3, -2, -Infinity],
    ].map((x, i) => Math.log(filtered(x, {})[[2, 0, 2][i]!]!))
    expectClose(await r.logProbs.read(), expected, bound)
    // Temperatures that leave nothing but the largest, and distances beyond f32.
    const far = b.device.tensor([-3e38, 3e38, 0, 1e-3], [2, 2])
    for (const temperature of [1e-30, 1e-6])
      for (const more of [{}, { topP: 0.5 }, { topK: 1 }, { minP: 0.5 }]) {
        using close = sampleTokens({ logits: far, seeds: [1, 2], temperature, ...more })
        expect([...(await close.tokens.read())]).toEqual([1, 1])
      }
    // So high that all are alike, but never -Infinity.
    const wide = b.device.tensor([0, -Infinity, 1, 0, -Infinity, 1], [2, 3])
    using hot = sampleTokens({ logits: wide, seeds: [1, 2], temperature: 1e30, topP: 0.6 })
    expectClose(await hot.logProbsFiltered.read(), [-Math.LN2, -Math.LN2], bound)
  })

  test('refuses NaN, +Infinity and rows of -Infinity', async () => {
    for (const row of [
      [1, NaN, 2],
      [NaN, -Infinity, -Infinity],
      [0, Infinity, 1],
      [-Infinity, -Infinity, -Infinity],
    ])
      for (const more of [{}, { temperature: 0 }, { topP: 0.5, history: [[], [0]] }]) {
        const logits = b.device.tensor([1, 2, 3, ...row], [2, 3])
        const title = `sampleTokens refuses ${row} ${Object.keys(more)}`
        const r = recorded(b, title, bound, () =>
          sampleTokens({ logits, seeds: [1, 2], repetitionPenalty: 2, ...more }),
        )
        const refusal = { code: 'ERR_VALUE', op: 'sampleTokens' }
        await expect(r.tokens.read()).rejects.toMatchObject(refusal)
        await expect(r.logProbs.read()).rejects.toMatchObject(refusal)
        await b.device.synchronize()
      }
  })

  test('accepts no rows and refuses mismatched arguments', () => {
    const logits = b.device.zeros([2, 3])
    const none = sampleTokens({ logits: b.device.zeros([0, 0]), seeds: [] })
    expect(none.tokens.shape).toEqual([0])
    const op = 'sampleTokens'
    const call = (a: object) => () => sampleTokens({ logits, seeds: [1, 2], ...a })
    expectRefusal(call({ logits: b.device.zeros([2, 0]) }), 'ERR_SHAPE', op, /vocabulary/)
    expectRefusal(call({ logits: b.device.zeros([2]) }), 'ERR_SHAPE', op)
    expectRefusal(call({ logits: b.device.zeros([2, 3], 'i32') }), 'ERR_DTYPE', op)
    expectRefusal(call({ seeds: [1] }), 'ERR_VALUE', op, /seeds must have one .* 2 rows, got 1/)
    expectRefusal(call({ seeds: [1, 0.5] }), 'ERR_VALUE', op, /seeds\[1\]/)
    expectRefusal(call({ seeds: 1 }), 'ERR_VALUE', op, /seeds/)
    expectRefusal(call({ temperature: -1 }), 'ERR_VALUE', op, /temperature\[0\]/)
    expectRefusal(call({ temperature: [1] }), 'ERR_VALUE', op, /temperature must have one/)
    expectRefusal(call({ temperature: '1' }), 'ERR_VALUE', op, /temperature/)
    expectRefusal(call({ topK: 1.5 }), 'ERR_VALUE', op, /topK\[0\]/)
    expectRefusal(call({ topP: [0.5, 1.1] }), 'ERR_VALUE', op, /topP\[1\] must be from 0 to 1/)
    expectRefusal(call({ minP: NaN }), 'ERR_VALUE', op, /minP\[0\]/)
    expectRefusal(call({ repetitionPenalty: 0 }), 'ERR_VALUE', op, /repetitionPenalty.*above 0/)
    expectRefusal(call({ history: [[1]] }), 'ERR_VALUE', op, /history must have one/)
    expectRefusal(call({ history: [[1], [3]] }), 'ERR_VALUE', op, /history\[1\]\[0\].*0 to 2/)
    expectRefusal(call({ history: [[1], null] }), 'ERR_VALUE', op, /history\[1\]/)
    expectRefusal(call({ topk: 1 }), 'ERR_VALUE', op, /'topK'/)
  })
})

describe('sampleTokens', () => {
  test('tokens are equal on every instruction set and thread count', async () => {
    const logits = rounded(new Random(21).normals(100 * 3000, 4), 'f16')
    const seeds = Array.from({ length: 100 }, (_, i) => i)
    const a = { seeds, topK: seeds.map((i) => 10 * (i % 3)), topP: 0.9, temperature: 0.9 }
    const results = new Set<string>()
    for (const { options } of cpuPaths)
      for (const threads of [1, 3]) {
        using device = openDevice('cpu', { ...options, threads })
        for (const dtype of ['f32', 'f16'] as const) {
          const x = device.tensor(logits, [100, 3000], dtype)
          results.add(String(await sampleTokens({ ...a, logits: x }).tokens.read()))
        }
      }
    expect(results.size).toBe(1)
  })
})

describe('sample', () => {
  test('draws are equal on every instruction set and thread count', async () => {
    const logits = rounded(new Random(20).normals(257 * 2000, 4), 'f16')
    const results = new Set<string>()
    for (const { options } of cpuPaths)
      for (const threads of [1, 3]) {
        using device = openDevice('cpu', { ...options, threads })
        for (const dtype of ['f32', 'f16'] as const) {
          const x = device.tensor(logits, [257, 2000], dtype)
          results.add(String(await sample({ logits: x, temperature: 0.9, seed: 99 }).read()))
        }
      }
    expect(results.size).toBe(1)
  })
})
