import { checkInt32 } from '../arguments.js'
import { checkDevice, type Device } from '../device.js'
import { checkGrids, type Grid } from '../grid.js'
import { native } from '../native.js'
import { type Held, handleOf, held, type Tensor, wrap } from '../tensor.js'

/**
 * The two-dimensional rotary tables of the Qwen-VL vision towers (Wang et al., Qwen2-VL, 2024):
 * each half of a row holds headDim / 4 angles of the patch's row, then as many of its column.
 *
 * @param a.gridThw the patches [t, h, w] of each image or video; h and w are multiples of mergeSize.
 * @param a.headDim D, a multiple of 8 from 8 to 128.
 * @param a.theta the base of the frequencies, 10000 unless given.
 * @param a.mergeSize patches a side of a merge block, 2 unless given.
 * @returns f32 [T, D] each, T = Σ t·h·w, tokens in merge-block order. Angles are products in f32, as
 *   the models compute them.
 * @throws ERR_SHAPE for another head dimension, ERR_VALUE for a grid that does not fit.
 */
export function visionRotary(a: {
  gridThw: readonly Grid[]
  headDim: number
  theta?: number
  mergeSize?: number
  device: Device
}): Held<{ cos: Tensor<'f32'>; sin: Tensor<'f32'> }> {
  const op = 'visionRotary'
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

/**
 * Rotates each head of each token by its row of the tables, in the rotate-half form (Su et al.,
 * RoFormer, 2021; pairs i and i + D/2).
 *
 * @param a.x [T, H, D], f32 | f16 | bf16, D a multiple of 8 from 8 to 128.
 * @param a.cos @param a.sin f32 [T, D].
 * @param a.inverse applies the transpose: the inverse rotation, which is also the gradient.
 * @returns as x in shape and type, rounded once.
 */
export function applyRotary(a: { x: Tensor; cos: Tensor; sin: Tensor; inverse?: boolean }): Tensor {
  const op = 'applyRotary'
  const out = native().ops.apply_rotary!(
    handleOf(a.x, 'x', op),
    handleOf(a.cos, 'cos', op),
    handleOf(a.sin, 'sin', op),
    a.inverse ?? false,
  )
  return wrap(a.x.device, out)
}
