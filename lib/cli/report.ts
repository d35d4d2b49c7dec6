import type { Result } from './questions.js'

/** Of a category, or of all. */
export interface Score {
  questions: number
  correct: number
  /** correct / those without an error, in percent; null where there are none. */
  accuracy: number | null
  /** Mean number of boxes in the perceiver's output. */
  boxes: number | null
  /** All of the perceiver's boxes that have no crop, for their range or their shape. */
  droppedBoxes: number
  failed: number
  /** Judged questions for which the limit of tokens cut an output off. */
  truncated: number
}

export interface Summary {
  overall: Score
  categories: Record<string, Score>
}

export function summaryOf(results: Iterable<Result>): Summary {
  const byCategory = new Map<string, Result[]>()
  const all: Result[] = []
  for (const result of results) {
    all.push(result)
    const same = byCategory.get(result.category)
    if (same) same.push(result)
    else byCategory.set(result.category, [result])
  }
  const categories = [...byCategory].sort(([a], [b]) => (a < b ? -1 : 1))
  return {
    overall: scoreOf(all),
    categories: Object.fromEntries(categories.map(([name, some]) => [name, scoreOf(some)])),
  }
}

function scoreOf(results: readonly Result[]): Score {
  const judged = results.filter(({ reward }) => reward !== undefined)
  const sum = (f: (result: Result) => number): number => judged.reduce((s, r) => s + f(r), 0)
  const correct = sum(({ reward = 0 }) => reward)
  return {
    questions: results.length,
    correct,
    accuracy: judged.length ? (100 * correct) / judged.length : null,
    boxes: judged.length ? sum(({ boxes = 0 }) => boxes) / judged.length : null,
    droppedBoxes: sum(({ droppedBoxes = 0 }) => droppedBoxes),
    failed: results.length - judged.length,
    truncated: judged.filter(({ truncated }) => truncated?.length).length,
  }
}

export function tableOf({ overall, categories }: Summary): string {
  const row = (name: string, { questions, correct, accuracy, boxes, failed }: Score): string[] => [
    name,
    String(questions),
    String(correct),
    accuracy === null ? '-' : `${accuracy.toFixed(1)} %`,
    boxes === null ? '-' : boxes.toFixed(2),
    String(failed),
  ]
  const rows = [
    ['category', 'questions', 'correct', 'accuracy', 'boxes', 'failed'],
    ...Object.entries(categories).map(([name, score]) => row(name, score)),
    row('all', overall),
  ]
  const widths = rows[0]!.map((_, column) => Math.max(...rows.map((r) => r[column]!.length)))
  return rows
    .map((r) =>
      r.map((cell, i) => (i ? cell.padStart(widths[i]!) : cell.padEnd(widths[i]!))).join('  '),
    )
    .join('\n')
}
