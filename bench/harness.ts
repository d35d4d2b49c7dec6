// How a row is measured: rotating inputs, device time through tinybench, interleaved peers.
import { performance } from 'node:perf_hooks'
import { type Device, scope } from 'p2r-kernels'
import { Bench } from 'tinybench'
import { better, type Ceilings, type Row } from './results.js'
import type { Custom } from './shapes.js'
import { quantiles } from './statistics.js'

export type Backend = 'cpu' | 'cuda'

/** One file `<stem>.bench.ts`, its default export. */
export interface Benchmark {
  op: string
  workloads: readonly Workload[]
  /** Makes rows of other sizes and types; absent where they mean nothing. */
  custom?: Custom
}

/** A row's size in a series of rows, for the growth of time and memory with size. */
export interface Series {
  name: string
  size: number
}

/** One row of the table: an operation on shapes that occur in practice. */
export interface Workload {
  name: string
  /** Useful floating-point operations: those of the formula, whatever a kernel recomputes. */
  flops?: number
  /** The type of the factors, which selects the peak that applies; f32 unless given. */
  products?: 'f32' | 'bf16'
  /** Bytes that must cross memory, each input and output once. */
  traffic?: Traffic
  /** Where it is measured, if not on both. */
  backend?: Backend
  /** The kernel that is forced; left out on a device that has none of this name. */
  kernel?: string
  /** One input set that stays in the caches, instead of several that exceed them. */
  cached?: boolean
  /** Left out by --quick. */
  slow?: boolean
  /** Measured by --scaling only. */
  series?: Series
  inputs(seed: number): Inputs
}

export interface Traffic {
  read: number
  write: number
  /** The written bytes are those that were read. */
  inPlace?: boolean
}

/** Host data of one input set. */
export interface Inputs {
  byteLength: number
  load(device: Device): Loaded
  peers?: readonly Peer[]
}

/** One input set on a device. */
export interface Loaded {
  /** Queues the operation. Tensors made here are disposed by the harness. */
  run(): unknown
  /** Queues what restores the inputs of an operation that works in place; not timed. */
  before?(): void
  /** The numbers on which peers must agree. */
  answer?(): Promise<ArrayLike<number>>
}

/** The same computation by another library. */
export interface Peer {
  name: string
  slow?: boolean
  /** The threads it uses whatever number it is given. */
  threads?: number
  /** The backends it is compared with; only the CPU unless given. */
  backends?: readonly Backend[]
  /** How far its results may be from ours: by root mean square, relative to ours. */
  tolerance: number
  /**
   * With a number of threads, if supported, or on a CUDA device. Throws PeerAbsent with the reason if
   * it is not installed.
   */
  open(threads: number, device: string): Promise<PeerRun>
}

export interface PeerRun {
  run(): Promise<ArrayLike<number>> | ArrayLike<number>
  /** Milliseconds of one of `runs` runs by its own clock; else it is timed from call to result. */
  time?(runs: number): Promise<number>
  close?(): void
}

export class PeerAbsent extends Error {}

export interface Effort {
  /** Each round measures every implementation in turn. */
  rounds: number
  /** Milliseconds of wall clock for each implementation and round; at least one run. */
  time: number
  warmup: number
  /** Size of the caches that the input sets together must exceed, in bytes. */
  cacheBytes: number
  slow: boolean
  peers: boolean
  /** Measures the ceilings of so many threads over so many bytes, in turn with the row. */
  ceilings?(threads: number, bytes: number): Ceilings
}

export const thorough = { rounds: 5, time: 300, warmup: 200, slow: true }
export const quick = { rounds: 2, time: 60, warmup: 30, slow: false }

const maxSets = 16

/**
 * Runs per sample: on a CUDA device, enough to take a millisecond, because the events around a single short
 * kernel would measure its launch.
 */
