export {
  cudaStatus,
  Device,
  type DeviceInfo,
  devices,
  type OpenOptions,
  openDevice,
} from './device.js'
export { type ErrorCode, P2RError } from './errors.js'
export * from './ops/gelu.js'
export * from './ops/linear.js'
export { scope, scopeAsync } from './scope.js'
export type { DType, Held, HostArray, HostOf, Ints, Tensor } from './tensor.js'
export * from './ops/gelu.js'
export {
  type AdvantageEstimator,
  type GroupAdvantages,
  groupAdvantages,
  informativeGroups,
} from './ops/advantages.js'
export * from './ops/log_probs.js'
export {
  type LossAggregation,
  type LossMetrics,
  type PolicyLossInput,
  type PolicyLossOptions,
  policyLoss,
  trlDefaults,
} from './ops/policy_loss.js'
export { type GrpoBatch, type GrpoModel, type GrpoStep, grpoStep } from './p2r/grpo.js'
export * from './ops/layer_norm.js'
export * from './ops/optimizer.js'
export * from './ops/rows.js'
export * from './ops/sampling.js'
export { loadTensors, saveTensors } from './safetensors.js'
