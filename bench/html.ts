// The report with plots: one self-contained HTML file. vega-lite draws them here, as SVG.
import { parse, View } from 'vega'
import { compile, type TopLevelSpec } from 'vega-lite'
import { ourName } from './harness.js'
import { bytesOf, type Ceilings, type Results, type Row } from './results.js'
import { exponent, type RowSeries, seriesOf } from './series.js'
import { headingLines, milliseconds, rate } from './table.js'
import { outcome, type Predictions, peersOf, verdicts, whereTimeWent } from './targets.js'

const schema = 'https://vega.github.io/schema/vega-lite/v6.json'
const ours = '#0b6e99'
const others = ['#c8553d', '#7a8b3c', '#8d6aa8', '#d39a2d', '#5f6b73']
const config = {
  font: 'system-ui, sans-serif',
  axis: { labelFontSize: 11, titleFontSize: 12, gridColor: '#e8e8e8', titleFontWeight: 'normal' },
  legend: {
    titleLimit: 600,
    labelFontSize: 11,
    titleFontSize: 12,
    labelLimit: 600,
    titleFontWeight: 'normal',
  },
  view: { stroke: '#cccccc' },
} as const

async function svg(spec: object): Promise<string> {
  const whole = { $schema: schema, background: 'white', config, ...spec } as TopLevelSpec
  const view = new View(parse(compile(whole).spec), { renderer: 'none' })
  try {
    return await view.toSVG()
  } finally {
    view.finalize()
  }
}

const label = ({ op, case: name }: Row): string => `${op} ${name}`
const isOurs = ({ implementation }: Row): boolean => implementation === ourName

/** The rows with the most threads, outside of series. */
function shown({ rows }: Results): Row[] {
  const most = Math.max(0, ...rows.map(({ threads }) => threads ?? 0))
  return rows.filter((row) => (row.threads ?? 0) === most && !row.series)
}

/** Useful FLOP/s over FLOP/byte, below the machine's roof. */
async function roofline(results: Results): Promise<string | undefined> {
  const rows = shown(results).filter((row) => row.flops && bytesOf(row))
  const limits = results.ceilings.find((c) => c.threads === rows[0]?.threads)
  if (!rows.length || !limits) return undefined
  const points = rows.map((row) => ({
    intensity: row.flops! / bytesOf(row),
    gflops: row.flops! / row.median / 1e6,
    case: isOurs(row) ? label(row) : 'a peer',
    by: isOurs(row) ? ourName : 'peers',
    products: row.products ?? 'f32',
  }))
  const names = [...new Set(points.filter((p) => p.by === ourName).map((p) => p.case))]
  // With the corner of the roof and some of its slope.
  const corner = (limits.fma ?? limits.bf16 ?? limits.copy) / bandwidthOf(limits)
  const low = Math.min(corner, ...points.map((p) => p.intensity)) / 4
  const high = Math.max(corner, ...points.map((p) => p.intensity)) * 4
  const roofs = roofLines(limits, low, high, new Set(points.map((p) => p.products)))
  const x = {
    field: 'intensity',
    type: 'quantitative',
    scale: { type: 'log', domain: [low, high], nice: false },
    axis: { title: 'FLOP per byte that must cross memory', tickCount: 6, format: '~s' },
  } as const
  const y = {
    field: 'gflops',
    type: 'quantitative',
    scale: { type: 'log', nice: true },
    axis: { title: 'useful GFLOP/s', tickCount: 6, format: '~s' },
  } as const
  return svg({
    width: 560,
    height: 380,
    layer: [
      {
        data: { values: roofs },
        mark: { type: 'line', color: '#444444', strokeWidth: 1.5 },
        encoding: {
          x,
          y,
          strokeDash: { field: 'roof', type: 'nominal', legend: { title: 'roof' } },
        },
      },
      {
        data: { values: points.filter((p) => p.by !== ourName) },
        mark: { type: 'point', shape: 'cross', color: '#999999', size: 45 },
        encoding: { x, y },
      },
      {
        data: { values: points.filter((p) => p.by === ourName) },
        mark: { type: 'point', filled: true, size: 80, opacity: 0.9 },
        encoding: {
          x,
          y,
          color: {
            field: 'case',
            type: 'nominal',
            scale: { domain: names, scheme: names.length > 10 ? 'tableau20' : 'tableau10' },
            legend: { title: `${ourName} (crosses: peers)`, symbolLimit: 60 },
          },
        },
      },
    ],
  })
}

const bandwidthOf = ({ copy, read }: Ceilings): number => Math.max(copy, read ?? 0)

