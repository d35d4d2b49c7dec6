import { checkArguments, checkArray, describeValue, type Names } from '../arguments.js'
import type { Device } from '../device.js'
import type { FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import { native } from '../native.js'
import { type Held, handleOf, held, maybeHandle, type Tensor, wrap } from '../tensor.js'

/** Logits and the tokens whose probability is wanted. */
export interface TokenLogits<D extends FloatDType = FloatDType> {
  /** [N, V], f32 | f16 | bf16. */
  logits: Tensor<D>
  /**
   * i32 [N], from 0 to V - 1; -100 skips its row, which then costs nothing and gives 0. Any other value makes
   * its row NaN and the wait throw ERR_VALUE.
   */
  targets: Tensor<'i32'>
  /**
   * Divides the logits; greater than 0.
   *
   * @default 1
   */
  temperature?: number
}

/** Whether entropies are computed. */
export interface EntropyOption {
  /**
   * Whether the entropy of each row, in nats, is a result too.
   *
   * @default false
   */
  entropy?: boolean
}

/** Which further result of each row a call gives: one of the two. */
export interface RowResultOptions extends EntropyOption {
  /**
   * Whether Σ p², the sum of the squares of each row's distribution, is a result too: what the advantage
   * estimator 'opt_baseline' takes. With entropy too it is ERR_VALUE: each takes a call of its own.
   *
   * @default false
   */
  squaredProbs?: boolean
}

/** The arguments of `tokenLogProbs`. */
export interface TokenLogProbsArgs<D extends FloatDType = FloatDType>
  extends TokenLogits<D>,
    RowResultOptions {}

/** The results of `tokenLogProbs`, `mergeLogProbs` and `linearLogProbs`. */
export interface TokenLogProbsResult {
  /** f32 [N]: log softmax(logits / temperature) at each row's target, in nats. */
  logProbs: Tensor<'f32'>
  /** f32 [N, 2], for the backward pass: the maximum of logits / temperature, and log Σ exp(x - maximum). */
  stats: Tensor<'f32'>
}

/** A further result where the entropy was requested. */
export interface RowEntropy {
  /** f32 [N], in nats. */
  entropy: Tensor<'f32'>
}

/** A further result where the squared probabilities were requested. */
export interface RowSquaredProbs {
  /** f32 [N]: Σ p² of each row's distribution. */
  squaredProbs: Tensor<'f32'>
}

const rowNames: Names<TokenLogits & EntropyOption> = {
  logits: true,
  targets: true,
  temperature: true,
  entropy: true,
}
const names: Names<TokenLogProbsArgs> = { ...rowNames, squaredProbs: true }

/**
 * log softmax(logits / temperature) at the target of each row. The logits are read once and nothing
 * of their size is made. The same row gives the same bits in any batch.
 *
 * A row with NaN or +inf, or of -inf alone, is NaN; single logits of -inf are fine.
 *
 * @returns logProbs and stats; entropy or squaredProbs exactly if it is requested.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for the options and, where a
 *   result is read, for a target outside the vocabulary; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { openDevice, tokenLogProbs } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const logits = device.tensor([0, 0, 0, Math.log(3)], [2, 2])
 * const targets = device.tensor(Int32Array.of(0, 1), [2])
 * const { logProbs, entropy } = tokenLogProbs({ logits, targets, entropy: true })
 * console.log(await logProbs.read(), await entropy.read()) // about -0.693, -0.288 and 0.693, 0.562
 * device.dispose()
 * ```
 */
export function tokenLogProbs(
  a: TokenLogProbsArgs & { entropy: true; squaredProbs?: false },
): Held<TokenLogProbsResult & RowEntropy>
export function tokenLogProbs(
  a: TokenLogProbsArgs & { entropy?: false; squaredProbs: true },
): Held<TokenLogProbsResult & RowSquaredProbs>
export function tokenLogProbs(
  a: TokenLogProbsArgs & { entropy?: false; squaredProbs?: false },
): Held<TokenLogProbsResult>
export function tokenLogProbs(
  a: TokenLogProbsArgs,
): Held<TokenLogProbsResult & Partial<RowEntropy & RowSquaredProbs>>
export function tokenLogProbs(
  a: TokenLogProbsArgs,
): Held<TokenLogProbsResult & Partial<RowEntropy & RowSquaredProbs>> {
  const op = 'tokenLogProbs'
  a = checkArguments(a, names, op)
  const results = native().ops.token_log_probs!(
    handleOf(a.logits, 'logits', op),
    handleOf(a.targets, 'targets', op),
    a.temperature ?? 1,
    a.entropy ?? false,
    a.squaredProbs ?? false,
  )
  return logProbResults(results, a.logits.device, a.squaredProbs)
}

/** @internal The addon's results of a forward pass; what was requested beside log-probabilities comes last. */
export function logProbResults(
  results: unknown,
  device: Device,
  squared = false,
): Held<TokenLogProbsResult & Partial<RowEntropy & RowSquaredProbs>> {
  const [logProbs, stats, further] = results as unknown[]
  return held({
    logProbs: wrap<'f32'>(device, logProbs),
    stats: wrap<'f32'>(device, stats),
    ...(further ? { [squared ? 'squaredProbs' : 'entropy']: wrap<'f32'>(device, further) } : {}),
  })
}

/** The arguments of `tokenLogProbsShard`. */
export interface TokenLogProbsShardArgs<D extends FloatDType = FloatDType> extends EntropyOption {
  /** [N, V'], f32 | f16 | bf16: this shard's columns of the vocabulary. */
  logits: Tensor<D>
  /**
   * i32 [N]: indices into the whole vocabulary; -100 skips its row. A shard does not know where the
   * vocabulary ends, so only other negative ones are refused.
   */
  targets: Tensor<'i32'>
  /** The vocabulary's index of the first column. */
  vocabOffset: number
  /**
   * Divides the logits; greater than 0.
   *
   * @default 1
   */
  temperature?: number
}

/** One shard's part of the log-probabilities: three floats a row, four with the entropy. */
export interface LogProbsShard {
  /** f32 [N, 2]: the shard's maximum of logits / temperature, and log Σ exp(x - maximum). */
  stats: Tensor<'f32'>
  /** f32 [N]: the target's logit / temperature, -inf where another shard holds it. */
  targetLogit: Tensor<'f32'>
  /** f32 [N], where the entropy is requested: Σ exp(x - maximum) (x - maximum). */
  moment?: Tensor<'f32'>
}

const shardNames: Names<TokenLogProbsShardArgs> = { ...rowNames, vocabOffset: true }

/**
 * The part that one shard of the vocabulary, columns vocabOffset and following, has in
 * tokenLogProbs. mergeLogProbs joins the parts.
 *
 * @returns the shard's part; with `moment` exactly if the entropy is requested.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for the numbers and, where a
 *   result is read, for a negative target; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { mergeLogProbs, openDevice, tokenLogProbsShard } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const targets = device.tensor(Int32Array.of(3), [1]) // in the second half of a vocabulary of 4
 * const shards = [0, 2].map((vocabOffset) =>
 *   tokenLogProbsShard({ logits: device.zeros([1, 2]), targets, vocabOffset }),
 * )
 * console.log(await mergeLogProbs(shards).logProbs.read()) // about -1.386
 * device.dispose()
 * ```
 */
export function tokenLogProbsShard(
  a: TokenLogProbsShardArgs & { entropy: true },
): Held<Required<LogProbsShard>>
export function tokenLogProbsShard(
  a: TokenLogProbsShardArgs & { entropy?: false },
): Held<Omit<LogProbsShard, 'moment'>>
export function tokenLogProbsShard(a: TokenLogProbsShardArgs): Held<LogProbsShard>
export function tokenLogProbsShard(a: TokenLogProbsShardArgs): Held<LogProbsShard> {
  const op = 'tokenLogProbsShard'
  a = checkArguments(a, shardNames, op)
  const [stats, targetLogit, moment] = native().ops.token_log_probs_shard!(
    handleOf(a.logits, 'logits', op),
    handleOf(a.targets, 'targets', op),
    a.vocabOffset,
    a.temperature ?? 1,
    a.entropy ?? false,
  ) as unknown[]
  const { device } = a.logits
  return held({
    stats: wrap<'f32'>(device, stats),
    targetLogit: wrap<'f32'>(device, targetLogit),
    ...(moment ? { moment: wrap<'f32'>(device, moment) } : {}),
  })
}

// A shard is a result of tokenLogProbsShard, so `dispose` is no unknown name; it is not enumerable there.
const partNames: Names<LogProbsShard> = { stats: true, targetLogit: true, moment: true }

/**
 * Joins the shards of a vocabulary, in the order given: the results of tokenLogProbs. A target that
 * no shard holds has log-probability -inf.
 *
 * @param shards at least one; their moments from all or none of them.
 * @returns logProbs and stats; entropy exactly if the shards have moments.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for parts that do not fit; ERR_VALUE; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { mergeLogProbs, openDevice, tokenLogProbsShard } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const targets = device.tensor(Int32Array.of(0), [1])
 * const logits = device.zeros([1, 2]) // of each half of a vocabulary of 4
 * const shards = [0, 2].map((vocabOffset) =>
 *   tokenLogProbsShard({ logits, targets, vocabOffset, entropy: true }),
 * )
 * console.log(await mergeLogProbs(shards).entropy.read()) // about 1.386
 * device.dispose()
 * ```
 */
export function mergeLogProbs(
  shards: readonly Required<LogProbsShard>[],
): Held<TokenLogProbsResult & RowEntropy>
export function mergeLogProbs(
  shards: readonly (LogProbsShard & { moment?: never })[],
): Held<TokenLogProbsResult>
export function mergeLogProbs(
  shards: readonly LogProbsShard[],
): Held<TokenLogProbsResult & Partial<RowEntropy>>
export function mergeLogProbs(
  shards: readonly LogProbsShard[],
): Held<TokenLogProbsResult & Partial<RowEntropy>> {
  const op = 'mergeLogProbs'
  if (!Array.isArray(shards) || !shards.length)
    refuse('ERR_VALUE', op, `shards must be a list of at least one, got ${describeValue(shards)}`)
  const parts = checkArray(shards, 'shards', op).map((shard: LogProbsShard, i) =>
    checkArguments(shard, partNames, op, `shards[${i}]`),
  )
  const withEntropy = parts.some((s) => s.moment !== undefined)
  const results = native().ops.merge_log_probs!(
    parts.map((s, i) => handleOf(s.stats, `shards[${i}].stats`, op)),
    parts.map((s, i) => handleOf(s.targetLogit, `shards[${i}].targetLogit`, op)),
    withEntropy ? parts.map((s, i) => handleOf(s.moment, `shards[${i}].moment`, op)) : [],
  )
  return logProbResults(results, parts[0]!.stats.device)
}

/** The gradients that a backward pass of log-probabilities takes. */
export type RowGradients = {
  /** f32 [N, 2]: as the forward pass (or, for a shard, mergeLogProbs) returned them. */
  stats: Tensor<'f32'>
  /** f32 [N]: the gradient with respect to logProbs. */
  dLogProbs: Tensor<'f32'>
} & (
  | {
      /** f32 [N], as the forward pass returned it; together with dEntropy. */
      entropy: Tensor<'f32'>
      /** f32 [N]: the gradient with respect to the entropy. */
      dEntropy: Tensor<'f32'>
    }
  | {
      /** Together with dEntropy. */
      entropy?: never
      /** Together with entropy. */
      dEntropy?: never
    }
)

/** The arguments of `tokenLogProbsBackward`. */
export type TokenLogProbsBackwardArgs<D extends FloatDType = FloatDType> = TokenLogits<D> &
  RowGradients & {
    /**
     * The vocabulary's index of the first column. When given, the logits are a shard, and a target past its
     * columns is another shard's.
     *
     * @default the logits are the whole vocabulary
     */
    vocabOffset?: number
    /**
     * Writes the gradient over `logits`, of which the result is then a new handle; nothing is allocated.
     *
     * @default false
     */
    inPlace?: boolean
  }

const backwardNames: Names<TokenLogProbsBackwardArgs> = {
  ...shardNames,
  stats: true,
  dLogProbs: true,
  dEntropy: true,
  inPlace: true,
}

/**
 * The gradient of `tokenLogProbs` with respect to the logits. Rows whose target is -100, or whose gradients
 * are 0, get 0 and are not read.
 *
 * @returns as the logits in shape and type.
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for the numbers and, where the
 *   result is read, for a target outside the vocabulary; ERR_DEVICE; ERR_DISPOSED.
 * @example
 * ```js
 * import { openDevice, tokenLogProbs, tokenLogProbsBackward } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const logits = device.zeros([1, 2])
 * const targets = device.tensor(Int32Array.of(1), [1])
 * const { stats } = tokenLogProbs({ logits, targets })
 * const dLogProbs = device.tensor([1], [1])
 * console.log(await tokenLogProbsBackward({ logits, targets, stats, dLogProbs }).read()) // about -0.5, 0.5
 * device.dispose()
 * ```
 */
export function tokenLogProbsBackward<D extends FloatDType>(
  a: TokenLogProbsBackwardArgs<D>,
): Tensor<D> {
  const op = 'tokenLogProbsBackward'
  a = checkArguments(a, backwardNames, op)
  const inPlace = a.inPlace ?? false
  const out = native().ops.token_log_probs_backward!(
    inPlace,
    handleOf(a.logits, 'logits', op),
    handleOf(a.targets, 'targets', op),
    handleOf(a.stats, 'stats', op),
    handleOf(a.dLogProbs, 'dLogProbs', op),
    maybeHandle(a.entropy, 'entropy', op),
    maybeHandle(a.dEntropy, 'dEntropy', op),
    a.temperature ?? 1,
    a.vocabOffset,
  )
  return inPlace ? a.logits.reshape(a.logits.shape) : wrap(a.logits.device, out)
}
