// Checks of arguments, one for each kind of value. A value that fails is ERR_VALUE under the name of
// the operation; one that passes is returned with its type.
import { refuse } from './errors.js'

/** Entries of a list of tensors, boxes or other objects. */
const longestList = 2 ** 24
/** Characters of a text that error messages repeat. */
const longest = 200

/** A value as error messages show it; of a long text its beginning. */
export function describeValue(value: unknown): string {
  if (value === null || value === undefined) return String(value)
  if (typeof value === 'string') {
    if (value.length <= longest) return `'${value}'`
    return `'${value.slice(0, longest / 2)}...' (${value.length} characters)`
  }
  if (typeof value === 'function') return 'a function'
  if (Array.isArray(value)) return 'an array'
  if (typeof value !== 'object') return String(value)
  const name: unknown = value.constructor?.name
  return typeof name === 'string' && name !== '' && name !== 'Object' ? `a ${name}` : 'an object'
}

type KeysOf<T> = T extends unknown ? keyof T : never
/** The fields of T as a table that the compiler keeps complete; of a union, those of all its members. */
export type Names<T> = Readonly<Record<KeysOf<T> & string, true>>

/**
 * An object of arguments with no other fields than `names`, because a misspelt option that is ignored
 * gives a wrong result silently. A field that is undefined counts as left out, but its name must be known.
 * `path` is the name of a nested object.
 *
 * @returns a copy, whose fields are read once: a getter or a proxy cannot change what was checked before it is used.
 */
export function checkArguments<T>(
  a: T,
  names: Readonly<Record<string, true>>,
  op: string,
  path?: string,
): T & object {
  if (typeof a !== 'object' || a === null || Array.isArray(a)) refuseArguments(a, op, path)
  const prototype: unknown = Object.getPrototypeOf(a)
  const plain = prototype === Object.prototype || prototype === null
  // for...in reads the engine's cached list of keys; methods of classes are not enumerable.
  for (const key in a)
    if (names[key] !== true && Object.hasOwn(a, key)) {
      if (!plain) refuseArguments(a, op, path)
      refuse('ERR_VALUE', op, `unknown option ${unknownName(key, Object.keys(names), path)}`)
    }
  if (plain) return { ...a }
  // Of a class or of another realm: its fields may be accessors of its prototype.
  const copy: Record<string, unknown> = {}
  for (const name in names) {
    const value: unknown = a[name as never]
    if (value !== undefined) copy[name] = value
  }
  return copy as T & object
}

function refuseArguments(a: unknown, op: string, path: string | undefined): never {
  if (path !== undefined) unexpected(a, path, 'an object', op)
  refuse('ERR_VALUE', op, `expects one object of arguments, got ${describeValue(a)}`)
}

function unknownName(key: string, names: readonly string[], path: string | undefined): string {
  const full = (name: string): string => (path === undefined ? `'${name}'` : `'${path}.${name}'`)
  const near = nearestName(key, names)
  if (near !== undefined) return `${full(key)}; did you mean ${full(near)}?`
  return `${full(key)}; the known ones are ${names.map(full).join(', ')}`
}

/**
 * The name with the smallest edit distance, at most a third of the longer one's length; undefined if there is
 * none. Case and underscores are ignored: max_tokens is maxTokens.
 */
function nearestName(key: string, names: readonly string[]): string | undefined {
  const plain = (name: string): string => name.toLowerCase().replace(/[_-]/g, '')
  const wanted = plain(key)
  let nearest: string | undefined
  let least = Number.POSITIVE_INFINITY
  for (const name of names) {
    const known = plain(name)
    const longer = Math.max(wanted.length, known.length)
    // The difference in length bounds the distance, so that a very long key costs nothing.
    if (3 * Math.abs(wanted.length - known.length) > longer) continue
    const distance = editDistance(wanted, known)
    if (3 * distance > longer || distance >= least) continue
    nearest = name
    least = distance
  }
  return nearest
}

/** Insertions, deletions and substitutions of a letter that make b of a (Levenshtein). */
function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j)
  for (let i = 1; i <= a.length; i++) {
    const next = [i]
    for (let j = 1; j <= b.length; j++)
      next.push(Math.min(row[j]! + 1, next[j - 1]! + 1, row[j - 1]! + +(a[i - 1] !== b[j - 1])))
    row = next
  }
  return row[b.length]!
}

/** Refuses a value that is not what its name must be. */
function unexpected(value: unknown, name: string, expected: string, op: string): never {
  refuse('ERR_VALUE', op, `${name} must be ${expected}, got ${describeValue(value)}`)
}

/** One of a closed list of names. */
export function choice<T extends string>(
  value: T,
  names: readonly T[],
  name: string,
  op: string,
): T {
  if (!names.includes(value))
    refuse(
      'ERR_VALUE',
      op,
      `${name} must be ${names.map((n) => `'${n}'`).join(' or ')}, got ${describeValue(value)}`,
    )
  return value
}

export function checkString(value: unknown, name: string, op: string): string {
  if (typeof value !== 'string') unexpected(value, name, 'a string', op)
  return value
}

/** A string that is not empty. */
export function checkText(value: unknown, name: string, op: string): string {
  if (typeof value !== 'string' || value === '')
    unexpected(value, name, 'a string that is not empty', op)
  return value
}

export function checkBoolean(value: unknown, name: string, op: string): boolean {
  if (typeof value !== 'boolean') unexpected(value, name, 'true or false', op)
  return value
}

