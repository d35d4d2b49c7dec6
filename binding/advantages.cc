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
  call.check(
      rank == 1 || a.estimator == Estimator::gdpo, Code::shape,
      "rewards must be [B] unless the estimator is 'gdpo', got " + to_string(a.rewards.shape));
  a.epsilon = call.number("epsilon", 0, INFINITY);
  a.singleton_zero = call.flag("singleton");
  const bool weighted = call.given();
  if (weighted) {
    a.weights = call.numbers("weights");
    call.check(a.estimator == Estimator::gdpo, Code::value, "weights need the estimator 'gdpo'");
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
  const bool counted = call.given();
  if (counted) {
    a.mask = call.in("mask", kU8, 1);
    a.cu_seqlens = call.cu_seqlens("cuSeqlens", a.mask.shape[0]);
    call.check(static_cast<int64_t>(a.cu_seqlens.size()) == n + 1, Code::shape,
               "cuSeqlens must bound as many sequences as there are rewards, " + std::to_string(n) +
                   ", got " + std::to_string(a.cu_seqlens.size() - 1));
  }
  call.check(!needs_lengths(a.estimator) || counted || static_cast<int64_t>(a.lengths.size()) == n,
             Code::value, "this estimator weights by tokens and needs lengths");
  if (!needs_lengths(a.estimator)) {
    a.lengths.clear();
    a.cu_seqlens.clear();
    a.mask = In{};
  }
  a.advantages = call.result(DType::f32, {n});
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
