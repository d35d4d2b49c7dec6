// The report as a page: one self-contained HTML file, whose script sorts, filters and shows tips.
import { ourName } from './harness.js'
import { page } from './page.js'
import { escaped, logPlot, type Mark, short } from './plot.js'
import {
  bytesOf,
  type Ceilings,
  largestShare,
  type Results,
  type Row,
  threadsOf,
} from './results.js'
import { exponent, type RowSeries, seriesOf } from './series.js'
import { ceilingTable, headingLines, milliseconds, rate } from './table.js'
import { atCeilings, outcome, type Predictions, peersOf, verdicts } from './targets.js'

const isOurs = ({ implementation }: Row): boolean => implementation === ourName
const percent = (share: number): string => `${(share * 100).toFixed(0)} %`
const times = (ratio: number): string => `x${ratio.toPrecision(3)}`

/** The rows with the most threads, outside of series. */
function shown({ rows }: Results): Row[] {
  const most = Math.max(0, ...rows.map(({ threads }) => threads ?? 0))
  return rows.filter((row) => (row.threads ?? 0) === most && !row.series)
}

/** A cell: its text, the number that it is sorted by, and its markup if that is more than the text. */
interface Cell {
  text: string
  value?: number
  style?: string
  inside?: string
}

const words = (text: string): Cell => ({ text })
const figure = (value: number | undefined, format: (value: number) => string, style = ''): Cell =>
  value === undefined ? { text: '' } : { text: format(value), value, style }

interface Column {
  name: string
  /** Right-aligned, and sorted by number. */
  number?: boolean
  tip?: string
}

function sortable(
  columns: readonly Column[],
  rows: readonly { op: string; style?: string; cells: readonly Cell[] }[],
): string {
  const head = columns.map(({ name, number, tip }) => {
    const about = tip === undefined ? '' : ` data-tip="${escaped(tip)}"`
    const kind = number ? ' class="n"' : ''
    return `<th scope="col"${kind}><button type="button"${about}>${escaped(name)}</button></th>`
  })
  const body = rows.map(({ op, style, cells }) => {
    const all = cells.map(({ text, value, style = '', inside }, i) => {
      const classes = [columns[i]!.number ? 'n' : '', style].filter(Boolean).join(' ')
      const kind = classes ? ` class="${classes}"` : ''
      const by = value === undefined ? '' : ` data-value="${value}"`
      return `<td${kind}${by}>${inside ?? escaped(text)}</td>`
    })
    const kind = style ? ` class="${style}"` : ''
    return `<tr data-op="${escaped(op)}"${kind}>${all.join('')}</tr>`
  })
  return `<div class="table" tabindex="0"><table>
<thead><tr>${head.join('')}</tr></thead>
<tbody>
${body.join('\n')}
</tbody></table></div>`
}

/** A bar of `part` of the width; `mark` is where a line stands across. */
function bar(part: number, style: string, from = 0, mark?: number): string {
  const at = (value: number): string => (100 * value).toFixed(1)
  const line = mark === undefined ? '' : `<i style="left:${at(mark)}%"></i>`
  const [left, width] = [Math.min(from, part), Math.abs(part - from)]
  return `<div class="bar"><b class="${style}" style="left:${at(left)}%;width:${at(width)}%"></b>${line}</div>`
}

const swatch = (op: string): Cell => ({
  text: op,
  inside: `<span class="op" data-hue="${escaped(op)}"></span>${escaped(op)}`,
})

/** How many times longer the best peer takes, on a logarithmic scale. */
function ratios(results: Results): string | undefined {
  const pairs = shown(results)
    .filter(isOurs)
    .flatMap((row) => {
      const [best] = peersOf(row, results)
      return best ? [{ row, best, ratio: best.median / row.median }] : []
    })
    .sort((a, b) => b.ratio - a.ratio)
  if (!pairs.length) return undefined
  const low = Math.log(Math.min(1, ...pairs.map(({ ratio }) => ratio)))
  const high = Math.log(Math.max(2, ...pairs.map(({ ratio }) => ratio)))
  const along = (ratio: number): number => (Math.log(ratio) - low) / (high - low)
  return sortable(
    [
      { name: 'operation' },
      { name: 'case' },
      { name: 'ms', number: true, tip: 'the median of ours' },
      { name: 'best peer' },
      { name: 'its ms', number: true },
      { name: 'ratio', number: true, tip: "the peer's time over ours" },
      { name: 'ratio, on a logarithmic scale' },
    ],
    pairs.map(({ row, best, ratio }) => ({
      op: row.op,
      cells: [
        swatch(row.op),
        words(row.case),
        figure(row.median, milliseconds),
        words(best.implementation),
        figure(best.median, milliseconds),
        figure(ratio, times, ratio >= 1 ? 'good' : 'bad'),
        {
          text: '',
          value: ratio,
          inside: bar(along(ratio), ratio >= 1 ? 'fast' : 'slow', along(1), along(1)),
        },
      ],
    })),
  )
}

