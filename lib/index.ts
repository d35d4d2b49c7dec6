export type { AbortSignalLike } from './abort.js'
export {
  type CpuFeatures,
  type CudaStatus,
  cudaStatus,
  Device,
  type DeviceId,
  type DeviceInfo,
  devices,
  type MemoryUse,
  type OpenOptions,
  openDevice,
} from './device.js'
export type { DType, FloatDType, PatchDType } from './dtype.js'
export { type ErrorCode, P2RError } from './errors.js'
export type { Checkpoint, CheckpointOption, TrainableOption } from './gradients.js'
export type { Grid } from './grid.js'
export {
  type BlobLike,
  type EncodeImageOptions,
  encodeImage,
  type ImageSource,
  type LoadImageOptions,
  loadImage,
  saveImage,
  type UrlLike,
} from './image.js'
export type { IpcDescription, IpcHandle, IpcOpenOptions, IpcOptions } from './ipc.js'
export type {
  Qwen3VLConfig,
  Qwen3VLImageRules,
  Qwen3VLSampling,
} from './models/qwen3_vl/config.js'
export type {
  Generated,
  GeneratedToken,
  GenerationPrompt,
  Qwen3VLGenerateArgs,
  SamplingOptions,
  TokenLogProb,
} from './models/qwen3_vl/generate.js'
export {
  Qwen3VL,
  type Qwen3VLCache,
  type Qwen3VLForwardArgs,
  type Qwen3VLLogProbs,
  type Qwen3VLOptions,
  type Qwen3VLResults,
  type Qwen3VLWant,
} from './models/qwen3_vl/model.js'
export type { PackedTokens, Vision } from './models/qwen3_vl/prompt.js'
export {
  type Qwen3VLBackwardArgs,
  type Qwen3VLGradients,
  type Qwen3VLLogProbsArgs,
  Qwen3VLRecord,
  type Qwen3VLRecordArgs,
  type Qwen3VLRecordBackwardArgs,
} from './models/qwen3_vl/record.js'
export {
  type ChatMessage,
  type ChatOptions,
  type ChatPart,
  type ChatVideo,
  Qwen3VLTokenizer,
} from './models/qwen3_vl/tokens.js'
export {
  type AdvantageEstimator,
  type AdvantageOptions,
  type GroupAdvantagesArgs,
  groupAdvantages,
  type InformativeGroupsArgs,
  informativeGroups,
} from './ops/advantages.js'
export {
  type AttentionArgs,
  type AttentionBackwardArgs,
  type AttentionBackwardResult,
  type AttentionGradient,
  type AttentionInput,
  type AttentionKernel,
  type AttentionKernelOption,
  type AttentionMassArgs,
  type AttentionOptions,
  type AttentionResult,
  attention,
  attentionBackward,
  attentionMass,
  type CausalArgs,
  type KernelOperation,
  kernels,
  type PackedAttentionBackwardResult,
  type PackedHeads,
  type SeparateHeads,
  type WindowLayout,
  type WindowLayoutArgs,
  windowLayout,
} from './ops/attention.js'
export {
  type CachedAttentionArgs,
  cachedAttention,
  KvCache,
  type KvCacheOptions,
} from './ops/cached_attention.js'
export {
  type CropRegion,
  type CropResampleArgs,
  cropResample,
  type Filter,
  type ImageInput,
  type ImageSize,
  type Normalization,
  type NormalizePatchesArgs,
  normalizePatches,
  type PixelValuesArgs,
  type PixelValuesOptions,
  type PixelValuesResult,
  pixelValues,
  type Region,
  type SmartResizeOptions,
  smartResize,
} from './ops/crop_resample.js'
export * from './ops/distillation.js'
export {
  type Color,
  type DrawBoxesArgs,
  drawBoxes,
  type Outlines,
  type PixelBox,
} from './ops/draw_boxes.js'
export * from './ops/elementwise.js'
export * from './ops/gelu.js'
export * from './ops/layer_norm.js'
export {
  type BiasGradient,
  type LinearArgs,
  type LinearBackwardArgs,
  type LinearBackwardResult,
  linear,
  linearBackward,
  type WeightGradients,
} from './ops/linear.js'
export {
  type HeadGradients,
  type IntoOption,
  type LinearHead,
  type LinearLogProbsArgs,
  type LinearLogProbsBackwardArgs,
  type LinearPolicyLossArgs,
  type LinearPolicyLossResult,
  linearLogProbs,
  linearLogProbsBackward,
  linearPolicyLoss,
} from './ops/linear_log_probs.js'
export {
  type EntropyOption,
  type LogProbsShard,
  mergeLogProbs,
  type RowEntropy,
  type RowGradients,
  type RowResultOptions,
  type RowSquaredProbs,
  type TokenLogits,
  type TokenLogProbsArgs,
  type TokenLogProbsBackwardArgs,
  type TokenLogProbsResult,
  type TokenLogProbsShardArgs,
  tokenLogProbs,
  tokenLogProbsBackward,
  tokenLogProbsShard,
} from './ops/log_probs.js'
export * from './ops/optimizer.js'
export {
  type ApplyKlPenaltyArgs,
  applyKlPenalty,
  type EntropyGradient,
  type KlEstimator,
  type LossAggregation,
  type LossMetrics,
  type LossObjective,
  type PolicyLossArgs,
  type PolicyLossInputs,
  type PolicyLossOptions,
  type PolicyLossResult,
  policyLoss,
  trlDefaults,
} from './ops/policy_loss.js'
export * from './ops/positions.js'
export { type QuantizeArgs, type QuantizedWeight, quantize } from './ops/quantize.js'
export * from './ops/rearrange.js'
export * from './ops/reduce.js'
export * from './ops/rms_norm.js'
export {
  type RolloutCorrectionArgs,
  type RolloutCorrectionMetrics,
  type RolloutCorrectionOptions,
  type RolloutCorrectionResult,
  type RolloutRejection,
  rolloutCorrection,
  trlRolloutCorrection,
  verlRolloutCorrection,
} from './ops/rollout_correction.js'
export {
  type RopeIndexArgs,
  type RopeIndexConfig,
  type RopeIndexResult,
  ropeIndex,
} from './ops/rope_index.js'
export * from './ops/rotary.js'
export * from './ops/rows.js'
export * from './ops/sampling.js'
export * from './ops/swiglu.js'
export {
  type Answer,
  type AnswerArgs,
  type Answerer,
  type AnswerQuestion,
  answer,
} from './p2r/answer.js'
export { type EvidenceBox, type ParseBoxesOptions, parseBoxes } from './p2r/boxes.js'
export {
  type EvaluateArgs,
  type EvaluateOptions,
  evaluate,
  type Judged,
  type Question,
} from './p2r/evaluate.js'
export {
  type CollectEvidenceArgs,
  type Coordinates,
  collectEvidence,
  type Evidence,
  type EvidenceOptions,
  type EvidencePixelValuesOptions,
  type EvidenceSizes,
} from './p2r/evidence.js'
export {
  type LoadRolloutsOptions,
  loadRollouts,
  type SaveRolloutsOptions,
  saveRollouts,
} from './p2r/exchange.js'
export {
  type Box,
  formatReward,
  type GroundingRewards,
  type GroundingRewardsArgs,
  groundingRewards,
  matchedIoU,
  type Point,
  pointInBoxes,
  unionIoU,
} from './p2r/grounding.js'
export {
  type AdvantagesBatch,
  type GrpoBatch,
  type GrpoModel,
  type GrpoStep,
  type GrpoStepArgs,
  grpoStep,
  type HeadModel,
  type HeadStep,
  type KlPlacement,
  type LogitsModel,
  type LogitsStep,
  type LogProbsModel,
  type LogProbsStep,
  type RewardsBatch,
} from './p2r/grpo.js'
export { LocalPolicy, type LocalPolicyOptions } from './p2r/local.js'
export { OpenAIPolicy, type OpenAIPolicyOptions } from './p2r/openai.js'
export {
  type PerceiveArgs,
  Perceiver,
  type PerceiverOptions,
  type Perception,
} from './p2r/perceiver.js'
export {
  type Completion,
  functionPolicy,
  type Policy,
  type PolicyFunction,
  type PolicyRequest,
  type Role,
  type Tool,
  type ToolCall,
  type ToolResult,
  type Turn,
} from './p2r/policy.js'
export {
  type AlternatingSettingsOptions,
  alternatingSettings,
  type PaperSettingsOptions,
  PraGrpo,
  type PraGrpoOptions,
  type PraGrpoSettings,
  paperSettings,
  type RoleMetrics,
  type RolloutOptions,
  type Schedule,
  type StepLogProbs,
  type TrainedLogProbs,
  type TrainedModel,
} from './p2r/pra_grpo.js'
export {
  type AnswerForm,
  defaultPrompts,
  type PerceivePromptArgs,
  type PromptOverrides,
  type Prompts,
  perceivePrompt,
  type ReasonPromptArgs,
  type RolePrompt,
  reasonPrompt,
  type ZoomPromptArgs,
  zoomPrompt,
} from './p2r/prompts.js'
export {
  type ReasonArgs,
  Reasoner,
  type ReasonerOptions,
  type Reasoning,
} from './p2r/reasoner.js'
export { RecordedPolicy, recordPolicy } from './p2r/recorded.js'
export { type ReproductionSettings, reproductionSettings } from './p2r/reproduction.js'
export {
  type AnswerRewardArgs,
  answerReward,
  boxIoU,
  type ExtractAnswerOptions,
  extractAnswer,
  type ModelVerifierOptions,
  modelVerifier,
  type OverlongOptions,
  type OverlongPenaltyArgs,
  overlongPenalty,
  type PerceptionFaultOptions,
  perceptionFault,
  type RewardRules,
  type Verifier,
  type VerifierArgs,
} from './p2r/reward.js'
export type {
  RolloutBatch,
  RolloutItem,
  RolloutMetrics,
  RolloutRequest,
  Sample,
  StoredImage,
} from './p2r/rollouts.js'
export {
  type ShownRegion,
  ZoomAgent,
  type ZoomAgentOptions,
  type ZoomArgs,
  type Zooming,
  type ZoomOptions,
  zoomTool,
} from './p2r/zoom.js'
export { type LoadTensorsOptions, loadMetadata, loadTensors, saveTensors } from './safetensors.js'
export { type ScopeOptions, scope, scopeAsync } from './scope.js'
export { type ModelServer, type ServeOptions, serveModel } from './serve/server.js'
export type { Held, HostArray, HostOf, Ints, Tensor } from './tensor.js'
export type { LearningRateOptions } from './train/learning_rate.js'
export {
  LocalTrainer,
  type LocalTrainerOptions,
  type TrainMetrics,
  type TrainRoleMetrics,
  type TrainStepOptions,
} from './train/local_trainer.js'
export type { LoraOptions, OptimizerOptions } from './train/trained_weights.js'
export {
  type EncodeArgs,
  type EncodedMass,
  type EncodedPatches,
  type EncodedStates,
  type Patches,
  type RecordPatchesArgs,
  type VisionEncoding,
  type VisionGradients,
  VisionRecord,
  type VisionRecordBackwardArgs,
  VisionTower,
  type VisionTowerBackwardArgs,
  type VisionTowerConfig,
  type VisionTowerOptions,
} from './vision/tower.js'
