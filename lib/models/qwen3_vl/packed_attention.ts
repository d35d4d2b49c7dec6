/**
 * Causal attention over packed sequences, forward and backward, of which some go on after the rows of another: a
 * shared prompt, computed once for all of its completions.
 */
import { attention, attentionBackward } from '../../ops/attention.js'
import { add } from '../../ops/elementwise.js'
import { concat } from '../../ops/rearrange.js'
import { scope } from '../../scope.js'
import type { Tensor } from '../../tensor.js'

/** Packed sequences as rows: first those that stand alone, then those that go on after one of the first. */
export interface Rows {
  /** Where the first sequences begin and end. */
  cuSeqlens: readonly number[]
  /** Where the others do; begins where the first end. */
  readers?: { cuSeqlens: readonly number[]; sharedKeys: readonly (readonly [number, number])[] }
}

/** What attention gives, and what its backward needs. */
export interface Attended {
  /** As q in shape and type. */
  out: Tensor
  /** Of the sequences that stand alone. */
  lse: Tensor<'f32'>
  /** Of the others. */
  readersLse?: Tensor<'f32'>
}

/** The tensors of attention's backward. */
export interface AttendedHeads extends Attended {
  q: Tensor
  k: Tensor
  v: Tensor
}

export function attendRows(
  { cuSeqlens, readers }: Rows,
  q: Tensor,
  k: Tensor,
  v: Tensor,
): Attended {
  if (!readers) return attention({ q, k, v, cuSeqlens, causal: true })
  return scope(() => {
    const alone = attention({ ...part({ q, k, v }, 0, cuSeqlens.at(-1)!), cuSeqlens, causal: true })
    const others = attention({ ...readersOf(readers, cuSeqlens, { q, k, v }), causal: true })
    const out = concat({ tensors: [alone.out, others.out] })
    return { out, lse: alone.lse, readersLse: others.lse }
  })
}

export function attendRowsBackward(
  { cuSeqlens, readers }: Rows,
  { q, k, v, out, lse, readersLse }: AttendedHeads,
  dOut: Tensor,
): { dQ: Tensor; dK: Tensor; dV: Tensor } {
  if (!readers) return attentionBackward({ q, k, v, out, lse, dOut, cuSeqlens, causal: true })
  return scope(() => {
    const rows = cuSeqlens.at(-1)!
    const alone = attentionBackward({
      ...part({ q, k, v, out, dOut }, 0, rows),
      lse,
      cuSeqlens,
      causal: true,
    })
    const others = attentionBackward({
      ...readersOf(readers, cuSeqlens, { q, k, v }),
      ...part({ out, dOut }, rows),
      lse: readersLse!,
      causal: true,
    })
    const shared = (of: 'dK' | 'dV'): Tensor => {
      const first = others[of].slice(0, rows)
      first.copyFrom(add({ x: first, y: alone[of] }))
      return others[of]
    }
    return {
      dQ: concat({ tensors: [alone.dQ, others.dQ] }),
      dK: shared('dK'),
      dV: shared('dV'),
    }
  })
}

/** The queries of the readers, and all keys. */
function readersOf(
  readers: NonNullable<Rows['readers']>,
  cuSeqlens: readonly number[],
  { q, k, v }: { q: Tensor; k: Tensor; v: Tensor },
) {
  const rows = cuSeqlens.at(-1)!
  return {
    q: q.slice(rows),
    k,
    v,
    cuSeqlens: readers.cuSeqlens.map((end) => end - rows),
    cuSeqlensK: readers.cuSeqlens,
    sharedKeys: readers.sharedKeys,
  }
}

/** The rows from `start` to `end` of each tensor. */
function part<N extends string>(
  tensors: Record<N, Tensor>,
  start: number,
  end?: number,
): Record<N, Tensor> {
  const parts = {} as Record<N, Tensor>
  for (const name in tensors) parts[name] = tensors[name].slice(start, end)
  return parts
}
