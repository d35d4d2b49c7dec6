import { randomUUID } from 'node:crypto'
import { type FileHandle, open, rename, unlink } from 'node:fs/promises'
import { Device } from './device.js'
import { P2RError, refuse } from './errors.js'
import { type DType, describeValue, type HostArray, handleOf, type Tensor } from './tensor.js'

// The file: the header's length (8 bytes, little-endian), the header (JSON), the data. The header
// gives each tensor's dtype, shape and place in the data, which the tensors fill without gaps.
// https://huggingface.co/docs/safetensors
const fileTypes = { f32: 'F32', f16: 'F16', bf16: 'BF16', i32: 'I32', u8: 'U8' } as const
const hostTypes = {
  F32: ['f32', Float32Array],
  F16: ['f16', Uint16Array],
  BF16: ['bf16', Uint16Array],
  I32: ['i32', Int32Array],
  U8: ['u8', Uint8Array],
} as const
type FileType = keyof typeof hostTypes

/** The format's own limit on the header. */
const maxHeader = 100_000_000
const maxRank = 8
/** Node reads and writes fewer than 2^31 bytes at once. */
const maxTransfer = 1 << 30

/**
 * Writes tensors into a safetensors file. The values are those that the tensors have once the work
 * queued so far is done: they may be changed or disposed after the call. The file appears whole or
 * not at all.
 *
 * @param tensors by name; of any device.
 * @param metadata strings that go into the header.
 * @throws ERR_IO, with its cause, when the file cannot be written.
 */
export async function saveTensors(
  path: string,
  tensors: Readonly<Record<string, Tensor>>,
  metadata?: Readonly<Record<string, string>>,
): Promise<void> {
  const op = 'saveTensors'
  checkPath(path, op)
  if (typeof tensors !== 'object' || tensors === null)
    refuse('ERR_VALUE', op, `tensors must be Tensors by name, got ${describeValue(tensors)}`)
  const entries = Object.entries(tensors)
  for (const [name, tensor] of entries) {
    handleOf(tensor, `tensors['${name}']`, op)
    if (name === '__metadata__')
      refuse('ERR_VALUE', op, "a tensor cannot be named '__metadata__', which is the header's own")
  }
  for (const [key, value] of Object.entries(metadata ?? {}))
    if (typeof value !== 'string')
      refuse('ERR_VALUE', op, `metadata['${key}'] must be a string, got ${describeValue(value)}`)
  // Wide types first, so that every tensor lies at a multiple of its element's size.
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

  // All reads are queued now; each result is dropped once it is written.
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
 * @throws ERR_IO, with its cause, for a file that cannot be read; ERR_FORMAT for one that is not a
 * safetensors file or holds another type.
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
  checkPath(path, op)
  if (!(device instanceof Device))
    refuse('ERR_VALUE', op, `device must be a Device, got ${describeValue(device)}`)
  const loaded: [string, Tensor][] = []
  try {
    const file = await open(path, 'r')
    try {
      const { entries, dataStart } = await readHeader(file, path, op)
      for (const { name: stored, type, shape, begin, size } of entries) {
        const name = rename(stored)
        if (name === undefined) continue
        const [dtype, HostType] = hostTypes[type]
        const data = new HostType(size)
        await readAll(file, data, dataStart + begin, path, op)
        loaded.push([name, device.tensor<DType>(data as HostArray, shape, dtype)])
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

interface Entry {
  name: string
  type: FileType
  shape: number[]
  begin: number
  end: number
  /** Elements. */
  size: number
}

/** The header, checked: nothing in a file is trusted. Entries come in the order of their data. */
async function readHeader(
  file: FileHandle,
  path: string,
  op: string,
): Promise<{ entries: Entry[]; dataStart: number }> {
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
  if (!isObject(header))
    return bad(`the header must be a JSON object, got ${describeValue(header)}`)

  const entries: Entry[] = []
  for (const [name, entry] of Object.entries(header)) {
    if (name === '__metadata__') {
      if (!isObject(entry) || !Object.values(entry).every((value) => typeof value === 'string'))
        bad('__metadata__ must hold strings by name')
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
  return { entries, dataStart }
}

function readEntry(name: string, entry: unknown, bad: (why: string) => never): Entry {
  if (!isObject(entry)) return bad(`'${name}' must be an object, got ${describeValue(entry)}`)
  const { dtype, shape, data_offsets: offsets } = entry
  if (typeof dtype !== 'string' || !Object.hasOwn(hostTypes, dtype))
    return bad(`'${name}' must have dtype F32, F16, BF16, I32 or U8, got ${describeValue(dtype)}`)
  const type = dtype as FileType
  if (!isSizes(shape) || shape.length > maxRank)
    return bad(`'${name}' must have a shape of at most ${maxRank} sizes`)
  if (!isSizes(offsets) || offsets.length !== 2)
    return bad(`'${name}' must have data_offsets of two whole numbers`)
  const [begin, end] = offsets as [number, number]
  const size = shape.includes(0) ? 0 : shape.reduce((n, d) => n * d, 1)
  if (end - begin !== size * hostTypes[type][1].BYTES_PER_ELEMENT)
    bad(
      `'${name}', ${dtype} [${shape.join(', ')}], does not fit its data_offsets [${begin}, ${end}]`,
    )
  return { name, type, shape, begin, end, size }
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function isSizes(value: unknown): value is number[] {
  return Array.isArray(value) && value.every((n) => Number.isSafeInteger(n) && n >= 0)
}

function width(tensor: Tensor): number {
  return hostTypes[fileTypes[tensor.dtype]][1].BYTES_PER_ELEMENT
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

function checkPath(path: unknown, op: string): void {
  if (typeof path !== 'string')
    refuse('ERR_VALUE', op, `path must be a string, got ${describeValue(path)}`)
}

/** What the library threw goes on; what the file system threw is ERR_IO. */
function fail(cause: unknown, path: string, done: string, op: string): never {
  if (cause instanceof P2RError) throw cause
  refuse('ERR_IO', op, `${path} could not be ${done}: ${(cause as Error).message}`, { cause })
}
