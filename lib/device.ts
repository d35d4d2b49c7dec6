import { checkArguments, checkString, describeValue, type Names } from './arguments.js'
import { checkDType, type DType } from './dtype.js'
import { P2RError, refuse } from './errors.js'
import { type IpcDescription, type IpcOpenOptions, openShared } from './ipc.js'
import { type DeviceHandle, native } from './native.js'
import { defaultDType, type HostArray, hostData, type Tensor, wrap } from './tensor.js'

/** What a device is. */
export interface DeviceInfo {
  /** Which of the library's backends computes. */
  backend: 'cpu' | 'cuda'
  /** 'cpu', 'cuda:0', ...: what `openDevice` takes. */
  id: string
  /** The processor's or GPU's name, as the system gives it. */
  name: string
  /** Bytes of memory: the host's, or the GPU's. */
  memoryBytes: number
  /** CPU: the number of worker threads. */
  threads?: number
  /** CPU: the instruction set chosen at run time: 'avx512', 'avx2', 'neon' or 'scalar'. */
  simd?: string
  /** CPU: the optional extensions in use: 'bf16' (AVX512-BF16), 'vnni' (AVX512-VNNI). */
  features?: readonly string[]
  /** CUDA: for example '9.0'. */
  computeCapability?: string
}

/** How a CPU device is opened; a CUDA device has no options. */
export interface OpenOptions {
  /**
   * CPU: worker threads, 1 to 1024. On Linux, if there are as many CPUs, workers are kept off the CPU of
   * the thread that calls them, the queue's.
   *
   * @default the CPUs that affinity and cgroup allow
   */
  threads?: number
  /**
   * CPU: forces an instruction set that the CPU supports, for tests and measurements.
   *
   * @default the widest that the CPU supports
   */
  simd?: 'avx512' | 'avx2' | 'neon' | 'scalar'
  /** CPU: extensions to use or leave unused, for tests and measurements. */
  features?: CpuFeatures
  /**
   * Bytes of results that may wait for their computation. An operation that would queue more waits or throws, as
   * `whenFull` says; one alone is always queued. Neither what is computed counts (that is `memory().liveBytes`) nor what
   * was disposed, whose memory later results take.
   *
   * @default half of the device's memory
   */
  maxQueuedBytes?: number
  /**
   * Past `maxQueuedBytes`: 'wait' blocks the calling thread until enough is computed; 'throw' is ERR_MEMORY, and nothing
   * is queued.
   *
   * @default 'wait'
   */
  whenFull?: 'wait' | 'throw'
}

/** Optional extensions of AVX-512. */
export interface CpuFeatures {
  /**
   * AVX512-BF16.
   *
   * @default whether the CPU has it
   */
  bf16?: boolean
  /**
   * AVX512-VNNI.
   *
   * @default whether the CPU has it
   */
  vnni?: boolean
}

/** Whether CUDA can be used in this process. */
export interface CudaStatus {
  /** Whether the addon was compiled with CUDA. */
  built: boolean
  /** Whether `openDevice('cuda')` can open a device. */
  available: boolean
  /** One sentence: what was found, or what is missing. */
  reason: string
}

/** Bytes of a device's memory. */
export interface MemoryUse {
  /** Of live tensors. */
  liveBytes: number
  /** The highest sum of tensors and kernels' scratch (every thread's included) since `resetPeak`. */
  peakBytes: number
  /** Held by the allocator, in use or cached. */
  reservedBytes: number
}

const openNames: Names<OpenOptions> = {
  threads: true,
  simd: true,
  features: true,
  maxQueuedBytes: true,
  whenFull: true,
}
const featureNames: Names<CpuFeatures> = { bf16: true, vnni: true }

/**
 * Every device that this process can open. The CPU is always first.
 *
 * @throws P2RError ERR_NATIVE where the addon cannot be loaded.
 * @example
 * ```js
 * import { devices } from 'p2r-kernels'
 *
 * for (const { id, name } of devices()) console.log(id, name)
 * ```
 */
