// The options that a caller chooses by name, each value beside its name: binding/ parses names and
// lists them in its messages from these tables. Free of the standard library's inline code, so that
// cpu/simd/ may include it. Recorded cases store the values as numbers (ops/recording.h).
#pragma once
#include <stdint.h>

namespace p2r {

template <class Enum>
struct Named {
  Enum value;
  const char* name;
};

// Policy-gradient objectives; formulas in ops/policy_loss.h.
enum class Objective : uint8_t {
  ppo,
  gspo,
  cispo,
  sapo,
  gpg,
  dppo_tv,
  dppo_kl,
  gmpo,
  vespo,
  clip_cov,
  kl_cov
};
inline constexpr Named<Objective> kObjectives[] = {
    {Objective::ppo, "ppo"},           {Objective::gspo, "gspo"},
    {Objective::cispo, "cispo"},       {Objective::sapo, "sapo"},
    {Objective::gpg, "gpg"},           {Objective::dppo_tv, "dppo_tv"},
    {Objective::dppo_kl, "dppo_kl"},   {Objective::gmpo, "gmpo"},
    {Objective::vespo, "vespo"},       {Objective::gspo, "luspo"},
    {Objective::clip_cov, "clip_cov"}, {Objective::kl_cov, "kl_cov"}};

// Estimators of the KL divergence from the reference policy; formulas in ops/policy_loss.h.
enum class Kl : uint8_t { none, k1, k2, k3, abs, k1_plus, k3_plus };
inline constexpr Named<Kl> kKls[] = {{Kl::none, "none"},  {Kl::k1, "k1"},   {Kl::k2, "k2"},
                                     {Kl::k3, "k3"},      {Kl::abs, "abs"}, {Kl::k1_plus, "k1+"},
                                     {Kl::k3_plus, "k3+"}};

// How the losses of tokens become one; formulas in ops/policy_loss.h.
enum class Aggregation : uint8_t {
  token_mean,
  seq_mean_token_sum,
  seq_mean_token_mean,
  seq_mean_token_sum_norm,
  token_sum,
  prompt_mean
};
inline constexpr Named<Aggregation> kAggregations[] = {
    {Aggregation::token_mean, "token-mean"},
    {Aggregation::seq_mean_token_sum, "seq-mean-token-sum"},
    {Aggregation::seq_mean_token_mean, "seq-mean-token-mean"},
    {Aggregation::seq_mean_token_sum_norm, "seq-mean-token-sum-norm"},
    {Aggregation::token_sum, "token-sum"},
    {Aggregation::prompt_mean, "prompt-mean"}};

// Advantage estimators; formulas in ops/advantages.h. verl's vectorised forms are the same
// functions under a second name.
enum class Estimator : uint8_t {
  grpo,
  dr_grpo,
  rloo,
  opo,
  gdpo,
  reinforce_pp_baseline,
  reinforce_pp,
  gpg,
  grpo_passk,
  maxrl,
  remax,
  opt_baseline
};
inline constexpr Named<Estimator> kEstimators[] = {
    {Estimator::grpo, "grpo"},
    {Estimator::dr_grpo, "dr_grpo"},
    {Estimator::rloo, "rloo"},
    {Estimator::opo, "opo"},
    {Estimator::gdpo, "gdpo"},
    {Estimator::reinforce_pp_baseline, "reinforce_pp_baseline"},
    {Estimator::reinforce_pp, "reinforce_pp"},
    {Estimator::gpg, "gpg"},
    {Estimator::grpo_passk, "grpo_passk"},
    {Estimator::maxrl, "maxrl"},
    {Estimator::remax, "remax"},
    {Estimator::opt_baseline, "opt_baseline"},
    {Estimator::grpo, "grpo_vectorized"},
    {Estimator::rloo, "rloo_vectorized"}};

// What divides an advantage, and how kinds of rewards become one; formulas in ops/advantages.h.
enum class RewardScale : uint8_t { group, batch, none };
inline constexpr Named<RewardScale> kRewardScales[] = {
    {RewardScale::group, "group"}, {RewardScale::batch, "batch"}, {RewardScale::none, "none"}};
enum class Combine : uint8_t { separate, sum_then_normalize, normalize_then_sum };
inline constexpr Named<Combine> kCombines[] = {{Combine::separate, "separate"},
                                               {Combine::sum_then_normalize, "sum_then_normalize"},
                                               {Combine::normalize_then_sum, "normalize_then_sum"}};

// Ratios between trainer and rollout engine, and their rejection; formulas in
// ops/rollout_correction.h.
enum class RatioLevel : uint8_t { token, sequence, geometric };
inline constexpr Named<RatioLevel> kRatioLevels[] = {{RatioLevel::token, "token"},
                                                     {RatioLevel::sequence, "sequence"},
                                                     {RatioLevel::geometric, "geometric"}};
enum class RatioMode : uint8_t { truncate, mask, none };
inline constexpr Named<RatioMode> kRatioModes[] = {
    {RatioMode::truncate, "truncate"}, {RatioMode::mask, "mask"}, {RatioMode::none, "none"}};
enum class DivergenceMeasure : uint8_t { k1, k2, k3, ratio };
enum class RejectOver : uint8_t { token, sum, mean, max };

// Divergences between a student and a teacher; formulas in ops/distillation.h.
enum class Divergence : uint8_t { reverse_kl, forward_kl, jsd };
inline constexpr Named<Divergence> kDivergences[] = {{Divergence::reverse_kl, "reverse_kl"},
                                                     {Divergence::forward_kl, "forward_kl"},
                                                     {Divergence::jsd, "jsd"}};

// Resampling filters; formulas in ops/resample_plan.h.
enum class Filter : uint8_t { box, bilinear, bicubic, lanczos };
inline constexpr Named<Filter> kFilters[] = {{Filter::box, "box"},
                                             {Filter::bilinear, "bilinear"},
                                             {Filter::bicubic, "bicubic"},
                                             {Filter::lanczos, "lanczos"}};

// Not an option: what an online softmax sums beside Σ e^d, with d the logit less the maximum,
// divided by the temperature: nothing, Σ e^d d for the entropy, or Σ e^2d for the squared
// probabilities.
enum class SoftmaxExtra : uint8_t { none, moment, squares };

// Not an option: the sums over a sequence's tokens that the loss and the metrics are made of, in
// the metrics' order: policy loss, KL, entropy, [clipped], [dual-clipped], -d, r.
enum LossSum : uint8_t {
  kPolicySum,
  kKlSum,
  kEntropySum,
  kClippedSum,
  kDualClippedSum,
  kApproxKlSum,
  kRatioSum,
  kLossSums
};

// Likewise the sums over kept tokens of a run in front of the reductions of its rules of rejection
// (ops/rollout_correction.h), and a rule as kernels take it.
enum RolloutSum : uint8_t {
  kRolloutKept,
  kRolloutLogRatio,
  kRolloutTrainer,
  kRolloutRollout,
  kRolloutK3,
  kRolloutSquare,
  kRolloutWeight,
  kRolloutWeightSquare,
  kRolloutCut,
  kRolloutRejected,  // by rules of tokens
  kRolloutSums
};
constexpr int kMaxRejections = 8;
struct Rejection {
  DivergenceMeasure measure;
  RejectOver over;
  float low, high;
};

}  // namespace p2r
