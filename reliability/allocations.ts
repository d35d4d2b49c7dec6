// Every allocation of a session fails once: the addon's own, in C++, and the device's memory. A call whose allocation
// failed is refused with a P2RError, or returns what it returns without; it keeps no memory, and the device computes as
// before. The session has a call of every function and method that reliability/calls.ts lists, and the load of a model;
// a call is made again for each of its allocations. The process is one of its own, started with the library of
// test/native/failing_allocations.cpp before it; what ends it is found by the process above.
import { execFileSync } from 'node:child_process'
import { mkdirSync, openSync, writeSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import * as library from 'p2r-kernels'
import { type Device, openDevice, P2RError, type Tensor } from 'p2r-kernels'
import { classes, functions } from './calls.js'
import { Gen } from './gen.js'
import { runModule } from './processes.js'

export interface AllocationsOutcome {
  /** Calls of the session, and allocations that failed while they ran, on their thread. */
  calls: number
  failed: number
  /** Of those, after which the call was refused; after the others it returned what it should. */
  refused: number
  faults: string[]
}

interface Injector {
  arm(n: number, ownThread: boolean): void
  disarm(): { left: number; failed: boolean; at: number }
  outstanding(): number
  holders(): Record<string, number>
}

interface SessionCall {
  name: string
  /** Makes the arguments, and gives the call itself. */
  prepare: (g: Gen) => () => unknown
}

/** They open sockets or processes, or have no arguments that serve here. */
const leftOut = new Set(['serveModel', 'loadRollouts', 'saveRollouts', 'recordPolicy'])

const exported: Readonly<Record<string, unknown>> = library

/** The calls of a session, in their order. */
export function sessionCalls(model: string | undefined): SessionCall[] {
  const calls: SessionCall[] = []
  for (const name of Object.keys(functions) as (keyof typeof functions)[])
    if (!leftOut.has(name))
      calls.push({
        name,
        prepare: (g) => {
          const args = functions[name](g)
          return () => (exported[name] as (...a: readonly unknown[]) => unknown)(...args)
        },
      })
  for (const name of ['Device', 'Tensor', 'KvCache'] as const) {
    const { construct, instance } = classes[name]
    if (construct)
      calls.push({
        name: `new ${name}`,
        prepare: (g) => {
          const args = construct(g)
          return () => Reflect.construct(exported[name] as new () => object, args)
        },
      })
    const device = openDevice('cpu', { threads: 1 })
    const methods = Object.keys(instance!(new Gen(device, 1, '')).methods)
    device.dispose()
    for (const method of methods)
      calls.push({
        name: `${name}.${method}`,
        prepare: (g) => {
          const { of, methods } = instance!(g)
          const args = methods[method]!()
          return () => Reflect.apply(Reflect.get(of, method), of, args)
        },
      })
  }
  calls.push({
    name: 'Tensor.write',
    prepare: (g) => {
      const x = g.f32([4, 6])
      return () => {
        library.gelu({ x }).dispose() // so that what is written waits in the queue
        x.write(new Float32Array(24))
      }
    },
  })
  calls.push({
    name: 'Tensor.ipcHandle',
    prepare: (g) => {
      const x = g.f32([40, 6])
      return async () => (await x.ipcHandle()).dispose()
    },
  })
  if (model !== undefined)
    calls.push({
      name: 'Qwen3VL.load',
      prepare: (g) => async () => (await library.Qwen3VL.load(model, g.device)).dispose(),
    })
  return calls
}

/** Tensors in a result, as bytes; other results are not compared. */
async function contents(made: unknown): Promise<string> {
  const isTensor = (value: unknown): value is Tensor =>
    typeof value === 'object' && value !== null && 'toFloat32' in value
  const all = Array.isArray(made) || made?.constructor === Object ? Object.values(made) : [made]
  const texts = all.filter(isTensor).map(async (tensor) => {
    const data = await tensor.read()
    const bytes = Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString('base64')
    return `${tensor.dtype} ${tensor.shape}: ${bytes}`
  })
  return (await Promise.all(texts)).join('; ')
}

async function settled(made: unknown): Promise<unknown> {
  if (typeof (made as AsyncGenerator | undefined)?.next !== 'function') return await made
  const one = await (made as AsyncGenerator).next()
  await (made as AsyncGenerator).return?.(undefined)
  return one.value
}

/** Everything that the call made is disposed of by then. */
async function attempt(
  device: Device,
  call: SessionCall,
  folder: string,
  seed: number,
  arm: () => void,
  disarm: () => void,
): Promise<{ made?: string; error?: unknown; kept: number }> {
  const result: { made?: string; error?: unknown; kept: number } = { kept: 0 }
  await library.scopeAsync(async () => {
    const run = call.prepare(new Gen(device, seed, folder))
    await device.synchronize()
    const before = device.memory().liveBytes
    try {
      let made: unknown
      arm()
      try {
        made = await settled(run())
      } finally {
        disarm()
      }
      result.made = await contents(made)
      if (made instanceof library.Device) made.dispose()
    } catch (error) {
      result.error = error
      await device.synchronize()
      result.kept = device.memory().liveBytes - before
    }
    return undefined
  })
  return result
}

const collect = async (): Promise<void> => {
  for (let i = 0; i < 3; i++) {
    globalThis.gc!()
    await new Promise((resolve) => setImmediate(resolve))
  }
}

/** Runs the session's calls from `first` on, telling a file descriptor what it is at. */
export async function failAllocations(
  injector: Injector,
  calls: readonly SessionCall[],
  options: {
    seed: number
    /** Where to begin: a call, and the allocation of it. */
    first: number
    from: number
    /** Every how manieth allocation fails. */
    stride: number
    folder: string
    tell: (call: number, n: number, title: string, outcome: AllocationsOutcome) => void
  },
): Promise<AllocationsOutcome> {
  const outcome = { calls: 0, failed: 0, refused: 0, faults: [] as string[] }
  const { seed, folder, stride } = options
  const device = openDevice('cpu', { threads: 2 })
  const canary = device.tensor(
    Float32Array.from({ length: 100 }, (_, i) => i),
    [100],
  )
  await library.saveTensors(join(folder, 'tensors.safetensors'), { a: canary })
  // The first call of all takes what stays.
  await library.sum({ x: canary }).read()
  for (let at = options.first; at < calls.length; at++) {
    const call = calls[at]!
    outcome.calls++
    const plain = await attempt(device, call, folder, seed, Object, Object)
    // What stays of a round is kept for the next, and the device may cache a block more: a leak grows in each.
    const held: number[] = []
    for (const round of [0, 1, 2]) {
      const start = at === options.first && round === 0 ? options.from : 1 + (at % stride)
      for (let n = start; ; n += stride) {
        const title = `${call.name}, allocation ${n}`
        options.tell(at, n, title, outcome)
        let ended = { left: 0, failed: false, at: 0 }
        const { made, error, kept } = await attempt(
          device,
          call,
          folder,
          seed,
          () => injector.arm(n, true),
          () => {
            ended = injector.disarm()
          },
        )
        const where = `${title} (at ${ended.at.toString(16)})`
        if (!ended.failed) break
        if (round === 0) {
          outcome.failed++
          if (error !== undefined) outcome.refused++
        } else continue
        if (error === undefined) {
          if (plain.error === undefined && made !== plain.made)
            outcome.faults.push(`${where}: another result than without`)
        } else if (!(error instanceof P2RError)) {
          const stack = error instanceof Error ? error.stack : String(error)
          outcome.faults.push(`${where}: ${stack?.split('\n').slice(0, 4).join(' | ')}`)
        } else if (error.code !== 'ERR_MEMORY' && plain.error === undefined) {
          outcome.faults.push(`${where}: ${error.code}: ${error.message}`)
        } else if (kept > 0 && call.name !== 'Device.time') {
          // What time() runs makes its caller's tensors.
          outcome.faults.push(`${where}: ${kept} bytes of the device stay in use`)
        }
        const sum = await library.sum({ x: canary }).read()
        if (sum[0] !== 4950) outcome.faults.push(`${where}: the device gives ${sum[0]} for 4950`)
      }
      await collect()
      await device.synchronize()
      held.push(injector.outstanding())
    }
    const [first = 0, second = 0, third = 0] = held
    if (first < second && second < third)
      outcome.faults.push(
        `${call.name}: ${third - second} blocks of memory are left, ${JSON.stringify(injector.holders())}`,
      )
  }
  device.dispose()
  return outcome
}

/**
 * A session in a process of its own, of which every `stride`th allocation fails (1: each). Linux, with g++ and the
 * repository's sources.
 */
export async function allocationFailures(options: {
  seed: number
  stride: number
  folder: string
  /** A checkpoint's folder, which is loaded too. */
  model?: string | undefined
}): Promise<AllocationsOutcome> {
  const { seed, stride, folder, model } = options
  const root = fileURLToPath(new URL('../../', import.meta.url))
  mkdirSync(folder, { recursive: true })
  const library = join(folder, 'failing_allocations.node')
  const include = `-I${createRequire(join(root, 'package.json'))('node-api-headers').include_dir}`
  const flags = ['-std=c++20', '-O2', '-shared', '-fPIC', include]
  const source = join(root, 'test/native/failing_allocations.cpp')
  execFileSync('g++', [...flags, source, '-o', library])
  const log = join(folder, 'at')
  const args = [library, seed, 0, 1, stride, folder, log, ...(model === undefined ? [] : [model])]
  const { out, failure } = await runModule('allocations', args, {
    env: { LD_PRELOAD: library },
    nodeArgs: ['--expose-gc'],
    log,
  })
  return failure === undefined
    ? (JSON.parse(out) as AllocationsOutcome)
    : { calls: 0, failed: 0, refused: 0, faults: [failure] }
}

/** The process of a session: `node allocations.js LIBRARY SEED FIRST FROM STRIDE FOLDER LOG [MODEL]`. */
if (process.argv[1]?.endsWith('allocations.js')) {
  const [injector, seed, first, from, stride, folder, log, model] = process.argv.slice(2)
  const descriptor = openSync(log!, 'w')
  openDevice('cpu', { threads: 1 }).dispose()
  const outcome = await failAllocations(
    createRequire(import.meta.url)(injector!) as Injector,
    sessionCalls(model),
    {
      seed: Number(seed),
      first: Number(first),
      from: Number(from),
      stride: Number(stride),
      folder: folder!,
      tell: (call, n, title, soFar) =>
        writeSync(descriptor, `${title}\n${JSON.stringify([call, n, soFar])}\n`.padEnd(4000), 0),
    },
  )
  process.stdout.write(JSON.stringify(outcome))
}
