// The benchmarks' own logic: statistics, shares, tables, comparisons, and the measuring of a fake task
// and of a tiny real one. No time is asserted.
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { fileURLToPath } from 'node:url'
import { gelu, openDevice, type Qwen3VLConfig } from 'p2r-kernels'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import attentionBenchmark from '../dist/bench/attention.bench.js'
import { cpuCeilings, disturbances } from '../dist/bench/ceilings.js'
import { type Block, bf16Bits, integers, normals, picture, tiled } from '../dist/bench/data.js'
import {
  type Benchmark,
  distance,
  type Effort,
  measure,
  type Peer,
  PeerAbsent,
  setsFor,
  type Workload,
} from '../dist/bench/harness.js'
import { onnxModel } from '../dist/bench/peers/onnx.js'
import { pythonPeer, pythonVersions, stopPython } from '../dist/bench/peers/python.js'
import { costOf, limitOf, modelReport, nameOf, type Work, work } from '../dist/bench/qwen3_vl.js'
import {
  better,
  type Ceilings,
  compare,
  emptyResults,
  impossible,
  parseResults,
  type Results,
  type Row,
  withShare,
} from '../dist/bench/results.js'
import { scaling } from '../dist/bench/scaling.js'
import { exponent, seriesOf } from '../dist/bench/series.js'
import { serving, servingReport } from '../dist/bench/serving.js'
import { customWorkloads, parseShape } from '../dist/bench/shapes.js'
import { startupReport, startupTimes } from '../dist/bench/startup.js'
import { quantile, quantiles, verdict } from '../dist/bench/statistics.js'
import {
  aligned,
  comparisonReport,
  impossibleReport,
  milliseconds,
  rate,
  report,
  resultTable,
  seriesTable,
  verdictTable,
  wrapped,
} from '../dist/bench/table.js'
import { judged, outcome, predictions, sameCase } from '../dist/bench/targets.js'
import { packed, trainingReport } from '../dist/bench/training.js'

const root = fileURLToPath(new URL('..', import.meta.url))
const predicted = predictions(root)

describe('statistics', () => {
  test('quantiles interpolate between neighbours', () => {
    expect(quantile([1, 2, 3, 4], 0.5)).toBe(2.5)
    expect(quantile([7], 0.25)).toBe(7)
    expect(quantiles([5, 1, 4, 2, 3])).toEqual({ samples: 5, min: 1, p25: 2, median: 3, p75: 4 })
    expect(() => quantiles([])).toThrow(RangeError)
  })

  const around = (median: number, spread: number) => ({
    samples: 9,
    min: median - spread,
    p25: median - spread / 2,
    median,
    p75: median + spread / 2,
  })
  test.each([
    ['equal', around(10, 0.1), around(10, 0.1), 'same'],
    ['4 % apart without spread', around(10, 0), around(10.4, 0), 'same'],
    ['slower', around(10, 0.2), around(12, 0.2), 'slower'],
    ['faster', around(10, 0.2), around(8, 0.2), 'faster'],
    ['20 % apart, spread over 30 %', around(10, 3), around(12, 3), 'same'],
  ] as const)('verdict: %s', (_, before, after, expected) => {
    expect(verdict(before, after)).toBe(expected)
  })

  test('distance is relative, and NaN for another length', () => {
    expect(distance([3, 4], [3, 4])).toBe(0)
    expect(distance([3, 9], [3, 4])).toBe(1)
    expect(distance([1], [1, 2])).toBeNaN()
  })
})

const limits: Ceilings = { threads: 2, fma: 400e9, read: 60e9, copy: 80e9, update: 100e9 }
const row = (fields: Partial<Row> = {}): Row => ({
  op: 'gelu',
  case: '8 f32',
  implementation: 'p2r-kernels',
  device: 'cpu',
  threads: 2,
  simd: 'avx2',
  samples: 10,
  min: 1.9,
  p25: 1.95,
  median: 2,
  p75: 2.05,
  ...fields,
})

