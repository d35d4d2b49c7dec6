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
//   dppo   -A min(r, delta) logp, min(r, delta) held constant;     -A min(r, delta) likewise
//          0 past the threshold of a divergence, p = e^logp,
//          q = e^old (Qi et al. 2026, arXiv:2602.04879)
//     dppo_tv   A > 0: p - q > clip_high, else p - q < -clip_low
//     dppo_kl   A > 0: p > q and D > clip_high, else p < q and D > clip_low, for
//               D = q (old - logp) + (1 - q) log((1 - q + 1e-8) / (1 - p + 1e-8))
//   gmpo   -A e^m, m = clamp(mean of the sequence's u, -20, 10),   -A e^m where u = logp - old
//          u = min(logp - old, clip_high) for A > 0, for A < 0     and m was not clamped, else 0
//          max(logp - old, -clip_low), 0 for A = 0 (Zhao et al. 2025, arXiv:2507.20673)
//   vespo  -A φ logp, φ held constant: φ = e^(λ + k m - λ e^m),    -A φ
//          m = clamp(Σ d + Σ clamp(log w, log 1e-8, 20), log 1e-8, 20) over the sequence, with k
//          and λ by the sign of A (A = 0: positive); w does not multiply the loss again
//
//   clip_cov  as ppo without dual clip; 0 for the chosen tokens    as ppo; 0 for the chosen tokens
//   kl_cov    -A r; for the chosen tokens plus cov_kl |d|          -A r, plus cov_kl sign(d); 0
//   past
//             (Cui et al. 2025, arXiv:2505.22617)                  ±20
//     by the covariance C = (A - mean A) (logp - mean logp), means over the batch's kept tokens, of
//     which n = max(1, floor(cov_ratio N)) are chosen: for kl_cov those of the largest C, for
//     clip_cov at random among those that were not clipped and have cov_low < C < cov_high (fewer
//     where there are fewer). Random: the largest random_key; of equal C the first. A NaN C is
//     never chosen. clip_cov's dual-clip metric, and kl_cov's, counts the chosen ones.
//
// delta (inf: none) bounds ppo's and gspo's r before its product with A, with gradient 0 where it
// does: TRL's two-sided clipping. luspo is gspo with seq_mean_token_sum (arXiv:2602.05261).
//
// gspo's gradient is that of GSPO-token: it equals the derivative where A w is constant over the
// sequence; so is gmpo's. KL of a token, x = ref - logp, and its gradient:
//
//   k1 -x: 1    abs |x|: sign(-x)    k2 x²/2: -x    k3 e^x - x - 1: 1 - e^x (Schulman 2020)
//   k1+, k3+: the value of k1 and k3, the gradient of k2 (verl's straight-through estimators)
//
// With kl_clamp, k3 takes x clamped to ±20 and is at most kl_clamp, with gradient 0 beyond; without
// (kl_clamp = 0) neither is clamped. kl_unbiased multiplies the estimate by the token's ratio e^d,
// through which the gradient goes too: with k3, e^d (logp - ref) (DeepSeek-V3.2; TRL's
// use_bias_correction_kl, but that takes the sequence's ratio with sequence ratios).
//
// Read: verl/trainer/ppo/core_algos.py of volcengine/verl b178a3cd (gmpo is geo_mean there, kl) and
// of its later state (dppo_tv, dppo_kl; clip_cov, kl_cov, whose ratios are not clamped, and whose
// choice is torch.randperm's); src/prime_rl/trainer/rl/loss.py of
// PrimeIntellect-ai/prime-rl 559b4477 (dppo_tv, without delta and with an untruncated gradient);
// trl/trainer/grpo_trainer.py of huggingface/trl f2cd5771 (delta, luspo, vespo).
//
//   loss = agg(l) + kl_coef agg'(kl) - entropy_coef agg'(entropy)
//
//   token_mean           Σ / N                  seq_mean_token_sum        Σ_i Σ_t / S
//   seq_mean_token_mean  Σ_i (Σ_t / L_i) / S    seq_mean_token_sum_norm   Σ_i Σ_t / S / loss_scale
//   token_sum            Σ                     prompt_mean               Σ_p (Σ_i Σ_t / N_p) / P
//
// L_i kept tokens, N their sum, S the sequences with L_i > 0 (count_empty: all of them); N_p the
// kept tokens of a group of sequences, P the groups with N_p > 0 (all), as in SkyRL's loss
// reduction of that name (skyrl/backends/skyrl_train/utils/ppo_utils.py of NovaSky-AI/SkyRL
// a9564572). normalizer > 0 replaces N, S or P of agg, and of agg' where that counts the same
// thing. Nothing kept: every result 0.
//
// top_entropy (1: all) leaves the policy term to the tokens of the highest entropy, as Wang et al.
// 2025 (arXiv:2506.01939) and TRL's top_entropy_quantile: of the N entropies of kept tokens,
// sorted, those from the one of index ceil((1 - top_entropy) (N - 1)) on and its equals (what is at
// least the quantile by linear interpolation). The other tokens' policy terms are 0; they count in
// N and L as before. A NaN entropy counts as the highest.
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
#include "ops/random_key.h"
#include "ops/tensor.h"

