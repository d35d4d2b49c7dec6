// Hostile calls: none ends the process, every refusal is a P2RError, and no result is silently wrong. What could
// end the process runs in one of its own.
import { spawn } from 'node:child_process'
import {
  adamW,
  attention,
  clipGradNorm,
  gatherRows,
  linearBackward,
  openDevice,
  sampleTokens,
  type Tensor,
  tokenLogProbs,
  tokenLogProbsBackward,
} from 'p2r-kernels'
import { expect, test } from 'vitest'
import { cpuPaths, expectClose, expectRefusal, onEveryBackend, Random } from './harness.js'

const library = new URL('../dist/lib/index.js', import.meta.url).href

/**
 * Runs the body in a process of its own, with `p` the library; what it returns comes back as JSON. `limits` are
 * arguments of the shell's ulimit.
 */
async function alone(body: string, limits = ''): Promise<unknown> {
  const code = `
    import * as p from '${library}'
    const refusal = (f) => { try { f(); return 'returned' } catch (e) { return e.name + ' ' + e.code } }
    const main = async () => { ${body} }
    process.stdout.write(JSON.stringify(await main()) ?? 'null')`
  const args = ['--input-type=module', '-e', code]
  const [command, all] = limits
    ? ['bash', ['-c', `ulimit ${limits}; exec "$@"`, 'bash', process.execPath, ...args]]
    : [process.execPath, args]
  const child = spawn(command as string, all as string[], { stdio: ['ignore', 'pipe', 'pipe'] })
  let [out, err] = ['', '']
  child.stdout.on('data', (text) => {
    out += text
  })
  child.stderr.on('data', (text) => {
    err += text
  })
  const [status, signal] = await new Promise<[unknown, unknown]>((resolve) =>
    child.on('close', (...ended) => resolve(ended)),
  )
  expect({ status, signal, err }).toEqual({ status: 0, signal: null, err: '' })
  return JSON.parse(out)
}

const open = `const d = p.openDevice('cpu'), z = (...s) => d.zeros(s);`

test('products with axes of 0 are empty or zero', async () => {
  const wrong = await alone(`${open}
    const wrong = []
    for (const dtype of ['f32', 'bf16'])
      for (const m of [0, 1, 97, 300]) for (const k of [0, 5, 600]) for (const n of [0, 4, 700]) {
        if (m && k && n) continue
        const ones = (...s) => d.tensor(new Float32Array(s[0] * s[1]).fill(1), s, dtype)
        const x = ones(m, k), weight = ones(n, k), dOut = ones(m, n)
        const { dX, dWeight } = p.linearBackward({ x, weight, dOut })
        for (const [name, t, shape] of [['out', p.linear({ x, weight }), [m, n]], ['dX', dX, [m, k]], ['dWeight', dWeight, [n, k]]])
          if (t.shape.join() !== shape.join() || (await t.toFloat32()).some((v) => v !== 0))
            wrong.push([name, dtype, m, k, n])
      }
    return wrong`)
  expect(wrong).toEqual([])
})

