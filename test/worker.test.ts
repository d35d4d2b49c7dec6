import { Worker } from 'node:worker_threads'
import { gelu, openDevice, type Tensor } from 'p2r-kernels'
import { expect, test } from 'vitest'

const library = new URL('../dist/lib/index.js', import.meta.url).href

/** A worker thread that runs `body` with the library's exports as `p2r`. */
function start(body: string): Worker {
  const code = `
    const { parentPort } = require('node:worker_threads')
    import('${library}').then(async (p2r) => { ${body} }).catch((error) => { throw error })`
  return new Worker(code, { eval: true })
}

function ended(worker: Worker): Promise<{ code: number; messages: unknown[] }> {
  return new Promise((resolve, reject) => {
    const messages: unknown[] = []
    worker.on('message', (m) => messages.push(m))
    worker.on('error', reject)
    worker.on('exit', (code) => resolve({ code, messages }))
  })
}

const chain = `
  const device = p2r.openDevice('cpu', { threads: 2 })
  let x = device.tensor(new Float32Array(50_000).fill(start), [50_000])
  for (let i = 0; i < 50; i++) x = p2r.gelu({ x })
  parentPort.postMessage((await x.read())[49_999])`

test('two workers and the main thread use devices concurrently, and exit by themselves', async () => {
  const workers = [1, 2].map((v) => ended(start(`const start = ${v}; ${chain}`)))
  using device = openDevice('cpu', { threads: 2 })
  const mine: number[] = []
  for (const v of [1, 2]) {
    let x: Tensor = device.tensor(new Float32Array(50_000).fill(v), [50_000])
    for (let i = 0; i < 50; i++) x = gelu({ x })
    mine.push((await x.read())[49_999]!)
  }
  const results = await Promise.all(workers)
  expect(results).toEqual(mine.map((v) => ({ code: 0, messages: [v] })))
})

test('terminating a worker during its work does not harm the process', async () => {
  for (let round = 0; round < 5; round++) {
    const worker = start(`
      const device = p2r.openDevice('cpu', { threads: 2 })
      const x = device.zeros([1 << 20])
      parentPort.postMessage('ready')
      for (;;) {
        const y = p2r.gelu({ x })
        const read = y.read()
        y.dispose()
        if (Math.random() < 0.2) await read
      }`)
    const exit = ended(worker)
    await new Promise((resolve) => worker.once('message', resolve))
    await new Promise((resolve) => setTimeout(resolve, 10 * round))
    await worker.terminate()
    expect((await exit).code).toBe(1)
  }
  using device = openDevice('cpu')
  using x = device.tensor([1], [1])
  expect(Array.from(await x.read())).toEqual([1])
})

test('errors in a worker are P2RErrors of its own copy of the library', async () => {
  const { messages } = await ended(
    start(`
      try { p2r.openDevice('nowhere') } catch (e) {
        parentPort.postMessage([e instanceof p2r.P2RError, e.code, e.op])
      }`),
  )
  expect(messages).toEqual([[true, 'ERR_DEVICE', 'openDevice']])
})
