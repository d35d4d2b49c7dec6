// Order statistics: timings have a long tail on one side, so means are not meaningful.

export interface Quantiles {
  samples: number
  /** Milliseconds. */
  min: number
  p25: number
  median: number
  p75: number
}

/** With linear interpolation between neighbours. */
export function quantile(sorted: readonly number[], q: number): number {
  const at = (sorted.length - 1) * q
  const low = Math.floor(at)
  const high = Math.ceil(at)
  return sorted[low]! + (sorted[high]! - sorted[low]!) * (at - low)
}

export function quantiles(samples: readonly number[]): Quantiles {
  if (samples.length === 0) throw new RangeError('no samples')
  const sorted = samples.toSorted((a, b) => a - b)
  return {
    samples: sorted.length,
    min: sorted[0]!,
    p25: quantile(sorted, 0.25),
    median: quantile(sorted, 0.5),
    p75: quantile(sorted, 0.75),
  }
}

/** The smallest relative difference between two runs that is reported. */
const leastChange = 0.05

export type Verdict = 'slower' | 'faster' | 'same'

/**
 * Whether a run differs from an earlier one beyond the noise: the medians by more than 5 % and by more
 * than both spreads together, and the interquartile ranges do not overlap.
 */
export function verdict(before: Quantiles, after: Quantiles): Verdict {
  const change = Math.abs(after.median / before.median - 1)
  const spread = (q: Quantiles) => (q.p75 - q.p25) / q.median
  if (change <= Math.max(leastChange, Math.hypot(spread(before), spread(after)))) return 'same'
  if (after.p25 > before.p75) return 'slower'
  if (after.p75 < before.p25) return 'faster'
  return 'same'
}
