// Predictions (results/predictions.json), and whether measurements met them.
import { readFileSync } from 'node:fs'
import { ourName } from './harness.js'
import { bytesOf, limitsOf, memoryKind, type Results, type Row } from './results.js'

export interface Predictions {
  /** Names under which several operations are measured together. */
  groups: Record<string, string[]>
  targets: Target[]
}

/** One prediction: of `times`, `share`, `teraflops` and `ms` exactly one. */
export interface Target {
  /** 'cpu' for every CPU, else a part of the GPU's name. */
  device: string
  op: string
  /** Of the benchmark; '*' stands for any digits. */
  case: string
  /** Speedup over a peer or another case of ours, `than`; over the best peer unless given. */
  times?: number
  than?: string
  /** Of the ceiling that binds the row. */
  share?: number
  teraflops?: number
  /** A further goal, which is not judged. */
  then?: number
  ms?: number
}

export function predictions(root: string): Predictions {
  return JSON.parse(readFileSync(`${root}/bench/results/predictions.json`, 'utf8'))
}

export function matches(
  { device, op, case: pattern }: Target,
  row: Row,
  results: Results,
): boolean {
  const place = device === 'cpu' ? row.device === 'cpu' : results.machine.device.includes(device)
  return place && row.op === op && row.implementation === ourName && sameCase(pattern, row.case)
}

export function sameCase(pattern: string, name: string): boolean {
  const parts = pattern.split('*').map((part) => part.replaceAll(/[^\w ]/g, '\\$&'))
  return new RegExp(`^${parts.join('\\d+')}$`).test(name)
}

/** The rows that a row of ours is compared with: the same case and threads by other implementations. */
export function peersOf(row: Row, { rows }: Results): Row[] {
  return rows
    .filter(
      (r) =>
        r.op === row.op &&
        r.case === row.case &&
        r.threads === row.threads &&
        r.implementation !== ourName,
    )
    .sort((a, b) => a.median - b.median)
}

export interface Verdict {
  target: Target
  row: Row
  /** The target in words, and the measurement. */
  reach: string
  got: string
  /** At least 1 where the target was met; absent if unknown, for example without the peer. */
  ratio?: number
}

/** The verdict on a row, if it has a prediction. */
export function judged(
  row: Row,
  results: Results,
  targets: readonly Target[],
): Verdict | undefined {
  const target = targets.find((t) => matches(t, row, results))
  if (!target) return undefined
  const { times, than, share, teraflops, ms } = target
  const verdict = (got: string | undefined, ratio?: number, of?: string): Verdict => ({
    target,
    row,
    reach: reachOf(target, of),
    got: got ?? 'not measured',
    ...(ratio === undefined ? {} : { ratio }),
  })
  if (times !== undefined) {
    const other = than
      ? results.rows.find(
          (r) =>
            r.op === row.op &&
            r.threads === row.threads &&
            (r.case === row.case
              ? r.implementation === than
              : r.case === than && r.implementation === ourName),
        )
      : peersOf(row, results)[0]
    if (!other) return verdict(undefined)
    const got = other.median / row.median
    return verdict(`x${got.toPrecision(3)}`, got / times, than ?? other.implementation)
  }
  if (share !== undefined) {
    if (row.share === undefined) return verdict(undefined)
    return verdict(`${(row.share * 100).toFixed(0)} %`, row.share / share, row.ceiling)
  }
  if (teraflops !== undefined) {
    const got = (row.flops ?? 0) / row.median / 1e9
    return verdict(`${got.toFixed(0)} TFLOP/s`, got / teraflops)
  }
  return verdict(`${row.median.toPrecision(3)} ms`, ms! / row.median)
}

/** A target in words; `of` is what it is relative to, if measured. */
export function reachOf({ times, than, share, teraflops, then, ms }: Target, of?: string): string {
  if (times !== undefined) return `x${times} of ${than ?? of ?? 'the best peer'}`
  if (share !== undefined) return `${share * 100} % of ${of ?? 'the ceiling'}`
  const further = then === undefined ? '' : `, then ${then}`
  return teraflops === undefined ? `${ms}${further} ms` : `${teraflops}${further} TFLOP/s`
}

/** 'met', 'missed' or 'not measured'. */
export function outcome({ ratio }: Verdict): string {
  return ratio === undefined ? 'not measured' : ratio >= 1 ? 'met' : 'missed'
}

/** The least milliseconds that a row's products and bytes need at the ceilings. */
export function atCeilings(row: Row, results: Results): { products?: number; memory?: number } {
  const limits = limitsOf(row, results.ceilings)
  if (!limits) return {}
  const peak = row.products === 'bf16' ? (limits.bf16 ?? limits.fma) : limits.fma
  const kind = memoryKind(row.traffic, limits)
  return {
    ...(row.flops && peak ? { products: (row.flops / peak) * 1e3 } : {}),
    ...(kind ? { memory: (bytesOf(row) / limits[kind]!) * 1e3 } : {}),
  }
}

/** Where the time of a row went: what its ceilings account for, and the rest. */
export function whereTimeWent(row: Row, results: Results): string {
  if (row.share === undefined) return 'no ceiling was measured'
  const { products, memory } = atCeilings(row, results)
  const parts: string[] = []
  if (products !== undefined) parts.push(`products ${products.toPrecision(3)} ms`)
  if (memory !== undefined) parts.push(`memory ${memory.toPrecision(3)} ms`)
  const ceilings = `${row.median.toPrecision(3)} ms: ${parts.join(', ')} at the ceilings`
  const rest = row.median * (1 - row.share)
  return rest > 0 ? `${ceilings}; beyond the larger, ${rest.toPrecision(3)} ms` : ceilings
}

/** All verdicts on a run, for its comparison with what was predicted. */
export function verdicts(results: Results, { targets }: Predictions): Verdict[] {
  const most = Math.max(...results.rows.map(({ threads }) => threads ?? 0))
  return results.rows
    .filter(({ threads }) => (threads ?? 0) === most)
    .flatMap((row) => judged(row, results, targets) ?? [])
}