describe('shares', () => {
  test.each([
    ['multiply-adds', { flops: 400e6 }, 'fma', 0.5],
    ['reading', { traffic: { read: 60e6, write: 10 } }, 'read', 0.5],
    ['copying', { traffic: { read: 40e6, write: 40e6 } }, 'copy', 0.5],
    ['updating', { traffic: { read: 50e6, write: 50e6, inPlace: true } }, 'update', 0.5],
    ['the larger', { flops: 40e6, traffic: { read: 40e6, write: 40e6 } }, 'copy', 0.5],
  ] as const)('of %s', (_, fields, ceiling, share) => {
    const limited = withShare(row(fields), [limits])
    expect(limited.ceiling).toBe(ceiling)
    expect(limited.share).toBeCloseTo(share, 6)
  })

  test('bf16 products have their own ceiling, if measured', () => {
    const products = row({ flops: 400e6, products: 'bf16' })
    expect(withShare(products, [{ ...limits, bf16: 800e9 }])).toMatchObject({
      ceiling: 'bf16',
      share: 0.25,
    })
    expect(withShare(products, [limits])).toMatchObject({ ceiling: 'fma', share: 0.5 })
  })

  test('the copy ceiling serves for reads and updates if it is the only one', () => {
    const { threads: _, ...reading } = row({ traffic: { read: 80e6, write: 0 }, flops: 1e12 })
    expect(withShare(reading, [{ copy: 80e9 }])).toMatchObject({ ceiling: 'copy', share: 0.5 })
  })

  test('no share without work or without ceilings of this thread count', () => {
    expect(withShare(row(), [limits])).not.toHaveProperty('share')
    expect(withShare(row({ flops: 1, threads: 7 }), [limits])).not.toHaveProperty('share')
  })

  test('a row is held to the ceilings that were measured in turn with it', () => {
    const cached = row({
      traffic: { read: 60e6, write: 0 },
      limits: { threads: 2, read: 600e9, copy: 800e9 },
    })
    expect(withShare(cached, [limits])).toMatchObject({ ceiling: 'read', share: 0.05 })
  })

  test('a share above 105 % is a finding, and one of 104 % is not', () => {
    const rows = [0.9, 1.04, 1.06].map((share) => row({ share, ceiling: 'read' }))
    const wrong = impossible(results(rows))
    expect(wrong).toEqual([rows[2]])
    expect(impossibleReport(wrong)).toMatch(
      /105 %.*: 1\n {2}gelu 8 f32, p2r-kernels: 106 % of read$/,
    )
  })

  test("the processor's ceilings are positive; within the caches memory is not slower", () => {
    const beyond = cpuCeilings(1, undefined, 3)
    const within = cpuCeilings(1, 1 << 18, 3)
    for (const c of [beyond, within])
      for (const value of Object.values(c)) expect(value).toBeGreaterThan(0)
    expect(within.read).toBeGreaterThan(beyond.read! / 2)
  })

  test('a ceiling is the better of two measurements, and a large difference is reported', () => {
    const low = { ...limits, fma: 200e9 }
    expect(better(low, limits)).toEqual(limits)
    expect(disturbances([low], [limits])).toEqual([expect.stringMatching(/'fma' of 2 .* 50 %/)])
    expect(disturbances([limits], [limits])).toEqual([])
  })
})

function results(rows: Row[], fields: Partial<Results> = {}): Results {
  return { ...emptyResults(root, 'a processor', false), ceilings: [limits], rows, ...fields }
}

describe('tables', () => {
  test('columns are as wide as their widest cell', () => {
    const text = aligned(
      [
        ['name', 'ms'],
        ['a longer one', '10.5'],
      ],
      1,
    )
    expect(text).toBe('name            ms\na longer one  10.5')
  })

  test('numbers have three digits', () => {
    expect([0.01234, 1.234, 12.34, 1234.5].map(milliseconds)).toEqual([
      '0.012',
      '1.23',
      '12.3',
      '1235',
    ])
    expect(rate(row({ flops: 3e9 }))).toBe('1500 GFLOP/s')
    expect(rate(row({ traffic: { read: 1e6, write: 1e6 } }))).toBe('1.00 GB/s')
    expect(rate(row())).toBe('')
  })

  test('a peer is listed below, with its time as a multiple of ours', () => {
    const ours = withShare(row({ flops: 400e6 }), [limits])
    const peer = row({ implementation: 'a peer', median: 5, p25: 4.5, p75: 5.5 })
    const text = report(results([ours, peer], { notes: ['Another peer was skipped.'] }), predicted)
    const lines = text.split('\n')
    const at = lines.findIndex((l) => l.startsWith('  p2r-kernels '))
    expect(lines[at - 1]).toBe('gelu 8 f32')
    expect(lines[at]).toMatch(/^ {2}p2r-kernels +2 +2\.00 +2 % +200 GFLOP\/s +50 % fma$/)
    expect(lines.find((l) => l.includes('a peer'))).toMatch(/ 5\.00 .*x2\.50$/)
    expect(text).toContain('2 threads  400 GFLOP/s')
    expect(text).toContain('Another peer was skipped.')
  })

  test('rows fit a terminal of 80 columns, whatever their names', () => {
    const long = {
      op: 'linear_log_probs',
      case: '256x1024 x 151936 f32 fwd+bwd in place by a kernel of a long name, in 8 shards',
      share: 1,
      ceiling: 'update' as const,
      flops: 3e15,
      median: 123456,
      threads: 128,
    }
    const peer = row({ ...long, implementation: 'onnxruntime MultiHeadAttention, 1 thread' })
    const lines = resultTable(results([row(long), peer])).split('\n')
    expect(lines).toHaveLength(4)
    for (const line of lines) expect(line.length).toBeLessThanOrEqual(80)
  })
})

test('sentences are broken between words, at 80 columns', () => {
  const text = `${'a word '.repeat(30)}${'x'.repeat(100)} end`
  const lines = wrapped(text).split('\n')
  expect(lines.map((line) => line.length)).toEqual([78, 76, 53, 100, 3])
  expect(lines.join(' ')).toBe(text)
})

