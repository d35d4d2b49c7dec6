import { checkInt32 } from '../arguments.js'
import { checkGrids, type Grid } from '../grid.js'
import { native } from '../native.js'
import { handleOf, type Tensor, wrap } from '../tensor.js'

/**
 * The learned position embeddings of the Qwen3-VL vision tower: a square table stretched over each grid
 * of patches by bilinear interpolation, corner to corner (Hugging Face transformers,
 * `fast_pos_embed_interpolate`). Every frame of a grid gets the same.
 *
 * @param a.table [S², C], f32 | f16 | bf16: the embedding of row y and column x is row y·S + x.
 * @param a.gridThw the patches [t, h, w] of each image or video; h and w are multiples of mergeSize.
 * @param a.mergeSize patches a side of a merge block, 2 unless given.
 * @returns [T, C] as the table, T = Σ t·h·w, tokens in merge-block order.
 * @throws ERR_SHAPE for a table whose rows are no square number, ERR_VALUE for a grid that does not fit.
 */
export function visionPositions(a: {
  table: Tensor
  gridThw: readonly Grid[]
  mergeSize?: number
}): Tensor {
  const op = 'visionPositions'
  const mergeSize = checkInt32(a.mergeSize ?? 2, 1, 'mergeSize', op)
  const grids = checkGrids(a.gridThw, mergeSize, op)
  const out = native().ops.vision_positions!(
    handleOf(a.table, 'table', op),
    Float64Array.from(grids.flat()),
    mergeSize,
  )
  return wrap(a.table.device, out)
}
