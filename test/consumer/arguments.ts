// The names of every operation's arguments and results, as a strict consumer wraps operations with them. It is
// compiled, never run.
import {
  type AdamWArgs,
  type AddArgs,
  type AdvantageOptions,
  type ApplyKlPenaltyArgs,
  type ApplyRotaryArgs,
  type AttentionArgs,
  type AttentionBackwardArgs,
  type AttentionBackwardResult,
  type AttentionGradient,
  type AttentionKernel,
  type AttentionKernelOption,
  type AttentionMassArgs,
  type AttentionOptions,
  type AttentionResult,
  add,
  applyKlPenalty,
  applyRotary,
  attention,
  attentionBackward,
  attentionMass,
  type BiasGradient,
  type CachedAttentionArgs,
  type CausalArgs,
  type ClipGradNormArgs,
  type ConcatArgs,
  type CropRegion,
  type CropResampleArgs,
  cachedAttention,
  clipGradNorm,
  concat,
  cropResample,
  type Device,
  type DrawBoxesArgs,
  drawBoxes,
  type EncodeImageOptions,
  type EntropyGradient,
  type EntropyOption,
  encodeImage,
  type FloatDType,
  type GatherRowsArgs,
  type GatherRowsBackwardArgs,
  type GeluArgs,
  type GeluBackwardArgs,
  type GeluForm,
  gatherRows,
  gatherRowsBackward,
  gelu,
  geluBackward,
  type HeadGradients,
  type Held,
  type ImageInput,
  type ImageSize,
  type InformativeGroupsArgs,
  type IntoOption,
  informativeGroups,
  type KernelOperation,
  type KlEstimator,
  type KlPlacement,
  KvCache,
  type KvCacheOptions,
  kernels,
  type LayerNormArgs,
  type LayerNormBackwardArgs,
  type LayerNormBackwardResult,
  type LayerNormResult,
  type LinearArgs,
  type LinearBackwardArgs,
  type LinearBackwardResult,
  type LinearLogProbsArgs,
  type LinearPolicyLossArgs,
  type LinearPolicyLossResult,
  type LoadImageOptions,
  type LossObjective,
  layerNorm,
  layerNormBackward,
  linear,
  linearBackward,
  linearLogProbs,
  linearPolicyLoss,
  loadImage,
  type MeanArgs,
  type MeanPoolArgs,
  type MeanPoolBackwardArgs,
  type MropeTablesArgs,
  type MulArgs,
  mean,
  meanPool,
  meanPoolBackward,
  mropeTables,
  mul,
  type Operands,
  type Outlines,
  type OverlongOptions,
  type OverlongPenaltyArgs,
  overlongPenalty,
  type PackedAttentionBackwardResult,
  type PackedGates,
  type PackedGatesGradient,
  type PackedHeads,
  type PerRow,
  type PixelValuesArgs,
  type PixelValuesOptions,
  type PixelValuesResult,
  type PolicyLossArgs,
  type PolicyLossInputs,
  type PolicyLossResult,
  pixelValues,
  policyLoss,
  type ReduceArgs,
  type ResidualSum,
  type RmsNormArgs,
  type RmsNormBackwardArgs,
  type RmsNormBackwardResult,
  type RmsNormResult,
  type RopeIndexArgs,
  type RopeIndexConfig,
  type RopeIndexResult,
  type RotaryTables,
  type RowEntropy,
  type RowGradients,
  rmsNorm,
  rmsNormBackward,
  ropeIndex,
  type SampleArgs,
  type SampleTokensArgs,
  type SampleTokensResult,
  type ScatterAddRowsArgs,
  type ScatterRowsArgs,
  type ScatterRowsBackwardArgs,
  type ScatterRowsBackwardResult,
  type SeparateGates,
  type SeparateHeads,
  type SmartResizeOptions,
  type SplitArgs,
  type SumArgs,
  type SwigluArgs,
  type SwigluBackwardArgs,
  type SwigluBackwardResult,
  type SwigluGradient,
  sample,
  sampleTokens,
  scatterAddRows,
  scatterRows,
  scatterRowsBackward,
  smartResize,
  split,
  sum as sumOver,
  swiglu,
  swigluBackward,
  type Tensor,
  type TokenLogits,
  type TokenLogProbsArgs,
  type TokenLogProbsResult,
  type TokenLogProbsShardArgs,
  type TransposeArgs,
  tokenLogProbs,
  tokenLogProbsShard,
  transpose,
  type VisionPositionsArgs,
  type VisionRotaryArgs,
  visionPositions,
  visionRotary,
  type WindowLayout,
  type WindowLayoutArgs,
  windowLayout,
} from 'p2r-kernels'