describe('a baseline', () => {
  const before = results([
    row(),
    row({ op: 'linear' }),
    row({ op: 'rows', median: 4, p25: 3.9, p75: 4.1 }),
    row({ op: 'sampling' }),
  ])
  const after = results([
    row({ median: 3, p25: 2.9, p75: 3.1 }),
    row({ op: 'linear', median: 2.04 }),
    row({ op: 'rows' }),
    row({ op: 'rotary' }),
    row({ op: 'cast', threads: 1 }),
  ])

  test('names what got slower, and reports what cannot be compared', () => {
    const c = compare(before, after)
    expect(c.compared).toBe(3)
    expect(c.slower.map(({ row, ratio }) => [row.op, ratio])).toEqual([['gelu', 1.5]])
    expect(c.faster.map(({ row, ratio }) => [row.op, ratio])).toEqual([['rows', 0.5]])
    expect(c.gone.map(({ op }) => op)).toEqual(['sampling'])
    expect(c.added.map(({ op }) => op)).toEqual(['rotary', 'cast'])
    expect(c.caveats).toEqual([])
    const text = comparisonReport(c, 'old.json')
    expect(text).toMatch(/Slower beyond the noise: 1\n +gelu .* 2\.00 -> 3\.00 ms +x1\.50/)
    expect(text).toMatch(/Against old\.json: 3 rows compared/)
  })

  test('with itself changes nothing', () => {
    const c = compare(before, before)
    expect([c.slower, c.faster, c.gone, c.added]).toEqual([[], [], [], []])
    expect(comparisonReport(c, 'x')).toContain('Nothing got slower beyond the noise.')
  })

  test('of another machine is reported', () => {
    const other = results([], { ceilings: [{ ...limits, fma: 200e9 }] })
    other.machine.device = 'another processor'
    const { caveats } = compare(other, after)
    expect(caveats).toHaveLength(2)
    expect(caveats[0]).toMatch(/device was another processor, is a processor/)
    expect(caveats[1]).toMatch(/'fma' of 2 thread\(s\) changed by 100 %/)
  })

  test('is written and read back; other files are refused', () => {
    expect(parseResults(JSON.stringify(after), 'f')).toEqual(after)
    expect(after).toMatchObject({
      schema: 1,
      machine: { cpus: expect.any(Number), device: 'a processor' },
      versions: { 'p2r-kernels': expect.any(String), node: process.versions.node },
    })
    expect(() => parseResults('{', 'f')).toThrow(/f is not JSON/)
    expect(() => parseResults('{"schema":2}', 'f')).toThrow(/schema 1/)
    expect(() => parseResults('null', 'f')).toThrow(/schema 1/)
  })
})

const effort: Effort = {
  rounds: 2,
  time: 1,
  warmup: 0,
  cacheBytes: 100,
  slow: true,
  peers: true,
}

describe('measuring', () => {
  test('input sets exceed the caches, up to a limit', () => {
    expect(setsFor(1000, 100)).toBe(1)
    expect(setsFor(50, 100)).toBe(4)
    expect(setsFor(0, 2 ** 30)).toBe(16)
  })

  test('a fake task: sets in rotation, each restored before its run', async () => {
    const calls: string[] = []
    const workload: Workload = {
      name: 'fake',
      inputs: (seed) => ({
        byteLength: 100,
        load: () => ({
          before: () => calls.push(`before ${seed}`),
          run: () => calls.push(`run ${seed}`),
        }),
      }),
    }
    const progress = vi.fn()
    const rows = await measure('fake', workload, openDevice('cpu'), effort, expect.fail, progress)
    expect(rows).toHaveLength(1)
    expect(calls.length).toBeGreaterThanOrEqual(8)
    for (let i = 0; i < calls.length; i += 2) {
      const seed = 1 + ((i / 2) % 2)
      expect(calls.slice(i, i + 2)).toEqual([`before ${seed}`, `run ${seed}`])
    }
    expect(progress).toHaveBeenCalledWith('fake fake: p2r-kernels, round 2 of 2')
  })

  test('a tiny real operation beside peers that agree, disagree and are absent', async () => {
    const closed = vi.fn()
    const x = normals(64, 1)
    const expected = x.map((v) => {
      const t = Math.tanh(Math.sqrt(2 / Math.PI) * (v + 0.044715 * v ** 3))
      return 0.5 * v * (1 + t)
    })
    const peer = (name: string, open: Peer['open'], slow = false): Peer => ({
      name,
      tolerance: 1e-5,
      slow,
      open,
    })
    const peers = [
      peer('right', async () => ({ run: () => expected, close: closed })),
      peer('wrong', async () => ({ run: () => x, close: closed })),
      peer('absent', async () => {
        throw new PeerAbsent('absent is not here.')
      }),
      peer('slow', async () => expect.fail('slow peers are left out'), true),
    ]
    const workload: Workload = {
      name: '64 f32',
      traffic: { read: 256, write: 256 },
      inputs: () => ({
        byteLength: 256,
        load(device) {
          const a = { x: device.tensor(x, [64]), approximate: 'tanh' as const }
          return { run: () => gelu(a), answer: () => gelu(a).read() }
        },
        peers,
      }),
    }
    const notes: string[] = []
    const device = openDevice('cpu', { threads: 1 })
    const rows = await measure('gelu', workload, device, { ...effort, slow: false }, (s) =>
      notes.push(s),
    )
    expect(rows.map((r) => r.implementation)).toEqual(['p2r-kernels', 'right'])
    for (const r of rows) {
      expect(r).toMatchObject({ op: 'gelu', case: '64 f32', device: 'cpu', threads: 1 })
      expect(r.samples).toBeGreaterThanOrEqual(4)
      expect(r.min).toBeLessThanOrEqual(r.p25)
      expect(r.p25).toBeLessThanOrEqual(r.median)
      expect(r.median).toBeLessThanOrEqual(r.p75)
    }
    expect(rows[0]).toHaveProperty('simd')
    expect(rows[0]!.peakBytes).toBeGreaterThanOrEqual(256)
    expect(rows[0]!.peakBytes).toBeLessThan(1 << 20)
    expect(rows[1]).not.toHaveProperty('peakBytes')
    expect(notes).toEqual([
      expect.stringMatching(/^gelu 64 f32: wrong is \d.* from our result/),
      'absent is not here.',
    ])
    expect(closed).toHaveBeenCalledTimes(2)
    expect(() => device.zeros([1])).toThrow(expect.objectContaining({ code: 'ERR_DISPOSED' }))
  })

  test('an operation that throws stops the run and frees the device', async () => {
    const device = openDevice('cpu')
    const workload: Workload = {
      name: 'broken',
      inputs: () => ({
        byteLength: 0,
        load: () => ({
          run() {
            throw new Error('broken')
          },
        }),
      }),
    }
    await expect(measure('x', workload, device, effort, expect.fail)).rejects.toThrow('broken')
    expect(() => device.zeros([1])).toThrow(expect.objectContaining({ code: 'ERR_DISPOSED' }))
  })
})