function runsPerSample(backend: Backend, ms: number): number {
  return backend === 'cpu' ? 1 : Math.min(64, Math.max(1, Math.ceil(1 / ms)))
}

/** Number of input sets that together exceed the caches, so that none is reused from them. */
export function setsFor(byteLength: number, cacheBytes: number): number {
  return Math.max(1, Math.min(maxSets, Math.ceil((2 * cacheBytes) / Math.max(1, byteLength))))
}

/** ‖a - b‖ / ‖b‖; NaN where the lengths differ. */
export function distance(a: ArrayLike<number>, b: ArrayLike<number>): number {
  if (a.length !== b.length) return Number.NaN
  let difference = 0
  let norm = 0
  for (let i = 0; i < a.length; i++) {
    difference += (a[i]! - b[i]!) ** 2
    norm += b[i]! ** 2
  }
  return Math.sqrt(difference / (norm || 1))
}

interface Contender {
  name: string
  threads?: number
  once(): Promise<{ overriddenDuration: number; overriddenIterationCost: number }>
  close(): void
}

/**
 * Measures a workload on a device, which it disposes with all inputs, and by its peers. The rows' shares
 * are added later.
 */
export async function measure(
  op: string,
  workload: Workload,
  device: Device,
  effort: Effort,
  note: (message: string) => void,
  progress: (what: string) => void = () => {},
): Promise<Row[]> {
  const label = `${op} ${workload.name}`
  const first = workload.inputs(1)
  const inputs = [first]
  const sets = workload.cached ? 1 : setsFor(first.byteLength, effort.cacheBytes)
  for (let seed = 2; seed <= sets; seed++) inputs.push(workload.inputs(seed))

  progress(`${label}: loading`)
  const contenders: Contender[] = []
  try {
    const own = ours(device, inputs)
    contenders.push(own)
    const peakBytes = await own.peakBytes()
    const peers = effort.peers
      ? (first.peers ?? []).filter(
          (peer) =>
            (peer.backends ?? ['cpu']).includes(device.info.backend) && (effort.slow || !peer.slow),
        )
      : []
    const expected = peers.length ? await own.answer() : []
    for (const peer of peers) {
      progress(`${label}: checking ${peer.name}`)
      const at = first.peers!.indexOf(peer)
      const opened = await theirs(peer, at, device, inputs, expected, label, note)
      if (opened) contenders.push(opened)
    }
    const samples = new Map(contenders.map((c) => [c, [] as number[]]))
    const { id, threads, simd } = device.info
    const { read, write, inPlace } = workload.traffic ?? { read: 0, write: 0 }
    const bytes = sets * Math.max(first.byteLength, inPlace ? read : read + write)
    let limits: Ceilings | undefined
    for (let round = 0; round < effort.rounds; round++) {
      if (threads !== undefined && effort.ceilings) {
        const now = effort.ceilings(threads, bytes)
        limits = limits ? better(limits, now) : now
      }
      for (const [contender, list] of samples) {
        progress(`${label}: ${contender.name}, round ${round + 1} of ${effort.rounds}`)
        try {
          list.push(...(await sampled(contender, round === 0, effort)))
        } catch (error) {
          if (!(error instanceof PeerAbsent)) throw error
          note(`${label}: ${error.message}`)
          samples.delete(contender)
        }
      }
    }
    return [...samples.keys()].map((contender) => ({
      op,
      case: workload.name,
      implementation: contender.name,
      device: id,
      ...(threads === undefined ? {} : { threads }),
      ...(contender.threads === undefined ? {} : { ownThreads: contender.threads }),
      ...(simd === undefined || contender !== own ? {} : { simd }),
      ...(limits ? { limits } : {}),
      ...quantiles(samples.get(contender)!),
      ...(workload.flops === undefined ? {} : { flops: workload.flops }),
      ...(workload.products === undefined ? {} : { products: workload.products }),
      ...(workload.traffic === undefined ? {} : { traffic: workload.traffic }),
      ...(workload.series === undefined ? {} : { series: workload.series }),
      ...(contender === own ? { peakBytes } : {}),
    }))
  } finally {
    for (const contender of contenders) contender.close()
  }
}

