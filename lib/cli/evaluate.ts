import { appendFile, open, readFile, writeFile } from 'node:fs/promises'
import { basename, dirname, extname, join } from 'node:path'
import { SingleBar } from 'cli-progress'
import { openDevice } from '../device.js'
import { loadImage } from '../image.js'
import { evaluate, type Question } from '../p2r/evaluate.js'
import type { AnswerForm } from '../p2r/prompts.js'
import { type Result, type Row, readResults, readRows } from './questions.js'
import { summaryOf, tableOf } from './report.js'
import { type RoleOptions, rolesOf, verifierOf } from './roles.js'
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
  const before = await readResults(results)
  const [total, remaining] = await survey(data, options, before, results)
  const roles = await rolesOf(options)
  const verifier = remaining.free ? await verifierOf(options) : undefined
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
  bar.start(total, total - remaining.count, shown())
  await dropPartialLine(results)
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
      ...roles,
      questions,
      concurrency: options.concurrency,
      rules: options.rules,
      signal: stop.signal,
      ...(verifier && { verifier }),
    })
    for await (const { question, error, ...rest } of all) {
      const { line, id, category, truth } = question.row
      const asked = { line, id, category, question: question.question, truth }
      const result: Result = error ? { ...asked, error: error.message } : { ...asked, ...rest }
      await appendFile(results, `${JSON.stringify(result)}\n`)
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
    const first = [...before.values()].find(({ error }) => error)!
    console.error(
      `${failed} of ${total} questions failed, first line ${first.line}: ${first.error}\n` +
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
 * reported at once and the progress bar has a total.
 */
async function survey(
  data: string,
  options: EvaluateOptions,
  before: Map<number, Result>,
  results: string,
): Promise<[total: number, remaining: { count: number; free: boolean }]> {
  let total = 0
  const remaining = { count: 0, free: false }
  for await (const row of limited(readRows(data, options.form), options.limit)) {
    total++
    const known = before.get(row.line)
    if (known && (known.question !== row.question || known.truth !== row.truth))
      throw new UsageError(
        `${results} holds results of other questions (line ${row.line} differs); name another file by --out`,
      )
    if (isDone(known)) continue
    remaining.count++
    remaining.free ||= row.form === 'free_form'
  }
  if (!total) throw new UsageError(`${data} holds no questions`)
  return [total, remaining]
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