const python = spawnSync('python3', ['--version']).status === 0

describe.skipIf(!python)(`peers in Python${python ? '' : ' (skipped: no python3 here)'}`, () => {
  const folder = mkdtempSync(`${tmpdir()}/p2r-python-`)
  const path = process.env.PYTHONPATH
  beforeAll(() => {
    process.env.PYTHONPATH = folder
    writeFileSync(
      `${folder}/scaling.py`,
      `import array as arrays
print('what a library says')
versions = {'scaling': '1'}
def begin(threads, device):
    versions['on'] = f'{threads} of {device}'
def array(data, dtype, shape):
    assert dtype == 'f32'
    return arrays.array('f', bytes(data)) * (shape[0] * 4 // len(data))
def timed(run, runs):
    return 4.0 / runs
def numbers(result):
    return result.tobytes()
def closed():
    versions['closed'] = True
def scale(given, options):
    run = lambda: arrays.array('f', [options['by'] * x for x in given['x']])
    return None, run
def broken(given, options):
    raise ValueError('no such number')
def leaving(given, options):
    import os
    os._exit(3)
`,
    )
    writeFileSync(`${folder}/lacking.py`, 'import a_package_that_is_not_here\n')
  })
  afterAll(async () => {
    await stopPython()
    if (path === undefined) delete process.env.PYTHONPATH
    else process.env.PYTHONPATH = path
    rmSync(folder, { recursive: true })
  })

  const x: Block = { data: Float32Array.of(1, 2, 3), dtype: 'f32', shape: [6] }
  const peer = (script: string, call: string): Peer =>
    pythonPeer({
      name: 'Python',
      script,
      call,
      tolerance: 0,
      backends: ['cpu'],
      arrays: () => ({ x }),
      options: { by: 10 },
    })

  test('computes on the arrays it is given, and times by its own clock', async () => {
    const run = await peer('scaling', 'scale').open(2, 'cpu')
    expect(await run.run()).toEqual(Float32Array.of(10, 20, 30, 10, 20, 30))
    expect(await run.time!(8)).toBe(0.5)
    expect(await pythonVersions()).toEqual({ scaling: '1', on: '2 of cpu' })
    run.close!()
    await expect(run.run()).rejects.toThrow(/Python was skipped: KeyError/)
  })

  test.each([
    ['without its package', 'lacking', 'any', /^lacking\.py .*a_package_that_is_not_here/],
    ['that throws', 'scaling', 'broken', /^Python was skipped: ValueError: no such number\.$/],
    ['whose process ends', 'scaling', 'leaving', /^Python was skipped: its process ended/],
  ])('%s is skipped with a message', async (_, script, call, message) => {
    const opening = peer(script, call).open(1, 'cpu')
    await expect(opening).rejects.toThrow(PeerAbsent)
    await expect(opening).rejects.toThrow(message)
  })
})

