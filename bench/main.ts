// p2r-kernels bench, or npm run bench --, with [op...] [--device id] [--threads n,n] [--shape T=n,H=n]
//   [--dtype type] [--json FILE] [--html FILE] [--quick] [--scaling] [--baseline FILE]
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Command, InvalidArgumentError } from 'commander'
import { kernels, openDevice, P2RError } from 'p2r-kernels'
import { cpuCeilings, cudaCeilings, disturbances } from './ceilings.js'
import { type Benchmark, type Effort, measure, quick, thorough } from './harness.js'
import { html } from './html.js'
import { installPeers, peerVersion } from './peers/install.js'
import { pythonVersions, stopPython } from './peers/python.js'
import { modelRates, modelReport } from './qwen3_vl.js'
import {
  better,
  type Ceilings,
  cacheBytes,
  compare,
  emptyResults,
  impossible,
  parseResults,
  type Results,
  withShare,
} from './results.js'
import { scaling } from './scaling.js'
import { quickSamples, serving, servingReport, thoroughSamples } from './serving.js'
import { customWorkloads, parseShape } from './shapes.js'
import { startup, startupReport } from './startup.js'
import { comparisonReport, impossibleReport, report } from './table.js'
import { predictions } from './targets.js'
import { trainingPasses, trainingReport } from './training.js'

const here = dirname(fileURLToPath(import.meta.url))
const root = dirname(dirname(here))

interface Options {
  device?: string
  threads?: number[]
  shape?: Map<string, number>
  dtype?: string
  json?: string
  quick: boolean
  peers: boolean
  html?: string
  scaling: boolean
  baseline?: string
  input?: string
}

function threadList(text: string): number[] {
  const list = text.split(',').map(Number)
  if (!list.every((n) => Number.isInteger(n) && n > 0))
    throw new InvalidArgumentError('expected positive integers, as in 1,2')
  return list
}

function shapeOption(text: string): Map<string, number> {
  try {
    return parseShape(text)
  } catch (error) {
    throw new InvalidArgumentError((error as Error).message)
  }
}

const stems = readdirSync(here)
  .filter((name) => name.endsWith('.bench.js'))
  .map((name) => name.slice(0, -'.bench.js'.length))
  .sort()

const predicted = predictions(root)
const { groups } = predicted

const program = new Command('p2r-kernels bench')
  .description(
    'Measures every operation, beside what else computes it and what the machine can do.',
  )
  .argument(
    '[op...]',
    `of ${[...stems, ...Object.keys(groups)].join(', ')}; all, in the order of their names, unless given; or serving, startup, qwen3_vl or training by itself`,
  )
  .option('--device <id>', "'cpu', 'cuda', 'cuda:1'; as openDevice chooses unless given")
  .option(
    '--threads <list>',
    'CPU threads to measure with (1 and all; all with --quick)',
    threadList,
  )
  .option(
    '--shape <sizes>',
    'rows of these sizes instead, as T=1024,H=16,D=72; an unknown letter lists those of the operation',
    shapeOption,
  )
  .option('--dtype <type>', 'rows of this type instead, as bf16')
  .option('--json <file>', 'writes the results')
  .option('--html <file>', 'writes a report with plots, tables that sort, and a filter')
  .option('--scaling', 'measures how time and memory grow with size', false)
  .option('--quick', 'fewer samples, fewer cases', false)
  .option('--no-peers', 'measures only this package, and installs nothing')
  .option('--baseline <file>', 'an earlier --json: names what got slower beyond the noise')
  .option('--input <file>', 'shows and compares an earlier --json instead of measuring')
  .parse()

const options = program.opts<Options>()
const ownRows = options.shape !== undefined || options.dtype !== undefined
if (ownRows && (options.scaling || options.input !== undefined))
  program.error('error: --shape and --dtype choose rows to measure: not with --scaling or --input')
if (ownRows && program.args.length === 0)
  program.error('error: --shape and --dtype need the name of an operation')

const tty = process.stderr.isTTY
function progress(what: string): void {
  if (tty) process.stderr.write(`\r\x1b[K${what.slice(0, (process.stderr.columns ?? 80) - 1)}`)
}

/** The operations by these names, each that of an operation or a group. */
function named(names: readonly string[]): string[] {
  const ops = names.flatMap((name) => (name === 'all' ? stems : (groups[name] ?? name)))
  for (const op of ops)
    if (!stems.includes(op))
      program.error(
        `error: no benchmark '${op}'; there are ${[...stems, ...Object.keys(groups)].join(', ')}`,
      )
  return ops.length ? [...new Set(ops)] : stems
}

async function chosen(ops: readonly string[]): Promise<readonly Benchmark[]> {
  if (options.scaling) return scaling.filter(({ op }) => ops.includes(op))
  return Promise.all(
    ops.map(async (op) => {
      const all = ((await import(`./${op}.bench.js`)) as { default: Benchmark }).default
      if (!ownRows) return all
      try {
        return {
          ...all,
          workloads: customWorkloads(all, options.shape ?? new Map(), options.dtype),
        }
      } catch (error) {
        return program.error(`error: ${(error as Error).message}`)
      }
    }),
  )
}

