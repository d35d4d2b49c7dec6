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
/** A number in a text that is not part of a word, a date, an expression or another number. */
const isolated = new RegExp(
  String.raw`(?<![\p{L}\d.,/:^+-])[-+]?[$€£¥]?(?:\d+ +\d+/\d+|(?:${decimal})(?: *[/:÷] *(?:${decimal}))?)(?![\d/:^]|[-.,+]\d|\p{L}*\d)`,
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
  const plain = bare(numeralsOf(text))
    .replace(/^([$€£¥]?)\s*([-+]?) */, '$2$1')
    .toLowerCase()
  const parts = quantity.exec(plain)?.groups
  if (!parts) return undefined
  const { sign, whole, numerator, denominator, a, b } = parts
  let value =
    a === undefined ? Number(whole) + Number(numerator) / Number(denominator) : numberOf(a)
  if (b !== undefined) value /= numberOf(b)
  if (sign === '-') value = -value

  let rest = parts.rest!.trim()
  if (/^(?:\\?pi(?!\p{L})|π)/u.test(rest))
    return /^(?:\\?pi|π)$/.test(rest)
      ? { value: value * Math.PI, percent: false, unit: '' }
      : undefined
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

/** A number without what surrounds it: signs of mathematics, brackets, the name of a variable, punctuation. */
function bare(text: string): string {
  let rest = text
  for (let before = ''; rest !== before; ) {
    before = rest
    rest = rest
      .trim()
      .replace(/^\$(.*)\$$/s, '$1')
      .replace(/\$$/, '')
      .replace(/^\$(?=[$=(]|\p{L}\s*=)/u, '')
      .replace(/^(?:\p{L}\s*)?=/u, '')
      .replace(/^\((.*)\)$/s, '$1')
      .replace(/^\[(.*)\]$/s, '$1')
      .replace(/(?:[.,;?]|(?<!\d)!)$/, '')
  }
  return rest
}

/** Full-width forms, which Chinese and Japanese texts use, and the digits of any script as ASCII. */
export function asciiText(text: string): string {
  return text
    .replace(/[\uff01-\uff5e]/g, (c) => String.fromCharCode(c.charCodeAt(0) - 0xfee0))
    .replace(/[\u0660-\uabf9]/g, (c) => (/\p{Nd}/u.test(c) ? String(digitOf(c)) : c))
}

/** Scripts have their ten digits in a row, which begins at a multiple of 16, or 6 after one. */
function digitOf(character: string): number {
  const code = character.charCodeAt(0)
  const low = code % 16
  return /\p{Nd}/u.test(String.fromCharCode(code - low)) ? low : low - 6
}

const boxes = 'boxed|fbox|framebox|mbox|hbox'
const fonts = 'bm|boldsymbol|ensuremath|emph|underline|overline|operatorname'
const families = '(?:math|text)(?:bf|rm|it|sf|tt|normal|up|sc)?'
const font = new RegExp(String.raw`\\(?:${boxes}|${fonts}|${families})(?=\s*\{)`, 'g')
/** Fonts and spaces that stand by themselves, and the end of a line. */
const switches =
  /\\\\|\\(?:rm|bf|it|sf|tt|em|small|large|Large|LARGE|huge|Huge|displaystyle|textstyle|q?quad)(?![A-Za-z])/g
const part = String.raw`\s*(?:\{([^{}]*)\}|(\d))`
const fraction = new RegExp(String.raw`\\[dt]?frac${part}${part}`, 'g')

const relations =
  /\\(?:approx|sim|simeq|equiv|therefore|implies|Rightarrow|Longrightarrow|rightarrow|to)(?![A-Za-z])/g

/** A text without TeX's delimiters and fonts. */
export function withoutTex(text: string): string {
  return text
    .replace(/\\(?:color|textcolor|[hv]space\*?)\s*\{[^{}]*\}/g, ' ')
    .replace(font, '')
    .replace(switches, ' ')
    .replace(/\\[()[\]]/g, ' ')
}

/** What the last box of a text holds, \boxed{...}; undefined without one. */
export function boxedText(text: string): string | undefined {
  const start = Math.max(text.lastIndexOf('\\boxed{'), text.lastIndexOf('\\fbox{'))
  const from = start < 0 ? 0 : text.indexOf('{', start) + 1
  let depth = 1
  for (let i = from; from > 0 && i < text.length; i++) {
    if (text[i] === '{') depth++
    if (text[i] === '}' && --depth === 0) return text.slice(from, i)
  }
  return undefined
}

/** A text whose numbers are written as those of programs are. */
export function numeralsOf(text: string): string {
  return withoutTex(asciiText(text))
    .replace(fraction, (_, a, b, c, d) => ` ${a ?? b}/${c ?? d}`)
    .replace(/(?<!\s)\s*(?:\\times|\\cdot|×)\s*10\s*\^\s*\{?\s*([-+−]?\d+)\s*\}?/g, 'e$1')
    .replace(/~/g, ' ')
    .replace(/\\[,!;: ]|\\left|\\right/g, '')
    .replace(/\^\s*\{?\\circ\}?/g, '°')
    .replace(/\\([%$])/g, '$1')
    .replace(/[−–]/g, '-')
    .replace(/[{}*_`]/g, '')
}

/** The only number in a text, with what follows it on its line; undefined where there are several. */
export function findQuantity(text: string): Quantity | undefined {
  if (text.length > 10_000) return undefined
  const plain = numeralsOf(text).replace(relations, ' ')
  // Roots, functions and constants: the text is an expression.
  if (/\\\p{L}/u.test(plain)) return undefined
  const found = [...plain.matchAll(isolated)]
  if (found.length !== 1) return undefined
  const [number] = found[0]!
  const after = plain.slice(found[0]!.index + number.length)
  const [scale = ''] =
    /^\s*(?:%|percent\b|per cent\b|(?:hundred|thousand|million|billion|trillion)s?\b)/i.exec(
      after,
    ) ?? []
  const quantity = readQuantity(number + scale)
  return quantity && { ...quantity, unit: '' }
}

/** Equal up to rounding errors of float64. */
export function sameNumber(a: number, b: number): boolean {
  return Math.abs(a - b) <= 1e-9 * Math.max(Math.abs(a), Math.abs(b))
}

function numberOf(text: string): number {
  return Number(text.replaceAll(',', ''))
}
