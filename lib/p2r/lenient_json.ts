// Objects in what a model wrote: JSON, and what models write for it. Single and typographic quotes,
// quotes within a text that nobody escaped, keys without quotes, trailing commas, comments, tuples, and
// the literals of Python and JavaScript.
import type { Json } from './python_json.js'

/** Made once, because a stack for each brace in a text would cost more than reading it. */
const noLiteral = new Error('no literal')

/** Levels within an object. Bounds the time: a brace is read once for each level that it may be at. */
const maxDepth = 8
/** Characters of a text, and of a comment, within an object. */
const longest = 2000
const longestComment = 300
const blank = /\s*/y
const comment = new RegExp(
  `(?://|#)[^\\n]{0,${longestComment}}(?:\\n|$)|/\\*[\\s\\S]{0,${longestComment}}?\\*/`,
  'y',
)
const number = /[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?/y
const word = /[-+]?[\p{L}_$][\p{L}\p{N}_$]*/uy
const quotes: Record<string, string> = { '"': '"', "'": "'", '“': '”', '‘': '’' }
const brackets: Record<string, string> = { '[': ']', '(': ')' }
const words: Record<string, Json> = {
  null: null,
  None: null,
  undefined: null,
  true: true,
  True: true,
  false: false,
  False: false,
}
const escapes: Record<string, string> = { b: '\b', f: '\f', n: '\n', r: '\r', t: '\t' }

/** The objects in a text from left to right, without those within others. The time is linear in its length. */
export function* objectsOf(text: string): Generator<Map<string, Json>> {
  const read = reader(text)
  for (let open = text.indexOf('{'); open >= 0; ) {
    let next = open + 1
    try {
      const { value, end } = read(open)
      yield value
      next = end
    } catch (error) {
      if (error !== noLiteral) throw error
    }
    open = text.indexOf('{', next)
  }
}

function reader(text: string): (open: number) => { value: Map<string, Json>; end: number } {
  const closing = closingQuotes(text)
  let at = 0

  function take(pattern: RegExp): string | undefined {
    pattern.lastIndex = at
    const found = pattern.exec(text)?.[0]
    at += found?.length ?? 0
    return found
  }
  function skip(): void {
    do take(blank)
    while (take(comment) !== undefined)
  }
  function next(character: string): boolean {
    skip()
    if (text[at] !== character) return false
    at++
    return true
  }

  function value(depth: number): Json {
    if (depth > maxDepth) throw noLiteral
    skip()
    const first = text[at] ?? ''
    if (first === '{') return object(depth)
    if (first in quotes) return string()
    if (first in brackets) return list(depth)
    const digits = take(number)
    if (digits !== undefined) return Number(digits)
    const name = take(word)
    if (name === undefined) throw noLiteral
    if (Object.hasOwn(words, name)) return words[name]!
    if (/^[-+]?(?:nan|inf|infinity)$/i.test(name)) return Number.NaN // no box has one
    throw noLiteral
  }

  function string(): string {
    const start = at + 1
    const end = closing(quotes[text[at]!]!, start)
    if (end < 0 || end - start > longest) throw noLiteral
    at = end + 1
    return text
      .slice(start, end)
      .replace(/\\(?:u([0-9a-fA-F]{4})|([\s\S]))/g, (_, code: string | undefined, kind: string) =>
        code === undefined
          ? (escapes[kind] ?? kind)
          : String.fromCharCode(Number.parseInt(code, 16)),
      )
  }

  function object(depth: number): Map<string, Json> {
    at++
    const out = new Map<string, Json>()
    while (!next('}')) {
      const key = text[at]! in quotes ? string() : take(word)
      if (key === undefined || !next(':')) throw noLiteral
      out.set(key, value(depth + 1))
      if (!next(',') && !next('}')) throw noLiteral
      if (text[at - 1] === '}') break
    }
    return out
  }

  function list(depth: number): Json[] {
    const close = brackets[text[at++]!]!
    const out: Json[] = []
    while (!next(close)) {
      out.push(value(depth + 1))
      if (!next(',') && !next(close)) throw noLiteral
      if (text[at - 1] === close) break
    }
    return out
  }

  return (open) => {
    at = open
    return { value: object(0), end: at }
  }
}

/**
 * Finds where a text in quotes ends: at the first quote that is not escaped and that something follows which may
 * follow a text. So the quotes of "the "STOP" sign" are its own.
 */
function closingQuotes(text: string): (quote: string, from: number) => number {
  const known = new Map<string, number[]>()
  const candidates = (quote: string): number[] => {
    const found: number[] = []
    for (let i = text.indexOf(quote); i >= 0; i = text.indexOf(quote, i + 1)) {
      let slashes = 0
      while (text[i - 1 - slashes] === '\\') slashes++
      blank.lastIndex = i + 1
      blank.exec(text)
      const follows = text[blank.lastIndex]
      if (slashes % 2 === 0 && (follows === undefined || ',:}])'.includes(follows))) found.push(i)
    }
    return found
  }
  return (quote, from) => {
    const found = known.get(quote) ?? candidates(quote)
    known.set(quote, found)
    let [low, high] = [0, found.length]
    while (low < high) {
      const middle = (low + high) >> 1
      if (found[middle]! < from) low = middle + 1
      else high = middle
    }
    return found[low] ?? -1
  }
}
