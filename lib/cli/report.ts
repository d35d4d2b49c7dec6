import type { Result } from './questions.js'
import {
  bootstrap,
  type Cluster,
  type Interval,
  meanAndStd,
  pairedBootstrap,
  wilson,
} from './statistics.js'

/** Of a category, or of all. */
export interface Score {
  /** Of one run. */
  questions: number
  /** Of all runs. */
  correct: number
  /** correct / those without an error, in percent; null where there are none. */
  accuracy: number | null
  /** Of 95 %, in percent; null where there is no accuracy. */
  interval: Interval | null
  /** The standard deviation of the runs' accuracies; absent for one run. */
  std?: number
  /** Share of questions, in percent, that are right in all orders of their options; absent without such orders. */
  allOrders?: number
  /** Mean number of boxes in the perceiver's output, or of an agent's crops. */
  boxes: number | null
  /** All of the perceiver's boxes that have no crop, for their range or their shape. */
  droppedBoxes: number
  /** Mean number of pixels, in millions, that were shown for a question. */
  megapixels: number | null
  /** Mean number of requests for a question. */
  requests: number | null
  failed: number
  /** Judged questions for which the limit of tokens cut an output off. */
  truncated: number
  /** Judged questions for which an agent's turns ran out. */
  outOfTurns: number
}

export interface Summary {
  overall: Score
  /** With groups: the mean of a group's categories, in percent, by the group's name. */
  means?: Record<string, number>
  categories: Record<string, Score>
}

/** The order of categories, before all others, and whether they are in groups, 'group/category'. */
export interface Arrangement {
  order?: readonly string[]
  grouped?: boolean
}

/** The results of several runs over the same questions, each by line. */
export type Runs = readonly Iterable<Result>[]

export function summaryOf(runs: Runs, { order = [], grouped = false }: Arrangement = {}): Summary {
  const all = runs.map((results) => [...results])
  const named = new Set(all.flat().map(({ category }) => category))
  const names = [
    ...order.filter((name) => named.has(name)),
    ...[...named].filter((name) => !order.includes(name)).sort(),
  ]
  const of = (keep: (category: string) => boolean): Score =>
    scoreOf(all.map((results) => results.filter(({ category }) => keep(category))))
  const categories: Record<string, Score> = {}
  const means: Record<string, number> = {}
  for (const name of names) categories[name] = of((category) => category === name)
  for (const group of grouped ? new Set(names.map(groupOf)) : []) {
    categories[group] = of((category) => groupOf(category) === group)
    const own = names.filter((name) => groupOf(name) === group)
    const accuracies = own.flatMap((name) => categories[name]!.accuracy ?? [])
    if (accuracies.length) means[group] = meanAndStd(accuracies).mean
  }
  return { overall: of(() => true), ...(grouped && { means }), categories }
}

function groupOf(category: string): string {
  return category.split('/')[0]!
}

function isJudged({ reward }: Result): boolean {
  return reward !== undefined
}

function scoreOf(runs: readonly (readonly Result[])[]): Score {
  const results = runs.flat()
  const judged = results.filter(isJudged)
  const sum = (f: (result: Result) => number): number => judged.reduce((s, r) => s + f(r), 0)
  const mean = (f: (result: Result) => number): number | null =>
    judged.length ? sum(f) / judged.length : null
  const correct = sum(({ reward = 0 }) => reward)
  const clusters = clustersOf(judged)
  const accuracies = runs.flatMap((run) => {
    const own = run.filter(isJudged)
    return own.length ? (100 * own.reduce((s, r) => s + r.reward!, 0)) / own.length : []
  })
  const orders = judged.some(({ cluster }) => cluster !== undefined)
  return {
    questions: Math.max(0, ...runs.map((run) => run.length)),
    correct,
    accuracy: judged.length ? (100 * correct) / judged.length : null,
    interval: judged.length ? inPercent(intervalOf(clusters)) : null,
    ...(runs.length > 1 && { std: meanAndStd(accuracies).std }),
    ...(orders && {
      allOrders:
        (100 * clusters.filter(({ sum, count }) => sum === count).length) / clusters.length,
    }),
    boxes: mean(({ boxes = 0 }) => boxes),
    droppedBoxes: sum(({ droppedBoxes = 0 }) => droppedBoxes),
    megapixels: mean(({ pixels = 0 }) => pixels / 1e6),
    requests: mean(({ requests = 0 }) => requests),
    failed: results.length - judged.length,
    truncated: judged.filter(({ truncated }) => truncated?.length).length,
    outOfTurns: judged.filter(({ outOfTurns }) => outOfTurns).length,
  }
}