function roofLines(limits: Ceilings, low: number, high: number, products: ReadonlySet<string>) {
  const steps = Array.from({ length: 60 }, (_, i) => low * (high / low) ** (i / 59))
  const peaks = [
    ...(limits.fma && products.has('f32') ? [['f32 and memory', limits.fma] as const] : []),
    ...(limits.bf16 && products.has('bf16') ? [['bf16 and memory', limits.bf16] as const] : []),
  ]
  const bandwidth = bandwidthOf(limits)
  return peaks.flatMap(([roof, peak]) =>
    // The corner is a point of its own, or the line would miss it.
    [...steps, peak / bandwidth]
      .sort((a, b) => a - b)
      .filter((intensity) => intensity >= low && intensity <= high)
      .map((intensity) => ({
        intensity,
        gflops: Math.min(peak, intensity * bandwidth) / 1e9,
        roof,
      })),
  )
}

/** Each row's share of the ceiling that binds it, with the peers'. */
async function shares(results: Results): Promise<string | undefined> {
  const rows = shown(results).filter((row) => row.share !== undefined)
  if (!rows.length) return undefined
  const names = [...new Set(rows.map(label))]
  const values = rows.map((row) => ({
    case: label(row),
    share: Math.min(row.share!, 1.2),
    by: isOurs(row) ? ourName : 'peers',
  }))
  return svg({
    width: 420,
    height: { step: 17 },
    data: { values },
    layer: [
      {
        mark: { type: 'rule', strokeDash: [4, 3], color: '#444444' },
        encoding: { x: { datum: 1 } },
      },
      {
        mark: { type: 'point', filled: true, size: 70, opacity: 0.9 },
        encoding: {
          x: {
            field: 'share',
            type: 'quantitative',
            scale: { domain: [0, 1.2] },
            axis: { title: 'share of the ceiling that binds', format: '.0%', tickCount: 6 },
          },
          y: {
            field: 'case',
            type: 'nominal',
            scale: { domain: names },
            axis: { title: null, labelLimit: 600, grid: true },
          },
          color: colours([ourName, 'peers'], [ours, '#b9b9b9']),
          order: { field: 'by', sort: 'descending' },
        },
      },
    ],
  })
}

const colours = (domain: readonly string[], range: readonly string[]) => ({
  field: 'by',
  type: 'nominal' as const,
  scale: { domain: [...domain], range: [...range] },
  legend: { title: null },
})

/** How many times longer the best peer takes. */
async function ratios(results: Results): Promise<string | undefined> {
  const values = shown(results)
    .filter(isOurs)
    .flatMap((row) => {
      const [best] = peersOf(row, results)
      if (!best) return []
      const ratio = best.median / row.median
      return [
        {
          case: label(row),
          ratio,
          one: 1,
          text: `x${ratio.toPrecision(3)} ${best.implementation}`,
          faster: ratio >= 1 ? 'faster' : 'slower',
        },
      ]
    })
    .sort((a, b) => b.ratio - a.ratio)
  if (!values.length) return undefined
  const most = Math.max(2, ...values.map(({ ratio }) => ratio))
  const y = {
    field: 'case',
    type: 'nominal',
    sort: null,
    axis: { title: null, labelLimit: 600 },
  } as const
  const x = {
    field: 'ratio',
    type: 'quantitative',
    // Space for the label after the longest bar.
    scale: {
      type: 'log',
      nice: false,
      domain: [Math.min(0.5, ...values.map((v) => v.ratio)), most * 20],
    },
    axis: {
      title: "the best peer's time over ours",
      values: [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500],
      format: '~g',
    },
  } as const
  return svg({
    width: 480,
    height: { step: 20 },
    data: { values },
    layer: [
      {
        mark: { type: 'bar', height: 13 },
        encoding: {
          x,
          x2: { field: 'one' },
          y,
          color: {
            field: 'faster',
            type: 'nominal',
            scale: { domain: ['faster', 'slower'], range: [ours, others[0]!] },
            legend: null,
          },
        },
      },
      {
        mark: { type: 'rule', color: '#444444' },
        encoding: { x: { datum: 1 } },
      },
      {
        transform: [{ calculate: 'max(datum.ratio, 1)', as: 'end' }],
        mark: { type: 'text', align: 'left', dx: 5, fontSize: 11, color: '#333333' },
        encoding: { x: { ...x, field: 'end' }, y, text: { field: 'text' } },
      },
    ],
  })
}