/** The name of this package's rows. */
export const ourName = 'p2r-kernels'

function ours(device: Device, inputs: readonly Inputs[]) {
  const sets = inputs.map((set) => set.load(device))
  let next = 0
  let runs = 1
  const one = (set: Loaded) =>
    scope(() => {
      set.run()
    })
  return {
    name: ourName,
    async once() {
      const start = performance.now()
      sets[next % sets.length]!.before?.()
      const all = await device.time(() => {
        for (let i = 0; i < runs; i++) one(sets[next++ % sets.length]!)
      })
      const ms = all / runs
      // Inputs of in-place operations are restored between runs, so each run is a sample.
      if (!sets[0]!.before) runs = runsPerSample(device.info.backend, ms)
      return { overriddenDuration: ms, overriddenIterationCost: performance.now() - start }
    },
    /** What a run takes beyond its inputs: results and scratch. */
    async peakBytes() {
      await device.synchronize()
      const { liveBytes } = device.memory()
      device.resetPeak()
      const set = sets[next++ % sets.length]!
      set.before?.()
      one(set)
      await device.synchronize()
      return device.memory().peakBytes - liveBytes
    },
    async answer() {
      const set = sets[0]!
      if (!set.answer) throw new Error('a workload with peers needs an answer to compare')
      set.before?.()
      return set.answer()
    },
    // This disposes its tensors too.
    close: () => device.dispose(),
  }
}

/** A peer over the same input sets, once its first result agrees; undefined, with a note, if not. */
async function theirs(
  peer: Peer,
  at: number,
  device: Device,
  inputs: readonly Inputs[],
  expected: ArrayLike<number>,
  label: string,
  note: (message: string) => void,
): Promise<Contender | undefined> {
  const runs: PeerRun[] = []
  const close = () => {
    for (const run of runs) run.close?.()
  }
  try {
    const { threads, id } = device.info
    for (const set of inputs) runs.push(await set.peers![at]!.open(threads ?? 1, id))
    const apart = distance(await runs[0]!.run(), expected)
    if (!(apart <= peer.tolerance)) {
      note(
        `${label}: ${peer.name} is ${apart.toPrecision(3)} from our result, more than the ` +
          `${peer.tolerance} allowed, and was not timed.`,
      )
      close()
      return undefined
    }
  } catch (error) {
    close()
    if (!(error instanceof PeerAbsent)) throw error
    note(error.message)
    return undefined
  }
  let next = 0
  let times = 1
  return {
    name: peer.name,
    ...(peer.threads === undefined ? {} : { threads: peer.threads }),
    async once() {
      const run = runs[next++ % runs.length]!
      const start = performance.now()
      const own = run.time ? await run.time(times) : void (await run.run())
      const wall = performance.now() - start
      const ms = own ?? wall
      if (run.time) times = runsPerSample(device.info.backend, ms)
      return { overriddenDuration: ms, overriddenIterationCost: wall }
    },
    close,
  }
}

/** The samples of one contender in one round, in milliseconds. */
async function sampled(
  contender: Contender,
  cold: boolean,
  { time, warmup }: Effort,
): Promise<readonly number[]> {
  const bench = new Bench({
    time,
    iterations: 2,
    // In later rounds the warm-up only refills the caches after the others' runs.
    warmupTime: cold ? warmup : 0,
    warmupIterations: 1,
    retainSamples: true,
    throws: true,
  })
  bench.add(contender.name, () => contender.once(), { async: true })
  await bench.run()
  const { result } = bench.tasks[0]!
  if (result.state !== 'completed') throw new Error(`${contender.name}: ${result.state}`)
  return result.latency.samples ?? []
}