/** Anything of type object, arrays included, but null. */
export function checkObject<T>(value: T, name: string, op: string, what = 'an object'): T & object {
  if (typeof value !== 'object' || value === null) unexpected(value, name, what, op)
  return value
}

/** A copy of an array, each entry read once and none of the array's own methods called: they can be the caller's. */
export function checkArray<T>(
  value: readonly T[],
  name: string,
  op: string,
  what = 'an array',
): readonly T[] {
  if (!Array.isArray(value)) unexpected(value, name, what, op)
  const copy: T[] = []
  const { length } = value as readonly T[]
  // A length costs nothing to write down; a copy of as many entries would.
  if (length > longestList)
    refuse('ERR_VALUE', op, `${name} must have at most ${longestList} entries, got ${length}`)
  for (let i = 0; i < length; i++) copy.push((value as readonly T[])[i] as T)
  return copy
}

export function checkFunction<T>(
  value: T,
  name: string,
  op: string,
): T & ((...a: never) => unknown) {
  if (typeof value !== 'function') unexpected(value, name, 'a function', op)
  return value as T & ((...a: never) => unknown)
}

/** Refuses a method that is called on something else than an instance of its class. */
export function checkReceiver(own: boolean, type: string, op: string): void {
  if (!own) refuse('ERR_VALUE', op, `must be called as a method of a ${type}`)
}

/** Whether a value can have private fields: what the operator `in` needs. */
export function isObject(value: unknown): value is object {
  return typeof value === 'object' && value !== null
}

/** A safe integer of at least 1. */
export function checkPositive(value: unknown, name: string, op: string): number {
  if (!isIntegerFrom(1, value)) unexpected(value, name, 'a positive integer', op)
  return value
}

/** How many outputs are sampled of one prompt: each is an object of its own, so that a slip of the pen would end the process. */
export function checkSamples(value: unknown, name: string, op: string): number {
  return checkIntegerWithin(value, 1, 2 ** 16, name, op)
}

/** A safe integer of at least `least`. */
export function checkInteger(value: unknown, least: number, name: string, op: string): number {
  if (!isIntegerFrom(least, value)) unexpected(value, name, `an integer of at least ${least}`, op)
  return value
}

/** An integer from `least` to the largest of 32 bits. */
export function checkInt32(value: unknown, least: number, name: string, op: string): number {
  return checkIntegerWithin(value, least, 2 ** 31 - 1, name, op)
}

export function checkIntegerWithin(
  value: unknown,
  least: number,
  most: number,
  name: string,
  op: string,
): number {
  if (!isIntegerFrom(least, value) || value > most)
    unexpected(value, name, `an integer from ${least} to ${most}`, op)
  return value
}

function isIntegerFrom(least: number, value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= least
}

export function checkNumber(value: unknown, name: string, op: string): number {
  if (typeof value !== 'number') unexpected(value, name, 'a number', op)
  return value
}

/** A finite number of at least 0. */
export function checkNonNegative(value: unknown, name: string, op: string): number {
  if (typeof value !== 'number' || !(value >= 0) || value === Number.POSITIVE_INFINITY)
    unexpected(value, name, 'a number of at least 0', op)
  return value
}

/** A copy of a list of `length` numbers, finite or not. */
export function checkNumbers(list: unknown, length: number, name: string, op: string): number[] {
  const items = list as ArrayLike<unknown> | null | undefined
  if (typeof items !== 'object' || items === null || items.length !== length)
    unexpected(list, name, `${length} numbers`, op)
  const copy: number[] = []
  for (let k = 0; k < length; k++) copy.push(checkNumber(items[k], `${name}[${k}]`, op))
  return copy
}

/** A copy of a list of `length` finite numbers. */
export function checkFiniteNumbers(
  list: unknown,
  length: number,
  name: string,
  op: string,
): number[] {
  const copy = checkNumbers(list, length, name, op)
  for (let k = 0; k < length; k++)
    if (!Number.isFinite(copy[k])) unexpected(copy[k], `${name}[${k}]`, 'finite', op)
  return copy
}

/** Memory of the host's that the engine may not have: then ERR_MEMORY, not its RangeError. */
export function hostMemory<T>(allocate: () => T, op: string): T {
  try {
    return allocate()
  } catch (cause) {
    if (!(cause instanceof RangeError)) throw cause
    refuse('ERR_MEMORY', op, `the host is out of memory: ${cause.message}`, { cause })
  }
}

/** Host integers as the addon takes them; the addon checks each value. */
export function hostInts(value: unknown, name: string, op: string): Float64Array {
  return hostNumbers(value, name, op, 'a list of integers')
}

/** A list of numbers of any length as the addon takes it; the addon checks each value. */
export function hostNumbers(
  value: unknown,
  name: string,
  op: string,
  what = 'a list of numbers',
): Float64Array {
  const list = value as ArrayLike<number> | null | undefined
  if (typeof list !== 'object' || list === null || typeof list.length !== 'number')
    unexpected(value, name, what, op)
  const length = checkInteger(list.length, 0, `${name}.length`, op)
  // A plain loop: Float64Array.from with a function takes some 70 ns an element.
  const out = hostMemory(() => new Float64Array(length), op)
  for (let i = 0; i < out.length; i++) {
    const value: unknown = list[i]
    out[i] = typeof value === 'number' ? value : checkNumber(value, `${name}[${i}]`, op)
  }
  return out
}

/** Whether a parsed JSON value is an object. */
export function isJsonObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}
