// Confidence intervals of an accuracy.

/** Bounds between 0 and 1. */
export interface Interval {
  low: number
  high: number
  /** 'wilson' for questions that are independent; else 'bootstrap' over questions. */
  method: 'wilson' | 'bootstrap'
}

/** The 0.975 quantile of the normal distribution. */
const z = 1.959963984540054
const resamples = 10_000

/** Wilson's score interval of 95 % for `correct` of n (Wilson 1927): it stays within 0 and 1, also for 0 and n of n. */
export function wilson(correct: number, n: number): Interval {
  const p = correct / n
  const denominator = 1 + z ** 2 / n
  const centre = (p + z ** 2 / (2 * n)) / denominator
  const half = (z / denominator) * Math.sqrt((p * (1 - p)) / n + z ** 2 / (4 * n ** 2))
  // At the ends rounding must not leave the point outside.
  return {
    low: correct === 0 ? 0 : Math.max(0, centre - half),
    high: correct === n ? 1 : Math.min(1, centre + half),
    method: 'wilson',
  }
}

/** The answers to a question: how many there are, and the sum of their rewards. */
export interface Cluster {
  sum: number
  count: number
}

/**
 * The percentile interval of 95 % of the mean over all answers, by resampling whole questions, whose answers depend on each
 * other: those of several runs, or to several orders of options (Efron 1979). The resamples are seeded: the same
 * every time.
 */
export function bootstrap(clusters: readonly Cluster[]): Interval {
  return {
    ...percentiles(clusters, ({ sum, count }) => (count ? sum / count : 0)),
    method: 'bootstrap',
  }
}

/** Two answers' accuracies on the same questions: the interval of their difference, by resampling questions. */
export function pairedBootstrap(
  pairs: readonly (readonly [first: Cluster, second: Cluster])[],
): Pick<Interval, 'low' | 'high'> {
  const flat = pairs.map(([a, b]) => ({ sum: b.sum / b.count - a.sum / a.count, count: 1 }))
  return percentiles(flat, ({ sum, count }) => sum / count)
}

function percentiles(
  clusters: readonly Cluster[],
  f: (total: Cluster) => number,
): { low: number; high: number } {
  const n = clusters.length
  const values = new Float64Array(resamples)
  let x = 0x9e3779b9
  for (let b = 0; b < resamples; b++) {
    const total = { sum: 0, count: 0 }
    for (let i = 0; i < n; i++) {
      // Xorshift (Marsaglia 2003).
      x ^= x << 13
      x ^= x >>> 17
      x ^= x << 5
      const { sum, count } = clusters[Math.floor(((x >>> 0) / 2 ** 32) * n)]!
      total.sum += sum
      total.count += count
    }
    values[b] = f(total)
  }
  values.sort()
  const at = (q: number): number => values[Math.round(q * (resamples - 1))]!
  return { low: at(0.025), high: at(0.975) }
}

/** Mean and sample standard deviation, which is 0 for one value. */
export function meanAndStd(values: readonly number[]): { mean: number; std: number } {
  const mean = values.reduce((sum, v) => sum + v, 0) / values.length
  const squares = values.reduce((sum, v) => sum + (v - mean) ** 2, 0)
  return { mean, std: values.length > 1 ? Math.sqrt(squares / (values.length - 1)) : 0 }
}
