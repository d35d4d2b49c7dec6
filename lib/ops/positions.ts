import { checkArguments, checkInt32, type Names } from '../arguments.js'
import type { FloatDType } from '../dtype.js'
import { checkGrids, type Grid } from '../grid.js'
import { native } from '../native.js'
import { handleOf, type Tensor, wrap } from '../tensor.js'

/** The arguments of `visionPositions`. */
export interface VisionPositionsArgs<D extends FloatDType = FloatDType> {
  /** [S², C], f32 | f16 | bf16: the embedding of row y and column x is row y·S + x. */
  table: Tensor<D>
  /** The patches [t, h, w] of each image or video; h and w are multiples of mergeSize. */
  gridThw: readonly Grid[]
  /**
   * Patches a side of a merge block.
   *
   * @default 2
   */
  mergeSize?: number
}

const names: Names<VisionPositionsArgs> = { table: true, gridThw: true, mergeSize: true }

/**
 * The learned position embeddings of the Qwen3-VL vision tower: a square table stretched over each grid
 * of patches by bilinear interpolation, corner to corner (Hugging Face transformers,
 * `fast_pos_embed_interpolate`). Every frame of a grid gets the same.
 *
 * @returns [T, C], of the table's type, T = Σ t·h·w, tokens in merge-block order.
 * @throws P2RError ERR_SHAPE for a table whose rows are no square number; ERR_DTYPE; ERR_VALUE for a grid
 *   that does not fit; ERR_DISPOSED.
 * @example
 * ```js
 * import { openDevice, visionPositions } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const table = device.tensor([0, 1, 2, 3], [4, 1]) // S = 2
 * const positions = visionPositions({ table, gridThw: [[1, 2, 2]], mergeSize: 1 })
 * console.log(await positions.read()) // Float32Array(4) [ 0, 1, 2, 3 ]
 * device.dispose()
 * ```
 */
export function visionPositions<D extends FloatDType>(a: VisionPositionsArgs<D>): Tensor<D> {
  const op = 'visionPositions'
  a = checkArguments(a, names, op)
  const mergeSize = checkInt32(a.mergeSize ?? 2, 1, 'mergeSize', op)
  const grids = checkGrids(a.gridThw, mergeSize, op)
  const out = native().ops.vision_positions!(
    handleOf(a.table, 'table', op),
    Float64Array.from(grids.flat()),
    mergeSize,
  )
  return wrap(a.table.device, out)
}
