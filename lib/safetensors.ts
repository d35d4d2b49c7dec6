import type { FileHandle } from 'node:fs/promises'
import {
  checkArguments,
  checkFunction,
  checkObject,
  checkString,
  describeValue,
  isJsonObject,
  type Names,
} from './arguments.js'
import { checkDevice, type Device } from './device.js'
import { type DType, hostTypes, isFloatDType } from './dtype.js'
import { P2RError, refuse } from './errors.js'
import { openRegular, replaceFile } from './files.js'
import { type HostArray, handleOf, type Tensor } from './tensor.js'

// The file: the header's length (8 bytes, little-endian), the header (JSON), the data. The header
// gives each tensor's dtype, shape and byte range in the data, which the tensors fill without gaps.
// https://huggingface.co/docs/safetensors
const fileTypes = { f32: 'F32', f16: 'F16', bf16: 'BF16', i32: 'I32', u8: 'U8' } as const
const dtypes = new Map<string, DType>(
  Object.entries(fileTypes).map(([dtype, stored]) => [stored, dtype as DType]),
)
/** Bytes an element of the format's other types, which are loaded as bytes; those of fewer than 8 bits are not. */
const rawTypes = new Map<string, number>([
  ['F8_E4M3', 1],
  ['F8_E5M2', 1],
  ['F8_E8M0', 1],
  ['BOOL', 1],
  ['I8', 1],
  ['I16', 2],
  ['U16', 2],
  ['U32', 4],
  ['I64', 8],
  ['U64', 8],
  ['F64', 8],
  ['C64', 8],
])

/** The format's own limit on the header. */
const maxHeader = 100_000_000
const maxRank = 8
/** Node reads and writes fewer than 2^31 bytes at once. */
const maxTransfer = 1 << 30
/** Bytes of a tensor that the host holds at a time while it is loaded. */
const maxPart = 1 << 24

/**
 * Writes tensors into a safetensors file. The values are those that the tensors have once the work
 * queued so far is done: they may be changed or disposed after the call. The file is replaced
 * atomically.
 *
 * @param tensors by name; of any device.
 * @param metadata strings that go into the header.
 * @throws P2RError ERR_IO, with its cause, when the file cannot be written; ERR_VALUE for anything but
 *   tensors and strings by name; a fault of a tensor as by `read`.
 * @example
 * ```js
 * import { tmpdir } from 'node:os'
 * import { loadTensors, openDevice, saveTensors } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const path = `${tmpdir()}/p2r-example.safetensors`
 * await saveTensors(path, { weight: device.tensor([1, 2], [2], 'bf16') }, { step: '7' })
 * console.log(String((await loadTensors(path, device)).weight)) // Tensor bf16 [2] on cpu
 * device.dispose()
 * ```
 */
export async function saveTensors(
  path: string,
  tensors: Readonly<Record<string, Tensor>>,
  metadata?: Readonly<Record<string, string>>,
): Promise<void> {
  const op = 'saveTensors'
  checkString(path, 'path', op)
  checkObject(tensors, 'tensors', op, 'Tensors by name')
  const entries = Object.entries(tensors)
  for (const [name, tensor] of entries) {
    handleOf(tensor, `tensors['${name}']`, op)
    if (name === '__metadata__')
      refuse('ERR_VALUE', op, "a tensor cannot be named '__metadata__', which is the header's own")
  }
  if (metadata !== undefined) checkObject(metadata, 'metadata', op, 'strings by name')
  for (const [key, value] of Object.entries(metadata ?? {}))
    checkString(value, `metadata['${key}']`, op)
  // Wide types first, so that every tensor is aligned to its element size.
  entries.sort(([a, x], [b, y]) => width(y) - width(x) || (a < b ? -1 : 1))

  const header: [string, unknown][] = metadata ? [['__metadata__', metadata]] : []
  let end = 0
  for (const [name, { dtype, shape, byteLength }] of entries) {
    header.push([name, { dtype: fileTypes[dtype], shape, data_offsets: [end, end + byteLength] }])
    end += byteLength
  }
  const json = Buffer.from(JSON.stringify(Object.fromEntries(header)))
  const length = Math.ceil(json.length / 8) * 8
  if (length > maxHeader)
    refuse('ERR_VALUE', op, `the header must have at most ${maxHeader} bytes, got ${length}`)
  const start = Buffer.alloc(8 + length, ' ')
  start.writeBigUInt64LE(BigInt(length))
  json.copy(start, 8)

  // All reads are queued now; each result is released once it is written.
  const reads = entries.map(([, tensor]) => tensor.read())
  for (const read of reads) read.catch(() => {})
  async function* parts(): AsyncGenerator<NodeJS.TypedArray> {
    yield start
    for (let read = reads.shift(); read; read = reads.shift()) yield await read
  }
  await replaceFile(path, parts()).catch((cause) => fail(cause, path, 'written', op))
}

