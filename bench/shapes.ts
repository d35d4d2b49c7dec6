// Rows of sizes and a type that the user chooses: --shape T=1024,H=16,D=72 --dtype bf16.
import type { Benchmark, Workload } from './harness.js'

/** Bytes of an element. */
export const widths = { f32: 4, f16: 2, bf16: 2 } as const
export type Float = keyof typeof widths
export const floats = Object.keys(widths) as Float[]

/** What a family's rows can be measured for. */
export interface Custom<Letter extends string = string> {
  /** What each letter of --shape counts, and its value unless given. */
  letters: Readonly<Record<Letter, readonly [counts: string, size: number]>>
  /** Those of --dtype, the first unless given; none where the type is not a choice. */
  dtypes: readonly Float[]
  workloads(sizes: Readonly<Record<Letter, number>>, dtype: Float): Workload[]
}

/** The sizes of `T=1024,H=16`; throws an Error that says what is wrong with the text. */
export function parseShape(text: string): Map<string, number> {
  const out = new Map<string, number>()
  for (const part of text.split(',')) {
    const [, letter, digits] = part.trim().match(/^([A-Za-z])=(\d+)$/) ?? []
    const size = Number(digits)
    if (letter === undefined || !Number.isSafeInteger(size) || size < 1)
      throw new Error(`expected letters with positive integers, as in T=1024,H=16, got '${part}'`)
    if (out.has(letter)) throw new Error(`${letter} is given twice`)
    out.set(letter, size)
  }
  return out
}

/** The operation's rows for these sizes and this type; throws an Error that lists what it takes. */
export function customWorkloads(
  { op, custom }: Benchmark,
  shape: ReadonlyMap<string, number>,
  dtype: string | undefined,
): Workload[] {
  if (!custom) throw new Error(`${op} has fixed rows: it takes no --shape and no --dtype`)
  const { letters, dtypes } = custom
  const takes = Object.entries(letters).map(([letter, [counts, size]]) => {
    return `${letter} (${counts}, ${size})`
  })
  for (const letter of shape.keys())
    if (!Object.hasOwn(letters, letter))
      throw new Error(`${op} has no size '${letter}'; --shape takes ${takes.join(', ')}`)
  if (dtype !== undefined && !dtypes.some((known) => known === dtype))
    throw new Error(
      dtypes.length
        ? `${op} is not measured in '${dtype}'; --dtype takes ${dtypes.join(', ')}`
        : `${op} has one type: it takes no --dtype`,
    )
  const sizes = Object.entries(letters).map(([letter, [, size]]) => {
    return [letter, shape.get(letter) ?? size] as const
  })
  return custom.workloads(Object.fromEntries(sizes), (dtype ?? dtypes[0] ?? 'f32') as Float)
}

/** The rows with each size and type as it is unless given. */
export function standard<Letter extends string>(custom: Custom<Letter>): Workload[] {
  const sizes = Object.entries<readonly [string, number]>(custom.letters)
  return custom.workloads(
    Object.fromEntries(sizes.map(([letter, [, size]]) => [letter, size])) as Record<Letter, number>,
    custom.dtypes[0] ?? 'f32',
  )
}