test('operations on empty tensors of large shapes return', async () => {
  const ended = await alone(`${open}
    const big = 2 ** 40, targets = d.tensor(new Int32Array(0), [0]), cuSeqlens = [0]
    const calls = {
      add: () => p.add({ x: z(big, 0), y: z(0) }),
      mul: () => p.mul({ x: z(big, 0), y: z(1, 1) }),
      sum: () => p.sum({ x: z(big, 0), axes: [0] }),
      concat: () => p.concat({ tensors: [z(0, big), z(0, big)] }),
      transpose: () => p.transpose({ x: z(big, 0) }),
      sampleTokens: () => p.sampleTokens({ logits: z(0, 2 ** 31 - 1), seeds: [] }).tokens,
      linear: () => p.linear({ x: z(0, 0), weight: z(big, 0) }),
      gelu: () => p.gelu({ x: z(big, 0) }),
      cast: () => z(big, 0).cast('f16'),
      layerNorm: () => p.layerNorm({ x: z(0, 8), weight: z(8), bias: z(8) }).out,
      rmsNorm: () => p.rmsNorm({ x: z(0, 8), weight: z(8) }).out,
      swiglu: () => p.swiglu({ gateUp: z(big, 0) }),
      meanPool: () => p.meanPool({ x: z(0, big), cuSeqlens }),
      meanPoolBackward: () => p.meanPoolBackward({ dOut: z(2, 0), cuSeqlens: [0, 2 ** 31 - 1, 2 ** 31 - 1] }),
      gatherRows: () => p.gatherRows({ x: z(big, 0), index: [0, big - 1] }),
      scatterRows: () => p.scatterRows({ x: z(big, 0), y: z(1, 0), index: [5] }),
      gatherRowsBackward: () => p.gatherRowsBackward({ dOut: z(0, 0), index: [], rows: 2 ** 31 - 1 }),
      logProbs: () => p.tokenLogProbs({ logits: z(0, big), targets }).stats,
      linearLogProbs: () => p.linearLogProbs({ hidden: z(0, 512), weight: z(0, 512), targets }).stats,
      sample: () => p.sample({ logits: z(0, 2 ** 31 - 1), seed: 1 }),
      attention: () => p.attention({ q: z(0, big, 8), k: z(0, big, 8), v: z(0, big, 8), cuSeqlens }).out,
      advantages: () => p.groupAdvantages({ rewards: z(0, big), groups: [], estimator: 'gdpo', lengths: [] }),
      adamW: () => (p.adamW({ params: [z(big, 0)], grads: [z(big, 0)], moments: [z(2, 0)], step: 1, lr: 1 }), z(0)),
      clip: () => p.clipGradNorm({ grads: [z(big, 0)], maxNorm: 1 }),
    }
    const ended = {}
    for (const [name, call] of Object.entries(calls)) {
      const t = call()
      await d.synchronize()
      ended[name] = t.size
    }
    return ended`)
  expect(ended).toEqual({
    add: 0,
    mul: 0,
    sum: 0,
    concat: 0,
    transpose: 0,
    sampleTokens: 0,
    linear: 0,
    gelu: 0,
    cast: 0,
    layerNorm: 0,
    rmsNorm: 0,
    swiglu: 0,
    meanPool: 0,
    meanPoolBackward: 0,
    gatherRows: 0,
    scatterRows: 0,
    gatherRowsBackward: 0,
    logProbs: 0,
    linearLogProbs: 0,
    sample: 0,
    attention: 0,
    advantages: 0,
    adamW: 0,
    clip: 1,
  })
})

test('sizes of results that overflow are ERR_MEMORY', async () => {
  const refusals = await alone(`${open}
    const w = z(0)
    return [
      () => p.layerNorm({ x: z(2 ** 31, 2 ** 31, 0), weight: w, bias: w }),
      () => p.layerNorm({ x: z(2 ** 50, 0), weight: w, bias: w }),
      () => p.linear({ x: z(2 ** 31, 2 ** 31, 0), weight: z(4, 0) }),
      () => p.linear({ x: z(2 ** 30, 2 ** 30, 0), weight: z(3, 0) }),
      () => p.linear({ x: z(2 ** 30, 2 ** 20, 0), weight: z(3, 0) }),
      () => p.meanPool({ x: z(0, 2 ** 50), cuSeqlens: new Int32Array(16385) }),
      () => p.meanPoolBackward({ dOut: z(1, 2 ** 40), cuSeqlens: [0, 2 ** 31 - 1] }),
      () => p.gatherRowsBackward({ dOut: z(0, 2 ** 50), index: [], rows: 16384 }),
      () => p.gatherRowsBackward({ dOut: z(0, 2 ** 31 + 1, 2 ** 31), index: [], rows: 4 }),
      () => p.concat({ tensors: [z(2 ** 40, 0, 2 ** 10), z(2 ** 40, 0, 2 ** 10)] }),
      () => p.mul({ x: z(2 ** 40, 1, 0), y: z(2 ** 15, 1) }),
      () => z(2 ** 52, 4),
      () => z(2 ** 40),
      () => w.reshape([2 ** 31, 2 ** 31, 0]),
      () => d.tensor([], [2 ** 50, 2, 0]),
    ].map(refusal)`)
  expect(refusals).toEqual(new Array(15).fill('P2RError ERR_MEMORY'))
})

