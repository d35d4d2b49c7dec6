import { native } from '../native.js'
import { handleOf, type Tensor, wrap } from '../tensor.js'

/**
 * One draw a row from softmax(logits / temperature). The random numbers are a function of the seed
 * and the row alone (Philox4x32-10; Salmon et al., 2011) and the arithmetic is exact, so the same
 * logits and seed give the same draws on every backend. A new step needs a new seed.
 *
 * A row with NaN or +infinity, or with nothing but -infinity, is refused: reading the result throws
 * ERR_VALUE.
 *
 * @param a.logits [N, V], f32 | f16 | bf16.
 * @param a.temperature 1 unless given; 0 takes the maximum, the first of equals.
 * @param a.seed an integer from 0 to 2^53 - 1.
 * @returns i32 [N].
 */
export function sample(a: { logits: Tensor; temperature?: number; seed: number }): Tensor<'i32'> {
  const out = native().ops.sample!(
    handleOf(a.logits, 'logits', 'sample'),
    a.temperature ?? 1,
    a.seed,
  )
  return wrap(a.logits.device, out)
}
