import { createHash } from 'node:crypto'
import { appendFile, open, readFile, writeFile } from 'node:fs/promises'
import { basename, dirname, extname, join } from 'node:path'
import { SingleBar } from 'cli-progress'
import { openDevice } from '../device.js'
import { loadImage } from '../image.js'
import { evaluate, type Question } from '../p2r/evaluate.js'
import { type AnswerForm, defaultPrompts } from '../p2r/prompts.js'
import { type Result, type Row, readResults, readRows, type Settings } from './questions.js'
import { summaryOf, tableOf } from './report.js'
import { type RoleOptions, rolesOf, type Server, verifierOf } from './roles.js'
import { UsageError } from './usage.js'

export interface EvaluateOptions extends RoleOptions {
  form: AnswerForm
  out?: string
  json?: string
  limit?: number
  device?: string
}

/** Answers and scores the questions of a file; returns the exit code. */
export async function evaluateCommand(data: string, options: EvaluateOptions): Promise<number> {
  const results =
    options.out ?? join(dirname(data), `${basename(data, extname(data))}.results.jsonl`)
  const { results: known, settings: recorded } = await readResults(results)
  const { total, remaining, free, before } = await survey(data, options, known, results)
  const { perceiver, reasoner, servers } = await rolesOf(options)
  const judge = free ? await verifierOf(options) : undefined
  const settings = settingsOf(options, { ...servers, ...(judge && { verifier: judge.server }) })
  if (known.size) checkSettings(settings, recorded, results)
  const taken = total - remaining
  if (taken) console.error(`Took over ${taken} of ${total} results from ${results}.`)
  using device = openDevice(options.device)
  const { autoOrient } = options

  const stop = new AbortController()
  const interrupt = (): void => {
    // A second Ctrl-C exits at once.
    if (stop.signal.aborted) process.exit(130)
    stop.abort()
  }
  process.on('SIGINT', interrupt)
  const bar = new SingleBar({
    format:
      'evaluate {bar} {value}/{total}  {accuracy} % right  {failed} failed  {eta_formatted} left',
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
  bar.start(total, taken, shown())
  await dropPartialLine(results)
  let first = true
  try {
    const questions = (async function* (): AsyncGenerator<Question & { row: Row }> {
      for await (const row of limited(readRows(data, options.form), options.limit)) {
        if (isDone(before.get(row.line))) continue
        const { question, truth, form: answerForm } = row
        yield {
          row,
          question,
          truth,
          answerForm,
          load: () => loadImage(row.image, device, { autoOrient }),
        }
      }
    })()
    const all = evaluate({
      perceiver,
      reasoner,
      questions,
      concurrency: options.concurrency,
      rules: options.rules,
      signal: stop.signal,
      ...(judge && { verifier: judge.verifier }),
    })
    for await (const { question, error, ...rest } of all) {
      const { line, id, category, truth, imageId: image } = question.row
      const asked = { line, id, category, question: question.question, truth, image }
      const result: Result = error ? { ...asked, error: error.message } : { ...asked, ...rest }
      await appendFile(results, `${JSON.stringify(first ? { ...result, settings } : result)}\n`)
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
    if (!stop.signal.aborted) throw error
  } finally {
    bar.stop()
    process.off('SIGINT', interrupt)
  }

  const summary = summaryOf(before.values())
  console.log(tableOf(summary))
  const { truncated, droppedBoxes } = summary.overall
  if (truncated)
    console.error(
      `${truncated} of ${total} questions were scored on an output that the limit of tokens cut off.`,
    )
  if (droppedBoxes)
    console.error(
      `${droppedBoxes} boxes lie outside of their images or are too thin to be cropped; are --coordinates right?`,
    )
  if (options.json !== undefined)
    await writeFile(options.json, `${JSON.stringify(summary, null, 2)}\n`)
  if (stop.signal.aborted) {
    console.error(`Stopped after ${before.size} of ${total}; run the same command to resume.`)
    return 130
  }
  if (failed) {
    const one = [...before.values()].find(({ error }) => error)!
    console.error(
      `${failed} of ${total} questions failed, first line ${one.line}: ${one.error}\n` +
        'Run the same command to retry them.',
    )
    return 1
  }
  return 0
}

function isDone(result: Result | undefined): boolean {
  return result !== undefined && result.error === undefined
}

async function* limited<T>(items: AsyncIterable<T>, count = Number.POSITIVE_INFINITY) {
  let taken = 0
  for await (const item of items) {
    if (taken++ >= count) return
    yield item as T
  }
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
): Promise<{ total: number; remaining: number; free: boolean; before: Map<number, Result> }> {
  let [total, remaining, free] = [0, 0, false]
  const before = new Map<number, Result>()
  for await (const row of limited(readRows(data, options.form), options.limit)) {
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
])

/** What the results depend on beside the questions. */
function settingsOf(options: EvaluateOptions, servers: Record<string, Server>): Settings {
  const hash = createHash('sha256').update(JSON.stringify(defaultPrompts)).digest('hex')
  const others = Object.entries(options).filter(([name]) => !incidental.has(name))
  return { ...servers, prompts: hash.slice(0, 16), ...Object.fromEntries(others) }
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
  const text = await readFile(path, 'utf8').catch(() => '')
  if (text === '' || text.endsWith('\n')) return
  const complete = Buffer.byteLength(text.slice(0, text.lastIndexOf('\n') + 1))
  const file = await open(path, 'r+')
  await file.truncate(complete)
  await file.close()
}
