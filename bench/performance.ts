// npm run docs: makes the tables of docs/performance.md, and the README's few rows of them, from the
// newest results of each machine (bench/results/*.json) and from what was predicted.
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

/** The newest results of each machine, by the name of the device, newest first. */
export function newest(all: readonly Results[]): Results[] {
  const out = new Map<string, Results>()
  for (const results of all.toSorted((a, b) => (a.date < b.date ? 1 : -1))) {
    const { device, cpus } = results.machine
    const key = results.rows[0]?.device === 'cpu' ? `${device} ${cpus}` : device
    if (!out.has(key)) out.set(key, results)
  }
  return [...out.values()]
}

export function resultsIn(root: string): Results[] {
  const folder = join(root, 'bench/results')
  return readdirSync(folder)
    .filter((name) => name.endsWith('.json') && name !== 'predictions.json')
    .map((name) => parseResults(readFileSync(join(folder, name), 'utf8'), name))
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

/** The tables, one for each machine with predictions or results. */
export function performance(all: readonly Results[], { targets }: Predictions): string {
  const latest = newest(all)
  const onCpu = ({ rows }: Results) => rows[0]?.device === 'cpu'
  const kinds = [...new Set(targets.map(({ device }) => device))]
  return kinds
    .flatMap((kind) => {
      const machines = latest.filter((results) =>
        kind === 'cpu' ? onCpu(results) : results.machine.device.includes(kind),
      )
      const mine = targets.filter(({ device }) => device === kind)
      return (machines.length ? machines : [undefined]).map((results) => table(kind, mine, results))
    })
    .join('\n\n')
}

function table(kind: string, targets: readonly Target[], results: Results | undefined): string {
  return [
    `**${titleOf(kind, results)}**`,
    '',
    '| Work | Predicted | Measured | Share | Best peer | |',
    '| --- | --- | --- | --- | --- | --- |',
    ...targets.map((target) => line([workOf(target), reachOf(target), ...cells(target, results)])),
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
export function excerpt(all: readonly Results[], { targets }: Predictions): string {
  const results = newest(all).find(({ rows }) => rows[0]?.device === 'cpu')
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
