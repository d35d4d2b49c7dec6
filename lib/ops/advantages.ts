import { checkArguments, choice, hostInts, hostNumbers, type Names } from '../arguments.js'
import { native } from '../native.js'
import { handleOf, type Ints, maybeHandle, type Tensor, wrap } from '../tensor.js'

export const estimators = [
  'grpo',
  'dr_grpo',
  'rloo',
  'opo',
  'gdpo',
  'reinforce_pp_baseline',
] as const
/**
 * How rewards become advantages, with n the size of a group. 'grpo': (r - mean) / (std + epsilon) (Shao et al.
 * 2024); 'dr_grpo': r - mean (Liu et al. 2025); 'rloo': (r - mean) n / (n - 1) (Ahmadian et al. 2024); 'opo': r - the mean
 * weighted by length (Hao et al. 2025); 'gdpo': the sum of each kind's 'grpo', whitened over the tokens of the
 * batch (Liu et al. 2026); 'reinforce_pp_baseline': r - mean, whitened (Hu et al. 2025). The names are verl's.
 */
export type AdvantageEstimator = (typeof estimators)[number]

/** How the rewards of a group become advantages. */
export interface AdvantageOptions {
  /**
   * The formula.
   *
   * @default 'grpo'
   */
  estimator?: AdvantageEstimator
  /**
   * Added to the standard deviation; at least 0. TRL has 1e-4.
   *
   * @default 1e-6 (verl's)
   */
  epsilon?: number
  /**
   * What a group of one gets: its 'reward' (as verl), divided by 1 + epsilon for 'grpo' and 'gdpo', or 'zero'
   * (as TRL).
   *
   * @default 'reward'
   */
  singleton?: 'reward' | 'zero'
  /**
   * Of the K kinds of rewards, for 'gdpo'.
   *
   * @default 1 each
   */
  weights?: readonly number[]
}

/** The arguments of `groupAdvantages`. */
export interface GroupAdvantagesArgs extends AdvantageOptions {
  /** f32 [B], or [B, K] of K kinds for 'gdpo'; finite. */
  rewards: Tensor<'f32'>
  /** A group id for each of the B sequences: any integers in any order, groups of any size. */
  groups: Ints
  /** Kept tokens of each sequence: needed by 'opo', 'gdpo' and 'reinforce_pp_baseline'. */
  lengths?: Ints
}

const names: Names<GroupAdvantagesArgs> = {
  rewards: true,
  groups: true,
  estimator: true,
  epsilon: true,
  singleton: true,
  weights: true,
  lengths: true,
}

/**
 * One advantage a sequence, relative to its group: see `AdvantageEstimator`.
 *
 * A group of equal rewards has a group-relative part of exactly 0. With fewer than two tokens in the
 * batch whitening gives 0. A reward that is not finite makes its group NaN (whitening: the batch) and
 * the wait throw ERR_VALUE.
 *
 * @returns f32 [B].
 * @throws P2RError ERR_SHAPE, ERR_DTYPE for rewards that do not fit; ERR_VALUE for the rest and, where the
 *   result is read, for a reward that is not finite; ERR_DISPOSED.
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
  checkArguments(a, names, op)
  return advantagesAs(op, a)
}

/** @internal For composites: under their name, and with lengths that may be counted from a mask. Unknown fields are ignored. */
export function advantagesAs(
  op: string,
  a: GroupAdvantagesArgs & { counted?: { mask: Tensor<'u8'>; cuSeqlens: Ints } | undefined },
): Tensor<'f32'> {
  const out = native().ops.group_advantages!(
    handleOf(a.rewards, 'rewards', op),
    hostInts(a.groups, 'groups', op),
    a.estimator ?? 'grpo',
    a.epsilon ?? 1e-6,
    choice(a.singleton ?? 'reward', ['reward', 'zero'], 'singleton', op) === 'zero',
    a.weights === undefined ? null : hostNumbers(a.weights, 'weights', op),
    a.lengths === undefined ? null : hostInts(a.lengths, 'lengths', op),
    maybeHandle(a.counted?.mask, 'mask', op),
    a.counted && hostInts(a.counted.cuSeqlens, 'cuSeqlens', op),
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
  checkArguments(a, informativeNames, op)
  const out = native().ops.informative_groups!(
    handleOf(a.rewards, 'rewards', op),
    hostInts(a.groups, 'groups', op),
  )
  return wrap(a.rewards.device, out)
}