describe('predictions', () => {
  const target = { device: 'cpu', op: 'gelu', case: '8 f32' }
  const peer = row({ implementation: 'a peer', median: 5 })
  const slow = row({ implementation: 'a slow peer', median: 9 })
  const bf16 = row({ case: '8 bf16', median: 1 })
  const run = results([row({ flops: 400e6, share: 0.5, ceiling: 'fma' }), slow, peer, bf16])
  const [ours] = run.rows as [Row]

  test.each([
    [{ times: 2 }, 'x2 of a peer', 'x2.50', 'met'],
    [{ times: 4, than: 'a slow peer' }, 'x4 of a slow peer', 'x4.50', 'met'],
    [{ times: 3, than: 'a peer' }, 'x3 of a peer', 'x2.50', 'missed'],
    [{ times: 3, than: 'an absent peer' }, 'x3 of an absent peer', 'not measured', 'not measured'],
    [{ share: 0.6 }, '60 % of fma', '50 %', 'missed'],
    [{ teraflops: 0.1 }, '0.1 TFLOP/s', '0 TFLOP/s', 'met'],
    [{ ms: 1.5 }, '1.5 ms', '2.00 ms', 'missed'],
  ] as const)('%j', (reach, words, got, how) => {
    const verdict = judged(ours, run, [{ ...target, ...reach }])!
    expect([verdict.reach, verdict.got, outcome(verdict)]).toEqual([words, got, how])
  })

  test('relative to another case of ours; none without one', () => {
    const than = { ...target, case: '8 bf16', times: 1.7, than: '8 f32' }
    expect(judged(bf16, run, [than])).toMatchObject({ got: 'x2.00', ratio: 2 / 1.7 })
    expect(judged(ours, run, [than])).toBeUndefined()
    expect(judged(peer, run, [{ ...target, ms: 1 }])).toBeUndefined()
    expect(judged(ours, run, [{ ...target, device: 'H200', ms: 1 }])).toBeUndefined()
  })

  test('the table counts targets met and explains the time of those missed', () => {
    const text = verdictTable(run, { groups: {}, targets: [{ ...target, ms: 1.5 }] })
    expect(text).toMatch(/^Predicted: 0 of 1 met\nmissed +gelu 8 f32\n {2}1\.5 ms, got 2\.00 ms\n/)
    expect(text).toContain('2.00 ms: products 1.00 ms at the ceilings; beyond the larger, 1.00 ms')
  })

  test('name cases that are measured, each with one figure', async () => {
    const cases = new Map<string, string[]>()
    for (const { op, case: pattern, times, share, teraflops, ms } of predicted.targets) {
      if (!cases.has(op)) {
        const { default: benchmark } = (await import(`../dist/bench/${op}.bench.js`)) as {
          default: Benchmark
        }
        cases.set(
          op,
          benchmark.workloads.map(({ name }) => name),
        )
      }
      expect(
        cases.get(op)!.some((name) => sameCase(pattern, name)),
        `${op} ${pattern}`,
      ).toBe(true)
      expect([times, share, teraflops, ms].filter((x) => x !== undefined)).toHaveLength(1)
    }
  })
})

describe('scaling', () => {
  test('an exponent is that of the larger half', () => {
    const sizes = [1, 10, 100, 1000, 10_000]
    expect(exponent(sizes, [5, 5, 2e4, 2e6, 2e8])).toBeCloseTo(2, 10)
    expect(exponent([1, 2, 4], [3, 6, 12])).toBeCloseTo(1, 10)
  })

  test('rows of one kind make a series, sorted by size, and its table', () => {
    const rows = [4000, 2000, 1000].map((size) =>
      row({
        case: `${size}`,
        median: size ** 2,
        peakBytes: size * 1024,
        series: { name: 'n', size },
      }),
    )
    const [only, ...others] = seriesOf([...rows, row(), row({ series: { name: 'm', size: 1 } })])
    expect(others).toEqual([])
    expect(only!.rows.map((r) => r.series!.size)).toEqual([1000, 2000, 4000])
    expect(seriesTable(rows)).toMatch(/gelu .* n 1000\.\.4000 +2 thr +2\.00 +1\.00 +3\.9 MiB$/)
    expect(seriesTable([row()])).toBe('')
  })

  test('covers attention, log-probabilities and crops, on both backends', () => {
    for (const backend of ['cpu', 'cuda']) {
      const series = scaling.flatMap(({ op, workloads }) =>
        workloads
          .filter((w) => !w.backend || w.backend === backend)
          .map(({ series }) => `${op} ${series!.name}`),
      )
      expect(new Set(series)).toEqual(
        new Set([
          'attention tokens',
          'log_probs rows',
          'log_probs vocabulary',
          'crop_resample crops',
          'crop_resample pixels',
        ]),
      )
    }
  })
})

