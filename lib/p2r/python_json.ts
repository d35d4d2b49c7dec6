// JSON as Python's json.loads reads it: the values NaN, Infinity and -Infinity besides those of the
// standard, the last of equal keys, and the limit on nesting that Python's recursion sets.

export type Json = null | boolean | number | string | Json[] | Map<string, Json>

/** The text is not JSON, as Python sees it. */
export class NotJson extends Error {}
/** Nested deeper than Python reads. */
export class TooDeep extends Error {}

const maxDepth = 990
const blank = /[ \t\n\r]*/y
const number = /-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?/y
// biome-ignore lint/suspicious/noControlCharactersInRegex: JSON forbids them in strings
const plain = /[^"\\\u0000-\u001f]*/y
const hex = /[0-9a-fA-F]{4}/y
const escapes: Record<string, string> = {
  '"': '"',
  '\\': '\\',
  '/': '/',
  b: '\b',
  f: '\f',
  n: '\n',
  r: '\r',
  t: '\t',
}
const words: readonly [string, Json][] = [
  ['null', null],
  ['true', true],
  ['false', false],
  ['NaN', Number.NaN],
  ['Infinity', Number.POSITIVE_INFINITY],
  ['-Infinity', Number.NEGATIVE_INFINITY],
]

/** One JSON value, surrounded by white space at most; throws NotJson or TooDeep otherwise. */
export function parseJson(text: string): Json {
  let at = 0

  function take(pattern: RegExp): string | undefined {
    pattern.lastIndex = at
    const found = pattern.exec(text)
    if (!found) return undefined
    at = pattern.lastIndex
    return found[0]
  }
  function next(character: string): boolean {
    take(blank)
    if (text[at] !== character) return false
    at++
    return true
  }
  function expect(character: string): void {
    if (!next(character)) throw new NotJson()
  }

  function value(depth: number): Json {
    if (depth > maxDepth) throw new TooDeep()
    take(blank)
    const first = text[at]
    if (first === '"') return string()
    if (first === '{') return object(depth)
    if (first === '[') return array(depth)
    for (const [word, meaning] of words)
      if (text.startsWith(word, at)) {
        at += word.length
        return meaning
      }
    const digits = take(number)
    if (!digits) throw new NotJson()
    return Number(digits) || (/[.eE]/.test(digits) ? Number(digits) : 0) // the integer -0 is 0
  }

  function string(): string {
    at++
    let out = ''
    for (;;) {
      out += take(plain)
      const character = text[at++]
      if (character === '"') return out
      if (character !== '\\') throw new NotJson()
      const kind = text[at++]
      if (kind === 'u') {
        const code = take(hex)
        if (code === undefined) throw new NotJson()
        out += String.fromCharCode(Number.parseInt(code, 16))
      } else {
        if (kind === undefined || !Object.hasOwn(escapes, kind)) throw new NotJson()
        out += escapes[kind]
      }
    }
  }

  function object(depth: number): Map<string, Json> {
    at++
    const out = new Map<string, Json>()
    if (next('}')) return out
    do {
      take(blank)
      if (text[at] !== '"') throw new NotJson()
      const key = string()
      expect(':')
      out.set(key, value(depth + 1))
    } while (next(','))
    expect('}')
    return out
  }

  function array(depth: number): Json[] {
    at++
    const out: Json[] = []
    if (next(']')) return out
    do out.push(value(depth + 1))
    while (next(','))
    expect(']')
    return out
  }

  const out = value(0)
  take(blank)
  if (at !== text.length) throw new NotJson()
  return out
}
