import { checkArguments, checkFunction } from './arguments.js'
import { refuse } from './errors.js'
import { add } from './ops/elementwise.js'
import { linear, linearBackward } from './ops/linear.js'
import { transpose } from './ops/rearrange.js'
import { gatherRowsBackward, scatterAddRows } from './ops/rows.js'
import { holds } from './scope.js'
import { handleOf, type Tensor } from './tensor.js'

/** Which gradients a backward pass makes. */
export interface TrainableOption {
  /**
   * Whether the gradient of a weight is wanted, by its name. What only the others need is neither kept nor computed.
   * @default all
   */
  trainable?: (name: string) => boolean
}

/** Whether activations are kept for the backward pass, or computed again. */
export interface CheckpointOption {
  /**
   * 'none' keeps the activations of all blocks; 'block' keeps each block's input alone, and computes the block again in
   * the backward pass, to the same bits.
   * @default 'none'
   */
  checkpoint?: Checkpoint
}

/** See `CheckpointOption`. */
export type Checkpoint = 'none' | 'block'

export const checkpoints: readonly Checkpoint[] = ['none', 'block']

/** A linear layer's backward: what it was computed of, and the gradient of its result. */
interface LinearStep {
  dOut: Tensor
  x: Tensor
  weight: Tensor
  bias?: Tensor | undefined
}

/** `trainable` as a function that gives a boolean, which is asked once for each name. */
export function trainableOf(
  names: Iterable<string>,
  trainable: ((name: string) => boolean) | undefined,
  op: string,
): ReadonlySet<string> {
  if (trainable === undefined) return new Set(names)
  checkFunction(trainable, 'trainable', op)
  const chosen = new Set<string>()
  for (const name of names) if (trainable(name)) chosen.add(name)
  return chosen
}

/** The gradients of weights by name, f32: each the sum of all that is added to it. */
export class Gradients {
  readonly #trained: ReadonlySet<string>
  readonly #prefix: string
  readonly #sums: Map<string, Tensor<'f32'>>
  /** Of these, the sums are in the caller's tensors. */
  readonly #given: ReadonlySet<string>

  private constructor(
    trained: ReadonlySet<string>,
    prefix: string,
    sums: Map<string, Tensor<'f32'>>,
    given: ReadonlySet<string>,
  ) {
    this.#trained = trained
    this.#prefix = prefix
    this.#sums = sums
    this.#given = given
    Object.defineProperty(this, holds, { value: () => sums.values() })
  }

  /** `into` is checked against the weights; those that are not trained are left alone. */
  static of(
    weights: ReadonlyMap<string, Tensor>,
    trained: ReadonlySet<string>,
    into: Readonly<Record<string, Tensor>> | undefined,
    op: string,
  ): Gradients {
    const sums = new Map<string, Tensor<'f32'>>()
    if (into !== undefined) {
      const names = Object.fromEntries([...weights.keys()].map((name) => [name, true as const]))
      for (const [name, tensor] of Object.entries(checkArguments(into, names, op, 'into'))) {
        handleOf(tensor, `into['${name}']`, op)
        const weight = weights.get(name)!
        if (tensor.dtype !== 'f32')
          refuse('ERR_DTYPE', op, `into['${name}'] must be f32, got ${tensor.dtype}`)
        if (tensor.device !== weight.device)
          refuse('ERR_DEVICE', op, `into['${name}'] must be on the device of the weights`)
        if (String(tensor.shape) !== String(weight.shape))
          refuse(
            'ERR_SHAPE',
            op,
            `into['${name}'] must be [${weight.shape.join(', ')}], got [${tensor.shape.join(', ')}]`,
          )
        if (trained.has(name)) sums.set(name, tensor.reshape(tensor.shape))
      }
    }
    return new Gradients(trained, '', sums, new Set(sums.keys()))
  }

  /** The same gradients, of names that begin so. */
  under(prefix: string): Gradients {
    return new Gradients(this.#trained, this.#prefix + prefix, this.#sums, this.#given)
  }

  wants(name: string): boolean {
    return this.#trained.has(this.#prefix + name)
  }

  /** What has been added so far; undefined before the first. */
  sum(name: string): Tensor<'f32'> | undefined {
    return this.#sums.get(this.#prefix + name)
  }

  /** Adds to the gradient of a weight, if it is wanted. */
  add(name: string, gradient: Tensor<'f32'>): void {
    if (!this.wants(name)) return
    const sum = this.sum(name)
    if (sum) sum.copyFrom(add({ x: sum, y: gradient }))
    else this.#sums.set(this.#prefix + name, gradient)
  }

  /** Adds rows to those of a weight's gradient at indices. */
  addRows(name: string, gradient: Tensor<'f32'>, index: Int32Array, rows: number): void {
    if (!this.wants(name)) return
    const sum = this.sum(name)
    const made = sum
      ? scatterAddRows({ x: sum, y: gradient, index })
      : gatherRowsBackward({ dOut: gradient, index, rows })
    if (sum && this.#given.has(this.#prefix + name)) {
      sum.copyFrom(made)
      return
    }
    sum?.dispose()
    this.#sums.set(this.#prefix + name, made)
  }

  /** Adds the gradients of a linear layer's weight and bias, and returns that of its x. */
  linear(name: string, { dOut, x, weight, bias }: LinearStep): Tensor {
    const names = { weight: `${name}.weight`, bias: `${name}.bias` }
    const step = { dOut, x, weight, ...(bias && this.wants(names.bias) && { bias }) }
    if (!this.wants(names.weight)) {
      if (!step.bias) return linear({ x: dOut, weight: transpose({ x: weight }) })
      const { dX, dBias } = linearBackward(step)
      this.add(names.bias, dBias!)
      return dX
    }
    const sum = this.sum(names.weight)
    if (!sum) {
      const { dX, dWeight, dBias } = linearBackward(step)
      this.add(names.weight, dWeight)
      if (dBias) this.add(names.bias, dBias)
      return dX
    }
    const flat = sum.shape.length === 2 ? sum : sum.reshape(weight.shape)
    if (!step.bias) return linearBackward({ ...step, into: { dWeight: flat } }).dX
    if (!this.sum(names.bias)) this.add(names.bias, x.device.zeros(bias!.shape))
    const into = { dWeight: flat, dBias: this.sum(names.bias)! }
    return linearBackward({ ...step, into }).dX
  }

  /** As `linear`, of two weights that are the halves of one; neither has a sum yet. */
  halves(names: readonly [string, string], step: Omit<LinearStep, 'bias'>): Tensor {
    if (!names.some((name) => this.wants(name)))
      return linear({ x: step.dOut, weight: transpose({ x: step.weight }) })
    const { dX, dWeight } = linearBackward(step)
    const rows = dWeight.shape[0]! / 2
    for (const [i, name] of names.entries()) this.add(name, dWeight.slice(i * rows, (i + 1) * rows))
    return dX
  }

  /** All that are wanted, by the weights' names and in their shapes; zeros where nothing was added. */
  all(weights: ReadonlyMap<string, Tensor>): Record<string, Tensor<'f32'>> {
    const all: Record<string, Tensor<'f32'>> = {}
    for (const [name, { shape, device }] of weights) {
      if (!this.#trained.has(name)) continue
      const sum = this.#sums.get(name)
      if (!sum) all[name] = device.zeros(shape)
      else all[name] = sum.shape.length === shape.length ? sum : sum.reshape(shape)
    }
    return all
  }
}
