/**
 * What an optimizer changes: f32 master weights beside the model's own, or the two factors of a low-rank change of each
 * (LoRA, Hu et al. 2021), with their moments.
 *
 * A low-rank change is added to the weights themselves, W = W₀ + alpha / rank · B A, after every step, and its gradients
 * are made from theirs: dB = s dW Aᵀ, dA = s Bᵀ dW. So sampling and scoring run at full speed on the very weights that
 * are saved. The price is a copy of each W₀ and one gradient dW in f32 of each target.
 */
import { checkArguments, checkArray, checkPositive, checkString, type Names } from '../arguments.js'
import { refuse } from '../errors.js'
import { add, mul } from '../ops/elementwise.js'
import { linear } from '../ops/linear.js'
import { adamW, clipGradNorm } from '../ops/optimizer.js'
import { transpose } from '../ops/rearrange.js'
import { scope, unscoped } from '../scope.js'
import type { Tensor } from '../tensor.js'
import { randomFrom } from './random.js'

/** Options of low-rank adaptation. */
export interface LoraOptions {
  /**
   * Columns of B and rows of A, at least 1.
   * @default 16
   */
  rank?: number
  /**
   * The change is alpha / rank · B A; greater than 0.
   * @default 32
   */
  alpha?: number
  /**
   * The adapted matrices, by the last parts of their names.
   * @default the language model's: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
   */
  targets?: readonly string[]
}

/** Options of AdamW and of the clipping before it. */
export interface OptimizerOptions {
  /**
   * Decay rates of the moments.
   * @default [0.9, 0.999]
   */
  betas?: readonly [number, number]
  /**
   * Added to the square root of the second moment.
   * @default 1e-8
   */
  eps?: number
  /**
   * Each parameter loses lr · weightDecay of itself a step.
   * @default 0.01
   */
  weightDecay?: number
  /**
   * The largest joint norm of the gradients; Infinity does not clip.
   * @default 1
   */
  maxGradNorm?: number
}

/** @internal */
export const loraNames: Names<LoraOptions> = { rank: true, alpha: true, targets: true }
/** @internal */
export const optimizerNames: Names<OptimizerOptions> = {
  betas: true,
  eps: true,
  weightDecay: true,
  maxGradNorm: true,
}

const defaultTargets = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']

/** @internal */
export function checkLora(lora: LoraOptions, op: string): Required<LoraOptions> {
  lora = checkArguments(lora, loraNames, op, 'lora')
  const { rank = 16, alpha = 32, targets = defaultTargets } = lora
  checkPositive(rank, 'lora.rank', op)
  if (!(typeof alpha === 'number' && alpha > 0 && Number.isFinite(alpha)))
    refuse('ERR_VALUE', op, `lora.alpha must be a number greater than 0, got ${alpha}`)
  for (const [i, target] of checkArray<string>(targets, 'lora.targets', op).entries())
    checkString(target, `lora.targets[${i}]`, op)
  return { rank, alpha, targets: [...targets] }
}

/** A parameter of the optimizer. */
interface Parameter {
  name: string
  value: Tensor<'f32'>
  moments: Tensor<'f32'>
}

/** A weight with a low-rank change. */
interface Adapted {
  weight: Tensor
  base: Tensor
  a: Parameter
  b: Parameter
}

/** A weight with its f32 master, which is the weight itself where that is f32. */
interface Mastered {
  weight: Tensor
  master: Parameter
}

/** @internal */
export interface TrainedWeightsOptions extends OptimizerOptions {
  lora?: Required<LoraOptions>
  trainable: (name: string) => boolean
  seed: number
}

/** @internal What became of an update. */
export interface Update {
  /** Of the gradients before clipping. */
  gradNorm: number
  /** Whether the weights changed: not where all gradients are 0, or one is not finite. */
  applied: boolean
}

/** @internal */
export class TrainedWeights implements Disposable {
  readonly #adapted = new Map<string, Adapted>()
  readonly #mastered = new Map<string, Mastered>()
  readonly #options: Required<OptimizerOptions>
  /** f32 [1]: alpha / rank. */
  readonly #scale: Tensor<'f32'> | undefined

