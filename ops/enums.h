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
enum class Objective : uint8_t { ppo, gspo, cispo, sapo, gpg };
inline constexpr Named<Objective> kObjectives[] = {{Objective::ppo, "ppo"},
                                                   {Objective::gspo, "gspo"},
                                                   {Objective::cispo, "cispo"},
                                                   {Objective::sapo, "sapo"},
                                                   {Objective::gpg, "gpg"}};

// Estimators of the KL divergence from the reference policy; formulas in ops/policy_loss.h.
enum class Kl : uint8_t { none, k1, k2, k3, abs };
inline constexpr Named<Kl> kKls[] = {
    {Kl::none, "none"}, {Kl::k1, "k1"}, {Kl::k2, "k2"}, {Kl::k3, "k3"}, {Kl::abs, "abs"}};

// How the losses of tokens become one; formulas in ops/policy_loss.h.
enum class Aggregation : uint8_t {
  token_mean,
  seq_mean_token_sum,
  seq_mean_token_mean,
  seq_mean_token_sum_norm
};
inline constexpr Named<Aggregation> kAggregations[] = {
    {Aggregation::token_mean, "token-mean"},
    {Aggregation::seq_mean_token_sum, "seq-mean-token-sum"},
    {Aggregation::seq_mean_token_mean, "seq-mean-token-mean"},
    {Aggregation::seq_mean_token_sum_norm, "seq-mean-token-sum-norm"}};

// Advantage estimators; formulas in ops/advantages.h.
enum class Estimator : uint8_t { grpo, dr_grpo, rloo, opo, gdpo, reinforce_pp_baseline };
inline constexpr Named<Estimator> kEstimators[] = {
    {Estimator::grpo, "grpo"}, {Estimator::dr_grpo, "dr_grpo"},
    {Estimator::rloo, "rloo"}, {Estimator::opo, "opo"},
    {Estimator::gdpo, "gdpo"}, {Estimator::reinforce_pp_baseline, "reinforce_pp_baseline"}};

// Resampling filters; formulas in ops/resample_plan.h.
enum class Filter : uint8_t { box, bilinear, bicubic, lanczos };
inline constexpr Named<Filter> kFilters[] = {{Filter::box, "box"},
                                             {Filter::bilinear, "bilinear"},
                                             {Filter::bicubic, "bicubic"},
                                             {Filter::lanczos, "lanczos"}};

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

}  // namespace p2r
