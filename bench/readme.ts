// npm run bench:readme: makes the README's performance tables from the newest results of
// each machine (bench/results/*.json) and from what was predicted.
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

const start = '<!-- made by npm run bench:readme -->'
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
  const title = results
    ? `${results.machine.device}${kind === 'cpu' ? `, ${results.machine.cpus} CPUs` : ''}, ` +
      `${results.date.slice(0, 10)}, commit ${results.commit?.slice(0, 7) ?? 'unknown'}`
    : kind === 'cpu'
      ? 'CPU'
      : kind
  const lines = targets.map((target) => {
    const work = `${target.op} ${target.case}`
    return `| ${[work, reachOf(target), ...cells(target, results)].map(cell).join(' | ')} |`
  })
  return [
    `**${title}**`,
    '',
    '| Work | Predicted | Measured | Share | Best peer | |',
    '| --- | --- | --- | --- | --- | --- |',
    ...lines,
  ].join('\n')
}

/** The README with its tables updated. */
export function readmeWith(readme: string, tables: string): string {
  const [before, rest] = readme.split(start)
  const after = rest?.split(end)[1]
  if (before === undefined || after === undefined)
    throw new Error(`README.md lacks the lines ${start} and ${end}`)
  return `${before}${start}\n\n${tables}\n\n${end}${after}`
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))))
  const file = join(root, 'README.md')
  writeFileSync(
    file,
    readmeWith(readFileSync(file, 'utf8'), performance(resultsIn(root), predictions(root))),
  )
}
