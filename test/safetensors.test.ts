import { mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  type Device,
  loadMetadata,
  loadTensors,
  openDevice,
  saveTensors,
  type Tensor,
} from 'p2r-kernels'
import { afterAll, beforeAll, expect, test } from 'vitest'

let device: Device
let folder: string
beforeAll(async () => {
  device = openDevice('cpu')
  folder = await mkdtemp(join(tmpdir(), 'safetensors-'))
})
afterAll(async () => {
  device.dispose()
  await rm(folder, { recursive: true })
})

/** A file from its parts; the header may be anything. */
async function file(
  header: unknown,
  data: Uint8Array = new Uint8Array(),
  length?: bigint,
): Promise<string> {
  const text = Buffer.isBuffer(header)
    ? header
    : Buffer.from(typeof header === 'string' ? header : JSON.stringify(header))
  const start = Buffer.alloc(8)
  start.writeBigUInt64LE(length ?? BigInt(text.length))
  const path = join(folder, `${Math.random()}.safetensors`)
  await writeFile(path, Buffer.concat([start, text, data]))
  return path
}

test('tensors are saved and loaded bit for bit', async () => {
  const bits = Uint16Array.of(0x7e01, 0xfc00, 0x0001, 0x8000)
  const tensors: Record<string, Tensor> = {
    weight: device.tensor([1, -0, NaN, Infinity, 1e-40, 2], [2, 3]),
    half: device.tensor(bits, [4], 'f16'),
    brain: device.tensor(bits, [2, 2], 'bf16'),
    whole: device.tensor(Int32Array.of(-(2 ** 31), 7), [2]),
    bytes: device.tensor(Uint8Array.of(1, 2, 255), [3, 1]),
    scalar: device.tensor([3], []),
    none: device.zeros([0, 5]),
    __proto__x: device.zeros([1]),
    'ünï.cödé "quoted"': device.zeros([1]),
  }
  Object.defineProperty(tensors, '__proto__', { value: device.zeros([2]), enumerable: true })
  const path = join(folder, 'all.safetensors')
  await saveTensors(path, tensors, { format: 'pt', note: 'ä' })
  const loaded = await loadTensors(path, device)
  expect(Object.keys(loaded).sort()).toEqual(Object.keys(tensors).sort())
  for (const [name, tensor] of Object.entries(tensors)) {
    const copy = Object.getOwnPropertyDescriptor(loaded, name)!.value as Tensor
    expect([copy.dtype, copy.shape]).toEqual([tensor.dtype, tensor.shape])
    const [a, b] = [await copy.read(), await tensor.read()]
    expect(Buffer.from(a.buffer).equals(Buffer.from(b.buffer)), name).toBe(true)
  }
})

test('the file follows the format', async () => {
  const path = join(folder, 'layout.safetensors')
  await saveTensors(
    path,
    { b: device.tensor(Uint8Array.of(9), [1]), a: device.tensor([1, 2], [1, 2]) },
    { k: 'v' },
  )
  const bytes = await readFile(path)
  const length = Number(bytes.readBigUInt64LE())
  expect(length % 8).toBe(0)
  expect(JSON.parse(bytes.subarray(8, 8 + length).toString())).toEqual({
    __metadata__: { k: 'v' },
    a: { dtype: 'F32', shape: [1, 2], data_offsets: [0, 8] },
    b: { dtype: 'U8', shape: [1], data_offsets: [8, 9] },
  })
  expect([...bytes.subarray(8 + length)]).toEqual([0, 0, 128, 63, 0, 0, 0, 64, 9])
})

test('saves what the tensors held at the call, and leaves no temporary file', async () => {
  const path = join(folder, 'snapshot.safetensors')
  const x = device.tensor([1, 2], [2])
  const saved = saveTensors(path, { x })
  x.write([3, 4])
  x.dispose()
  await saved
  const { x: y } = await loadTensors(path, device)
  expect([...(await y!.read())]).toEqual([1, 2])
  expect((await readdir(folder)).filter((name) => name.endsWith('.tmp'))).toEqual([])
})

test('a failed save leaves the old file unchanged', async () => {
  const path = join(folder, 'old.safetensors')
  await saveTensors(path, { x: device.tensor([1], [1]) })
  const before = await readFile(path)
  const gone = device.zeros([1])
  gone.dispose()
  await expect(saveTensors(path, { gone })).rejects.toMatchObject({ code: 'ERR_DISPOSED' })
  expect((await readFile(path)).equals(before)).toBe(true)
  expect((await readdir(folder)).filter((name) => name.endsWith('.tmp'))).toEqual([])
})

