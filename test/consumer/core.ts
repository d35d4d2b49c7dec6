// Devices, tensors, scopes and errors as a strict consumer uses them. It is compiled, never run.
import {
  type CpuFeatures,
  type CudaStatus,
  cudaStatus,
  type Device,
  type DeviceId,
  type DeviceInfo,
  type DType,
  devices,
  type ErrorCode,
  type FloatDType,
  type Held,
  type HostArray,
  type HostOf,
  type Ints,
  type MemoryUse,
  type OpenOptions,
  openDevice,
  P2RError,
  type ScopeOptions,
  scope,
  scopeAsync,
  type Tensor,
} from 'p2r-kernels'

export const infos: DeviceInfo[] = devices()
export const status: CudaStatus = cudaStatus()
export const reason: string = status.reason
const features: CpuFeatures = { bf16: false }
const options: OpenOptions = { threads: 2, simd: 'scalar', features }
const id: DeviceId = 'cpu'

export async function tensors(): Promise<void> {
  using device: Device = openDevice(id, options)
  const plain: Tensor<'f32'> = device.tensor([1, 2, 3, 4], [2, 2])
  const half: Tensor<'bf16'> = device.tensor(new Uint16Array(4), [4], 'bf16')
  const bits: Uint16Array = await half.read()
  const wide: Float32Array = await half.toFloat32()
  const whole: Tensor<'i32'> = plain.cast('i32')
  const list: Int32Array = await whole.read()
  const any: Tensor = whole
  const sources: HostArray[] = [bits, wide, list, [1, 2] as const]
  plain.write(sources[1] ?? [])
  plain.copyFrom(plain.reshape([4]).slice(0, 4).reshape([2, 2]))
  const size: number = any.size + any.byteLength + any.shape.length
  const dtype: DType = any.dtype
  const shape: readonly number[] = any.shape
  const home: Device = any.to(device).device
  const { liveBytes, peakBytes, reservedBytes }: MemoryUse = home.memory()
  home.resetPeak()
  const ms: number = await device.time(() => plain.cast('f16').dispose())
  await device.synchronize()
  any.dispose()
  void [size, dtype, shape, liveBytes, peakBytes, reservedBytes, ms]
}

// @ts-expect-error a type that there is not
export const wrong: Tensor<'f64'> | undefined = undefined
// @ts-expect-error the instruction set is one of a list
openDevice('cpu', { simd: 'sse' })
// @ts-expect-error left out, not undefined
openDevice('cpu', { threads: undefined })

export const read = <D extends DType>(x: Tensor<D>): Promise<HostOf<D>> => x.read()
export const half: FloatDType = 'bf16'
export const lengths: Ints = new Uint32Array(2)
export const kept: Tensor = scope(() => openDevice().zeros([2]))
export const later = (ending: ScopeOptions): Promise<Tensor<'u8'>> =>
  scopeAsync(
    async () => openDevice('cpu', { maxQueuedBytes: 1e9, whenFull: 'wait' }).zeros([2], 'u8'),
    ending,
  )

export function free(parts: Held<{ out: Tensor; lse: Tensor }>): Tensor {
  using all = parts
  all.dispose()
  return all.out
}

export function explain(error: unknown): ErrorCode | undefined {
  if (!(error instanceof P2RError)) return undefined
  const operation: string | undefined = error.op
  return operation === 'attention' ? 'ERR_SHAPE' : error.code
}
export const own = new P2RError('ERR_VALUE', '[mine] no', { op: 'mine', cause: 1 })
