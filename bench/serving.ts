// How busy a served model is kept: `evaluate` and `rollout` against a server that answers in a fixed
// time, in a process of its own. The ideal is what so many requests in flight would take at that time.
import { type ChildProcess, fork } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import {
  type Device,
  evaluate,
  loadImage,
  OpenAIPolicy,
  openDevice,
  Perceiver,
  PraGrpo,
  Reasoner,
} from 'p2r-kernels'
import sharp from 'sharp'
import { picture } from './data.js'
import { aligned } from './table.js'

const answerMs = 100
const concurrency = 32

export interface Serving {
  name: string
  samples: number
  requests: number
  seconds: number
  /** The time that the requests would take with `concurrency` of them always in flight. */
  idealSeconds: number
  /** Processor time of this process, all of its threads, a sample. */
  cpuMsPerSample: number
  /** Resident memory when a fifth was done, and at the end. */
  rssMiB: [number, number]
  /** The most that tensors took. */
  peakMiB: number
}

/** Measures all of it, on a CPU device with as many threads as it chooses. */
export async function serving(
  quick: boolean,
  progress: (what: string) => void,
): Promise<Serving[]> {
  const script = fileURLToPath(new URL('./serving_server.js', import.meta.url))
  const server = fork(script, [String(answerMs)])
  try {
    const [port] = (await once(server, 'message')) as [number]
    const baseURL = `http://127.0.0.1:${port}/v1`
    using device = openDevice('cpu')
    const scale = quick ? 5 : 1
    const small = await jpeg(224, 224)
    const large = await jpeg(2160, 3840)
    // What the first requests of a process cost once.
    await evaluated('warm-up', device, baseURL, server, small, 2 * concurrency)
    const rows: Serving[] = []
    for (const [name, image, samples] of [
      ['evaluate, 224 x 224', small, 2000 / scale],
      ['evaluate, 3840 x 2160', large, 80 / scale],
    ] as const) {
      progress(name)
      rows.push(await evaluated(name, device, baseURL, server, image, samples))
    }
    progress('rollout')
    rows.push(await rolledOut(device, baseURL, server, small, 250 / scale))
    return rows
  } finally {
    server.kill()
  }
}

async function evaluated(
  name: string,
  device: Device,
  baseURL: string,
  server: ChildProcess,
  image: Uint8Array,
  samples: number,
): Promise<Serving> {
  const policy = new OpenAIPolicy({ baseURL, model: 'm', concurrency, tokens: false })
  const [perceiver, reasoner] = [new Perceiver(policy), new Reasoner(policy)]
  const one = {
    question: 'Which?',
    answerForm: 'mca' as const,
    truth: 'A',
    load: () => loadImage(image, device),
  }
  const questions = (function* () {
    for (let i = 0; i < samples; i++) yield one
  })()
  return measured(name, device, server, samples, async (tick) => {
    for await (const { error, reward } of evaluate({
      perceiver,
      reasoner,
      questions,
      concurrency,
    })) {
      if (error) throw error
      if (reward !== 1) throw new Error(`${name}: the server's answer was not understood`)
      tick()
    }
  })
}

async function rolledOut(
  device: Device,
  baseURL: string,
  server: ChildProcess,
  bytes: Uint8Array,
  samples: number,
): Promise<Serving> {
  const policy = new OpenAIPolicy({ baseURL, model: 'm', concurrency })
  const trainer = new PraGrpo({ perceiver: policy, reasoner: policy, device, concurrency })
  using image = await loadImage(bytes, device)
  const sample = { image, question: 'Which?', answerForm: 'mca' as const, truth: 'A' }
  return await measured('rollout, groups of 8', device, server, samples, async (tick) => {
    const batches = 5
    for (let i = 0; i < batches; i++) {
      using batch = await trainer.rollout(Array(samples / batches).fill(sample))
      for (const { error } of batch.items) if (error) throw error
      for (let k = 0; k < samples / batches; k++) tick()
    }
  })
}

async function measured(
  name: string,
  device: Device,
  server: ChildProcess,
  samples: number,
  run: (tick: () => void) => Promise<void>,
): Promise<Serving> {
  const answered = async (): Promise<number> => {
    server.send('answered')
    const [count] = (await once(server, 'message')) as [number]
    return count
  }
  const rss = (): number => process.memoryUsage.rss() / 2 ** 20
  device.resetPeak()
  const before = await answered()
  const cpu = process.cpuUsage()
  const started = performance.now()
  let done = 0
  let early = rss()
  await run(() => {
    if (++done === Math.ceil(samples / 5)) early = rss()
  })
  const seconds = (performance.now() - started) / 1000
  const { user, system } = process.cpuUsage(cpu)
  const requests = (await answered()) - before
  return {
    name,
    samples,
    requests,
    seconds,
    idealSeconds: (requests * answerMs) / 1000 / concurrency,
    cpuMsPerSample: (user + system) / 1000 / samples,
    rssMiB: [early, rss()],
    peakMiB: device.memory().peakBytes / 2 ** 20,
  }
}

async function jpeg(height: number, width: number): Promise<Uint8Array> {
  const raw = { width, height, channels: 3 as const }
  return sharp(picture(height, width, 1), { raw })
    .jpeg({ quality: 90 })
    .toBuffer()
}

export function servingReport(rows: readonly Serving[]): string {
  const table = [
    ['', 'samples', 'requests', 'seconds', 'of ideal', 'CPU/sample', 'of a core', 'RSS', 'tensors'],
    ...rows.map((r) => [
      r.name,
      String(r.samples),
      String(r.requests),
      r.seconds.toFixed(2),
      `${((100 * r.idealSeconds) / r.seconds).toFixed(1)} %`,
      `${r.cpuMsPerSample.toFixed(1)} ms`,
      `${((r.cpuMsPerSample * r.samples) / r.seconds / 10).toFixed(0)} %`,
      `${r.rssMiB.map((m) => m.toFixed(0)).join(' -> ')} MiB`,
      `${r.peakMiB.toFixed(1)} MiB`,
    ]),
  ]
  return [
    `A server that answers in ${answerMs} ms, ${concurrency} requests in flight; a sample is an image`,
    aligned(table, 1),
  ].join('\n')
}
