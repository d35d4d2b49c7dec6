// A value that a kernel must refuse: here a target outside the vocabulary.
import {
  type Device,
  gelu,
  groupAdvantages,
  grpoStep,
  informativeGroups,
  linearLogProbs,
  linearLogProbsBackward,
  linearPolicyLoss,
  openDevice,
  policyLoss,
  sample,
  type Tensor,
  tokenLogProbs,
  tokenLogProbsBackward,
  tokenLogProbsShard,
} from 'p2r-kernels'
import { expect, test } from 'vitest'
import { onEveryBackend } from './harness.js'

const fault = { name: 'P2RError', code: 'ERR_VALUE', op: 'tokenLogProbs' }

function logProbs(device: Device, target: number): Tensor<'f32'> {
  const logits = device.tensor([0, 1, 2, 3, 2, 1], [2, 3])
  const targets = device.tensor(Int32Array.of(0, target), [2])
  return tokenLogProbs({ logits, targets }).logProbs
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

  test('name the first row or token at fault and its value', async () => {
    using device = open()
    const count = 300
    const rows = (value: (i: number) => number) => Array.from({ length: count }, (_, i) => value(i))
    const targets = device.tensor(Int32Array.from(rows((i) => (i === 17 || i > 40 ? 3 + i : 0))), [
      count,
    ])
    const hidden = device.zeros([count, 8])
    const weight = device.zeros([3, 8])
    const logits = device.zeros([count, 3])
    const zeros = device.zeros([count])
    const target = 'targets[17] = 20 is not a token of 3, nor -100'
    const { stats } = tokenLogProbs({ logits, targets: device.zeros([count], 'i32') })
    const mask = device.tensor(Uint8Array.from(rows((i) => (i >= 290 ? 250 : 1))), [count])
    const cuSeqlens = [0, 5, count]
    const advantages = device.zeros([2])
    const rewards = device.tensor(
      rows((i) => (i === 123 ? Number.NaN : i === 200 ? 1 / 0 : 0)),
      [count],
    )
    const kinds = device.tensor([0, 1, 2, 0, Number.NEGATIVE_INFINITY, 0], [3, 2])
    const odd = (values: number[]) => device.tensor([0, 1, ...values, 1, 1], [3, 2])
    const negative = device.tensor(Int32Array.of(0, -100, -7), [3])
    const head = { hidden, weight, targets }
    const cases: [Tensor, string][] = [
      [tokenLogProbs({ logits, targets }).logProbs, target],
      [tokenLogProbsBackward({ logits, targets, stats, dLogProbs: zeros }), target],
      [linearLogProbs(head).logProbs, target],
      [linearLogProbsBackward({ ...head, stats, dLogProbs: zeros }).dWeight, target],
      [linearPolicyLoss({ ...head, advantages, cuSeqlens }).loss, target],
      [
        linearPolicyLoss({
          ...head,
          targets: device.zeros([count], 'i32'),
          advantages,
          cuSeqlens,
          mask,
        }).loss,
        'mask[290] = 250 is neither 0 nor 1',
      ],
      [
        tokenLogProbsShard({ logits: device.zeros([3, 4]), targets: negative, vocabOffset: 4 })
          .stats,
        'targets[2] = -7 is negative, and not -100',
      ],
      [
        policyLoss({ logProbs: zeros, advantages, cuSeqlens, mask }).loss,
        'mask[290] = 250 is neither 0 nor 1',
      ],
      [
        groupAdvantages({ rewards, groups: rows((i) => i % 7) }),
        'rewards[123] = NaN is not finite',
      ],
      [
        groupAdvantages({
          rewards: kinds,
          groups: [1, 1, 1],
          estimator: 'gdpo',
          lengths: [1, 1, 1],
        }),
        'rewards[2, 0] = -infinity is not finite',
      ],
      [
        groupAdvantages({
          rewards: zeros,
          groups: rows((i) => i % 7),
          estimator: 'remax',
          baselines: rewards,
        }),
        'baselines[123] = NaN is not finite',
      ],
      [informativeGroups({ rewards, groups: rows((i) => -i) }), 'rewards[123] = NaN is not finite'],
      [
        sample({ logits: odd([Number.NaN, 3]), seed: 1 }),
        'logits[1] holds NaN: nothing can be drawn',
      ],
      [
        sample({ logits: odd([0, Number.POSITIVE_INFINITY]), seed: 1 }),
        'logits[1] holds infinity: nothing can be drawn',
      ],
      [
        sample({ logits: odd([Number.NEGATIVE_INFINITY, Number.NEGATIVE_INFINITY]), seed: 1 }),
        'logits[1] holds nothing but -infinity: nothing can be drawn',
      ],
    ]
    for (const [x, message] of cases) {
      const error = await x.read().then(
        () => undefined,
        (thrown) => thrown,
      )
      expect(error).toMatchObject({ code: 'ERR_VALUE', message: `[${error.op}] ${message}` })
    }
  })

  test('of a composite name what the operation at fault found', async () => {
    using device = open()
    const rewards = device.tensor([1, 0], [2])
    const batch = { rewards, groups: [0, 0], cuSeqlens: [0, 2, 4] }
    const targets = device.tensor(Int32Array.of(0, 1, 5, 9), [4])
    const step = grpoStep({ logits: device.zeros([4, 5]), targets, ...batch })
    await expect(step.loss.read()).rejects.toThrow(
      '[grpoStep] targets[2] = 5 is not a token of 5, nor -100',
    )
    const mask = device.tensor(Uint8Array.of(1, 1, 2, 1), [4])
    const masked = grpoStep({ logProbs: device.zeros([4]), mask, ...batch, estimator: 'opo' })
    await expect(masked.loss.read()).rejects.toThrow('[grpoStep] mask[2] = 2 is neither 0 nor 1')
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
    await device.synchronize()
  })

  test('are still reported if the device is disposed before its promises settle', async () => {
    const device = open()
    const x = bad(device)
    const read = x.read()
    bad(device)
    const synchronized = device.synchronize()
    device.dispose()
    await expect(read).rejects.toMatchObject(fault)
    await expect(synchronized).rejects.toMatchObject(fault)
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
