// The machine's ceilings, by a small program of their own (ceilings/ceilings.cpp) that is compiled for
// this very machine when they are wanted.
import { spawnSync } from 'node:child_process'
import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import type { Ceilings } from './results.js'

const flags = ['-std=c++20', '-O3', '-march=native', '-ffp-contract=fast', '-pthread']

/** What measures the ceilings of some threads; a sentence where it cannot be built. */
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

/** Each figure's larger one: what disturbs a measurement only makes it smaller. */
export function better(a: Ceilings, b: Ceilings): Ceilings {
  return {
    threads: a.threads,
    fma: Math.max(a.fma, b.fma),
    read: Math.max(a.read, b.read),
    copy: Math.max(a.copy, b.copy),
    update: Math.max(a.update, b.update),
  }
}

/** Sentences on figures that differ between the begin and the end of a run, which only disturbance does. */
export function disturbances(before: readonly Ceilings[], after: readonly Ceilings[]): string[] {
  const out: string[] = []
  for (const [i, a] of before.entries())
    for (const kind of ['fma', 'read', 'copy', 'update'] as const) {
      const [low, high] = [a[kind], after[i]![kind]].sort((x, y) => x - y) as [number, number]
      if (high > 1.15 * low)
        out.push(
          `The ceiling '${kind}' of ${a.threads} thread(s) was ${Math.round((low / high) * 100)} % of ` +
            'itself at one end of the run: something else used the machine, so read the times as noisy.',
        )
    }
  return out
}
