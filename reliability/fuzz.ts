// Hostile calls of everything that the package exports: each gives a result or a P2RError, none ends the process or
// writes where it should not, and the device computes as before. A process runs a range of batches; what ends it is
// found by the process above, which knows the call.
import { mkdirSync, openSync, rmSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import * as library from 'p2r-kernels'
import { openDevice, P2RError, type Tensor } from 'p2r-kernels'
import { type Arguments, classes, functions } from './calls.js'
import { Gen } from './gen.js'
import { Hostility, Planted } from './hostile.js'

/** Calls that share a device. */
export const batchSize = 100
/** A promise of a call on small inputs that is not settled by then hangs. */
const patience = 20_000

export interface FuzzOutcome {
  calls: number
  /** Calls that returned, and those that were refused. */
  returned: number
  refused: number
  /** Calls by the export. */
  byName: Record<string, number>
  /** What should not have been: the call and what it did. */
  faults: string[]
}

interface Call {
  name: string
  run: (args: readonly unknown[]) => unknown
  args: Arguments
}

/** Everything that is exported, by its name. */
const exported: Readonly<Record<string, unknown>> = library
/**
 * An error's text is made by the engine, before the library sees it; a server of a model that is none is refused as
 * the other arguments are, and one that is real would stay.
 */
const leftOut = new Set(['P2RError', 'serveModel'])

/** A random valid call of a random export. */
function randomCall(g: Gen): Call {
  const kinds = g.uniform() < 0.8 ? 'function' : 'class'
  if (kinds === 'function') {
    const name = g.pick(
      Object.keys(functions).filter((n) => !leftOut.has(n)),
    ) as keyof typeof functions
    const f = exported[name] as (...a: readonly unknown[]) => unknown
    return { name, run: (args) => f(...args), args: functions[name](g) }
  }
  const name = g.pick(Object.keys(classes).filter((n) => !leftOut.has(n))) as keyof typeof classes
  const { construct, instance } = classes[name]
  if (instance && (!construct || g.uniform() < 0.8)) {
    const { of, methods } = instance(g)
    const method = g.pick(Object.keys(methods))
    const f: unknown = Reflect.get(of, method)
    if (typeof f !== 'function') throw new Error(`${name} has no method ${method}`)
    // As often as not on a stranger.
    const self = g.uniform() < 0.9 ? of : g.pick([null, {}, g.device, Object.create(of)])
    return {
      name: `${name}.${method}`,
      run: (args) => Reflect.apply(f, self, args),
      args: methods[method]!(),
    }
  }
  const Class = exported[name] as new (...a: readonly unknown[]) => unknown
  return {
    name: `new ${name}`,
    run: (args) => new Class(...args),
    args: construct ? construct(g) : [],
  }
}

/** Runs batches `first` to `last - 1`, telling a file descriptor before each call which it is. */
export async function fuzz(
  seed: number,
  first: number,
  last: number,
  folder: string,
  log?: number,
): Promise<FuzzOutcome> {
  const outcome: FuzzOutcome = { calls: 0, returned: 0, refused: 0, byName: {}, faults: [] }
  for (let batch = first; batch < last; batch++) await runBatch(seed, batch, folder, outcome, log)
  return outcome
}

async function runBatch(
  seed: number,
  batch: number,
  folder: string,
  outcome: FuzzOutcome,
  log: number | undefined,
): Promise<void> {
  const device = openDevice('cpu', { threads: 2 })
  const own = join(folder, String(batch))
  mkdirSync(own, { recursive: true })
  const g = new Gen(device, seed * 1_000_003 + batch, own)
  await library.saveTensors(join(own, 'tensors.safetensors'), { a: g.f32([2, 3]) })
  const hostility = new Hostility(g, seed * 1_000_003 + batch)
  // Nothing may write there.
  const tensor = g.f32([1000])
  const canary = { tensor, data: await tensor.read() }
  for (let i = 0; i < batchSize; i++) {
    const call = randomCall(g)
    const args = g.uniform() < 0.1 ? call.args : hostility.spoil(call.args)
    const title = `seed ${seed}, batch ${batch}, call ${i}: ${call.name}`
    if (log !== undefined) writeSync(log, `${title}\n`.padEnd(200), 0)
    outcome.calls++
    outcome.byName[call.name] = (outcome.byName[call.name] ?? 0) + 1
    const fault = await outcomeOf(call, args, device, outcome)
    if (fault) outcome.faults.push(`${title}: ${fault}`)
    if (isDisposed(device)) break
  }
  if (!isDisposed(device)) {
    const after = await canary.tensor.read()
    if (!canary.data.every((value, i) => Object.is(value, after[i])))
      outcome.faults.push(
        `seed ${seed}, batch ${batch}: a tensor that no call was given has changed`,
      )
    const sum = await library.sum({ x: canary.tensor }).read()
    const expected = canary.data.reduce((s, x) => s + x, 0)
    if (!(Math.abs(sum[0]! - expected) < 1e-2))
      outcome.faults.push(
        `seed ${seed}, batch ${batch}: the device gives ${sum[0]} for ${expected}`,
      )
    device.dispose()
  }
  hostility.dispose()
  rmSync(own, { recursive: true, force: true })
}

function isDisposed(device: library.Device): boolean {
  try {
    device.zeros([1]).dispose()
    return false
  } catch {
    return true
  }
}

/** What is wrong with the outcome of a call; nothing where it returned or was refused as it should be. */
export async function outcomeOf(
  { run }: Pick<Call, 'run'>,
  args: readonly unknown[],
  device: library.Device,
  outcome: Pick<FuzzOutcome, 'returned' | 'refused'>,
): Promise<string | undefined> {
  try {
    const made = await settled(run(args))
    outcome.returned++
    await useResult(made, device)
    return undefined
  } catch (error) {
    if (error instanceof P2RError || error instanceof Planted) {
      outcome.refused++
      // A poisoned result, of an argument that was disposed of meanwhile for instance, says so when it is read.
      return undefined
    }
    // What the caller's own iterator throws comes out as it went in.
    if (error instanceof TypeError && error.stack?.includes('mapUnordered')) return undefined
    return `${error instanceof Error ? error.stack?.split('\n').slice(0, 4).join(' | ') : String(error)}`
  }
}

async function settled(made: unknown): Promise<unknown> {
  if (typeof (made as AsyncGenerator | undefined)?.next === 'function') {
    const one = await (made as AsyncGenerator).next()
    await (made as AsyncGenerator).return?.(undefined)
    return one.value
  }
  if (!(made instanceof Promise)) return made
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`not settled after ${patience} ms`)), patience)
  })
  try {
    return await Promise.race([made, late])
  } finally {
    clearTimeout(timer)
  }
}

