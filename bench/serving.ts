// How well a served model is utilized: `evaluate` and `rollout` against a server in another process that
// answers after a fixed time. The ideal keeps the maximum number of requests in flight throughout.
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
/** Of images whose processing, not the server, is the bottleneck. */
const largeConcurrency = 8

export interface Serving {
  name: string
  samples: number
  requests: number
  inFlight: number
  seconds: number
  /** The time that the requests would take with that many of them always in flight. */
  idealSeconds: number
  /** Processor time of this process, all of its threads, a sample. */
  cpuMsPerSample: number
  /** Resident memory after a fifth of the samples, and at the end. */
  rssMiB: [number, number]
  /** Peak bytes of tensors. */
  peakMiB: number
}

/** How many samples of each kind are measured. */
export interface Samples {
  small: number
  rollout: number
  large: number
}
export const thoroughSamples: Samples = { small: 2000, rollout: 250, large: 160 }
export const quickSamples: Samples = { small: 400, rollout: 50, large: 32 }

/** Runs all measurements on a CPU device with the default number of threads. */
export async function serving(
  samples: Samples,
  progress: (what: string) => void,
): Promise<Serving[]> {
  const script = fileURLToPath(new URL('./serving_server.js', import.meta.url))
  const server = fork(script, [String(answerMs)])
  try {
    const [port] = (await once(server, 'message')) as [number]
    const baseURL = `http://127.0.0.1:${port}/v1`
    using device = openDevice('cpu')
    const small = await jpeg(224, 224)
    const large = await jpeg(2160, 3840)
    // Warm-up: the one-time costs of a process's first requests.
    await evaluated('warm-up', device, baseURL, server, small, 2 * concurrency)
    const rows: Serving[] = []
    progress('evaluate')
    rows.push(await evaluated('evaluate, 224 x 224', device, baseURL, server, small, samples.small))
    progress('rollout')
    rows.push(await rolledOut(device, baseURL, server, small, samples.rollout))
    progress('evaluate, 4K')
    rows.push(
      await evaluated(
        'evaluate, 3840 x 2160',
        device,
        baseURL,
        server,
        large,
        samples.large,
        largeConcurrency,
      ),
    )
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
  inFlight = concurrency,
): Promise<Serving> {
  const policy = new OpenAIPolicy({ baseURL, model: 'm', concurrency: inFlight, tokens: false })
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
  return measured(name, device, server, samples, inFlight, async (tick) => {
    for await (const { error, reward } of evaluate({
      perceiver,
      reasoner,
      questions,
      concurrency: inFlight,
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
  return await measured('rollout, groups of 8', device, server, samples, concurrency, async () => {
    using batch = await trainer.rollout(Array(samples).fill(sample))
    for (const { error } of batch.items) if (error) throw error
  })
}

async function measured(
  name: string,
  device: Device,
  server: ChildProcess,
  samples: number,
  inFlight: number,
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
    inFlight,
    idealSeconds: (requests * answerMs) / 1000 / inFlight,
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
    [
      '',
      'samples',
      'requests',
      'in flight',
      'seconds',
      'of ideal',
      'CPU/sample',
      'of a core',
      'RSS',
      'tensors',
    ],
    ...rows.map((r) => [
      r.name,
      String(r.samples),
      String(r.requests),
      String(r.inFlight),
      r.seconds.toFixed(2),
      `${((100 * r.idealSeconds) / r.seconds).toFixed(1)} %`,
      `${r.cpuMsPerSample.toFixed(1)} ms`,
      `${((r.cpuMsPerSample * r.samples) / r.seconds / 10).toFixed(0)} %`,
      `${r.rssMiB.map((m) => m.toFixed(0)).join(' -> ')} MiB`,
      `${r.peakMiB.toFixed(1)} MiB`,
    ]),
  ]
  return [`A server that answers in ${answerMs} ms; a sample is an image`, aligned(table, 1)].join(
    '\n',
  )
}
