import { createHash } from 'node:crypto'
import { appendFile, open } from 'node:fs/promises'
import { basename, dirname, extname, join } from 'node:path'
import { SingleBar } from 'cli-progress'
import { type Device, openDevice } from '../device.js'
import { readText, replaceFile } from '../files.js'
import { loadImage } from '../image.js'
import { evaluate, type Question } from '../p2r/evaluate.js'
import { type AnswerForm, defaultPrompts } from '../p2r/prompts.js'
import type { Verifier } from '../p2r/reward.js'
import { type BenchmarkName, imageIn, layoutOf, readBenchmark } from './benchmarks.js'
import { type Result, type Row, readResults, readRows, type Settings } from './questions.js'
import { comparisonOf, comparisonText, type Summary, summaryOf, tableOf } from './report.js'
import {
  LocalModels,
  type Method,
  type RoleOptions,
  type Roles,
  rolesOf,
  type Server,
  verifierOf,
} from './roles.js'
import { UsageError } from './usage.js'

export interface EvaluateOptions extends RoleOptions {
  form: AnswerForm
  benchmark?: BenchmarkName
  method: Method | 'both'
  seeds?: number[]
  out?: string
  json?: string
  limit?: number
  device?: string
}

/** One pass over the questions: by which method, with which seed. */
interface Run {
  method: Method
  seed?: number
  /** Its file of results. */
  file: string
}

/** A run before its first request. */
interface Prepared extends Run, Survey {
  roles: Roles
  judge: { verifier: Verifier; server: Server } | undefined
  settings: Settings
}

/** Answers and scores the questions of a file or a benchmark, in one run or several; returns the exit code. */
export async function evaluateCommand(data: string, options: EvaluateOptions): Promise<number> {
  using device = openDevice(options.device)
  const models = new LocalModels(device, options)
  const runs: Prepared[] = []
  for (const run of runsOf(data, options)) runs.push(await prepare(data, run, options, models))

  const stop = new AbortController()
  const interrupt = (): void => {
    // A second Ctrl-C exits at once.
    if (stop.signal.aborted) process.exit(130)
    stop.abort()
  }
  process.on('SIGINT', interrupt)
  try {
    for (const run of runs) await execute(data, run, options, device, stop.signal)
  } finally {
    process.off('SIGINT', interrupt)
  }

  await report(runs, options)
  const all = runs.flatMap(({ before }) => [...before.values()])
  const total = runs.reduce((sum, run) => sum + run.total, 0)
  if (stop.signal.aborted) {
    console.error(`Stopped after ${all.length} of ${total}; run the same command to resume.`)
    return 130
  }
  const failed = all.filter(({ error }) => error !== undefined)
  if (failed.length) {
    console.error(
      `${failed.length} of ${total} questions failed, first line ${failed[0]!.line}: ${failed[0]!.error}\n` +
        'Run the same command to retry them.',
    )
    return 1
  }
  return 0
}

/** The runs of a command, and their files: DATA.results.jsonl, or DATA.zoom.seed-1.results.jsonl where there are several. */
function runsOf(data: string, { method, seeds, out }: EvaluateOptions): Run[] {
  const methods: readonly Method[] = method === 'both' ? ['two-stage', 'zoom'] : [method]
  const stem = join(dirname(data), basename(data, extname(data)))
  return methods.flatMap((method) =>
    (seeds ?? [undefined]).map((seed): Run => {
      const several = [
        ...(methods.length > 1 && method === 'zoom' ? ['zoom'] : []),
        ...(seed === undefined ? [] : [`seed-${seed}`]),
      ]
      const mark = several.map((part) => `.${part}`).join('')
      const end = out === undefined ? '' : extname(out)
      return {
        method,
        ...(seed !== undefined && { seed }),
        file:
          out === undefined
            ? `${stem}${mark}.results.jsonl`
            : `${out.slice(0, out.length - end.length)}${mark}${end}`,
      }
    }),
  )
}

function rowsOf(data: string, { benchmark, form, limit }: EvaluateOptions): AsyncGenerator<Row> {
  return limited(benchmark ? readBenchmark(benchmark, data) : readRows(data, form), limit)
}

/** Reads questions and known results, and finds the servers: all that can be refused before the first request. */
async function prepare(
  data: string,
  run: Run,
  options: EvaluateOptions,
  models: LocalModels,
): Promise<Prepared> {
  const { method, seed, file } = run
  const { results: known, settings: recorded } = await readResults(file)
  const surveyed = await survey(data, options, known, file)
  const roles = await rolesOf(options, models, method, seed)
  const judge = surveyed.free ? await verifierOf(options, models) : undefined
  const servers = { ...roles.servers, ...(judge && { verifier: judge.server }) }
  const settings = settingsOf(options, run, servers)
  if (known.size) checkSettings(settings, recorded, file)
  const { total, remaining } = surveyed
  if (total > remaining)
    console.error(`Took over ${total - remaining} of ${total} results from ${file}.`)
  return { ...run, ...surveyed, roles, judge, settings }
}

