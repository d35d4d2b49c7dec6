export { Device, type DeviceInfo, type OpenOptions, cudaStatus, devices, openDevice } from './device.js'
export { P2RError, type ErrorCode } from './errors.js'
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
