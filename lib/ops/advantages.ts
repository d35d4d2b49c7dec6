import {
  checkArguments,
  checkBoolean,
  choice,
  hostInts,
  hostNumbers,
  type Names,
} from '../arguments.js'
import { native } from '../native.js'
import { handleOf, type Ints, maybeHandle, type Tensor, wrap } from '../tensor.js'

/**
 * How rewards become advantages, with n the size of a group. 'grpo': (r - mean) / (std + epsilon) (Shao et al.
 * 2024); 'dr_grpo': r - mean (Liu et al. 2025); 'rloo': (r - mean) n / (n - 1) (Ahmadian et al. 2024); 'opo': r - the mean
 * weighted by length (Hao et al. 2025); 'gdpo': the sum of each kind's 'grpo', whitened over the tokens of the
 * batch (Liu et al. 2026); 'reinforce_pp': r, whitened (Hu 2025); 'reinforce_pp_baseline': r - mean, whitened (Hu et al.
 * 2025); 'gpg': r - mean, times B over the number of rewards that are not 0 (Chu et al. 2025); 'grpo_passk': of the
 * group's best, (r - second best) / (std + epsilon), 0 for the others (arXiv:2503.19595); 'maxrl':
 * (r - mean) / (mean + epsilon), for rewards of at least 0 (Tajwar et al. 2026); 'remax': r - baseline (Li et al.
 * 2023); 'opt_baseline': r - the mean of the group's rewards at each position, weighted by what their tokens so far
 * add to the gradient's variance (verl's optimal_token_baseline). 'grpo_vectorized' and 'rloo_vectorized' are verl's
 * names for the same functions; the latter's `singleton` is 'zero'. The names are verl's.
 */
export type AdvantageEstimator =
  | 'grpo'
  | 'grpo_vectorized'
  | 'dr_grpo'
  | 'rloo'
  | 'rloo_vectorized'
  | 'opo'
  | 'gdpo'
  | 'reinforce_pp'
  | 'reinforce_pp_baseline'
  | 'gpg'
  | 'grpo_passk'
  | 'maxrl'
  | 'remax'
  | 'opt_baseline'

/** How the rewards of a group become advantages. */
export interface AdvantageOptions {
  /**
   * The formula.
   *
   * @default 'grpo'
   */
  estimator?: AdvantageEstimator
  /**
   * Added to the standard deviation, for 'maxrl' to the mean; at least 0. TRL has 1e-4.
   *
   * @default 1e-6 (verl's)
   */
  epsilon?: number
  /**
   * What a group of one gets: its 'reward' (as verl), divided by 1 + epsilon for 'grpo' and 'gdpo', or 'zero'
   * (as TRL). 'grpo_passk' and 'maxrl' always give 0.
   *
   * @default 'reward'; 'zero' for 'rloo_vectorized'
   */
  singleton?: 'reward' | 'zero'
  /**
   * What divides in 'grpo' and 'grpo_passk': the standard deviation of the 'group', that of all rewards of the
   * 'batch', or nothing ('none'). TRL's scale_rewards.
   *
   * @default 'group'
   */
  scale?: 'group' | 'batch' | 'none'
  /**
   * How rewards [B, K] of K kinds become one advantage without 'gdpo', as in TRL: their weighted sum is
   * given to the estimator, or each kind's 'grpo' is summed and the sums are normalized over the batch.
   * NaN then says that a kind does not apply to the sequence.
   *
   * @default rewards are [B], or the estimator is 'gdpo'
   */
  combine?: 'sum_then_normalize' | 'normalize_then_sum'
  /**
   * Of the K kinds of rewards, for 'gdpo' and `combine`.
   *
   * @default 1 each
   */
  weights?: readonly number[]
  /**
   * Leaves sequences without a kept token out of their group, with advantage 0. Needs lengths, or mask and
   * cuSeqlens.
   *
   * @default false
   */
  skipEmpty?: boolean
  /** f32 [B], for 'remax' alone: the reward of each prompt's greedy completion; finite. */
  baselines?: Tensor<'f32'>
  /** f32 [T], for 'opt_baseline' alone: Σ p² of each token's distribution, a result of `tokenLogProbs` and `linearLogProbs`. */
  squaredProbs?: Tensor<'f32'>
  /**
   * For 'opt_baseline' alone: whether the baseline is 0 where one sequence of a group goes on after all others have
   * ended; it is the sequence's own reward otherwise. verl's handle_zero_tail, which it has on by default.
   *
   * @default false
   */
  zeroTail?: boolean
}

/** The arguments of `groupAdvantages`. */
export interface GroupAdvantagesArgs extends AdvantageOptions {
  /** f32 [B], or [B, K] of K kinds for 'gdpo' and `combine`; finite, but for the NaN of `combine`. */
  rewards: Tensor<'f32'>
  /** A group id for each of the B sequences: any integers in any order, groups of any size. */
  groups: Ints
  /**
   * Kept tokens of each sequence: needed by 'opo', 'gdpo', 'reinforce_pp', 'reinforce_pp_baseline' and skipEmpty,
   * unless a mask is given.
   */
  lengths?: Ints
  /** u8 [T], with cuSeqlens in place of lengths: 1 keeps a token, 0 drops it, and the kept are counted on the device. */
  mask?: Tensor<'u8'>
  /** Where the B sequences begin and end in [T]: with a mask, and for 'opt_baseline'. */
  cuSeqlens?: Ints
  /** f32 [T], for 'opt_baseline' alone: log-probabilities of the sampled tokens. */
  logProbs?: Tensor<'f32'>
  /**
   * f32 [T], for 'opt_baseline' alone: the tokens' importance weights.
   *
   * @default 1 each
   */
  importanceWeights?: Tensor<'f32'>
}

