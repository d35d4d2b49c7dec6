// Every operation, as a strict consumer calls it. It is compiled, never run.
import {
  adamW,
  add,
  clipGradNorm,
  concat,
  type Device,
  type EncodeArgs,
  type EncodedMass,
  type EncodedPatches,
  type EncodedStates,
  type Grid,
  gatherRows,
  gatherRowsBackward,
  gelu,
  geluBackward,
  type Held,
  layerNorm,
  layerNormBackward,
  linear,
  linearBackward,
  loadTensors,
  mean,
  meanPool,
  meanPoolBackward,
  mropeTables,
  mul,
  type PackedGates,
  type QuantizeArgs,
  type QuantizedWeight,
  quantize,
  rmsNorm,
  rmsNormBackward,
  sample,
  sampleTokens,
  saveTensors,
  scatterAddRows,
  scatterRows,
  scatterRowsBackward,
  split,
  sum,
  swiglu,
  swigluBackward,
  type Tensor,
  transpose,
  type VisionEncoding,
  VisionTower,
  type VisionTowerConfig,
  type VisionTowerOptions,
  visionPositions,
} from 'p2r-kernels'

export function activations(x: Tensor, dOut: Tensor): Tensor[] {
  return [
    gelu({ x }),
    gelu({ x, approximate: 'tanh' }),
    geluBackward({ dOut, x }),
    geluBackward({ dOut, x, approximate: 'none' }),
    swiglu({ gate: x, up: x }),
    swiglu({ gateUp: x }),
    swigluBackward({ dOut, gate: x, up: x }).dGate,
    swigluBackward({ dOut, gateUp: x }).dGateUp,
  ]
}
// @ts-expect-error both forms at once
export const both: PackedGates = { gateUp: undefined as never as Tensor, up: {} as Tensor }
// @ts-expect-error no such form
export const wrong = (x: Tensor): Tensor => gelu({ x, approximate: 'fast' })

export function layers(x: Tensor, weight: Tensor, bias: Tensor, dOut: Tensor): Tensor[] {
  using norm: Held<{ out: Tensor; stats: Tensor }> = layerNorm({ x, weight, bias, eps: 1e-5 })
  using back = layerNormBackward({ dOut, x, weight, stats: norm.stats })
  using rms = rmsNorm({ x, weight, residual: x })
  using rmsBack = rmsNormBackward({ dOut, x: rms.sum, weight, rstd: rms.rstd, dSum: dOut })
  const all: Tensor[] = [
    rms.out,
    rmsNorm({ x, weight, eps: 0 }).out,
    rmsBack.dX,
    rmsBack.dWeight,
    back.dX,
    back.dWeight,
    back.dBias,
    linear({ x, weight }),
  ]
  const plain = linearBackward({ dOut, x, weight })
  const added = linearBackward({
    dOut,
    x,
    weight,
    bias,
    into: { dWeight: plain.dWeight, dBias: bias },
  })
  return [...all, plain.dX, added.dBias ?? linear({ x, weight, bias })]
}

export function quantized(x: Tensor<'bf16'>, weight: Tensor<'bf16'>): Tensor<'f32'> {
  const a: QuantizeArgs = { weight, bits: 4, group: 64 }
  using small: QuantizedWeight = quantize(a)
  const out: Tensor<'bf16'> = linear({ x, weight: small })
  const error: Tensor<'f32'> = small.dequantize()
  out.dispose()
  error.dispose()
  return linear({ x, weight: small, dtype: 'f32' })
}

export function rows(x: Tensor, y: Tensor): Tensor[] {
  const index = Int32Array.of(1, 0)
  const cuSeqlens = [0, 2] as const
  return [
    add({ x, y }),
    gatherRows({ x, index }),
    gatherRowsBackward({ dOut: y, index: [1, 0], rows: 3 }),
    scatterRows({ x, y, index }),
    scatterRowsBackward({ dOut: x, index }).dY,
    scatterAddRows({ x, y, index: [0, 0] }),
    meanPool({ x, cuSeqlens }),
    meanPoolBackward({ dOut: y, cuSeqlens: new Uint32Array(2) }),
    sample({ logits: x, temperature: 0, seed: 1 }),
  ]
}

export async function glue(x: Tensor, y: Tensor): Promise<number> {
  const all: Tensor[] = [
    mul({ x, y }),
    sum({ x, axes: [0, -1], keepDims: true }),
    concat({ tensors: [x, y], axis: -1 }),
    ...split({ x, sizes: [1, 2] }),
    transpose({ x, axes: [0, 1] }),
    transpose({ x: y }),
  ]
  return (await mean({ x: all[0]! }).item()) + (await sum({ x }).item())
}

export function draws(logits: Tensor): Tensor[] {
  const { tokens, logProbs } = sampleTokens({
    logits,
    seeds: [1, 2],
    temperature: [1, 0.7],
    topK: 20,
    topP: Float64Array.of(1, 0.9),
    minP: 0.1,
    repetitionPenalty: 1.1,
    history: [[1, 2], new Int32Array(3)],
  })
  return [tokens, logProbs, sampleTokens({ logits, seeds: new Uint32Array(2) }).logProbsFiltered]
}

export function train(params: readonly Tensor[], grads: readonly Tensor[]): Tensor {
  const norm: Tensor = clipGradNorm({ grads, maxNorm: 1 })
  adamW({ params, grads, moments: [], step: 1, lr: 1e-3, betas: [0.9, 0.99], weightDecay: 0.1 })
  return norm
}

export const tables = (device: Device): Tensor[] => {
  const a = { headDim: 128, theta: 5e6, device }
  const { cos } = mropeTables({ ...a, positions: [0, 1], sections: [24, 20, 20] })
  return [cos, mropeTables({ ...a, positions: new Int32Array(2) }).sin]
}

export async function files(device: Device, x: Tensor): Promise<Tensor | undefined> {
  await saveTensors('a.safetensors', { x }, { made: 'here' })
  const loaded: Record<string, Tensor> = await loadTensors('a.safetensors', device)
  return loaded.x
}

export async function tower(device: Device, pixelValues: Tensor): Promise<Tensor[]> {
  const options: VisionTowerOptions = { dtype: 'bf16' }
  using loaded = await VisionTower.load('folder', device, options)
  const config: VisionTowerConfig = loaded.config
  const gridThw: Grid[] = [[1, config.mergeSize, 2]]
  const a: EncodeArgs = { pixelValues, gridThw, massOf: [config.depth - 1] }
  const out: VisionEncoding = loaded.encode(a)
  const states: EncodedStates = loaded.encode({ pixelValues, gridThw, hiddenStates: true })
  const { mass }: EncodedMass = loaded.encode({ pixelValues, gridThw, massOf: [0] })
  const merged: EncodedPatches = loaded.encode({ pixelValues, gridThw })
  return [
    ...states.hidden,
    ...mass,
    merged.merged,
    out.merged,
    ...out.deepstack,
    visionPositions({ table: pixelValues, gridThw }),
  ]
}
