import { type InspectOptions, inspect } from 'node:util'
import { checkArray, checkNumber, describeValue, hostMemory } from './arguments.js'
import type { Device } from './device.js'
import { checkDType, type DType, hostTypes } from './dtype.js'
import { P2RError, refuse } from './errors.js'
import { type IpcHandle, type IpcOptions, share } from './ipc.js'
import { native, type TensorHandle, type TypedArray } from './native.js'
import { holds, track, untrack } from './scope.js'

/** Host data that a tensor is made of or overwritten with. */
export type HostArray =
  | Float32Array
  | Uint16Array
  | Int32Array
  | Uint8Array
  | Uint8ClampedArray
  | Float64Array
  | readonly number[]
/** The typed array into which a tensor of dtype D is read; f16 and bf16 as raw bits. */
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

const construct: unique symbol = Symbol('construct')

/** What console.log and util.inspect call. */
const customInspect: unique symbol = Symbol.for('nodejs.util.inspect.custom')

// structuredClone and postMessage copy an object's own enumerable fields and would deliver an object without
// its data. They refuse symbols, with the symbol's description as the message.
const uncloneable = Symbol(
  'a Tensor belongs to its thread; send the data of read(), or ipcHandle(): a Tensor',
)

/**
 * Contiguous, row-major numbers on one device. Made by `device.tensor`, `device.zeros` and the
 * operations. Storage is shared by views (`reshape`, `slice`) and freed with its last handle.
 *
 * `Tensor<'f32'>` is a tensor of that type; a bare `Tensor` is one whose type is known only when the program
 * runs, as of a file, and is accepted everywhere.
 *
 * @example
 * ```js
 * import { openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const x = device.tensor([1, 2, 3, 4, 5, 6], [2, 3])
 * console.log(String(x)) // Tensor f32 [2, 3] on cpu
 * console.log(await x.slice(1, 2).cast('i32').read()) // Int32Array(3) [ 4, 5, 6 ]
 * device.dispose()
 * ```
 */
// biome-ignore lint/suspicious/noExplicitAny: a bare Tensor has a dtype known only at run time, and is accepted everywhere
export class Tensor<out D extends DType = any> implements Disposable {
  /** @internal */
  readonly uncloneable: symbol = uncloneable
  /** Where its values are. */
  readonly device: Device
  /** The sizes of the axes, at most 8; [] is a scalar. */
  readonly shape: readonly number[]
  /** The type of its values. */
  readonly dtype: Spelled<D>
  /** The number of elements: the product of the shape. */
  readonly size: number
  /** Bytes of the data: `size` times the element's 1, 2 or 4. */
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

  /**
   * A copy of the data on the host, once the work queued on it is done; f16 and bf16 as raw bits in a
   * Uint16Array.
   *
   * @throws P2RError ERR_VALUE, under the name of the operation at fault, where a kernel found an invalid value
   *   that this data depends on; ERR_MEMORY where the host has no room; ERR_DISPOSED; ERR_CUDA where the
   *   device was lost.
   */
  async read(): Promise<HostOf<D>> {
    const handle = handleOf(this, 'this', 'read')
    const bytes = hostMemory(() => new ArrayBuffer(this.byteLength), 'read')
    await handle.read(bytes)
    return new hostTypes[this.dtype](bytes) as HostOf<D>
  }

  /**
   * As `read`, converted to f32.
   *
   * @throws P2RError as `read`.
   */
  async toFloat32(): Promise<Float32Array> {
    handleOf(this, 'this', 'toFloat32')
    if (this.dtype === 'f32') return (await this.read()) as Float32Array
    const wide = this.cast('f32')
    try {
      return await wide.read()
    } finally {
      wide.dispose()
    }
  }

  /**
   * The value of a tensor of one element, as `read` and `toFloat32` give it.
   *
   * @throws P2RError ERR_SHAPE for another number of elements; as `read`.
   */
  async item(): Promise<number> {
    handleOf(this, 'this', 'item')
    if (this.size !== 1)
      refuse('ERR_SHAPE', 'item', `a tensor of ${this.size} elements is no single value`)
    const isInteger = this.dtype === 'i32' || this.dtype === 'u8'
    const [value] = await (isInteger ? this.read() : this.toFloat32())
    return value!
  }

  /**
   * A view of the same storage with another shape of the same size.
   *
   * @throws P2RError ERR_SHAPE for a shape of another size; ERR_VALUE for anything but a shape; ERR_DISPOSED.
   */
  reshape(shape: readonly number[]): Tensor<D> {
    const handle = handleOf(this, 'this', 'reshape')
    return wrap(this.device, handle.reshape(shape))
  }

