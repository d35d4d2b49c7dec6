import {
  checkArguments,
  checkArray,
  checkBoolean,
  checkInt32,
  checkString,
  hostInts,
  type Names,
} from '../arguments.js'
import { checkDevice, type Device } from '../device.js'
import type { FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import { checkGrids, type Grid } from '../grid.js'
import { native } from '../native.js'
import { type Held, handleOf, held, type Ints, maybeHandle, type Tensor, wrap } from '../tensor.js'
import type { RotaryTables } from './rotary.js'

// (string & {}) is any string, and keeps the names before it in an editor's completion.
/** A kernel of attention: see `kernels`. */
export type AttentionKernel = 'tiled' | 'wgmma' | 'mma' | 'plain' | (string & {})

/** Queries, keys and values as three tensors. */
export interface SeparateHeads<D extends FloatDType = FloatDType> {
  /** [T, H, D], f32 | f16 | bf16, D a multiple of 8 from 8 to 128. */
  q: Tensor<D>
  /** [Tk, Kv, D], of q's type; Kv divides H, and query head h reads key head ⌊h / (H / Kv)⌋. */
  k: Tensor<NoInfer<D>>
  /** As k in shape and type. */
  v: Tensor<NoInfer<D>>
  /** Excluded by q, k and v. */
  qkv?: never
  /** Needs qkv: rotate q and k by `applyRotary` before. */
  rotary?: never
}

/** Queries, keys and values in one tensor, as a fused projection writes them. */
export interface PackedHeads<D extends FloatDType = FloatDType> {
  /** [T, 3, H, D], f32 | f16 | bf16, D a multiple of 8 from 8 to 128; read in place, without a copy. */
  qkv: Tensor<D>
  /**
   * Tables [T, D] that are applied to q and k on the fly, as `applyRotary` does.
   *
   * @default no rotation
   */
  rotary?: RotaryTables
  /** Excluded by qkv. */
  q?: never
  /** Excluded by qkv. */
  k?: never
  /** Excluded by qkv. */
  v?: never
}

/** How attention is computed. */
export interface AttentionOptions {
  /** Where the packed sequences begin and end: 0 = c₀ ≤ c₁ ≤ … = T. Each attends to itself only. */
  cuSeqlens: Ints
  /**
   * Multiplies the logits; finite.
   *
   * @default 1/√D
   */
  scale?: number
}

/** Which keys a query sees. */
export interface CausalArgs {
  /**
   * Whether a query sees only keys up to its own place: of its sequence's n queries and m own keys, query i
   * sees the first i + 1 + m − n (aligned at the ends), beside all shared keys.
   *
   * @default false: all keys of its sequence
   */
  causal?: boolean
  /**
   * Where each sequence's own keys begin and end among the rows of k and v: as cuSeqlens, ending with Tk.
   * With sharedKeys it may begin after 0 and end before Tk. Needs q, k and v.
   *
   * @default cuSeqlens: as many keys as queries
   */
  cuSeqlensK?: Ints
  /**
   * For each sequence a range of rows of k and v that stands before its own keys, seen by all of its queries;
   * several sequences may have the same, as rollouts of one prompt. A length of 0 is none. It must be outside
   * of all own keys. Needs q, k and v.
   *
   * @default no shared keys
   */
  sharedKeys?: readonly (readonly [start: number, length: number])[]
}

/** Which kernel computes. */
export interface AttentionKernelOption {
  /**
   * One of `kernels('attention', device)`.
   *
   * @default the first of them that supports D, the type and the keys (of which 'wgmma' takes only a
   *   sequence's own, all of them, with Kv = H), but 'mma' rather than 'wgmma' where most of the work is in
   *   sequences of up to 64 tokens
   */
  kernel?: AttentionKernel
}

/** The arguments of `attention`: either q, k and v, or qkv. */
export type AttentionArgs<D extends FloatDType = FloatDType> = (SeparateHeads<D> | PackedHeads<D>) &
  AttentionOptions &
  CausalArgs &
  AttentionKernelOption

/** `AttentionArgs`. */
export type AttentionInput<D extends FloatDType = FloatDType> = AttentionArgs<D>

/** The results of `attention`. */
export interface AttentionResult<D extends FloatDType = FloatDType> {
  /** [T, H, D], of the input's type. */
  out: Tensor<D>
  /** f32 [H, T]: the natural logarithm of each query's Σ exp(logit), for the backward pass. */
  lse: Tensor<'f32'>
}

const headNames: Names<SeparateHeads | PackedHeads> = {
  q: true,
  k: true,
  v: true,
  qkv: true,
  rotary: true,
}
const optionNames: Names<AttentionOptions> = { cuSeqlens: true, scale: true }
const keyNames: Names<CausalArgs> = { causal: true, cuSeqlensK: true, sharedKeys: true }
const names: Names<AttentionArgs> = { ...headNames, ...optionNames, ...keyNames, kernel: true }

/**
 * softmax(scale · q kᵀ) v within each packed sequence and head (Dao et al., FlashAttention, 2022), every key
 * visible to every query of its sequence, or causal; with grouped key heads (Ainslie et al., GQA, 2023) and
 * keys that sequences share, as rollouts do their prompt's. No T × T matrix is materialized.
 *
 * A query whose logits are all -∞ has lse -∞ and NaN in out; a logit of NaN or +∞ makes both NaN for its
 * query; one that sees no key has lse -∞ and 0 in out. Results by parts of the keys can be merged by their lse.
 *
 * On the CPU, for one instruction set, results with `causal`, grouped heads, cuSeqlensK or sharedKeys are the
 * same bits however a sequence's keys are stored, in whatever chunks its queries come, and in
 * `cachedAttention`.
 *
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for cuSeqlens, cuSeqlensK,
 *   sharedKeys, scale, kernel, or both forms of input at once; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { attention, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const qkv = device.zeros([6, 3, 2, 8]) // 6 tokens, 2 heads of dimension 8
 * const { out, lse } = attention({ qkv, cuSeqlens: [0, 2, 6] }) // two sequences, of 2 and 4 tokens
 * console.log(out.shape, lse.shape) // [ 6, 2, 8 ] [ 2, 6 ]
 * device.dispose()
 * ```
 */
export function attention<D extends FloatDType>(a: AttentionArgs<D>): Held<AttentionResult<D>> {
  const op = 'attention'
  a = checkArguments(a, names, op)
  const { device } = firstOf(a, op)
  const [out, lse] = native().ops.attention!(
    ...inputs(a, op),
    ...keysOf(a, op),
    a.scale,
    a.kernel,
  ) as [unknown, unknown]
  return held({ out: wrap<D>(device, out), lse: wrap<'f32'>(device, lse) })
}

/** What the backward pass takes besides the input of `attention`. */
export interface AttentionGradient<D extends FloatDType = FloatDType> {
  /** [T, H, D], of the input's type: the gradient with respect to `out`. */
  dOut: Tensor<NoInfer<D>>
  /** As `attention` returned it. */
  out: Tensor<NoInfer<D>>
  /** As `attention` returned it. */
  lse: Tensor<'f32'>
  /**
   * false lets the kernel 'wgmma' (f16 and bf16 on Hopper) sum up dQ in one pass, in an order that changes
   * from run to run, with a workspace of 4·T·H·D bytes. The other kernels, including the CPU's, ignore it.
   *
   * @default true
   */
  deterministic?: boolean
}

/** The arguments of `attentionBackward`: the input of `attention`, its results and their gradient. */
export type AttentionBackwardArgs<D extends FloatDType = FloatDType> = AttentionArgs<D> &
  AttentionGradient<D>

/** The results of `attentionBackward` for q, k and v. */
export interface AttentionBackwardResult<D extends FloatDType = FloatDType> {
  /** As q in shape and type. */
  dQ: Tensor<D>
  /** As k in shape and type. */
  dK: Tensor<D>
  /** As v in shape and type. */
  dV: Tensor<D>
}

/** The result of `attentionBackward` for qkv. */
export interface PackedAttentionBackwardResult<D extends FloatDType = FloatDType> {
  /** As qkv in shape and type, rotated back through the tables, if any. */
  dQkv: Tensor<D>
}

const backwardNames: Names<AttentionBackwardArgs> = {
  ...names,
  dOut: true,
  out: true,
  lse: true,
  deterministic: true,
}

/**
 * The gradients of `attention`. Repeats bit for bit, unless `deterministic` is false. A key head's gradient is
 * the sum over its query heads, and a shared key's over the sequences that share it, in their order.
 *
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for cuSeqlens, cuSeqlensK,
 *   sharedKeys, scale, kernel, or both forms of input at once; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { attention, attentionBackward, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const qkv = device.zeros([6, 3, 2, 8])
 * const cuSeqlens = [0, 6]
 * const { out, lse } = attention({ qkv, cuSeqlens })
 * const { dQkv } = attentionBackward({ qkv, cuSeqlens, out, lse, dOut: device.zeros([6, 2, 8]) })
 * console.log(dQkv.shape) // [ 6, 3, 2, 8 ]
 * device.dispose()
 * ```
 */
export function attentionBackward<D extends FloatDType>(
  a: SeparateHeads<D> & AttentionBackwardArgs<D>,
): Held<AttentionBackwardResult<D>>
export function attentionBackward<D extends FloatDType>(
  a: PackedHeads<D> & AttentionBackwardArgs<D>,
): Held<PackedAttentionBackwardResult<D>>
export function attentionBackward<D extends FloatDType>(
  a: AttentionBackwardArgs<D>,
): Held<AttentionBackwardResult<D>> | Held<PackedAttentionBackwardResult<D>>
export function attentionBackward<D extends FloatDType>(
  a: AttentionBackwardArgs<D>,
): Held<AttentionBackwardResult<D>> | Held<PackedAttentionBackwardResult<D>> {
  const op = 'attentionBackward'
  a = checkArguments(a, backwardNames, op)
  const { device } = firstOf(a, op)
  const gradients = native().ops.attention_backward!(
    ...inputs(a, op),
    handleOf(a.dOut, 'dOut', op),
    handleOf(a.out, 'out', op),
    handleOf(a.lse, 'lse', op),
    ...keysOf(a, op),
    a.scale,
    a.deterministic ?? true,
    a.kernel,
  )
  if (!Array.isArray(gradients)) return held({ dQkv: wrap<D>(device, gradients) })
  const [dQ, dK, dV] = gradients
  return held({ dQ: wrap<D>(device, dQ), dK: wrap<D>(device, dK), dV: wrap<D>(device, dV) })
}

/** The arguments of `attentionMass`: the input of `attention`, of which v is not needed, and its lse. */
export type AttentionMassArgs<D extends FloatDType = FloatDType> = (
  | (Omit<SeparateHeads<D>, 'k' | 'v'> & {
      /** As q in shape and type. */
      k: Tensor<NoInfer<D>>
    })
  | PackedHeads<D>
) &
  AttentionOptions & {
    /** From `attention` with the same input. */
    lse: Tensor<'f32'>
  }

const massNames: Names<AttentionMassArgs & { v: unknown }> = {
  ...headNames,
  ...optionNames,
  lse: true,
}

/**
 * How much probability each key receives from all queries of its sequence, the column sums of the
 * attention matrix: a saliency map that costs half a forward pass.
 *
 * @returns f32 [H, T]; a sequence's values sum to its length in each head.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for cuSeqlens and scale;
 *   ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { attention, attentionMass, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const qkv = device.zeros([4, 3, 1, 8])
 * const { lse } = attention({ qkv, cuSeqlens: [0, 4] })
 * console.log(await attentionMass({ qkv, lse, cuSeqlens: [0, 4] }).read()) // about 1, 1, 1, 1
 * device.dispose()
 * ```
 */
export function attentionMass<D extends FloatDType>(a: AttentionMassArgs<D>): Tensor<'f32'> {
  const op = 'attentionMass'
  a = checkArguments(a, massNames, op)
  const { device } = firstOf(a, op)
  const [q, k, , qkv, cos, sin] = inputs(a, op)
  const mass = native().ops.attention_mass!(
    q,
    k,
    qkv,
    cos,
    sin,
    handleOf(a.lse, 'lse', op),
    hostInts(a.cuSeqlens, 'cuSeqlens', op),
    a.scale,
  )
  return wrap<'f32'>(device, mass)
}

// cuSeqlens, causal, cuSeqlensK and sharedKeys as the addon takes them.
function keysOf(a: AttentionOptions & CausalArgs, op: string): unknown[] {
  const { cuSeqlens, causal = false, cuSeqlensK, sharedKeys } = a
  return [
    hostInts(cuSeqlens, 'cuSeqlens', op),
    checkBoolean(causal, 'causal', op),
    cuSeqlensK === undefined ? undefined : hostInts(cuSeqlensK, 'cuSeqlensK', op),
    sharedKeys === undefined ? undefined : rangesOf(sharedKeys, op),
  ]
}

function rangesOf(ranges: NonNullable<CausalArgs['sharedKeys']>, op: string): Float64Array {
  const given = checkArray(ranges, 'sharedKeys', op)
  const out = new Float64Array(2 * given.length)
  given.forEach((range, s) => {
    const pair = hostInts(range, `sharedKeys[${s}]`, op)
    if (pair.length !== 2)
      refuse(
        'ERR_VALUE',
        op,
        `sharedKeys[${s}] must be [start, length], got ${pair.length} numbers`,
      )
    out.set(pair, 2 * s)
  })
  return out
}

type Unchecked = { q?: unknown; k?: unknown; v?: unknown; qkv?: unknown; rotary?: unknown }

const rotaryNames: Names<RotaryTables> = { cos: true, sin: true }

function firstOf(a: object, op: string): Tensor {
  const { q, qkv } = a as Unchecked
  const [tensor, name] = qkv === undefined ? [q, 'q'] : [qkv, 'qkv']
  if (tensor === undefined) refuse('ERR_VALUE', op, 'give either q, k and v or qkv')
  handleOf(tensor, name, op)
  return tensor as Tensor
}

// q, k, v, qkv, cos, sin as the addon takes them.
function inputs(a: object, op: string): unknown[] {
  const { q, k, v, qkv, rotary } = a as Unchecked
  if (qkv !== undefined && (q !== undefined || k !== undefined || v !== undefined))
    refuse('ERR_VALUE', op, 'give either q, k and v or qkv, not both')
  const handles = [
    maybeHandle(q, 'q', op),
    maybeHandle(k, 'k', op),
    maybeHandle(v, 'v', op),
    maybeHandle(qkv, 'qkv', op),
  ]
  if (rotary === undefined) return [...handles, null, null]
  const { cos, sin } = checkArguments(rotary as Partial<RotaryTables>, rotaryNames, op, 'rotary')
  return [...handles, handleOf(cos, 'rotary.cos', op), handleOf(sin, 'rotary.sin', op)]
}

/** Operations with a choice of kernels. */
export type KernelOperation = 'attention' | (string & {})

/**
 * The kernels that an operation with a `kernel` option can run on a device, in order of preference.
 *
 * @param op 'attention' is the only one with a choice.
 * @throws P2RError ERR_VALUE for an operation without a choice; ERR_DISPOSED.
 * @example
 * ```js
 * import { kernels, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * console.log(kernels('attention', device)) // [ 'tiled' ]
 * device.dispose()
 * ```
 */
export function kernels(op: KernelOperation, device: Device): readonly string[] {
  checkString(op, 'op', 'kernels')
  return checkDevice(device, 'kernels').handle.kernels(op)
}

/** The arguments of `windowLayout`. */
export interface WindowLayoutArgs {
  /** The patches [t, h, w] of each image or video; h and w are multiples of mergeSize. */
  gridThw: readonly Grid[]
  /** A window's side in merge units. */
  window: number
  /**
   * Patches a side of a merge unit.
   *
   * @default 2
   */
  mergeSize?: number
}

/** How tokens (patches, in merge-block order) are cut into windows. */
export interface WindowLayout {
  /** The token at each position of the windowed order: for `gatherRows`. */
  index: Int32Array
  /** The position of each token. */
  inverse: Int32Array
  /** The windows as packed sequences of tokens. */
  cuSeqlens: Int32Array
}

const windowNames: Names<WindowLayoutArgs> = { gridThw: true, window: true, mergeSize: true }

/**
 * Cuts grids of patches into square windows, as Qwen2.5-VL's window attention does (Bai et al.,
 * Qwen2.5-VL, 2025): frame by frame, windows row by row, each with its merge units row by row. A
 * window at an edge is cut off there.
 *
 * @throws P2RError ERR_VALUE for a grid or window that does not fit; ERR_SHAPE for 2^31 patches or more.
 * @example
 * ```js
 * import { windowLayout } from 'p2r-kernels'
 *
 * const { index, cuSeqlens } = windowLayout({ gridThw: [[1, 4, 4]], window: 1, mergeSize: 2 })
 * console.log(index.length, cuSeqlens) // 16 Int32Array(5) [ 0, 4, 8, 12, 16 ]
 * ```
 */
export function windowLayout(a: WindowLayoutArgs): WindowLayout {
  const op = 'windowLayout'
  a = checkArguments(a, windowNames, op)
  const mergeSize = checkInt32(a.mergeSize ?? 2, 1, 'mergeSize', op)
  const window = checkInt32(a.window, 1, 'window', op)
  const grids = checkGrids(a.gridThw, mergeSize, op)
  const total = grids.reduce((sum, [t, h, w]) => sum + t * h * w, 0)
  if (total > 2 ** 31 - 1)
    refuse('ERR_SHAPE', op, `the grids must hold at most 2147483647 patches, got ${total}`)

  const index = new Int32Array(total)
  const ends = [0]
  const tokensOfUnit = mergeSize * mergeSize
  let at = 0
  let frameStart = 0
  for (const [t, h, w] of grids) {
    const rows = h / mergeSize
    const columns = w / mergeSize
    for (let frame = 0; frame < t && h * w > 0; frame++, frameStart += h * w)
      for (let top = 0; top < rows; top += window)
        for (let left = 0; left < columns; left += window) {
          const bottom = Math.min(top + window, rows)
          const right = Math.min(left + window, columns)
          for (let row = top; row < bottom; row++) {
            // The merge units of one row are contiguous.
            let token = frameStart + (row * columns + left) * tokensOfUnit
            for (let n = (right - left) * tokensOfUnit; n > 0; n--) index[at++] = token++
          }
          ends.push(at)
        }
  }
  const inverse = new Int32Array(total)
  for (let i = 0; i < total; i++) inverse[index[i]!] = i
  return { index, inverse, cuSeqlens: Int32Array.from(ends) }
}