/** Options of loadTensors. */
export interface LoadTensorsOptions {
  /**
   * Which tensors to load, by their names; the others are neither read nor need a known type.
   * @default all
   */
  only?: (name: string) => boolean
}

const loadNames: Names<LoadTensorsOptions> = { only: true }

/**
 * The tensors of a safetensors file by name, on a device. The host holds at most 16 MiB of the file at a
 * time.
 *
 * F32, F16, BF16, I32 and U8 have their dtype. Types that no tensor has are loaded as their bytes, u8,
 * unconverted: F8_E4M3, F8_E5M2, F8_E8M0, I8 and BOOL in their shape; I16, U16, U32, I64, U64, F64 and
 * C64 with one more axis, the bytes of an element in little-endian order, e.g. [3, 8] for an I64 [3].
 *
 * @throws P2RError ERR_IO, with its cause, for a file that cannot be read; ERR_FORMAT for one that is not a
 *   safetensors file, and for a tensor to load of any other type; ERR_VALUE for wrong arguments; ERR_MEMORY.
 *   An error thrown by `only` is passed on.
 * @example
 * ```js
 * import { tmpdir } from 'node:os'
 * import { loadTensors, openDevice, saveTensors } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const path = `${tmpdir()}/p2r-example.safetensors`
 * await saveTensors(path, { bias: device.tensor([0.5], [1]), weight: device.zeros([4, 4]) })
 * const { bias } = await loadTensors(path, device, { only: (name) => name.endsWith('bias') })
 * console.log(await bias.read()) // Float32Array(1) [ 0.5 ]
 * device.dispose()
 * ```
 */
export async function loadTensors(
  path: string,
  device: Device,
  options: LoadTensorsOptions = {},
): Promise<Record<string, Tensor>> {
  const op = 'loadTensors'
  options = checkArguments(options, loadNames, op, 'options')
  const { only } = options
  if (only === undefined) return loadSome(op, path, device, (name) => name)
  checkFunction(only, 'only', op)
  return loadSome(op, path, device, (name) => (only(name) ? name : undefined))
}

/** @internal What loadSome does beside loading. */
export interface LoadSomeOptions {
  /** What is kept in place of a tensor, called as soon as it is loaded; the tensor is disposed then, unless it is that. */
  keep?: (name: string, tensor: Tensor) => Disposable
  /** Called with the number of bytes whenever some were read. */
  onBytes?: (count: number) => void
}

/** @internal Those tensors of a file to which `rename` gives a name, under that name. */
export async function loadSome(
  op: string,
  path: string,
  device: Device,
  rename: (name: string) => string | undefined,
): Promise<Record<string, Tensor>>
/** @internal */
export async function loadSome<T extends Disposable>(
  op: string,
  path: string,
  device: Device,
  rename: (name: string) => string | undefined,
  options: LoadSomeOptions & { keep: (name: string, tensor: Tensor) => T },
): Promise<Record<string, T>>
/** @internal */
export async function loadSome(
  op: string,
  path: string,
  device: Device,
  rename: (name: string) => string | undefined,
  { keep = (_, tensor) => tensor, onBytes = () => {} }: LoadSomeOptions = {},
): Promise<Record<string, Disposable>> {
  checkString(path, 'path', op)
  checkDevice(device, op)
  const loaded: [string, Disposable][] = []
  const file = await openFile(path, op)
  try {
    const { entries, dataStart } = await readHeader(file, path, op)
    for (const entry of entries) {
      const name = rename(entry.name)
      if (name === undefined) continue
      const form = hostForm(entry, path, op)
      const range = { begin: dataStart + entry.begin, end: dataStart + entry.end }
      const tensor = await loadOne(op, file, path, device, form, range, onBytes)
      let kept: Disposable | undefined
      try {
        kept = keep(name, tensor)
        loaded.push([name, kept])
      } finally {
        if (kept !== tensor) tensor.dispose()
      }
    }
  } catch (error) {
    for (const [, kept] of loaded) kept[Symbol.dispose]()
    throw error
  } finally {
    await file.close()
  }
  return Object.fromEntries(loaded)
}

/** A tensor in a file that is not loaded yet. */
export interface StoredTensor {
  name: string
  /** Undefined for a type that no tensor has. */
  dtype: DType | undefined
  bytes: number
}

/** @internal Those tensors of a file to which `rename` gives a name, without their data. */
export async function listSome(
  op: string,
  path: string,
  rename: (name: string) => string | undefined,
): Promise<StoredTensor[]> {
  const file = await openFile(path, op)
  try {
    const { entries } = await readHeader(file, path, op)
    return entries.flatMap(({ name: stored, stored: type, begin, end }) => {
      const name = rename(stored)
      return name === undefined ? [] : [{ name, dtype: dtypes.get(type), bytes: end - begin }]
    })
  } finally {
    await file.close()
  }
}

