// What becomes of results: the HTML report, in a browser, and the README's tables.
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'
import { html } from '../dist/bench/html.js'
import { documents, newest, performance, resultsIn, withTables } from '../dist/bench/performance.js'
import { short, ticks } from '../dist/bench/plot.js'
import { emptyResults, type Results, type Row, withShare } from '../dist/bench/results.js'
import { predictions } from '../dist/bench/targets.js'

const root = fileURLToPath(new URL('..', import.meta.url))
const predicted = predictions(root)

const row = (fields: Partial<Row>): Row => ({
  op: 'attention',
  case: '1x1024x16x64 f32 fwd',
  implementation: 'p2r-kernels',
  device: 'cpu',
  threads: 2,
  samples: 10,
  min: 12,
  p25: 12.5,
  median: 13,
  p75: 13.5,
  ...fields,
})
const ceilings = [{ threads: 2, fma: 470e9, bf16: 900e9, read: 60e9, copy: 70e9, update: 80e9 }]
const work = { flops: 4.3e9, traffic: { read: 12.6e6, write: 4.2e6 } }

/** Rows of every kind that the report draws. */
function example(): Results {
  const rows = [
    row(work),
    row({ ...work, implementation: 'onnxruntime MultiHeadAttention', median: 17 }),
    row({ op: 'log_probs', case: '256x151936 f32 fwd', traffic: { read: 156e6, write: 0 } }),
    row({ op: 'log_probs', case: '256x151936 f32 fwd', implementation: 'slow <b>', median: 40 }),
    ...[256, 512, 1024, 2048].flatMap((size) =>
      ['p2r-kernels', 'PyTorch SDPA'].map((implementation) =>
        row({
          case: `1x${size}x16x72 f32 fwd`,
          implementation,
          median: (size / 256) ** 2,
          series: { name: 'tokens', size },
          ...(implementation === 'p2r-kernels' ? { peakBytes: size * 4608 } : {}),
        }),
      ),
    ),
  ].map((r) => withShare(r, ceilings))
  const notes = ['PyTorch was skipped: it is not here.']
  return { ...emptyResults(root, 'a processor', false), ceilings, rows, notes }
}

/** The first table under a heading, by row and cell. */
function tableOf(page: string, title: string): string[][] {
  const section = page.slice(page.indexOf(`<h2>${title}`))
  const body = section.slice(section.indexOf('<tbody>'), section.indexOf('</tbody>'))
  return body.split('</tr>').flatMap((line) => {
    const cells = [...line.matchAll(/<td[^>]*>(.*?)<\/td>/g)].map(([, cell]) => {
      return cell!.replaceAll(/<[^>]*>/g, '')
    })
    return cells.length ? [cells] : []
  })
}

