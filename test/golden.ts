// Reads the reference data in test/golden, which scripts/pack-golden.mjs packed; its README says
// what each file holds.
import { unpackGolden } from '../scripts/unpack-golden.mjs'

export type Family =
  | 'attention'
  | 'grpo'
  | 'hopper'
  | 'image'
  | 'lm_ops'
  | 'qwen3vl'
  | 'rope'
  | 'tower'

/** One family's files by path, as in 'attention/a01_d64_single128/q.bin'. Arrays are copies. */
export interface Golden {
  /** The paths that start with the prefix, sorted. */
  list(prefix?: string): string[]
  bytes(path: string): Uint8Array<ArrayBuffer>
  f32(path: string): Float32Array<ArrayBuffer>
  i32(path: string): Int32Array<ArrayBuffer>
  // biome-ignore lint/suspicious/noExplicitAny: the files' own shapes, which their readers know
  json<T = any>(path: string): T
}

const opened = new Map<Family, Golden>()

export function golden(family: Family): Golden {
  const known = opened.get(family)
  if (known) return known
  const packed = unpackGolden(family)
  const bytes = (path: string) => new Uint8Array(packed.bytes(path))
  const made: Golden = {
    list: (prefix = '') => Object.keys(packed.index).filter((path) => path.startsWith(prefix)),
    bytes,
    f32: (path) => new Float32Array(bytes(path).buffer),
    i32: (path) => new Int32Array(bytes(path).buffer),
    json: (path) => JSON.parse(Buffer.from(bytes(path)).toString('utf8')),
  }
  opened.set(family, made)
  return made
}

/** A tensor of a grpo case. */
export interface GrpoTensor {
  dtype: 'f64' | 'f32' | 'i32' | 'u8' | 'bf16'
  shape: number[]
  /** As stored; bf16 as raw bits in a Uint16Array. */
  data: Float64Array | Float32Array | Int32Array | Uint8Array | Uint16Array
  /** The values as float64, whatever the type. */
  values: Float64Array
}

/** One case of grpo/meta.json; see the README for what its kind defines. */
export interface GrpoCase {
  group: string
  id: string
  kind: string
  // biome-ignore lint/suspicious/noExplicitAny: each kind has parameters of its own
  params: Record<string, any>
  convention?: 'verl' | 'trl'
  /** Throws for a name that the case does not have. */
  input(name: string): GrpoTensor
  output(name: string): GrpoTensor
  has(name: string): boolean
  /** Expected scalars, with the words NaN, Infinity and -Infinity made numbers. */
  scalars: Record<string, number>
  /** The rows of a case that is a table. */
  // biome-ignore lint/suspicious/noExplicitAny: each table has columns of its own
  rows(): any[]
}

interface Stored {
  offset: number
  nbytes: number
  dtype: GrpoTensor['dtype']
  shape: number[]
}

/** The grpo cases of a kind ('logprob', 'policy_loss', ...), or all of them. */
export function grpoCases(kind?: string): GrpoCase[] {
  const files = golden('grpo')
  const meta = files.json<{ cases: Record<string, unknown>[] }>('grpo/meta.json')
  return meta.cases
    .filter((c) => kind === undefined || c.kind === kind)
    .map((c) => {
      const stored = (side: 'inputs' | 'outputs') => (c[side] ?? {}) as Record<string, Stored>
      const tensor = (side: 'inputs' | 'outputs', name: string): GrpoTensor => {
        const at = Object.hasOwn(stored(side), name) ? stored(side)[name] : undefined
        if (!at) throw new Error(`${c.group}.${c.id} has no ${name} among its ${side}`)
        const whole = files.bytes(`grpo/${c.file}`)
        const { buffer } = whole.slice(at.offset, at.offset + at.nbytes)
        return { dtype: at.dtype, shape: at.shape, ...numbers(at.dtype, buffer) }
      }
      return {
        group: c.group as string,
        id: c.id as string,
        kind: c.kind as string,
        params: (c.params ?? {}) as GrpoCase['params'],
        ...(c.convention ? { convention: c.convention as 'verl' | 'trl' } : {}),
        input: (name) => tensor('inputs', name),
        output: (name) => tensor('outputs', name),
        has: (name) => name in stored('inputs') || name in stored('outputs'),
        scalars: Object.fromEntries(
          Object.entries(c.scalars ?? {}).map(([name, value]) => [name, Number(value)]),
        ),
        rows: () => files.json(`grpo/${c.rows_file}`),
      }
    })
}

function numbers(dtype: Stored['dtype'], buffer: ArrayBuffer): Pick<GrpoTensor, 'data' | 'values'> {
  if (dtype === 'bf16') {
    const data = new Uint16Array(buffer)
    const wide = new Float32Array(Uint32Array.from(data, (bits) => bits << 16).buffer)
    return { data, values: Float64Array.from(wide) }
  }
  const types = { f64: Float64Array, f32: Float32Array, i32: Int32Array, u8: Uint8Array }
  const data = new types[dtype](buffer)
  return { data, values: Float64Array.from(data) }
}
