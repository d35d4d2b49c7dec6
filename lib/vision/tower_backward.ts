/**
 * The backward pass of the vision tower: what its forward pass keeps, and each step in reverse.
 */
import type { Gradients } from '../gradients.js'
import type { Grid } from '../grid.js'
import { attentionBackward } from '../ops/attention.js'
import { add, mul } from '../ops/elementwise.js'
import { type GeluForm, gelu, geluBackward } from '../ops/gelu.js'
import { layerNormBackward } from '../ops/layer_norm.js'
import { concat } from '../ops/rearrange.js'
import type { RotaryTables } from '../ops/rotary.js'
import { scope } from '../scope.js'
import { disposeAll, type Tensor } from '../tensor.js'

/** What a layer norm's backward needs. */
export interface NormRecord {
  x: Tensor
  out: Tensor
  stats: Tensor<'f32'>
}

/** The first half of a block: x + proj(attention(qkv(norm1(x)))). */
export interface AttentionRecord {
  norm: NormRecord
  /** [T, 3, heads, headDim]. */
  qkv: Tensor
  out: Tensor
  lse: Tensor<'f32'>
}

/** fc2(gelu(fc1(x))). */
export interface MlpRecord {
  x: Tensor
  /** Before the GELU, which is computed again. */
  inner: Tensor
}

/** A block: its input alone where it is to be computed again. */
export interface BlockRecord {
  input: Tensor
  attention?: AttentionRecord
  norm?: NormRecord
  mlp?: MlpRecord
}

/** A merger of patches: its input alone where it is to be computed again. */
export interface MergerRecord {
  input: Tensor
  norm?: NormRecord
  mlp?: MlpRecord
}

/** One pass of patches through the tower. */
export interface TowerRecord {
  pixels: Tensor
  grids: readonly Grid[]
  rotary: RotaryTables
  cuSeqlens: readonly number[]
  blocks: BlockRecord[]
  /** By the place of their name: `deepstack_merger_list.0`, ..., then `merger`. */
  mergers: Map<string, MergerRecord>
}

/** The tower as its backward pass needs it. */
export interface TowerParts {
  weight(name: string): Tensor
  /** Of the blocks' MLPs; the mergers have the exact one. */
  activation: GeluForm
  mergeSize: number
  deepstack: readonly number[]
  block(i: number, input: Tensor, record: TowerRecord): Required<BlockRecord>
  merger(name: string, input: Tensor): Required<MergerRecord>
}

/** The gradients of a tower's results; undefined is 0. */
export interface TowerGradients {
  merged: Tensor | undefined
  deepstack: readonly (Tensor | undefined)[]
}

/**
 * Adds the gradients of all weights, and returns that of the pixels. What a block has kept is disposed as soon as
 * nothing needs it.
 */
export function towerBackward(
  tower: TowerParts,
  record: TowerRecord,
  { merged, deepstack }: TowerGradients,
  gradients: Gradients,
): Tensor {
  const { blocks, mergers, pixels, grids } = record
  const merge = (name: string, dOut: Tensor): Tensor =>
    mergerBackward(tower, name, mergers.get(name)!, dOut, gradients)
  let { d } = scope(() => {
    const { input } = mergers.get('merger')!
    const none = () => input.device.zeros(input.shape, input.dtype)
    return { d: merged ? merge('merger', merged) : none(), gradients }
  })
  for (let i = blocks.length - 1; i >= 0; i--) {
    const dOut = d
    ;({ d } = scope(() => {
      const merger = tower.deepstack.indexOf(i)
      const dFeature = deepstack[merger]
      const total = dFeature
        ? add({ x: dOut, y: merge(`deepstack_merger_list.${merger}`, dFeature) })
        : dOut
      // The input of the block after this one was this merger's too.
      disposeAll([blocks[i + 1] ?? mergers.get('merger')])
      disposeAll([mergers.get(`deepstack_merger_list.${merger}`)])
      return { d: blockBackward(tower, i, record, total, gradients), gradients }
    }))
    dOut.dispose()
  }
  disposeAll(blocks[0])
  return scope(() => {
    const table = tower.weight('pos_embed.weight')
    if (gradients.wants('pos_embed.weight')) {
      const { index, rows } = positionsBackward(d, grids, table.shape[0]!, tower.mergeSize)
      gradients.addRows('pos_embed.weight', rows, index, table.shape[0]!)
    }
    const dX = linearStep(tower, gradients)('patch_embed.proj', d, pixels)
    d.dispose()
    return { dX, gradients }
  }).dX
}

