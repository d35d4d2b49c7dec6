export {
  cudaStatus,
  Device,
  type DeviceInfo,
  devices,
  type OpenOptions,
  openDevice,
} from './device.js'
export { type ErrorCode, P2RError } from './errors.js'
export {
  cropResample,
  type Filter,
  type Grid,
  pixelValues,
  type Region,
  smartResize,
} from './ops/crop_resample.js'
export { type Color, drawBoxes, type PixelBox } from './ops/draw_boxes.js'
export * from './ops/gelu.js'
export { scope, scopeAsync } from './scope.js'
export type { DType, Held, HostArray, HostOf, Ints, Tensor } from './tensor.js'