/** Each row's share of the ceiling that binds it, beside the best of the peers'. */
function shares(results: Results): string | undefined {
  const rows = shown(results).filter((row) => isOurs(row) && row.share !== undefined)
  if (!rows.length) return undefined
  const best = (row: Row): number | undefined => peersOf(row, results)[0]?.share
  const most = Math.max(1, ...rows.flatMap((row) => [row.share!, best(row) ?? 0]))
  return sortable(
    [
      { name: 'operation' },
      { name: 'case' },
      { name: 'ms', number: true },
      { name: 'share', number: true, tip: 'of the time, what the machine itself needs at least' },
      { name: 'of', tip: 'the ceiling that binds' },
      { name: "best peer's", number: true, tip: 'the share of the fastest peer' },
      { name: `share; the line is 100 %` },
    ],
    rows.map((row) => ({
      op: row.op,
      cells: [
        swatch(row.op),
        words(row.case),
        figure(row.median, milliseconds),
        shareOf(row),
        words(row.ceiling ?? ''),
        figure(best(row), percent),
        {
          text: '',
          value: row.share!,
          inside: bar(row.share! / most, row.share! > largestShare ? 'slow' : 'fast', 0, 1 / most),
        },
      ],
    })),
  )
}

/** Above what noise explains, it shows that the ceiling is wrong. */
const shareOf = (row: Row): Cell =>
  figure(row.share, percent, (row.share ?? 0) > largestShare ? 'bad' : '')

/** Useful FLOP/s over FLOP/byte, below the machine's roof. */
function roofline(results: Results, hues: ReadonlyMap<string, number>): string | undefined {
  const rows = shown(results).filter((row) => row.flops && bytesOf(row))
  const limits = results.ceilings.find((c) => c.threads === rows[0]?.threads)
  if (!rows.length || !limits) return undefined
  const points = rows.map((row) => ({
    row,
    x: row.flops! / bytesOf(row),
    y: (row.flops! * 1e3) / row.median,
    tip: [
      `${row.op} ${row.case}`,
      `${row.implementation}: ${milliseconds(row.median)} ms, ${rate(row)}`,
      ...(row.share === undefined ? [] : [`${percent(row.share)} of ${row.ceiling}`]),
    ].join('\n'),
  }))
  const bandwidth = Math.max(limits.copy, limits.read ?? 0)
  const corner = (limits.fma ?? limits.bf16 ?? limits.copy) / bandwidth
  // With the corner of the roof and some of its slope.
  const low = Math.min(corner, ...points.map((p) => p.x)) / 2
  const high = Math.max(corner, ...points.map((p) => p.x)) * 2
  const roofs = roofsOf(limits, new Set(rows.map((row) => row.products ?? 'f32'))).map(
    ([name, peak]): Mark => ({
      style: `roof ${name}`,
      as: ['line'],
      points: [low, peak / bandwidth, high].map((x) => ({
        x,
        y: Math.min(peak, x * bandwidth),
        tip: '',
      })),
    }),
  )
  const marks = points
    .sort((a, b) => Number(isOurs(a.row)) - Number(isOurs(b.row)))
    .map(({ row, ...point }): Mark => {
      const own = isOurs(row)
      return {
        style: own ? `point hue-${hues.get(row.op)}` : 'peer',
        op: row.op,
        as: [own ? 'circle' : 'cross'],
        points: [point],
      }
    })
  const drawn = logPlot(
    {
      width: 760,
      height: 420,
      x: 'FLOP per byte that must cross memory',
      y: 'useful FLOP/s',
      description: 'Roofline: useful operations a second over operations per byte',
    },
    [...roofs, ...marks],
  )
  return `<figure>${drawn}</figure><p class="key"><span class="k circle"></span> ${ourName}, in its operation's colour <span class="k cross">×</span> peers <span class="k roofline"></span> f32 roof <span class="k roofline dashed"></span> bf16 roof</p>`
}