export const form: GeluForm = 'tanh'
export const activate = <D extends FloatDType>(a: GeluArgs<D>): Tensor<D> => gelu(a)
export const activateBack = (a: GeluBackwardArgs<'f16'>): Tensor<'f16'> => geluBackward(a)
export const sum = (a: AddArgs<'bf16'>): Tensor<'bf16'> => add(a)
export const product = (a: MulArgs<'f32'>): Tensor<'f32'> => mul(a)
export const operands: Operands | undefined = undefined
export const total = (a: SumArgs<'f32'> & ReduceArgs<'f32'>): Tensor<'f32'> => sumOver(a)
export const average = (a: MeanArgs<'bf16'>): Tensor<'bf16'> => mean(a)
export const joined = (a: ConcatArgs<'u8'>): Tensor<'u8'> => concat(a)
export const cut = (a: SplitArgs<'i32'>): Tensor<'i32'>[] => split(a)
export const turned = (a: TransposeArgs<'f16'>): Tensor<'f16'> => transpose(a)
export const temperature: PerRow = [1, 0.5]
export const next = (a: SampleTokensArgs): SampleTokensResult => sampleTokens(a)
export const pick = (a: GatherRowsArgs<'u8'>): Tensor<'u8'> => gatherRows(a)
export const pickBack = (a: GatherRowsBackwardArgs): Tensor<FloatDType> => gatherRowsBackward(a)
export const replace = (a: ScatterRowsArgs<'i32'>): Tensor<'i32'> => scatterRows(a)
export const replaceBack = (a: ScatterRowsBackwardArgs<'f16'>): ScatterRowsBackwardResult<'f16'> =>
  scatterRowsBackward(a)
export const scatterAdd = (a: ScatterAddRowsArgs<'f32'>): Tensor<'f32'> => scatterAddRows(a)
export const textTables = (a: MropeTablesArgs): RotaryTables => mropeTables(a)
export const pool = (a: MeanPoolArgs<'f32'>): Tensor<'f32'> => meanPool(a)
export const poolBack = (a: MeanPoolBackwardArgs<'f32'>): Tensor<'f32'> => meanPoolBackward(a)
export const normal = (a: LayerNormArgs<'f16'>): LayerNormResult<'f16'> => layerNorm(a)
export const normalBack = (a: LayerNormBackwardArgs): LayerNormBackwardResult =>
  layerNormBackward(a)
export const rms = (a: RmsNormArgs<'f16'>): RmsNormResult<'f16'> & Partial<ResidualSum<'f16'>> =>
  rmsNorm(a)
export const rmsBack = (a: RmsNormBackwardArgs): RmsNormBackwardResult => rmsNormBackward(a)
export const gated = (a: SwigluArgs<'bf16'>): Tensor<'bf16'> => swiglu(a)
export const gatedBack = (
  a: SwigluBackwardArgs<'f32'>,
): SwigluBackwardResult<'f32'> | PackedGatesGradient<'f32'> => swigluBackward(a)
export const separate = (a: SeparateGates & SwigluGradient): SwigluBackwardResult =>
  swigluBackward(a)
export const inOne = (a: PackedGates<'f32'>): Tensor<'f32'> => swiglu(a)
export const project = (a: LinearArgs<'f32'>): Tensor<'f32'> => linear(a)
export const projectBack = (
  a: LinearBackwardArgs<'f32'>,
): LinearBackwardResult<'f32'> & Partial<BiasGradient> => linearBackward(a)
export const clip = (a: ClipGradNormArgs): Tensor<'f32'> => clipGradNorm(a)
export const rates: Partial<AdamWArgs> = { lr: 1e-3, betas: [0.9, 0.99] }
export const positions = (a: VisionPositionsArgs<'f32'>): Tensor<'f32'> => visionPositions(a)
export const tables = (a: VisionRotaryArgs): RotaryTables => visionRotary(a)
export const places: RopeIndexConfig = { imageToken: 1, videoToken: 2, mergeSize: 2 }
export const indices = (a: RopeIndexArgs): RopeIndexResult => ropeIndex(a)
export const rotate = (a: ApplyRotaryArgs<'bf16'>): Tensor<'bf16'> => applyRotary(a)
export const draw = (a: SampleArgs): Tensor<'i32'> => sample(a)
export const teaching = (a: InformativeGroupsArgs): Tensor<'u8'> => informativeGroups(a)
export const options: AdvantageOptions = { estimator: 'gdpo', weights: [1, 2] }