test('the report draws three plots and fetches nothing', () => {
  const page = html(example(), predicted)
  expect(page.match(/<svg/g)).toHaveLength(3)
  expect(page).not.toMatch(/<script |\bsrc=|@import|url\((?!#|&quot;#)|href="(?!data:)/)
  for (const title of ['Against the best peer', 'Roofline', 'Shares', 'Growth', 'Predictions'])
    expect(page).toContain(`<h2>${title}`)
  expect(page).toContain('time ~ size^2.00')
  expect(page).toContain('memory ~ size^1.00')
  expect(page).toContain('x1.15 of onnxruntime MultiHeadAttention')
  expect(page).toContain('slow &lt;b&gt;')
  expect(page.slice(0, page.indexOf('<script>'))).not.toMatch(/NaN|Infinity|undefined/)
  expect(page.match(/<input type="checkbox" value="(attention|log_probs)"/g)).toHaveLength(2)
})

test('time and ratio have columns of their own, numbers are sorted by value', () => {
  const page = html(example(), predicted)
  expect(tableOf(page, 'Against')).toEqual([
    ['log_probs', '256x151936 f32 fwd', '13.0', 'slow &lt;b&gt;', '40.0', 'x3.08', ''],
    [
      'attention',
      '1x1024x16x64 f32 fwd',
      '13.0',
      'onnxruntime MultiHeadAttention',
      '17.0',
      'x1.31',
      '',
    ],
  ])
  expect(tableOf(page, 'Predictions')[0]).toEqual([
    'attention',
    '1x1024x16x64 f32 fwd',
    'x1.15 of onnxruntime MultiHeadAttention',
    'x1.31',
    'met',
    '114 %',
    '13.0',
    '9.15',
    '0.240',
  ])
  expect(page).toContain('<td class="n" data-value="13">13.0</td>')
  expect(page).toContain('<tr data-op="log_probs" class="missed">')
})

test('a share above what the ceiling allows is shown as it is, and no rest of the time below nothing', () => {
  const results = example()
  const [first] = results.rows
  results.rows[0] = { ...first!, share: 1.47 }
  const page = html(results, predicted)
  expect(tableOf(page, 'Shares')[0]!.slice(0, 4)).toEqual([
    'attention',
    '1x1024x16x64 f32 fwd',
    '13.0',
    '147 %',
  ])
  // The bar is as long as the scale, which has 100 % at 68 %.
  expect(page).toContain(
    '<b class="slow" style="left:0.0%;width:100.0%"></b><i style="left:68.0%">',
  )
  expect(page).not.toMatch(/beyond the larger|>-\d/)
})

test('a peer has the threads that it used', () => {
  const results = example()
  results.rows[1] = { ...results.rows[1]!, ownThreads: 1 }
  const rows = tableOf(html(results, predicted), 'All rows')
  expect(rows.slice(0, 2).map((cells) => cells[3])).toEqual(['2', '1'])
  expect(rows[1]![7]).toBe('x1.31')
})

test('ticks are round numbers, as many as fit', () => {
  expect(ticks(0.9, 45, 8)).toEqual([1, 2, 5, 10, 20])
  expect(ticks(0.9, 45, 4)).toEqual([1, 3, 10, 30])
  expect(ticks(1, 1e6, 4)).toEqual([1, 100, 1e4, 1e6])
  expect([0.05, 20, 3000, 4.25e7, 1e12].map(short)).toEqual(['0.05', '20', '3k', '42.5M', '1T'])
})

test('without ceilings, peers and series it has the rows only', () => {
  const page = html({ ...example(), ceilings: [], rows: [row({})] }, predicted)
  expect(page).not.toContain('<svg')
  expect(page).toContain('<td>1x1024x16x64 f32 fwd</td>')
})

const browser = ['chromium', 'chromium-browser', 'google-chrome', 'chrome'].find(
  (name) => spawnSync(name, ['--version']).status === 0,
)

test.skipIf(!browser)(
  `opens in a browser without errors${browser ? '' : ' (skipped: no Chromium here)'}`,
  async () => {
    const folder = mkdtempSync(join(tmpdir(), 'p2r-report-'))
    try {
      const file = join(folder, 'report.html')
      const seen = (page: string) => {
        writeFileSync(file, page)
        const { stdout, stderr, status } = spawnSync(
          browser!,
          [
            '--headless=new',
            '--no-sandbox',
            '--disable-gpu',
            `--user-data-dir=${join(folder, 'profile')}`,
            '--enable-logging=stderr',
            '--dump-dom',
            `file://${file}`,
          ],
          { encoding: 'utf8', timeout: 60_000, maxBuffer: 1 << 28 },
        )
        expect(status, stderr).toBe(0)
        return { dom: stdout, errors: stderr.split('\n').filter((line) => /CONSOLE/.test(line)) }
      }
      // By the time of ours, then turned around; one operation hidden; and an error, which is the only one.
      const clicks = `<script>
        const time = document.querySelectorAll('table')[2].querySelectorAll('th button')[6]
        time.click(); time.click()
        document.querySelector('.filter input[value=log_probs]').click()
        console.error('planted')
      </script></body>`
      const page = html(example(), predicted).replace('</body>', () => clicks)
      const used = seen(page)
      expect(used.errors).toEqual([expect.stringContaining('planted')])
      expect(used.dom.match(/<svg/g)).toHaveLength(3)
      expect(used.dom).toContain('aria-sort="ascending"')
      expect(used.dom).toMatch(/<tr data-op="log_probs"[^>]* hidden/)
      expect(used.dom).not.toMatch(/<tr data-op="attention"[^>]* hidden/)
    } finally {
      rmSync(folder, { recursive: true, force: true })
    }
  },
)

test('the newest results of each machine count', () => {
  const of = (folder: string, date: string) => ({
    folder,
    results: { ...emptyResults(root, 'a chip of this name', false), rows: [row({})], date },
  })
  const all = [of('a', '2026-01-02'), of('b', '2026-01-01'), of('a', '2026-01-03')]
  expect(newest(all).map(({ folder, results }) => [folder, results.date])).toEqual([
    ['a', '2026-01-03'],
    ['b', '2026-01-01'],
  ])
  const titles = performance(all, predicted).match(/^\*\*.*$/gm)!
  expect(titles.map((title) => title.match(/(?:results\/|^\*\*)(\w+)(?=\)|\*\*$)/)?.[1])).toEqual([
    'a',
    'b',
    'H200',
  ])
  expect(titles[0]).toMatch(/of \d+ predictions 0 met, 0 missed, \d+ not measured$/)
})

test('a table has the measurement, its share, the best peer and the outcome', () => {
  const tables = performance([{ folder: 'chip', results: example() }], predicted)
  const cpu = tables.slice(0, tables.indexOf('**H200**')).split('\n')
  expect(cpu[0]).toMatch(
    /^\*\*a processor, \d+ CPUs, \d{4}-\d\d-\d\d, commit .*\(\.\.\/bench\/results\/chip\): of 21 predictions 1 met, 1 missed, 19 not/,
  )
  expect(cpu.find((line) => line.includes('1x1024x16x64 f32 fwd '))).toBe(
    '| attention 1x1024x16x64 f32 fwd | x1.15 of onnxruntime MultiHeadAttention | 13.0 ms | 70 % of fma | 17.0 ms, onnxruntime MultiHeadAttention | met (x1.31) |',
  )
  expect(cpu.find((line) => line.includes('1x4096'))).toContain('| not yet measured |')
  const rest = tables.slice(tables.indexOf('**H200**')).match(/^\| \w.*$/gm)!
  expect(rest.length).toBeGreaterThan(10)
  for (const line of rest.slice(1)) expect(line).toContain('| not yet measured |')
})

test("a GPU's lengths share a line, which shows the worst of them", () => {
  const gpu: Results = example()
  gpu.machine.device = 'NVIDIA H200'
  const measured = (size: number, median: number) => {
    const { threads: _, ...fields } = row({
      case: `1x${size}x16x72 bf16 fwd`,
      device: 'cuda:0',
      flops: 4 * size ** 2 * 16 * 72,
      products: 'bf16',
      median,
    })
    return withShare(fields, [{ copy: 4.3e12, bf16: 790e12 }])
  }
  gpu.rows = [measured(15_376, 2.5), measured(62_500, 50)]
  const line = performance([{ folder: 'h200', results: gpu }], predicted)
    .split('\n')
    .find((l) => l.includes('1x\\*x16x72 bf16 fwd'))
  expect(line).toContain('| 2.50..50.0 ms | 46..55 % of bf16 |  | missed (360 TFLOP/s) |')
})

test.each(Object.entries(documents))(
  'the tables of %s are those of the results',
  (name, tables) => {
    const document = readFileSync(join(root, name), 'utf8')
    expect(
      document === withTables(document, tables(resultsIn(root), predicted)),
      'npm run docs makes them',
    ).toBe(true)
    expect(() => withTables('no place', 'tables')).toThrow(/lacks the lines/)
  },
)

test('results are in a folder of their machine, named by their date', () => {
  const names = readdirSync(join(root, 'bench/results'), { recursive: true, encoding: 'utf8' })
  const files = names.filter((name) => name.endsWith('.json') && name !== 'predictions.json')
  expect(files.length).toBeGreaterThan(0)
  for (const name of files) {
    const { date } = JSON.parse(readFileSync(join(root, 'bench/results', name), 'utf8'))
    expect(name).toMatch(new RegExp(`^[\\w.-]+[/\\\\]${date.slice(0, 10)}\\.json$`))
  }
})
