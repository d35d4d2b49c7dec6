import { checkArguments, checkInt32, hostInts, type Names } from '../arguments.js'
import { checkDevice, type Device } from '../device.js'
import type { FloatDType } from '../dtype.js'
import { checkGrids, type Grid } from '../grid.js'
import { native } from '../native.js'
import { type Held, handleOf, held, type Ints, type Tensor, wrap } from '../tensor.js'

/** The arguments of `visionRotary`. */
export interface VisionRotaryArgs {
  /** The patches [t, h, w] of each image or video; h and w are multiples of mergeSize. */
  gridThw: readonly Grid[]
  /** D, a multiple of 8 from 8 to 128. */
  headDim: number
  /**
   * The base of the frequencies, greater than 0.
   *
   * @default 10000
   */
  theta?: number
  /**
   * Patches a side of a merge block.
   *
   * @default 2
   */
  mergeSize?: number
  /** Where the tables are made. */
  device: Device
}

/** Rotary tables: the cosine and sine of every angle, of every token. */
export interface RotaryTables {
  /** f32 [T, D]. */
  cos: Tensor<'f32'>
  /** f32 [T, D]. */
  sin: Tensor<'f32'>
}

const visionNames: Names<VisionRotaryArgs> = {
  gridThw: true,
  headDim: true,
  theta: true,
  mergeSize: true,
  device: true,
}

/**
 * The two-dimensional rotary tables of the Qwen-VL vision towers (Wang et al., Qwen2-VL, 2024):
 * each half of a row holds headDim / 4 angles of the patch's row, then as many of its column. Angles
 * are products in f32, as the models compute them.
 *
 * @returns tables of T = Σ t·h·w tokens in merge-block order.
 * @throws P2RError ERR_VALUE for another head dimension or a grid that does not fit; ERR_DISPOSED.
 * @example
 * ```js
 * import { openDevice, visionRotary } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const { cos, sin } = visionRotary({ gridThw: [[1, 4, 4]], headDim: 64, device })
 * console.log(cos.shape, sin.shape) // [ 16, 64 ] [ 16, 64 ]
 * device.dispose()
 * ```
 */
export function visionRotary(a: VisionRotaryArgs): Held<RotaryTables> {
  const op = 'visionRotary'
  a = checkArguments(a, visionNames, op)
  checkDevice(a.device, op)
  const mergeSize = checkInt32(a.mergeSize ?? 2, 1, 'mergeSize', op)
  const grids = checkGrids(a.gridThw, mergeSize, op)
  const [cos, sin] = native().ops.vision_rotary!(
    a.device.handle,
    Float64Array.from(grids.flat()),
    a.headDim,
    a.theta ?? 10000,
    mergeSize,
  ) as [unknown, unknown]
  return held({ cos: wrap<'f32'>(a.device, cos), sin: wrap<'f32'>(a.device, sin) })
}

/** The arguments of `mropeTables`. */
export interface MropeTablesArgs {
  /**
   * Positions in time, height and width, [3, T] row by row, as `ropeIndex` returns them; without sections one for
   * each of T tokens. Integers of at least 0.
   */
  positions: Ints
  /** D, a multiple of 8 from 8 to 128. */
  headDim: number
  /** The base of the frequencies, greater than 0: a model's `rope_theta`. */
  theta: number
  /**
   * How many of the D/2 frequencies turn with time, height and width: a model's `mrope_section`, interleaved.
   *
   * @default all turn with the one position of a token
   */
  sections?: readonly [time: number, height: number, width: number]
  /** Where the tables are made. */
  device: Device
}

const mropeNames: Names<MropeTablesArgs> = {
  positions: true,
  headDim: true,
  theta: true,
  sections: true,
  device: true,
}

/**
 * The multimodal rotary tables of Qwen3-VL's language model, in which frequency i turns with height where
 * i mod 3 = 1 and i < 3·sections[1], with width where i mod 3 = 2 and i < 3·sections[2], and else with time;
 * without sections those of any language model with rotary embedding in the half form. Angles are products in f32,
 * as the models compute them. The rows of a token depend on its positions alone, bit for bit.
 *
 * @returns tables of T tokens, for `applyRotary` and `attention`.
 * @throws P2RError ERR_VALUE for another head dimension, sections that do not add up to half of it, or positions
 *   that are not three for each token; ERR_DISPOSED.
 * @example
 * ```js
 * import { mropeTables, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const a = { headDim: 8, theta: 5e6, device }
 * const text = mropeTables({ ...a, positions: [0, 1, 2] })
 * const image = mropeTables({ ...a, positions: [4, 4, 4, 5, 4, 5], sections: [2, 1, 1] })
 * console.log(text.cos.shape, image.cos.shape) // [ 3, 8 ] [ 2, 8 ]
 * device.dispose()
 * ```
 */
export function mropeTables(a: MropeTablesArgs): Held<RotaryTables> {
  const op = 'mropeTables'
  a = checkArguments(a, mropeNames, op)
  checkDevice(a.device, op)
  const [cos, sin] = native().ops.mrope_tables!(
    a.device.handle,
    hostInts(a.positions, 'positions', op),
    a.headDim,
    a.theta,
    a.sections === undefined ? undefined : hostInts(a.sections, 'sections', op),
  ) as [unknown, unknown]
  return held({ cos: wrap<'f32'>(a.device, cos), sin: wrap<'f32'>(a.device, sin) })
}

/** The arguments of `applyRotary`. */
export interface ApplyRotaryArgs<D extends FloatDType = FloatDType> extends RotaryTables {
  /** [T, H, D], f32 | f16 | bf16, D a multiple of 8 from 8 to 128. */
  x: Tensor<D>
  /**
   * Applies the transpose: the inverse rotation, which is also the gradient.
   *
   * @default false
   */
  inverse?: boolean
}

const applyNames: Names<ApplyRotaryArgs> = { x: true, cos: true, sin: true, inverse: true }

/**
 * Rotates each head of each token by its row of the tables, in the rotate-half form (Su et al.,
 * RoFormer, 2021; pairs i and i + D/2), in f32, rounded once.
 *
 * @returns as x in shape and type.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { applyRotary, openDevice, visionRotary } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const { cos, sin } = visionRotary({ gridThw: [[1, 2, 2]], headDim: 8, device })
 * const x = device.zeros([4, 1, 8])
 * console.log(applyRotary({ x, cos, sin }).shape) // [ 4, 1, 8 ]
 * device.dispose()
 * ```
 */
export function applyRotary<D extends FloatDType>(a: ApplyRotaryArgs<D>): Tensor<D> {
  const op = 'applyRotary'
  a = checkArguments(a, applyNames, op)
  const out = native().ops.apply_rotary!(
    handleOf(a.x, 'x', op),
    handleOf(a.cos, 'cos', op),
    handleOf(a.sin, 'sin', op),
    a.inverse ?? false,
  )
  return wrap(a.x.device, out)
}