namespace p2r {

constexpr double kLogLeastWeight = -18.420680743952367;  // log 1e-8
constexpr int kLossMetrics = 1 + kLossSums + 2;          // the loss, and the kept tokens as a pair

struct PolicyLossArgs {
  In log_probs, old_log_probs, ref_log_probs, entropy, importance_weights, advantages, mask;
  Ints cu_seqlens;
  Ints groups;  // of each sequence, for prompt_mean alone: any ids in any order
  Objective objective = Objective::ppo;
  double clip_low = 0.2, clip_high = 0.2;
  double dual_clip = 3;  // 0: none
  double delta = 0;      // 0: none
  double tau_positive = 1, tau_negative = 1.05;
  double k_positive = 2, lambda_positive = 3, k_negative = 3, lambda_negative = 2;  // vespo
  double cov_ratio = 2e-4, cov_low = 1, cov_high = 5, cov_kl = 1;  // clip_cov, kl_cov
  int64_t cov_seed = 0;
  double top_entropy = 1;
  Kl kl = Kl::none;
  bool kl_unbiased = false;
  double kl_coef = 0.01, kl_clamp = 10;  // kl_clamp 0: none
  double entropy_coef = 0;
  Aggregation aggregation = Aggregation::token_mean, term_aggregation = Aggregation::token_mean;
  bool count_empty = false;
  double loss_scale = 1, normalizer = 0;  // normalizer 0: counted here
  bool per_token = false;                 // advantages
  Out loss, d_log_probs, d_entropy, metrics;
  auto fields() {
    return std::tie(log_probs, old_log_probs, ref_log_probs, entropy, importance_weights,
                    advantages, mask, cu_seqlens, groups, objective, clip_low, clip_high, dual_clip,
                    delta, tau_positive, tau_negative, k_positive, lambda_positive, k_negative,
                    lambda_negative, cov_ratio, cov_low, cov_high, cov_kl, cov_seed, top_entropy,
                    kl, kl_unbiased, kl_coef, kl_clamp, entropy_coef, aggregation, term_aggregation,
                    count_empty, loss_scale, normalizer, per_token, loss, d_log_probs, d_entropy,
                    metrics);
  }
  FaultFlag fault;
  FaultSource fault_source() const { return {}; }  // the mask alone can be at fault
};

// KL in the reward: of each sequence rewards - kl_coef Σ kl(log_probs, ref_log_probs) over its kept
// tokens, the estimates as above, with kl_clamp likewise. rewards, out f32 [B], the rest as above;
// sums f64 in a fixed order. A mask value other than 0 and 1
// faults, and makes its sequence NaN. Source: apply_kl_penalty of verl/trainer/ppo/ray_trainer.py
// of volcengine/verl b178a3cd, with rewards that stand on a sequence's last token.
struct ApplyKlPenaltyArgs {
  In rewards, log_probs, ref_log_probs, mask;
  Ints cu_seqlens;
  Kl kl = Kl::k1;
  double kl_coef = 0.01, kl_clamp = 10;  // kl_clamp 0: none
  Out out;
  auto fields() {
    return std::tie(rewards, log_probs, ref_log_probs, mask, cu_seqlens, kl, kl_coef, kl_clamp,
                    out);
  }
  FaultFlag fault;
  FaultSource fault_source() const { return {}; }  // the mask alone can be at fault
};

constexpr int64_t kLossRun = 2048;

// Whether a token's loss depends on the log-ratios of its whole sequence.
constexpr bool by_sequence(Objective objective) {
  return objective == Objective::gspo || objective == Objective::gmpo ||
         objective == Objective::vespo;
}

// Whether some tokens are chosen by their covariance.
constexpr bool by_covariance(Objective objective) {
  return objective == Objective::clip_cov || objective == Objective::kl_cov;
}
// How many of N kept tokens.
constexpr int64_t chosen_of(double ratio, double tokens) {
  const int64_t n = static_cast<int64_t>(ratio * tokens);
  return n > 1 ? n : 1;
}
// The order of choice, as one number, all of which are distinct: by `key`, then the first token.
constexpr uint64_t choice_rank(uint32_t key, int64_t token) {
  return uint64_t{key} << 32 | (0xFFFFFFFF - static_cast<uint32_t>(token));
}
// f32 as integers of the same order; a NaN that is not negative is above infinity.
constexpr uint32_t ordered_bits(uint32_t bits) {
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}
constexpr uint32_t from_ordered_bits(uint32_t x) { return x & 0x80000000 ? x & 0x7FFFFFFF : ~x; }
// Of n sorted entropies, the index from which on tokens keep their policy term. A product that is
// an integer but for its rounding counts as one.
constexpr int64_t first_of_top(double top_entropy, int64_t n) {
  const double position = (1 - top_entropy) * static_cast<double>(n - 1) * (1 - 1e-12);
  const int64_t below = static_cast<int64_t>(position);
  return position > static_cast<double>(below) ? below + 1 : below;
}

// What a kept token adds to its sequence's sum of log-ratios. step: logp - old; log_importance: of
// its weight, 0 without.
constexpr double log_ratio_term(Objective objective, double clip_low, double clip_high,
                                double advantage, double step, double log_importance) {
  if (objective == Objective::gspo) return step;
  if (objective == Objective::gmpo) {
    if (advantage > 0) return step > clip_high ? clip_high : step;
    if (advantage < 0) return step < -clip_low ? -clip_low : step;
    return advantage;  // 0, or NaN
  }
  const double d = step > 20 ? 20 : step < -20 ? -20 : step;
  return d + (log_importance > 20                ? 20
              : log_importance < kLogLeastWeight ? kLogLeastWeight
                                                 : log_importance);
}

// The mean of a sequence's log-ratios within gspo's and gmpo's bounds, or vespo's sum within its
// own. NaN stays.
struct SequenceLogRatio {
  double value;
  bool inside;
};
constexpr SequenceLogRatio sequence_log_ratio(Objective objective, double sum, double kept) {
  const bool summed = objective == Objective::vespo;
  const double x = summed ? sum : kept > 0 ? sum / kept : 0;
  const double low = summed ? kLogLeastWeight : -20, high = summed ? 20 : 10;
  return {x < low ? low : x > high ? high : x, x >= low && x <= high};
}

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

// The weight of each kept token of a sequence. kept: L_i (prompt_mean: N_p); tokens, rows: N and S
// (P).
constexpr double loss_weight(Aggregation how, double kept, double tokens, double rows,
                             double loss_scale) {
  if (!(kept > 0)) return 0;
  switch (how) {
    case Aggregation::token_mean:
      return 1 / tokens;
    case Aggregation::seq_mean_token_sum:
      return 1 / rows;
    case Aggregation::seq_mean_token_mean:
    case Aggregation::prompt_mean:
      return 1 / (kept * rows);
    case Aggregation::token_sum:
      return 1;
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