  /**
   * A view of the rows `start` to `end`, exclusive, of the first axis.
   *
   * @param end default: the number of rows
   * @throws P2RError ERR_VALUE for rows out of range; ERR_SHAPE for a scalar; ERR_DISPOSED.
   */
  slice(start: number, end?: number): Tensor<D> {
    const handle = handleOf(this, 'this', 'slice')
    checkNumber(start, 'start', 'slice')
    if (end !== undefined) checkNumber(end, 'end', 'slice')
    return wrap(this.device, handle.slice(start, end ?? this.shape[0] ?? 0))
  }

  /**
   * A converted copy: to nearest even for the float types; to i32 and u8 by truncation, saturating.
   *
   * @throws P2RError ERR_DTYPE for an unknown type; ERR_DISPOSED; ERR_MEMORY.
   */
  cast<E extends DType>(dtype: E): Tensor<E> {
    const handle = handleOf(this, 'this', 'cast')
    checkDType(dtype, 'cast')
    return wrap(this.device, native().ops.cast!(handle, dtype) as TensorHandle)
  }

  /**
   * Overwrites the data, in the order of the queue. Types as for `device.tensor`.
   *
   * @throws P2RError ERR_SHAPE for data of another size; ERR_DTYPE, ERR_VALUE for data of another type;
   *   ERR_DISPOSED.
   */
  write(data: HostArray): void {
    const handle = handleOf(this, 'this', 'write')
    handle.write(hostData(data, this.dtype, 'write'))
  }

  /**
   * Overwrites the data with that of a tensor of the same shape, type and device.
   *
   * @throws P2RError ERR_SHAPE, ERR_DTYPE, ERR_DEVICE for a tensor that does not fit; ERR_DISPOSED.
   */
  copyFrom(other: Tensor): void {
    handleOf(this, 'this', 'copyFrom').copyFrom(handleOf(other, 'other', 'copyFrom'))
  }

  /**
   * A copy on a device, ordered on the queues of both; on the same device a copy too.
   *
   * @throws P2RError ERR_VALUE for anything but a device; ERR_DISPOSED; ERR_MEMORY.
   */
  to(device: Device): Tensor<D> {
    const handle = handleOf(this, 'this', 'to')
    return wrap(device, handle.to((device as Device | undefined)?.handle))
  }

  /**
   * A handle by which another process opens this tensor's memory, so that each sees what the other
   * writes. Resolves when the queued work is done; the two processes must order later writes, for
   * example by `device.synchronize()` and a message. On CUDA it is an IPC handle; on the CPU the storage
   * moves into memory that can be shared, with all of its views; `file` is for one that is shared for the first time.
   *
   * @throws P2RError ERR_DEVICE where the platform cannot share CUDA memory; ERR_MEMORY or ERR_IO where there is
   *   no space for it; ERR_VALUE for options. A fault of the tensor is thrown as by `read`.
   */
  async ipcHandle(options: IpcOptions = {}): Promise<IpcHandle> {
    const handle = handleOf(this, 'this', 'ipcHandle')
    const { shape, dtype } = this
    return share(handle, { backend: this.device.info.backend, shape, dtype }, options)
  }

  /** Releases the storage; a second call does nothing. Shape and dtype stay readable. */
  dispose(): void {
    handleOf(this, 'this', 'dispose').dispose()
    untrack(this)
  }

  [Symbol.dispose](): void {
    Tensor.prototype.dispose.call(this)
  }

  /** 'Tensor f32 [2, 3] on cpu'. */
  toString(): string {
    return describeTensor(this, handleOf(this, 'this', 'toString'))
  }

