import { readdirSync, readFileSync } from 'node:fs'
import { constants, PerformanceObserver } from 'node:perf_hooks'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { cudaStatus, devices, gelu, openDevice, type Tensor } from 'p2r-kernels'
import { afterEach, expect, test, vi } from 'vitest'
import { cpuPaths, expectRefusal, onEveryBackend } from './harness.js'

setFlagsFromString('--expose-gc')
const collectGarbage = runInNewContext('gc') as () => void
const turn = () => new Promise((resolve) => setImmediate(resolve))

afterEach(() => vi.unstubAllEnvs())

test('the CPU is the first device, CUDA devices follow', () => {
  const [cpu, ...rest] = devices()
  expect(cpu).toMatchObject({ backend: 'cpu', id: 'cpu', simd: cpuPaths[0]!.options.simd })
  expect(cpu!.name).not.toBe('')
  expect(cpu!.memoryBytes).toBeGreaterThan(2 ** 20)
  expect(cpu!.threads).toBeGreaterThan(0)
  expect(rest.map((d) => d.id)).toEqual(rest.map((_, i) => `cuda:${i}`))
  expect(rest.length > 0).toBe(cudaStatus().available)
})

test('cudaStatus has a reason as text', () => {
  const status = cudaStatus()
  expect(status.reason).toMatch(/^[A-Z0-9].*\.$/)
  if (status.available) expect(status.built).toBe(true)
})

test('a device is opened by its name, without fallback', () => {
  using cpu = openDevice('cpu')
  expect(cpu.info.id).toBe('cpu')
  expect(Object.isFrozen(cpu.info)).toBe(true)
  for (const id of ['gpu', 'cpu:0', 'CPU', 'cuda:', 'cuda:x', 'cuda:-1', 'cuda0', ' cpu'])
    expectRefusal(() => openDevice(id), 'ERR_DEVICE', 'openDevice', new RegExp(`'${id}'`))
  expectRefusal(() => openDevice('cuda:999'), 'ERR_DEVICE', 'openDevice')
  if (!cudaStatus().available)
    expectRefusal(() => openDevice('cuda'), 'ERR_DEVICE', 'openDevice', /'cuda' is not available/)
  expectRefusal(() => openDevice(1 as never), 'ERR_VALUE', 'openDevice', /must be a string/)
  expectRefusal(() => openDevice(null as never), 'ERR_VALUE', 'openDevice', /must be a string/)
})

test('without a name: P2R_DEVICE, else the first CUDA device, else the CPU', () => {
  vi.stubEnv('P2R_DEVICE', 'cpu')
  using named = openDevice()
  expect(named.info.id).toBe('cpu')
  vi.stubEnv('P2R_DEVICE', 'cuda:999')
  expectRefusal(() => openDevice(), 'ERR_DEVICE', 'openDevice')
  using given = openDevice('cpu')
  expect(given.info.id).toBe('cpu')
  vi.stubEnv('P2R_DEVICE', undefined)
  using free = openDevice()
  expect(free.info.backend).toBe(cudaStatus().available ? 'cuda' : 'cpu')
})

test('threads and simd select what the CPU supports, and are refused otherwise', () => {
  for (const { options } of cpuPaths) {
    using device = openDevice('cpu', { threads: 3, ...options })
    const { bf16, vnni } = options.features
    const features = [...(bf16 ? ['bf16'] : []), ...(vnni ? ['vnni'] : [])]
    expect(device.info).toMatchObject({ threads: 3, simd: options.simd, features })
  }
  for (const threads of [0, -1, 1.5, NaN, Infinity, 1025, '2'])
    expectRefusal(
      () => openDevice('cpu', { threads: threads as never }),
      'ERR_VALUE',
      'openDevice',
      /threads/,
    )
  for (const simd of ['sse', '', 'AVX2', 2])
    expectRefusal(
      () => openDevice('cpu', { simd: simd as never }),
      'ERR_VALUE',
      'openDevice',
      /simd/,
    )
  for (const simd of ['avx512', 'avx2', 'neon', 'scalar'] as const)
    if (!cpuPaths.some((path) => path.options.simd === simd))
      expectRefusal(() => openDevice('cpu', { simd }), 'ERR_DEVICE', 'openDevice', /which has/)
  for (const feature of ['bf16', 'vnni'])
    expectRefusal(
      () =>
        openDevice('cpu', { simd: cpuPaths.at(-1)!.options.simd, features: { [feature]: true } }),
      'ERR_DEVICE',
      'openDevice',
      new RegExp(`features.${feature}`),
    )
  expectRefusal(() => openDevice('cpu', null as never), 'ERR_VALUE', 'openDevice', /options/)
  expectRefusal(() => openDevice('cpu', { features: 1 as never }), 'ERR_VALUE', 'openDevice')
  expectRefusal(
    () => openDevice('cpu', { features: { bf16: 1 as never } }),
    'ERR_VALUE',
    'openDevice',
    /features.bf16/,
  )
})

