// Numbers in prose and TeX: '1,234.5', '-3 1/2', '\frac{1}{2}', '50 %', '$5 million'.

export interface Quantity {
  value: number
  percent: boolean
  /** The text after the number, in lower case without a plural's s; '' if there is none. */
  unit: string
}

const digits = String.raw`(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+`
const decimal = String.raw`(?:${digits})(?:e[-+]?\d+)?`
const quantity = new RegExp(
  String.raw`^(?<sign>[-+]?)(?<currency>[$€£¥]?)(?:(?<whole>\d+) +(?<numerator>\d+)/(?<denominator>\d+)|(?<a>${decimal})(?: *[/:÷] *(?<b>${decimal}))?)(?<rest>.*)$`,
  's',
)
/** A number in a text that is not part of a word, a date or another number. */
const isolated = new RegExp(
  String.raw`(?<![\p{L}\d.,/:-])[-+]?[$€£¥]?(?:\d+ +\d+/\d+|(?:${decimal})(?: *[/:÷] *(?:${decimal}))?)(?![\d/:]|[-.,]\d|\p{L}*\d)`,
  'giu',
)
const scales: Record<string, number> = {
  hundred: 1e2,
  thousand: 1e3,
  million: 1e6,
  billion: 1e9,
  trillion: 1e12,
}
const unit = /^[\p{L}°²³µ'".\s/^()*·-]*(?:\^?[23])?$/u

/** A text that is one number with its unit, if any; undefined for anything else. Never throws. */
export function readQuantity(text: string): Quantity | undefined {
  // Bounds the time of the patterns; no answer is a longer number.
  if (text.length > 200) return undefined
  const plain = halfWidth(text)
    .replace(/\\(?:boxed|fbox|mathbf|mathrm|text|textbf)(?=\s*\{)/g, '')
    .replace(/\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}/g, ' $1/$2')
    .replace(/\\[dt]?frac\s*(\d)\s*(\d)/g, ' $1/$2')
    .replace(/\s*(?:\\times|\\cdot|×)\s*10\s*\^\s*\{?\s*([-+−]?\d+)\s*\}?/g, 'e$1')
    .replace(/~/g, ' ')
    .replace(/\\[,!;: ]|\\left|\\right/g, '')
    .replace(/\^\s*\{?\\circ\}?/g, '°')
    .replace(/\\([%$])/g, '$1')
    .replace(/^\s*\$(.*)\$\s*$/s, '$1')
    .replace(/[−–]/g, '-')
    .replace(/[{}*_`]/g, '')
    .trim()
    .replace(/^\p{L}\s*=\s*/u, '')
    .replace(/^\((.*)\)$/s, '$1')
    .replace(/^([-+]) +/, '$1')
    .replace(/\.$/, '')
    .toLowerCase()
  const parts = quantity.exec(plain)?.groups
  if (!parts) return undefined
  const { sign, whole, numerator, denominator, a, b } = parts
  let value =
    a === undefined ? Number(whole) + Number(numerator) / Number(denominator) : numberOf(a)
  if (b !== undefined) value /= numberOf(b)
  if (sign === '-') value = -value

  let rest = parts.rest!.trim()
  const percent = /^(%|percent\b|per cent\b)/.exec(rest)
  if (percent) rest = rest.slice(percent[0].length).trim()
  const scale = /^(hundred|thousand|million|billion|trillion)s?\b/.exec(rest)
  if (scale) {
    value *= scales[scale[1]!]!
    rest = rest.slice(scale[0].length).trim()
  }
  if (!Number.isFinite(value) || !unit.test(rest)) return undefined
  return { value, percent: percent !== null, unit: rest.replace(/(?<=\p{L}{2})s\b|\.$/gu, '') }
}

/** A text with the full-width forms of ASCII, which Chinese and Japanese texts use, as ASCII. */
export function halfWidth(text: string): string {
  return text.replace(/[\uff01-\uff5e]/g, (c) => String.fromCharCode(c.charCodeAt(0) - 0xfee0))
}

/** The only number in a text, with what follows it on its line; undefined where there are several. */
export function findQuantity(text: string): Quantity | undefined {
  if (text.length > 10_000) return undefined
  const found = [...text.matchAll(isolated)]
  if (found.length !== 1) return undefined
  const [number] = found[0]!
  const after = text.slice(found[0]!.index + number.length)
  const [percent = ''] = /^\s*(?:%|percent\b|per cent\b)/i.exec(after) ?? []
  const quantity = readQuantity(number + percent)
  return quantity && { ...quantity, unit: '' }
}

/** Equal up to rounding errors of float64. */
export function sameNumber(a: number, b: number): boolean {
  return Math.abs(a - b) <= 1e-9 * Math.max(Math.abs(a), Math.abs(b))
}

function numberOf(text: string): number {
  return Number(text.replaceAll(',', ''))
}
