// Files that others made. A pipe or a device can keep a read waiting for ever, or never end: only regular files are
// read, and none beyond a limit.
import { randomUUID } from 'node:crypto'
import { constants } from 'node:fs'
import { type FileHandle, open, rename, unlink } from 'node:fs/promises'
import type { AbortSignalLike } from './abort.js'

/** Bytes of a file that is read as one text, and characters of a line: the engine's strings are hardly longer. */
const longestText = 500_000_000
/** Bytes read at once, between which an abort is noticed. */
const chunk = 1 << 26

/** A file is larger than what reads it takes. */
export class TooLarge extends Error {}

/** Opens a regular file for reading. Rejects with an Error for anything else, but for a folder, whose read fails. */
export async function openRegular(path: string): Promise<FileHandle> {
  // Without O_NONBLOCK a pipe without a writer would keep a thread of the file system's pool for ever.
  const file = await open(path, constants.O_RDONLY | (constants.O_NONBLOCK ?? 0))
  try {
    const about = await file.stat()
    if (!about.isFile() && !about.isDirectory()) throw new Error('it is not a regular file')
    return file
  } catch (error) {
    await file.close()
    throw error
  }
}

/** The bytes of a regular file of at most `most`; rejects with TooLarge where it has more. */
export async function readBytes(
  path: string,
  most: number,
  signal?: AbortSignalLike,
): Promise<Buffer> {
  const file = await openRegular(path)
  try {
    const { size } = await file.stat()
    if (size > most) throw new TooLarge(`it has ${size} bytes, more than ${most}`)
    const bytes = Buffer.allocUnsafeSlow(size)
    let done = 0
    // A read of no bytes says where the file ends, and that a folder is none.
    for (;;) {
      signal?.throwIfAborted()
      const { bytesRead } = size
        ? await file.read(bytes, done, Math.min(size - done, chunk), done)
        : await file.read(Buffer.alloc(1), 0, 1, 0)
      done += bytesRead
      if (!bytesRead || done >= size) return bytes.subarray(0, Math.min(done, size))
    }
  } finally {
    await file.close()
  }
}

/** A regular file as one text. */
export async function readText(path: string): Promise<string> {
  return (await readBytes(path, longestText)).toString('utf8')
}

/**
 * Writes a file under another name and then gives it its own: where writing fails, or the process ends in between, the
 * file that was there before stays, whole.
 */
export async function replaceFile(
  path: string,
  parts: Iterable<NodeJS.TypedArray> | AsyncIterable<NodeJS.TypedArray>,
): Promise<void> {
  const temporary = `${path}.${randomUUID()}.tmp`
  try {
    const file = await open(temporary, 'wx')
    try {
      for await (const part of parts) {
        const bytes = new Uint8Array(part.buffer, part.byteOffset, part.byteLength)
        for (let at = 0; at < bytes.length; ) {
          const count = Math.min(bytes.length - at, chunk)
          at += (await file.write(bytes, at, count)).bytesWritten
        }
      }
      await file.sync()
    } finally {
      await file.close()
    }
    await rename(temporary, path)
  } catch (error) {
    await unlink(temporary).catch(() => {})
    throw error
  }
}

/** The lines of a regular file, without their ends. */
export async function* readLines(path: string): AsyncGenerator<string> {
  const file = await openRegular(path)
  const input = file.createReadStream({ encoding: 'utf8' })
  try {
    let pieces: string[] = []
    let length = 0
    const whole = (): string => {
      const line = pieces.join('')
      pieces = []
      length = 0
      return line.endsWith('\r') ? line.slice(0, -1) : line
    }
    for await (const text of input as AsyncIterable<string>) {
      let from = 0
      for (let end = text.indexOf('\n'); end >= 0; end = text.indexOf('\n', from)) {
        pieces.push(text.slice(from, end))
        yield whole()
        from = end + 1
      }
      pieces.push(text.slice(from))
      length += text.length - from
      if (length > longestText) throw new TooLarge(`a line has more than ${longestText} characters`)
    }
    if (length) yield whole()
  } finally {
    input.destroy()
  }
}
