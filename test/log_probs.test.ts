import {
  type Device,
  mergeLogProbs,
  openDevice,
  scope,
  type Tensor,
  tokenLogProbs,
  tokenLogProbsBackward,
  tokenLogProbsShard,
} from 'p2r-kernels'
import { expect, test } from 'vitest'
import { grpoCases } from './golden.js'
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

interface Row {
  logProb: number
  maximum: number
  logSum: number
  entropy: number
  squared: number
}

// The definition, in float64.
function oracle(z: ArrayLike<number>, target: number, temperature: number): Row {
  let maximum = -Infinity
  for (let j = 0; j < z.length; j++) maximum = Math.max(maximum, z[j]! / temperature)
  let sum = 0
  let moment = 0
  let squares = 0
  for (let j = 0; j < z.length; j++) {
    const d = z[j]! / temperature - maximum
    sum += Math.exp(d)
    squares += Math.exp(2 * d)
    if (d > -Infinity) moment += Math.exp(d) * d
  }
  const logSum = Math.log(sum)
  const logProb = z[target]! / temperature - maximum - logSum
  return { logProb, maximum, logSum, entropy: logSum - moment / sum, squared: squares / sum ** 2 }
}

function logitGradient(
  z: ArrayLike<number>,
  target: number,
  temperature: number,
  g: number,
  h: number,
) {
  const { maximum, logSum, entropy } = oracle(z, target, temperature)
  return Float64Array.from(z, (x, j) => {
    const logP = x / temperature - maximum - logSum
    const p = Math.exp(logP)
    const spread = p === 0 ? 0 : p * (logP + entropy)
    return (g * ((j === target ? 1 : 0) - p) - h * spread) / temperature
  })
}

// Sums of V terms in f32 runs, joined in f64 or by a tree: some ten roundings of a sum, and two in
// each exponential, over the sum itself: 1e-6 of log s, and as much of an entropy of some 10 nats.
const forward = { absolute: 5e-6, relative: 1e-6 }
// A probability carries the error of its exponent (|log p| up to 20, in f32), and the result one
// rounding to its type. The terms of the two gradients may cancel, and log p + H, each good to some
// 1e-5, is multiplied by p: of size 1 / columns.
const backward = (dtype: keyof typeof roundoff, columns: number) => ({
  absolute: 1e-7 + 2e-5 / columns,
  relative: 1e-5 + roundoff[dtype],
})

interface Case {
  rows: number
  columns: number
  temperature: number
}
const cases: Case[] = [
  { rows: 5, columns: 1, temperature: 1 },
  { rows: 4, columns: 33, temperature: 0.6 },
  { rows: 7, columns: 1031, temperature: 1 },
  { rows: 3, columns: 8193, temperature: 1.7 },
  { rows: 2, columns: 33001, temperature: 1 },
]

function inputs(c: Case, dtype: keyof typeof roundoff, seed = 1) {
  const random = new Random(seed + c.columns)
  const z = rounded(random.normals(c.rows * c.columns, 4), dtype)
  const targets = Int32Array.from({ length: c.rows }, () => random.int(0, c.columns - 1))
  return { z, targets, row: (i: number) => z.subarray(i * c.columns, (i + 1) * c.columns) }
}

