// Workers that compute, and are terminated while they do; the addon loaded by many threads at once.
import { Worker } from 'node:worker_threads'

export interface WorkersOutcome {
  workers: number
  terminated: number
  /** Milliseconds that the slowest termination took. */
  slowest: number
  faults: string[]
}

const code = (library: string): string => `
  const { parentPort, workerData } = require('node:worker_threads')
  import('${library}').then(async (p) => {
    const d = p.openDevice('cpu', { threads: 1 })
    const x = d.tensor(Float32Array.from({ length: 64 * 64 }, (_, i) => Math.sin(i)), [64, 64])
    const expected = await p.linear({ x, weight: x }).read()
    parentPort.postMessage('started')
    for (let round = 0; ; round++) {
      const out = await p.linear({ x, weight: x }).read()
      if (out.some((v, i) => v !== expected[i])) throw new Error('another result in round ' + round)
      // A queue of work that a termination drops.
      if (workerData.busy) for (let i = 0; i < 50; i++) p.gelu({ x }).dispose()
      if (workerData.rounds === round) break
    }
    d.dispose()
    parentPort.postMessage('done')
  })`

export async function terminateWorkers(
  count: number,
  atOnce = 8,
  tell: (what: string) => void = () => {},
): Promise<WorkersOutcome> {
  const library = new URL('../lib/index.js', import.meta.url).href
  const outcome: WorkersOutcome = { workers: 0, terminated: 0, slowest: 0, faults: [] }
  const start = (
    workerData: object,
  ): { worker: Worker; message: (text: string) => Promise<void> } => {
    const worker = new Worker(code(library), { eval: true, workerData })
    outcome.workers++
    const seen = new Set<string>()
    const waiting: (() => void)[] = []
    const wake = (): void => {
      for (const f of waiting.splice(0)) f()
    }
    worker.on('message', (text: string) => {
      seen.add(text)
      wake()
    })
    worker.on('error', (error) => {
      outcome.faults.push(`a worker: ${error}`)
      seen.add('failed')
      wake()
    })
    return {
      worker,
      message: async (text) => {
        while (!seen.has(text) && !seen.has('failed'))
          await new Promise<void>((resolve) => waiting.push(resolve))
      },
    }
  }
  // All at once to their end: each has the same results as alone.
  const whole = Array.from({ length: atOnce }, () => start({ rounds: 200 }))
  await Promise.all(whole.map(({ message }) => message('done')))
  await Promise.all(whole.map(({ worker }) => worker.terminate()))
  let begun = 0
  const lane = async (): Promise<void> => {
    while (begun < count) {
      const i = begun++
      tell(`termination ${i + 1} of ${count}`)
      const { worker, message } = start({ busy: true })
      // Some while the library is still being loaded.
      if (i % 4 !== 0) await message('started')
      if (i % 4 === 2) await new Promise((resolve) => setTimeout(resolve, i % 7))
      const started = performance.now()
      await worker.terminate()
      outcome.slowest = Math.max(outcome.slowest, performance.now() - started)
      outcome.terminated++
    }
  }
  await Promise.all(Array.from({ length: atOnce }, lane))
  return outcome
}

if (process.argv[1]?.endsWith('workers.js')) {
  const [count, atOnce] = process.argv.slice(2).map(Number)
  process.stdout.write(JSON.stringify(await terminateWorkers(count!, atOnce)))
}