/** Time and memory against size, on logarithmic axes, with the exponents that fit. */
async function growth(series: readonly RowSeries[]): Promise<string> {
  const [{ name, op, rows }] = series as [RowSeries]
  const sizes = rows.map((row) => row.series!.size)
  const grows = (values: readonly number[]) => exponent(sizes, values).toFixed(2)
  const x = {
    field: 'size',
    type: 'quantitative',
    scale: { type: 'log', nice: false },
    axis: { title: `${name} of ${op}`, format: '~s', tickCount: 6 },
  } as const
  const panel = (
    title: string,
    unit: string,
    list: readonly RowSeries[],
    value: (row: Row) => number,
  ) => ({
    title: { text: title, fontSize: 12, fontWeight: 'normal' },
    width: 330,
    height: 240,
    data: {
      values: list.flatMap(({ implementation, rows }) =>
        rows.map((row) => ({
          by: implementation,
          size: row.series!.size,
          value: value(row),
        })),
      ),
    },
    mark: { type: 'line', point: { filled: true, size: 45 }, strokeWidth: 1.5 },
    encoding: {
      x,
      y: {
        field: 'value',
        type: 'quantitative',
        scale: { type: 'log' },
        axis: { title: unit, format: unit === 'milliseconds' ? '~g' : '~s', tickCount: 5 },
      },
      color: colours(
        series.map((s) => s.implementation),
        [ours, ...others],
      ),
    },
  })
  const counted = series.filter(({ rows }) => rows.every((row) => row.peakBytes))
  const own = series.find(({ rows }) => isOurs(rows[0]!))
  const time = panel(
    own ? `time ~ size^${grows(own.rows.map((row) => row.median))}` : 'time',
    'milliseconds',
    series,
    (row) => row.median,
  )
  const memory = counted.map((s) =>
    panel(
      `memory ~ size^${grows(s.rows.map((row) => row.peakBytes!))}`,
      'bytes beyond the inputs',
      [s],
      (row) => row.peakBytes!,
    ),
  )
  return svg({ hconcat: [time, ...memory] })
}

function escaped(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;')
}

function htmlTable(heading: readonly string[], rows: readonly (readonly string[])[]): string {
  const line = (cells: readonly string[], tag: string) =>
    `<tr>${cells.map((cell) => `<${tag}>${escaped(cell)}</${tag}>`).join('')}</tr>`
  return `<div class="table"><table><thead>${line(heading, 'th')}</thead><tbody>${rows
    .map((row) => line(row, 'td'))
    .join('\n')}</tbody></table></div>`
}

const style = `
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; font-size: 13px; } .table, figure { overflow-x: auto; }
th, td { text-align: left; padding: 2px 12px 2px 0; border-bottom: 1px solid #eee; white-space: nowrap; }
figure { margin: 1em 0; } p { max-width: 46em; }`

/** The whole report. */
export async function html(results: Results, predicted: Predictions): Promise<string> {
  const parts: string[] = []
  const section = (title: string, words: string, body: string | undefined) => {
    if (body) parts.push(`<h2>${title}</h2>`, `<p>${words}</p>`, body)
  }
  const figure = (drawn: string | undefined) => drawn && `<figure>${drawn}</figure>`
  section(
    'Against the best peer',
    'How many times longer the fastest of the peers takes that gave the same result in the same run.',
    figure(await ratios(results)),
  )
  section(
    'Roofline',
    'Useful work a second over the bytes that must cross memory, below what this machine did at most in the same run. Caches can lift a point over the sloped part.',
    figure(await roofline(results)),
  )
  section(
    'Shares',
    'Of the time, how much the machine itself would need for the same products and bytes.',
    figure(await shares(results)),
  )
  const series = new Map<string, RowSeries[]>()
  for (const one of seriesOf(results.rows)) {
    const key = [one.op, one.name, one.rows[0]!.threads].join(' | ')
    series.set(key, [...(series.get(key) ?? []), one])
  }
  const grown: string[] = []
  for (const list of series.values()) grown.push(`<figure>${await growth(list)}</figure>`)
  section(
    'Growth with size',
    'Exponents are fitted to the larger half of the sizes. Memory is what a run takes at its height: results and scratch.',
    grown.join('\n'),
  )
  const judgements = verdicts(results, predicted)
  section(
    'Predictions',
    'What was written down before, what was measured, and where the time went.',
    judgements.length
      ? htmlTable(
          ['operation', 'case', 'predicted', 'measured', '', 'time'],
          judgements.map((v) => [
            v.row.op,
            v.row.case,
            v.reach,
            v.got,
            outcome(v),
            whereTimeWent(v.row, results),
          ]),
        )
      : undefined,
  )
  section(
    'All rows',
    'Medians in milliseconds, with the middle half of the samples.',
    htmlTable(
      ['operation', 'case', 'by', 'threads', 'median', 'p25..p75', 'rate', 'share', 'of', 'memory'],
      results.rows.map((row) => [
        row.op,
        row.case,
        row.implementation,
        String(row.threads ?? ''),
        milliseconds(row.median),
        `${milliseconds(row.p25)}..${milliseconds(row.p75)}`,
        rate(row),
        row.share === undefined ? '' : `${(row.share * 100).toFixed(0)} %`,
        row.ceiling ?? '',
        row.peakBytes === undefined ? '' : `${(row.peakBytes / 2 ** 20).toFixed(1)} MiB`,
      ]),
    ),
  )
  const notes = results.notes.map((note) => `<li>${escaped(note)}</li>`).join('\n')
  const title = `p2r-kernels on ${results.machine.device}`
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>${escaped(title)}</title>
<link rel="icon" href="data:,">
<style>${style}</style>
</head>
<body>
<h1>${escaped(title)}</h1>
<p>${headingLines(results).map(escaped).join('<br>')}<br>${results.date.slice(0, 10)}</p>
${parts.join('\n')}
${notes && `<h2>Notes</h2>\n<ul>${notes}</ul>`}
</body>
</html>
`
}
