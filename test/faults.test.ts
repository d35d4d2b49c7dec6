// A value that a kernel must refuse: here a target outside the vocabulary.
import { type Device, gelu, openDevice, type Tensor, tokenLogProbs } from 'p2r-kernels'
import { expect, test } from 'vitest'
import { onEveryBackend } from './harness.js'

const fault = { name: 'P2RError', code: 'ERR_VALUE', op: 'tokenLogProbs' }

function logProbs(device: Device, target: number): Tensor<'f32'> {
  const logits = device.tensor([0, 1, 2, 3, 2, 1], [2, 3])
  const targets = device.tensor(Int32Array.of(0, target), [2])
  return tokenLogProbs({ logits, targets }).logProbs as Tensor<'f32'>
}
const bad = (device: Device): Tensor<'f32'> => logProbs(device, 7)
const good = (device: Device): Tensor<'f32'> => logProbs(device, 1)

onEveryBackend('faults', (b) => {
  const open = () => openDevice(b.device.info.id)

  test('are thrown by every read of the outputs, repeatedly', async () => {
    using device = open()
    const x = bad(device)
    for (let i = 0; i < 3; i++) {
      await expect(x.read()).rejects.toMatchObject(fault)
      await expect(x.toFloat32()).rejects.toMatchObject(fault)
    }
    await expect(x.read()).rejects.toThrow(/^\[tokenLogProbs\] /)
  })

  test('propagate to results computed from them, and to nothing else', async () => {
    using device = open()
    const before = good(device)
    const x = bad(device)
    const after = good(device)
    const copy = device.zeros([2])
    copy.copyFrom(x)
    const part = device.zeros([4])
    part.slice(0, 2).copyFrom(x)
    for (const y of [
      gelu({ x }),
      gelu({ x: gelu({ x }) }),
      x.cast('f16'),
      x.reshape([1, 2]),
      x.slice(0, 1),
      x.to(device),
      copy,
      part,
    ])
      await expect(y.read()).rejects.toMatchObject(fault)
    for (const y of [before, after, gelu({ x: after }), device.zeros([2])])
      expect((await y.read()).every(Number.isFinite)).toBe(true)
  })

  test('are cleared when the data is overwritten', async () => {
    using device = open()
    const x = bad(device)
    x.slice(0, 1).write([1])
    await expect(x.read()).rejects.toMatchObject(fault)
    x.write([1, 2])
    expect(Array.from(await x.read())).toEqual([1, 2])
    const y = bad(device)
    y.copyFrom(x)
    expect(Array.from(await y.read())).toEqual([1, 2])
  })

  test('are thrown by synchronize, each once', async () => {
    using device = open()
    await device.synchronize()
    bad(device)
    good(device)
    const x = bad(device)
    await expect(device.synchronize()).rejects.toMatchObject(fault)
    await expect(device.synchronize()).rejects.toMatchObject(fault)
    await device.synchronize()
    await expect(x.read()).rejects.toMatchObject(fault)
    await device.synchronize()
  })

  test('are copied to other devices with their tensors', async () => {
    using device = open()
    using other = openDevice('cpu')
    // Work of the other device's own, so that its count runs ahead.
    for (let i = 0; i < 100; i++) other.zeros([10]).dispose()
    await other.synchronize()
    for (let i = 0; i < 20; i++) gelu({ x: device.zeros([1 << 16]) })
    const x = bad(device).to(other)
    const y = gelu({ x })
    await expect(y.read()).rejects.toMatchObject(fault)
    await other.synchronize()
    await expect(device.synchronize()).rejects.toMatchObject(fault)
  })

  test('are still reported if the device is disposed before its promises settle', async () => {
    const device = open()
    const x = bad(device)
    const waits = [x.read(), device.synchronize()]
    device.dispose()
    for (const wait of waits) await expect(wait).rejects.toMatchObject(fault)
    await expect(x.read()).rejects.toMatchObject({ code: 'ERR_DISPOSED' })
  })

  test('do not accumulate: memory does not grow in a loop with and without them', async () => {
    using device = open()
    const total = device.zeros([4])
    for (let i = 0; i < 6000; i++) {
      const x = logProbs(device, i % 3 === 0 ? 9 : 1)
      total.slice(0, 2).copyFrom(x)
      x.dispose()
      if (i % 1000 === 999) await expect(device.synchronize()).rejects.toMatchObject(fault)
    }
    total.write([1, 2, 3, 4])
    expect(Array.from(await total.read())).toEqual([1, 2, 3, 4])
  })
})
