#include "ops/advantages.h"

#include <cmath>
#include <string>

#include "binding/op.h"

namespace p2r::binding {

namespace {

Ints groups_of(Call& call, int64_t sequences) {
  Ints groups = call.ints("groups", INT32_MIN, UINT32_MAX);
  call.check(static_cast<int64_t>(groups.size()) == sequences, Code::shape,
             "groups must have one id a sequence, " + std::to_string(sequences) + ", got " +
                 std::to_string(groups.size()));
  return groups;
}

}  // namespace

Napi::Value group_advantages(Call& call) {
  GroupAdvantagesArgs a;
  a.rewards = call.in("rewards", kF32);
  const int rank = a.rewards.shape.rank;
  call.check(rank == 1 || rank == 2, Code::shape,
             "rewards must be [B] or [B, K], got " + to_string(a.rewards.shape));
  const int64_t n = a.rewards.shape[0], kinds = rank == 2 ? a.rewards.shape[1] : 1;
  a.groups = groups_of(call, n);
  a.estimator = call.choice("estimator", kEstimators);
  a.epsilon = call.number("epsilon", 0, INFINITY);
  a.singleton_zero = call.flag("singleton");
  a.scale = call.choice("scale", kRewardScales);
  call.check(a.scale == RewardScale::group || takes_scale(a.estimator), Code::value,
             "scale needs the estimator 'grpo' or 'grpo_passk'");
  a.combine = call.choice("combine", kCombines);
  call.check(rank == 1 || a.estimator == Estimator::gdpo || a.combine != Combine::separate,
             Code::shape,
             "rewards must be [B] unless the estimator is 'gdpo' or combine is given, got " +
                 to_string(a.rewards.shape));
  call.check(a.combine == Combine::separate ||
                 (rank == 2 && a.estimator != Estimator::gdpo &&
                  (a.combine == Combine::sum_then_normalize || a.estimator == Estimator::grpo)),
             Code::value,
             "combine needs rewards [B, K] and an estimator other than 'gdpo', "
             "'normalize_then_sum' the estimator 'grpo'");
  a.skip_empty = call.flag("skipEmpty");
  const bool weighted = call.given();
  if (weighted) {
    a.weights = call.numbers("weights");
    call.check(a.estimator == Estimator::gdpo || a.combine != Combine::separate, Code::value,
               "weights need the estimator 'gdpo' or combine");
    call.check(static_cast<int64_t>(a.weights.size()) == kinds, Code::shape,
               "weights must have one number a kind of reward, " + std::to_string(kinds) +
                   ", got " + std::to_string(a.weights.size()));
    for (double w : a.weights) call.check(std::isfinite(w), Code::value, "weights must be finite");
  } else {
    a.weights.assign(n ? static_cast<size_t>(kinds) : 0, 1.0);  // [0, K]: any K, in no memory
  }
  if (call.given()) {
    a.lengths = call.ints("lengths", 0, INT32_MAX);
    call.check(static_cast<int64_t>(a.lengths.size()) == n, Code::shape,
               "lengths must have one number a sequence, " + std::to_string(n) + ", got " +
                   std::to_string(a.lengths.size()));
  }
  a.mask = call.maybe_in("mask", kU8, 1);
  const bool bounded = call.given();
  if (bounded) {
    a.cu_seqlens = call.cu_seqlens("cuSeqlens", a.mask ? a.mask.shape[0] : -1);
    call.check(static_cast<int64_t>(a.cu_seqlens.size()) == n + 1, Code::shape,
               "cuSeqlens must bound as many sequences as there are rewards, " + std::to_string(n) +
                   ", got " + std::to_string(a.cu_seqlens.size() - 1));
  }
  call.check(!a.mask || bounded, Code::value, "mask needs cuSeqlens");
  const bool by_token = a.estimator == Estimator::opt_baseline;
  const int64_t tokens = bounded ? a.cu_seqlens.back() : 0;
  const auto per_token = [&](const char* name) {
    In t = call.maybe_in(name, kF32, 1);
    call.check(!t || by_token, Code::value,
               std::string(name) + " needs the estimator 'opt_baseline'");
    if (t) call.same_shape(name, t, {tokens});
    return t;
  };
  a.baselines = call.maybe_in("baselines", kF32, 1);
  if (a.baselines) call.same_shape("baselines", a.baselines, {n});
  call.check((a.estimator == Estimator::remax) == static_cast<bool>(a.baselines), Code::value,
             "the estimator 'remax', and no other, needs baselines");
  a.log_probs = per_token("logProbs");
  a.squared_probs = per_token("squaredProbs");
  a.importance_weights = per_token("importanceWeights");
  a.zero_tail = call.flag("zeroTail");
  call.check(!a.zero_tail || by_token, Code::value, "zeroTail needs the estimator 'opt_baseline'");
  call.check(!by_token || (bounded && a.log_probs && a.squared_probs), Code::value,
             "the estimator 'opt_baseline' needs logProbs, squaredProbs and cuSeqlens");
  const bool counted = a.mask || static_cast<int64_t>(a.lengths.size()) == n;
  call.check(counted || !needs_lengths(a.estimator), Code::value,
             "this estimator weights by tokens and needs lengths");
  call.check(counted || !a.skip_empty, Code::value, "skipEmpty needs lengths");
  if (!needs_lengths(a.estimator) && !a.skip_empty && !by_token) {
    a.lengths.clear();
    a.cu_seqlens.clear();
    a.mask = In{};
  }
  a.advantages = call.result(DType::f32, {by_token ? tokens : n});
  return call.run(&Kernels::group_advantages, a);
}

Napi::Value informative_groups(Call& call) {
  InformativeGroupsArgs a;
  a.rewards = call.in("rewards", kF32, 1);
  a.groups = groups_of(call, a.rewards.shape[0]);
  a.informative = call.result(DType::u8, {a.rewards.shape[0]});
  return call.run(&Kernels::informative_groups, a);
}

}  // namespace p2r::binding
