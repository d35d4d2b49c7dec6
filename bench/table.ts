// The results as text for a terminal.
import { ourName } from './harness.js'
import {
  bytesOf,
  type Ceilings,
  type Change,
  type Comparison,
  ceilingKinds,
  type Results,
  type Row,
  threadsOf,
} from './results.js'
import { exponent, seriesOf } from './series.js'
import {
  judged,
  outcome,
  type Predictions,
  type Verdict,
  verdicts,
  whereTimeWent,
} from './targets.js'

/** Columns padded to their widest cell; the first `left` are left-aligned, the others right-aligned. */
export function aligned(rows: readonly (readonly string[])[], left: number): string {
  const widths: number[] = []
  for (const row of rows)
    for (const [i, cell] of row.entries()) widths[i] = Math.max(widths[i] ?? 0, cell.length)
  return rows
    .map((row) =>
      row
        .map((cell, i) => (i < left ? cell.padEnd(widths[i]!) : cell.padStart(widths[i]!)))
        .join('  ')
        .trimEnd(),
    )
    .join('\n')
}

export function milliseconds(ms: number): string {
  return ms >= 100
    ? ms.toFixed(0)
    : ms >= 10
      ? ms.toFixed(1)
      : ms >= 1
        ? ms.toFixed(2)
        : ms.toFixed(3)
}

function giga(x: number, unit: string): string {
  const billions = x / 1e9
  return `${billions >= 1000 ? billions.toFixed(0) : billions.toPrecision(3)} G${unit}/s`
}

/** Useful work a second, in the unit of the ceiling that binds the row. */
export function rate(row: Row): string {
  const seconds = row.median / 1e3
  const bytes = bytesOf(row)
  const computes = row.ceiling
    ? row.ceiling === 'fma' || row.ceiling === 'bf16'
    : (row.flops ?? 0) > 4 * bytes
  if (computes && row.flops) return giga(row.flops / seconds, 'FLOP')
  return bytes ? giga(bytes / seconds, 'B') : ''
}

const shortest = (text: string, most: number): string =>
  text.length > most ? `${text.slice(0, most - 1)}…` : text

/** Lines of at most 80 columns, broken between words; a longer word has a line of its own. */
export function wrapped(text: string): string {
  const lines: string[] = []
  for (const word of text.split(' ')) {
    const last = lines.at(-1)
    if (last !== undefined && last.length + 1 + word.length <= 80)
      lines.push(`${lines.pop()} ${word}`)
    else lines.push(word)
  }
  return lines.join('\n')
}

/** The median, half of the middle half of the samples, the rate, and the share or the multiple of ours. */
const heading = ['by', 'thr', 'median ms', '±', 'rate', 'of ceiling']

/**
 * A block for each case, at most 80 columns wide: this package's row with its share of the ceiling that
 * binds, the peers' with their time as a multiple of it, and the prediction, if there is one.
 */
export function resultTable(
  results: Pick<Results, 'rows'>,
  judge: (row: Row) => Verdict | undefined = () => undefined,
): string {
  const { rows } = results
  const cells = rows.map((row) => {
    const ours = rows.find(
      (r) =>
        r.implementation === ourName &&
        r.op === row.op &&
        r.case === row.case &&
        r.threads === row.threads,
    )
    const share =
      row.share === undefined ? '' : `${(row.share * 100).toFixed(0)} % ${row.ceiling ?? ''}`
    return [
      `  ${shortest(row.implementation, 24)}`,
      String(threadsOf(row) ?? ''),
      milliseconds(row.median),
      `${((50 * (row.p75 - row.p25)) / row.median).toFixed(0)} %`,
      rate(row),
      ours && ours !== row ? `x${(row.median / ours.median).toPrecision(3)}` : share,
    ]
  })
  const [first, ...lines] = aligned([heading, ...cells], 1).split('\n')
  const out = [first!]
  let last = ''
  for (const [i, row] of rows.entries()) {
    const group = `${row.op} ${row.case}`
    if (group !== last) out.push(shortest(group, 80))
    last = group
    out.push(lines[i]!)
    const verdict = judge(row)
    if (verdict) out.push(shortest(`  predicted ${verdict.reach}: ${outcome(verdict)}`, 80))
  }
  return out.join('\n')
}

/** Rows as they are in a report, without predictions. */
export function table(rows: readonly Row[]): string {
  return resultTable({ rows: [...rows] })
}

/** Rows that did more than their ceiling allows, as a finding. */
export function impossibleReport(rows: readonly Row[]): string {
  return [
    `Above 105 % of their ceiling, so the ceiling is wrong or was disturbed: ${rows.length}`,
    ...rows.map(
      (row) =>
        `  ${row.op} ${row.case}, ${row.implementation}: ${(row.share! * 100).toFixed(0)} % of ${row.ceiling}`,
    ),
  ].join('\n')
}

