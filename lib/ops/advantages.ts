import { choice, hostInts, hostNumbers } from '../arguments.js'
import { native } from '../native.js'
import { handleOf, type Ints, maybeHandle, type Tensor, wrap } from '../tensor.js'

export type AdvantageEstimator =
  | 'grpo'
  | 'dr_grpo'
  | 'rloo'
  | 'opo'
  | 'gdpo'
  | 'reinforce_pp_baseline'

export interface GroupAdvantages {
  /** f32 [B], or [B, K] of K kinds for 'gdpo'. */
  rewards: Tensor
  /** A group id a sequence: any ids in any order, groups of any size. */
  groups: Ints
  estimator?: AdvantageEstimator
  /** Added to the standard deviation: 1e-6 (verl) unless given; TRL has 1e-4. */
  epsilon?: number
  /** What a group of one gets: its 'reward' (verl), by 1 + epsilon for 'grpo' and 'gdpo', or 'zero' (TRL). */
  singleton?: 'reward' | 'zero'
  /** Of the K kinds of rewards, for 'gdpo'; 1 each unless given. */
  weights?: readonly number[]
  /** Kept tokens of each sequence: for 'opo', 'gdpo' and 'reinforce_pp_baseline'. */
  lengths?: Ints
}

/**
 * One advantage a sequence, relative to its group, f32 [B]. 'grpo': (r - mean) / (std + epsilon);
 * 'dr_grpo': r - mean; 'rloo': (r - mean) n / (n - 1); 'opo': r - the mean weighted by length; 'gdpo': the sum of each
 * kind's 'grpo', whitened over the tokens of the batch; 'reinforce_pp_baseline': r - mean, whitened.
 *
 * A group of equal rewards has a group-relative part of exactly 0. With fewer than two tokens in the
 * batch whitening gives 0. A reward that is not finite makes its group NaN (whitening: the batch) and
 * the wait throw ERR_VALUE.
 */
export function groupAdvantages(a: GroupAdvantages): Tensor {
  return advantagesAs('groupAdvantages', a)
}

/** @internal For composites: under their name, and with lengths that may be counted from a mask. */
export function advantagesAs(
  op: string,
  a: GroupAdvantages & { counted?: { mask: Tensor; cuSeqlens: Ints } | undefined },
): Tensor {
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

/**
 * u8 [B]: 1 for each sequence of a group that still teaches, because its rewards differ or it is
 * alone. The filter of DAPO's dynamic sampling (Yu et al. 2025). Rewards must be finite.
 */
export function informativeGroups(a: { rewards: Tensor; groups: Ints }): Tensor {
  const op = 'informativeGroups'
  const out = native().ops.informative_groups!(
    handleOf(a.rewards, 'rewards', op),
    hostInts(a.groups, 'groups', op),
  )
  return wrap(a.rewards.device, out)
}
