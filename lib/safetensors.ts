import { randomUUID } from 'node:crypto'
import { type FileHandle, open, rename, unlink } from 'node:fs/promises'
import { checkObject, checkString, describeValue, isJsonObject } from './arguments.js'
import { checkDevice, type Device } from './device.js'
import { type DType, hostTypes } from './dtype.js'
import { P2RError, refuse } from './errors.js'
import { type HostArray, handleOf, type Tensor } from './tensor.js'

// The file: the header's length (8 bytes, little-endian), the header (JSON), the data. The header
// gives each tensor's dtype, shape and byte range in the data, which the tensors fill without gaps.
// https://huggingface.co/docs/safetensors
const fileTypes = { f32: 'F32', f16: 'F16', bf16: 'BF16', i32: 'I32', u8: 'U8' } as const
const dtypes = new Map<string, DType>(
  Object.entries(fileTypes).map(([dtype, stored]) => [stored, dtype as DType]),
)

/** The format's own limit on the header. */
const maxHeader = 100_000_000
const maxRank = 8
/** Node reads and writes fewer than 2^31 bytes at once. */
const maxTransfer = 1 << 30

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
  const temporary = `${path}.${randomUUID()}.tmp`
  try {
    const file = await open(temporary, 'wx')
    try {
      await writeAll(file, start)
      for (let read = reads.shift(); read; read = reads.shift()) await writeAll(file, await read)
      await file.sync()
    } finally {
      await file.close()
    }
    await rename(temporary, path)
  } catch (cause) {
    await unlink(temporary).catch(() => {})
    fail(cause, path, 'written', op)
  }
}

/**
 * The tensors of a safetensors file by name, on a device. f32, f16, bf16, i32 and u8; tensor by
 * tensor, so that the host holds one at a time.
 *
 * @throws P2RError ERR_IO, with its cause, for a file that cannot be read; ERR_FORMAT for one that is not a
 *   safetensors file or holds another type; ERR_VALUE for wrong arguments; ERR_MEMORY.
 * @example
 * ```js
 * import { tmpdir } from 'node:os'
 * import { loadTensors, openDevice, saveTensors } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const path = `${tmpdir()}/p2r-example.safetensors`
 * await saveTensors(path, { bias: device.tensor([0.5], [1]) })
 * const { bias } = await loadTensors(path, device)
 * console.log(await bias.read()) // Float32Array(1) [ 0.5 ]
 * device.dispose()
 * ```
 */
export async function loadTensors(path: string, device: Device): Promise<Record<string, Tensor>> {
  return loadSome('loadTensors', path, device, (name) => name)
}

/** @internal Those tensors of a file to which `rename` gives a name, under that name. */
export async function loadSome(
  op: string,
  path: string,
  device: Device,
  rename: (name: string) => string | undefined,
): Promise<Record<string, Tensor>> {
  checkString(path, 'path', op)
  checkDevice(device, op)
  const loaded: [string, Tensor][] = []
  try {
    const file = await open(path, 'r')
    try {
      const { entries, dataStart } = await readHeader(file, path, op)
      for (const { name: stored, dtype, shape, begin, size } of entries) {
        const name = rename(stored)
        if (name === undefined) continue
        const data = new hostTypes[dtype](size)
        await readAll(file, data, dataStart + begin, path, op)
        loaded.push([name, device.tensor(data as HostArray, shape, dtype)])
      }
    } finally {
      await file.close()
    }
  } catch (cause) {
    for (const [, tensor] of loaded) tensor.dispose()
    fail(cause, path, 'read', op)
  }
  return Object.fromEntries(loaded)
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
  try {
    const file = await open(path, 'r')
    try {
      return (await readHeader(file, path, op)).metadata
    } finally {
      await file.close()
    }
  } catch (cause) {
    fail(cause, path, 'read', op)
  }
}

interface Entry {
  name: string
  dtype: DType
  shape: number[]
  begin: number
  end: number
  /** Elements. */
  size: number
}

/** The validated header; entries in the order of their data. */
async function readHeader(
  file: FileHandle,
  path: string,
  op: string,
): Promise<{ entries: Entry[]; dataStart: number; metadata: Record<string, string> }> {
  const bad = (why: string): never => refuse('ERR_FORMAT', op, `${path}: ${why}`)
  const bytes = (await file.stat()).size
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
  const dtype = dtypes.get(stored as string)
  if (!dtype)
    return bad(`'${name}' must have dtype F32, F16, BF16, I32 or U8, got ${describeValue(stored)}`)
  if (!isSizes(shape) || shape.length > maxRank)
    return bad(`'${name}' must have a shape of at most ${maxRank} sizes`)
  if (!isSizes(offsets) || offsets.length !== 2)
    return bad(`'${name}' must have data_offsets of two whole numbers`)
  const [begin, end] = offsets as [number, number]
  const size = shape.includes(0) ? 0 : shape.reduce((n, d) => n * d, 1)
  if (end - begin !== size * hostTypes[dtype].BYTES_PER_ELEMENT)
    bad(
      `'${name}', ${stored} [${shape.join(', ')}], does not fit its data_offsets [${begin}, ${end}]`,
    )
  return { name, dtype, shape, begin, end, size }
}

function isSizes(value: unknown): value is number[] {
  return Array.isArray(value) && value.every((n) => Number.isSafeInteger(n) && n >= 0)
}

function width(tensor: Tensor): number {
  return hostTypes[tensor.dtype].BYTES_PER_ELEMENT
}

async function writeAll(file: FileHandle, data: NodeJS.TypedArray): Promise<void> {
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength)
  for (let at = 0; at < bytes.length; ) {
    const { bytesWritten } = await file.write(bytes, at, Math.min(bytes.length - at, maxTransfer))
    at += bytesWritten
  }
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
    const { bytesRead } = await file.read(bytes, at, length, position + at)
    if (!bytesRead) refuse('ERR_FORMAT', op, `${path}: the file ends at byte ${position + at}`)
    at += bytesRead
  }
}

/** Rethrows errors of the library; those of the file system become ERR_IO. */
function fail(cause: unknown, path: string, done: string, op: string): never {
  if (cause instanceof P2RError) throw cause
  refuse('ERR_IO', op, `${path} could not be ${done}: ${(cause as Error).message}`, { cause })
}
