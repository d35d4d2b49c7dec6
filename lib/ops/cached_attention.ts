import {
  checkArguments,
  checkInteger,
  checkIntegerWithin,
  checkReceiver,
  describeValue,
  hostInts,
  isObject,
  type Names,
} from '../arguments.js'
import { checkDevice, type Device } from '../device.js'
import { checkFloatDType, type FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import { native } from '../native.js'
import { holds } from '../scope.js'
import { type Held, handleOf, held, type Ints, type Tensor, wrap } from '../tensor.js'
import type { AttentionResult } from './attention.js'

/** The sizes of a `KvCache`. */
export interface KvCacheOptions {
  /** Layers of the model, each with keys and values of its own. */
  layers: number
  /** Key heads a layer. */
  kvHeads: number
  /** A multiple of 8 from 8 to 128. */
  headDim: number
  /** Pages in all, of 2 · layers · kvHeads · pageSize · headDim entries each. */
  pages: number
  /**
   * Tokens a page, from 16 to 64. Small pages waste less at the end of a sequence and copy less where one
   * that is shared grows.
   *
   * @default 16
   */
  pageSize?: number
  /**
   * The type of keys and values, and so of the tensors of `cachedAttention`.
   *
   * @default 'f32'
   */
  dtype?: FloatDType
}

const optionNames: Names<KvCacheOptions> = {
  layers: true,
  kvHeads: true,
  headDim: true,
  pages: true,
  pageSize: true,
  dtype: true,
}

/** What a sequence holds: its pages in order, and how many tokens of them each layer has. */
interface Sequence {
  pages: number[]
  lengths: Int32Array
  /** By how much positions exceed places, from each of these places on; of a model with images among its tokens. */
  shifts: readonly Shift[]
}

/** @internal From a place in a sequence on, what is added to a place for its position. */
export interface Shift {
  from: number
  shift: number
}

/** What appending to a layer takes, before it is done. */
interface Plan {
  lengths: Float64Array
  tables: Float64Array
  commit: () => void
}

const className = 'KvCache'
let plan: (cache: KvCache, layer: number, sequences: Float64Array, cuSeqlens: Float64Array) => Plan
let pagesOf: (cache: KvCache) => Tensor
let shiftsOf: typeof sequenceShifts
let isCache: (value: unknown) => value is KvCache

/**
 * A paged cache of keys and values for all layers of a decoder, allocated once (Kwon et al., PagedAttention,
 * 2023). Sequences grow by `cachedAttention`. Pages are counted by the sequences that hold them: one that starts
 * from another shares its pages, and a page that is shared is copied when either writes to it.
 *
 * @example
 * ```js
 * import { cachedAttention, KvCache, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const cache = new KvCache(device, { layers: 1, kvHeads: 1, headDim: 8, pages: 4 })
 * const prompt = cache.add()
 * const zeros = device.zeros([5, 1, 8])
 * const a = { q: zeros, k: zeros, v: zeros, cuSeqlens: [0, 5] }
 * cachedAttention({ ...a, cache, layer: 0, sequences: [prompt] })
 * const rollout = cache.add(prompt) // the same five tokens in the same page
 * console.log(cache.length(rollout), cache.pagesFree) // 5 3
 * device.dispose()
 * ```
 */
export class KvCache implements Disposable {
  static {
    plan = (cache, ...a) => cache.#plan(...a)
    pagesOf = (cache) => cache.#tensor
    shiftsOf = (cache, id, name, op, added = []) => {
      const sequence = cache.#sequence(id, name, op)
      sequence.shifts = [...sequence.shifts, ...added]
      return sequence.shifts
    }
    isCache = (value): value is KvCache => isObject(value) && #sequences in value
  }

  /** Where the pages are. */
  readonly device: Device
  /** Of keys and values. */
  readonly dtype: FloatDType
  /** Layers of the model. */
  readonly layers: number
  /** Pages in all. */
  readonly pages: number
  /** Tokens a page. */
  readonly pageSize: number
  readonly #tensor: Tensor
  readonly #references: Int32Array
  /** Free pages, the next at the end. */
  readonly #free: number[]
  readonly #sequences = new Map<number, Sequence>()
  #next = 0

  /**
   * Allocates all pages.
   *
   * @throws P2RError ERR_VALUE and ERR_DTYPE for wrong arguments; ERR_MEMORY; ERR_DISPOSED.
   */
  constructor(device: Device, options: KvCacheOptions) {
    const op = className
    checkDevice(device, op)
    options = checkArguments(options, optionNames, op)
    const { pageSize = 16, dtype = 'f32' } = options
    const sized = (name: 'layers' | 'kvHeads' | 'pages'): number =>
      checkIntegerWithin(options[name], 1, 2 ** 31 - 1, name, op)
    const [layers, kvHeads, pages] = [sized('layers'), sized('kvHeads'), sized('pages')]
    const headDim = checkIntegerWithin(options.headDim, 8, 128, 'headDim', op)
    if (headDim % 8) refuse('ERR_VALUE', op, `headDim must be a multiple of 8, got ${headDim}`)
    checkIntegerWithin(pageSize, 16, 64, 'pageSize', op)
    checkFloatDType(dtype, 'dtype', op)
    this.device = device
    this.dtype = dtype
    this.layers = layers
    this.pages = pages
    this.pageSize = pageSize
    this.#tensor = device.zeros([pages, layers, 2, kvHeads, pageSize, headDim], dtype)
    this.#references = new Int32Array(pages)
    this.#free = Array.from({ length: pages }, (_, i) => pages - 1 - i)
  }

  /**
   * A new empty sequence, or one that shares all that another holds.
   *
   * @returns its number, which is never given again.
   * @throws P2RError ERR_VALUE for a sequence that the cache does not have; ERR_DISPOSED.
   */
  add(from?: number): number {
    const cache = checkCache(this, 'add', 'this')
    const shared = from === undefined ? undefined : cache.#sequence(from, 'from', 'add')
    const sequence: Sequence = {
      pages: [...(shared?.pages ?? [])],
      lengths: shared ? shared.lengths.slice() : new Int32Array(cache.layers),
      shifts: shared?.shifts ?? [],
    }
    for (const page of sequence.pages) cache.#references[page]!++
    const id = cache.#next++
    cache.#sequences.set(id, sequence)
    return id
  }

  /**
   * How many tokens a sequence holds, in the layer that has most: within a step, layers differ.
   *
   * @throws P2RError ERR_VALUE for a sequence that the cache does not have; ERR_DISPOSED.
   */
  length(sequence: number): number {
    const cache = checkCache(this, 'length', 'this')
    return Math.max(...cache.#sequence(sequence, 'sequence', 'length').lengths)
  }

  /**
   * Forgets the tokens from `length` on, in all layers.
   *
   * @throws P2RError ERR_VALUE for a sequence that the cache does not have, or a length above its own;
   *   ERR_DISPOSED.
   */
  truncate(sequence: number, length: number): void {
    const op = 'truncate'
    const cache = checkCache(this, op, 'this')
    const held = cache.#sequence(sequence, 'sequence', op)
    const { pages, lengths } = held
    checkIntegerWithin(length, 0, Math.max(...lengths), 'length', op)
    held.shifts = held.shifts.filter(({ from }) => from <= length)
    lengths.forEach((n, layer) => {
      lengths[layer] = Math.min(n, length)
    })
    cache.#release(pages.splice(Math.ceil(length / cache.pageSize)))
  }

  /**
   * Forgets a sequence. Pages that no other holds are free.
   *
   * @throws P2RError ERR_VALUE for a sequence that the cache does not have; ERR_DISPOSED.
   */
  remove(sequence: number): void {
    const cache = checkCache(this, 'remove', 'this')
    cache.#release(cache.#sequence(sequence, 'sequence', 'remove').pages)
    cache.#sequences.delete(sequence)
  }

  /**
   * How many free pages appending so many tokens to a sequence takes: new ones, and copies of those that it
   * shares and would write to.
   *
   * @throws P2RError ERR_VALUE for a sequence that the cache does not have, or no number of tokens; ERR_DISPOSED.
   */
  pagesNeeded(sequence: number, tokens: number): number {
    const op = 'pagesNeeded'
    const cache = checkCache(this, op, 'this')
    const { pages, lengths } = cache.#sequence(sequence, 'sequence', op)
    checkInteger(tokens, 0, 'tokens', op)
    if (tokens === 0) return 0
    const length = Math.min(...lengths)
    let needed = 0
    const end = Math.ceil((length + tokens) / cache.pageSize)
    for (let i = Math.floor(length / cache.pageSize); i < Math.min(end, pages.length); i++)
      if (cache.#references[pages[i]!]! > 1) needed++
    return needed + Math.max(0, end - pages.length)
  }

  /** Pages that no sequence holds. */
  get pagesFree(): number {
    return checkCache(this, 'pagesFree', 'this').#free.length
  }

  /** Releases the memory; a second call does nothing. */
  dispose(): void {
    if (!isCache(this)) checkReceiver(false, className, 'dispose')
    this.#tensor.dispose()
  }

  [Symbol.dispose](): void {
    KvCache.prototype.dispose.call(this)
  }

  /** @internal The pages, for a scope that keeps the cache. */
  [holds](): Iterable<unknown> {
    return [this.#tensor]
  }

  #sequence(id: unknown, name: string, op: string): Sequence {
    const sequence = this.#sequences.get(id as number)
    if (!sequence)
      refuse('ERR_VALUE', op, `${name} must be a sequence of the cache, got ${describeValue(id)}`)
    return sequence
  }

  #release(pages: readonly number[]): void {
    for (const page of pages) if (--this.#references[page]! === 0) this.#free.push(page)
  }

  /**
   * The places of the new tokens. Nothing is changed before `commit`, but that pages which are shared and
   * written to are copied into free ones.
   */
  #plan(layer: number, ids: Float64Array, cuSeqlens: Float64Array): Plan {
    const op = 'cachedAttention'
    checkIntegerWithin(layer, 0, this.layers - 1, 'layer', op)
    if (new Set(ids).size !== ids.length)
      refuse('ERR_VALUE', op, 'sequences must not name a sequence twice')
    if (cuSeqlens.length !== ids.length + 1)
      refuse(
        'ERR_VALUE',
        op,
        `sequences must be as many as those of cuSeqlens, ${cuSeqlens.length - 1}, got ${ids.length}`,
      )
    // Changes to the numbers of references, by page.
    const change = new Map<number, number>()
    const add = (page: number, by: number): void =>
      void change.set(page, (change.get(page) ?? 0) + by)
    const copies: (readonly [from: number, to: number])[] = []
    let taken = 0
    const tables: number[] = []
    const sequences = Array.from(ids, (id, s) => {
      const sequence = this.#sequence(id, `sequences[${s}]`, op)
      const pages = [...sequence.pages]
      const length = sequence.lengths[layer]!
      const end = length + Math.max(0, cuSeqlens[s + 1]! - cuSeqlens[s]!)
      const take = (): number => {
        const page = this.#free.at(-1 - taken)
        if (page === undefined)
          refuse(
            'ERR_MEMORY',
            op,
            `the cache is full: sequence ${id} of ${length} tokens does not get ${end - length} more, with ` +
              `${this.#free.length} of ${this.pages} pages free for the call`,
          )
        taken++
        add(page, 1)
        return page
      }
      const used = Math.ceil(end / this.pageSize)
      const first = end > length ? Math.floor(length / this.pageSize) : used
      for (let i = first; i < used; i++) {
        const page = pages[i]
        if (page === undefined) {
          pages.push(take())
        } else if (this.#references[page]! + (change.get(page) ?? 0) > 1) {
          pages[i] = take()
          copies.push([page, pages[i]!])
          add(page, -1)
        }
      }
      for (let i = 0; i < used; i++) tables.push(pages[i]!)
      return { sequence, pages, end, length }
    })
    for (const [from, to] of copies) this.#copy(from, to)
    return {
      lengths: Float64Array.from(sequences, (s) => s.length),
      tables: Float64Array.from(tables),
      commit: () => {
        this.#free.length -= taken
        for (const [page, by] of change) this.#references[page]! += by
        for (const { sequence, pages, end } of sequences) {
          sequence.pages = pages
          sequence.lengths[layer] = end
        }
      },
    }
  }

  #copy(from: number, to: number): void {
    using source = this.#tensor.slice(from, from + 1)
    using target = this.#tensor.slice(to, to + 1)
    target.copyFrom(source)
  }
}

/** A cache that was not disposed. */
function checkCache(value: unknown, op: string, name: string): KvCache {
  if (!isCache(value)) {
    if (name === 'this') checkReceiver(false, className, op)
    refuse('ERR_VALUE', op, `${name} must be a KvCache, got ${describeValue(value)}`)
  }
  if (handleOf(pagesOf(value), 'cache', op).disposed)
    refuse('ERR_DISPOSED', op, 'the cache was disposed')
  return value
}

/** @internal A cache that a model can continue. */
export function checkKvCache(value: unknown, name: string, op: string): KvCache {
  return checkCache(value, op, name)
}

/** @internal Where a sequence's positions run ahead of its places; those of new tokens are added. */
export function sequenceShifts(
  cache: KvCache,
  sequence: number,
  name: string,
  op: string,
  added?: readonly Shift[],
): readonly Shift[] {
  return shiftsOf(cache, sequence, name, op, added)
}

/** The arguments of `cachedAttention`. */
export interface CachedAttentionArgs<D extends FloatDType = FloatDType> {
  /** [T, H, D], of the cache's type; its key heads divide H. */
  q: Tensor<D>
  /** [T, Kv, D], of q's type: the keys of the new tokens, rotated. */
  k: Tensor<NoInfer<D>>
  /** As k in shape and type. */
  v: Tensor<NoInfer<D>>
  /** Where the new tokens of each of `sequences` begin and end: 0 = c₀ ≤ c₁ ≤ … = T. */
  cuSeqlens: Ints
  /** What holds the sequences, on the same device. */
  cache: KvCache
  /** Which layer's keys and values these are. */
  layer: number
  /** Sequences of the cache, each once. */
  sequences: Ints
  /**
   * Multiplies the logits; finite.
   *
   * @default 1/√D
   */
  scale?: number
}

const names: Names<CachedAttentionArgs> = {
  q: true,
  k: true,
  v: true,
  cuSeqlens: true,
  cache: true,
  layer: true,
  sequences: true,
  scale: true,
}

/**
 * Appends the keys and values of new tokens to a layer of the cache, then attends from each to all tokens of its
 * sequence up to itself: decoding, and prefill in chunks. A step calls it for each layer, with the same
 * sequences and numbers of tokens.
 *
 * On the CPU, for one instruction set, results are the bits of causal `attention` over the same tokens.
 *
 * @throws P2RError ERR_MEMORY where the cache has too few free pages: then nothing was appended, and the cache goes
 *   on; ERR_SHAPE, ERR_DTYPE for tensors that do not fit the cache; ERR_VALUE for cuSeqlens, layer, sequences
 *   and scale; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { cachedAttention, KvCache, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const cache = new KvCache(device, { layers: 1, kvHeads: 1, headDim: 8, pages: 8 })
 * const sequences = [cache.add(), cache.add()]
 * const [q, k, v] = [device.zeros([7, 2, 8]), device.zeros([7, 1, 8]), device.zeros([7, 1, 8])]
 * const { out, lse } = cachedAttention({ q, k, v, cuSeqlens: [0, 4, 7], cache, layer: 0, sequences })
 * console.log(out.shape, lse.shape, cache.length(sequences[1])) // [ 7, 2, 8 ] [ 2, 7 ] 3
 * device.dispose()
 * ```
 */
export function cachedAttention<D extends FloatDType>(
  a: CachedAttentionArgs<D>,
): Held<AttentionResult<D>> {
  const op = 'cachedAttention'
  a = checkArguments(a, names, op)
  const tensors = [handleOf(a.q, 'q', op), handleOf(a.k, 'k', op), handleOf(a.v, 'v', op)]
  const cache = checkCache(a.cache, op, 'cache')
  const cuSeqlens = hostInts(a.cuSeqlens, 'cuSeqlens', op)
  const { lengths, tables, commit } = plan(
    cache,
    a.layer,
    hostInts(a.sequences, 'sequences', op),
    cuSeqlens,
  )
  const [out, lse] = native().ops.cached_attention!(
    ...tensors,
    handleOf(pagesOf(cache), 'cache', op),
    cuSeqlens,
    lengths,
    tables,
    a.layer,
    a.scale,
  ) as [unknown, unknown]
  commit()
  return held({ out: wrap<D>(a.q.device, out), lse: wrap<'f32'>(a.q.device, lse) })
}
