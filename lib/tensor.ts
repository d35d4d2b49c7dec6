import { checkArray, describeValue } from './arguments.js'
import type { Device } from './device.js'
import { type DType, hostTypes } from './dtype.js'
import { P2RError, refuse } from './errors.js'
import { type IpcHandle, share } from './ipc.js'
import { native, type TensorHandle, type TypedArray } from './native.js'
import { holds, track, untrack } from './scope.js'

export type HostArray =
  | Float32Array
  | Uint16Array
  | Int32Array
  | Uint8Array
  | Uint8ClampedArray
  | Float64Array
  | readonly number[]
export type HostOf<D extends DType> = D extends 'f32'
  ? Float32Array
  : D extends 'i32'
    ? Int32Array
    : D extends 'u8'
      ? Uint8Array
      : Uint16Array
/** Host integers: an array, Int32Array, Uint32Array, ... */
export type Ints = ArrayLike<number>
/** Several results that are disposed together. */
export type Held<R> = R & { dispose(): void } & Disposable

/**
 * D, but DType for `any`. D is only what the conditional type checks: where it is what a type extends, Tensor
 * would be invariant in D, and a Tensor<'f32'> no Tensor<'f32' | 'bf16'>.
 */
type Spelled<D extends DType> = D extends 'f32'
  ? 'f32'
  : D extends 'f16'
    ? 'f16'
    : D extends 'bf16'
      ? 'bf16'
      : D extends 'i32'
        ? 'i32'
        : 'u8'

const construct = Symbol('construct')

/**
 * Contiguous, row-major numbers on one device. Made by `device.tensor`, `device.zeros` and the
 * operations. Storage is shared by views (`reshape`, `slice`) and freed with its last handle.
 */
// biome-ignore lint/suspicious/noExplicitAny: a bare Tensor, whose dtype only the run tells, fits every parameter
export class Tensor<D extends DType = any> implements Disposable {
  readonly device: Device
  readonly shape: readonly number[]
  readonly dtype: Spelled<D>
  readonly size: number
  readonly byteLength: number
  readonly #handle: TensorHandle

  /** @internal Tensors are made by devices and operations. */
  constructor(key: typeof construct, device: Device, handle: TensorHandle) {
    if (key !== construct) throw new P2RError('ERR_VALUE', 'Tensors are made by device.tensor()')
    this.device = device
    this.shape = Object.freeze(handle.shape)
    this.dtype = handle.dtype as typeof this.dtype
    this.size = this.shape.reduce((n, d) => n * d, 1)
    this.byteLength = this.size * hostTypes[this.dtype].BYTES_PER_ELEMENT
    this.#handle = handle
    track(this)
  }

  /** A copy of the data on the host; f16 and bf16 as raw bits in a Uint16Array. */
  async read(): Promise<HostOf<D>> {
    const bytes = await this.#handle.read()
    return new hostTypes[this.dtype](bytes) as HostOf<D>
  }

  /** As `read`, converted to f32. */
  async toFloat32(): Promise<Float32Array> {
    if (this.dtype === 'f32') return (await this.read()) as Float32Array
    const wide = this.cast('f32')
    try {
      return await wide.read()
    } finally {
      wide.dispose()
    }
  }

