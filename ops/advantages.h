// Advantages of sampled sequences, most of them relative to a group. r is the reward of one
// sequence, the group g the sequences of one prompt, n its size, len the sequence's kept tokens:
//
//   grpo      (r - mean) / (std + epsilon), std with n-1 (Shao et al. 2024)
//   dr_grpo   r - mean (Liu et al. 2025)
//   rloo      (r - mean) n / (n - 1) (Ahmadian et al. 2024)
//   opo       r - Σ len r / Σ len  (the mean where the group has no token) (Hao et al. 2025)
//   gdpo      Σ_k weight_k grpo(r_k), then whitened over the tokens of the batch (Liu et al. 2026)
//   reinforce_pp            r, whitened over the tokens of the batch (Hu 2025)
//   reinforce_pp_baseline   r - mean, then whitened likewise
//   gpg       α (r - mean), α = B / the number of rewards that are not 0 (Chu et al. 2025)
//   grpo_passk   of the group's best: (r - the second best) / (std + epsilon); 0 for the others
//                (arXiv:2503.19595)
//   maxrl     (r - mean) / (mean + epsilon), for rewards >= 0 (Tajwar et al., arXiv:2602.02710)
//   remax     r - baseline, a reward of the greedy completion given by the caller (Li et al. 2023)
//   opt_baseline   one advantage a token, r - b_t, see below
//
// Definitions: verl/trainer/ppo/core_algos.py of volcengine/verl b178a3cd; maxrl: the same file of
// tajwarfahim/maxrl c0698ebb, whose group of one (r / epsilon) is 0 here.
//
// scale: what divides in grpo and grpo_passk. group: std + epsilon as above. batch: the std of all
// rewards of the batch (n-1; 1 for a batch of one), plus epsilon. none: nothing.
//
// combine: kinds of rewards [B, K] become one advantage. separate: gdpo only. sum_then_normalize:
// r = Σ_k weight_k r_k, then the estimator. normalize_then_sum: x = Σ_k weight_k grpo(r_k), then
// (x - mean) / (std + epsilon) over the batch (std with n-1; batches of equal x: 0). Both are TRL's
// (trl/trainer/grpo_trainer.py of huggingface/trl f2cd5771), as is the meaning of NaN with them: a
// kind that does not apply to the sequence. It is left out of sums, means and deviations; a
// sequence to which no kind applies is left out of its group and has advantage 0.
//
// opt_baseline (verl's optimal_token_baseline): with π the probability of the token and w its
// importance weight (1 unless given), W_t = Σ_{j<=t} w_j² (1 - 2 π_j + Σ_v p_jv²) over the kept
// tokens of a sequence, and at each position t of the sequences of a group, counted from their
// first token, b_t = Σ r W_t / (Σ W_t + 1e-8) over the sequences that keep a token there; 0 in a
// group of one. With zero_tail, b_t is 0 past the last kept token of every other sequence of the
// group (handle_zero_tail, verl's default at 1dda039b), where it would be r. Masked tokens have
// advantage 0.
//
// Whitening, N = Σ len over the batch: mean = Σ len a / (N + 1e-8), var = Σ len (a - mean)² /
// (N + 1e-8) · N / (N - 1), (a - mean) / √(var + 1e-8); with fewer than two tokens all
// advantages are 0. Longer sequences weigh more.
//
// A group whose rewards are all equal (max == min) has a relative part of exactly 0 (but a
// zero_tail's is r). A group of one: mean 0, std 1 (verl), or a relative part of 0 with
// singleton_zero (TRL); grpo_passk and maxrl: always 0. skip_empty: sequences without a kept token
// are left out of their group and have advantage 0.
//
// rewards f32 [B] ([B, K] as above); groups: any ids in any order; baselines f32 [B]; log_probs,
// squared_probs (Σ_v p²), importance_weights f32 [T]; advantages f32 [B], opt_baseline [T]. Means
// and variances are two-pass, f64, in the order of the batch. A reward that is not finite (but NaN
// with combine), or such a baseline, faults; its group (with whitening or a batch's statistics: the
// batch) is NaN. Lengths are host data, or counted from mask u8 [T] and cu_seqlens.
//
// informative: u8 [B], 1 where the group's rewards differ (max > min) or n == 1 (DAPO's filter, Yu
// et al. 2025); 0 in a group with a reward that is not finite, which faults.
#pragma once
#include <algorithm>
#include <tuple>
#include <vector>

#include "ops/enums.h"
#include "ops/fault.h"
#include "ops/tensor.h"

