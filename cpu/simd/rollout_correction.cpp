// The ratios of one run of tokens between trainer and rollout engine: one read of the inputs.
#include <math.h>

#include "cpu/simd/arguments.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/tokens.h"
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

namespace {

constexpr int kPartial = 512;  // tokens whose terms are summed in f32

// Sums over tokens: what a sequence's ratio and the rules are made of in f64; the rest, for the
// metrics alone, in f32 for kPartial tokens; counts as integers.
struct RolloutTotals {
  vd_half log_ratio = {}, rules[kMaxRejections] = {};
  vf largest[kMaxRejections];
  vi kept = {}, cut = {}, rejected = {}, wrong = {};
};
struct RolloutPartials {
  vf sums[kRolloutSums] = {};
};

inline vf measured(DivergenceMeasure measure, vf d, vf ratio) {
  switch (measure) {
    case DivergenceMeasure::k1:
      return -d;
    case DivergenceMeasure::k2:
      return 0.5f * d * d;
    case DivergenceMeasure::k3:
      return expm1_minus_x(d, ratio);
    default:
      return ratio;
  }
}

inline void add_tokens(const RolloutRun& run, int64_t i, int n, RolloutTotals& total,
                       RolloutPartials& partial) {
  const vf none = {};
  const vi mark = load_marks(run.mask ? run.mask + i : nullptr, n);
  const vi keep = mark != 0;
  total.wrong |= mark > 1;
  const vf trainer = load_floats(run.log_probs + i, n);
  const vf rollout = load_floats(run.rollout_log_probs + i, n);
  const vf step = trainer - rollout, d = clamp(step, -20, 20), ratio = vexp(d);
  add_to(&total.log_ratio, keep ? step : none);
  partial.sums[kRolloutTrainer] += keep ? trainer : none;
  partial.sums[kRolloutRollout] += keep ? rollout : none;
  partial.sums[kRolloutK3] += keep ? expm1_minus_x(d, ratio) : none;
  partial.sums[kRolloutSquare] += keep ? ratio * ratio : none;
  count(keep, total.kept);

  vi passes = keep;
  for (int r = 0; r < run.rule_count; ++r) {
    const Rejection& rule = run.rules[r];
    const vf x = measured(rule.measure, d, ratio);
    if (rule.over == RejectOver::token)
      passes &= (x >= rule.low) & (x <= rule.high);
    else if (rule.over == RejectOver::max)
      total.largest[r] = keep & ~(x <= total.largest[r]) & (total.largest[r] == total.largest[r])
                             ? x
                             : total.largest[r];
    else
      add_to(&total.rules[r], keep ? x : none);
  }
  count(keep & ~passes, total.rejected);

  if (run.level == RatioLevel::token) {
    const vi above = ratio > run.high;
    const vi outside = run.mode == RatioMode::none       ? keep & 0
                       : run.mode == RatioMode::truncate ? above
                                                         : above | (ratio < run.low);
    const vf weight = outside ? set1(run.mode == RatioMode::truncate ? run.high : 0.0f) : ratio;
    partial.sums[kRolloutWeight] += keep ? weight : none;
    partial.sums[kRolloutWeightSquare] += keep ? weight * weight : none;
    count(keep & outside, total.cut);
    store_floats(run.weights + i, passes ? weight : none, n);
  }
  const vb kept = __builtin_convertvector(passes & 1, vb);
  memcpy(run.kept + i, &kept, n);
}

inline double sum(vi counts) {
  double total = 0;
  for (int lane = 0; lane < W; ++lane) total += counts[lane];
  return total;
}

}  // namespace

bool rollout_run(const RolloutRun* pointer, double* sums) {
  const RolloutRun run = *pointer;  // a copy, which stores to the results cannot alias
  RolloutTotals total;
  for (vf& largest : total.largest) largest = set1(-INFINITY);
  vd_half metrics[kRolloutSums] = {};
  for (int64_t begin = 0; begin < run.n; begin += kPartial) {
    const int64_t end = run.n - begin < kPartial ? run.n : begin + kPartial;
    RolloutPartials partial;
    int64_t i = begin;
    for (; i + W <= end; i += W) add_tokens(run, i, W, total, partial);
    if (i < end) add_tokens(run, i, (int)(end - i), total, partial);
    for (int k : {kRolloutTrainer, kRolloutRollout, kRolloutK3, kRolloutSquare, kRolloutWeight,
                  kRolloutWeightSquare})
      add_to(&metrics[k], partial.sums[k]);
  }
  for (int k = 0; k < kRolloutSums; ++k) sums[k] = sum(metrics[k]);
  sums[kRolloutLogRatio] = sum(total.log_ratio);
  sums[kRolloutKept] = sum(total.kept);
  sums[kRolloutCut] = sum(total.cut);
  sums[kRolloutRejected] = sum(total.rejected);
  for (int r = 0; r < run.rule_count; ++r) {
    double& result = sums[kRolloutSums + r];
    result = sum(total.rules[r]);
    if (run.rules[r].over != RejectOver::max) continue;
    result = -INFINITY;
    for (int lane = 0; lane < W; ++lane)
      if (result == result && !(total.largest[r][lane] <= result)) result = total.largest[r][lane];
  }
  return sum(total.wrong) == 0;
}

}  // namespace p2r::cpu::P2R_ISA
