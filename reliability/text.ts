// How the time of reading a text grows with its length. What is linear doubles with it; what is quadratic has once
// stopped a training run for a minute.
import {
  answerReward,
  extractAnswer,
  formatReward,
  groundingRewards,
  parseBoxes,
  perceptionFault,
} from 'p2r-kernels'

export interface Growth {
  name: string
  /** Characters, or boxes. */
  sizes: number[]
  /** Milliseconds, the smallest of three. */
  times: number[]
}

const box = '{"bbox_2d": [1, 2, 3, 4], "label": "a"}'
const texts: Readonly<Record<string, (n: number) => string>> = {
  quotes: (n) => '"'.repeat(n),
  blanks: (n) => ' '.repeat(n),
  brackets: (n) => '['.repeat(n),
  braces: (n) => '{'.repeat(n),
  backslashes: (n) => '\\'.repeat(n),
  'opening tags': (n) => '<answer>'.repeat(n / 8),
  thoughts: (n) => '<think>'.repeat(n / 7),
  digits: (n) => '1'.repeat(n),
  decimals: (n) => '1.'.repeat(n / 2),
  commas: (n) => '1,'.repeat(n / 2),
  fractions: (n) => '\\frac{1}{'.repeat(n / 9),
  boxed: (n) => '\\boxed{'.repeat(n / 7),
  boxes: (n) =>
    `[${Array(Math.ceil(n / box.length))
      .fill(box)
      .join(',')}]`,
  'unfinished boxes': (n) => '[{"bbox_2d": ['.repeat(n / 14),
}
const readers: Readonly<Record<string, (text: string) => unknown>> = {
  parseBoxes: (text) => parseBoxes(text),
  'parseBoxes, strict': (text) => parseBoxes(text, { rules: 'strict' }),
  extractAnswer: (text) => extractAnswer(text),
  'extractAnswer, strict': (text) => extractAnswer(text, { rules: 'strict' }),
  'answerReward, mca': (text) => answerReward({ answer: text, truth: 'A', form: 'mca' }),
  'answerReward, na': (text) => answerReward({ answer: text, truth: '1', form: 'na' }),
  'answerReward, na, strict': (text) =>
    answerReward({ answer: text, truth: '1', form: 'na', rules: 'strict' }),
  'formatReward, perceiver': (text) => formatReward(text, 'perceiver'),
  'formatReward, reasoner': (text) => formatReward(text, 'reasoner'),
  groundingRewards: (text) => groundingRewards({ text, truth: [[0, 0, 1, 1]] }),
}

/** The readers whose time grows fastest, by the ratio of the last two sizes; `largest` characters at most. */
export async function textGrowth(largest: number): Promise<Growth[]> {
  const sizes = [largest / 4, largest / 2, largest]
  const all: Growth[] = []
  const time = async (name: string, f: (n: number) => unknown): Promise<void> => {
    const times: number[] = []
    for (const n of sizes) {
      let least = Number.POSITIVE_INFINITY
      for (let i = 0; i < 3; i++) {
        const started = performance.now()
        await f(n)
        least = Math.min(least, performance.now() - started)
      }
      times.push(least)
    }
    all.push({ name, sizes, times })
  }
  for (const [reader, read] of Object.entries(readers))
    for (const [text, make] of Object.entries(texts)) {
      const made = new Map(sizes.map((n) => [n, make(n)]))
      await time(`${reader} of ${text}`, (n) => read(made.get(n)!))
    }
  const spread = (n: number) =>
    Array.from({ length: n / 40 }, (_, i) => ({
      bbox2d: [9 * i, 0, 9 * i + 8, 8] as const,
      label: 'a',
    }))
  await time('perceptionFault', (n) => perceptionFault(spread(n) as never))
  const slope = ({ times }: Growth): number => times[2]! / Math.max(1, times[1]!)
  return all.sort((a, b) => slope(b) - slope(a) || b.times[2]! - a.times[2]!)
}