/** Asks for what is missing, and appends it to the run's file. An abort ends it early. */
async function execute(
  data: string,
  run: Prepared,
  options: EvaluateOptions,
  device: Device,
  signal: AbortSignal,
): Promise<void> {
  const { file, before, total, remaining, roles, judge, settings, method, seed } = run
  const { autoOrient } = options
  if (signal.aborted) return
  const several = options.method === 'both' || (options.seeds?.length ?? 1) > 1
  const label = several
    ? `evaluate, ${method}${seed === undefined ? '' : `, seed ${seed}`}`
    : 'evaluate'
  const bar = new SingleBar({
    format: `${label} {bar} {value}/{total}  {accuracy} % right  {failed} failed  {eta_formatted} left`,
    barsize: 24,
    hideCursor: true,
    gracefulExit: false,
  })
  let correct = 0
  let judged = 0
  let failed = 0
  for (const { reward } of before.values())
    if (reward !== undefined) {
      correct += reward
      judged++
    }
  const shown = () => ({ accuracy: judged ? ((100 * correct) / judged).toFixed(1) : '-', failed })
  bar.start(total, total - remaining, shown())
  await dropPartialLine(file)
  let first = true
  try {
    const questions = (async function* (): AsyncGenerator<Question & { row: Row }> {
      for await (const row of rowsOf(data, options)) {
        if (isDone(before.get(row.line))) continue
        const { question, truth, form: answerForm } = row
        yield {
          row,
          question,
          truth,
          answerForm,
          load: async () => loadImage(await sourceOf(row), device, { autoOrient }),
        }
      }
    })()
    const all = evaluate({
      ...roles.answerer,
      questions,
      concurrency: options.concurrency,
      rules: options.rules,
      signal,
      ...(judge && { verifier: judge.verifier }),
    })
    for await (const { question, error, ...rest } of all) {
      const { line, id, category, truth, imageId: image, cluster } = question.row
      const asked = {
        line,
        id,
        category,
        question: question.question,
        truth,
        image,
        ...(cluster !== undefined && { cluster }),
      }
      const result: Result = error ? { ...asked, error: error.message } : { ...asked, ...rest }
      await appendFile(file, `${JSON.stringify(first ? { ...result, settings } : result)}\n`)
      first = false
      // The models' outputs are in the file; memory keeps only what the table needs.
      const { perception: _, reasoning: __, question: ___, ...kept } = result
      before.set(line, { ...kept, question: '' })
      correct += result.reward ?? 0
      judged += +(result.reward !== undefined)
      failed += +(error !== undefined)
      bar.increment(1, shown())
    }
  } catch (error) {
    if (!signal.aborted) throw error
  } finally {
    bar.stop()
  }
}

async function sourceOf({ image }: Row): Promise<string | Uint8Array> {
  if (typeof image === 'string' || image instanceof Uint8Array) return image
  return imageIn(image)
}

/** Prints a table for each method, over its seeds, and how the methods compare. */
async function report(runs: readonly Prepared[], options: EvaluateOptions): Promise<void> {
  const layout = options.benchmark && layoutOf(options.benchmark)
  const methods = [...new Set(runs.map(({ method }) => method))]
  const resultsOf = (method: Method) =>
    runs.filter((run) => run.method === method).map(({ before }) => [...before.values()])
  const summaries: Record<string, Summary> = {}
  for (const method of methods) {
    const summary = summaryOf(resultsOf(method), layout)
    summaries[method] = summary
    if (methods.length > 1) console.log(`${method}:`)
    console.log(tableOf(summary))
    if (methods.length > 1) console.log('')
    const { truncated, droppedBoxes, outOfTurns, questions } = summary.overall
    if (truncated)
      console.error(
        `${truncated} of ${questions} questions were scored on an output that the limit of tokens cut off.`,
      )
    if (outOfTurns)
      console.error(
        `${outOfTurns} of ${questions} questions ran out of turns without an answer, and are wrong; see --max-turns.`,
      )
    if (droppedBoxes)
      console.error(
        `${droppedBoxes} boxes lie outside of their images or are too thin to be cropped; are --coordinates right?`,
      )
  }
  const [first, second] = methods
  const comparison = first && second && comparisonOf(resultsOf(first), resultsOf(second))
  if (comparison) console.log(comparisonText([first, second], comparison))
  if (options.json === undefined) return
  const written = second ? { methods: summaries, comparison } : summaries[first!]
  await replaceFile(options.json, [Buffer.from(`${JSON.stringify(written, null, 2)}\n`)])
}

