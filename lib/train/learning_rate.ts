import {
  checkIntegerWithin,
  checkNonNegative,
  checkPositive,
  choice,
  type Names,
} from '../arguments.js'
import { refuse } from '../errors.js'

/** How the learning rate depends on the step. */
export interface LearningRateOptions {
  /**
   * The highest learning rate, at least 0.
   * @default 1e-6, the paper's
   */
  lr?: number
  /**
   * Steps over which it rises linearly from 0; the first step has lr / warmup.
   * @default 0
   */
  warmup?: number
  /**
   * After the warm-up it is 'constant', or falls as half a 'cosine' to `least` at step `steps`.
   * @default 'constant'
   */
  decay?: 'constant' | 'cosine'
  /** Steps of the whole run, beyond which a cosine stays at `least`; needed for 'cosine', more than `warmup`. */
  steps?: number
  /**
   * The end of a cosine, as a share of lr from 0 to 1.
   * @default 0
   */
  least?: number
}

/** @internal */
export const learningRateNames: Names<LearningRateOptions> = {
  lr: true,
  warmup: true,
  decay: true,
  steps: true,
  least: true,
}

/** @internal */
export function checkLearningRate(
  options: LearningRateOptions,
  op: string,
): Required<LearningRateOptions> {
  const { lr = 1e-6, warmup = 0, steps, least = 0 } = options
  const decay = choice(options.decay ?? 'constant', ['constant', 'cosine'], 'decay', op)
  checkNonNegative(lr, 'lr', op)
  checkIntegerWithin(warmup, 0, Number.MAX_SAFE_INTEGER, 'warmup', op)
  if (steps !== undefined) checkPositive(steps, 'steps', op)
  checkNonNegative(least, 'least', op)
  if (least > 1) refuse('ERR_VALUE', op, `least must be from 0 to 1, got ${least}`)
  if (decay === 'cosine' && (steps === undefined || steps <= warmup))
    refuse('ERR_VALUE', op, `a cosine needs steps, more than warmup (${warmup}), got ${steps}`)
  return { lr, warmup, decay, steps: steps ?? 0, least }
}

/** @internal */
export function rateOf(step: number, options: Required<LearningRateOptions>): number {
  const { lr, warmup, decay, steps, least } = options
  if (step < warmup) return (lr * (step + 1)) / warmup
  if (decay === 'constant') return lr
  const share = Math.min(1, (step - warmup) / (steps - warmup))
  return lr * (least + (1 - least) * 0.5 * (1 + Math.cos(Math.PI * share)))
}
