// What the types of operations and tensors promise: compiled by vitest's typecheck and by
// `tsc -p test`, never run.
import {
  type AttentionArgs,
  attention,
  attentionBackward,
  attentionMass,
  clipGradNorm,
  type Device,
  type DeviceId,
  type DType,
  drawBoxes,
  type FloatDType,
  type GeluArgs,
  gatherRows,
  gelu,
  groupAdvantages,
  informativeGroups,
  layerNorm,
  linear,
  linearBackward,
  linearLogProbs,
  linearLogProbsBackward,
  linearPolicyLoss,
  loadTensors,
  mergeLogProbs,
  openDevice,
  pixelValues,
  policyLoss,
  type Region,
  sample,
  type Tensor,
  tokenLogProbs,
  tokenLogProbsBackward,
  tokenLogProbsShard,
} from 'p2r-kernels'
import { describe, expectTypeOf, test } from 'vitest'

declare const device: Device
declare const f32: Tensor<'f32'>
declare const bf16: Tensor<'bf16'>
declare const i32: Tensor<'i32'>
declare const u8: Tensor<'u8'>
/** As from a file: its type is known at run time alone. */
declare const bare: Tensor
declare const flag: boolean

describe('tensors', () => {
  test('the type follows host data and dtype', () => {
    expectTypeOf(device.tensor(new Uint8Array(1), [1])).toEqualTypeOf<Tensor<'u8'>>()
    expectTypeOf(device.tensor(new Uint8ClampedArray(1), [1])).toEqualTypeOf<Tensor<'u8'>>()
    expectTypeOf(device.tensor(new Int32Array(1), [1])).toEqualTypeOf<Tensor<'i32'>>()
    expectTypeOf(device.tensor(new Float32Array(1), [1])).toEqualTypeOf<Tensor<'f32'>>()
    expectTypeOf(device.tensor(new Float64Array(1), [1])).toEqualTypeOf<Tensor<'f32'>>()
    expectTypeOf(device.tensor([1], [1])).toEqualTypeOf<Tensor<'f32'>>()
    expectTypeOf(device.tensor([1], [1], 'f16')).toEqualTypeOf<Tensor<'f16'>>()
    expectTypeOf(device.tensor(new Uint16Array(1), [1], 'bf16')).toEqualTypeOf<Tensor<'bf16'>>()
    // @ts-expect-error raw bits of which type?
    device.tensor(new Uint16Array(1), [1])
    expectTypeOf(device.zeros([1])).toEqualTypeOf<Tensor<'f32'>>()
    expectTypeOf(device.zeros([1], 'u8')).toEqualTypeOf<Tensor<'u8'>>()
    // @ts-expect-error an unknown type
    device.zeros([1], 'f64')
  })

  test('read gives the one array of the type', () => {
    expectTypeOf(f32.read()).resolves.toEqualTypeOf<Float32Array>()
    expectTypeOf(bf16.read()).resolves.toEqualTypeOf<Uint16Array>()
    expectTypeOf(i32.read()).resolves.toEqualTypeOf<Int32Array>()
    expectTypeOf(u8.read()).resolves.toEqualTypeOf<Uint8Array>()
    expectTypeOf(bf16.toFloat32()).resolves.toEqualTypeOf<Float32Array>()
  })

  test('views and copies keep the type', () => {
    expectTypeOf(bf16.reshape([1]).slice(0, 1).to(device)).toEqualTypeOf<Tensor<'bf16'>>()
    expectTypeOf(bf16.cast('i32')).toEqualTypeOf<Tensor<'i32'>>()
    expectTypeOf(bf16.dtype).toEqualTypeOf<'bf16'>()
  })

  test('a bare tensor has a type of the list, and is accepted everywhere', async () => {
    expectTypeOf(bare.dtype).toEqualTypeOf<DType>()
    expectTypeOf(gelu({ x: bare }).dtype).toEqualTypeOf<DType>()
    expectTypeOf(bare).toExtend<Tensor<'f32'>>()
    expectTypeOf(f32).toExtend<Tensor>()
    expectTypeOf(await loadTensors('x', device)).toEqualTypeOf<Record<string, Tensor>>()
    drawBoxes({ image: bare, boxes: [] })
    linear({ x: bare, weight: bf16 })
    linear({ x: bf16, weight: bare })
  })

  test('a tensor of one type is one of several, and not the other way around', () => {
    expectTypeOf(f32).toExtend<Tensor<FloatDType>>()
    expectTypeOf<Tensor<FloatDType>>().not.toExtend<Tensor<'f32'>>()
    expectTypeOf(i32).not.toExtend<Tensor<FloatDType>>()
  })

  test('the fields of the implementation are not part of the types', () => {
    // @ts-expect-error internal
    void device.handle
    // @ts-expect-error internal
    void f32.uncloneable
  })
})

