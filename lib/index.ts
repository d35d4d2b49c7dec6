export {
  cudaStatus,
  Device,
  type DeviceInfo,
  devices,
  type OpenOptions,
  openDevice,
} from './device.js'
export { type ErrorCode, P2RError } from './errors.js'
export type { Grid } from './grid.js'
export {
  type AttentionInput,
  attention,
  attentionBackward,
  attentionMass,
  kernels,
  windowLayout,
} from './ops/attention.js'
export * from './ops/gelu.js'
export * from './ops/layer_norm.js'
export * from './ops/linear.js'
export * from './ops/optimizer.js'
export { applyRotary, visionRotary } from './ops/rotary.js'
export * from './ops/rows.js'
export * from './ops/sampling.js'
export { loadTensors, saveTensors } from './safetensors.js'
export { scope, scopeAsync } from './scope.js'
export type { DType, Held, HostArray, HostOf, Ints, Tensor } from './tensor.js'