test('no tensors, and a header padded with spaces', async () => {
  const path = join(folder, 'empty.safetensors')
  await saveTensors(path, {})
  expect((await stat(path)).size).toBe(16)
  expect(await loadTensors(path, device)).toEqual({})
  expect(await loadTensors(await file('{}       '), device)).toEqual({})
})

const entry = (dtype: string, shape: unknown, data_offsets: unknown) => ({
  x: { dtype, shape, data_offsets },
})
const four = new Uint8Array(4)
const two = (a: number[], b: number[], bytes = 8) =>
  [
    {
      x: { dtype: 'F32', shape: [1], data_offsets: a },
      y: { dtype: 'F32', shape: [1], data_offsets: b },
    },
    new Uint8Array(bytes),
  ] as const
const hostile: [string, RegExp, unknown, Uint8Array?, bigint?][] = [
  ['a header beyond the end', /the file ends/, '{}', four, 100n],
  ['a header beyond the limit', /at most 100000000 bytes/, '{}', four, 2n ** 63n],
  ['no JSON', /not JSON/, '{"x": '],
  ['no UTF-8', /not JSON/, Buffer.from([0x7b, 0x22, 0xff, 0x22, 0x3a, 0x31, 0x7d])],
  ['a list', /JSON object/, '[]'],
  ['null', /JSON object/, 'null'],
  ['an entry that is no object', /'x' must be an object/, { x: 1 }],
  ['metadata that are no strings', /__metadata__/, { __metadata__: { a: 1 } }],
  [
    'an unknown dtype',
    /'x' must have one of the dtypes .* got 'F4'/,
    entry('F4', [8], [0, 4]),
    four,
  ],
  ['a dtype that is no string', /must have a dtype, got 7/, entry(7 as never, [4], [0, 4]), four],
  ['FP8 that does not fit', /does not fit/, entry('F8_E4M3', [3], [0, 4]), four],
  ['an unknown dtype with offsets that fall', /does not fit/, entry('F4', [8], [4, 0]), four],
  [
    'too many axes with the bytes of I64',
    /one for its bytes/,
    entry('I64', [1, 1, 1, 1, 1, 1, 1, 1], [0, 8]),
    new Uint8Array(8),
  ],
  ['a dtype of Object.prototype', /dtype/, entry('constructor', [4], [0, 4]), four],
  ['a shape that is no list', /shape/, entry('F32', 1, [0, 4]), four],
  ['a negative size', /shape/, entry('F32', [-1], [0, 4]), four],
  ['a broken size', /shape/, entry('F32', [0.5], [0, 2]), four],
  ['too many axes', /at most 8/, entry('F32', [1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 4]), four],
  ['a shape that overflows', /does not fit/, entry('F32', [2 ** 40, 2 ** 40], [0, 4]), four],
  ['too few bytes for the shape', /does not fit/, entry('F32', [2], [0, 4]), four],
  ['offsets that fall', /does not fit/, entry('F32', [1], [4, 0]), four],
  ['offsets that are no numbers', /two whole numbers/, entry('F32', [1], ['0', '4']), four],
  ['three offsets', /two whole numbers/, entry('F32', [1], [0, 4, 8]), four],
  ['negative offsets', /two whole numbers/, entry('F32', [1], [-4, 0]), four],
  [
    'data beyond the end',
    /4 bytes, but the file has 3/,
    entry('F32', [1], [0, 4]),
    new Uint8Array(3),
  ],
  ['data that no tensor has', /has 5 bytes/, entry('F32', [1], [0, 4]), new Uint8Array(5)],
  ['overlapping tensors', /must start at byte 4/, ...two([0, 4], [2, 6])],
  ['the same bytes twice', /must start at byte 4/, ...two([0, 4], [0, 4], 4)],
  ['a gap', /must start at byte 4/, ...two([0, 4], [8, 12], 12)],
]
for (const [what, message, header, data, length] of hostile)
  test(`refuses ${what}`, async () => {
    const path = await file(header, data, length)
    const before = device.memory().liveBytes
    const error = await loadTensors(path, device).catch((e: unknown) => e)
    expect(error).toMatchObject({ name: 'P2RError', code: 'ERR_FORMAT', op: 'loadTensors' })
    expect((error as Error).message).toMatch(message)
    expect(device.memory().liveBytes).toBeLessThanOrEqual(before)
  })