  constructor(
    weights: ReadonlyMap<string, Tensor>,
    { lora, trainable, seed, ...given }: TrainedWeightsOptions,
    op: string,
  ) {
    const { betas = [0.9, 0.999], eps = 1e-8, weightDecay = 0.01, maxGradNorm = 1 } = given
    this.#options = { betas, eps, weightDecay, maxGradNorm }
    const [first] = weights.values()
    this.#scale =
      lora && first && unscoped(() => first.device.tensor([lora.alpha / lora.rank], [1]))
    unscoped(() => {
      for (const [name, weight] of weights) {
        if (!trainable(name)) continue
        if (!lora) {
          const value = weight.dtype === 'f32' ? weight : weight.cast('f32')
          this.#mastered.set(name, { weight, master: parameter(name, value) })
          continue
        }
        if (!lora.targets.some((target) => name.endsWith(`${target}.weight`))) continue
        const [outputs, inputs] = weight.shape as [number, number]
        if (weight.shape.length !== 2)
          refuse('ERR_VALUE', op, `lora.targets must be matrices, and ${name} is none`)
        const { device } = weight
        // A as torch's kaiming_uniform_ with a = √5 makes it; B is zero, so that the start is the model.
        const a = device.tensor(uniform(lora.rank * inputs, 1 / Math.sqrt(inputs), seed, name), [
          lora.rank,
          inputs,
        ])
        const b = device.zeros([outputs, lora.rank])
        this.#adapted.set(name, {
          weight,
          base: weight.to(device),
          a: parameter(`${name}.lora_A`, a),
          b: parameter(`${name}.lora_B`, b),
        })
      }
    })
    if (!this.#adapted.size && !this.#mastered.size)
      refuse('ERR_VALUE', op, 'no weight is trained: see trainable, freezeTower and lora.targets')
  }

  /** Whether the gradient of a weight is needed. */
  trains(name: string): boolean {
    return this.#adapted.has(name) || this.#mastered.has(name)
  }

  /** What the run's state holds, by name: parameters and moments. */
  state(): Record<string, Tensor> {
    const all: Record<string, Tensor> = {}
    for (const { name, value, moments } of this.#parameters()) {
      all[`value.${name}`] = value
      all[`moments.${name}`] = moments
    }
    return all
  }

  /** After the tensors of `state` were overwritten. */
  restored(): void {
    this.#write()
  }

  /** Clips the gradients and makes one step of AdamW, its `step`th from 1. */
  async update(
    gradients: Readonly<Record<string, Tensor<'f32'>>>,
    step: number,
    lr: number,
  ): Promise<Update> {
    const { maxGradNorm, betas, eps, weightDecay } = this.#options
    const { grads, norm } = scope(() => {
      const grads = this.#gradients(gradients)
      return { grads, norm: clipGradNorm({ grads, maxNorm: maxGradNorm }) }
    })
    try {
      const gradNorm = await norm.item()
      // Without a gradient AdamW would still decay the weights, and follow its first moments.
      if (gradNorm === 0 || !Number.isFinite(gradNorm)) return { gradNorm, applied: false }
      const all = this.#parameters()
      const params = all.map(({ value }) => value)
      const moments = all.map((each) => each.moments)
      adamW({ params, grads, moments, step, lr, betas, eps, weightDecay })
      this.#write()
      return { gradNorm, applied: true }
    } finally {
      norm.dispose()
      for (const gradient of grads) gradient.dispose()
    }
  }

  /** Frees everything but the model's own weights. */
  dispose(): void {
    this.#scale?.dispose()
    for (const { weight, master } of this.#mastered.values()) {
      master.moments.dispose()
      if (master.value !== weight) master.value.dispose()
    }
    for (const { base, a, b } of this.#adapted.values())
      for (const tensor of [base, a.value, a.moments, b.value, b.moments]) tensor.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  #parameters(): Parameter[] {
    return [
      ...[...this.#mastered.values()].map(({ master }) => master),
      ...[...this.#adapted.values()].flatMap(({ a, b }) => [a, b]),
    ]
  }

  /** In the order of the parameters. */
  #gradients(of: Readonly<Record<string, Tensor<'f32'>>>): Tensor<'f32'>[] {
    const own = [...this.#mastered.keys()].map((name) => of[name]!.reshape(of[name]!.shape))
    for (const [name, { a, b }] of this.#adapted) {
      const dW = mul({ x: of[name]!, y: this.#scale! })
      own.push(linear({ x: transpose({ x: b.value }), weight: transpose({ x: dW }) }))
      own.push(linear({ x: dW, weight: a.value }))
      dW.dispose()
    }
    return own
  }

  #write(): void {
    scope(() => {
      for (const { weight, master } of this.#mastered.values())
        if (master.value !== weight) weight.copyFrom(master.value.cast(weight.dtype))
      for (const { weight, base, a, b } of this.#adapted.values()) {
        const product = linear({ x: b.value, weight: transpose({ x: a.value }) })
        const change = mul({ x: product, y: this.#scale! })
        weight.copyFrom(add({ x: base.cast('f32'), y: change }).cast(weight.dtype))
      }
    })
  }
}

function parameter(name: string, value: Tensor<'f32'>): Parameter {
  return { name, value, moments: value.device.zeros([2, value.size]) }
}

/** Numbers from -bound to bound that depend on the seed and the name alone. */
function uniform(count: number, bound: number, seed: number, name: string): Float32Array {
  const random = randomFrom(`${seed} ${name}`)
  return Float32Array.from({ length: count }, () => bound * (2 * random() - 1))
}