function blockBackward(
  tower: TowerParts,
  i: number,
  record: TowerRecord,
  d: Tensor,
  gradients: Gradients,
): Tensor {
  const kept = record.blocks[i]!
  const { attention, norm, mlp } = kept.attention
    ? (kept as Required<BlockRecord>)
    : tower.block(i, kept.input, record)
  const block = `blocks.${i}`
  const step = linearStep(tower, gradients)
  const middle = scope(() => {
    const dNormed = mlpBackward(tower, `${block}.mlp`, mlp, d, gradients, tower.activation)
    const dX = normBackward(tower, `${block}.norm2`, norm, dNormed, gradients)
    return { dX: add({ x: d, y: dX }), gradients }
  }).dX
  const { qkv, out, lse } = attention
  const dOut = step(`${block}.attn.proj`, middle, out.reshape(d.shape)).reshape(out.shape)
  const { rotary, cuSeqlens } = record
  const { dQkv } = attentionBackward({ qkv, rotary, cuSeqlens, dOut, out, lse })
  const flat = dQkv.reshape([d.shape[0]!, dQkv.size / Math.max(1, d.shape[0]!)])
  const dNormed = step(`${block}.attn.qkv`, flat, attention.norm.out)
  const dX = normBackward(tower, `${block}.norm1`, attention.norm, dNormed, gradients)
  return add({ x: middle, y: dX })
}

function mergerBackward(
  tower: TowerParts,
  name: string,
  kept: MergerRecord,
  d: Tensor,
  gradients: Gradients,
): Tensor {
  const { input, norm, mlp } = kept.mlp
    ? (kept as Required<MergerRecord>)
    : tower.merger(name, kept.input)
  const dJoined = mlpBackward(tower, name, mlp, d, gradients, 'none')
  const dX = normBackward(tower, `${name}.norm`, norm, dJoined.reshape(norm.x.shape), gradients)
  return dX.reshape(input.shape)
}

function mlpBackward(
  tower: TowerParts,
  name: string,
  { x, inner }: MlpRecord,
  d: Tensor,
  gradients: Gradients,
  approximate: GeluForm,
): Tensor {
  const step = linearStep(tower, gradients)
  const dActivated = step(`${name}.linear_fc2`, d, gelu({ x: inner, approximate }))
  const dInner = geluBackward({ dOut: dActivated, x: inner, approximate })
  return step(`${name}.linear_fc1`, dInner, x)
}

function linearStep(tower: TowerParts, gradients: Gradients) {
  return (name: string, dOut: Tensor, x: Tensor): Tensor =>
    gradients.linear(name, {
      dOut,
      x,
      weight: tower.weight(`${name}.weight`),
      bias: tower.weight(`${name}.bias`),
    })
}

function normBackward(
  tower: TowerParts,
  name: string,
  { x, stats }: NormRecord,
  dOut: Tensor,
  gradients: Gradients,
): Tensor {
  const weight = tower.weight(`${name}.weight`)
  const { dX, dWeight, dBias } = layerNormBackward({ dOut, x, weight, stats })
  gradients.add(`${name}.weight`, dWeight)
  gradients.add(`${name}.bias`, dBias)
  return dX
}

/**
 * The gradient of the interpolated position embeddings: each patch adds its gradient to four rows of the table, by the
 * weights of `visionPositions` (ops/positions.h).
 */
function positionsBackward(
  d: Tensor,
  grids: readonly Grid[],
  tableRows: number,
  merge: number,
): { index: Int32Array; rows: Tensor<'f32'> } {
  const side = Math.round(Math.sqrt(tableRows))
  const patches = d.shape[0]!
  const index = new Int32Array(4 * patches)
  const weights = new Float32Array(4 * patches)
  let at = 0
  for (const [frames, h, w] of grids) {
    const [rows, columns] = [samples(h, side), samples(w, side)]
    for (let frame = 0; frame < frames; frame++)
      for (let block = 0; block < (h * w) / merge ** 2; block++)
        for (let inside = 0; inside < merge ** 2; inside++, at++) {
          const across = w / merge
          const y = rows[Math.floor(block / across) * merge + Math.floor(inside / merge)]!
          const x = columns[(block % across) * merge + (inside % merge)]!
          const corners = [
            [y.low * side + x.low, (1 - y.part) * (1 - x.part)],
            [y.low * side + x.high, (1 - y.part) * x.part],
            [y.high * side + x.low, y.part * (1 - x.part)],
            [y.high * side + x.high, y.part * x.part],
          ] as const
          corners.forEach(([row, weight], corner) => {
            index[corner * patches + at] = row
            weights[corner * patches + at] = weight
          })
        }
  }
  const wide = d.dtype === 'f32' ? d : d.cast('f32')
  const tensors = [0, 1, 2, 3].map((corner) => {
    const part = weights.subarray(corner * patches, (corner + 1) * patches)
    return mul({ x: wide, y: d.device.tensor(part, [patches, 1]) })
  })
  return { index, rows: concat({ tensors }) as Tensor<'f32'> }
}

/** Of each of n rows or columns the two of the table that it lies between, and the part of the second. */
function samples(n: number, side: number): { low: number; high: number; part: number }[] {
  const last = side - 1
  const step = n > 1 ? Math.fround(last / (n - 1)) : 0
  return Array.from({ length: n }, (_, i) => {
    const fromStart = i < Math.floor(n / 2) || n === 1
    const position = fromStart
      ? Math.fround(step * i)
      : Math.fround(last - Math.fround(step * (n - 1 - i)))
    const low = Math.floor(position)
    return { low, high: Math.min(low + 1, last), part: position - low }
  })
}