/** A tensor of a byte range of a file; of a large one the host holds a part at a time. */
async function loadOne(
  op: string,
  file: FileHandle,
  path: string,
  device: Device,
  { dtype, shape }: { dtype: DType; shape: number[] },
  { begin, end }: { begin: number; end: number },
  onBytes: (count: number) => void,
): Promise<Tensor> {
  const part = async (from: number, to: number): Promise<HostArray> => {
    const data = new hostTypes[dtype]((to - from) / hostTypes[dtype].BYTES_PER_ELEMENT)
    await readAll(file, data, from, path, op)
    onBytes(to - from)
    return data
  }
  if (end - begin <= maxPart) return device.tensor(await part(begin, end), shape, dtype)
  const tensor = device.zeros(shape, dtype)
  try {
    const flat = tensor.reshape([tensor.size])
    const width = hostTypes[dtype].BYTES_PER_ELEMENT
    for (let from = begin; from < end; from += maxPart) {
      const to = Math.min(end, from + maxPart)
      const rows = flat.slice((from - begin) / width, (to - begin) / width)
      rows.write(await part(from, to))
      rows.dispose()
    }
    flat.dispose()
    return tensor
  } catch (error) {
    tensor.dispose()
    throw error
  }
}

/** The dtype and shape in which an entry is loaded. */
function hostForm(
  { name, stored, shape }: Entry,
  path: string,
  op: string,
): { dtype: DType; shape: number[] } {
  const bad = (why: string): never =>
    refuse('ERR_FORMAT', op, `${path}: '${name}' must have ${why}`)
  const dtype = dtypes.get(stored)
  const width = rawTypes.get(stored)
  if (!dtype && !width) {
    const known = [...dtypes.keys(), ...rawTypes.keys()].join(', ')
    return bad(`one of the dtypes ${known}, got '${stored}'`)
  }
  const axes = !dtype && width! > 1 ? [...shape, width!] : shape
  if (axes.length > maxRank)
    bad(`a shape of at most ${maxRank} sizes${axes === shape ? '' : ', with one for its bytes'}`)
  return { dtype: dtype ?? 'u8', shape: axes }
}

/**
 * The strings that saveTensors put into a file's header; none where there are none.
 *
 * @throws P2RError as `loadTensors`.
 * @example
 * ```js
 * import { tmpdir } from 'node:os'
 * import { loadMetadata, openDevice, saveTensors } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const path = `${tmpdir()}/p2r-example.safetensors`
 * await saveTensors(path, { x: device.zeros([1]) }, { step: '7' })
 * console.log(await loadMetadata(path)) // { step: '7' }
 * device.dispose()
 * ```
 */
export async function loadMetadata(path: string): Promise<Record<string, string>> {
  const op = 'loadMetadata'
  checkString(path, 'path', op)
  const file = await openFile(path, op)
  try {
    return (await readHeader(file, path, op)).metadata
  } finally {
    await file.close()
  }
}

/**
 * @internal Copies a file with other values: `replacement` gives a tensor of a stored one's elements, which is written in
 * the stored type; what it gives none for is copied. Header, order and layout stay.
 */
export async function rewriteTensors(
  op: string,
  source: string,
  path: string,
  replacement: (name: string) => Tensor | undefined,
): Promise<void> {
  const file = await openFile(source, op)
  try {
    const { entries, dataStart } = await readHeader(file, source, op)
    const copied = async function* (from: number, to: number): AsyncGenerator<Uint8Array> {
      for (let at = from; at < to; at += maxPart) {
        const part = new Uint8Array(Math.min(maxPart, to - at))
        await readAll(file, part, at, source, op)
        yield part
      }
    }
    async function* parts(): AsyncGenerator<NodeJS.TypedArray> {
      yield* copied(0, dataStart)
      for (const { name, stored, begin, end } of entries) {
        const tensor = replacement(name)
        if (!tensor) {
          yield* copied(dataStart + begin, dataStart + end)
          continue
        }
        const dtype = dtypes.get(stored)
        if (
          !isFloatDType(dtype) ||
          tensor.size * hostTypes[dtype].BYTES_PER_ELEMENT !== end - begin
        )
          refuse('ERR_FORMAT', op, `${source}: '${name}' is not the weight that was loaded`)
        if (tensor.dtype === dtype) {
          yield await tensor.read()
          continue
        }
        using converted = tensor.cast(dtype)
        yield await converted.read()
      }
    }
    await replaceFile(path, parts()).catch((cause) => fail(cause, path, 'written', op))
  } finally {
    await file.close()
  }
}

interface Entry {
  name: string
  /** The type by the format's name, which may be unknown. */
  stored: string
  shape: number[]
  begin: number
  end: number
}

