import { execFile } from 'node:child_process'
import { cpSync, mkdtempSync, rmSync, symlinkSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
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

// As where two versions of a dependency each bring their own: two files of the addon, two type tags, two pools.
test('two copies of the package in one process keep apart', async () => {
  const root = new URL('..', import.meta.url).pathname
  const copy = mkdtempSync(join(tmpdir(), 'p2r-copy-'))
  try {
    for (const name of ['package.json', 'dist/lib', 'build/Release/p2r_kernels.node'])
      cpSync(join(root, name), join(copy, name), { recursive: true })
    symlinkSync(join(root, 'node_modules'), join(copy, 'node_modules'))
    const main = `
      const one = await import('${library}')
      const two = await import('${join(copy, 'dist/lib/index.js')}')
      const results = []
      const [a, b] = [one, two].map((p) => p.openDevice('cpu', { threads: 2 }))
      const [x, y] = [a, b].map((d) => d.tensor(new Float32Array(1000).fill(1), [1000]))
      for (let i = 0; i < 20; i++) {
        const [p, q] = await Promise.all([one.gelu({ x }).read(), two.gelu({ x: y }).read()])
        results.push(p[999] === q[999])
      }
      results.push(one.gelu === two.gelu)
      for (const [p, foreign] of [[one, y], [two, x]])
        try { p.gelu({ x: foreign }) } catch (e) { results.push(e instanceof p.P2RError && e.code) }
      a.dispose()
      results.push((await two.gelu({ x: y }).read()).length)
      b.dispose()
      console.log(JSON.stringify(results))`
    const { stdout, stderr } = await promisify(execFile)(process.execPath, [
      '--input-type=module',
      '-e',
      main,
    ])
    expect(stderr).toBe('')
    const equal = Array.from({ length: 20 }, () => true)
    expect(JSON.parse(stdout)).toEqual([...equal, false, 'ERR_VALUE', 'ERR_VALUE', 1000])
  } finally {
    rmSync(copy, { recursive: true })
  }
}, 30_000)