function roofsOf(limits: Ceilings, products: ReadonlySet<string>): [string, number][] {
  return [
    ...(limits.fma && products.has('f32') ? [['f32', limits.fma] as [string, number]] : []),
    ...(limits.bf16 && products.has('bf16') ? [['bf16', limits.bf16] as [string, number]] : []),
  ]
}

/** Time and memory against size, on logarithmic axes, with the exponents that fit. */
function growth(series: readonly RowSeries[]): string {
  const [{ name, op }] = series as [RowSeries]
  const panel = (
    title: string,
    y: string,
    list: readonly RowSeries[],
    value: (row: Row) => number,
    format: (value: number) => string,
  ): string => {
    const marks = list.map(
      ({ implementation, rows }): Mark => ({
        style: styleOf(series, implementation),
        as: ['line', 'circle'],
        points: rows.map((row) => ({
          x: row.series!.size,
          y: value(row),
          tip: `${implementation}\n${row.series!.size} ${name}: ${format(value(row))}`,
        })),
      }),
    )
    const about = { width: 360, height: 260, x: `${name} of ${op}`, y, description: title }
    return `<figure><figcaption>${escaped(title)}</figcaption>${logPlot(about, marks)}</figure>`
  }
  const exponentOf = ({ rows }: RowSeries, value: (row: Row) => number): string =>
    exponent(
      rows.map((row) => row.series!.size),
      rows.map(value),
    ).toFixed(2)
  const time = (row: Row): number => row.median
  const memory = (row: Row): number => row.peakBytes!
  const own = series.find(({ rows }) => isOurs(rows[0]!))
  const panels = [
    panel(
      own ? `time ~ size^${exponentOf(own, time)}` : 'time',
      'milliseconds',
      series,
      time,
      (ms) => `${milliseconds(ms)} ms`,
    ),
    ...series
      .filter(({ rows }) => rows.every((row) => row.peakBytes))
      .map((one) =>
        panel(
          `memory ~ size^${exponentOf(one, memory)}`,
          'bytes beyond the inputs',
          [one],
          memory,
          (bytes) => `${short(bytes)}B`,
        ),
      ),
  ]
  const key = series.map(
    ({ implementation }) =>
      `<span class="k circle ${styleOf(series, implementation)}"></span> ${escaped(implementation)}`,
  )
  return `<div class="growth" data-op="${escaped(op)}"><h3>${escaped(`${op}, ${name}`)}</h3><div class="panels">${panels.join('')}</div><p class="key">${key.join(' ')}</p></div>`
}

/** Ours is the first colour; peers have the others in turn. */
function styleOf(series: readonly RowSeries[], implementation: string): string {
  const peers = series.map((s) => s.implementation).filter((name) => name !== ourName)
  return `series-${implementation === ourName ? 0 : 1 + (peers.indexOf(implementation) % 5)}`
}

/** What was predicted, what was measured, and what the ceilings account for. */
function predicted(results: Results, all: Predictions): string | undefined {
  const judgements = verdicts(results, all)
  if (!judgements.length) return undefined
  return sortable(
    [
      { name: 'operation' },
      { name: 'case' },
      { name: 'predicted' },
      { name: 'measured', number: true },
      { name: 'outcome' },
      { name: 'reached', number: true, tip: 'the measurement over the prediction; met from 100 %' },
      { name: 'ms', number: true, tip: 'the median' },
      {
        name: 'products, ms',
        number: true,
        tip: 'the least time of the products, at their ceiling',
      },
      { name: 'memory, ms', number: true, tip: 'the least time of the bytes, at their ceiling' },
    ],
    judgements.map((verdict) => {
      const { row, reach, got, ratio } = verdict
      const { products, memory } = atCeilings(row, results)
      const how = outcome(verdict)
      return {
        op: row.op,
        style: how.replace(' ', '-'),
        cells: [
          swatch(row.op),
          words(row.case),
          words(reach),
          ratio === undefined ? words(got) : { text: got, value: Number(got.match(/[\d.]+/)?.[0]) },
          { text: how, style: 'outcome' },
          figure(ratio, percent),
          figure(row.median, milliseconds),
          figure(products, milliseconds),
          figure(memory, milliseconds),
        ],
      }
    }),
  )
}

