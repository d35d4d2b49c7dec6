// Plots on two logarithmic axes, as SVG that takes its colours from the page's style.

export interface Point {
  x: number
  y: number
  /** What is shown beside the pointer. */
  tip: string
}

export interface Mark {
  /** Classes of its elements, which give it colour. */
  style: string
  /** The operation by which the page's filter shows and hides it. */
  op?: string
  points: readonly Point[]
  /** A line through the points, circles or crosses at them; several are drawn over each other. */
  as: readonly ('line' | 'circle' | 'cross')[]
}

export interface Axes {
  width: number
  height: number
  /** What the axes count. */
  x: string
  y: string
  /** What the whole shows, for those who cannot see it. */
  description: string
}

export function escaped(text: string): string {
  return text
    .replaceAll('&', '&amp;')
    .replaceAll('<', '&lt;')
    .replaceAll('>', '&gt;')
    .replaceAll('"', '&quot;')
}

const prefixes = ['', 'k', 'M', 'G', 'T', 'P'] as const

/** 0.05, 20, 3k, 40M. */
export function short(value: number): string {
  const power = Math.min(Math.max(Math.floor(Math.log10(value) / 3 + 1e-9), 0), prefixes.length - 1)
  return `${Number((value / 1000 ** power).toPrecision(3))}${prefixes[power]}`
}

/** At most `most` round numbers from `low` to `high`: powers of ten, with 2 and 5 of each if they fit. */
export function ticks(low: number, high: number, most: number): number[] {
  const decades = (digits: readonly number[], step: number): number[] => {
    const out: number[] = []
    const first = Math.floor(Math.log10(low))
    for (let power = first; 10 ** power <= high; power += step)
      for (const digit of digits) out.push(digit * 10 ** power)
    return out.filter((value) => value >= low && value <= high)
  }
  const choices = [decades([1, 2, 5], 1), decades([1, 3], 1), decades([1], 1)]
  for (let step = 2; step < 8; step++) choices.push(decades([1], step))
  return choices.find((list) => list.length <= most) ?? []
}

const margin = { left: 52, right: 14, top: 10, bottom: 44 }

/** The marks, in this order, each within the axes' domains, which fit all points. */
export function logPlot(
  { width, height, x, y, description }: Axes,
  marks: readonly Mark[],
): string {
  const all = marks.flatMap(({ points }) => points)
  const domain = (values: readonly number[]): [number, number] => {
    const [low, high] = [Math.min(...values), Math.max(...values)]
    return [low / 1.25, high * 1.25]
  }
  const [xs, ys] = [domain(all.map((p) => p.x)), domain(all.map((p) => p.y))]
  const inner = { w: width - margin.left - margin.right, h: height - margin.top - margin.bottom }
  const along = ([low, high]: readonly [number, number], value: number): number =>
    Math.log(value / low) / Math.log(high / low)
  const fixed = (value: number): string => value.toFixed(1)
  const px = (value: number): string => fixed(margin.left + inner.w * along(xs, value))
  const py = (value: number): string => fixed(margin.top + inner.h * (1 - along(ys, value)))
  const [bottom, right] = [margin.top + inner.h, margin.left + inner.w]
  const parts: string[] = []
  for (const value of ticks(...xs, Math.floor(inner.w / 55)))
    parts.push(
      `<line class="grid" x1="${px(value)}" x2="${px(value)}" y1="${margin.top}" y2="${bottom}"/>`,
      `<text x="${px(value)}" y="${bottom + 16}" text-anchor="middle">${short(value)}</text>`,
    )
  for (const value of ticks(...ys, Math.floor(inner.h / 32)))
    parts.push(
      `<line class="grid" y1="${py(value)}" y2="${py(value)}" x1="${margin.left}" x2="${right}"/>`,
      `<text x="${margin.left - 6}" y="${py(value)}" dy="0.32em" text-anchor="end">${short(value)}</text>`,
    )
  parts.push(
    `<rect class="frame" x="${margin.left}" y="${margin.top}" width="${inner.w}" height="${inner.h}"/>`,
    `<text class="axis" x="${margin.left + inner.w / 2}" y="${height - 8}" text-anchor="middle">${escaped(x)}</text>`,
    `<text class="axis" transform="translate(12 ${margin.top + inner.h / 2}) rotate(-90)" text-anchor="middle">${escaped(y)}</text>`,
  )
  for (const { style, op, points, as } of marks) {
    const group = `<g class="${style}"${op === undefined ? '' : ` data-op="${escaped(op)}"`}>`
    const drawn = as.map((kind) => {
      if (kind === 'line')
        return `<polyline points="${points.map((p) => `${px(p.x)},${py(p.y)}`).join(' ')}"/>`
      return points
        .map((p) => {
          const tip = `tabindex="0" data-tip="${escaped(p.tip)}"><title>${escaped(p.tip)}</title>`
          if (kind === 'circle')
            return `<circle cx="${px(p.x)}" cy="${py(p.y)}" r="5" ${tip}</circle>`
          const at = `translate(${px(p.x)} ${py(p.y)})`
          return `<path d="M-4-4L4 4M-4 4L4-4" transform="${at}" ${tip}</path>`
        })
        .join('')
    })
    parts.push(`${group}${drawn.join('')}</g>`)
  }
  const size = `width="${width}" height="${height}" viewBox="0 0 ${width} ${height}"`
  return `<svg ${size} role="group" aria-label="${escaped(description)}">\n${parts.join('\n')}\n</svg>`
}
