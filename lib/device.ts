import { checkObject, checkString, describeValue } from './arguments.js'
import { type DType, isDType } from './dtype.js'
import { P2RError, refuse } from './errors.js'
import { type IpcDescription, openShared } from './ipc.js'
import { type DeviceHandle, native } from './native.js'
import { defaultDType, type HostArray, hostData, type Tensor, wrap } from './tensor.js'

export interface DeviceInfo {
  backend: 'cpu' | 'cuda'
  /** 'cpu', 'cuda:0', ... */
  id: string
  name: string
  memoryBytes: number
  /** CPU: worker threads and the instruction set chosen at run time ('avx512', 'avx2', 'neon', 'scalar'). */
  threads?: number
  simd?: string
  /** CPU: the optional extensions in use: 'bf16' (AVX512-BF16), 'vnni' (AVX512-VNNI). */
  features?: readonly string[]
  /** CUDA: for example '9.0'. */
  computeCapability?: string
}

export interface OpenOptions {
  /**
   * CPU: worker threads; from affinity and cgroup unless given. On Linux, if there are as many CPUs,
   * workers are kept off the CPU of the thread that calls them, the queue's.
   */
  threads?: number
  /** Forces an instruction set that the CPU supports, for tests and measurements. */
  simd?: 'avx512' | 'avx2' | 'neon' | 'scalar'
  /** Enables or disables AVX512-BF16 and AVX512-VNNI; what the CPU supports unless given. */
  features?: { bf16?: boolean; vnni?: boolean }
}

/** Every device that this process can open. The CPU is always first. */
export function devices(): DeviceInfo[] {
  return native().devices()
}

/** Whether the addon is built with CUDA and finds a driver and devices, with the reason. */
export function cudaStatus(): { built: boolean; available: boolean; reason: string } {
  return native().cudaStatus()
}

/**
 * Opens a device: 'cpu', 'cuda', 'cuda:1'. Without a name: the environment's P2R_DEVICE, else the
 * first CUDA device, else the CPU. A named device that is not available throws ERR_DEVICE, without
 * fallback. Each call opens a queue and a memory pool of its own.
 */
export function openDevice(id?: string, options: OpenOptions = {}): Device {
  const op = 'openDevice'
  if (id !== undefined) checkString(id, 'id', op)
  const { features, ...rest } = checkObject(options, 'options', op)
  checkObject(features ?? {}, 'features', op)
  const handle = native().openDevice(id ?? process.env.P2R_DEVICE ?? '', { ...rest, ...features })
  return new Device(construct, handle)
}

const construct = Symbol('construct')

/** One device with its queue and memory pool. Operations on its tensors run asynchronously, in order. */
export class Device implements Disposable {
  readonly info: DeviceInfo
  /** @internal */
  declare readonly handle: DeviceHandle

  /** @internal Devices are opened by openDevice. */
  constructor(key: typeof construct, handle: DeviceHandle) {
    if (key !== construct) throw new P2RError('ERR_VALUE', 'Devices are opened by openDevice()')
    this.info = Object.freeze(handle.info())
    Object.defineProperty(this, 'handle', { value: handle })
  }

  /**
   * Copies host data to the device. A Float32Array given for 'f16'/'bf16' is rounded to nearest even; a
   * Uint16Array is taken as raw bits. Without a dtype: f32 for Float32Array, Float64Array and
   * number[], i32 for Int32Array, u8 for the byte arrays; a Uint16Array needs one.
   */
  tensor<D extends DType>(data: HostArray, shape: readonly number[], dtype: D): Tensor<D>
  tensor(data: Int32Array, shape: readonly number[]): Tensor<'i32'>
  tensor(data: Uint8Array | Uint8ClampedArray, shape: readonly number[]): Tensor<'u8'>
  tensor(
    data: Float32Array | Float64Array | readonly number[],
    shape: readonly number[],
  ): Tensor<'f32'>
  tensor(data: Exclude<HostArray, Uint16Array>, shape: readonly number[]): Tensor
  tensor(data: HostArray, shape: readonly number[], dtype?: DType): Tensor {
    const type = dtype ?? defaultDType(data)
    checkDType(type, 'tensor')
    return wrap(this, this.handle.tensor(hostData(data, type, 'tensor'), shape, type))
  }

  zeros<D extends DType = 'f32'>(shape: readonly number[], dtype?: D): Tensor<D> {
    const type = dtype ?? 'f32'
    checkDType(type, 'zeros')
    return wrap(this, this.handle.zeros(shape, type))
  }

  /**
   * A tensor on memory that another process shares by `ipcHandle()`, or that PyTorch does (see
   * examples/exchange), without a copy. It must stay shared until this tensor is disposed and the work
   * on it is done.
   *
   * @throws ERR_DEVICE for memory of the other backend, or that CUDA cannot open; ERR_IO and ERR_FORMAT
   *   for a file that is missing or too short; ERR_VALUE for anything but a handle's fields.
   */
  fromIpcHandle<D extends DType = DType>(handle: IpcDescription & { dtype: D }): Tensor<D> {
    return wrap(this, openShared(this.handle, this.info.backend, handle))
  }

  /** Waits for all queued work; throws each of its faults once. */
  async synchronize(): Promise<void> {
    return this.handle.synchronize()
  }

  /** Milliseconds that the work queued by f takes on the device: events on CUDA, queue time on the CPU. */
  async time(f: () => void): Promise<number> {
    return this.handle.time(f)
  }

  /**
   * Bytes of live tensors; the highest sum of tensors and kernels' scratch (every thread's included)
   * since resetPeak; bytes held by the allocator.
   */
  memory(): { liveBytes: number; peakBytes: number; reservedBytes: number } {
    return this.handle.memory()
  }

  resetPeak(): void {
    this.handle.resetPeak()
  }

  /** Drains the queue and disposes the device's tensors. */
  dispose(): void {
    this.handle.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  /** @internal */
  static is(value: unknown): value is Device {
    return value instanceof Device
  }
}

/** @internal The argument `device` of an operation. */
export function checkDevice(value: unknown, op: string): Device {
  if (!Device.is(value))
    refuse('ERR_VALUE', op, `device must be a Device, got ${describeValue(value)}`)
  return value
}

function checkDType(dtype: unknown, op: string): void {
  if (!isDType(dtype))
    refuse('ERR_VALUE', op, `dtype must be f32, f16, bf16, i32 or u8, got ${describeValue(dtype)}`)
}
