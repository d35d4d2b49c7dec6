// The machine's ceilings: a CPU's by loops in the addon (ops/ceilings.h), on huge pages and on threads
// placed as a device's are.
import { openDevice } from 'p2r-kernels'
import { native } from '../lib/native.js'
import { normalBlock, tiled } from './data.js'
import { PeerAbsent } from './harness.js'
import { matmul } from './peers/pytorch.js'
import { type Ceilings, cacheBytes, ceilingKinds, ofThreads } from './results.js'

/**
 * What a CPU can do with so many threads: operations and bytes a second, the best of the rounds. Buffers of
 * all threads together have `bytes`: twice the caches unless given, fewer for what works within them. Blocks
 * for some tens of milliseconds.
 */
export function cpuCeilings(threads: number, bytes?: number, rounds = 3): Ceilings {
  const beyond = Math.max(2 * cacheBytes(), 2 ** 26 * threads)
  const least = 2 ** 16 * threads
  const within = bytes === undefined ? beyond : Math.min(beyond, Math.max(least, bytes))
  return { threads, ...native().ceilings(threads, within, rounds) }
}

const copied = 2 ** 31

/**
 * A CUDA device's: our own copy within its memory and, if PyTorch is installed, its products of large
 * matrices. The reason if they could not be measured.
 */
export async function cudaCeilings(id: string): Promise<[Ceilings, string | undefined]> {
  const device = openDevice(id)
  const out: Ceilings = { copy: 0 }
  try {
    const bytes = Math.min(copied, Math.floor(device.info.memoryBytes / 8))
    const source = tiled(device, normalBlock([bytes >> 12, 1024], 'f32', 1))
    const target = device.zeros(source.shape, source.dtype)
    for (let round = 0; round < 8; round++) {
      const ms = await device.time(() => target.copyFrom(source))
      out.copy = Math.max(out.copy, (2 * source.byteLength * 1e3) / ms)
    }
  } finally {
    device.dispose()
  }
  try {
    for (const [kind, dtype] of [
      ['bf16', 'bf16'],
      ['fma', 'f32'],
    ] as const) {
      const run = await matmul(8192, dtype).open(1, id)
      // The first products raise the clocks.
      await run.time!(8)
      const times = [await run.time!(8), await run.time!(8), await run.time!(8)]
      out[kind] = (2 * 8192 ** 3 * 1e3) / Math.min(...times)
      run.close?.()
    }
  } catch (error) {
    if (!(error instanceof PeerAbsent)) throw error
    return [out, `No ceiling of matrix products, and so no shares of it: ${error.message}`]
  }
  return [out, undefined]
}

/** Notes on figures that differ between the start and the end of a run, because it was disturbed. */
export function disturbances(before: readonly Ceilings[], after: readonly Ceilings[]): string[] {
  const out: string[] = []
  for (const [i, a] of before.entries())
    for (const kind of ceilingKinds) {
      const [low, high] = [a[kind] ?? 0, after[i]![kind] ?? 0].sort((x, y) => x - y) as [
        number,
        number,
      ]
      if (high > 1.15 * low)
        out.push(
          `The ceiling '${kind}'${ofThreads(a)} was ${Math.round((low / high) * 100)} % of ` +
            'itself at one end of the run: something else used the machine, so read the times as noisy.',
        )
    }
  return out
}