function everything(results: Results): string {
  const { rows } = results
  return sortable(
    [
      { name: 'operation' },
      { name: 'case' },
      { name: 'by' },
      { name: 'threads', number: true },
      { name: 'ms', number: true, tip: 'the median of the samples' },
      { name: 'p25', number: true, tip: 'a quarter of the samples are faster' },
      { name: 'p75', number: true, tip: 'three quarters of the samples are faster' },
      { name: 'ratio', number: true, tip: 'its time over ours' },
      { name: 'rate', number: true },
      { name: 'share', number: true },
      { name: 'of' },
      { name: 'MiB', number: true, tip: 'what a run takes at its height, besides its inputs' },
    ],
    rows.map((row) => {
      const ours = rows.find(
        (r) => isOurs(r) && r.op === row.op && r.case === row.case && r.threads === row.threads,
      )
      return {
        op: row.op,
        ...(isOurs(row) ? { style: 'own' } : {}),
        cells: [
          swatch(row.op),
          words(row.case),
          words(row.implementation),
          figure(threadsOf(row), String),
          figure(row.median, milliseconds),
          figure(row.p25, milliseconds),
          figure(row.p75, milliseconds),
          figure(ours && ours !== row ? row.median / ours.median : undefined, times),
          { text: rate(row), value: Math.max(row.flops ?? 0, bytesOf(row)) / row.median },
          shareOf(row),
          words(row.ceiling ?? ''),
          figure(row.peakBytes, (bytes) => (bytes / 2 ** 20).toFixed(1)),
        ],
      }
    }),
  )
}

/** The whole report. */
export function html(results: Results, predictions: Predictions): string {
  const ops = [...new Set(results.rows.map(({ op }) => op))].sort()
  // By the golden angle, hues of neighbours in the alphabet are far apart.
  const hues = new Map(ops.map((op, i) => [op, Math.round((200 + i * 137.508) % 360)]))
  const parts: string[] = []
  const section = (title: string, words: string, body: string | undefined) => {
    if (body) parts.push(`<section><h2>${title}</h2>`, `<p>${words}</p>`, body, '</section>')
  }
  section(
    'Against the best peer',
    'How many times longer the fastest of the peers takes that gave the same result in the same run.',
    ratios(results),
  )
  section(
    'Roofline',
    'Useful work a second over the bytes that must cross memory, below what this machine did at most in the same run. Caches can lift a point over the sloped part.',
    roofline(results, hues),
  )
  section(
    'Shares',
    'Of the time, how much the machine itself would need for the same products and bytes. A share above 105 % shows that a ceiling is wrong or was disturbed.',
    shares(results),
  )
  const series = new Map<string, RowSeries[]>()
  for (const one of seriesOf(results.rows)) {
    const key = [one.op, one.name, one.rows[0]!.threads].join(' | ')
    series.set(key, [...(series.get(key) ?? []), one])
  }
  section(
    'Growth with size',
    'Exponents are fitted to the larger half of the sizes. Memory is what a run takes at its height: results and scratch.',
    [...series.values()].map(growth).join('\n'),
  )
  section(
    'Predictions',
    'What was written down before, what was measured, and the least time that products and bytes need at the ceilings; they may overlap.',
    predicted(results, predictions),
  )
  section(
    'All rows',
    'Medians with the middle half of the samples, in milliseconds.',
    everything(results),
  )
  if (results.ceilings.length)
    section(
      'Ceilings',
      'What the machine did at most, before and after the rows.',
      `<div class="table" tabindex="0"><pre>${escaped(ceilingTable(results.ceilings))}</pre></div>`,
    )
  if (results.notes.length)
    parts.push(
      '<section><h2>Notes</h2><ul>',
      ...results.notes.map((note) => `<li>${escaped(note)}</li>`),
      '</ul></section>',
    )
  return page({
    title: `p2r-kernels on ${results.machine.device}`,
    about: [...headingLines(results), results.date.slice(0, 10)],
    hues,
    body: parts.join('\n'),
  })
}