onEveryBackend('device', (b) => {
  const open = () => b.open()

  test('dispose drains the queue, settles pending promises and disposes the tensors', async () => {
    const device = open()
    const x = device.tensor(new Float32Array(1 << 16).fill(1), [1 << 16])
    let y: Tensor = x
    for (let i = 0; i < 50; i++) y = gelu({ x: y })
    const timed = device.time(() => gelu({ x }))
    const awaited = [x.read(), y.toFloat32(), device.synchronize()]
    device.dispose()
    await expect(timed).rejects.toMatchObject({ code: 'ERR_DISPOSED', op: 'time' })
    const [first, last] = await Promise.all(awaited)
    expect((first as Float32Array)[0]).toBe(1)
    expect((last as Float32Array)[0]).toBeGreaterThan(0)
    expect(x.shape).toEqual([1 << 16])
    expect(y.dtype).toBe('f32')
    await expect(x.read()).rejects.toMatchObject({ code: 'ERR_DISPOSED', op: 'read' })
    expectRefusal(() => gelu({ x }), 'ERR_DISPOSED', 'gelu')
    expectRefusal(() => device.zeros([1]), 'ERR_DISPOSED', 'zeros')
    expectRefusal(() => device.tensor([1], [1]), 'ERR_DISPOSED', 'tensor')
    expectRefusal(() => device.memory(), 'ERR_DISPOSED', 'memory')
    expectRefusal(() => device.resetPeak(), 'ERR_DISPOSED', 'resetPeak')
    await expect(device.synchronize()).rejects.toMatchObject({
      code: 'ERR_DISPOSED',
      op: 'synchronize',
    })
    await expect(device.time(() => {})).rejects.toMatchObject({ code: 'ERR_DISPOSED', op: 'time' })
    x.dispose()
    device.dispose()
    device[Symbol.dispose]()
    expect(device.info.backend).toBe(b.device.info.backend)
  })

  test('each device has its own queue and pool', () => {
    using one = open()
    using other = open()
    const x = one.zeros([100])
    expect(other.memory().liveBytes).toBe(0)
    const y = other.zeros([100])
    expectRefusal(() => x.copyFrom(y), 'ERR_DEVICE', 'copyFrom')
  })

  test('time returns milliseconds, waits for the work and rethrows errors of f', async () => {
    using device = open()
    const x = device.zeros([1 << 20])
    const ms = await device.time(() => {
      for (let i = 0; i < 4; i++) gelu({ x }).dispose()
    })
    expect(ms).toBeGreaterThan(0)
    expect(await device.time(() => {})).toBeGreaterThanOrEqual(0)
    const own = new Error('mine')
    await expect(
      device.time(() => {
        throw own
      }),
    ).rejects.toBe(own)
    await expect(device.time(1 as never)).rejects.toMatchObject({ code: 'ERR_VALUE', op: 'time' })
    await expect(device.time(() => device.dispose())).rejects.toMatchObject({
      code: 'ERR_DISPOSED',
    })
  })

  test('liveBytes counts each byte of live tensors once, peakBytes is its maximum', () => {
    using device = open()
    expect(device.memory()).toMatchObject({ liveBytes: 0, peakBytes: 0 })
    const x = device.zeros([1000])
    const y = device.zeros([333], 'u8')
    const empty = device.zeros([0, 7])
    expect(device.memory().liveBytes).toBe(4333)
    const view = x.reshape([10, 100]).slice(2, 4)
    expect(device.memory().liveBytes).toBe(4333)
    x.dispose()
    x.dispose()
    expect(device.memory().liveBytes).toBe(4333)
    y.dispose()
    empty.dispose()
    expect(device.memory()).toMatchObject({ liveBytes: 4000, peakBytes: 4333 })
    device.resetPeak()
    expect(device.memory().peakBytes).toBe(4000)
    expect(device.memory().reservedBytes).toBeGreaterThanOrEqual(4000)
    expect(view.shape).toEqual([2, 100])
  })

  test('memory does not grow in a loop', async () => {
    using device = open()
    const x = device.tensor(new Float32Array(5000), [5000])
    const step = () => {
      using y = gelu({ x })
      using z = y.reshape([50, 100])
      gelu({ x: z }).dispose()
    }
    step()
    const before = device.memory()
    for (let i = 0; i < 20_000; i++) step()
    expect(device.memory()).toEqual(before)
    await device.synchronize()
  })

  test('tensors that are not disposed are garbage collected', async () => {
    using device = open()
    const x = device.zeros([1 << 18])
    const reserved = () => device.memory().reservedBytes
    for (let i = 0; i < 200; i++) {
      gelu({ x }).reshape([512, 512])
      if (i % 10 === 9) {
        collectGarbage()
        await turn()
      }
    }
    collectGarbage()
    for (let i = 0; i < 20 && device.memory().liveBytes > 2 ** 20; i++) {
      await turn()
      collectGarbage()
    }
    expect(device.memory().liveBytes).toBe(2 ** 20)
    expect(reserved()).toBeLessThan(200 * 2 ** 20)
  })

  test('external memory reported to V8 triggers garbage collection', async () => {
    using device = open()
    let peak = 0
    for (let i = 0; i < 600; i++) {
      device.zeros([1 << 21]).reshape([1 << 10, 1 << 11])
      peak = Math.max(peak, device.memory().liveBytes)
      await turn()
    }
    // 4800 MiB were made. V8 is notified of each 128 MiB, and collects garbage concurrently.
    expect(peak).toBeLessThan(2400 * 2 ** 20)
  })

  test('reused memory does not trigger garbage collection', async () => {
    using device = open()
    let collections = 0
    const observer = new PerformanceObserver((list) => {
      for (const { detail } of list.getEntries() as { detail?: unknown }[])
        if ((detail as { kind: number }).kind !== constants.NODE_PERFORMANCE_GC_MINOR) collections++
    })
    const use = () => device.zeros([40 << 20]).dispose()
    use()
    await device.synchronize()
    collectGarbage()
    observer.observe({ entryTypes: ['gc'] })
    for (let i = 0; i < 40; i++) {
      use()
      await turn()
    }
    observer.disconnect()
    // One may come for another reason. It was 9 to 19 when V8 heard of every tensor.
    expect(collections).toBeLessThan(4)
  })

  test('an allocation that is too large is ERR_MEMORY, and the device stays usable', async () => {
    using device = open()
    const live = device.memory().liveBytes
    for (const shape of [[2 ** 44], [2 ** 50], [2 ** 30, 2 ** 30, 2 ** 30]])
      expectRefusal(() => device.zeros(shape), 'ERR_MEMORY', 'zeros')
    expect(device.memory().liveBytes).toBe(live)
    using x = device.tensor([1, 2, 3], [3])
    expect(Array.from(await x.read())).toEqual([1, 2, 3])
  })
})

test.runIf(process.platform === 'linux')('a single worker is kept off one CPU', async () => {
  const mask = (task: string) =>
    readFileSync(`/proc/self/task/${task}/status`, 'utf8').match(/Cpus_allowed_list:\s*(\S+)/)![1]
  const tasks = () => readdirSync('/proc/self/task')
  const before = new Set(tasks())
  using device = openDevice('cpu', { threads: 2 })
  gelu({ x: device.zeros([1 << 20]) })
  await device.synchronize()
  const bound = tasks().filter((t) => !before.has(t) && mask(t) !== mask(`${process.pid}`))
  expect(bound).toHaveLength(/[-,]/.test(mask(`${process.pid}`)!) ? 1 : 0)
})

test('tensors keep their device alive', async () => {
  const x = (() => openDevice('cpu').tensor([1, 2], [2]))()
  collectGarbage()
  await turn()
  collectGarbage()
  expect(Array.from(await x.read())).toEqual([1, 2])
})

test('the constructors of devices and tensors are not public', () => {
  using device = openDevice('cpu')
  const made = (x: object) => x.constructor as new () => unknown
  expect(() => new (made(device))()).toThrow(/openDevice/)
  expect(() => new (made(device.zeros([1])))()).toThrow(/device.tensor/)
})