/** The answers to each question, which may be in several orders of its options, and of several runs. */
function clustersOf(judged: readonly Result[]): Cluster[] {
  return [...byQuestion(judged).values()]
}

function byQuestion(judged: readonly Result[]): Map<string, Cluster> {
  const clusters = new Map<string, Cluster>()
  for (const { cluster, line, reward = 0 } of judged) {
    const key = cluster ?? String(line)
    const one = clusters.get(key) ?? { sum: 0, count: 0 }
    clusters.set(key, { sum: one.sum + reward, count: one.count + 1 })
  }
  return clusters
}

function intervalOf(clusters: readonly Cluster[]): Interval {
  if (clusters.some(({ count }) => count > 1)) return bootstrap(clusters)
  return wilson(
    clusters.reduce((sum, cluster) => sum + cluster.sum, 0),
    clusters.length,
  )
}

function inPercent({ low, high, ...rest }: Interval): Interval {
  return { low: 100 * low, high: 100 * high, ...rest }
}

const percent = (value: number): string => `${value.toFixed(1)} %`
const between = ({ low, high }: { low: number; high: number }): string =>
  `${low.toFixed(1)} to ${high.toFixed(1)}`

export function tableOf({ overall, means = {}, categories }: Summary): string {
  const spread = overall.std !== undefined
  const orders = overall.allOrders !== undefined
  const row = (name: string, score: Score): string[] => [
    name,
    String(score.questions),
    String(score.correct),
    score.accuracy === null
      ? '-'
      : `${score.accuracy.toFixed(1)}${spread ? ` ± ${(score.std ?? 0).toFixed(1)}` : ''} %`,
    score.interval ? between(score.interval) : '-',
    ...(orders ? [score.allOrders === undefined ? '-' : percent(score.allOrders)] : []),
    score.boxes === null ? '-' : score.boxes.toFixed(2),
    score.megapixels === null ? '-' : score.megapixels.toFixed(1),
    score.requests === null ? '-' : score.requests.toFixed(1),
    String(score.failed),
  ]
  const heads = ['category', 'questions', 'correct', 'accuracy', '95 % interval']
  const width = heads.length + 4 + +orders
  const method = overall.interval?.method
  const table = aligned([
    [...heads, ...(orders ? ['all orders'] : []), 'boxes', 'Mpx', 'requests', 'failed'],
    ...Object.entries(categories).flatMap(([name, score]) => {
      const mean = means[name]
      const rows = [row(name, score)]
      if (mean !== undefined)
        rows.push([
          `${name}, mean of categories`,
          '',
          '',
          percent(mean),
          ...Array(width - 4).fill(''),
        ])
      return rows
    }),
    row('all', overall),
  ])
  const notes = {
    wilson: '95 % intervals are Wilson scores.',
    bootstrap: '95 % intervals are percentiles of a bootstrap over questions.',
  }
  return method ? `${table}\n${notes[method]}` : table
}

/** How two forms do on the same questions. */
export interface Comparison {
  /** Questions that both have judged. */
  questions: number
  /** The second's accuracy less the first's, in percentage points. */
  difference: number
  /** Of 95 %, by a bootstrap over questions. */
  interval: { low: number; high: number }
}

/** Undefined where there is no question that both have judged. */
export function comparisonOf(first: Runs, second: Runs): Comparison | undefined {
  const [a, b] = [first, second].map((runs) =>
    byQuestion(runs.flatMap((results) => [...results]).filter(isJudged)),
  )
  const pairs = [...a!].flatMap(([key, one]) => {
    const other = b!.get(key)
    return other ? [[one, other] as const] : []
  })
  if (!pairs.length) return undefined
  const differences = pairs.map(([x, y]) => y.sum / y.count - x.sum / x.count)
  const { low, high } = pairedBootstrap(pairs)
  return {
    questions: pairs.length,
    difference: 100 * meanAndStd(differences).mean,
    interval: { low: 100 * low, high: 100 * high },
  }
}

export function comparisonText(
  [first, second]: readonly [string, string],
  { questions, difference, interval }: Comparison,
): string {
  const sign = difference >= 0 ? '+' : ''
  return (
    `${second} less ${first}: ${sign}${difference.toFixed(1)} points on ${questions} questions, ` +
    `95 % interval ${between(interval)} (paired bootstrap over questions)`
  )
}

function aligned(rows: readonly (readonly string[])[]): string {
  const widths = rows[0]!.map((_, column) => Math.max(...rows.map((r) => r[column]!.length)))
  return rows
    .map((r) =>
      r
        .map((cell, i) => (i ? cell.padStart(widths[i]!) : cell.padEnd(widths[i]!)))
        .join('  ')
        .trimEnd(),
    )
    .join('\n')
}