describe('operations', () => {
  test('keep the type of their tensors', () => {
    expectTypeOf(gelu({ x: f32 })).toEqualTypeOf<Tensor<'f32'>>()
    expectTypeOf(gelu({ x: bf16 })).toEqualTypeOf<Tensor<'bf16'>>()
    expectTypeOf(linear({ x: bf16, weight: bf16 })).toEqualTypeOf<Tensor<'bf16'>>()
    expectTypeOf(linear({ x: bf16, weight: bf16, bias: f32 })).toEqualTypeOf<Tensor<'bf16'>>()
    expectTypeOf(linear({ x: bf16, weight: bf16, dtype: 'f32' })).toEqualTypeOf<Tensor<'f32'>>()
    const norm = layerNorm({ x: bf16, weight: bf16, bias: f32 })
    expectTypeOf(norm.out).toEqualTypeOf<Tensor<'bf16'>>()
    expectTypeOf(norm.stats).toEqualTypeOf<Tensor<'f32'>>()
    expectTypeOf(gatherRows({ x: u8, index: [0] })).toEqualTypeOf<Tensor<'u8'>>()
    const { out, lse } = attention({ qkv: bf16, cuSeqlens: [0] })
    expectTypeOf(out).toEqualTypeOf<Tensor<'bf16'>>()
    expectTypeOf(lse).toEqualTypeOf<Tensor<'f32'>>()
  })

  test('have results of fixed types', () => {
    expectTypeOf(sample({ logits: bf16, seed: 1 })).toEqualTypeOf<Tensor<'i32'>>()
    expectTypeOf(clipGradNorm({ grads: [bf16, f32], maxNorm: 1 })).toEqualTypeOf<Tensor<'f32'>>()
    expectTypeOf(groupAdvantages({ rewards: f32, groups: [0] })).toEqualTypeOf<Tensor<'f32'>>()
    expectTypeOf(informativeGroups({ rewards: f32, groups: [0] })).toEqualTypeOf<Tensor<'u8'>>()
  })

  test('refuse tensors of another type', () => {
    // @ts-expect-error not of a float type
    gelu({ x: i32 })
    // @ts-expect-error not of x's type
    linear({ x: bf16, weight: f32 })
    // @ts-expect-error neither x's type nor f32
    linear({ x: bf16, weight: bf16, dtype: 'f16' })
    // @ts-expect-error neither x's type nor f32
    linear({ x: bf16, weight: bf16, bias: i32 })
    // @ts-expect-error targets are i32
    tokenLogProbs({ logits: f32, targets: f32 })
    // @ts-expect-error a mask is u8
    policyLoss({ logProbs: f32, advantages: f32, cuSeqlens: [0], mask: i32 })
    // @ts-expect-error an image is u8
    drawBoxes({ image: f32, boxes: [] })
  })

  test('refuse unknown options and values', () => {
    // @ts-expect-error no such mask
    attention({ qkv: f32, cuSeqlens: [0], window: 64 })
    // @ts-expect-error no such form
    gelu({ x: f32, approximate: 'fast' })
    // @ts-expect-error a part of a region
    pixelValues({ image: u8, regions: [{ box: [0, 0, 1, 1], height: 32 }] })
  })

  test('arguments have names', () => {
    expectTypeOf<GeluArgs<'f32'>>().toEqualTypeOf<{
      x: Tensor<'f32'>
      approximate?: 'none' | 'tanh'
    }>()
    const a: AttentionArgs = { qkv: f32, cuSeqlens: [0] }
    expectTypeOf(attention(a).out).toEqualTypeOf<Tensor<FloatDType>>()
  })
})

describe('inputs exclude each other', () => {
  const cuSeqlens = [0]

  test('qkv excludes q, k and v', () => {
    attention({ q: f32, k: f32, v: f32, cuSeqlens })
    attentionMass({ q: f32, k: f32, lse: f32, cuSeqlens })
    // @ts-expect-error both forms
    attention({ qkv: f32, q: f32, k: f32, v: f32, cuSeqlens })
    // @ts-expect-error no v
    attention({ q: f32, k: f32, cuSeqlens })
    // @ts-expect-error rotary needs qkv
    attention({ q: f32, k: f32, v: f32, cuSeqlens, rotary: { cos: f32, sin: f32 } })
  })

  test('image excludes images', () => {
    const regions: Region[] = []
    pixelValues({ image: u8, regions })
    pixelValues({ images: [u8], regions })
    // @ts-expect-error both forms
    pixelValues({ image: u8, images: [u8], regions })
    // @ts-expect-error neither form
    pixelValues({ regions })
  })

  test('an entropy comes with its gradient', () => {
    const a = { logits: f32, targets: i32, stats: f32, dLogProbs: f32 }
    tokenLogProbsBackward({ ...a, entropy: f32, dEntropy: f32 })
    // @ts-expect-error without dEntropy
    tokenLogProbsBackward({ ...a, entropy: f32 })
  })
})