export const operation: KernelOperation = 'attention'
export const named = (device: Device): AttentionKernelOption => {
  const [first]: readonly AttentionKernel[] = kernels(operation, device)
  return first === undefined ? {} : { kernel: first }
}
export function attend(
  heads: SeparateHeads<'f32'> | PackedHeads<'f32'>,
  how: AttentionOptions,
  keys: CausalArgs,
): AttentionResult<'f32'> {
  const a: AttentionArgs<'f32'> = { ...heads, ...how, ...keys }
  return attention(a)
}
export function decode(
  device: Device,
  options: KvCacheOptions,
  a: Omit<CachedAttentionArgs<'f32'>, 'cache' | 'sequences'>,
): AttentionResult<'f32'> {
  using cache = new KvCache(device, options)
  return cachedAttention({ ...a, cache, sequences: [cache.add()] })
}
export function attendBack(
  a: AttentionArgs<'f32'>,
  gradient: AttentionGradient<'f32'>,
): AttentionBackwardResult<'f32'> | PackedAttentionBackwardResult<'f32'> {
  const back: AttentionBackwardArgs<'f32'> = { ...a, ...gradient }
  return attentionBackward(back)
}
export const mass = (a: AttentionMassArgs<'f32'>): Tensor<'f32'> => attentionMass(a)
export const windows = (a: WindowLayoutArgs): WindowLayout => windowLayout(a)

export const size = (options: SmartResizeOptions): ImageSize => smartResize(10, 10, options)
export const crops = (a: CropResampleArgs): Tensor<'u8'>[] => cropResample(a)
export const region: CropRegion = { box: [0, 0, 8, 8], height: 32, width: 32 }
export const outlines: Outlines = { boxes: [[0, 0, 4, 4]], colors: [[255, 0, 0]] }
export const marked = (a: DrawBoxesArgs): Tensor<'u8'> => drawBoxes(a)
export function patches(
  input: ImageInput,
  how: PixelValuesOptions<'f16'>,
): Held<PixelValuesResult<'f16'>> {
  const a: PixelValuesArgs<'f16'> = { ...input, ...how }
  return pixelValues(a)
}
export const encoded: EncodeImageOptions = { format: 'jpeg', quality: 80 }
export const decoded: LoadImageOptions = { alpha: 'drop', maxPixels: 1e6 }
export const turn = async (device: Device, image: Tensor<'u8'>): Promise<Tensor<'u8'>> =>
  loadImage(await encodeImage(image, encoded), device, decoded)

export function rows(
  logits: TokenLogits,
  how: EntropyOption,
): TokenLogProbsResult & Partial<RowEntropy> {
  const a: TokenLogProbsArgs = { ...logits, ...how }
  return tokenLogProbs(a)
}
export const shard = (a: TokenLogProbsShardArgs): Tensor<'f32'> => tokenLogProbsShard(a).stats
export const gradients = (stats: Tensor<'f32'>): RowGradients => ({ stats, dLogProbs: stats })
export const head = (a: LinearLogProbsArgs<'bf16'>): Tensor<'f32'> => linearLogProbs(a).logProbs
export function headStep(
  a: LinearPolicyLossArgs<'bf16'>,
  into: IntoOption,
): LinearPolicyLossResult<'bf16'> & HeadGradients<'bf16'> {
  return linearPolicyLoss({ ...a, ...into })
}

export const penalty = (a: ApplyKlPenaltyArgs): Tensor<'f32'> => applyKlPenalty(a)
export const tooLong: OverlongOptions = { buffer: 256, factor: 0.5 }
export function shorter(length: number): number {
  const a: OverlongPenaltyArgs = { ...tooLong, length, maxTokens: 1024 }
  return overlongPenalty(a)
}
export const placed: KlPlacement = { klIn: 'reward' }
export const objective: LossObjective = 'cispo'
export const kl: KlEstimator = 'k3'
export function loss(
  logProbs: Tensor<'f32'>,
  inputs: PolicyLossInputs,
): PolicyLossResult & Partial<EntropyGradient> {
  const a: PolicyLossArgs = { ...inputs, logProbs, objective, kl }
  return policyLoss(a)
}
