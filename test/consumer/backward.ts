// Gradients of whole models as a strict consumer uses them. It is compiled, never run.
import {
  type Checkpoint,
  type CheckpointOption,
  type Patches,
  type Qwen3VL,
  type Qwen3VLBackwardArgs,
  type Qwen3VLGradients,
  Qwen3VLRecord,
  type Qwen3VLRecordArgs,
  type Qwen3VLRecordBackwardArgs,
  type RecordPatchesArgs,
  type Tensor,
  type TrainableOption,
  type VisionGradients,
  VisionRecord,
  type VisionRecordBackwardArgs,
  type VisionTower,
  type VisionTowerBackwardArgs,
} from 'p2r-kernels'

export function record(model: Qwen3VL, dLogProbs: Tensor<'f32'>): Tensor[] {
  const checkpoint: Checkpoint = 'block'
  const kept: CheckpointOption = { checkpoint }
  const trained: TrainableOption = { trainable: (name) => !name.startsWith('model.visual.') }
  const packed = { tokens: [1, 2, 3], cuSeqlens: [0, 2, 3], prefixOf: [-1, 0] }
  const a: Qwen3VLRecordArgs = { ...packed, ...kept, ...trained, targets: [2] }
  using pass: Qwen3VLRecord = model.record(a)
  const back: Qwen3VLRecordBackwardArgs = { dLogProbs, dEntropy: dLogProbs }
  const { gradients, dInputs }: Qwen3VLGradients = pass.backward(back)
  const whole: Qwen3VLBackwardArgs = { ...packed, dLogProbs, into: gradients, inputs: true }
  const { dPixels } = model.backward(whole)
  const [weight] = model.parameters().values()
  return [dInputs, dPixels, weight].filter((tensor) => tensor !== undefined)
}

export function tower(loaded: VisionTower, patches: Patches): Record<string, Tensor<'f32'>> {
  const a: RecordPatchesArgs = { ...patches, inputs: true }
  using pass: VisionRecord = loaded.record(a)
  const back: VisionRecordBackwardArgs = { dMerged: pass.merged, dDeepstack: pass.deepstack }
  const { gradients }: VisionGradients = pass.backward(back)
  const whole: VisionTowerBackwardArgs = { ...patches, ...back, into: gradients }
  return loaded.backward(whole).gradients
}

export const made = (value: unknown): boolean =>
  value instanceof VisionRecord || value instanceof Qwen3VLRecord