test('a getter in an argument that disposes or grows what the call reads', async () => {
  const ended = await alone(`
    const first = (get, rest = []) => Object.defineProperty([0, ...rest], 0, { get })
    const results = {}
    for (const [name, call] of Object.entries({
      reshape: (d) => { const t = d.zeros([4]); return t.reshape(first(() => (t.dispose(), 4))) },
      zeros: (d) => d.zeros(first(() => (d.dispose(), 4))),
      tensor: (d) => d.tensor(new Float32Array(4), first(() => (d.dispose(), 4))),
      grows: (d) => {
        const shape = first(() => { for (let i = 1; i < 5000; i++) shape[i] = 1; return 1 })
        return { ...d.zeros(shape).shape }
      },
      index: (d) => p.gatherRows({ x: d.zeros([4, 4]), index: first(() => (d.dispose(), 1)) }),
      cuSeqlens: (d) => p.meanPool({ x: d.zeros([4, 4]), cuSeqlens: first(() => (d.dispose(), 0), [4]) }),
      elements: (d) => d.tensor(first(() => (d.dispose(), 1)), [1]),
      list: (d) => { const g = d.zeros([4]); return p.clipGradNorm({ grads: first(() => (g.dispose(), g)), maxNorm: 1 }) },
      map: (d) => {
        const grads = [d.zeros([1000]), d.zeros([10])]
        grads.map = () => { throw new Error('a method of the list was called') }
        return p.clipGradNorm({ grads, maxNorm: 1 }).shape
      },
    })) {
      const d = p.openDevice('cpu', { threads: 2 })
      try { results[name] = JSON.stringify(call(d)) } catch (e) { results[name] = e.name + ' ' + e.code }
      if (!d.handle.disposed) await d.synchronize()
    }
    return results`)
  const disposed = 'P2RError ERR_DISPOSED'
  expect(ended).toEqual({
    reshape: disposed,
    zeros: disposed,
    tensor: disposed,
    grows: '{"0":1}',
    index: disposed,
    cuSeqlens: disposed,
    elements: disposed,
    list: disposed,
    map: '[1]',
  })
})

test('a host without room for what is read or converted is ERR_MEMORY, and the device goes on', async () => {
  const ended = await alone(
    `${open}
    const t = d.zeros([3e8], 'u8'), all = [], results = []
    const until = async (f) => {
      for (let i = 0; i < 20; i++)
        try { all.push(await f()) } catch (e) { return results.push([e.name, e.code, e.op]) }
      results.push('the limit was not reached')
    }
    await until(() => t.read())
    await until(() => d.tensor({ length: 2e8, __proto__: Array.prototype }, [2e8]))
    const sparse = []
    sparse.length = 2e8
    await until(() => d.tensor(sparse, [2e8]))
    await until(() => d.zeros([1e8], 'f16').toFloat32())
    results.push((await d.zeros([4]).read()).length)
    return results`,
    '-v 3000000',
  )
  expect(ended).toEqual([
    ['P2RError', 'ERR_MEMORY', 'read'],
    ['P2RError', 'ERR_VALUE', 'tensor'],
    ['P2RError', 'ERR_MEMORY', 'tensor'],
    ['P2RError', 'ERR_MEMORY', expect.stringMatching(/^(read|cast|zeros)$/)],
    4,
  ])
})

test('a host without room for threads is ERR_MEMORY, and the next device opens', async () => {
  const ended = await alone(
    `const many = refusal(() => p.openDevice('cpu', { threads: 1024 }))
    return [many, p.openDevice('cpu', { threads: 2 }).info.threads]`,
    '-v 3000000',
  )
  expect(ended).toEqual(['P2RError ERR_MEMORY', 2])
})

test('attention of logits beyond 3e10 on every instruction set: lse is the largest logit', async () => {
  const random = new Random(1)
  for (const { options } of cpuPaths) {
    using device = openDevice('cpu', options)
    for (const causal of [false, true])
      for (const tokens of [5, 40, 300])
        for (const magnitude of [1e3, 1e12, 1e17, 3e18]) {
          const x = Float32Array.from({ length: tokens * 16 }, (_, i) =>
            i % 16 ? 0 : Math.fround(magnitude * (1 + random.uniform())),
          )
          using q = device.tensor(x, [tokens, 1, 16])
          const { out, lse } = attention({
            q,
            k: q,
            v: q,
            cuSeqlens: [0, tokens],
            scale: 1,
            causal,
          })
          const first = x.filter((_, i) => i % 16 === 0)
          const largest = first.map((_, t) => Math.max(...(causal ? first.slice(0, t + 1) : first)))
          expectClose(
            await lse.read(),
            first.map((y, t) => y * largest[t]!),
            {
              relative: 2 ** -18,
            },
          )
          const weighted = (await out.read()).filter((_, i) => i % 16 === 0)
          // The weight of the largest logit is 1.
          if (magnitude > 1e10) expectClose(weighted, largest, { relative: 2 ** -18 })
          expect(weighted.every(Number.isFinite)).toBe(true)
        }
  }
})

