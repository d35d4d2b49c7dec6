import { checkArguments, checkArray, hostInts, hostNumbers, type Names } from '../arguments.js'
import type { FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import { native } from '../native.js'
import { type Held, handleOf, held, type Ints, type Tensor, wrap } from '../tensor.js'

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
  a = checkArguments(a, names, op)
  const out = native().ops.sample!(handleOf(a.logits, 'logits', op), a.temperature ?? 1, a.seed)
  return wrap(a.logits.device, out)
}

/** One number for all rows, or a list of one for each row. */
export type PerRow = number | ArrayLike<number>

/** The arguments of `sampleTokens`. */
export interface SampleTokensArgs {
  /** [N, V], f32 | f16 | bf16. -infinity is never drawn. */
  logits: Tensor<FloatDType>
  /** One for each row: integers from 0 to 2^53 - 1. A row needs a new one for every step. */
  seeds: Ints
  /**
   * Divides the logits, at least 0; 0 takes the maximum, the first of equals.
   *
   * @default 1
   */
  temperature?: PerRow
  /**
   * Keeps the k largest logits, and all that equal the k-th. 0, or more than V, keeps all.
   *
   * @default 0
   */
  topK?: PerRow
  /**
   * From 0 to 1: keeps the smallest set of the most probable tokens whose probabilities add up to it, at least one.
   * Of equal ones the first stay.
   *
   * @default 1
   */
  topP?: PerRow
  /**
   * From 0 to 1: keeps the tokens that are at least so probable, relative to the most probable one.
   *
   * @default 0
   */
  minP?: PerRow
  /**
   * Above 0: logits of tokens of the history are divided by it where they are at least 0, else multiplied.
   *
   * @default 1
   */
  repetitionPenalty?: PerRow
  /**
   * For each row the tokens that `repetitionPenalty` applies to, once each however often they are listed.
   *
   * @default none
   */
  history?: readonly Ints[]
}

/** The results of `sampleTokens`. */
export interface SampleTokensResult {
  /** i32 [N]. */
  tokens: Tensor<'i32'>
  /**
   * f32 [N]: log-probabilities under softmax(logits / temperature) of all logits, without penalty and filters: the
   * old log-probabilities of a policy loss at that temperature. At temperature 0 those at temperature 1.
   */
  logProbs: Tensor<'f32'>
  /** f32 [N]: log-probabilities under what was drawn from; 0 at temperature 0. */
  logProbsFiltered: Tensor<'f32'>
}

const tokensNames: Names<SampleTokensArgs> = {
  logits: true,
  seeds: true,
  temperature: true,
  topK: true,
  topP: true,
  minP: true,
  repetitionPenalty: true,
  history: true,
}

function perRow(
  value: PerRow | undefined,
  ifMissing: number,
  rows: number,
  name: string,
  op: string,
): Float64Array {
  const setting = value ?? ifMissing
  return typeof setting === 'number'
    ? new Float64Array(rows).fill(setting)
    : hostNumbers(setting, name, op)
}

/** Where each row's tokens begin, and all of them in a row. */
function joined(
  history: readonly Ints[] | undefined,
  rows: number,
  vocabulary: number,
  op: string,
): [offsets: Float64Array, tokens: Float64Array] {
  if (history === undefined) return [new Float64Array(rows + 1), new Float64Array(0)]
  const lists = checkArray(history, 'history', op, 'an array with the tokens of each row').map(
    (list, r) => {
      const tokens = hostInts(list, `history[${r}]`, op)
      tokens.forEach((token, k) => {
        if (!Number.isInteger(token) || token < 0 || token >= vocabulary)
          refuse(
            'ERR_VALUE',
            op,
            `history[${r}][${k}] must be a token from 0 to ${vocabulary - 1}, got ${token}`,
          )
      })
      return tokens
    },
  )
  const offsets = new Float64Array(lists.length + 1)
  lists.forEach((tokens, r) => {
    offsets[r + 1] = offsets[r]! + tokens.length
  })
  const all = new Float64Array(offsets.at(-1)!)
  lists.forEach((tokens, r) => {
    all.set(tokens, offsets[r])
  })
  return [offsets, all]
}

/**
 * One token a row, with its log-probabilities, from softmax(logits / temperature) after the filters, which are
 * applied as Hugging Face's generation does: repetition penalty, temperature, top-k, top-p, min-p, each to what is
 * left. A row's results depend on its own logits, seed, settings and history alone, bit for bit, and not on the
 * other rows; the tokens are the same on every backend. Random numbers are Philox4x32-10 (Salmon et al., 2011) of
 * the row's seed.
 *
 * @returns tokens and log-probabilities. A row with NaN or +infinity, or with nothing but -infinity, gives -1 and
 *   NaN, and reading throws.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for logits that do not fit; ERR_VALUE for settings out of range or lists
 *   that do not have one entry for each row, and where a result of invalid logits is read; ERR_DISPOSED.
 * @example
 * ```js
 * import { openDevice, sampleTokens } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const logits = device.tensor([0, 5, 0, 1, 2, 9], [2, 3])
 * const { tokens, logProbs } = sampleTokens({ logits, seeds: [7, 8], topK: 1 })
 * console.log(await tokens.read()) // Int32Array(2) [ 1, 2 ]
 * console.log(await logProbs.read()) // about -0.0134, -0.0012
 * device.dispose()
 * ```
 */
export function sampleTokens(a: SampleTokensArgs): Held<SampleTokensResult> {
  const op = 'sampleTokens'
  a = checkArguments(a, tokensNames, op)
  const logits = handleOf(a.logits, 'logits', op)
  const seeds = hostInts(a.seeds, 'seeds', op)
  const [rows, vocabulary] = [seeds.length, a.logits.shape[1] ?? 0]
  const [tokens, logProbs, logProbsFiltered] = native().ops.sample_tokens!(
    logits,
    seeds,
    perRow(a.temperature, 1, rows, 'temperature', op),
    perRow(a.topK, 0, rows, 'topK', op),
    perRow(a.topP, 1, rows, 'topP', op),
    perRow(a.minP, 0, rows, 'minP', op),
    perRow(a.repetitionPenalty, 1, rows, 'repetitionPenalty', op),
    ...joined(a.history, rows, vocabulary, op),
  ) as unknown[]
  const { device } = a.logits
  return held({
    tokens: wrap<'i32'>(device, tokens),
    logProbs: wrap<'f32'>(device, logProbs),
    logProbsFiltered: wrap<'f32'>(device, logProbsFiltered),
  })
}
