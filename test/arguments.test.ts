import { expect, test } from 'vitest'
import { checkArguments, choice, describeValue, type Names } from '../dist/lib/arguments.js'

interface Loss {
  clipLow?: number
  clipHigh?: number
  maxTokens?: number
  cuSeqlens: number[]
}
const names: Names<Loss> = { clipLow: true, clipHigh: true, maxTokens: true, cuSeqlens: true }
const message = (a: unknown, path?: string): string => {
  try {
    checkArguments(a, names, 'loss', path)
  } catch (error) {
    expect(error).toMatchObject({ name: 'P2RError', code: 'ERR_VALUE', op: 'loss' })
    return (error as Error).message
  }
  return 'accepted'
}

test('an object with known names is copied', () => {
  const a = { cuSeqlens: [0, 1], clipLow: undefined }
  const copy = checkArguments(a, names, 'loss')
  expect(copy).toEqual(a)
  expect(copy).not.toBe(a)
  expect(copy.cuSeqlens).toBe(a.cuSeqlens)
  // Read once: what was checked is what is used.
  let reads = 0
  const changing = {
    get clipLow() {
      return reads++
    },
  }
  const read = checkArguments(changing, names, 'loss')
  expect([read.clipLow, read.clipLow, reads]).toEqual([0, 0, 1])
  // Of a class, accessors too.
  class Given {
    get clipLow() {
      return 0.3
    }
  }
  expect(checkArguments(new Given(), names, 'loss').clipLow).toBe(0.3)
  expect(message({})).toBe('accepted')
  expect(message(Object.create(null))).toBe('accepted')
  // Only own fields count.
  expect(message(Object.create({ clipHi: 1 }))).toBe('accepted')
})

test('an unknown name is refused, with the nearest known one', () => {
  for (const [key, near] of [
    ['clipHi', 'clipHigh'],
    ['cliplow', 'clipLow'],
    ['max_tokens', 'maxTokens'],
    ['cuSeqLens', 'cuSeqlens'],
    ['cuSeqlen', 'cuSeqlens'],
  ] as const)
    expect(message({ cuSeqlens: [], [key]: 1 })).toBe(
      `[loss] unknown option '${key}'; did you mean '${near}'?`,
    )
  expect(message({ causal: undefined })).toBe(
    "[loss] unknown option 'causal'; the known ones are 'clipLow', 'clipHigh', 'maxTokens', 'cuSeqlens'",
  )
  expect(message({ constructor: 1 })).toContain("unknown option 'constructor'")
  expect(message({ ['x'.repeat(100_000)]: 1 })).toContain('the known ones are')
  expect(message({ clipHi: 1 }, 'loss')).toBe(
    "[loss] unknown option 'loss.clipHi'; did you mean 'loss.clipHigh'?",
  )
})

test('anything but an object of arguments is refused', () => {
  class Other {
    field = 1
  }
  for (const [value, shown] of [
    [undefined, 'undefined'],
    [null, 'null'],
    [7, '7'],
    ['a', "'a'"],
    [true, 'true'],
    [[], 'an array'],
    [() => 1, 'a function'],
    [new Other(), 'a Other'],
  ] as const) {
    expect(message(value)).toBe(`[loss] expects one object of arguments, got ${shown}`)
    expect(message(value, 'into')).toBe(`[loss] into must be an object, got ${shown}`)
  }
})

test('every value can be described', () => {
  expect(describeValue({})).toBe('an object')
  expect(describeValue(Object.create(null))).toBe('an object')
  expect(describeValue({ constructor: null })).toBe('an object')
  expect(describeValue(new Date(0))).toBe('a Date')
  expect(describeValue(Symbol('s'))).toBe('Symbol(s)')
  expect(describeValue(5n)).toBe('5')
  expect(() => choice(Object.create(null), ['a', 'b'], 'kind', 'op')).toThrow(
    "[op] kind must be 'a' or 'b', got an object",
  )
})
