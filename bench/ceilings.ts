// The machine's ceilings: a CPU's by a separate small program (ceilings/ceilings.cpp), compiled on
// demand for this machine.
import { spawnSync } from 'node:child_process'
import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { openDevice } from 'p2r-kernels'
import { normalBlock, tiled } from './data.js'
import { PeerAbsent } from './harness.js'
import { matmul } from './peers/pytorch.js'
import { type Ceilings, ceilingKinds, ofThreads } from './results.js'

const flags = ['-std=c++20', '-O3', '-march=native', '-ffp-contract=fast', '-pthread']

/** The function that measures the ceilings of a thread count; the reason if it cannot be built. */
export function ceilingMeter(root: string): ((threads: number) => Ceilings) | string {
  const folder = join(root, 'build/bench')
  const program = join(folder, process.platform === 'win32' ? 'ceilings.exe' : 'ceilings')
  mkdirSync(folder, { recursive: true })
  const compiler = process.env.CXX ?? 'c++'
  const source = join(root, 'bench/ceilings/ceilings.cpp')
  const built = spawnSync(compiler, [...flags, source, '-o', program], { encoding: 'utf8' })
  if (built.status !== 0)
    return `No ceilings, and so no shares: ${compiler} could not build bench/ceilings/ceilings.cpp.`
  return (threads) => {
    const { status, stdout } = spawnSync(program, [String(threads)], { encoding: 'utf8' })
    if (status !== 0) throw new Error(`the program of the ceilings ended with status ${status}`)
    return { threads, ...JSON.parse(stdout) }
  }
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

/** The larger of each figure: disturbances only lower a measurement. */
export function better(a: Ceilings, b: Ceilings): Ceilings {
  const out = { ...a }
  for (const kind of ceilingKinds)
    if (b[kind] !== undefined) out[kind] = Math.max(a[kind] ?? 0, b[kind])
  return out
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
