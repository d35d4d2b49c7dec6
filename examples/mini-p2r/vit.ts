/**
 * A small pre-norm vision transformer, forward and backward, on the library's operations: patches
 * through a linear layer, plus learned positions and the question's embedding, then blocks of
 * attention and a four times wider MLP, then a last layer norm (Dosovitskiy et al. 2021).
 *
 * There is no tape: `forward` returns the activations that `backward` needs, and each block's backward
 * pass is its forward pass in reverse. All intermediate tensors belong to the caller's `scope`.
 */
import {
  adamW,
  add,
  attention,
  attentionBackward,
  clipGradNorm,
  type Device,
  gatherRows,
  gatherRowsBackward,
  gelu,
  geluBackward,
  type Ints,
  layerNorm,
  layerNormBackward,
  linear,
  linearBackward,
  type Tensor,
} from 'p2r-kernels'
import type { Rng } from './rng.js'

export type Tensors = Record<string, Tensor>

export interface VitShape {
  /** Patches an image, and the values of each. */
  tokens: number
  inputs: number
  width: number
  heads: number
  depth: number
  /** How many questions have an embedding. */
  questions: number
}

interface BlockState {
  x: Tensor
  norm1: { out: Tensor; stats: Tensor }
  qkv: Tensor
  attended: { out: Tensor; lse: Tensor }
  middle: Tensor
  norm2: { out: Tensor; stats: Tensor }
  fc1: Tensor
  active: Tensor
}

/** A forward pass: its result and what the backward pass needs. */
export interface VitState {
  /** [images * tokens, width] */
  out: Tensor
  pixels: Tensor
  /** Of each token: its position in the image, and the question about the image. */
  positions: Int32Array
  questions: Int32Array
  cuSeqlens: Int32Array
  blocks: BlockState[]
  last: Tensor
  norm: { stats: Tensor }
}

export class Vit {
  readonly shape: VitShape
  readonly params: Tensors = {}
  readonly #device: Device

  constructor(device: Device, shape: VitShape, rng: Rng) {
    this.shape = shape
    this.#device = device
    const { tokens, inputs, width, depth, questions } = shape
    this.addLinear('patch', inputs, width, rng)
    this.#addNormal('position', [tokens, width], 0.02, rng)
    // Larger than the positions', so that the question affects every token from the start.
    this.#addNormal('question', [questions, width], 0.5, rng)
    for (let block = 0; block < depth; block++) {
      this.#addNorm(`${block}.norm1`)
      this.addLinear(`${block}.qkv`, width, 3 * width, rng)
      this.addLinear(`${block}.project`, width, width, rng)
      this.#addNorm(`${block}.norm2`)
      this.addLinear(`${block}.fc1`, width, 4 * width, rng)
      this.addLinear(`${block}.fc2`, 4 * width, width, rng)
    }
    this.#addNorm('norm')
  }

  /**
   * A linear layer's weight and bias, uniform in +-1/sqrt(inputs). A head, given a gain, starts
   * with weights that much smaller and no bias, so that its first predictions are nearly uniform.
   */
  addLinear(name: string, inputs: number, outputs: number, rng: Rng, gain?: number): void {
    const bound = 1 / Math.sqrt(inputs)
    const values = (count: number, limit: number): Float32Array =>
      Float32Array.from({ length: count }, () => rng.between(-limit, limit))
    const weight = values(inputs * outputs, bound * (gain ?? 1))
    const bias = values(outputs, gain === undefined ? bound : 0)
    this.params[`${name}.weight`] = this.#device.tensor(weight, [outputs, inputs])
    this.params[`${name}.bias`] = this.#device.tensor(bias, [outputs])
  }