onEveryBackend('hostile arguments', (b) => {
  const f32 = (x: number[], shape = [x.length]): Tensor<'f32'> => b.device.tensor(x, shape)

  test('what is written must not share memory with any other argument', () => {
    const storage = b.device.zeros([4096])
    const at = (first: number, n: number, shape = [n]) =>
      storage.slice(first, first + n).reshape(shape)
    const step = (params: Tensor, grads: Tensor, moments: Tensor) => () =>
      adamW({ params: [params], grads: [grads], moments: [moments], step: 1, lr: 1e-3 })
    const shared = /must not share memory with/
    const moments = at(2048, 256, [2, 128])
    expectRefusal(step(at(0, 128), at(1, 128), moments), 'ERR_VALUE', 'adamW', shared)
    expectRefusal(step(at(0, 128), at(0, 128), moments), 'ERR_VALUE', 'adamW', shared)
    expectRefusal(step(at(0, 128), at(2303, 128), moments), 'ERR_VALUE', 'adamW', /moments\[0\]/)
    step(at(0, 128), at(128, 128), moments)()

    const targets = b.device.zeros([4], 'i32')
    const backward = (logits: Tensor, stats: Tensor, dLogProbs: Tensor) => () =>
      tokenLogProbsBackward({ logits, targets, stats, dLogProbs, inPlace: true })
    const logits = at(0, 400, [4, 100])
    const apart = at(500, 8, [4, 2])
    const refused = (f: () => unknown, name: RegExp) =>
      expectRefusal(f, 'ERR_VALUE', 'tokenLogProbsBackward', name)
    refused(backward(logits, apart, at(399, 4)), /dLogProbs must not share memory with logits/)
    refused(backward(logits, at(0, 8, [4, 2]), at(600, 4)), /share memory/)
    backward(logits, apart, at(400, 4))()

    const into = { dWeight: at(0, 6, [2, 3]) }
    const [x, weight, dOut] = [at(5, 12, [4, 3]), at(100, 6, [2, 3]), at(200, 8, [4, 2])]
    expectRefusal(
      () => linearBackward({ x, weight, dOut, into }),
      'ERR_VALUE',
      'linearBackward',
      /x must not share memory with into.dWeight/,
    )
    expectRefusal(
      () => clipGradNorm({ grads: [at(0, 10), at(20, 10), at(9, 2)], maxNorm: 1 }),
      'ERR_VALUE',
      'clipGradNorm',
      /grads\[2\] must not share memory with grads\[0\]/,
    )
  })

  test('lists of integers hold numbers only', () => {
    const x = f32([1, 2])
    for (const index of [[null], [''], [false], ['0'], [0n], [{}], { length: -1 }, { length: 1.5 }])
      expectRefusal(() => gatherRows({ x, index: index as never }), 'ERR_VALUE', 'gatherRows')
    expectRefusal(() => gatherRows({ x, index: { length: 2 ** 52 } }), 'ERR_MEMORY', 'gatherRows')
  })

  test('clipGradNorm without a limit leaves gradients that are not finite', async () => {
    const grads = [f32([Infinity, 1, 2]), f32([NaN, -3])]
    const norm = await clipGradNorm({ grads, maxNorm: Infinity }).read()
    expect(norm[0]).toBeNaN()
    expect([...(await grads[0]!.read())]).toEqual([Infinity, 1, 2])
    expect([...(await grads[1]!.read())]).toEqual([NaN, -3])
  })

  test('lists of numbers hold numbers only', () => {
    for (const list of [
      [null],
      [''],
      [true],
      ['1'],
      [1n],
      new BigInt64Array(1),
      new DataView(new ArrayBuffer(8)),
    ])
      expectRefusal(
        () => sampleTokens({ logits: f32([1, 2], [1, 2]), seeds: [1], temperature: list as never }),
        'ERR_VALUE',
        'sampleTokens',
      )
  })

  test('a fault that a read threw is not kept for synchronize', async () => {
    using device = b.open()
    const logits = device.zeros([1, 2])
    const targets = device.tensor(Int32Array.of(9), [1])
    for (let i = 0; i < 100; i++) {
      using results = tokenLogProbs({ logits, targets })
      await expect(results.logProbs.read()).rejects.toMatchObject({ op: 'tokenLogProbs' })
    }
    await device.synchronize()
    tokenLogProbs({ logits, targets })
    await expect(device.synchronize()).rejects.toMatchObject({ op: 'tokenLogProbs' })
    await device.synchronize()
  })

  test('time rejects when the device is disposed first', async () => {
    const device = b.open()
    const waiting = device.time(() => device.zeros([10]))
    device.dispose()
    await expect(waiting).rejects.toMatchObject({ code: 'ERR_DISPOSED', op: 'time' })
  })
})
