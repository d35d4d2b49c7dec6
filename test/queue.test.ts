// Work that is queued and never computed, and bounds on what is queued. What would be computed if a queue were
// drained takes many times longer than a test may.
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { Worker } from 'node:worker_threads'
import { adamW, gelu, linear, openDevice, scope, scopeAsync, type Tensor } from 'p2r-kernels'
import { expect, test } from 'vitest'
import { expectRefusal, onEveryBackend } from './harness.js'

const library = new URL('../dist/lib/index.js', import.meta.url).href

/** Ten minutes of work, and more, of which a tensor is returned. */
const hours = `
  const device = p2r.openDevice('cpu', { threads: 1 })
  const x = device.zeros([2048, 2048])
  for (let i = 0; i < 4000; i++) p2r.linear({ x, weight: x }).dispose()`

test('a worker that is terminated, or ends, drops its queue', async () => {
  for (const end of ['terminate', 'exit']) {
    const worker = new Worker(
      `const { parentPort } = require('node:worker_threads')
       import('${library}').then((p2r) => {
         ${hours}
         parentPort.postMessage('queued')
         ${end === 'terminate' ? 'x.read().catch(() => {}); setInterval(() => {}, 1000)' : ''}
       })`,
      { eval: true },
    )
    const exit = once(worker, 'exit')
    await once(worker, 'message')
    if (end === 'terminate') await worker.terminate()
    expect(await exit).toEqual([end === 'terminate' ? 1 : 0])
  }
})

test.each(['', 'process.exit(3)', 'const read = x.read(); process.exit(3)'])(
  'a process that ends drops its queue: %s',
  async (end) => {
    const code = `const p2r = await import('${library}')\n${hours}\n${end}`
    const child = spawn(process.execPath, ['--input-type=module', '-e', code], {
      stdio: ['ignore', 'inherit', 'pipe'],
    })
    let err = ''
    child.stderr.on('data', (text) => {
      err += text
    })
    expect([await once(child, 'close'), err]).toEqual([[end ? 3 : 0, null], ''])
  },
)

test('an aborted scope leaves out what has not begun', async () => {
  using device = openDevice('cpu', { threads: 1 })
  using x = device.tensor(new Float32Array(1 << 22).fill(1), [2048, 2048])
  using before = gelu({ x })
  const controller = new AbortController()
  let late: Promise<unknown> | undefined
  const run = scopeAsync(
    async () => {
      let y: Tensor<'f32'> = x
      for (let i = 0; i < 4000; i++) {
        const next = linear({ x: y, weight: x })
        if (y !== x) y.dispose()
        y = next
      }
      late = y.read().catch((error) => error)
      controller.abort(new Error('enough'))
      await late
      return y
    },
    { signal: controller.signal },
  )
  await expect(run).rejects.toThrow('enough')
  expect(await late).toMatchObject({
    code: 'ERR_VALUE',
    op: 'scopeAsync',
    message: expect.stringContaining('aborted before this was computed'),
  })
  // Nothing of it stays: neither tensors nor faults.
  expect(device.memory().liveBytes).toBe(2 * 4 * (1 << 22))
  await device.synchronize()
  expect((await before.read())[0]).toBeCloseTo(0.8413447)
  using after = gelu({ x })
  expect((await after.read())[5]).toBeCloseTo(0.8413447)
})

test('what an aborted scope would have written in place is unusable, until it is written', async () => {
  using device = openDevice('cpu', { threads: 1 })
  using x = device.zeros([2048, 2048])
  using params = device.tensor([1, 2], [2])
  const grads = device.tensor([1, 1], [2])
  const moments = device.zeros([2, 2])
  const controller = new AbortController()
  const run = scopeAsync(
    async () => {
      for (let i = 0; i < 4000; i++) linear({ x, weight: x }).dispose()
      adamW({ params: [params], grads: [grads], moments: [moments], step: 1, lr: 0.1 })
      controller.abort()
    },
    { signal: controller.signal },
  )
  await expect(run).rejects.toMatchObject({ name: 'AbortError' })
  await expect(params.read()).rejects.toMatchObject({ op: 'scopeAsync' })
  using dependent = gelu({ x: params })
  await expect(dependent.read()).rejects.toMatchObject({ op: 'scopeAsync' })
  params.write([3, 4])
  expect([...(await params.read())]).toEqual([3, 4])
  for (const tensor of [grads, moments]) tensor.dispose()
})