  /** A view of the same storage with another shape of the same size. */
  reshape(shape: readonly number[]): Tensor<D> {
    return wrap(this.device, this.#handle.reshape(shape))
  }

  /** A view of the rows start..end of the first axis. */
  slice(start: number, end: number = this.shape[0] ?? 0): Tensor<D> {
    return wrap(this.device, this.#handle.slice(start, end))
  }

  /** A converted copy: to nearest even for the float types; to i32 and u8 by truncation, saturating. */
  cast<E extends DType>(dtype: E): Tensor<E> {
    if (!(dtype in hostTypes)) refuse('ERR_VALUE', 'cast', `unknown dtype '${String(dtype)}'`)
    return wrap(this.device, native().ops.cast!(this.#handle, dtype) as TensorHandle)
  }

  /** Overwrites the data, in the order of the queue. Types as for `device.tensor`. */
  write(data: HostArray): void {
    this.#handle.write(hostData(data, this.dtype, 'write'))
  }

  /** Overwrites the data with that of a tensor of the same shape, type and device. */
  copyFrom(other: Tensor): void {
    this.#handle.copyFrom(handleOf(other, 'other', 'copyFrom'))
  }

  /** A copy on another device, ordered on both queues. */
  to(device: Device): Tensor<D> {
    return wrap(device, this.#handle.to((device as Device | undefined)?.handle))
  }

  /**
   * A handle by which another process opens this tensor's memory, so that each sees what the other
   * writes. Resolves when the queued work is done; the two processes must order later writes, for
   * example by `device.synchronize()` and a message. On CUDA it is an IPC handle; on the CPU the storage
   * moves into a file in shared memory, with all of its views.
   *
   * @throws ERR_DEVICE where the platform cannot share CUDA memory; ERR_MEMORY or ERR_IO where there is
   *   no space for the file. A fault of the tensor is thrown as by `read`.
   */
  async ipcHandle(): Promise<IpcHandle> {
    const { shape, dtype } = this
    return share(this.#handle, { backend: this.device.info.backend, shape, dtype })
  }

  /** Releases the storage; a second call does nothing. Shape and dtype stay readable. */
  dispose(): void {
    this.#handle.dispose()
    untrack(this)
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  /** @internal */
  static handle(tensor: Tensor): TensorHandle {
    return tensor.#handle
  }
  /** @internal */
  static is(value: unknown): value is Tensor {
    return typeof value === 'object' && value !== null && #handle in value
  }
}

/** @internal A native handle as a tensor of `device`. */
export function wrap<D extends DType>(device: Device, handle: unknown): Tensor<D> {
  return new Tensor<D>(construct, device, handle as TensorHandle)
}

/** @internal The native handle of an argument; anything but a tensor is ERR_VALUE. */
export function handleOf(value: unknown, name: string, op: string): TensorHandle {
  if (!Tensor.is(value))
    refuse('ERR_VALUE', op, `${name} must be a Tensor, got ${describeValue(value)}`)
  return Tensor.handle(value)
}

/** @internal As handleOf, null for an argument that was not given. */
export function maybeHandle(value: unknown, name: string, op: string): TensorHandle | null {
  return value === undefined || value === null ? null : handleOf(value, name, op)
}

/** @internal The native handles of a list of tensors, whose parts are named by their index. */
export function handlesOf(list: readonly Tensor[], name: string, op: string): TensorHandle[] {
  const tensors = checkArray(list, name, op, 'an array of Tensors')
  return tensors.map((tensor, i) => handleOf(tensor, `${name}[${i}]`, op))
}

/** @internal Height and width of an image: u8 [height, width, 3], not empty. */
export function imageSize(image: Tensor, op: string): [height: number, width: number] {
  handleOf(image, 'image', op)
  const [height, width, channels] = image.shape
  if (image.shape.length !== 3 || channels !== 3 || !height || !width)
    refuse(
      'ERR_SHAPE',
      op,
      `image must be [height, width, 3] and not empty, got [${image.shape.join(', ')}]`,
    )
  if (image.dtype !== 'u8') refuse('ERR_DTYPE', op, `image must be u8, got ${image.dtype}`)
  return [height, width]
}

/** @internal Adds a dispose for all tensors of `parts` and for `hidden` ones, which closures use. */
export function held<R extends object>(parts: R, hidden: readonly Tensor[] = []): Held<R> {
  const dispose = (): void => {
    for (const part of [...Object.values(parts).flat(), ...hidden])
      if (Tensor.is(part)) part.dispose()
  }
  if (hidden.length) Object.defineProperty(parts, holds, { value: () => hidden })
  Object.defineProperty(parts, 'dispose', { value: dispose })
  Object.defineProperty(parts, Symbol.dispose, { value: dispose })
  return parts as Held<R>
}

const halves = new Set<DType>(['f16', 'bf16'])

/** @internal Host data as the typed array that the addon takes for dtype. */
export function hostData(data: HostArray, dtype: DType, op: string): TypedArray {
  const type = hostTypes[dtype]
  if (data instanceof type) return data
  if (data instanceof Uint8ClampedArray && dtype === 'u8')
    return new Uint8Array(data.buffer, data.byteOffset, data.length)
  if (!Array.isArray(data) && !isNumbers(data))
    refuse('ERR_VALUE', op, `data must be a typed array or numbers, got ${describeValue(data)}`)
  if (data instanceof Uint16Array)
    refuse('ERR_DTYPE', op, `a Uint16Array holds raw bits of f16 or bf16, got dtype ${dtype}`)
  const numbers = data as ArrayLike<number>
  if (Array.isArray(data))
    for (let i = 0; i < numbers.length; i++)
      if (typeof numbers[i] !== 'number')
        refuse('ERR_VALUE', op, `data[${i}] must be a number, got ${describeValue(numbers[i])}`)
  if (dtype === 'f32') return Float32Array.from(numbers)
  if (halves.has(dtype)) return data instanceof Float32Array ? data : roundedToOdd(numbers)
  const out = type.from(numbers)
  for (let i = 0; i < out.length; i++)
    if (out[i] !== numbers[i])
      refuse('ERR_VALUE', op, `data[${i}] = ${numbers[i]} is not a value of ${dtype}`)
  return out
}

function isNumbers(data: unknown): boolean {
  return (
    ArrayBuffer.isView(data) &&
    !(data instanceof DataView) &&
    !(data instanceof BigInt64Array || data instanceof BigUint64Array)
  )
}

// Rounds float64 to f32 by round-to-odd, so that rounding further to 16 bits equals rounding once: the
// discarded bits stay in the last bit as a sticky bit, and cannot produce a tie.
function roundedToOdd(numbers: ArrayLike<number>): Float32Array {
  const out = Float32Array.from(numbers)
  const bits = new Uint32Array(out.buffer)
  for (let i = 0; i < out.length; i++) {
    const x = numbers[i]!
    const f = out[i]!
    if (f === x || Number.isNaN(x)) continue
    if (Math.abs(f) > Math.abs(x)) bits[i]! -= 1 // towards zero; infinity becomes the largest finite
    bits[i]! |= 1
  }
  return out
}

/** @internal The dtype of host data when none is given. */
export function defaultDType(data: HostArray): DType {
  if (data instanceof Int32Array) return 'i32'
  if (data instanceof Uint8Array || data instanceof Uint8ClampedArray) return 'u8'
  if (data instanceof Uint16Array)
    refuse('ERR_DTYPE', 'tensor', "a Uint16Array needs a dtype: 'f16' or 'bf16' for raw bits")
  return 'f32'
}