describe('results are in the type exactly when they are there', () => {
  test('the entropy, if it is requested', () => {
    const rows = { logits: f32, targets: i32 }
    const head = { hidden: bf16, weight: bf16, targets: i32 }
    expectTypeOf(tokenLogProbs({ ...rows, entropy: true }).entropy).toEqualTypeOf<Tensor<'f32'>>()
    expectTypeOf(tokenLogProbs(rows)).not.toHaveProperty('entropy')
    expectTypeOf(tokenLogProbs({ ...rows, entropy: false })).not.toHaveProperty('entropy')
    expectTypeOf(tokenLogProbs({ ...rows, entropy: flag }).entropy).toEqualTypeOf<
      Tensor<'f32'> | undefined
    >()
    expectTypeOf(linearLogProbs({ ...head, entropy: true }).entropy).toEqualTypeOf<Tensor<'f32'>>()
    expectTypeOf(linearLogProbs(head)).not.toHaveProperty('entropy')
    const squared = tokenLogProbs({ ...rows, squaredProbs: true })
    expectTypeOf(squared.squaredProbs).toEqualTypeOf<Tensor<'f32'>>()
    expectTypeOf(squared).not.toHaveProperty('entropy')
    expectTypeOf(linearLogProbs(head)).not.toHaveProperty('squaredProbs')
    const shard = { ...rows, vocabOffset: 0 }
    const withMoment = tokenLogProbsShard({ ...shard, entropy: true })
    expectTypeOf(withMoment.moment).toEqualTypeOf<Tensor<'f32'>>()
    expectTypeOf(tokenLogProbsShard(shard)).not.toHaveProperty('moment')
    expectTypeOf(mergeLogProbs([withMoment]).entropy).toEqualTypeOf<Tensor<'f32'>>()
    expectTypeOf(mergeLogProbs([tokenLogProbsShard(shard)])).not.toHaveProperty('entropy')
  })

  test('dEntropy, if an entropy is given', () => {
    const a = { logProbs: f32, advantages: f32, cuSeqlens: [0] }
    expectTypeOf(policyLoss({ ...a, entropy: f32 }).dEntropy).toEqualTypeOf<Tensor<'f32'>>()
    expectTypeOf(policyLoss(a)).not.toHaveProperty('dEntropy')
  })

  test('dBias, if there is a bias', () => {
    const a = { dOut: bf16, x: bf16, weight: bf16 }
    expectTypeOf(linearBackward({ ...a, bias: f32 }).dBias).toEqualTypeOf<Tensor<'f32'>>()
    expectTypeOf(linearBackward({ ...a, bias: f32 }).dX).toEqualTypeOf<Tensor<'bf16'>>()
    expectTypeOf(linearBackward(a)).not.toHaveProperty('dBias')
    const head = { hidden: bf16, weight: bf16, targets: i32 }
    const back = { ...head, stats: f32, dLogProbs: f32 }
    expectTypeOf(linearLogProbsBackward({ ...back, bias: f32 }).dBias).toEqualTypeOf<
      Tensor<'f32'>
    >()
    expectTypeOf(linearLogProbsBackward(back)).not.toHaveProperty('dBias')
    const step = { ...head, advantages: f32, cuSeqlens: [0] }
    expectTypeOf(linearPolicyLoss({ ...step, bias: f32 }).dBias).toEqualTypeOf<Tensor<'f32'>>()
    expectTypeOf(linearPolicyLoss(step)).not.toHaveProperty('dBias')
    expectTypeOf(linearPolicyLoss(step).dHidden).toEqualTypeOf<Tensor<'bf16'>>()
  })

  test('dQkv or dQ, dK and dV', () => {
    const a = { dOut: bf16, out: bf16, lse: f32, cuSeqlens: [0] }
    const packed = attentionBackward({ ...a, qkv: bf16 })
    expectTypeOf(packed.dQkv).toEqualTypeOf<Tensor<'bf16'>>()
    expectTypeOf(packed).not.toHaveProperty('dQ')
    const separate = attentionBackward({ ...a, q: bf16, k: bf16, v: bf16 })
    expectTypeOf(separate.dQ).toEqualTypeOf<Tensor<'bf16'>>()
    expectTypeOf(separate).not.toHaveProperty('dQkv')
  })

  test('of every held result: dispose', () => {
    expectTypeOf(tokenLogProbs({ logits: f32, targets: i32 })).toExtend<Disposable>()
  })
})

test('literal unions stay strings that an editor completes', () => {
  openDevice('cpu')
  openDevice('cuda:3')
  openDevice(process.env.DEVICE)
  expectTypeOf<string>().toExtend<DeviceId>()
  expectTypeOf(openDevice).parameter(0).toEqualTypeOf<DeviceId | undefined>()
})
