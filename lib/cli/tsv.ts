// Tables of tab-separated values as pandas writes them: a header, fields that may be in quotes.
import { openRegular } from '../files.js'

const tab = 0x09
const newline = 0x0a
const carriage = 0x0d
const quote = 0x22

/** A part of a file. */
export interface Span {
  path: string
  start: number
  end: number
}

/** A row by the header's names, and where the field of the large column is. */
export interface TsvRow {
  fields: ReadonlyMap<string, string>
  large?: Span
}

/**
 * The rows of a file. Fields of `large` of more than 64 characters are not read but named by where they are, since an
 * image of 8K in base64 has tens of megabytes; what is shorter is among the fields.
 *
 * A field that begins with a quote ends at the next one that is not doubled, and may hold tabs and line ends.
 */
export async function* readTsv(path: string, large: string): AsyncGenerator<TsvRow> {
  let header: string[] | undefined
  for await (const { pieces, spans } of recordsOf(path, () => header?.indexOf(large) ?? -1)) {
    if (!header) {
      header = pieces.map((name) => name.replace(/^\ufeff/, ''))
      continue
    }
    const span = spans.get(header.indexOf(large))
    const fields = new Map(header.map((name, i) => [name, pieces[i] ?? '']))
    if (span) fields.delete(large)
    yield { fields, ...(span && { large: { path, ...span } }) }
  }
}

/** The bytes of a part of a file. */
export async function readSpan({ path, start, end }: Span): Promise<Buffer> {
  const file = await openRegular(path)
  try {
    const bytes = Buffer.allocUnsafe(end - start)
    for (let done = 0; done < bytes.length; ) {
      const { bytesRead } = await file.read(bytes, done, bytes.length - done, start + done)
      if (!bytesRead) throw new Error(`${path} ends before byte ${end}`)
      done += bytesRead
    }
    return bytes
  } finally {
    await file.close()
  }
}

interface Record {
  pieces: string[]
  spans: Map<number, { start: number; end: number }>
}

/** Bytes of a field in another column than the large one. */
const longestField = 1 << 26
/** Bytes of a field that are kept, where it is in the large column. */
const kept = 64

function opened(path: string): ReturnType<typeof openRegular> {
  return openRegular(path).catch((cause) => {
    throw new Error(`${path} could not be read: ${(cause as Error).message}`, { cause })
  })
}

async function* recordsOf(path: string, largeColumn: () => number): AsyncGenerator<Record> {
  const input = (await opened(path)).createReadStream({ highWaterMark: 1 << 20 })
  let record: Record = { pieces: [], spans: new Map() }
  let field: Buffer[] = []
  let size = 0
  let large = largeColumn() === 0
  // Of the field: where it begins, and whether it is in quotes, or was and ended.
  let start = 0
  let state: 'plain' | 'quoted' | 'closed' = 'plain'
  let at = 0
  let any = false
  let previous = 0
  const take = (bytes: Buffer): void => {
    if (!bytes.length) return
    if (!large || size < kept) field.push(Buffer.from(bytes))
    size += bytes.length
    if (!large && size > longestField)
      throw new Error(`a field has more than ${longestField} bytes`)
  }
  const endField = (end: number, endsLine: boolean): void => {
    const carriages = +(endsLine && previous === carriage)
    if (large && size > kept) {
      const behind = carriages + +(state === 'closed')
      record.spans.set(record.pieces.length, { start, end: end - behind })
      record.pieces.push('')
    } else {
      const text = Buffer.concat(field).toString('utf8')
      record.pieces.push(carriages && state === 'plain' ? text.slice(0, -1) : text)
    }
    field = []
    size = 0
    state = 'plain'
    large = record.pieces.length === largeColumn()
  }
  const endRecord = (): Record => {
    const done = record
    record = { pieces: [], spans: new Map() }
    large = largeColumn() === 0
    any = false
    return done
  }
  try {
    for await (const chunk of input as AsyncIterable<Buffer>) {
      let from = 0
      for (let i = 0; i < chunk.length; i++) {
        const byte = chunk[i]!
        if (state === 'quoted') {
          // A doubled quote is one of the text: closed by the first, opened again by the second.
          if (byte !== quote) continue
          any = true
          take(chunk.subarray(from, i))
          from = i + 1
          state = 'closed'
        } else if (byte === quote && state === 'closed') {
          take(chunk.subarray(i, i + 1))
          from = i + 1
          state = 'quoted'
        } else if (byte === quote && at + i === start) {
          from = i + 1
          start++
          any = true
          state = 'quoted'
        } else if (byte === tab || byte === newline) {
          if (state !== 'closed') take(chunk.subarray(from, i))
          endField(at + i, byte === newline)
          from = i + 1
          start = at + i + 1
          if (byte === newline) {
            const done = endRecord()
            if (done.pieces.length > 1 || done.pieces[0] !== '') yield done
          } else any = true
        } else any = true
        previous = byte
      }
      if (state !== 'closed') take(chunk.subarray(from))
      at += chunk.length
    }
  } catch (cause) {
    throw new Error(`${path} could not be read: ${(cause as Error).message}`, { cause })
  } finally {
    input.destroy()
  }
  if (state === 'quoted') throw new Error(`${path} ends within a field in quotes`)
  if (any) {
    endField(at, false)
    yield endRecord()
  }
}
