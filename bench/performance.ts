// npm run docs: makes the tables of docs/performance.md, and the README's few rows of them, from the
// newest results of each machine (bench/results/<machine>/<date>.json) and from what was predicted.
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { ourName } from './harness.js'
import { parseResults, type Results, type Row } from './results.js'
import { milliseconds } from './table.js'
import {
  judged,
  outcome,
  type Predictions,
  peersOf,
  predictions,
  reachOf,
  sameCase,
  type Target,
  type Verdict,
} from './targets.js'

const start = '<!-- made by npm run docs -->'
const end = '<!-- end -->'

/** The results of a machine. Its folder tells it from others, whose chips may report the same name. */
export interface Measured {
  folder: string
  results: Results
}

/** The newest results of each machine, newest first. */
export function newest(all: readonly Measured[]): Measured[] {
  const out = new Map<string, Measured>()
  for (const one of all.toSorted((a, b) => (a.results.date < b.results.date ? 1 : -1)))
    if (!out.has(one.folder)) out.set(one.folder, one)
  return [...out.values()]
}

export function resultsIn(root: string): Measured[] {
  const results = join(root, 'bench/results')
  return readdirSync(results, { withFileTypes: true })
    .filter((entry) => entry.isDirectory())
    .flatMap(({ name: folder }) =>
      readdirSync(join(results, folder)).map((name) => {
        const text = readFileSync(join(results, folder, name), 'utf8')
        return { folder, results: parseResults(text, `${folder}/${name}`) }
      }),
    )
}

const cell = (text: string): string => text.replaceAll('|', '\\|').replaceAll('*', '\\*')

const notYet = 'not yet measured'

/** The cells of a prediction: measured, share of the ceiling, the best peer, the outcome. */
function cells(target: Target, results: Results | undefined): string[] {
  const rows = results ? rowsOf(target, results) : []
  if (!results || !rows.length) return [notYet, '', '', '']
  const all = rows
    .map((row) => judged(row, results, [target]))
    .filter((verdict): verdict is Verdict => verdict !== undefined)
  const first = rows[0]!
  const best = peersOf(first, results)[0]
  const last = all.filter((v) => v.ratio !== undefined).sort((a, b) => a.ratio! - b.ratio!)
  return [
    span(rows.map((row) => row.median).map(milliseconds), ' ms'),
    span(
      rows.flatMap(({ share }) => (share === undefined ? [] : [(share * 100).toFixed(0)])),
      ` % of ${first.ceiling}`,
    ),
    best ? `${milliseconds(best.median)} ms, ${best.implementation}` : '',
    last[0] ? `${outcome(last[0])} (${last[0].got})` : 'not measured',
  ]
}

function span(values: readonly string[], unit: string): string {
  if (!values.length) return ''
  const sorted = values.toSorted((a, b) => Number(a) - Number(b))
  const [low, high] = [sorted[0]!, sorted.at(-1)!]
  return (low === high ? low : `${low}..${high}`) + unit
}

/** Our rows of a target, with the most threads. */
function rowsOf({ op, case: pattern }: Target, { rows }: Results): Row[] {
  const own = rows.filter(
    (row) => row.implementation === ourName && row.op === op && sameCase(pattern, row.case),
  )
  const most = Math.max(...own.map(({ threads }) => threads ?? 0))
  return own.filter(({ threads }) => (threads ?? 0) === most)
}

const onCpu = ({ rows }: Results): boolean => rows[0]?.device === 'cpu'

/** A table for each machine that was measured, the newest first, then for each that was not yet. */
export function performance(all: readonly Measured[], { targets }: Predictions): string {
  const kinds = [...new Set(targets.map(({ device }) => device))]
  const kindOf = (results: Results): string | undefined =>
    kinds.find((kind) => (kind === 'cpu' ? onCpu(results) : results.machine.device.includes(kind)))
  const machines = newest(all).flatMap((measured) => {
    const kind = kindOf(measured.results)
    return kind === undefined ? [] : [{ kind, measured }]
  })
  const missing = kinds.filter((kind) => !machines.some((machine) => machine.kind === kind))
  return [...machines, ...missing.map((kind) => ({ kind, measured: undefined }))]
    .map(({ kind, measured }) => {
      const mine = targets.filter(({ device }) => device === kind)
      return table(kind, mine, measured)
    })
    .join('\n\n')
}

function table(kind: string, targets: readonly Target[], measured: Measured | undefined): string {
  const results = measured?.results
  const rows = targets.map((target) => ({ target, cells: cells(target, results) }))
  const counted = (how: string): number =>
    rows.filter(({ cells }) => cells.at(-1)!.startsWith(how)).length
  const [met, missed] = [counted('met'), counted('missed')]
  const about = measured
    ? `, [all rows](../bench/results/${measured.folder}): of ${rows.length} predictions ${met} met, ` +
      `${missed} missed, ${rows.length - met - missed} not measured`
    : ''
  return [
    `**${titleOf(kind, results)}**${about}`,
    '',
    '| Work | Predicted | Measured | Share | Best peer | |',
    '| --- | --- | --- | --- | --- | --- |',
    ...rows.map(({ target, cells }) => line([workOf(target), reachOf(target), ...cells])),
  ].join('\n')
}

function titleOf(kind: string, results: Results | undefined): string {
  if (!results) return kind === 'cpu' ? 'CPU' : kind
  const { machine, date, commit } = results
  return (
    `${machine.device}${kind === 'cpu' ? `, ${machine.cpus} CPUs` : ''}, ` +
    `${date.slice(0, 10)}, commit ${commit?.slice(0, 7) ?? 'unknown'}`
  )
}

const workOf = ({ op, case: name }: Target): string => `${op} ${name}`
const line = (all: readonly string[]): string => `| ${all.map(cell).join(' | ')} |`

/** The README's rows: the first prediction of each operation, on the CPU that was measured last. */
export function excerpt(all: readonly Measured[], { targets }: Predictions): string {
  const results = newest(all).find(({ results }) => onCpu(results))?.results
  const firsts = new Map<string, Target>()
  for (const target of targets)
    if (target.device === 'cpu' && !firsts.has(target.op)) firsts.set(target.op, target)
  return [
    `| ${titleOf('cpu', results)} | Time | Best peer | Predicted | |`,
    '| --- | --- | --- | --- | --- |',
    ...[...firsts.values()].map((target) => {
      const [time, , peer, got] = cells(target, results)
      return line([workOf(target), time!, peer!, reachOf(target), got!])
    }),
  ].join('\n')
}

/** A document with its tables updated. */
export function withTables(document: string, tables: string): string {
  const [before, rest] = document.split(start)
  const after = rest?.split(end)[1]
  if (before === undefined || after === undefined)
    throw new Error(`the document lacks the lines ${start} and ${end}`)
  return `${before}${start}\n\n${tables}\n\n${end}${after}`
}

/** Which document has which tables. */
export const documents = { 'docs/performance.md': performance, 'README.md': excerpt }

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))))
  for (const [name, tables] of Object.entries(documents)) {
    const file = join(root, name)
    const text = tables(resultsIn(root), predictions(root))
    writeFileSync(file, withTables(readFileSync(file, 'utf8'), text))
  }
}