/** The validated header; entries in the order of their data. */
async function readHeader(
  file: FileHandle,
  path: string,
  op: string,
): Promise<{ entries: Entry[]; dataStart: number; metadata: Record<string, string> }> {
  const bad = (why: string): never => refuse('ERR_FORMAT', op, `${path}: ${why}`)
  const bytes = (await file.stat().catch((cause) => fail(cause, path, 'read', op))).size
  if (bytes < 8) bad(`a safetensors file has at least 8 bytes, got ${bytes}`)
  const start = Buffer.alloc(8)
  await readAll(file, start, 0, path, op)
  const length = start.readBigUInt64LE()
  if (length > maxHeader) bad(`the header must have at most ${maxHeader} bytes, got ${length}`)
  const dataStart = 8 + Number(length)
  if (dataStart > bytes)
    bad(`the header should have ${length} bytes, but the file ends after ${bytes - 8}`)
  const text = Buffer.alloc(Number(length))
  await readAll(file, text, 8, path, op)
  let header: unknown
  try {
    header = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(text))
  } catch (cause) {
    refuse('ERR_FORMAT', op, `${path}: the header is not JSON`, { cause })
  }
  if (!isJsonObject(header))
    return bad(`the header must be a JSON object, got ${describeValue(header)}`)

  const entries: Entry[] = []
  let metadata: Record<string, string> = {}
  for (const [name, entry] of Object.entries(header)) {
    if (name === '__metadata__') {
      if (!isJsonObject(entry) || !Object.values(entry).every((value) => typeof value === 'string'))
        bad('__metadata__ must hold strings by name')
      metadata = entry as Record<string, string>
      continue
    }
    entries.push(readEntry(name, entry, bad))
  }
  entries.sort((a, b) => a.begin - b.begin || a.end - b.end)
  let end = 0
  for (const entry of entries) {
    if (entry.begin !== end)
      bad(
        `'${entry.name}' must start at byte ${end} of the data, where the tensor before it ends, got ${entry.begin}`,
      )
    end = entry.end
  }
  if (end !== bytes - dataStart)
    bad(`the tensors have ${end} bytes, but the file has ${bytes - dataStart} bytes of data`)
  return { entries, dataStart, metadata }
}

function readEntry(name: string, entry: unknown, bad: (why: string) => never): Entry {
  if (!isJsonObject(entry)) return bad(`'${name}' must be an object, got ${describeValue(entry)}`)
  const { dtype: stored, shape, data_offsets: offsets } = entry
  if (typeof stored !== 'string')
    return bad(`'${name}' must have a dtype, got ${describeValue(stored)}`)
  if (!isSizes(shape)) return bad(`'${name}' must have a shape, a list of sizes`)
  if (!isSizes(offsets) || offsets.length !== 2)
    return bad(`'${name}' must have data_offsets of two whole numbers`)
  const [begin, end] = offsets as [number, number]
  const dtype = dtypes.get(stored)
  const width = dtype ? hostTypes[dtype].BYTES_PER_ELEMENT : rawTypes.get(stored)
  const size = shape.includes(0) ? 0 : shape.reduce((n, d) => n * d, 1)
  // Of an unknown type only the order of its offsets can be checked.
  if (width === undefined ? end < begin : end - begin !== size * width)
    bad(
      `'${name}', ${stored} [${shape.join(', ')}], does not fit its data_offsets [${begin}, ${end}]`,
    )
  return { name, stored, shape, begin, end }
}

function isSizes(value: unknown): value is number[] {
  return Array.isArray(value) && value.every((n) => Number.isSafeInteger(n) && n >= 0)
}

function width(tensor: Tensor): number {
  return hostTypes[tensor.dtype].BYTES_PER_ELEMENT
}

async function readAll(
  file: FileHandle,
  into: NodeJS.TypedArray,
  position: number,
  path: string,
  op: string,
): Promise<void> {
  const bytes = new Uint8Array(into.buffer, into.byteOffset, into.byteLength)
  for (let at = 0; at < bytes.length; ) {
    const length = Math.min(bytes.length - at, maxTransfer)
    const { bytesRead } = await file
      .read(bytes, at, length, position + at)
      .catch((cause) => fail(cause, path, 'read', op))
    if (!bytesRead) refuse('ERR_FORMAT', op, `${path}: the file ends at byte ${position + at}`)
    at += bytesRead
  }
}

function openFile(path: string, op: string): Promise<FileHandle> {
  return openRegular(path).catch((cause) => fail(cause, path, 'read', op))
}

/** Rethrows errors of the library; those of the file system become ERR_IO. */
function fail(cause: unknown, path: string, done: string, op: string): never {
  if (cause instanceof P2RError) throw cause
  refuse('ERR_IO', op, `${path} could not be ${done}: ${(cause as Error).message}`, { cause })
}