function isDone(result: Result | undefined): boolean {
  return result !== undefined && result.error === undefined
}

async function* limited<T>(
  items: AsyncIterable<T>,
  count = Number.POSITIVE_INFINITY,
): AsyncGenerator<T> {
  let taken = 0
  for await (const item of items) {
    if (taken++ >= count) return
    yield item as T
  }
}

interface Survey {
  total: number
  remaining: number
  /** Whether a question is of free form, which needs a verifier. */
  free: boolean
  /** The known results by line, and those that are added. */
  before: Map<number, Result>
}

/**
 * Reads the whole file of questions before the first request, so that an error in its last line is
 * reported at once and the progress bar has a total. `before` are the known results of its questions.
 */
async function survey(
  data: string,
  options: EvaluateOptions,
  known: ReadonlyMap<number, Result>,
  results: string,
): Promise<Survey> {
  let [total, remaining, free] = [0, 0, false]
  const before = new Map<number, Result>()
  for await (const row of rowsOf(data, options)) {
    total++
    const result = known.get(row.line)
    const differing = result && differenceOf(result, row)
    if (differing)
      throw new UsageError(
        `${results} holds results of other questions (line ${row.line} has another ${differing}); name another file by --out`,
      )
    if (result) before.set(row.line, result)
    free ||= row.form === 'free_form'
    if (!isDone(result)) remaining++
  }
  if (!total) throw new UsageError(`${data} holds no questions`)
  return { total, remaining, free, before }
}

/** What a result's question has that the file's has not; undefined where they are the same. */
function differenceOf(result: Result, row: Row): string | undefined {
  if (result.question !== row.question) return 'question'
  if (result.truth !== row.truth) return 'answer'
  return result.image !== undefined && result.image !== row.imageId ? 'image' : undefined
}

/** Options that results do not depend on, or that the servers stand for. */
const incidental: ReadonlySet<string> = new Set<keyof EvaluateOptions>([
  'out',
  'json',
  'limit',
  'device',
  'apiKey',
  'timeout',
  'stream',
  'retries',
  'concurrency',
  'baseUrl',
  'model',
  'perceiverUrl',
  'perceiverModel',
  'reasonerUrl',
  'reasonerModel',
  'verifierUrl',
  'verifierModel',
  // The run's own are recorded.
  'method',
  'seeds',
])

/** Options that the results of a method do not depend on. */
const foreign: Readonly<Record<Method, readonly (keyof EvaluateOptions)[]>> = {
  'two-stage': ['maxTurns', 'toolCalls'],
  zoom: ['maxEvidence', 'padding'],
}

/** What the results depend on beside the questions. */
function settingsOf(
  options: EvaluateOptions,
  { method, seed }: Run,
  servers: Partial<Record<string, Server>>,
): Settings {
  const left: ReadonlySet<string> = new Set(foreign[method])
  const hash = createHash('sha256').update(JSON.stringify(defaultPrompts)).digest('hex')
  const others = Object.entries(options).filter(
    ([name]) => !incidental.has(name) && !left.has(name),
  )
  return {
    method,
    ...(seed !== undefined && { seed }),
    ...servers,
    prompts: hash.slice(0, 16),
    ...Object.fromEntries(others),
  }
}

/** Refuses results that were made with other settings. */
function checkSettings(settings: Settings, recorded: Settings | undefined, results: string): void {
  if (!recorded)
    throw new UsageError(
      `${results} does not record the settings of its results; name another file by --out`,
    )
  const shown = (value: unknown): string => JSON.stringify(value) ?? 'none'
  // A verifier is needed only where questions of free form are among the first --limit.
  const names = new Set([...Object.keys(settings), ...Object.keys(recorded)])
  const differing = [...names].filter((name) =>
    name === 'verifier' && !(settings[name] && recorded[name])
      ? false
      : shown(settings[name]) !== shown(recorded[name]),
  )
  if (differing.length)
    throw new UsageError(
      `${results} holds results of other settings (${differing
        .map((name) => `${name}: ${shown(recorded[name])}, now ${shown(settings[name])}`)
        .join('; ')}); name another file by --out`,
    )
}

/** Removes an incomplete last line, left by a crash. */
async function dropPartialLine(path: string): Promise<void> {
  const text = await readText(path).catch(() => '')
  if (text === '' || text.endsWith('\n')) return
  const complete = Buffer.byteLength(text.slice(0, text.lastIndexOf('\n') + 1))
  const file = await open(path, 'r+')
  await file.truncate(complete)
  await file.close()
}
