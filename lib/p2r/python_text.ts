// Text as Python's str methods see it, where Perceive-to-Reason's rules depend on them.

/** Python's str.isspace and \s, as the inside of a class of characters. */
export const blanks =
  '\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000'
const blank = new RegExp(`[${blanks}]`)
const run = new RegExp(`[^${blanks}]+`, 'g')

/** str.strip(). By characters: a pattern anchored at the end takes quadratic time on long blanks. */
export function strip(text: string): string {
  let [start, end] = [0, text.length]
  while (start < end && blank.test(text[start]!)) start++
  while (end > start && blank.test(text[end - 1]!)) end--
  return text.slice(start, end)
}

/** str.split(). */
export function words(text: string): string[] {
  return text.match(run) ?? []
}
