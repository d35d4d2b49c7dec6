export type { AbortSignalLike } from './abort.js'
export {
  cudaStatus,
  Device,
  type DeviceInfo,
  devices,
  type OpenOptions,
  openDevice,
} from './device.js'
export type { DType, FloatDType } from './dtype.js'
export { type ErrorCode, P2RError } from './errors.js'
export type { Grid } from './grid.js'
export { encodeImage, loadImage, saveImage } from './image.js'
export type { IpcDescription, IpcHandle } from './ipc.js'
export {
  type AdvantageEstimator,
  type GroupAdvantages,
  groupAdvantages,
  informativeGroups,
} from './ops/advantages.js'
export {
  type AttentionInput,
  attention,
  attentionBackward,
  attentionMass,
  kernels,
  windowLayout,
} from './ops/attention.js'
export {
  cropResample,
  type Filter,
  pixelValues,
  type Region,
  smartResize,
} from './ops/crop_resample.js'
export { type Color, drawBoxes, type PixelBox } from './ops/draw_boxes.js'
export * from './ops/gelu.js'
export * from './ops/layer_norm.js'
export { linear, linearBackward } from './ops/linear.js'
export {
  type HeadGradients,
  type LinearHead,
  type LinearLogProbsBackward,
  type LinearPolicyLoss,
  linearLogProbs,
  linearLogProbsBackward,
  linearPolicyLoss,
} from './ops/linear_log_probs.js'
export {
  type LogProbsBackward,
  type LogProbsShard,
  mergeLogProbs,
  tokenLogProbs,
  tokenLogProbsBackward,
  tokenLogProbsShard,
} from './ops/log_probs.js'
export * from './ops/optimizer.js'
export {
  type LossAggregation,
  type LossMetrics,
  type PolicyLossInput,
  type PolicyLossOptions,
  policyLoss,
  trlDefaults,
} from './ops/policy_loss.js'
export { visionPositions } from './ops/positions.js'
export { applyRotary, visionRotary } from './ops/rotary.js'
export * from './ops/rows.js'
export * from './ops/sampling.js'
export { type Answer, answer } from './p2r/answer.js'
export { type EvidenceBox, parseBoxes } from './p2r/boxes.js'
export { evaluate, type Judged, type Question } from './p2r/evaluate.js'
export { collectEvidence, type Evidence, type EvidenceSizes } from './p2r/evidence.js'
export { loadRollouts, saveRollouts } from './p2r/exchange.js'
export { type GrpoBatch, type GrpoModel, type GrpoStep, grpoStep } from './p2r/grpo.js'
export { type OpenAIOptions, OpenAIPolicy } from './p2r/openai.js'
export { Perceiver, type PerceiverOptions } from './p2r/perceiver.js'
export {
  type Completion,
  functionPolicy,
  type Policy,
  type PolicyRequest,
  type Role,
} from './p2r/policy.js'
export {
  alternating,
  PraGrpo,
  type PraGrpoOptions,
  type PraGrpoSettings,
  p2r,
  type RoleMetrics,
  type Schedule,
  type TrainedModel,
} from './p2r/pra_grpo.js'
export {
  type AnswerForm,
  defaultPrompts,
  type PromptOverrides,
  type Prompts,
} from './p2r/prompts.js'
export { Reasoner, type ReasonerOptions } from './p2r/reasoner.js'
export { RecordedPolicy, recordPolicy } from './p2r/recorded.js'
export {
  answerReward,
  boxIoU,
  extractAnswer,
  modelVerifier,
  perceptionFault,
  type RewardRules,
  type Verifier,
} from './p2r/reward.js'
export type { RolloutBatch, RolloutItem, RolloutMetrics, Sample } from './p2r/rollouts.js'
export { loadMetadata, loadTensors, saveTensors } from './safetensors.js'
export { scope, scopeAsync } from './scope.js'
export type { Held, HostArray, HostOf, Ints, Tensor } from './tensor.js'
export { type VisionEncoding, VisionTower, type VisionTowerConfig } from './vision/tower.js'
