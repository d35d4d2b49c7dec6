#include "ops/rollout_correction.h"

#include <cmath>
#include <limits>
#include <string>

#include "binding/op.h"

namespace p2r::binding {

// Rules come as one list of numbers, four a rule: measure, over, low and high, infinite for none.
Napi::Value rollout_correction(Call& call) {
  RolloutCorrectionArgs a;
  a.log_probs = call.in("logProbs", kF32, 1);
  const int64_t tokens = a.log_probs.shape[0];
  a.rollout_log_probs = call.in("rolloutLogProbs", kF32, 1);
  call.same_shape("rolloutLogProbs", a.rollout_log_probs, {tokens});
  a.cu_seqlens = call.cu_seqlens("cuSeqlens", tokens);
  a.mask = call.maybe_in("mask", kU8, 1);
  if (a.mask) call.same_shape("mask", a.mask, {tokens});
  a.level = call.choice("level", kRatioLevels);
  a.mode = call.choice("mode", kRatioModes);
  a.high = call.number("high", 1e-30, INFINITY);
  a.low = call.number("low", 0, a.high);
  a.normalize = call.flag("normalize");
  const std::vector<double> rules = call.numbers("reject");
  call.check(rules.size() <= 4 * kMaxRejections, Code::value,
             "reject must have at most " + std::to_string(kMaxRejections) + " rules, got " +
                 std::to_string(rules.size() / 4));
  for (size_t i = 0; i + 3 < rules.size(); i += 4) {
    a.measures.push_back(static_cast<int64_t>(rules[i]));
    a.overs.push_back(static_cast<int64_t>(rules[i + 1]));
    a.lows.push_back(rules[i + 2]);
    a.highs.push_back(rules[i + 3]);
    call.check(rules[i + 2] <= rules[i + 3], Code::value,
               "reject must have low <= high in every rule");
  }
  a.advantages = call.maybe_in("advantages", kF32, 1);
  const int64_t sequences = static_cast<int64_t>(a.cu_seqlens.size()) - 1;
  if (a.advantages) call.same_shape("advantages", a.advantages, {sequences});
  a.masks_off_policy = call.given();
  if (a.masks_off_policy) a.max_divergence = call.number("maxDivergence", 0, INFINITY);
  call.check(!a.masks_off_policy || a.advantages || sequences == 0, Code::value,
             "maxDivergence needs advantages");
  a.importance_weights = call.result(DType::f32, {tokens});
  a.kept = call.result(DType::u8, {tokens});
  a.metrics = call.result(DType::f32, {kRolloutMetrics});
  return call.run(&Kernels::rollout_correction, a);
}

}  // namespace p2r::binding