const mixed = () =>
  file(
    {
      __metadata__: { step: '7' },
      a: { dtype: 'F32', shape: [1], data_offsets: [0, 4] },
      e4m3: { dtype: 'F8_E4M3', shape: [2], data_offsets: [4, 6] },
      e5m2: { dtype: 'F8_E5M2', shape: [1, 2], data_offsets: [6, 8] },
      long: { dtype: 'I64', shape: [1], data_offsets: [8, 16] },
      packed: { dtype: 'F4', shape: [4], data_offsets: [16, 18] },
    },
    Uint8Array.of(0, 0, 128, 63, 5, 6, 7, 8, 254, 255, 255, 255, 255, 255, 255, 255, 9, 9),
  )

test('a type matters only where it is loaded', async () => {
  const path = await mixed()
  expect(await loadMetadata(path)).toEqual({ step: '7' })
  const { a, ...others } = await loadTensors(path, device, { only: (name) => name === 'a' })
  expect(others).toEqual({})
  expect(await a!.read()).toEqual(Float32Array.of(1))
  expect(await loadTensors(path, device, { only: () => false })).toEqual({})
  await expect(loadTensors(path, device)).rejects.toMatchObject({
    code: 'ERR_FORMAT',
    message: expect.stringMatching(/'packed' .* got 'F4'/),
  })
})

test('types that no tensor has are loaded as bytes', async () => {
  const loaded = await loadTensors(await mixed(), device, { only: (name) => name !== 'packed' })
  const bytes = async (name: string) => {
    const { dtype, shape } = loaded[name]!
    return [dtype, shape, ...((await loaded[name]!.read()) as Uint8Array)]
  }
  expect(await bytes('e4m3')).toEqual(['u8', [2], 5, 6])
  expect(await bytes('e5m2')).toEqual(['u8', [1, 2], 7, 8])
  expect(await bytes('long')).toEqual(['u8', [1, 8], 254, ...Array(7).fill(255)])
})

test('a tensor that the host does not hold at once is loaded whole', async () => {
  const values = Float32Array.from({ length: 5_000_011 }, (_, i) => i)
  const path = join(folder, 'large.safetensors')
  await saveTensors(path, { x: device.tensor(values, [values.length, 1]) })
  const { x } = await loadTensors(path, device)
  expect(x!.shape).toEqual([values.length, 1])
  expect(Buffer.from((await x!.read()).buffer).equals(Buffer.from(values.buffer))).toBe(true)
})

test('an error of `only` is passed on, and frees what was loaded', async () => {
  const path = await mixed()
  const before = device.memory().liveBytes
  const reason = new Error('mine')
  const only = (name: string) => {
    if (name !== 'a') throw reason
    return true
  }
  await expect(loadTensors(path, device, { only })).rejects.toBe(reason)
  expect(device.memory().liveBytes).toBeLessThanOrEqual(before)
  for (const options of [{ only: 'a' }, { names: [] }])
    await expect(loadTensors(path, device, options as never)).rejects.toMatchObject({
      code: 'ERR_VALUE',
      op: 'loadTensors',
    })
})

test('refuses a file of fewer than 8 bytes', async () => {
  const path = join(folder, 'short')
  await writeFile(path, 'abc')
  await expect(loadTensors(path, device)).rejects.toMatchObject({ code: 'ERR_FORMAT' })
})

test('an unreadable file is ERR_IO with its cause', async () => {
  const missing = join(folder, 'nowhere', 'x.safetensors')
  await expect(loadTensors(missing, device)).rejects.toMatchObject({
    code: 'ERR_IO',
    op: 'loadTensors',
    cause: { code: 'ENOENT' },
  })
  await expect(loadTensors(folder, device)).rejects.toMatchObject({
    code: 'ERR_IO',
    cause: { code: 'EISDIR' },
  })
  await expect(saveTensors(missing, {})).rejects.toMatchObject({
    code: 'ERR_IO',
    op: 'saveTensors',
    cause: { code: 'ENOENT' },
  })
})

test('refuses arguments of other types', async () => {
  const path = join(folder, 'never')
  const value = { code: 'ERR_VALUE' }
  await expect(loadTensors(1 as never, device)).rejects.toMatchObject(value)
  await expect(loadTensors(path, {} as never)).rejects.toMatchObject(value)
  await expect(saveTensors(path, null as never)).rejects.toMatchObject(value)
  await expect(saveTensors(path, { x: 1 as never })).rejects.toMatchObject(value)
  await expect(saveTensors(path, { __metadata__: device.zeros([1]) })).rejects.toMatchObject(value)
  await expect(saveTensors(path, {}, { a: 1 as never })).rejects.toMatchObject(value)
  expect(await readdir(folder)).not.toContain('never')
})
