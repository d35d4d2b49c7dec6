import { checkInt32, checkString, describeValue, hostInts } from '../arguments.js'
import { checkDevice, type Device } from '../device.js'
import { refuse } from '../errors.js'
import { checkGrids, type Grid } from '../grid.js'
import { native } from '../native.js'
import { type Held, handleOf, held, type Ints, maybeHandle, type Tensor, wrap } from '../tensor.js'

type Rotary = { cos: Tensor; sin: Tensor }
type Packed = { qkv: Tensor; rotary?: Rotary }
type Separate = { q: Tensor; k: Tensor; v: Tensor }
type Options = { cuSeqlens: Ints; scale?: number }

/**
 * Either q, k and v, [T, H, D] each, or one qkv [T, 3, H, D] as a fused projection writes it, to
 * which rotary tables [T, D] can be applied in the same call.
 */
export type AttentionInput = (Separate | Packed) & Options & { kernel?: string }

/**
 * softmax(scale · q kᵀ) v within each packed sequence and head, every key visible to every query of
 * its sequence (Dao et al., FlashAttention, 2022). No T × T matrix is materialized.
 *
 * @param a.q @param a.k @param a.v [T, H, D], f32 | f16 | bf16, D a multiple of 8 from 8 to 128.
 * @param a.qkv [T, 3, H, D] instead of them; it is read in place, without a copy.
 * @param a.rotary f32 [T, D] tables, applied to q and k as `applyRotary` does.
 * @param a.cuSeqlens where the sequences begin and end: 0 = c₀ ≤ c₁ ≤ … = T.
 * @param a.scale 1/√D unless given.
 * @param a.kernel one of `kernels('attention', device)`.
 * @returns out [T, H, D] of the input's type; lse f32 [H, T], the natural logarithm of each query's
 *   Σ exp(logit). A query whose logits are all -∞ has lse -∞ and NaN in out; a logit of NaN or +∞
 *   makes both NaN for its query.
 * @throws ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for cuSeqlens, scale, kernel.
 */
export function attention(a: AttentionInput): Held<{ out: Tensor; lse: Tensor<'f32'> }> {
  const op = 'attention'
  const { device } = firstOf(a, op)
  const [out, lse] = native().ops.attention!(
    ...inputs(a, op),
    hostInts(a.cuSeqlens, 'cuSeqlens', op),
    a.scale,
    a.kernel,
  ) as [unknown, unknown]
  return held({ out: wrap(device, out), lse: wrap<'f32'>(device, lse) })
}

type Backward = {
  dOut: Tensor
  out: Tensor
  lse: Tensor
  deterministic?: boolean
  kernel?: string
} & Options

/**
 * The gradients of `attention`, given its out and lse and the gradient dOut of out. Repeats bit for
 * bit.
 *
 * @param a.deterministic false lets the kernel 'wgmma' (f16 and bf16 on Hopper) sum up dQ in one
 *   pass, in an order that changes from run to run, with a workspace of 4·T·H·D bytes, with rotary
 *   too. The other kernels, including the CPU's, ignore it.
 * @returns dQ, dK and dV like q, k and v; or dQkv like qkv, rotated back through the tables.
 */
export function attentionBackward(
  a: Separate & Backward,
): Held<{ dQ: Tensor; dK: Tensor; dV: Tensor }>
export function attentionBackward(a: Packed & Backward): Held<{ dQkv: Tensor }>
export function attentionBackward(
  a: (Separate | Packed) & Backward,
): Held<{ dQ: Tensor; dK: Tensor; dV: Tensor }> | Held<{ dQkv: Tensor }> {
  const op = 'attentionBackward'
  const { device } = firstOf(a, op)
  const gradients = native().ops.attention_backward!(
    ...inputs(a, op),
    handleOf(a.dOut, 'dOut', op),
    handleOf(a.out, 'out', op),
    handleOf(a.lse, 'lse', op),
    hostInts(a.cuSeqlens, 'cuSeqlens', op),
    a.scale,
    a.deterministic ?? true,
    a.kernel,
  )
  if (!Array.isArray(gradients)) return held({ dQkv: wrap(device, gradients) })
  const [dQ, dK, dV] = gradients
  return held({ dQ: wrap(device, dQ), dK: wrap(device, dK), dV: wrap(device, dV) })
}

/**
 * How much probability each key receives from all queries of its sequence, the column sums of the
 * attention matrix: a saliency map that costs half a forward pass.
 *
 * @param a.lse from `attention` with the same input.
 * @returns f32 [H, T]; a sequence's values sum to its length in each head.
 */
export function attentionMass(
  a: ({ q: Tensor; k: Tensor } | Packed) & { lse: Tensor } & Options,
): Tensor<'f32'> {
  const op = 'attentionMass'
  const { device } = firstOf(a, op)
  const [q, k, , qkv, cos, sin] = inputs({ v: undefined, ...a }, op)
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

type Unchecked = { q?: unknown; k?: unknown; v?: unknown; qkv?: unknown; rotary?: unknown }

function firstOf(a: object, op: string): Tensor {
  const { q, qkv } = a as Unchecked
  const [tensor, name] = qkv === undefined ? [q, 'q'] : [qkv, 'qkv']
  handleOf(tensor, name, op)
  return tensor as Tensor
}

// q, k, v, qkv, cos, sin as the addon takes them.
function inputs(a: object, op: string): unknown[] {
  const { q, k, v, qkv, rotary } = a as Unchecked
  if (qkv !== undefined && (q !== undefined || k !== undefined || v !== undefined))
    refuse('ERR_VALUE', op, 'give either q, k and v or qkv, not both')
  if (rotary !== undefined && (typeof rotary !== 'object' || rotary === null))
    refuse('ERR_VALUE', op, `rotary must hold cos and sin, got ${describeValue(rotary)}`)
  const { cos, sin } = (rotary ?? {}) as Partial<Rotary>
  const handles = Object.entries({ q, k, v, qkv }).map(([name, x]) => maybeHandle(x, name, op))
  if (rotary === undefined) return [...handles, null, null]
  return [...handles, handleOf(cos, 'rotary.cos', op), handleOf(sin, 'rotary.sin', op)]
}

/** The kernels that an operation with a `kernel` option can run on a device, the default first. */
export function kernels(op: string, device: Device): readonly string[] {
  checkDevice(device, 'kernels')
  return device.handle.kernels(checkString(op, 'op', 'kernels'))
}

/**
 * Cuts grids of patches into square windows, as Qwen2.5-VL's window attention does (Bai et al.,
 * Qwen2.5-VL, 2025): frame by frame, windows row by row, each with its merge units row by row. A
 * window at an edge is cut off there.
 *
 * @param a.gridThw patches [t, h, w]; h and w are multiples of mergeSize.
 * @param a.window merge units a side.
 * @param a.mergeSize patches a side of a merge unit, 2 unless given.
 * @returns index: the token (patch, in merge-block order) at each position of the windowed order;
 *   inverse: the position of each token; cuSeqlens: the windows as packed sequences of tokens.
 */
export function windowLayout(a: { gridThw: readonly Grid[]; window: number; mergeSize?: number }): {
  index: Int32Array
  inverse: Int32Array
  cuSeqlens: Int32Array
} {
  const op = 'windowLayout'
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