onEveryBackend('scopes that can be aborted', (b) => {
  test('without an abort nothing changes; nested scopes belong to the outer signal', async () => {
    const { signal } = new AbortController()
    const x = b.device.tensor([1, 2], [2])
    const values = await scopeAsync(
      async () => {
        const inner = scope(() => gelu({ x }))
        await inner.read()
        return scopeAsync(async () => gelu({ x: inner }).read())
      },
      { signal },
    )
    expect(values).toHaveLength(2)
    const aborted = AbortSignal.abort(new Error('before'))
    let ran = false
    const none = async () => {
      ran = true
    }
    await expect(scopeAsync(none, { signal: aborted })).rejects.toThrow('before')
    expect(ran).toBe(false)
    const outer = new AbortController()
    const inner = new AbortController()
    const nested = scopeAsync(
      () =>
        scopeAsync(
          async () => {
            outer.abort(new Error('outer'))
            return gelu({ x }).read()
          },
          { signal: inner.signal },
        ),
      { signal: outer.signal },
    )
    await expect(nested).rejects.toThrow('outer')
    // An error that f throws after an abort is the abort's consequence.
    const failing = new AbortController()
    const error = scopeAsync(
      async () => {
        failing.abort(new Error('reason'))
        throw new Error('consequence')
      },
      { signal: failing.signal },
    )
    await expect(error).rejects.toThrow('reason')
    expect([...(await x.read())]).toEqual([1, 2])
    x.dispose()
  })

  test('refuses wrong options', async () => {
    for (const options of [{ signal: {} }, { sginal: 1 }, null])
      await expect(scopeAsync(async () => 1, options as never)).rejects.toMatchObject({
        code: 'ERR_VALUE',
        op: 'scopeAsync',
      })
  })
})

test('maxQueuedBytes bounds what is queued: the call waits, or throws', async () => {
  const bytes = 4 << 20
  for (const whenFull of ['wait', 'throw'] as const) {
    using device = openDevice('cpu', { threads: 1, maxQueuedBytes: 2 * bytes, whenFull })
    using x = device.tensor(new Float32Array(1 << 20).fill(1 / 1024), [1024, 1024])
    const results: Tensor<'f32'>[] = []
    let thrown: unknown
    // Computing one takes longer than queuing all.
    for (let i = 0; i < 8 && !thrown; i++)
      try {
        results.push(linear({ x, weight: x }))
      } catch (error) {
        thrown = error
      }
    if (whenFull === 'throw') {
      expect(thrown).toMatchObject({
        code: 'ERR_MEMORY',
        op: 'linear',
        message: expect.stringContaining('maxQueuedBytes'),
      })
      // What was refused has left nothing behind, and once the queue is done there is room.
      expect(device.memory().liveBytes).toBe((1 + results.length) * bytes)
      await device.synchronize()
      results.push(linear({ x, weight: x }))
    } else {
      expect(thrown).toBeUndefined()
      expect(results).toHaveLength(8)
    }
    for (const result of results) {
      expect((await result.read())[7]).toBe(1 / 1024)
      result.dispose()
    }
    // One alone is queued, however large.
    using large = device.zeros([3, 1024, 1024])
    using alone = gelu({ x: large })
    expect((await alone.read())[0]).toBe(0)
  }
  for (const options of [
    { maxQueuedBytes: 0 },
    { maxQueuedBytes: Number.NaN },
    { maxQueuedBytes: '1' },
    { whenFull: 'drop' },
  ])
    expectRefusal(() => openDevice('cpu', options as never), 'ERR_VALUE', 'openDevice')
})