export function devices(): DeviceInfo[] {
  return native().devices()
}

/**
 * Whether the addon is built with CUDA and finds a driver and devices, with the reason.
 *
 * @throws P2RError ERR_NATIVE where the addon cannot be loaded.
 * @example
 * ```js
 * import { cudaStatus } from 'p2r-kernels'
 *
 * const { available, reason } = cudaStatus()
 * console.log(available, reason)
 * ```
 */
export function cudaStatus(): CudaStatus {
  return native().cudaStatus()
}

// (string & {}) is any string, and keeps the names before it in an editor's completion.
/** The name of a device. */
export type DeviceId = 'cpu' | 'cuda' | `cuda:${number}` | (string & {})

/**
 * Opens a device: 'cpu', 'cuda' (the first), 'cuda:1', ... Each call opens a queue and a memory pool of
 * its own. A named device that is not available is an error, without fallback.
 *
 * @param id default: the environment's P2R_DEVICE, else the first CUDA device, else the CPU
 * @throws P2RError ERR_DEVICE for a device that does not exist or is not available; ERR_VALUE for wrong
 *   options; ERR_MEMORY where the system has no room for the threads; ERR_NATIVE where the addon cannot be loaded.
 * @example
 * ```js
 * import { openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu', { threads: 2 })
 * console.log(device.info.threads) // 2
 * device.dispose()
 * ```
 */
export function openDevice(id?: DeviceId, options: OpenOptions = {}): Device {
  const op = 'openDevice'
  if (id !== undefined) checkString(id, 'id', op)
  const { features = {}, ...rest } = checkArguments(options, openNames, op, 'options')
  checkArguments(features, featureNames, op, 'features')
  const handle = native().openDevice(id ?? process.env.P2R_DEVICE ?? '', { ...rest, ...features })
  return new Device(construct, handle)
}

const construct: unique symbol = Symbol('construct')

/** What console.log and util.inspect call. */
const customInspect: unique symbol = Symbol.for('nodejs.util.inspect.custom')

// As for Tensor: refused by structuredClone and postMessage, which show the description.
const uncloneable = Symbol('a Device belongs to its thread; open one there: a Device')

/**
 * One device with its queue and memory pool. Operations on its tensors run asynchronously, in order.
 *
 * @example
 * ```js
 * import { gelu, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const x = device.zeros([1000])
 * const milliseconds = await device.time(() => gelu({ x }))
 * console.log(milliseconds >= 0, device.memory().liveBytes)
 * device.dispose()
 * ```
 */
export class Device implements Disposable {
  /** @internal */
  readonly uncloneable: symbol = uncloneable
  /** What it is. */
  readonly info: DeviceInfo
  readonly #handle: DeviceHandle

  /** @internal Devices are opened by openDevice. */
  constructor(key: typeof construct, handle: DeviceHandle) {
    if (key !== construct) throw new P2RError('ERR_VALUE', 'Devices are opened by openDevice()')
    this.info = Object.freeze(handle.info())
    this.#handle = handle
  }

  /** @internal */
  get handle(): DeviceHandle {
    return checkDevice(this, 'handle', 'this').#handle
  }

  /**
   * Copies host data to the device. A Float32Array given for 'f16'/'bf16' is rounded to nearest even; a
   * Uint16Array is taken as raw bits.
   *
   * @param dtype default: 'f32' for Float32Array, Float64Array and number[], 'i32' for Int32Array, 'u8'
   *   for the byte arrays; a Uint16Array needs one
   * @throws P2RError ERR_SHAPE where data and shape differ in size; ERR_DTYPE for an unknown type or data of
   *   another; ERR_VALUE for values that the type does not have; ERR_MEMORY; ERR_DISPOSED.
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
    const { handle } = checkDevice(this, 'tensor', 'this')
    const type = dtype ?? defaultDType(data)
    checkDType(type, 'tensor')
    return wrap(this, handle.tensor(hostData(data, type, 'tensor'), shape, type))
  }

  /**
   * A tensor of zeros.
   *
   * @param dtype default: 'f32'
   * @throws P2RError ERR_DTYPE for an unknown type; ERR_SHAPE, ERR_VALUE for anything but a shape;
   *   ERR_MEMORY; ERR_DISPOSED.
   */
  zeros<D extends DType = 'f32'>(shape: readonly number[], dtype?: D): Tensor<D> {
    const { handle } = checkDevice(this, 'zeros', 'this')
    const type = dtype ?? 'f32'
    checkDType(type, 'zeros')
    return wrap(this, handle.zeros(shape, type))
  }

