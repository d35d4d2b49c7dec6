import { spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import {
  closeSync,
  existsSync,
  openSync,
  readdirSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { add, type Device, gelu, openDevice, type Tensor, tokenLogProbs } from 'p2r-kernels'
import { expect, test } from 'vitest'
import { expectRefusal, onEveryBackend } from './harness.js'

const library = new URL('../dist/lib/index.js', import.meta.url).href

/** A process of its own, in which `handle` is what is given and `device` is open. */
async function elsewhere(device: Device, handle: object, body: string): Promise<string> {
  const code = `
    import { openDevice, add } from '${library}'
    const device = openDevice('${device.info.id}')
    const handle = ${JSON.stringify(handle)}
    ${body}`
  const child = spawn(process.execPath, ['--input-type=module', '-e', code], {
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  let [out, err] = ['', '']
  child.stdout.on('data', (text) => {
    out += text
  })
  child.stderr.on('data', (text) => {
    err += text
  })
  const status = await new Promise((resolve) => child.on('close', resolve))
  expect(err).toBe('')
  expect(status).toBe(0)
  return out.trim()
}

onEveryBackend('memory shared between processes', (b) => {
  test.each(['f32', 'f16', 'bf16', 'i32', 'u8'] as const)(
    '%s: another process reads it and writes it',
    async (dtype) => {
      using tensor = b.device.tensor([1, 2, 3, 4, 5, 6], [2, 3], dtype)
      using handle = await tensor.ipcHandle()
      expect(handle).toMatchObject({ dtype, shape: [2, 3], offset: 0, pid: process.pid })
      const read = await elsewhere(
        b.device,
        handle,
        `const tensor = device.fromIpcHandle(handle)
         console.log(JSON.stringify([tensor.shape, tensor.dtype, [...await tensor.toFloat32()]]))
         tensor.write([6, 5, 4, 3, 2, 1])
         await device.synchronize()`,
      )
      expect(JSON.parse(read)).toEqual([[2, 3], dtype, [1, 2, 3, 4, 5, 6]])
      expect([...(await tensor.toFloat32())]).toEqual([6, 5, 4, 3, 2, 1])
    },
  )

  test('queued writes are included, views stay valid, and a view is shared at its offset', async () => {
    let x: Tensor = b.device.tensor(new Float32Array(3000).fill(1), [1000, 3])
    const view = x.slice(10, 12)
    for (let i = 0; i < 20; i++) x = gelu({ x })
    using row = x.slice(500, 501)
    using handle = await row.ipcHandle()
    expect(handle.offset).toBe(500 * 12)
    const { device } = b
    const got = await elsewhere(
      device,
      handle,
      `const tensor = device.fromIpcHandle(handle)
       console.log((await tensor.read()).join())
       tensor.copyFrom(add({ x: tensor, y: tensor }))
       await device.synchronize()`,
    )
    const [value] = await x.slice(0, 1).read()
    expect(got).toBe([value, value, value].join())
    expect([...(await x.slice(499, 501).read())].slice(0, 4)).toEqual([
      value,
      value,
      value,
      2 * (value as number),
    ])
    expect([...(await view.read())]).toEqual(new Array(6).fill(1))
  })

  test('the memory outlives its tensor until the handle is disposed, and is not reused', async () => {
    const tensor = b.device.tensor(new Float32Array(1000).fill(7), [1000])
    const handle = await tensor.ipcHandle()
    tensor.dispose()
    // What would take a block that was free.
    const others = Array.from({ length: 4 }, () => b.device.tensor(new Float32Array(1000), [1000]))
    const sum = await elsewhere(
      b.device,
      handle,
      `const tensor = device.fromIpcHandle(handle)
       console.log((await tensor.read()).reduce((s, x) => s + x, 0))`,
    )
    expect(sum).toBe('7000')
    handle.dispose()
    handle.dispose()
    for (const other of others) other.dispose()
  })

  test('memory accounting: a thousand handles leak nothing', async () => {
    const before = b.device.memory().liveBytes
    for (let i = 0; i < 1000; i++) {
      using tensor = b.device.zeros([256])
      using handle = await tensor.ipcHandle()
      expect(handle.bytes).toBe(1024)
    }
    expect(b.device.memory().liveBytes).toBeLessThanOrEqual(before)
  })

  test('ipcHandle rejects with the tensor’s fault', async () => {
    const logits = b.device.zeros([2, 5])
    const targets = b.device.tensor(Int32Array.of(1, 9), [2])
    const { logProbs } = tokenLogProbs({ logits, targets })
    await expect(logProbs.ipcHandle()).rejects.toMatchObject({ op: 'tokenLogProbs' })
    await b.device.synchronize()
  })

  test('refuses invalid arguments', async () => {
    using tensor = b.device.zeros([4])
    using handle = await tensor.ipcHandle()
    const opens = (extra: object, code: string, message?: RegExp) =>
      expectRefusal(
        () => b.device.fromIpcHandle({ ...handle, pid: 0, ...extra } as never),
        code,
        'fromIpcHandle',
        message,
      )
    opens({ shape: [5] }, 'ERR_VALUE', /is not within/)
    opens({ offset: 4 }, 'ERR_VALUE', /is not within/)
    opens({ offset: -4 }, 'ERR_VALUE')
    opens({ dtype: 'f64' }, 'ERR_VALUE', /ipcHandle/)
    opens({ name: 3 }, 'ERR_VALUE')
    opens(
      { backend: b.device.info.backend === 'cpu' ? 'cuda' : 'cpu' },
      'ERR_DEVICE',
      /cannot be opened on/,
    )
    expectRefusal(() => b.device.fromIpcHandle(null as never), 'ERR_VALUE', 'fromIpcHandle')
    const gone = b.device.zeros([4])
    gone.dispose()
    await expect(gone.ipcHandle()).rejects.toMatchObject({ code: 'ERR_DISPOSED' })
  })
})

const cpu = () => openDevice('cpu')

const linux = process.platform === 'linux'

/** What this process has in the folders of shared files. */
function ownFiles(): string[] {
  const own = new RegExp(`^p2r-kernels-${process.pid}-`)
  const folders = ['/dev/shm', tmpdir()].filter((folder) => existsSync(folder))
  return folders.flatMap((folder) => readdirSync(folder).filter((name) => own.test(name)))
}

test.each(linux ? [false, true] : [true])(
  'on the CPU (file: %s): one name for all handles, gone with the last of them or with the device',
  async (file) => {
    const device = cpu()
    const tensor = device.tensor([1, 2, 3], [3])
    const one = await tensor.ipcHandle({ file })
    const two = await tensor.reshape([3, 1]).ipcHandle({ file })
    expect(two.name).toBe(one.name)
    expect(statSync(one.name).mode & 0o777).toBe(0o600)
    using here = device.fromIpcHandle({ ...one, dtype: 'f32' }, { anyFile: file })
    one.dispose()
    expect(existsSync(two.name)).toBe(true)
    two.dispose()
    expect(existsSync(two.name)).toBe(false)
    // Who has it open keeps it; a new handle is of new memory.
    expect([...(await here.read())]).toEqual([1, 2, 3])
    const again = await tensor.ipcHandle({ file })
    tensor.write([4, 5, 6])
    expect([...(await device.fromIpcHandle(again, { anyFile: file }).read())]).toEqual([4, 5, 6])
    expect([...(await here.read())]).toEqual([1, 2, 3])
    const empty = await device.zeros([0, 4]).ipcHandle({ file })
    expect((await device.fromIpcHandle(empty, { anyFile: file }).read()).length).toBe(0)
    device.dispose()
    expect(existsSync(again.name)).toBe(false)
    again.dispose()
  },
)

test.runIf(linux)('on the CPU: nobody can shorten what is shared, nor enlarge it', async () => {
  using device = cpu()
  const tensor = device.tensor([1, 2, 3], [3])
  using handle = await tensor.ipcHandle()
  expect(handle.name).toMatch(new RegExp(`^/proc/${process.pid}/fd/\\d+$`))
  for (const length of [0, 11, 13]) expect(() => truncateSync(handle.name, length)).toThrow(/EPERM/)
  expect([...(await device.fromIpcHandle(handle).read())]).toEqual([1, 2, 3])
  // Nor is a descriptor of something else opened, whatever its name says.
  const path = join(tmpdir(), `p2r-ipc-descriptor-${process.pid}`)
  writeFileSync(path, new Uint8Array(12))
  const other = openSync(path, 'r+')
  try {
    for (const name of [`/proc/${process.pid}/fd/${other}`, `/proc/self/fd/${other}`])
      for (const anyFile of [false, true])
        expect(() => device.fromIpcHandle({ ...handle, name }, { anyFile })).toThrow(
          expect.objectContaining({ op: 'fromIpcHandle' }),
        )
  } finally {
    closeSync(other)
    rmSync(path)
  }
})

test.runIf(linux)('on the CPU: of a process that was killed nothing is left', async () => {
  const code = `
    import { openDevice } from '${library}'
    const handle = await openDevice('cpu').tensor([1, 2], [2]).ipcHandle()
    console.log(JSON.stringify(handle))
    setInterval(() => {}, 1000)`
  const child = spawn(process.execPath, ['--input-type=module', '-e', code], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const [line] = await once(child.stdout, 'data')
  const handle = JSON.parse(String(line))
  using device = cpu()
  using open = device.fromIpcHandle<'f32'>(handle)
  const closed = once(child, 'close')
  child.kill('SIGKILL')
  await closed
  expect([...(await open.read())]).toEqual([1, 2])
  expectRefusal(
    () => device.fromIpcHandle(handle),
    'ERR_IO',
    'fromIpcHandle',
    /its process has ended/,
  )
})

test.each([
  ['its last work', 0, ''],
  ['process.exit()', 0, 'process.exit()'],
  ['process.exit() before the handle is there', 0, 'open(); process.exit()'],
  ['an exception', 1, 'throw new Error("on purpose")'],
])('on the CPU: a process that %s ends leaves no file', (_, status, end) => {
  const code = `
    import { readdirSync } from 'node:fs'
    import { dirname } from 'node:path'
    import { openDevice } from '${library}'
    const open = () => openDevice('cpu').tensor([1, 2], [2]).ipcHandle({ file: true })
    const { name } = await open()
    process.on('exit', () => {
      const own = readdirSync(dirname(name)).filter((file) => file.startsWith('p2r-kernels-' + process.pid + '-'))
      console.log(JSON.stringify([dirname(name), ...own]))
    })
    ${end}`
  const ended = spawnSync(process.execPath, ['--input-type=module', '-e', code], {
    encoding: 'utf8',
  })
  expect(ended.status).toBe(status)
  const [folder, ...names] = JSON.parse(ended.stdout)
  expect(names).toHaveLength(end.startsWith('open') ? 2 : 1)
  for (const name of names) expect(existsSync(join(folder, name))).toBe(false)
})

test.runIf(linux)(
  'on the CPU: one memory is shared in one way, and options are checked',
  async () => {
    using device = cpu()
    const tensor = device.tensor([1, 2, 3], [3])
    const handle = await tensor.ipcHandle()
    await expect(tensor.ipcHandle({ file: true })).rejects.toMatchObject({
      code: 'ERR_VALUE',
      message: expect.stringContaining('without a file'),
    })
    handle.dispose()
    using file = await tensor.ipcHandle({ file: true })
    expect(file.name).toMatch(/^\/dev\/shm\/p2r-kernels-/)
    expectRefusal(() => device.fromIpcHandle(file), 'ERR_VALUE', 'fromIpcHandle', /anyFile: true/)
    for (const options of [{ file: 1 }, { files: true }, null])
      await expect(tensor.ipcHandle(options as never)).rejects.toMatchObject({
        code: 'ERR_VALUE',
        op: 'ipcHandle',
      })
    for (const options of [{ anyFile: 1 }, { anyfile: true }, null])
      expectRefusal(
        () => device.fromIpcHandle(file, options as never),
        'ERR_VALUE',
        'fromIpcHandle',
      )
  },
)

test('on the CPU: a tensor with a fault leaves no file', async () => {
  using device = cpu()
  const logits = device.zeros([2, 5])
  const { logProbs } = tokenLogProbs({ logits, targets: device.tensor(Int32Array.of(1, 9), [2]) })
  await expect(logProbs.ipcHandle({ file: true })).rejects.toMatchObject({ op: 'tokenLogProbs' })
  expect(ownFiles()).toEqual([])
  await device.synchronize()
})

test('on the CPU: files by anyFile alone; missing, short, linked and special ones are refused', async () => {
  const device = cpu()
  const path = join(tmpdir(), `p2r-ipc-${process.pid}`)
  const description = {
    backend: 'cpu' as const,
    name: path,
    bytes: 16,
    offset: 0,
    shape: [4],
    dtype: 'f32' as const,
    pid: 1,
  }
  const refused = (code: string, extra = {}) =>
    expectRefusal(
      () => device.fromIpcHandle({ ...description, ...extra }, { anyFile: true }),
      code,
      'fromIpcHandle',
    )
  refused('ERR_IO')
  writeFileSync(path, new Uint8Array(16))
  device.fromIpcHandle(description, { anyFile: true }).dispose()
  expectRefusal(() => device.fromIpcHandle(description), 'ERR_VALUE', 'fromIpcHandle', /anyFile/)
  refused('ERR_VALUE', { name: `${path}\0.txt` })
  const link = `${path}-link`
  symlinkSync(path, link)
  refused('ERR_IO', { name: link })
  rmSync(link)
  truncateSync(path, 15)
  refused('ERR_FORMAT')
  refused('ERR_IO', { name: tmpdir() })
  if (linux) {
    const pipe = `${path}-pipe`
    spawnSync('mkfifo', [pipe])
    for (const name of [pipe, '/dev/zero']) refused('ERR_FORMAT', { name })
    rmSync(pipe)
  }
  rmSync(path)
  device.dispose()
})

test('on the CPU: the Python example reads and writes it', async () => {
  const python = spawnSync('python3', ['--version'])
  // The machine that builds may have no Python; the example is for those who have.
  if (python.status !== 0) return expect(python.error).toBeDefined()
  const device = cpu()
  const tensor = device.tensor([1, 2, 3], [3])
  using handle = await tensor.ipcHandle()
  const folder = fileURLToPath(new URL('../examples/exchange', import.meta.url))
  const code = `import json, struct, sys
sys.dont_write_bytecode = True
sys.path.insert(0, ${JSON.stringify(folder)})
import tensors
memory, close = tensors.open_memory(json.loads(sys.argv[1]))
values = struct.unpack("<3f", memory)
memory[:] = struct.pack("<3f", *[-x for x in values])
memory.release()
print(values, flush=True)
name, memory, _ = tensors.new_memory(12)
memory[:] = struct.pack("<3f", 7, 8, 9)
print(name, flush=True)
sys.stdin.read()`
  const child = spawn('python3', ['-c', code, JSON.stringify(handle)], {
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]()
  expect((await lines.next()).value).toBe('(1.0, 2.0, 3.0)')
  expect([...(await tensor.read())]).toEqual([-1, -2, -3])
  const { value: name } = await lines.next()
  using theirs = device.fromIpcHandle({ ...handle, name, dtype: 'f32' })
  expect([...(await theirs.read())]).toEqual([7, 8, 9])
  const closed = once(child, 'close')
  child.stdin.end()
  expect(await closed).toEqual([0, null])
  device.dispose()
})

test('no file is left behind', () => expect(ownFiles()).toEqual([]))

test('the example adds up both processes’ results', async () => {
  const device = cpu()
  using a = device.tensor([1, 2], [2])
  using handle = await a.ipcHandle()
  using same = device.fromIpcHandle(handle)
  using sum = add({ x: a, y: same })
  expect([...(await sum.read())]).toEqual([2, 4])
  device.dispose()
})
