import { openDevice, sample } from 'p2r-kernels'
import { describe, expect, test } from 'vitest'
import {
  cpuPaths,
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
        await expect(b.device.synchronize()).rejects.toMatchObject({ op: 'sample' })
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