describe('the benchmarks', () => {
  const source = readdirSync(`${root}/bench`, { recursive: true, encoding: 'utf8' })
    .filter((name) => name.endsWith('.ts'))
    .map((name) => readFileSync(`${root}/bench/${name}`, 'utf8'))
    .join('\n')
    .replaceAll(/^import [\s\S]*? from .*$/gm, '')
  const operations = [
    ...readFileSync(`${root}/ops/ops.def`, 'utf8').matchAll(/^OP\(\w+, (\w+),/gm),
  ].map(([, name]) => name!.replaceAll(/_(\w)/g, (_, letter) => letter.toUpperCase()))

  test.each(operations)('%s is measured', (name) => {
    expect(source).toMatch(new RegExp(`\\b${name}\\b`))
  })

  const families = [
    ...new Set(
      [...readFileSync(`${root}/ops/ops.def`, 'utf8').matchAll(/^OP\((\w+),/gm)].map(([, f]) => f!),
    ),
  ]

  test('every family of operations has one, and there are no others', () => {
    const stems = readdirSync(`${root}/bench`)
      .filter((name) => name.endsWith('.bench.ts'))
      .map((name) => name.slice(0, -'.bench.ts'.length))
    expect(stems.sort()).toEqual(families.sort())
  })

  test.each(families)('%s has named workloads', async (family) => {
    const { default: benchmark } = (await import(`../dist/bench/${family}.bench.js`)) as {
      default: Benchmark
    }
    expect(benchmark.op).toBe(family)
    const names = benchmark.workloads.map(({ name }) => name)
    expect(names.length).toBeGreaterThan(0)
    expect(new Set(names).size).toBe(names.length)
    expect(benchmark.workloads.some(({ slow }) => !slow)).toBe(true)
  })

  /** Sizes of each family that every one of its rows takes, and that differ from each other. */
  const small: Record<string, string> = {
    advantages: 'B=3,G=4',
    attention: 'B=1,T=10,H=4,K=2,D=8',
    cached_attention: 'B=2,T=10,H=4,K=2,D=16',
    cast: 'N=100',
    crop_resample: 'H=40,W=50,h=32,w=64',
    distillation: 'T=3,V=40',
    draw_boxes: 'H=1000,W=1001',
    elementwise: 'T=3,C=5',
    gelu: 'T=3,C=5',
    layer_norm: 'T=3,C=5',
    linear: 'T=3,C=32,F=5',
    linear_log_probs: 'T=128,C=8,V=40',
    log_probs: 'T=3,V=40',
    optimizer: 'N=100',
    policy_loss: 'B=3,T=4',
    positions: 'S=4,C=8,P=6',
    quantize: 'F=5,C=64',
    rearrange: 'T=3,H=5,D=7',
    reduce: 'T=3,C=5',
    rms_norm: 'T=3,C=8',
    rollout_correction: 'B=3,T=4',
    rotary: 'T=8,H=3,D=16',
    rows: 'T=130,C=5',
    sampling: 'T=3,V=40',
    swiglu: 'T=3,C=8',
  }

  test.each(families)('%s runs in sizes and types that are given', async (family) => {
    const { default: benchmark } = (await import(`../dist/bench/${family}.bench.js`)) as {
      default: Benchmark
    }
    const shape = parseShape(small[family]!)
    const { letters, dtypes } = benchmark.custom!
    expect([...shape.keys()]).toEqual(Object.keys(letters))
    for (const dtype of dtypes.length ? dtypes : [undefined]) {
      const rows = customWorkloads(benchmark, shape, dtype)
      expect(rows.length).toBeGreaterThan(0)
      expect(new Set(rows.map(({ name }) => name)).size).toBe(rows.length)
      for (const { inputs } of rows) {
        const device = openDevice('cpu', { threads: 1 })
        try {
          const loaded = inputs(1).load(device)
          loaded.before?.()
          loaded.run()
          await device.synchronize()
        } finally {
          device.dispose()
        }
      }
    }
  })

  test('sizes and types that an operation does not have are refused with those it has', () => {
    const made = (shape: string, dtype?: string) => () =>
      customWorkloads(attentionBenchmark, parseShape(shape), dtype)
    expect(made('T=8,X=1')).toThrow(
      /^attention has no size 'X'; --shape takes B \(sequences, 1\), T \(.*, 1024\), .*D \(/,
    )
    expect(made('T=8', 'f16')).toThrow(
      "attention is not measured in 'f16'; --dtype takes f32, bf16",
    )
    const { custom, ...fixed } = attentionBenchmark
    expect(() => customWorkloads({ ...fixed, op: 'fixed' }, new Map(), 'f32')).toThrow(
      /^fixed has fixed rows/,
    )
    const [row] = made('T=8,D=16', 'bf16')()
    expect(row).toMatchObject({
      name: '1x8x16x16 bf16 fwd',
      products: 'bf16',
      flops: 4 * 8 * 8 * 256,
    })
    expect(custom.dtypes).toEqual(['f32', 'bf16'])
  })

  test.each([
    '',
    'T',
    'T=',
    'T=0',
    'T=-1',
    'T=1.5',
    'T=1e3',
    'TT=1',
    'T=1,',
    '=1',
    'T=99999999999999999',
  ])("'%s' is no shape", (text) => {
    expect(() => parseShape(text)).toThrow(/^expected letters with positive integers/)
  })

  test('a letter has one size', () => {
    expect([...parseShape('T=1, H=2')]).toEqual([
      ['T', 1],
      ['H', 2],
    ])
    expect(() => parseShape('T=1,T=2')).toThrow('T is given twice')
  })

  test('attention measures every kernel of a GPU by name', () => {
    const all = [
      ...readFileSync(`${root}/ops/kernel_choice.cpp`, 'utf8').matchAll(
        /\{"attention", "cuda", "[^"]*", "(\w+)"/g,
      ),
    ].map(([, name]) => name!)
    const forced = attentionBenchmark.workloads.filter((w): w is Workload => 'kernel' in w)
    expect(new Set(forced.map(({ kernel }) => kernel))).toEqual(new Set(all))
    for (const { name, kernel } of forced) expect(name).toMatch(new RegExp(` by ${kernel}$`))
    const device = openDevice('cpu', { threads: 1 })
    const forward = forced.find(({ name }) => name.includes('fwd'))!
    expect(forward.inputs(1).load(device).run).toThrow(/'tiled' .*, got 'mma'/)
    device.dispose()
  })
})

test('the harness is exported, and its example runs', async () => {
  const source = readFileSync(`${root}/bench/index.ts`, 'utf8')
  const [, example] = source.match(/```js\n([\s\S]*?)```/)!
  const program = example!.replaceAll(/^ \* ?/gm, '')
  const { status, stdout, stderr } = spawnSync(
    process.execPath,
    ['--input-type=module', '-e', program],
    { encoding: 'utf8', cwd: root },
  )
  expect(status, stderr).toBe(0)
  expect(stdout).toMatch(
    /gelu 65536 f32\n {2}p2r-kernels +\d+ +[\d.]+ +\d+ % +[\d.]+ GB\/s +\d+ % copy/,
  )
})

test('the command measures a family and writes its rows to a file', () => {
  const folder = mkdtempSync(`${tmpdir()}/p2r-bench-`)
  const file = `${folder}/results.json`
  const main = `${root}/dist/lib/cli/main.js`
  const command = [main, 'bench', 'advantages', '--quick', '--no-peers']
  const { status, stdout, stderr } = spawnSync(
    process.execPath,
    [...command, '--threads', '1', '--json', file],
    { encoding: 'utf8' },
  )
  expect(status, stderr).toBe(0)
  const { rows } = parseResults(readFileSync(file, 'utf8'), file)
  rmSync(folder, { recursive: true })
  expect(rows.length).toBeGreaterThan(1)
  for (const { op, case: name } of rows) {
    expect(op).toBe('advantages')
    expect(stdout).toContain(name)
  }
})

test.each([
  [['gelu', '--shape', 'X=1'], /gelu has no size 'X'; --shape takes T \(rows, 1024\), C/],
  [['gelu', '--dtype', 'i8'], /gelu is not measured in 'i8'; --dtype takes f32, f16, bf16/],
  [['gelu', '--shape', 'T=x'], /expected letters with positive integers/],
  [['--shape', 'T=1'], /--shape and --dtype need the name of an operation/],
  [['gelu', '--dtype', 'f32', '--scaling'], /not with --scaling/],
  [['rotary', '--shape', 'T=3', '--no-peers', '--quick'], /^error: \[\w+\] gridThw/],
])('the command refuses %j in a sentence', (args, message) => {
  const command = [`${root}/dist/bench/main.js`, ...args, '--device', 'cpu']
  const { status, stdout, stderr } = spawnSync(process.execPath, command, { encoding: 'utf8' })
  expect(status).toBe(1)
  expect(stderr).toMatch(message)
  expect(stderr).not.toMatch(/^\s+at /m)
  expect(stdout).toBe('')
})

test('serving: every sample is requested, and the table has the throughput', async () => {
  const progress = vi.fn()
  const rows = await serving({ small: 10, rollout: 2, large: 1 }, progress)
  // Two requests a sample; one for a group's perceptions and one for each of their answers.
  expect(rows.map(({ requests }) => requests)).toEqual([20, 2 * 9, 2])
  for (const { seconds, idealSeconds, cpuMsPerSample } of rows) {
    expect(seconds).toBeGreaterThan(idealSeconds)
    expect(cpuMsPerSample).toBeGreaterThan(0)
  }
  expect(progress).toHaveBeenCalledTimes(3)
  expect(servingReport(rows)).toMatch(/evaluate, 224 x 224 +10 +20 +32 +\d+\.\d\d +\d+\.\d % .* ms/)
})

describe('the model', () => {
  const sizes = {
    vocabSize: 100,
    hiddenSize: 8,
    layers: 2,
    heads: 2,
    kvHeads: 1,
    headDim: 8,
    intermediateSize: 16,
  } as Qwen3VLConfig
  const decoding: Work = { kind: 'decode', format: 'bf16', sequences: 1, cached: 10, steps: 0 }
  // Of a layer 8 x (2 + 1 + 1 + 2) 8 weights of attention and 3 x 8 x 16 of the MLP; 100 x 8 of the head.
  const layer = 8 * 48 + 3 * 8 * 16

  test('a step reads all weights and the cached keys and values of each layer', () => {
    const { bytes, flops, count } = costOf(decoding, sizes)
    expect(bytes).toBe(2 * (2 * layer + 800) + 10 * 2 * 2 * 8 * 2)
    expect(flops).toBe(2 * (2 * layer + 800) + 10 * 2 * 4 * 16)
    expect(count).toBe(1)
    expect(costOf({ ...decoding, format: 'int8' }, sizes).bytes).toBe(
      1.0625 * (2 * layer + 800) + 10 * 2 * 2 * 8 * 2,
    )
  })

  test('a prompt needs the head once, and half of the pairs of its tokens', () => {
    const { flops, count } = costOf({ kind: 'prompt', format: 'bf16', tokens: 3, rounds: 1 }, sizes)
    expect([flops, count]).toEqual([3 * 2 * 2 * layer + 2 * 800 + 6 * 2 * 4 * 16, 3])
  })

  test('the limit is the lower of what reading and what products allow', () => {
    const cost = { bytes: 60e9, flops: 100e9, count: 8 }
    expect(limitOf(cost, { ...limits, bf16: 400e9 })).toBe(8)
    expect(limitOf(cost, { ...limits, bf16: 50e9 })).toBe(4)
  })

  test('rows have the rate and its share of the limit', () => {
    const text = modelReport([{ work: nameOf(decoding), rate: 8, range: [7, 9], limit: 10 }], 2)
    expect(text).toMatch(/2 threads.*\n.*\ndecode, bf16 +8\.00 +7\.00\.\.9\.00 +10\.0 +80 %$/)
    const all = [...new Set(work.map(nameOf))]
    expect(all).toHaveLength(work.length)
  })
})

test('training: a prompt stands once for its completions, or before each of them', () => {
  const small = { prompt: 3, completions: 2, length: 2 }
  const [once, each] = [packed(small, true), packed(small, false)]
  const { tokens } = once
  const [shown, a, b] = [tokens.slice(0, 3), tokens.slice(3, 5), tokens.slice(5)]
  expect(once).toMatchObject({
    cuSeqlens: [0, 3, 5, 7],
    targets: [3, 4, 5, 6],
    prefixOf: [-1, 0, 0],
  })
  expect(each).toEqual({
    tokens: [...shown, ...a, ...shown, ...b],
    cuSeqlens: [0, 5, 10],
    targets: [3, 4, 8, 9],
    prefixOf: [-1, -1],
  })
  const row = { tokens: 7, ms: 500, peakBytes: 2 ** 30 }
  const text = trainingReport(
    [
      { ...row, work: 'prompt once' },
      { ...row, work: 'prompt in each', ms: 2000 },
    ],
    2,
  )
  expect(text).toMatch(/2 threads.*\n.*\nprompt once +7 +0\.50 +4\.00 +1\.00\n.* 2\.00 +1\.00/)
})

test('startup: import and first device are timed in processes of their own', () => {
  const entry = fileURLToPath(new URL('../dist/lib/index.js', import.meta.url))
  const rows = startupTimes(entry, 1)
  for (const { value } of rows) expect(value).toBeGreaterThan(0)
  const size = { what: 'packed', value: 21, unit: 'MB', bound: 20 } as const
  expect(startupReport([...rows, size])).toMatch(
    /import +\d.* ms +60 ms .*\n.*\npacked +21\.0 MB .* missed/s,
  )
})

test('seeded data is the same each time and within its range', () => {
  expect(normals(100_000, 3)).toEqual(normals(100_000, 3))
  expect(normals(8, 3)).not.toEqual(normals(8, 4))
  for (const i of integers(1000, 7, 1)) expect([0, 1, 2, 3, 4, 5, 6]).toContain(i)
  expect(new Set(picture(8, 8, 1)).size).toBeGreaterThan(20)
})

test('a tensor repeats one block; bf16 is rounded to nearest even', async () => {
  const x = Float32Array.of(1, 1.00390625, 1.01171875, -2.5)
  expect(bf16Bits(x)).toEqual(Uint16Array.of(0x3f80, 0x3f80, 0x3f82, 0xc020))
  const device = openDevice('cpu', { threads: 1 })
  const block: Block = { data: x, dtype: 'f32', shape: [5, 2] }
  expect(await tiled(device, block).read()).toEqual(
    Float32Array.of(...x, ...x, ...x.subarray(0, 2)),
  )
  expect(await tiled(device, { ...block, shape: [2, 2] }).read()).toEqual(x)
  device.dispose()
})

/** The fields of a protobuf message: numbers, or the bytes of what is length-delimited. */
function fields(bytes: Uint8Array): [field: number, value: number | Uint8Array][] {
  const out: [number, number | Uint8Array][] = []
  let at = 0
  const varint = () => {
    let value = 0
    for (let scale = 1; ; scale *= 128) {
      const byte = bytes[at++]!
      value += (byte & 127) * scale
      if (byte < 128) return value
    }
  }
  while (at < bytes.length) {
    const tag = varint()
    if (tag % 8 === 0) out.push([tag >> 3, varint()])
    else {
      const length = varint()
      out.push([tag >> 3, bytes.subarray(at, at + length)])
      at += length
    }
  }
  return out
}

test('an ONNX model has the fields of onnx.proto', () => {
  const shape = [300, 2]
  const model = fields(
    onnxModel({
      nodes: [{ op: 'LogSoftmax', inputs: ['x'], outputs: ['y'], ints: { axis: -1 } }],
      inputs: [{ name: 'x', type: 'float', shape }],
      outputs: [{ name: 'y', type: 'float', shape }],
    }),
  )
  const text = (value: unknown) => new TextDecoder().decode(value as Uint8Array)
  expect(model.map(([field]) => field)).toEqual([1, 7, 8, 8])
  const graph = fields(model[1]![1] as Uint8Array)
  expect(graph.map(([field]) => field)).toEqual([1, 2, 11, 12])
  const node = fields(graph[0]![1] as Uint8Array)
  expect(node.map(([field, value]) => [field, field === 5 ? 'axis' : text(value)])).toEqual([
    [1, 'x'],
    [2, 'y'],
    [4, 'LogSoftmax'],
    [5, 'axis'],
    [7, ''],
  ])
  const axis = fields(node[3]![1] as Uint8Array)
  expect(text(axis[0]![1])).toBe('axis')
  expect(axis[1]).toEqual([20, 2])
  // -1 as a 64-bit two's complement, beyond what a number holds exactly.
  expect(axis[2]).toEqual([3, 2 ** 64])
  const input = fields(graph[2]![1] as Uint8Array)
  const type = fields(fields(input[1]![1] as Uint8Array)[0]![1] as Uint8Array)
  expect(type[0]).toEqual([1, 1])
  const dims = fields(type[1]![1] as Uint8Array).map(([, dim]) => fields(dim as Uint8Array)[0])
  expect(dims).toEqual([
    [1, 300],
    [1, 2],
  ])
})
