// Results of a run: the JSON, the shares, the comparison with an earlier run.
import { spawnSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { arch, cpus, platform, release, totalmem } from 'node:os'
import type { Series, Traffic } from './harness.js'
import { type Quantiles, verdict } from './statistics.js'

export interface Results {
  schema: 1
  date: string
  /** Of the sources, with '+' where files differ from it; absent outside a repository. */
  commit?: string
  machine: {
    cpu: string
    cpus: number
    memoryBytes: number
    platform: string
    arch: string
    /** Name of the measured device. */
    device: string
  }
  versions: Record<string, string>
  quick: boolean
  ceilings: Ceilings[]
  rows: Row[]
  /** Sentences: which peers were skipped, and why. */
  notes: string[]
}

export const ceilingKinds = ['fma', 'bf16', 'read', 'copy', 'update'] as const
export type CeilingKind = (typeof ceilingKinds)[number]

/** Upper limits of this machine with a number of threads, or of a CUDA device. */
export interface Ceilings extends Partial<Record<CeilingKind, number>> {
  /** Absent for a CUDA device. */
  threads?: number
  /** FLOP/s of f32 and of products of bf16; absent where they could not be measured. */
  fma?: number
  bf16?: number
  /** bytes/s; written ones count too, and 'update' is 'copy' in place. */
  read?: number
  copy: number
  update?: number
}

/** The larger of each figure: disturbances only lower a measurement. */
export function better(a: Ceilings, b: Ceilings): Ceilings {
  const out = { ...a }
  for (const kind of ceilingKinds)
    if (b[kind] !== undefined) out[kind] = Math.max(a[kind] ?? 0, b[kind])
  return out
}

export interface Row extends Quantiles {
  op: string
  case: string
  implementation: string
  device: string
  /** Those of the device that it is compared on. */
  threads?: number
  /** Those that a peer uses whatever it is given. */
  ownThreads?: number
  simd?: string
  flops?: number
  products?: 'f32' | 'bf16'
  traffic?: Traffic
  series?: Series
  /** Ceilings measured in turn with the row, over as many bytes; else those of the run apply. */
  limits?: Ceilings
  /** Peak bytes of device memory during a run, besides its inputs. */
  peakBytes?: number
  /** The least time that the ceilings allow over the median, and the ceiling that sets it. */
  share?: number
  ceiling?: CeilingKind
}

/** The threads that a row was computed by. */
export function threadsOf({ ownThreads, threads }: Row): number | undefined {
  return ownThreads ?? threads
}

/** The ceilings that a row is held to. */
export function limitsOf(row: Row, ceilings: readonly Ceilings[]): Ceilings | undefined {
  return row.limits ?? ceilings.find((c) => c.threads === row.threads)
}

/** The largest share that noise explains; one above it shows that a ceiling is wrong. */
export const largestShare = 1.05

/** Rows that did more than their ceiling allows. */
export function impossible({ rows }: Results): Row[] {
  return rows.filter(({ share }) => share !== undefined && share > largestShare)
}

/** The row with its share of the ceiling that binds it. */
export function withShare(row: Row, ceilings: readonly Ceilings[]): Row {
  const limits = limitsOf(row, ceilings)
  if (!limits) return row
  const compute: CeilingKind = row.products === 'bf16' && limits.bf16 ? 'bf16' : 'fma'
  const computing = row.flops && limits[compute] ? row.flops / limits[compute] : 0
  const memory = memoryKind(row.traffic, limits)
  const moving = memory ? bytesOf(row) / limits[memory]! : 0
  const least = Math.max(computing, moving)
  if (least === 0) return row
  return {
    ...row,
    share: (least * 1e3) / row.median,
    ceiling: moving > computing ? memory! : compute,
  }
}

export function bytesOf({ traffic }: Row): number {
  return traffic ? traffic.read + traffic.write : 0
}

/** The memory ceiling that applies to a workload's traffic. */
export function memoryKind(
  traffic: Traffic | undefined,
  limits: Ceilings,
): CeilingKind | undefined {
  if (!traffic) return undefined
  // The writes are negligible besides the reads.
  const reads = traffic.write * 16 <= traffic.read
  const kind = traffic.inPlace ? 'update' : reads ? 'read' : 'copy'
  return limits[kind] ? kind : 'copy'
}

const key = (row: Row): string =>
  [row.op, row.case, row.implementation, row.device, row.threads ?? '', row.simd ?? ''].join(' | ')

export interface Change {
  row: Row
  before: Row
  /** Median over the earlier median. */
  ratio: number
}

export interface Comparison {
  slower: Change[]
  faster: Change[]
  /** Rows of both runs. */
  compared: number
  /** Rows of the earlier run alone, and of this one alone. */
  gone: Row[]
  added: Row[]
  /** Why the two may not be comparable. */
  caveats: string[]
}

export function compare(before: Results, after: Results): Comparison {
  const old = new Map(before.rows.map((row) => [key(row), row]))
  const out: Comparison = {
    slower: [],
    faster: [],
    compared: 0,
    gone: [],
    added: [],
    caveats: caveats(before, after),
  }
  for (const row of after.rows) {
    const was = old.get(key(row))
    if (!was) {
      out.added.push(row)
      continue
    }
    old.delete(key(row))
    out.compared++
    const kind = verdict(was, row)
    if (kind !== 'same') out[kind].push({ row, before: was, ratio: row.median / was.median })
  }
  out.gone.push(...old.values())
  out.slower.sort((a, b) => b.ratio - a.ratio)
  out.faster.sort((a, b) => a.ratio - b.ratio)
  return out
}

function caveats(before: Results, after: Results): string[] {
  const out: string[] = []
  for (const field of ['cpu', 'cpus', 'device'] as const)
    if (before.machine[field] !== after.machine[field])
      out.push(
        `The machines differ: ${field} was ${before.machine[field]}, is ${after.machine[field]}.`,
      )
  for (const now of after.ceilings) {
    const was = before.ceilings.find((c) => c.threads === now.threads)
    for (const kind of ceilingKinds) {
      const ratio = (now[kind] ?? Number.NaN) / (was?.[kind] ?? Number.NaN)
      if (Math.abs(ratio - 1) > 0.1)
        out.push(
          `The ceiling '${kind}'${ofThreads(now)} changed by ` +
            `${((ratio - 1) * 100).toFixed(0)} %, so the machine did, or was disturbed.`,
        )
    }
  }
  return out
}

export function ofThreads({ threads }: Ceilings): string {
  return threads === undefined ? '' : ` of ${threads} thread(s)`
}

export function parseResults(text: string, name: string): Results {
  let results: Results
  try {
    results = JSON.parse(text)
  } catch (cause) {
    throw new Error(`${name} is not JSON`, { cause })
  }
  if (results?.schema !== 1 || !Array.isArray(results.rows) || !Array.isArray(results.ceilings))
    throw new Error(`${name} does not hold results of this benchmark (schema 1)`)
  return results
}

/** The results of a run without its rows. */
export function emptyResults(root: string, device: string, quick: boolean): Results {
  const { version } = JSON.parse(readFileSync(`${root}/package.json`, 'utf8'))
  const commit = commitOf(root)
  return {
    schema: 1,
    date: new Date().toISOString(),
    ...(commit === undefined ? {} : { commit }),
    machine: {
      cpu: cpus()[0]?.model ?? 'unknown',
      cpus: cpus().length,
      memoryBytes: totalmem(),
      platform: `${platform()} ${release()}`,
      arch: arch(),
      device,
    },
    versions: { 'p2r-kernels': version, node: process.versions.node },
    quick,
    ceilings: [],
    rows: [],
    notes: [],
  }
}

function commitOf(root: string): string | undefined {
  const git = (...args: string[]) => spawnSync('git', args, { cwd: root, encoding: 'utf8' })
  const head = git('rev-parse', 'HEAD')
  if (head.status !== 0) return undefined
  const changed = git('status', '--porcelain', '--untracked-files=no').stdout.trim() !== ''
  return head.stdout.trim() + (changed ? '+' : '')
}

/** The last-level cache as Linux reports it; 32 MiB if it does not. */
export function cacheBytes(): number {
  let largest = 0
  for (let index = 0; index < 5; index++)
    try {
      const size = readFileSync(`/sys/devices/system/cpu/cpu0/cache/index${index}/size`, 'utf8')
      largest = Math.max(largest, Number.parseInt(size, 10) * (/M/.test(size) ? 2 ** 20 : 2 ** 10))
    } catch {
      break
    }
  // One process keeps only a part of a server's large cache.
  return Math.min(largest || 2 ** 25, 2 ** 26)
}
