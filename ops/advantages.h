// Advantages relative to a group (GRPO, Shao et al. 2024, and kin), as verl defines them. r is the
// reward of one sequence, the group g the sequences of one prompt, n its size, len the sequence's
// kept tokens:
//
//   grpo      (r - mean) / (std + epsilon), std with n-1
//   dr_grpo   r - mean
//   rloo      (r - mean) n / (n - 1)
//   opo       r - Σ len r / Σ len  (the mean where the group has no token)
//   gdpo      Σ_k weight_k grpo(r_k), then whitened over the tokens of the batch
//   reinforce_pp_baseline   r - mean, then whitened likewise
//
// Whitening, N = Σ len over the batch: mean = Σ len a / (N + 1e-8), var = Σ len (a - mean)² /
// (N + 1e-8) · N / (N - 1), (a - mean) / √(var + 1e-8); with fewer than two tokens all
// advantages are 0. Longer sequences weigh more.
//
// A group whose rewards are all equal (max == min) has a relative part of exactly 0. A group of
// one: mean 0, std 1 (verl), or a relative part of 0 with singleton_zero (TRL).
//
// rewards f32 [B] ([B, K] for gdpo); groups: any ids in any order; advantages f32 [B]. Means and
// variances are two-pass, f64, in the order of the batch. A reward that is not finite faults; its
// group (with whitening: the batch) is NaN. Lengths are host data, or counted from mask u8 [T] and
// cu_seqlens.
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
  return e == Estimator::gdpo || e == Estimator::reinforce_pp_baseline;
}
constexpr bool needs_lengths(Estimator e) { return whitens(e) || e == Estimator::opo; }

struct GroupAdvantagesArgs {
  In rewards;
  Ints groups;
  Estimator estimator = Estimator::grpo;
  double epsilon = 1e-6;
  bool singleton_zero = false;
  std::vector<double> weights;  // K of them
  // For estimators that need lengths: the kept tokens of each sequence, or, if empty, the mask in
  // which the backend counts them, with the sequences' bounds.
  Ints lengths;
  In mask;
  Ints cu_seqlens;
  Out advantages;
  auto fields() {
    return std::tie(rewards, groups, estimator, epsilon, singleton_zero, weights, lengths, mask,
                    cu_seqlens, advantages);
  }
  FaultFlag fault;
  FaultSource fault_source() const {
    return {Invalid::reward, static_cast<int64_t>(weights.size())};
  }
};

struct InformativeGroupsArgs {
  In rewards;
  Ints groups;
  Out informative;
  auto fields() { return std::tie(rewards, groups, informative); }
  FaultFlag fault;
  FaultSource fault_source() const { return {Invalid::reward, 1}; }
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

}  // namespace p2r