async function measured(names: readonly string[]): Promise<Results> {
  const benchmarks = await chosen(named(names))
  const probe = openDevice(options.device)
  const { info } = probe
  const forced = benchmarks.filter(({ workloads }) => workloads.some(({ kernel }) => kernel))
  const kernelsOf = new Map(forced.map(({ op }) => [op, kernels(op, probe)]))
  probe.dispose()
  const results = emptyResults(root, info.name, options.quick)
  const notes = new Set<string>()
  const onCpu = info.backend === 'cpu'
  const most = info.threads ?? 1
  const threads = onCpu
    ? (options.threads ?? (options.quick ? [most] : [...new Set([1, most])]))
    : [undefined]

  const { peers } = options
  if (peers && onCpu) {
    progress('installing the peers')
    const missing = installPeers()
    if (missing) notes.add(missing)
    const version = peerVersion('onnxruntime-node')
    if (version) results.versions['onnxruntime-node'] = version
    results.versions.sharp = (await import('sharp')).default.versions.sharp!
  }

  const ceilings = async (): Promise<Ceilings[]> => {
    progress('ceilings')
    if (onCpu) return threads.map((n) => cpuCeilings(n ?? 1))
    const [device, missing] = await cudaCeilings(info.id)
    if (missing) notes.add(missing)
    return [device]
  }
  const before = await ceilings()

  const effort: Effort = {
    ...(options.quick ? quick : thorough),
    // The L2 size of a GPU is not queried: an upper bound.
    cacheBytes: onCpu ? cacheBytes() : 2 ** 26,
    peers,
    ...(onCpu ? { ceilings: (n: number, bytes: number) => cpuCeilings(n, bytes, 1) } : {}),
  }
  // Written as they are measured, so that an interrupted run keeps its rows.
  const save = (ceilings: readonly Ceilings[]) => {
    const rows = results.rows.map((row) => withShare(row, ceilings))
    const whole: Results = { ...results, ceilings: [...ceilings], rows, notes: [...notes] }
    if (options.json !== undefined)
      writeFileSync(options.json, `${JSON.stringify(whole, undefined, 2)}\n`)
    return whole
  }
  for (const [at, { op, workloads }] of benchmarks.entries())
    for (const workload of workloads) {
      if (workload.slow && !effort.slow) continue
      if (workload.backend && workload.backend !== info.backend) continue
      if (workload.kernel && !kernelsOf.get(op)!.includes(workload.kernel)) continue
      for (const n of threads)
        results.rows.push(
          ...(await measure(
            op,
            workload,
            openDevice(info.id, n === undefined ? {} : { threads: n }),
            effort,
            (message) => notes.add(message),
            (what) => progress(`[${at + 1}/${benchmarks.length}] ${what}`),
          )),
        )
      save(before)
    }
  Object.assign(results.versions, await pythonVersions())
  const after = await ceilings()
  await stopPython()
  for (const message of disturbances(before, after)) notes.add(message)
  progress('')
  return save(before.map((c, i) => better(c, after[i]!)))
}

// No operation: it has no device time, no ceilings and no peers.
if (program.args.length === 1 && program.args[0] === 'serving') {
  const rows = await serving(options.quick ? quickSamples : thoroughSamples, progress)
  progress('')
  if (options.json !== undefined)
    writeFileSync(options.json, `${JSON.stringify({ serving: rows }, undefined, 2)}\n`)
  console.log(servingReport(rows))
  process.exit()
}
if (program.args.length === 1 && program.args[0] === 'startup') {
  progress('installing')
  const rows = startup(root, options.quick ? 5 : 20)
  progress('')
  if (options.json !== undefined)
    writeFileSync(options.json, `${JSON.stringify({ startup: rows }, undefined, 2)}\n`)
  console.log(startupReport(rows))
  process.exit()
}
if (program.args.length === 1 && program.args[0] === 'qwen3_vl') {
  const { threads, rates, notes } = await modelRates(root, progress)
  progress('')
  if (options.json !== undefined)
    writeFileSync(
      options.json,
      `${JSON.stringify({ threads, qwen3_vl: rates, notes }, undefined, 2)}\n`,
    )
  console.log([modelReport(rates, threads), ...notes].join('\n'))
  process.exit()
}
if (program.args.length === 1 && program.args[0] === 'training') {
  const { threads, passes } = await trainingPasses(root, progress, options.quick ? 1 : 3)
  progress('')
  if (options.json !== undefined)
    writeFileSync(options.json, `${JSON.stringify({ threads, training: passes }, undefined, 2)}\n`)
  console.log(trainingReport(passes, threads))
  process.exit()
}
function read(file: string): Results {
  try {
    return parseResults(readFileSync(file, 'utf8'), file)
  } catch (error) {
    return program.error(`error: ${(error as Error).message}`)
  }
}
// Checked before measuring, which may take an hour.
const baseline = options.baseline === undefined ? undefined : read(options.baseline)
/** Sizes that an operation refuses, or a device that is not here, are answered by a sentence. */
async function measuredOrRefused(): Promise<Results> {
  try {
    return await measured(program.args)
  } catch (error) {
    if (!(error instanceof P2RError)) throw error
    progress('')
    return program.error(`error: ${error.message}`)
  }
}
const results = options.input === undefined ? await measuredOrRefused() : read(options.input)
if (options.html !== undefined) {
  writeFileSync(options.html, html(results, predicted))
}
console.log(report(results, predicted))
if (baseline) console.log(`\n${comparisonReport(compare(baseline, results), options.baseline!)}`)
const wrong = impossible(results)
if (wrong.length) {
  console.log(`\n${impossibleReport(wrong)}`)
  process.exitCode = 1
}
