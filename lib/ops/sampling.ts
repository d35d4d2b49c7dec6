import { checkArguments, type Names } from '../arguments.js'
import type { FloatDType } from '../dtype.js'
import { native } from '../native.js'
import { handleOf, type Tensor, wrap } from '../tensor.js'

/** The arguments of `sample`. */
export interface SampleArgs {
  /** [N, V], f32 | f16 | bf16. -infinity is never drawn. */
  logits: Tensor<FloatDType>
  /**
   * Divides the logits, at least 0; 0 takes the maximum, the first of equals.
   *
   * @default 1
   */
  temperature?: number
  /** An integer from 0 to 2^53 - 1; every step needs a new one. */
  seed: number
}

const names: Names<SampleArgs> = { logits: true, temperature: true, seed: true }

/**
 * One draw a row from softmax(logits / temperature). The random numbers are a function of the seed
 * and the row alone (Philox4x32-10; Salmon et al., 2011) and the arithmetic is exact, so the same
 * logits and seed give the same draws on every backend.
 *
 * @returns i32 [N]. A row with NaN or +infinity, or with nothing but -infinity, gives -1, and reading throws.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for logits that do not fit; ERR_VALUE, where the result is read too;
 *   ERR_DISPOSED.
 * @example
 * ```js
 * import { openDevice, sample } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const logits = device.tensor([0, 5, 0, 1, 2, 9], [2, 3])
 * console.log(await sample({ logits, temperature: 0, seed: 1 }).read()) // Int32Array(2) [ 1, 2 ]
 * device.dispose()
 * ```
 */
export function sample(a: SampleArgs): Tensor<'i32'> {
  const op = 'sample'
  checkArguments(a, names, op)
  const out = native().ops.sample!(handleOf(a.logits, 'logits', op), a.temperature ?? 1, a.seed)
  return wrap(a.logits.device, out)
}