/** @internal */
export const advantageOptionNames: Names<AdvantageOptions> = {
  estimator: true,
  epsilon: true,
  singleton: true,
  scale: true,
  combine: true,
  weights: true,
  skipEmpty: true,
  baselines: true,
  squaredProbs: true,
  zeroTail: true,
}
const names: Names<GroupAdvantagesArgs> = {
  ...advantageOptionNames,
  rewards: true,
  groups: true,
  lengths: true,
  mask: true,
  cuSeqlens: true,
  logProbs: true,
  importanceWeights: true,
}

/**
 * One advantage a sequence, most of them relative to its group: see `AdvantageEstimator`. For 'opt_baseline' it is one
 * a token.
 *
 * A group of equal rewards has a group-relative part of exactly 0. With fewer than two tokens in the
 * batch whitening gives 0. A reward that is not finite makes its group NaN (with a batch's statistics: the
 * batch) and the wait throw ERR_VALUE.
 *
 * @returns f32 [B]; for 'opt_baseline' f32 [T].
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for tensors that do not fit; ERR_VALUE for the rest and, where the
 *   result is read, for a reward or baseline that is not finite, or a mask value other than 0 and 1; ERR_DISPOSED.
 * @example
 * ```js
 * import { groupAdvantages, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const rewards = device.tensor([1, 0, 1, 1], [4])
 * console.log(await groupAdvantages({ rewards, groups: [7, 7, 8, 8] }).read()) // about 0.707, -0.707, 0, 0
 * device.dispose()
 * ```
 */
export function groupAdvantages(a: GroupAdvantagesArgs): Tensor<'f32'> {
  const op = 'groupAdvantages'
  a = checkArguments(a, names, op)
  return advantagesAs(op, a)
}

/** @internal For composites, under their name. Unknown fields are ignored. */
export function advantagesAs(op: string, a: GroupAdvantagesArgs): Tensor<'f32'> {
  const singleton = a.singleton ?? (a.estimator === 'rloo_vectorized' ? 'zero' : 'reward')
  const combines = ['sum_then_normalize', 'normalize_then_sum'] as const
  const out = native().ops.group_advantages!(
    handleOf(a.rewards, 'rewards', op),
    hostInts(a.groups, 'groups', op),
    a.estimator ?? 'grpo',
    a.epsilon ?? 1e-6,
    choice(singleton, ['reward', 'zero'], 'singleton', op) === 'zero',
    a.scale ?? 'group',
    a.combine === undefined ? 'separate' : choice(a.combine, combines, 'combine', op),
    checkBoolean(a.skipEmpty ?? false, 'skipEmpty', op),
    a.weights === undefined ? null : hostNumbers(a.weights, 'weights', op),
    a.lengths === undefined ? null : hostInts(a.lengths, 'lengths', op),
    maybeHandle(a.mask, 'mask', op),
    a.cuSeqlens === undefined ? null : hostInts(a.cuSeqlens, 'cuSeqlens', op),
    maybeHandle(a.baselines, 'baselines', op),
    maybeHandle(a.logProbs, 'logProbs', op),
    maybeHandle(a.squaredProbs, 'squaredProbs', op),
    maybeHandle(a.importanceWeights, 'importanceWeights', op),
    checkBoolean(a.zeroTail ?? false, 'zeroTail', op),
  )
  return wrap(a.rewards.device, out)
}

/** The arguments of `informativeGroups`. */
export interface InformativeGroupsArgs {
  /** f32 [B]; finite. */
  rewards: Tensor<'f32'>
  /** A group id for each of the B sequences: any integers in any order. */
  groups: Ints
}

const informativeNames: Names<InformativeGroupsArgs> = { rewards: true, groups: true }

/**
 * 1 for each sequence of a group that still teaches, because its rewards differ or it is alone. The filter of
 * DAPO's dynamic sampling (Yu et al. 2025).
 *
 * @returns u8 [B].
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for rewards that do not fit; ERR_VALUE for groups and, where the result
 *   is read, for a reward that is not finite; ERR_DISPOSED.
 * @example
 * ```js
 * import { informativeGroups, openDevice } from 'p2r-kernels'
 *
 * const device = openDevice('cpu')
 * const rewards = device.tensor([1, 0, 1, 1], [4])
 * console.log(await informativeGroups({ rewards, groups: [7, 7, 8, 8] }).read()) // Uint8Array(4) [ 1, 1, 0, 0 ]
 * device.dispose()
 * ```
 */
export function informativeGroups(a: InformativeGroupsArgs): Tensor<'u8'> {
  const op = 'informativeGroups'
  a = checkArguments(a, informativeNames, op)
  const out = native().ops.informative_groups!(
    handleOf(a.rewards, 'rewards', op),
    hostInts(a.groups, 'groups', op),
  )
  return wrap(a.rewards.device, out)
}
