// What tensors and devices show of themselves, that they refuse to be cloned, and what P2R_DEBUG logs.
import { spawnSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { inspect } from 'node:util'
import { MessageChannel } from 'node:worker_threads'
import { gelu, openDevice, type Tensor } from 'p2r-kernels'
import { expect, test } from 'vitest'
import { onEveryBackend } from './harness.js'

onEveryBackend('printing', (b) => {
  const info = () => b.device.info

  test('a tensor as text names type, shape, device and whether it is disposed', async () => {
    const x = b.device.tensor([1, 2, 3, 4, 5, 6], [2, 3], 'bf16')
    expect(String(x)).toBe(`Tensor bf16 [2, 3] on ${info().id}`)
    x.dispose()
    expect(`${x}`).toBe(`Tensor bf16 [2, 3] on ${info().id}, disposed`)
    expect(inspect(x)).toBe(`Tensor bf16 [2, 3] on ${info().id}, disposed`)
  })

  test('a small tensor of the CPU is inspected with its values once they are there', async () => {
    const cases: [Tensor, string][] = [
      [b.device.tensor([1, 2, -3.5, 4], [2, 2], 'f16'), ' [ [ 1, 2 ], [ -3.5, 4 ] ]'],
      [b.device.tensor([1, 2, -3.5, 4], [4], 'bf16'), ' [ 1, 2, -3.5, 4 ]'],
      [b.device.tensor(Int32Array.of(7, -8), [2, 1]), ' [ [ 7 ], [ -8 ] ]'],
      [b.device.tensor(Uint8Array.of(255), []), ' 255'],
      [b.device.tensor([Number.NaN, Number.POSITIVE_INFINITY], [2]), ' [ NaN, Infinity ]'],
      [b.device.zeros([0, 3]), ' []'],
      [b.device.tensor([1, 2, 3, 4], [2, 2]).slice(1, 2), ' [ [ 3, 4 ] ]'],
      [b.device.zeros([65]), ''],
    ]
    await b.device.synchronize()
    for (const [x, values] of cases)
      expect(inspect(x)).toBe(`${x}${info().backend === 'cpu' ? values : ''}`)
    expect(inspect({ x: cases[3]![0] })).toContain(`x: Tensor u8 [] on ${info().id}`)
  })

  test('inspecting does not wait: a tensor whose work is queued has no values yet', async () => {
    using device = openDevice(info().id)
    let x: Tensor = device.zeros([1 << 20])
    for (let i = 0; i < 50; i++) x = gelu({ x })
    const last = x.slice(0, 1)
    expect(inspect(last)).toBe(`Tensor f32 [1] on ${info().id}`)
    await device.synchronize()
    expect(inspect(last)).toBe(
      `Tensor f32 [1] on ${info().id}${info().backend === 'cpu' ? ' [ 0 ]' : ''}`,
    )
  })

  test('a device as text', () => {
    using device = openDevice(info().id)
    expect(String(device)).toMatch(
      info().backend === 'cpu' ? /^Device cpu \(\d+ threads, \w+\)$/ : /^Device cuda:\d+ \(.+\)$/,
    )
    expect(inspect(device)).toBe(String(device))
    device.dispose()
    expect(String(device)).toMatch(/, disposed$/)
  })

  test('what has their prototype alone can be inspected', () => {
    using x = b.device.zeros([1])
    expect(inspect(Object.create(Object.getPrototypeOf(x)))).toBe('Tensor {}')
    expect(inspect(Object.create(Object.getPrototypeOf(b.device)))).toBe('Device {}')
  })

  test('clones and messages of tensors, devices and what holds them are refused', () => {
    using x = b.device.zeros([2])
    const { port1, port2 } = new MessageChannel()
    for (const value of [x, { x }, [x]]) {
      expect(() => structuredClone(value)).toThrow(/a Tensor belongs to its thread; send/)
      expect(() => port1.postMessage(value)).toThrow(/a Tensor belongs to its thread; send/)
    }
    expect(() => structuredClone(b.device)).toThrow(/a Device belongs to its thread; open one/)
    port1.close()
    port2.close()
    expect(Object.keys({ ...x })).toContain('shape') // copying fields is fine
  })
})

const root = fileURLToPath(new URL('..', import.meta.url))
function logOf(debug: string | undefined, program: string): string[] {
  const { P2R_DEBUG: _, ...env } = process.env
  const { status, stdout, stderr } = spawnSync(
    process.execPath,
    ['--input-type=module', '-e', `import * as p from 'p2r-kernels'\n${program}`],
    {
      cwd: root,
      encoding: 'utf8',
      env: { ...env, ...(debug !== undefined && { P2R_DEBUG: debug }) },
    },
  )
  expect(status, stderr).toBe(0)
  expect(stdout).toBe('')
  return stderr.split('\n').filter(Boolean)
}

test('P2R_DEBUG=1 logs each operation with its tensors and its time', () => {
  const program = `
    const device = p.openDevice('cpu')
    const x = device.tensor([1, 2, 3, 4], [2, 2], 'f16')
    const weight = device.zeros([3, 2], 'f16')
    p.linear({ x: p.gelu({ x }), weight })
    const logProbs = device.zeros([2]), rewards = device.tensor([1, 0], [2])
    p.grpoStep({ logProbs, rewards, groups: [0, 0], cuSeqlens: [0, 1, 2] })
    await device.synchronize()
    device.dispose()`
  const log = logOf('1', program)
  const time = String.raw`, \d+\.\d{3} ms on cpu$`
  expect(log[0]).toMatch(
    new RegExp(String.raw`^p2r-kernels: gelu\(f16 \[2, 2\]\) -> f16 \[2, 2\]${time}`),
  )
  expect(log[1]).toMatch(
    new RegExp(
      String.raw`^p2r-kernels: linear\(f16 \[2, 2\], f16 \[3, 2\]\) -> f16 \[2, 3\]${time}`,
    ),
  )
  expect(log.slice(2).map((line) => line.split('(')[0])).toEqual([
    'p2r-kernels: grpoStep: groupAdvantages',
    'p2r-kernels: grpoStep: policyLoss',
  ])
  for (const off of [undefined, '', '0']) expect(logOf(off, program)).toEqual([])
})

test('P2R_DEBUG=nan names the operation that first makes a NaN or infinity', () => {
  const log = logOf(
    'nan',
    `
    const device = p.openDevice('cpu')
    const x = device.tensor([1, 60000, 2], [3], 'f16')
    const y = p.add({ x, y: x })
    p.gelu({ x: y })
    p.gelu({ x: device.tensor([1, NaN], [2]) })
    const grad = device.tensor([3e38, 3e38], [2])
    p.adamW({ params: [device.zeros([2])], grads: [grad], moments: [device.zeros([2, 2])], step: 1, lr: 1 })
    await device.synchronize()
    device.dispose()`,
  )
  const made = log.filter((line) => line.includes(' made '))
  expect(made[0]).toBe(
    'p2r-kernels: add made infinity from finite inputs: output 0, f16 [3], element 1',
  )
  expect(made[1]).toMatch(
    /^p2r-kernels: adamW made infinity from finite inputs: output 1, f32 \[2, 2\]/,
  )
  expect(made).toHaveLength(2)
  expect(log).toHaveLength(4 + 2)
})
