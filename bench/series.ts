// Rows that differ in size alone, and the exponent of their growth.
import type { Row } from './results.js'

export interface RowSeries {
  op: string
  /** The quantity that grows. */
  name: string
  implementation: string
  /** By size. */
  rows: Row[]
}

/** The series among the rows, with at least three sizes each. */
export function seriesOf(rows: readonly Row[]): RowSeries[] {
  const out = new Map<string, RowSeries>()
  for (const row of rows) {
    if (!row.series) continue
    const { op, implementation, threads } = row
    const { name } = row.series
    const key = [op, name, implementation, threads].join(' | ')
    if (!out.has(key)) out.set(key, { op, name, implementation, rows: [] })
    out.get(key)!.rows.push(row)
  }
  const all = [...out.values()].filter((series) => series.rows.length > 2)
  for (const { rows } of all) rows.sort((a, b) => a.series!.size - b.series!.size)
  return all
}

/**
 * The p of y ~ size^p, by least squares of the logarithms over the larger half of the sizes: the small
 * ones are dominated by the latency of the queue.
 */
export function exponent(sizes: readonly number[], values: readonly number[]): number {
  const first = Math.min(Math.floor(sizes.length / 2), sizes.length - 2)
  const x = sizes.slice(first).map(Math.log)
  const y = values.slice(first).map(Math.log)
  const mean = (list: number[]) => list.reduce((a, b) => a + b) / list.length
  const [mx, my] = [mean(x), mean(y)]
  const along = x.reduce((sum, value, i) => sum + (value - mx) * (y[i]! - my), 0)
  return along / x.reduce((sum, value) => sum + (value - mx) ** 2, 0)
}