  /** @internal As toString, with the values of a small tensor of the CPU whose queue is idle. */
  [customInspect](_depth?: unknown, options?: InspectOptions): string {
    // Printing must not throw, whatever has this prototype.
    return Tensor.is(this) ? inspectTensor(this, this.#handle, options ?? {}) : 'Tensor {}'
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

function describeTensor(tensor: Tensor, handle: TensorHandle): string {
  const { dtype, shape, device } = tensor
  const state = handle.disposed ? ', disposed' : ''
  return `Tensor ${dtype} [${shape.join(', ')}] on ${device.info.id}${state}`
}

/** Elements up to which a tensor is shown with its values. */
const maxShown = 64

function inspectTensor(tensor: Tensor, handle: TensorHandle, options: InspectOptions): string {
  const text = describeTensor(tensor, handle)
  const values = tensor.size <= maxShown && !handle.disposed ? handle.peek() : undefined
  if (!values) return text
  let at = 0
  const nest = (axis: number): unknown =>
    axis === tensor.shape.length
      ? values[at++]
      : Array.from({ length: tensor.shape[axis]! }, () => nest(axis + 1))
  return `${text} ${inspect(nest(0), { ...options, depth: null, maxArrayLength: null })}`
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
  const handles: TensorHandle[] = []
  // Not by the list's own methods, which run a caller's code.
  for (let i = 0; i < tensors.length; i++) handles.push(handleOf(tensors[i], `${name}[${i}]`, op))
  return handles
}

/** @internal Height and width of an image: u8 [height, width, 3], not empty. */
export function imageSize(
  image: Tensor,
  op: string,
  name = 'image',
): [height: number, width: number] {
  handleOf(image, name, op)
  const [height, width, channels] = image.shape
  if (image.shape.length !== 3 || channels !== 3 || !height || !width)
    refuse(
      'ERR_SHAPE',
      op,
      `${name} must be [height, width, 3] and not empty, got [${image.shape.join(', ')}]`,
    )
  if (image.dtype !== 'u8') refuse('ERR_DTYPE', op, `${name} must be u8, got ${image.dtype}`)
  return [height, width]
}

/** @internal Disposes every tensor in an object, an array or a map, and in those inside. */
export function disposeAll(value: unknown): void {
  if (Tensor.is(value)) value.dispose()
  else if (typeof value === 'object' && value !== null && !ArrayBuffer.isView(value))
    for (const inner of value instanceof Map ? value.values() : Object.values(value))
      disposeAll(inner)
}

/** Adds a dispose for all tensors of `parts` and for `hidden` ones, which closures use. */
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
export function hostData(given: HostArray, dtype: DType, op: string): TypedArray {
  const data = ofThisRealm(given)
  const type = hostTypes[dtype]
  if (data instanceof type) return data
  if (data instanceof Uint8ClampedArray && dtype === 'u8')
    return new Uint8Array(data.buffer, data.byteOffset, data.length)
  if (!Array.isArray(data) && !isNumbers(data))
    refuse('ERR_VALUE', op, `data must be a typed array or numbers, got ${describeValue(data)}`)
  if (data instanceof Uint16Array)
    refuse('ERR_DTYPE', op, `a Uint16Array holds raw bits of f16 or bf16, got dtype ${dtype}`)
  if (halves.has(dtype) && data instanceof Float32Array) return data
  const numbers = Array.isArray(data) ? numbersIn(data, op) : (data as Float64Array)
  if (dtype === 'f32') return hostMemory(() => new Float32Array(numbers), op)
  if (halves.has(dtype)) return hostMemory(() => roundedToOdd(numbers), op)
  const out = hostMemory(() => new type(numbers), op)
  for (let i = 0; i < out.length; i++)
    if (out[i] !== numbers[i])
      refuse('ERR_VALUE', op, `data[${i}] = ${numbers[i]} is not a value of ${dtype}`)
  return out
}

const nameOf = Object.getOwnPropertyDescriptor(
  Object.getPrototypeOf(Uint8Array.prototype),
  Symbol.toStringTag,
)!.get!
const typedArrays: Readonly<Record<string, new (...a: never) => HostArray>> = {
  Int32Array,
  Uint8Array,
  Uint8ClampedArray,
  Uint16Array,
  Float32Array,
  Float64Array,
}

/** A typed array of another realm (a vm context, jsdom, Electron), which `instanceof` does not know, as one of this. */
function ofThisRealm(data: HostArray): HostArray {
  if (!ArrayBuffer.isView(data)) return data
  const own = typedArrays[nameOf.call(data) ?? '']
  if (!own || data instanceof own) return data
  const { buffer, byteOffset, length } = data
  return new (own as Uint8ArrayConstructor)(buffer, byteOffset, length)
}

function isNumbers(data: unknown): boolean {
  return (
    ArrayBuffer.isView(data) &&
    !(data instanceof DataView) &&
    !(data instanceof BigInt64Array || data instanceof BigUint64Array)
  )
}

// A copy, because getters may give another value each time.
function numbersIn(list: readonly unknown[], op: string): Float64Array {
  const out = hostMemory(() => new Float64Array(list.length), op)
  for (let i = 0; i < out.length; i++) {
    const value = list[i]
    if (typeof value !== 'number')
      refuse('ERR_VALUE', op, `data[${i}] must be a number, got ${describeValue(value)}`)
    out[i] = value
  }
  return out
}

// Rounds float64 to f32 by round-to-odd, so that rounding further to 16 bits equals rounding once: the
// discarded bits stay in the last bit as a sticky bit, and cannot produce a tie.
function roundedToOdd(numbers: Float64Array): Float32Array {
  const out = new Float32Array(numbers)
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
export function defaultDType(given: HostArray): DType {
  const data = ofThisRealm(given)
  if (data instanceof Int32Array) return 'i32'
  if (data instanceof Uint8Array || data instanceof Uint8ClampedArray) return 'u8'
  if (data instanceof Uint16Array)
    refuse('ERR_DTYPE', 'tensor', "a Uint16Array needs a dtype: 'f16' or 'bf16' for raw bits")
  return 'f32'
}
