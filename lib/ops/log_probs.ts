import { describeValue } from '../arguments.js'
import type { Device } from '../device.js'
import { refuse } from '../errors.js'
import { native } from '../native.js'
import { type Held, handleOf, held, maybeHandle, type Tensor, wrap } from '../tensor.js'

/** One shard's part of the log-probabilities: three floats a row, four with the entropy. */
export interface LogProbsShard {
  /** f32 [N, 2]: the shard's maximum of logits / temperature, and log Σ exp(x - maximum). */
  stats: Tensor
  /** f32 [N]: the target's logit / temperature, -inf where another shard holds it. */
  targetLogit: Tensor
  /** f32 [N]: Σ exp(x - maximum) (x - maximum), for the entropy. */
  moment?: Tensor
}

/**
 * log softmax(logits / temperature) at the target of each row. The logits are read once and nothing
 * of their size is made. The same row gives the same bits in any batch.
 *
 * A target of -100 skips its row, which costs nothing and gives 0. Any other target outside the
 * vocabulary makes its row NaN and the wait throw ERR_VALUE. A row with NaN or +inf, or of -inf alone, is
 * NaN; single logits of -inf are fine.
 *
 * @param a.logits [N, V], f32 | f16 | bf16.
 * @param a.targets i32 [N].
 * @param a.temperature divides the logits; 1 unless given.
 * @param a.entropy whether to return the entropy of each row, in nats, too.
 * @returns logProbs and entropy f32 [N]; stats f32 [N, 2]: the row's maximum of logits / temperature,
 * and the log of the sum of exp(x - maximum), for the backward pass.
 */
export function tokenLogProbs(a: {
  logits: Tensor
  targets: Tensor
  temperature?: number
  entropy?: boolean
}): Held<{ logProbs: Tensor; stats: Tensor; entropy?: Tensor }> {
  const op = 'tokenLogProbs'
  const results = native().ops.token_log_probs!(
    handleOf(a.logits, 'logits', op),
    handleOf(a.targets, 'targets', op),
    a.temperature ?? 1,
    a.entropy ?? false,
  )
  return logProbResults(results, a.logits.device)
}

/** @internal The addon's results of a forward pass; the entropy where it was requested. */
export function logProbResults(
  results: unknown,
  device: Device,
): Held<{ logProbs: Tensor; stats: Tensor; entropy?: Tensor }> {
  const [logProbs, stats, entropy] = results as unknown[]
  return held({
    logProbs: wrap(device, logProbs),
    stats: wrap(device, stats),
    ...(entropy ? { entropy: wrap(device, entropy) } : {}),
  })
}

/**
 * The part that one shard of the vocabulary, columns vocabOffset and following, has in
 * tokenLogProbs. mergeLogProbs joins the parts. Targets stay indices into the whole vocabulary; a shard
 * does not know where that ends, so only negative ones other than -100 are refused.
 *
 * @param a.logits [N, V'], f32 | f16 | bf16: this shard's columns.
 * @param a.targets i32 [N].
 */
export function tokenLogProbsShard(a: {
  logits: Tensor
  targets: Tensor
  vocabOffset: number
  temperature?: number
  entropy?: boolean
}): Held<LogProbsShard> {
  const op = 'tokenLogProbsShard'
  const [stats, targetLogit, moment] = native().ops.token_log_probs_shard!(
    handleOf(a.logits, 'logits', op),
    handleOf(a.targets, 'targets', op),
    a.vocabOffset,
    a.temperature ?? 1,
    a.entropy ?? false,
  ) as unknown[]
  const { device } = a.logits
  return held({
    stats: wrap(device, stats),
    targetLogit: wrap(device, targetLogit),
    ...(moment ? { moment: wrap(device, moment) } : {}),
  })
}

/**
 * Joins the shards of a vocabulary, in the order given: the results of tokenLogProbs. A target that
 * no shard holds has log-probability -inf.
 */
export function mergeLogProbs(
  shards: readonly LogProbsShard[],
): Held<{ logProbs: Tensor; stats: Tensor; entropy?: Tensor }> {
  const op = 'mergeLogProbs'
  if (!Array.isArray(shards) || !shards.length)
    refuse('ERR_VALUE', op, `shards must be a list of at least one, got ${describeValue(shards)}`)
  const withEntropy = shards.some((s) => s?.moment !== undefined)
  const results = native().ops.merge_log_probs!(
    shards.map((s: LogProbsShard, i) => handleOf(s?.stats, `shards[${i}].stats`, op)),
    shards.map((s: LogProbsShard, i) => handleOf(s?.targetLogit, `shards[${i}].targetLogit`, op)),
    withEntropy
      ? shards.map((s: LogProbsShard, i) => handleOf(s.moment, `shards[${i}].moment`, op))
      : [],
  )
  return logProbResults(results, shards[0]!.stats.device)
}

export interface LogProbsBackward {
  /** As given to tokenLogProbs. */
  logits: Tensor
  targets: Tensor
  temperature?: number
  /** As tokenLogProbs or, for a shard, mergeLogProbs returned them. */
  stats: Tensor
  /** f32 [N]: the gradient with respect to logProbs. */
  dLogProbs: Tensor
  /** f32 [N], together: the entropy and the gradient with respect to it. */
  entropy?: Tensor
  dEntropy?: Tensor
  /**
   * The first vocabulary index of `logits`. When given, the logits are a shard, and a target past
   * its columns is another shard's; otherwise they are the whole vocabulary, and it is a fault.
   */
  vocabOffset?: number
  /** Writes the gradient over `logits` and returns it. Default false. */
  inPlace?: boolean
}

/**
 * The gradient with respect to the logits, as they are in shape and type. Rows whose target is -100,
 * or whose gradients are 0, get 0 and are not read. With inPlace the logits' memory is overwritten, and
 * the result is a handle of its own to it; nothing else is allocated.
 */
export function tokenLogProbsBackward(a: LogProbsBackward): Tensor {
  const op = 'tokenLogProbsBackward'
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
