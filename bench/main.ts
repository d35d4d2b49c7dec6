// npm run bench -- [op...] [--device id] [--threads n,n] [--json FILE] [--quick] [--baseline FILE]
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Command, InvalidArgumentError } from 'commander'
import { openDevice } from 'p2r-kernels'
import { better, ceilingMeter, disturbances } from './ceilings.js'
import { type Benchmark, type Effort, measure, quick, thorough } from './harness.js'
import { installPeers, peerVersion } from './peers/install.js'
import {
  cacheBytes,
  compare,
  emptyResults,
  parseResults,
  type Results,
  withShare,
} from './results.js'
import { quickSamples, serving, servingReport, thoroughSamples } from './serving.js'
import { comparisonReport, report } from './table.js'

const here = dirname(fileURLToPath(import.meta.url))
const root = dirname(dirname(here))

interface Options {
  device?: string
  threads?: number[]
  json?: string
  quick: boolean
  peers: boolean
  baseline?: string
  input?: string
}

function threadList(text: string): number[] {
  const list = text.split(',').map(Number)
  if (!list.every((n) => Number.isInteger(n) && n > 0))
    throw new InvalidArgumentError('expected positive integers, as in 1,2')
  return list
}

const stems = readdirSync(here)
  .filter((name) => name.endsWith('.bench.js'))
  .map((name) => name.slice(0, -'.bench.js'.length))
  .sort()

const program = new Command('npm run bench --')
  .description(
    'Measures every operation, beside what else computes it and what the machine can do.',
  )
  .argument('[op...]', `of ${stems.join(', ')}; all unless given; or serving, by itself`)
  .option('--device <id>', "'cpu', 'cuda', 'cuda:1'; as openDevice chooses unless given")
  .option(
    '--threads <list>',
    'CPU threads to measure with (1 and all; all with --quick)',
    threadList,
  )
  .option('--json <file>', 'writes the results')
  .option('--quick', 'fewer samples, fewer cases', false)
  .option('--no-peers', 'measures this package alone, and installs nothing')
  .option('--baseline <file>', 'an earlier --json: names what got slower beyond the noise')
  .option('--input <file>', 'shows and compares an earlier --json instead of measuring')
  .parse()

const tty = process.stderr.isTTY
function progress(what: string): void {
  if (tty) process.stderr.write(`\r\x1b[K${what.slice(0, (process.stderr.columns ?? 80) - 1)}`)
}

async function measured(ops: readonly string[], options: Options): Promise<Results> {
  for (const op of ops)
    if (!stems.includes(op))
      program.error(`error: no benchmark '${op}'; there are ${stems.join(', ')}`)
  const probe = openDevice(options.device)
  const { info } = probe
  probe.dispose()
  const results = emptyResults(root, info.name, options.quick)
  const notes = new Set<string>()
  const onCpu = info.backend === 'cpu'
  const most = info.threads ?? 1
  const threads = onCpu
    ? (options.threads ?? (options.quick ? [most] : [...new Set([1, most])]))
    : [undefined]

  const peers = options.peers && onCpu
  if (options.peers && !onCpu)
    notes.add(`The peers run on the CPU and were not measured beside ${info.id}.`)
  if (peers) {
    progress('installing the peers')
    const missing = installPeers()
    if (missing) notes.add(missing)
    const version = peerVersion('onnxruntime-node')
    if (version) results.versions['onnxruntime-node'] = version
    const sharp = JSON.parse(readFileSync(`${root}/node_modules/sharp/package.json`, 'utf8'))
    results.versions.sharp = sharp.version
  }

  const meter = onCpu ? ceilingMeter(root) : 'No ceilings of CUDA devices yet, and so no shares.'
  if (typeof meter === 'string') notes.add(meter)
  const ceilings = () =>
    typeof meter === 'string'
      ? []
      : threads.map((n) => {
          progress(`ceilings of ${n} thread(s)`)
          return meter(n ?? 1)
        })
  const before = ceilings()

  const effort: Effort = {
    ...(options.quick ? quick : thorough),
    cacheBytes: cacheBytes(),
    peers,
  }
  const chosen = ops.length ? ops : stems
  for (const [at, stem] of chosen.entries()) {
    const { default: benchmark } = (await import(`./${stem}.bench.js`)) as { default: Benchmark }
    for (const workload of benchmark.workloads) {
      if (workload.slow && !effort.slow) continue
      for (const n of threads)
        results.rows.push(
          ...(await measure(
            benchmark.op,
            workload,
            openDevice(info.id, n === undefined ? {} : { threads: n }),
            effort,
            (sentence) => notes.add(sentence),
            (what) => progress(`[${at + 1}/${chosen.length}] ${what}`),
          )),
        )
    }
  }
  const after = ceilings()
  results.ceilings = before.map((c, i) => better(c, after[i]!))
  for (const sentence of disturbances(before, after)) notes.add(sentence)
  results.rows = results.rows.map((row) => withShare(row, results.ceilings))
  results.notes = [...notes]
  progress('')
  return results
}

const options = program.opts<Options>()
// No operation: it has no device time, no ceilings and no peers.
if (program.args.length === 1 && program.args[0] === 'serving') {
  const rows = await serving(options.quick ? quickSamples : thoroughSamples, progress)
  progress('')
  if (options.json !== undefined)
    writeFileSync(options.json, `${JSON.stringify({ serving: rows }, undefined, 2)}\n`)
  console.log(servingReport(rows))
  process.exit()
}
function read(file: string): Results {
  try {
    return parseResults(readFileSync(file, 'utf8'), file)
  } catch (error) {
    return program.error(`error: ${(error as Error).message}`)
  }
}
// Before an hour is spent on measuring.
const baseline = options.baseline === undefined ? undefined : read(options.baseline)
const results =
  options.input === undefined ? await measured(program.args, options) : read(options.input)
if (options.json !== undefined)
  writeFileSync(options.json, `${JSON.stringify(results, undefined, 2)}\n`)
console.log(report(results))
if (baseline) console.log(`\n${comparisonReport(compare(baseline, results), options.baseline!)}`)
