// Importance weights between the policy as the trainer computes it and as the rollout engine
// sampled from it, and rejection of what is too far apart. Both differ by precision, by kernels and
// by staleness, so that an "on-policy" batch is not.
//
// For a token t kept by the mask, l = logp - rollout, d = clamp(l, ±20), and its ratio r:
//
//   token e^d    sequence e^clamp(Σ l, ±20)    geometric e^clamp(mean l, ±20)
//
// over the kept tokens of its sequence. Its weight:
//
//   truncate  min(r, high)  (TIS)      mask  r where low <= r <= high, else 0  (MIS; IcePop)
//   none  r
//
// normalize divides by the mean of the weights over kept tokens (level token) or over sequences
// with a kept token, if that is above 1e-8. A token that the given or the returned mask drops has
// weight 0; the mean is over those that the given one keeps.
//
// Rules of rejection, each of which a kept token must pass. A measure of d:
//
//   k1 -d    k2 d²/2    k3 e^d - 1 - d    ratio e^d
//
// of the token, or its sum, mean or maximum over the sequence, must be within [low, high]; else the
// token, or the sequence, is dropped from the mask. A NaN is within nothing. Off-policy sequence
// masking (DeepSeek-V3.2): a sequence of negative advantage whose mean of -l exceeds max_divergence
// is dropped likewise.
//
// Source: verl/trainer/ppo/rollout_corr_helper.py of volcengine/verl b178a3cd, whose sequence rules
// are these (its bounds of k1 are given as ratios: low = log lower, high = log upper), and
// trl/trainer/grpo_trainer.py of huggingface/trl f2cd5771 (get_off_policy_mask, and the weights,
// which are not clamped and are 1 at masked tokens there).
//
// log_probs, rollout_log_probs f32 [T], packed by cu_seqlens; mask u8 [T]; advantages f32 [B];
// importance_weights f32 [T]; kept u8 [T]; metrics f32 [kRolloutMetrics], over the tokens that the
// given mask keeps: (Σ w)² / (N Σ w²) of the weights before normalization, the effective share of
// the sample (verl clamps them to [1 / high, high] first); χ², the mean of e^(2d) less 1, and the
// mean over sequences of e^(2 clamp(Σ l, ±20)) less 1; means of -l and of e^d - 1 - d; means over
// sequences of e^(-mean logp) and e^(-mean rollout); the shares of tokens whose weight the mode
// changed, and that were rejected; the mean weight. Nothing kept: all 0. A mask value other than 0
// and 1 faults; it counts as 1.
//
// A token's terms are f32, sums f64 (on the CPU, those for the metrics alone f32 in runs of some
// hundred tokens), in fixed order: runs of kLossRun tokens within each sequence, then the runs in
// order. Each input is read once; a second pass over the results alone applies what only a whole
// sequence or batch decides.
#pragma once
#include <limits>
#include <tuple>
#include <vector>

#include "ops/enums.h"
#include "ops/fault.h"
#include "ops/policy_loss.h"
#include "ops/tensor.h"