  /**
   * A tensor on memory that another process shares by `ipcHandle()`, or that PyTorch does (see
   * examples/exchange), without a copy. It must stay shared until this tensor is disposed and the work
   * on it is done. On the CPU only memory that cannot be shortened is opened, unless the options say otherwise.
   *
   * @throws P2RError ERR_DEVICE for memory of the other backend, or that CUDA cannot open; ERR_IO for what is gone or
   *   cannot be seen; ERR_FORMAT for what is not such memory, or of another size; ERR_VALUE for anything but a handle's
   *   fields, for other files without `anyFile`, and for options.
   */
  fromIpcHandle<D extends DType>(
    handle: IpcDescription & { dtype: D },
    options: IpcOpenOptions = {},
  ): DType extends D ? Tensor : Tensor<D> {
    const own = checkDevice(this, 'fromIpcHandle', 'this')
    return wrap(this, openShared(own.handle, own.info.backend, handle, options))
  }

  /**
   * Waits for all queued work; throws, once each, those of its faults that no read has thrown, under the
   * name of the operation.
   *
   * @throws P2RError ERR_VALUE for a value that a kernel had to refuse; ERR_CUDA where the device was lost;
   *   ERR_DISPOSED.
   */
  async synchronize(): Promise<void> {
    return checkDevice(this, 'synchronize', 'this').handle.synchronize()
  }

  /**
   * Milliseconds that the work queued by f takes on the device: events on CUDA, queue time on the CPU.
   *
   * @throws P2RError ERR_VALUE for anything but a function; ERR_DISPOSED. An error of f is thrown as it is.
   */
  async time(f: () => void): Promise<number> {
    return checkDevice(this, 'time', 'this').handle.time(f)
  }

  /**
   * How much memory the device's tensors and its allocator have.
   *
   * @throws P2RError ERR_DISPOSED.
   */
  memory(): MemoryUse {
    return checkDevice(this, 'memory', 'this').handle.memory()
  }

  /**
   * Starts `peakBytes` again from the bytes of live tensors.
   *
   * @throws P2RError ERR_DISPOSED.
   */
  resetPeak(): void {
    checkDevice(this, 'resetPeak', 'this').handle.resetPeak()
  }

  /**
   * Computes what is queued and disposes the device's tensors; a second call does nothing. What need not be computed is
   * left out where its `scopeAsync` is aborted first, or its process or worker thread ends.
   */
  dispose(): void {
    checkDevice(this, 'dispose', 'this').handle.dispose()
  }

  [Symbol.dispose](): void {
    Device.prototype.dispose.call(this)
  }

  /** 'Device cpu (12 threads, avx512)'. */
  toString(): string {
    const { handle, info } = checkDevice(this, 'toString', 'this')
    const what = info.backend === 'cpu' ? `${info.threads} threads, ${info.simd}` : info.name
    return `Device ${info.id} (${what})${handle.disposed ? ', disposed' : ''}`
  }

  /** @internal As toString; of anything else, as of console.log(Device.prototype), without throwing. */
  [customInspect](): string {
    return Device.is(this) ? this.toString() : 'Device {}'
  }

  /** @internal */
  static is(value: unknown): value is Device {
    return typeof value === 'object' && value !== null && #handle in value
  }
}

/** @internal The argument `device` of an operation, or a method's `this`. */
export function checkDevice(value: unknown, op: string, name = 'device'): Device {
  if (!Device.is(value))
    refuse('ERR_VALUE', op, `${name} must be a Device, got ${describeValue(value)}`)
  return value
}