namespace p2r {

constexpr bool whitens(Estimator e) {
  return e == Estimator::gdpo || e == Estimator::reinforce_pp ||
         e == Estimator::reinforce_pp_baseline;
}
constexpr bool needs_lengths(Estimator e) { return whitens(e) || e == Estimator::opo; }
// Whether a sequence is compared with its group.
constexpr bool compares(Estimator e) {
  return e != Estimator::reinforce_pp && e != Estimator::remax;
}
constexpr bool takes_scale(Estimator e) {
  return e == Estimator::grpo || e == Estimator::grpo_passk;
}

struct GroupAdvantagesArgs {
  In rewards;
  Ints groups;
  Estimator estimator = Estimator::grpo;
  double epsilon = 1e-6;
  bool singleton_zero = false;
  RewardScale scale = RewardScale::group;
  Combine combine = Combine::separate;
  bool skip_empty = false;
  std::vector<double> weights;  // K of them
  // For estimators that need lengths, and skip_empty: the kept tokens of each sequence, or, if
  // empty, the mask in which the backend counts them, with the sequences' bounds.
  Ints lengths;
  In mask;
  Ints cu_seqlens;
  In baselines;                                     // remax
  In log_probs, squared_probs, importance_weights;  // opt_baseline; the last may be absent
  bool zero_tail = false;                           // opt_baseline
  Out advantages;
  auto fields() {
    return std::tie(rewards, groups, estimator, epsilon, singleton_zero, scale, combine, skip_empty,
                    weights, lengths, mask, cu_seqlens, baselines, log_probs, squared_probs,
                    importance_weights, zero_tail, advantages);
  }
  FaultFlag fault;
  FaultSource fault_source() const {
    return {Invalid::reward, static_cast<int64_t>(weights.size()), rewards.shape[0]};
  }
};

struct InformativeGroupsArgs {
  In rewards;
  Ints groups;
  Out informative;
  auto fields() { return std::tie(rewards, groups, informative); }
  FaultFlag fault;
  FaultSource fault_source() const { return {Invalid::reward, 1, rewards.shape[0]}; }
};

// The batch sorted by group, stably: group i owns order[starts[i]] .. order[starts[i+1]-1].
struct GroupIndex {
  std::vector<int32_t> order, starts;
  int64_t count() const { return static_cast<int64_t>(starts.size()) - 1; }
};
inline GroupIndex index_groups(const Ints& groups) {
  GroupIndex index;
  const int32_t n = static_cast<int32_t>(groups.size());
  index.order.resize(groups.size());
  for (int32_t i = 0; i < n; ++i) index.order[i] = i;
  std::stable_sort(index.order.begin(), index.order.end(),
                   [&](int32_t a, int32_t b) { return groups[a] < groups[b]; });
  for (int32_t i = 0; i < n; ++i)
    if (i == 0 || groups[index.order[i]] != groups[index.order[i - 1]]) index.starts.push_back(i);
  index.starts.push_back(n);
  return index;
}

// The statistics of a group's rewards of one kind, of the n sequences that count.
struct RewardStats {
  bool finite;
  double n, low, high, mean;  // mean: NaN unless finite
};

// The advantage of a sequence is (r - baseline) / divisor; is_zero: 0 for the whole group.
struct Baseline {
  double baseline, divisor;
  bool is_zero;
};

// baseline, std: the estimator's own over the group (opo: the weighted mean; grpo_passk: the second
// best; else the mean). batch_std, alpha: over the batch.
constexpr Baseline baseline_of(Estimator estimator, RewardScale scale, double epsilon,
                               bool singleton_zero, const RewardStats& s, double std,
                               double baseline, double batch_std, double alpha) {
  if (!s.finite) return {s.mean, 1, false};  // NaN
  if (!compares(estimator)) return {0, 1, false};
  const bool alone = s.n == 1;
  const bool zero_alone =
      singleton_zero || estimator == Estimator::grpo_passk || estimator == Estimator::maxrl;
  if (alone ? zero_alone : !(s.high > s.low)) return {0, 1, true};
  if (alone) baseline = 0;
  switch (estimator) {
    case Estimator::grpo:
    case Estimator::gdpo:
    case Estimator::grpo_passk:
      return {baseline,
              scale == RewardScale::none    ? 1
              : scale == RewardScale::batch ? batch_std + epsilon
                                            : (alone ? 1 : std) + epsilon,
              false};
    case Estimator::rloo:
      return {baseline, alone ? 1 : (s.n - 1) / s.n, false};
    case Estimator::gpg:
      return {baseline, 1 / alpha, false};
    case Estimator::maxrl:
      return {baseline, baseline + epsilon, false};
    default:
      return {baseline, 1, false};
  }
}

}  // namespace p2r