/** Reads the tensors of a result, and disposes of it. */
async function useResult(made: unknown, device: library.Device): Promise<void> {
  if (typeof made !== 'object' || made === null || made === device) return
  const tensors = Object.values(made)
    .concat(made)
    .filter(
      (value): value is Tensor =>
        typeof value === 'object' && value !== null && 'toFloat32' in value,
    )
  for (const tensor of tensors.slice(0, 3)) {
    const size = tensor.shape.reduce((product, n) => product * n, 1)
    if (size !== tensor.size) throw new Error(`shape ${tensor.shape} of ${tensor.size} elements`)
    const data = await tensor.read()
    if (data.length !== size) throw new Error(`${data.length} elements of ${size}`)
  }
  // Devices that calls opened, too.
  if ('dispose' in made && typeof made.dispose === 'function') made.dispose()
}

/** The process of a range: `node fuzz.js SEED FIRST LAST FOLDER LOG`. */
if (process.argv[1]?.endsWith('fuzz.js')) {
  const [seed, first, last] = process.argv.slice(2, 5).map(Number)
  const [folder, log] = process.argv.slice(5)
  // A rejection that a call left behind is a fault of the library: nobody could have caught it.
  const loose: string[] = []
  process.on('unhandledRejection', (error) => {
    if (!(error instanceof Planted)) loose.push(`unhandled rejection: ${error}`)
  })
  const outcome = await fuzz(seed!, first!, last!, folder!, openSync(log!, 'w'))
  await new Promise((resolve) => setTimeout(resolve, 50))
  outcome.faults.push(...loose)
  process.stdout.write(JSON.stringify(outcome))
}