/** Predicted and measured figures, and where the time of a missed target went. */
export function verdictTable(results: Results, predicted: Predictions): string {
  const all = verdicts(results, predicted)
  if (!all.length) return ''
  const lines = all.flatMap((v) => [
    shortest(`${outcome(v).padEnd(12)} ${v.row.op} ${v.row.case}`, 80),
    shortest(`  ${v.reach}, got ${v.got}`, 80),
    ...(outcome(v) === 'missed' ? [`  ${whereTimeWent(v.row, results)}`] : []),
  ])
  const met = all.filter((v) => outcome(v) === 'met').length
  return [`Predicted: ${met} of ${all.length} met`, ...lines].join('\n')
}

/** How time and memory grow along each series: the exponent of size that fits its larger half. */
export function seriesTable(rows: readonly Row[]): string {
  const lines = seriesOf(rows).map(({ op, name, implementation, rows }) => {
    const sizes = rows.map((row) => row.series!.size)
    const memory = rows.every((row) => row.peakBytes)
      ? exponent(
          sizes,
          rows.map((row) => row.peakBytes!),
        ).toFixed(2)
      : ''
    const last = rows.at(-1)!
    return [
      op,
      implementation,
      `${name} ${sizes[0]}..${sizes.at(-1)}`,
      last.threads === undefined ? '' : `${last.threads} thr`,
      exponent(
        sizes,
        rows.map((row) => row.median),
      ).toFixed(2),
      memory,
      last.peakBytes === undefined ? '' : `${(last.peakBytes / 2 ** 20).toFixed(1)} MiB`,
    ]
  })
  const heading = ['series', 'by', 'over', '', 'time ~ size^', 'memory ~ size^', 'at the largest']
  return lines.length ? aligned([heading, ...lines], 3) : ''
}

export function ceilingTable(ceilings: readonly Ceilings[]): string {
  const kinds = ceilingKinds.filter((kind) => ceilings.some((c) => c[kind]))
  const lines = ceilings.map((c) => [
    c.threads === undefined ? 'device' : `${c.threads} thread${c.threads > 1 ? 's' : ''}`,
    ...kinds.map((kind) =>
      c[kind] ? giga(c[kind], kind === 'fma' || kind === 'bf16' ? 'FLOP' : 'B') : '',
    ),
  ])
  return aligned([['ceilings', ...kinds], ...lines], 1)
}

/** The machine and the versions, a line each. */
export function headingLines({ machine, versions, commit }: Results): string[] {
  return [
    `${machine.cpu}, ${machine.cpus} CPUs, ${machine.platform} ${machine.arch}; measured: ${machine.device}`,
    Object.entries(versions)
      .map(([name, version]) => `${name} ${version}`)
      .join(', ') +
      (commit ? `, commit ${commit.slice(0, 12)}${commit.endsWith('+') ? '+' : ''}` : ''),
  ]
}

export function report(results: Results, predicted: Predictions): string {
  const parts = [...headingLines(results).map(wrapped), '']
  if (results.ceilings.length) parts.push(ceilingTable(results.ceilings), '')
  parts.push(resultTable(results, (row) => judged(row, results, predicted.targets)))
  for (const table of [seriesTable(results.rows), verdictTable(results, predicted)])
    if (table) parts.push('', table)
  if (results.notes.length) parts.push('', ...results.notes.map(wrapped))
  return parts.join('\n')
}

export function comparisonReport(c: Comparison, baseline: string): string {
  const lines = (changes: readonly Change[]) =>
    aligned(
      changes.map(({ row, before, ratio }) => [
        `  ${row.op}`,
        row.case,
        row.implementation,
        row.threads === undefined ? '' : `${row.threads} thr`,
        `${milliseconds(before.median)} -> ${milliseconds(row.median)} ms`,
        `x${ratio.toFixed(2)}`,
      ]),
      3,
    )
  const parts = [`Against ${baseline}: ${c.compared} rows compared.`, ...c.caveats.map(wrapped)]
  if (c.slower.length) parts.push(`Slower beyond the noise: ${c.slower.length}`, lines(c.slower))
  else parts.push('Nothing got slower beyond the noise.')
  if (c.faster.length) parts.push(`Faster beyond the noise: ${c.faster.length}`, lines(c.faster))
  if (c.gone.length) parts.push(`Rows of the baseline that were not measured: ${c.gone.length}.`)
  if (c.added.length) parts.push(`Rows that the baseline lacks: ${c.added.length}.`)
  return parts.join('\n')
}