namespace p2r {

constexpr int kRolloutMetrics = 10;

struct RolloutCorrectionArgs {
  In log_probs, rollout_log_probs, mask, advantages;
  Ints cu_seqlens;
  RatioLevel level = RatioLevel::token;
  RatioMode mode = RatioMode::truncate;
  double low = 0, high = 2;
  bool normalize = false;
  // A rule each, at most kMaxRejections.
  Ints measures, overs;
  std::vector<double> lows, highs;
  bool masks_off_policy = false;
  double max_divergence = 0;
  Out importance_weights, kept, metrics;
  auto fields() {
    return std::tie(log_probs, rollout_log_probs, mask, advantages, cu_seqlens, level, mode, low,
                    high, normalize, measures, overs, lows, highs, masks_off_policy, max_divergence,
                    importance_weights, kept, metrics);
  }
  FaultFlag fault;
  FaultSource fault_source() const { return {}; }  // the mask alone can be at fault
};

// The rules as kernels take them.
struct Rejections {
  Rejection rules[kMaxRejections];
  int count;
};
inline Rejections rejections_of(const RolloutCorrectionArgs& a) {
  Rejections r = {};
  r.count = static_cast<int>(a.measures.size());
  for (int i = 0; i < r.count; ++i)
    r.rules[i] = {static_cast<DivergenceMeasure>(a.measures[i]),
                  static_cast<RejectOver>(a.overs[i]), static_cast<float>(a.lows[i]),
                  static_cast<float>(a.highs[i])};
  return r;
}

constexpr int kRolloutRunSums = kRolloutSums + kMaxRejections;  // with the rules' reductions

// Reductions of a rule's measure.
constexpr double reduction_of_none(RejectOver over) {
  return over == RejectOver::max ? -std::numeric_limits<double>::infinity() : 0;
}
constexpr double reduced(RejectOver over, double a, double b) {
  if (over != RejectOver::max) return a + b;
  return a != a || b <= a ? a : b;  // NaN stays
}

// Adds a run's sums to its sequence's, which start as those of no run.
constexpr void add_rollout_sums(const Rejections& rejections, const double* run, double* sums) {
  for (int k = 0; k < kRolloutSums; ++k) sums[k] += run[k];
  for (int i = 0; i < rejections.count; ++i)
    sums[kRolloutSums + i] =
        reduced(rejections.rules[i].over, sums[kRolloutSums + i], run[kRolloutSums + i]);
}
constexpr void clear_rollout_sums(const Rejections& rejections, double* sums) {
  for (int k = 0; k < kRolloutSums; ++k) sums[k] = 0;
  for (int i = 0; i < rejections.count; ++i)
    sums[kRolloutSums + i] = reduction_of_none(rejections.rules[i].over);
}

// The logarithm of a sequence's ratio. NaN stays.
constexpr double rollout_log_ratio(RatioLevel level, const double* sums) {
  const double x = level == RatioLevel::geometric ? sums[kRolloutLogRatio] / sums[kRolloutKept]
                                                  : sums[kRolloutLogRatio];
  return x > 20 ? 20 : x < -20 ? -20 : x;
}

// Whether a sequence with kept tokens is dropped.
constexpr bool rollout_rejects(const Rejections& rejections, const double* sums,
                               bool masks_off_policy, double max_divergence, double advantage) {
  const double kept = sums[kRolloutKept];
  for (int i = 0; i < rejections.count; ++i) {
    const Rejection& rule = rejections.rules[i];
    if (rule.over == RejectOver::token) continue;
    const double x =
        rule.over == RejectOver::mean ? sums[kRolloutSums + i] / kept : sums[kRolloutSums + i];
    if (!(x >= rule.low && x <= rule.high)) return true;
  }
  return masks_off_policy && advantage < 0 && -sums[kRolloutLogRatio] / kept > max_divergence;
}

// A weight from a ratio, and whether the mode changed it. NaN stays.
struct RolloutWeight {
  double weight;
  bool cut;
};
constexpr RolloutWeight rollout_weight(RatioMode mode, double ratio, double low, double high) {
  if (mode == RatioMode::truncate) return {ratio > high ? high : ratio, ratio > high};
  const bool outside = mode == RatioMode::mask && (ratio > high || ratio < low);
  return {outside ? 0 : ratio, outside};
}

// What a sequence decides for its tokens.
struct RolloutSequence {
  double weight;  // of levels sequence and geometric
  bool rejected;
};

// Totals of the batch, to which the sequences with kept tokens are added.
enum RolloutTotal : uint8_t {
  kTotalTokens,
  kTotalSequences,
  kTotalLogRatio,
  kTotalK3,
  kTotalSquare,
  kTotalSequenceSquare,
  kTotalTrainerPerplexity,
  kTotalRolloutPerplexity,
  kTotalWeight,
  kTotalWeightSquare,
  kTotalCut,
  kTotalRejected,
  kTotalSequenceWeight,
  kRolloutTotals
};
// The exponentials that add_rollout_sequence needs of a sequence's sums.
struct RolloutExponentials {
  double ratio;   // e^rollout_log_ratio
  double square;  // of the product of the ratios
  double trainer_perplexity, rollout_perplexity;
};
constexpr RolloutSequence add_rollout_sequence(RatioLevel level, RatioMode mode, double low,
                                               double high, bool rejected, const double* sums,
                                               const RolloutExponentials& e, double* totals) {
  const double kept = sums[kRolloutKept];
  const RolloutWeight w = rollout_weight(mode, e.ratio, low, high);
  const bool by_token = level == RatioLevel::token;
  totals[kTotalTokens] += kept;
  totals[kTotalSequences] += 1;
  totals[kTotalLogRatio] += sums[kRolloutLogRatio];
  totals[kTotalK3] += sums[kRolloutK3];
  totals[kTotalSquare] += sums[kRolloutSquare];
  totals[kTotalSequenceSquare] += e.square;
  totals[kTotalTrainerPerplexity] += e.trainer_perplexity;
  totals[kTotalRolloutPerplexity] += e.rollout_perplexity;
  totals[kTotalWeight] += by_token ? sums[kRolloutWeight] : w.weight * kept;
  totals[kTotalWeightSquare] += by_token ? sums[kRolloutWeightSquare] : w.weight * w.weight * kept;
  totals[kTotalCut] += by_token ? sums[kRolloutCut] : w.cut ? kept : 0;
  totals[kTotalRejected] += rejected ? kept : sums[kRolloutRejected];
  totals[kTotalSequenceWeight] += w.weight;
  return {w.weight, rejected};
}

// What divides all weights.
constexpr double rollout_divisor(RatioLevel level, bool normalize, const double* totals) {
  if (!normalize || !(totals[kTotalTokens] > 0)) return 1;
  const double mean = level == RatioLevel::token
                          ? totals[kTotalWeight] / totals[kTotalTokens]
                          : totals[kTotalSequenceWeight] / totals[kTotalSequences];
  return mean <= 1e-8 ? 1 : mean;
}

constexpr void rollout_metrics(const double* totals, float* metrics) {
  const double n = totals[kTotalTokens], s = totals[kTotalSequences], w = totals[kTotalWeight];
  const double values[kRolloutMetrics] = {
      totals[kTotalWeightSquare] > 0 ? w * w / (n * totals[kTotalWeightSquare]) : 0,
      totals[kTotalSquare] / n - 1,
      totals[kTotalSequenceSquare] / s - 1,
      (0 - totals[kTotalLogRatio]) / n,  // not -0
      totals[kTotalK3] / n,
      totals[kTotalTrainerPerplexity] / s,
      totals[kTotalRolloutPerplexity] / s,
      totals[kTotalCut] / n,
      totals[kTotalRejected] / n,
      w / n};
  for (int k = 0; k < kRolloutMetrics; ++k) metrics[k] = n > 0 ? static_cast<float>(values[k]) : 0;
}

// Whether a second pass over the weights or the mask is needed.
inline bool rollout_revises(const RolloutCorrectionArgs& a) {
  bool by_sequence = a.masks_off_policy;
  for (int64_t over : a.overs) by_sequence |= static_cast<RejectOver>(over) != RejectOver::token;
  return by_sequence || a.normalize || a.level != RatioLevel::token;
}

}  // namespace p2r