onEveryBackend('log_probs', (b) => {
  const i32 = (x: number[] | Int32Array): Tensor => b.device.tensor(Int32Array.from(x), [x.length])
  const f32 = (x: ArrayLike<number>): Tensor => b.device.tensor(Float32Array.from(x), [x.length])

  for (const dtype of floats)
    for (const c of cases) {
      const title = `${dtype} [${c.rows}, ${c.columns}] temperature ${c.temperature}`

      test(title, async () => {
        const { z, targets, row } = inputs(c, dtype)
        const logits = b.device.tensor(z, [c.rows, c.columns], dtype)
        const rows = Array.from(targets, (t, i) => oracle(row(i), t, c.temperature))
        using r = recorded(b, `log probs ${title}`, forward, () =>
          tokenLogProbs({
            logits,
            targets: i32(targets),
            temperature: c.temperature,
            entropy: true,
          }),
        )
        expectClose(
          await r.logProbs.read(),
          rows.map((x) => x.logProb),
          forward,
        )
        expectClose(
          await r.stats.read(),
          rows.flatMap((x) => [x.maximum, x.logSum]),
          forward,
        )
        expectClose(
          await r.entropy!.read(),
          rows.map((x) => x.entropy),
          forward,
        )
        // A ratio of two such sums, of some ten roundings and two exponentials each.
        const share = { absolute: 1e-30, relative: 5e-6 }
        using s = recorded(b, `squared probs ${title}`, forward, () =>
          tokenLogProbs({
            logits,
            targets: i32(targets),
            temperature: c.temperature,
            squaredProbs: true,
          }),
        )
        expectClose(
          await s.squaredProbs.read(),
          rows.map((x) => x.squared),
          share,
        )
        expect(await s.logProbs.read()).toEqual(await r.logProbs.read())
        expect(await s.stats.read()).toEqual(await r.stats.read())

        const random = new Random(3)
        const g = random.normals(c.rows)
        const h = random.normals(c.rows)
        const bound = backward(dtype, c.columns)
        using d = recorded(b, `log probs backward ${title}`, bound, () =>
          tokenLogProbsBackward({
            logits,
            targets: i32(targets),
            stats: r.stats,
            dLogProbs: f32(g),
            entropy: r.entropy!,
            dEntropy: f32(h),
            temperature: c.temperature,
          }),
        )
        const expected = Array.from(targets, (t, i) => [
          ...logitGradient(row(i), t, c.temperature, g[i]!, h[i]!),
        ]).flat()
        expectClose(await d.toFloat32(), expected, bound)
      })
    }

  test('the gradient matches finite differences', async () => {
    const c = { rows: 1, columns: 40, temperature: 0.8 }
    const { z, targets } = inputs(c, 'f32')
    const logits = b.device.tensor(z, [1, 40])
    const r = tokenLogProbs({ logits, targets: i32(targets), temperature: 0.8, entropy: true })
    const d = tokenLogProbsBackward({
      logits,
      targets: i32(targets),
      stats: r.stats,
      dLogProbs: f32([1.5]),
      entropy: r.entropy!,
      dEntropy: f32([-0.7]),
      temperature: 0.8,
    })
    const f = (x: Float64Array): number => {
      const row = oracle(x, targets[0]!, 0.8)
      return 1.5 * row.logProb - 0.7 * row.entropy
    }
    expectGradient(f, z, await d.read(), { absolute: 1e-6, relative: 1e-5, entries: 40 })
  })

  for (const golden of grpoCases('logprob'))
    test(`golden ${golden.group}.${golden.id}`, async () => {
      const { shape, data, dtype } = golden.input('logits')
      const type = dtype === 'bf16' ? 'bf16' : 'f32'
      const n = shape[0]!
      const { temperature } = golden.params
      const record = <R>(name: string, bound: object, f: () => R): R =>
        recorded(b, `golden ${golden.group}.${golden.id} ${name}`, bound, f)
      const logits = b.device.tensor(data as Float32Array, shape, type)
      const targets = i32(golden.input('labels').data as Int32Array)
      // The golden's suggestion, for any f32 kernel.
      const bound = { absolute: 2e-5, relative: 2e-6 }
      const r = record('forward', bound, () =>
        tokenLogProbs({ logits, targets, temperature, entropy: true }),
      )
      expectClose(await r.logProbs.read(), golden.output('logp').values, bound)
      expectClose(await r.entropy!.read(), golden.output('entropy').values, bound)
      const stats = await r.stats.read()
      const lse = Array.from({ length: n }, (_, i) => stats[2 * i]! + stats[2 * i + 1]!)
      expectClose(lse, golden.output('lse').values, bound)

      const fine = { absolute: 1e-6, relative: 1e-5 + roundoff[type] }
      const upstream = {
        logits,
        targets,
        temperature,
        stats: r.stats,
        dLogProbs: f32(golden.input('g_logp').values),
      }
      const d = record('backward', fine, () =>
        tokenLogProbsBackward({
          ...upstream,
          entropy: r.entropy!,
          dEntropy: f32(golden.input('g_entropy').values),
        }),
      )
      expectClose(await d.toFloat32(), golden.output('dlogits').values, fine)
      if (golden.has('dlogits_logp_only')) {
        const only = tokenLogProbsBackward({ ...upstream, inPlace: true })
        expectClose(await only.toFloat32(), golden.output('dlogits_logp_only').values, fine)
      }
    })

  for (const shards of [1, 2, 3, 8])
    for (const dtype of floats)
      test(`${dtype} vocabulary split ${shards} ways`, async () => {
        const c = { rows: 6, columns: 1003, temperature: 0.9 }
        const { z, row } = inputs(c, dtype, shards)
        z.fill(-Infinity, 0, 500) // a shard without any probability
        const targets = [700, 999, -100, 0, 1002, 501]
        const g = [1, -2, 3, 0.5, 0, 1]
        const h = [0, 1, 2, -1, 0, 0.5]
        const cuts = Array.from({ length: shards + 1 }, (_, k) =>
          Math.floor((k * c.columns) / shards),
        )
        const parts = cuts.slice(1).map((end, k) => {
          const width = end - cuts[k]!
          const part = new Float32Array(c.rows * width)
          for (let i = 0; i < c.rows; i++) part.set(row(i).subarray(cuts[k], end), i * width)
          return b.device.tensor(part, [c.rows, width], dtype)
        })
        const shard = (k: number) => ({
          logits: parts[k]!,
          targets: i32(targets),
          vocabOffset: cuts[k]!,
          temperature: 0.9,
        })
        // Stats and targets travel as f32: at |x| of some 20 they lose up to 1e-6 each.
        const bound = { absolute: 1e-5, relative: 2e-6 }
        const done = recorded(b, `log probs of ${shards} shards ${dtype}`, bound, () =>
          mergeLogProbs(parts.map((_, k) => tokenLogProbsShard({ ...shard(k), entropy: true }))),
        )
        const skipped = { logProb: 0, maximum: 0, logSum: 0, entropy: 0, squared: 0 }
        const rows = targets.map((t, i) => (t === -100 ? skipped : oracle(row(i), t, 0.9)))
        expectClose(
          await done.logProbs.read(),
          rows.map((x) => x.logProb),
          bound,
        )
        expectClose(
          await done.stats.read(),
          rows.flatMap((x) => [x.maximum, x.logSum]),
          bound,
        )
        expectClose(
          await done.entropy!.read(),
          rows.map((x) => x.entropy),
          bound,
        )

        const without = mergeLogProbs(parts.map((_, k) => tokenLogProbsShard(shard(k))))
        expect(await without.logProbs.read()).toEqual(await done.logProbs.read())
        expect('entropy' in without).toBe(false)

        for (let k = 0; k < shards; k++) {
          const fine = { absolute: 1e-7, relative: 2e-5 + roundoff[dtype] }
          const d = recorded(
            b,
            `log probs backward of shard ${k} of ${shards} ${dtype}`,
            fine,
            () =>
              tokenLogProbsBackward({
                ...shard(k),
                stats: done.stats,
                dLogProbs: f32(g),
                entropy: done.entropy!,
                dEntropy: f32(h),
              }),
          )
          const expected = targets.flatMap((t, i) =>
            t === -100
              ? Array<number>(cuts[k + 1]! - cuts[k]!).fill(0)
              : [...logitGradient(row(i), t, 0.9, g[i]!, h[i]!).subarray(cuts[k], cuts[k + 1])],
          )
          expectClose(await d.toFloat32(), expected, fine)
        }
      })

  test('a row is bitwise independent of its batch and of the number of threads', async () => {
    const columns = 40_001 // odd, so that rows start at every alignment
    for (const dtype of floats) {
      const { z, targets } = inputs({ rows: 5, columns, temperature: 1 }, dtype)
      const run = async (device: Device, from: number, to: number) => {
        const logits = device.tensor(
          z.slice(from * columns, to * columns),
          [to - from, columns],
          dtype,
        )
        const t = device.tensor(targets.slice(from, to), [to - from])
        const r = tokenLogProbs({ logits, targets: t, entropy: true })
        const dLogProbs = device.tensor(new Float32Array(to - from).fill(1), [to - from])
        const d = tokenLogProbsBackward({ logits, targets: t, stats: r.stats, dLogProbs })
        const rows = await Promise.all([r.logProbs, r.stats, r.entropy!, d].map((x) => x.read()))
        return rows.map((x) => Array.from(x))
      }
      const all = await run(b.device, 0, 5)
      for (let i = 0; i < 5; i++) {
        const one = await run(b.device, i, i + 1)
        one.forEach((x, k) => {
          const whole = all[k]!
          expect(x).toEqual(whole.slice((i * whole.length) / 5, ((i + 1) * whole.length) / 5))
        })
      }
      if (b.device.info.backend !== 'cpu') continue
      for (const threads of [1, 3]) {
        using device = b.open({ threads })
        expect(await run(device, 0, 5)).toEqual(all)
      }
    }
  })

  test('the entropy does not change a bit of the log-probability', async () => {
    for (const dtype of floats) {
      const c = { rows: 2, columns: 8200, temperature: 0.7 }
      const { z, targets } = inputs(c, dtype)
      const logits = b.device.tensor(z, [c.rows, c.columns], dtype)
      const a = { logits, targets: i32(targets), temperature: c.temperature }
      const without = recorded(b, `log probs without entropy ${dtype}`, forward, () =>
        tokenLogProbs(a),
      )
      const both = tokenLogProbs({ ...a, entropy: true })
      expect(await without.logProbs.read()).toEqual(await both.logProbs.read())
      expect(await without.stats.read()).toEqual(await both.stats.read())
      // Without a gradient of the entropy the backward pass takes another path, too.
      const bound = backward(dtype, c.columns)
      const d = recorded(b, `log probs backward without entropy ${dtype}`, bound, () =>
        tokenLogProbsBackward({ ...a, stats: without.stats, dLogProbs: f32([1.5, -0.5]) }),
      )
      const row = (i: number) => z.subarray(i * c.columns, (i + 1) * c.columns)
      const expected = [1.5, -0.5].flatMap((g, i) => [
        ...logitGradient(row(i), targets[i]!, 0.7, g, 0),
      ])
      expectClose(await d.toFloat32(), expected, bound)
    }
  })

  test('skipped rows, and rows without gradient, are not read', async () => {
    const logits = b.device.tensor(new Float32Array(12).fill(NaN), [3, 4])
    const targets = i32([-100, -100, 1])
    using r = tokenLogProbs({ logits, targets, entropy: true })
    expect(Array.from(await r.logProbs.read())).toEqual([0, 0, NaN])
    expect(Array.from(await r.entropy!.read())).toEqual([0, 0, NaN])
    using s = tokenLogProbs({ logits, targets, squaredProbs: true })
    expect(Array.from(await s.squaredProbs.read())).toEqual([0, 0, NaN])
    expect(Array.from(await r.stats.read()).slice(0, 4)).toEqual([0, 0, 0, 0])
    using d = tokenLogProbsBackward({ logits, targets, stats: r.stats, dLogProbs: f32([1, 2, 0]) })
    expect(Array.from(await d.read())).toEqual(Array(12).fill(0))
    await b.device.synchronize() // nothing of this is a fault
  })

  test('rows without a softmax are NaN, without a fault', async () => {
    const inf = Infinity
    const rows = [
      [-inf, -inf, -inf, -inf],
      [0, inf, 1, 2],
      [0, NaN, 1, 2],
      [-inf, NaN, -inf, -inf],
      [-inf, 3, -inf, -inf],
      [1e30, -1e30, 3e38, -3e38],
    ]
    const logits = f32(rows.flat()).reshape([6, 4])
    const targets = i32([0, 0, 0, 0, 1, 2])
    using r = recorded(b, 'log probs without a softmax', forward, () =>
      tokenLogProbs({ logits, targets, entropy: true }),
    )
    expect(Array.from(await r.logProbs.read())).toEqual([NaN, NaN, NaN, NaN, 0, 0])
    expect(Array.from(await r.entropy!.read())).toEqual([NaN, NaN, NaN, NaN, 0, 0])
    using s = recorded(b, 'squared probs without a softmax', forward, () =>
      tokenLogProbs({ logits, targets, squaredProbs: true }),
    )
    expect(Array.from(await s.squaredProbs.read())).toEqual([NaN, NaN, NaN, NaN, 1, 1])
    const halves = [0, 2].map((from) =>
      tokenLogProbsShard({
        logits: f32(rows.flatMap((x) => x.slice(from, from + 2))).reshape([6, 2]),
        targets,
        vocabOffset: from,
        entropy: true,
      }),
    )
    const joined = mergeLogProbs(halves)
    expect(Array.from(await joined.logProbs.read())).toEqual([NaN, NaN, NaN, NaN, 0, 0])
    expect(Array.from(await joined.entropy!.read())).toEqual([NaN, NaN, NaN, NaN, 0, 0])
    await b.device.synchronize()
  })

  for (const target of [-1, 4, -101, 2 ** 31 - 1])
    test(`a target of ${target} among four faults`, async () => {
      const logits = b.device.tensor(new Random(1).normals(8), [2, 4])
      const good = tokenLogProbs({ logits, targets: i32([1, 2]) })
      const r = recorded(b, `log probs of target ${target}`, forward, () =>
        tokenLogProbs({ logits, targets: i32([1, target]) }),
      )
      const fault = { code: 'ERR_VALUE', op: 'tokenLogProbs' }
      await expect(r.logProbs.read()).rejects.toMatchObject(fault)
      await expect(r.stats.read()).rejects.toMatchObject(fault)
      await b.device.synchronize()
      const gradient = { logits, stats: good.stats, dLogProbs: f32([1, 1]) }
      const d = recorded(b, `log probs backward of target ${target}`, forward, () =>
        tokenLogProbsBackward({ ...gradient, targets: i32([1, target]) }),
      )
      await expect(d.read()).rejects.toMatchObject({ ...fault, op: 'tokenLogProbsBackward' })
      await b.device.synchronize()
      const part = tokenLogProbsShard({ logits, targets: i32([1, target]), vocabOffset: 0 })
      if (target < 0) {
        const where = { ...fault, op: 'tokenLogProbsShard' }
        await expect(part.stats.read()).rejects.toMatchObject(where)
        await b.device.synchronize()
      } else expect((await part.targetLogit.read())[1]).toBe(-Infinity)
      expect((await good.logProbs.read()).length).toBe(2)
    })

  test('in place: the same storage, and no allocation', async () => {
    const c = { rows: 64, columns: 4096, temperature: 1 }
    const { z, targets } = inputs(c, 'bf16')
    const logits = b.device.tensor(z, [64, 4096], 'bf16')
    const t = i32(targets)
    const r = tokenLogProbs({ logits, targets: t })
    const dLogProbs = f32(new Random(5).normals(64))
    const apart = tokenLogProbsBackward({ logits, targets: t, stats: r.stats, dLogProbs })
    b.device.resetPeak()
    const before = b.device.memory()
    const d = tokenLogProbsBackward({
      logits,
      targets: t,
      stats: r.stats,
      dLogProbs,
      inPlace: true,
    })
    const after = b.device.memory()
    expect(after.liveBytes).toBeLessThanOrEqual(before.liveBytes)
    expect(after.peakBytes).toBeLessThanOrEqual(before.peakBytes)
    expect(await d.read()).toEqual(await apart.read())
    expect(await logits.read()).toEqual(await apart.read())
    logits.dispose()
    expect((await d.read()).length).toBe(64 * 4096) // a handle of its own
  })

  test('the forward pass allocates its results and a few numbers per span of a row', () => {
    const [n, v] = [32, 65536]
    const logits = b.device.zeros([n, v], 'bf16')
    const targets = b.device.zeros([n], 'i32')
    b.device.resetPeak()
    const before = b.device.memory().peakBytes
    tokenLogProbs({ logits, targets, entropy: true }).dispose()
    const results = 4 * n * 4
    // Three f32 a span of the vocabulary, of which there are 128 at most (CPU); blocks are rounded up to the next
    // class of sizes, of which there are four a power of two.
    const spans = Math.ceil(1.25 * n * 128 * 12)
    expect(b.device.memory().peakBytes - before).toBeLessThanOrEqual(results + spans + 4 * 512)
    logits.dispose()
  })

  test('empty sizes', async () => {
    const none = b.device.zeros([0], 'i32')
    using r = tokenLogProbs({ logits: b.device.zeros([0, 9]), targets: none, entropy: true })
    expect([r.logProbs.shape, r.stats.shape, r.entropy!.shape]).toEqual([[0], [0, 2], [0]])
    const d = tokenLogProbsBackward({
      logits: b.device.zeros([0, 9], 'f16'),
      targets: none,
      stats: r.stats,
      dLogProbs: b.device.zeros([0]),
    })
    expect([d.shape, d.dtype]).toEqual([[0, 9], 'f16'])
    const empty = tokenLogProbsShard({
      logits: b.device.zeros([2, 0]),
      targets: i32([1, -100]),
      vocabOffset: 4,
      entropy: true,
    })
    const inf = Infinity
    expect(Array.from(await empty.stats.read())).toEqual([-inf, -inf, -inf, -inf])
    expect(Array.from(await empty.targetLogit.read())).toEqual([-inf, 0])
    const full = tokenLogProbsShard({
      logits: f32([0, 0, 0, 0, 9, 9, 9, 9]).reshape([2, 4]),
      targets: i32([1, -100]),
      vocabOffset: 0,
      entropy: true,
    })
    const joined = mergeLogProbs([empty, full])
    expectClose(await joined.logProbs.read(), [-Math.log(4), 0], forward)
    expectClose(await joined.entropy!.read(), [Math.log(4), 0], forward)
  })

  test('refuses invalid arguments', () =>
    scope(() => {
      const logits = b.device.zeros([2, 4])
      const targets = b.device.zeros([2], 'i32')
      const stats = b.device.zeros([2, 2])
      const dLogProbs = b.device.zeros([2])
      const a = { logits, targets }
      const op = 'tokenLogProbs'
      expectRefusal(
        () => tokenLogProbs({ ...a, logits: targets as Tensor }),
        'ERR_DTYPE',
        op,
        /got i32/,
      )
      expectRefusal(() => tokenLogProbs({ ...a, targets: dLogProbs as Tensor }), 'ERR_DTYPE', op)
      expectRefusal(() => tokenLogProbs({ ...a, logits: b.device.zeros([8]) }), 'ERR_SHAPE', op)
      expectRefusal(
        () => tokenLogProbs({ ...a, targets: b.device.zeros([3], 'i32') }),
        'ERR_SHAPE',
        op,
        /\[2\], got \[3\]/,
      )
      for (const temperature of [0, -1, NaN, Infinity])
        expectRefusal(() => tokenLogProbs({ ...a, temperature }), 'ERR_VALUE', op, /temperature/)
      expectRefusal(() => tokenLogProbs({ ...a, entropy: 1 as never }), 'ERR_VALUE', op)
      expectRefusal(() => tokenLogProbs({ ...a, squaredProbs: 1 as never }), 'ERR_VALUE', op)
      expectRefusal(
        () => tokenLogProbs({ ...a, entropy: true, squaredProbs: true }),
        'ERR_VALUE',
        op,
        /squaredProbs/,
      )
      expectRefusal(() => tokenLogProbs({ targets } as never), 'ERR_VALUE', op, /logits/)
      const back = 'tokenLogProbsBackward'
      const g = { ...a, stats, dLogProbs }
      expectRefusal(
        () => tokenLogProbsBackward({ ...g, dEntropy: dLogProbs } as never),
        'ERR_VALUE',
        back,
        /entropy/,
      )
      expectRefusal(() => tokenLogProbsBackward({ ...g, stats: dLogProbs }), 'ERR_SHAPE', back)
      expectRefusal(() => tokenLogProbsBackward({ ...g, vocabOffset: -1 }), 'ERR_VALUE', back)
      expectRefusal(
        () => tokenLogProbsBackward({ ...g, dLogProbs: b.device.zeros([1]) }),
        'ERR_SHAPE',
        back,
      )
      expectRefusal(
        () => tokenLogProbsShard({ ...a } as never),
        'ERR_VALUE',
        'tokenLogProbsShard',
        /vocabOffset/,
      )
      expectRefusal(() => mergeLogProbs([]), 'ERR_VALUE', 'mergeLogProbs')
      const one = tokenLogProbsShard({ ...a, vocabOffset: 0 })
      const two = tokenLogProbsShard({ ...a, vocabOffset: 4, entropy: true })
      expectRefusal(() => mergeLogProbs([one, two]), 'ERR_VALUE', 'mergeLogProbs', /moment/)
      using other = openDevice('cpu')
      expectRefusal(
        () => tokenLogProbs({ logits, targets: other.zeros([2], 'i32') }),
        'ERR_DEVICE',
        op,
      )
    }))
})