  /** x through the linear layer of that name; its gradients go into `grads`. */
  linear(name: string, x: Tensor): Tensor {
    return linear({ x, weight: this.#param(`${name}.weight`), bias: this.#param(`${name}.bias`) })
  }

  linearBackward(name: string, x: Tensor, dOut: Tensor, grads: Tensors): Tensor {
    const [weight, bias] = [this.#param(`${name}.weight`), this.#param(`${name}.bias`)]
    const { dX, dWeight, dBias } = linearBackward({ dOut, x, weight, bias })
    grads[`${name}.weight`] = dWeight
    if (dBias) grads[`${name}.bias`] = dBias
    return dX
  }

  /** pixels [images * tokens, inputs], and one question per image. */
  forward(pixels: Tensor, question: Ints): VitState {
    const { tokens, width, depth } = this.shape
    const images = question.length
    const index = Array.from({ length: images * tokens }, (_, i) => i)
    const positions = Int32Array.from(index, (i) => i % tokens)
    const questions = Int32Array.from(index, (i) => question[Math.floor(i / tokens)] as number)
    const cuSeqlens = Int32Array.from({ length: images + 1 }, (_, i) => i * tokens)

    const patches = this.linear('patch', pixels).reshape([images, tokens, width])
    const positioned = add({ x: patches, y: this.#param('position') })
    const asked = gatherRows({ x: this.#param('question'), index: questions })
    let x = add({ x: positioned.reshape([images * tokens, width]), y: asked })
    const blocks: BlockState[] = []
    for (let i = 0; i < depth; i++) {
      const block = this.#blockForward(i, x, cuSeqlens)
      blocks.push(block.state)
      x = block.out
    }
    const { out, stats } = this.#norm('norm', x)
    return { out, pixels, positions, questions, cuSeqlens, blocks, last: x, norm: { stats } }
  }

  /** The gradients of every parameter, given that of `state.out`. */
  backward(state: VitState, dOut: Tensor): Tensors {
    const { tokens, depth, questions } = this.shape
    const grads: Tensors = {}
    let dX = this.#normBackward('norm', state.last, state.norm.stats, dOut, grads)
    for (let i = depth - 1; i >= 0; i--) {
      dX = this.#blockBackward(i, state.blocks[i] as BlockState, dX, state.cuSeqlens, grads)
    }
    // An embedding's gradient is the sum over the tokens that it was added to.
    grads.position = gatherRowsBackward({ dOut: dX, index: state.positions, rows: tokens })
    grads.question = gatherRowsBackward({ dOut: dX, index: state.questions, rows: questions })
    this.linearBackward('patch', state.pixels, dX, grads)
    return grads
  }

  #blockForward(i: number, x: Tensor, cuSeqlens: Ints): { state: BlockState; out: Tensor } {
    const { width, heads } = this.shape
    const rows = x.shape[0] as number
    const norm1 = this.#norm(`${i}.norm1`, x)
    const qkv = this.linear(`${i}.qkv`, norm1.out).reshape([rows, 3, heads, width / heads])
    const attended = attention({ qkv, cuSeqlens })
    const middle = add({
      x,
      y: this.linear(`${i}.project`, attended.out.reshape([rows, width])),
    })
    const norm2 = this.#norm(`${i}.norm2`, middle)
    const fc1 = this.linear(`${i}.fc1`, norm2.out)
    const active = gelu({ x: fc1 })
    const out = add({ x: middle, y: this.linear(`${i}.fc2`, active) })
    return { state: { x, norm1, qkv, attended, middle, norm2, fc1, active }, out }
  }

  #blockBackward(
    i: number,
    state: BlockState,
    dOut: Tensor,
    cuSeqlens: Ints,
    grads: Tensors,
  ): Tensor {
    const { x, norm1, qkv, attended, middle, norm2, fc1, active } = state
    const rows = x.shape[0] as number
    const { width } = this.shape
    const dActive = this.linearBackward(`${i}.fc2`, active, dOut, grads)
    const dFc1 = geluBackward({ dOut: dActive, x: fc1 })
    const dNorm2 = this.linearBackward(`${i}.fc1`, norm2.out, dFc1, grads)
    const dMlp = this.#normBackward(`${i}.norm2`, middle, norm2.stats, dNorm2, grads)
    const dMiddle = add({ x: dOut, y: dMlp })

    const flat = attended.out.reshape([rows, width])
    const dFlat = this.linearBackward(`${i}.project`, flat, dMiddle, grads)
    const dAttended = dFlat.reshape(attended.out.shape)
    const { out, lse } = attended
    const { dQkv } = attentionBackward({ dOut: dAttended, qkv, out, lse, cuSeqlens })
    const dNorm1 = this.linearBackward(
      `${i}.qkv`,
      norm1.out,
      dQkv.reshape([rows, 3 * width]),
      grads,
    )
    const dAttention = this.#normBackward(`${i}.norm1`, x, norm1.stats, dNorm1, grads)
    return add({ x: dMiddle, y: dAttention })
  }

  #norm(name: string, x: Tensor): { out: Tensor; stats: Tensor } {
    const [weight, bias] = [this.#param(`${name}.weight`), this.#param(`${name}.bias`)]
    return layerNorm({ x, weight, bias })
  }

  #normBackward(name: string, x: Tensor, stats: Tensor, dOut: Tensor, grads: Tensors): Tensor {
    const weight = this.#param(`${name}.weight`)
    const { dX, dWeight, dBias } = layerNormBackward({ dOut, x, weight, stats })
    grads[`${name}.weight`] = dWeight
    grads[`${name}.bias`] = dBias
    return dX
  }

  #param(name: string): Tensor {
    const found = this.params[name]
    if (!found) throw new Error(`The model has no parameter ${name}`)
    return found
  }

  #addNorm(name: string): void {
    const { width } = this.shape
    this.params[`${name}.weight`] = this.#device.tensor(new Float32Array(width).fill(1), [width])
    this.params[`${name}.bias`] = this.#device.zeros([width])
  }

  #addNormal(name: string, shape: readonly [number, number], std: number, rng: Rng): void {
    const values = Float32Array.from({ length: shape[0] * shape[1] }, () => std * rng.normal())
    this.params[name] = this.#device.tensor(values, shape)
  }
}

/** AdamW after clipping the joint norm of the gradients, over parameters known by name. */
export class Optimizer {
  readonly #params: Tensors
  readonly #names: readonly string[]
  readonly #moments: readonly Tensor[]
  #step = 0

  constructor(device: Device, params: Tensors) {
    this.#params = params
    this.#names = Object.keys(params)
    this.#moments = this.#pick(params).map(({ size }) => device.zeros([2, size]))
  }

  update(gradients: Tensors, lr: number): void {
    const grads = this.#pick(gradients)
    clipGradNorm({ grads, maxNorm: 1 })
    const betas = [0.9, 0.99] as const
    const [params, moments] = [this.#pick(this.#params), this.#moments]
    adamW({ params, grads, moments, step: ++this.#step, lr, betas, weightDecay: 0.01 })
  }

  dispose(): void {
    for (const moment of this.#moments) moment.dispose()
  }

  #pick(tensors: Tensors): Tensor[] {
    return this.#names.map((name) => {
      const found = tensors[name]
      if (!found) throw new Error(`There is no gradient of ${name}`)
      return found
    })
  }
}

/** Overwrites the parameters of one model by those of another of the same shape. */
export function copyParams(to: Tensors, from: Tensors): void {
  for (const [name, tensor] of Object.entries(to)) {
    const source = from[name]
    if (source?.dtype !== 'f32' || String(source.shape) !== String(tensor.shape)) {
      throw new Error(`${name} should be f32 [${tensor.shape}]`)
    }
    tensor.copyFrom(source)
  }
}
