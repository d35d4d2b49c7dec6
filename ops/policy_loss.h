// The policy-gradient loss over packed sequences, with its gradient in the same pass.
//
// A token t of sequence i, kept by the mask, has A its advantage (or its sequence's), w its
// importance weight (1 unless given), d = clamp(logp - old, ±20), r = e^d (old absent: d = 0), and
// c(r) = clamp(r, 1 - clip_low, 1 + clip_high). Its policy loss l, times w, and dl/dlogp:
//
//   ppo    max(-A r, -A c(r)); with A < 0 at most -A dual_clip     -A r where that branch was taken
//          (Schulman et al. 2017; Ye et al. 2020)                  and |logp - old| <= 20, else 0
//   gspo   as ppo without dual clip, r = e^clamp(mean of the       -A r likewise
//          sequence's logp - old, -20, 10) (Zheng et al. 2025)
//   cispo  -c(r) A logp, c(r) held constant (MiniMax 2025)         -c(r) A
//   sapo   -A (4/τ) σ(τ (r - 1)), τ by the sign of A (Gao 2025)    -A 4 σ (1 - σ) r, 0 past ±20
//   gpg    -A logp                                                 -A
//
// gspo's gradient is that of GSPO-token: it equals the derivative where A w is constant over the
// sequence. KL of a token, x = ref - logp, and its gradient:
//
//   k1 -x: 1    abs |x|: sign(-x)    k2 x²/2: -x    k3 e^x - x - 1: 1 - e^x (Schulman 2020)
//
// With kl_clamp, k3 takes x clamped to ±20 and is at most kl_clamp, with gradient 0 beyond; without
// (kl_clamp = 0) neither is clamped.
//
//   loss = agg(l) + kl_coef agg'(kl) - entropy_coef agg'(entropy)
//
//   token_mean           Σ / N                  seq_mean_token_sum        Σ_i Σ_t / S
//   seq_mean_token_mean  Σ_i (Σ_t / L_i) / S    seq_mean_token_sum_norm   Σ_i Σ_t / S / loss_scale
//
// L_i kept tokens, N their sum, S the sequences with L_i > 0 (count_empty: all of them). normalizer
// > 0 replaces N or S of agg, and of agg' where that counts the same thing. Nothing kept: every
// result 0.
//
// log_probs, old, ref, entropy, importance_weights, d_log_probs, d_entropy f32 [T], packed by
// cu_seqlens; advantages f32 [B] or [T]; mask u8 [T]; loss f32 [1]; metrics f32 [10]: loss, policy
// loss, kl, entropy (the last three as aggregated), then means over kept tokens of [clipping
// changed the loss], [the dual clip did], -d, r; and the kept tokens as a pair, 65536 a + b. Masked
// tokens are excluded by a select, never by a product, so NaN there does not spread. A mask value
// other than 0 and 1 faults, and makes the loss and its token's gradient NaN.
//
// A token's terms are f32; sums over tokens are f64 (f32 in runs of some hundred tokens on the
// CPU), in fixed order: runs of kLossRun tokens within each sequence, then the runs in order.
// Weights are rounded to f32 when they multiply a gradient.
#pragma once
#include <tuple>
#include <vector>

#include "ops/enums.h"
#include "ops/fault.h"
#include "ops/tensor.h"

namespace p2r {

constexpr int kLossMetrics = 1 + kLossSums + 2;  // the loss, and the kept tokens as a pair

struct PolicyLossArgs {
  In log_probs, old_log_probs, ref_log_probs, entropy, importance_weights, advantages, mask;
  Ints cu_seqlens;
  Objective objective = Objective::ppo;
  double clip_low = 0.2, clip_high = 0.2;
  double dual_clip = 3;  // 0: none
  double tau_positive = 1, tau_negative = 1.05;
  Kl kl = Kl::none;
  double kl_coef = 0.01, kl_clamp = 10;  // kl_clamp 0: none
  double entropy_coef = 0;
  Aggregation aggregation = Aggregation::token_mean, term_aggregation = Aggregation::token_mean;
  bool count_empty = false;
  double loss_scale = 1, normalizer = 0;  // normalizer 0: counted here
  bool per_token = false;                 // advantages
  Out loss, d_log_probs, d_entropy, metrics;
  auto fields() {
    return std::tie(log_probs, old_log_probs, ref_log_probs, entropy, importance_weights,
                    advantages, mask, cu_seqlens, objective, clip_low, clip_high, dual_clip,
                    tau_positive, tau_negative, kl, kl_coef, kl_clamp, entropy_coef, aggregation,
                    term_aggregation, count_empty, loss_scale, normalizer, per_token, loss,
                    d_log_probs, d_entropy, metrics);
  }
  FaultFlag fault;
  FaultSource fault_source() const { return {}; }  // the mask alone can be at fault
};

constexpr int64_t kLossRun = 2048;

// The sequences cut into runs of at most kLossRun tokens. An empty sequence has none.
struct LossRun {
  int64_t begin = 0;
  int32_t size = 0, sequence = 0;
};
struct LossRuns {
  std::vector<LossRun> runs;
  std::vector<int64_t> starts;  // of each sequence, and the end
};
inline LossRuns loss_runs(const Ints& cu_seqlens) {
  LossRuns out;
  for (size_t i = 0; i + 1 < cu_seqlens.size(); ++i) {
    out.starts.push_back(static_cast<int64_t>(out.runs.size()));
    for (int64_t t = cu_seqlens[i]; t < cu_seqlens[i + 1]; t += kLossRun) {
      const int64_t left = cu_seqlens[i + 1] - t;
      out.runs.push_back(
          {t, static_cast<int32_t>(left < kLossRun ? left : kLossRun), static_cast<int32_t>(i)});
    }
  }
  out.starts.push_back(static_cast<int64_t>(out.runs.size()));
  return out;
}

// The weight of each kept token of a sequence. kept: L_i; tokens, rows: N and S.
constexpr double loss_weight(Aggregation how, double kept, double tokens, double rows,
                             double loss_scale) {
  if (!(kept > 0)) return 0;
  switch (how) {
    case Aggregation::token_mean:
      return 1 / tokens;
    case Aggregation::seq_mean_token_sum:
      return 1 / rows;
    case Aggregation::seq_mean_token_mean:
      return 1 / (kept * rows);
    default:
      return 1 / (rows * loss_scale);
  }
}

// What a sequence's sum weighs in the batch's. policy_weight, term_weight: its loss_weight in agg
// and in agg'. The sums after the entropy become means over tokens in loss_metrics.
constexpr double loss_sum_weight(int sum, double policy_weight, double term_weight) {
  return sum == kPolicySum ? policy_weight : sum <= kEntropySum ? term_weight : 1;
}

// metrics, of which the first is the loss, from the batch's weighted sums; tokens: N.
constexpr void loss_metrics(const double* sums, double tokens, double kl_coef, double entropy_coef,
                            float* metrics) {
  metrics[0] = static_cast<float>(sums[kPolicySum] + (kl_coef != 0 ? kl_coef * sums[kKlSum] : 0) -
                                  (entropy_coef != 0 ? entropy_coef * sums[kEntropySum] : 0));
  for (int k = 0; k < kLossSums; ++k)
    metrics[1 + k] = static_cast<float>(k <= kEntropySum ? sums[k]
                                        : tokens > 0     ? sums[k] / tokens
                                                         : 0);
  const int64_t kept = static_cast<int64_t>(tokens);
  metrics[1 + kLossSums] = static_cast<float>(kept / 65536);
  metrics[2 + kLossSums] = static_cast<float>(kept % 65536);
}

}  // namespace p2r
