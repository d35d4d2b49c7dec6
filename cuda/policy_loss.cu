// The policy loss in four launches, all deterministic. A block a run of kLossRun tokens counts the
// kept ones; one block adds these by sequence and computes the weights, which the gradient needs; a
// block a run computes terms and gradients in f32 and sums the terms in f64; one block adds the
// runs in a fixed order.
//
// clip_cov, kl_cov and top_entropy need one of the order statistics of the batch, the rank (64
// bits, ops/policy_loss.h) from which on tokens are chosen, before the third launch. It is found
// byte by byte from the highest: a block a run counts its candidates by their next byte, one block
// adds the counts and takes the byte in which the wanted rank lies. These are 8 times two launches
// (4 for an entropy, whose 32 bits decide alone), each of which reads what the rank is made of,
// some 5 MB for 512 x 1024 tokens from L2, so that launches, not bytes, decide: 2 us each, some 35
// us on an H200.
#include "cuda/reduce.cuh"
#include "cuda/workspace.h"
#include "ops/advantages.h"
#include "ops/policy_loss.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256, kWarps = kBlock / 32;

struct RunSums {
  double kept, log_ratio;        // the latter: the sum of log_ratio_term
  double advantages, log_probs;  // for covariances
  double sums[kLossSums];
};
struct Sequence {
  double kept, log_ratio, policy_weight, term_weight;
};
// The tokens of the highest ranks.
struct Choice {
  bool all;            // there are fewer candidates than are to be chosen
  int64_t left;        // how many are to be chosen among those whose higher bytes are the rank's
  uint64_t last_rank;  // the lowest that is chosen; while it is searched for, its higher bytes
};
// What the batch's sums give.
struct Totals {
  double kept;
  float mean_advantage, mean_log_prob;
  Choice by_covariance, by_entropy;
};
constexpr int kBytes = 256;  // values of one

struct Loss {
  const float *log_probs, *old_log_probs, *ref_log_probs, *entropy, *importance, *advantages;
  const uint8_t* mask;
  Objective objective;
  Kl kl;
  Aggregation aggregation, term_aggregation;
  bool count_empty, per_token, kl_unbiased;
  double clip_low, clip_high;
  double k_positive, lambda_positive, k_negative, lambda_negative;
  float delta;                                                                   // inf: none
  float ratio_low, ratio_high, dual_clip, tau_positive, tau_negative, kl_clamp;  // inf: no bound
  double kl_coef, entropy_coef, loss_scale, normalizer;
  double cov_ratio, top_entropy;
  float cov_low, cov_high, cov_kl;
  int64_t cov_seed;
  const LossRun* runs;
  const int64_t* starts;
  const int32_t *group_order, *group_starts;  // for prompt_mean
  int64_t run_count, sequences, groups;
  RunSums* run_sums;
  Sequence* per_sequence;
  Totals* totals;
  uint32_t* byte_counts;  // [runs][kBytes]
  float *loss, *d_log_probs, *d_entropy, *metrics;
  FaultFlag fault;
};

__global__ void __launch_bounds__(kBlock) count_kept_kernel(Loss a) {
  SMEM_ARRAY(double, shared, kWarps);
  const LossRun run = a.runs[blockIdx.x];
  const bool weighted = a.objective == Objective::vespo && a.importance;
  const bool ratios = by_sequence(a.objective) && (a.old_log_probs || weighted);
  const bool covariances = by_covariance(a.objective);
  double kept = 0, log_ratio = 0, advantages = 0, log_probs = 0;
  for (int64_t t = run.begin + threadIdx.x; t < run.begin + run.size; t += kBlock) {
    const int mask = a.mask ? a.mask[t] : 1;
    if (mask > 1) ptx::raise(a.fault, t, static_cast<uint32_t>(mask), true);
    if (!mask) continue;
    kept += 1;
    if (covariances) {
      advantages += a.advantages[a.per_token ? t : run.sequence];
      log_probs += a.log_probs[t];
    }
    if (ratios)
      log_ratio += log_ratio_term(
          a.objective, a.clip_low, a.clip_high, a.advantages[a.per_token ? t : run.sequence],
          a.old_log_probs
              ? static_cast<double>(a.log_probs[t]) - static_cast<double>(a.old_log_probs[t])
              : 0,
          weighted ? log(static_cast<double>(a.importance[t])) : 0);
  }
  kept = block_sum<kWarps>(kept, shared);
  log_ratio = block_sum<kWarps>(log_ratio, shared);
  if (threadIdx.x == 0) {
    a.run_sums[blockIdx.x].kept = kept;
    a.run_sums[blockIdx.x].log_ratio = log_ratio;
  }
  if (!covariances) return;
  advantages = block_sum<kWarps>(advantages, shared);
  log_probs = block_sum<kWarps>(log_probs, shared);
  if (threadIdx.x == 0) {
    a.run_sums[blockIdx.x].advantages = advantages;
    a.run_sums[blockIdx.x].log_probs = log_probs;
  }
}

// `kept`: the tokens among which a mean is taken, of a sequence or a prompt; `counted` of these.
__device__ __forceinline__ double weight_of(const Loss& a, Aggregation aggregation, double tokens,
                                            double kept, double counted) {
  const bool given = a.normalizer > 0 && (aggregation == Aggregation::token_mean) ==
                                             (a.aggregation == Aggregation::token_mean);
  return loss_weight(aggregation, kept, given ? a.normalizer : tokens,
                     given ? a.normalizer : counted, a.loss_scale);
}

__global__ void __launch_bounds__(kBlock) sequence_weights_kernel(Loss a) {
  SMEM_ARRAY(double, shared, kWarps);
  const bool covariances = by_covariance(a.objective);
  double tokens = 0, rows = 0, advantages = 0, log_probs = 0;
  for (int64_t s = threadIdx.x; s < a.sequences; s += kBlock) {
    double kept = 0, log_ratio = 0;
    for (int64_t i = a.starts[s]; i < a.starts[s + 1]; ++i) {
      kept += a.run_sums[i].kept;
      log_ratio += a.run_sums[i].log_ratio;
      if (!covariances) continue;
      advantages += a.run_sums[i].advantages;
      log_probs += a.run_sums[i].log_probs;
    }
    a.per_sequence[s].kept = kept;
    a.per_sequence[s].log_ratio = log_ratio;
    tokens += kept;
    rows += a.count_empty || kept > 0;
  }
  tokens = block_sum<kWarps>(tokens, shared);
  rows = block_sum<kWarps>(rows, shared);
  if (covariances) {
    advantages = block_sum<kWarps>(advantages, shared);
    log_probs = block_sum<kWarps>(log_probs, shared);
  }
  for (int64_t s = threadIdx.x; s < a.sequences; s += kBlock) {
    const double kept = a.per_sequence[s].kept;
    a.per_sequence[s].policy_weight = weight_of(a, a.aggregation, tokens, kept, rows);
    a.per_sequence[s].term_weight = weight_of(a, a.term_aggregation, tokens, kept, rows);
  }
  if (threadIdx.x != 0) return;
  const int64_t kept = static_cast<int64_t>(tokens);
  a.totals->kept = tokens;
  a.totals->mean_advantage = static_cast<float>(tokens > 0 ? advantages / tokens : 0);
  a.totals->mean_log_prob = static_cast<float>(tokens > 0 ? log_probs / tokens : 0);
  a.totals->by_covariance = {kept == 0, chosen_of(a.cov_ratio, tokens), 0};
  a.totals->by_entropy = {kept == 0, kept > 0 ? kept - first_of_top(a.top_entropy, kept) : 0, 0};
}

// After sequence_weights_kernel: of prompt_mean, weights by the tokens of all of a prompt's
// sequences.
__global__ void __launch_bounds__(kBlock) prompt_weights_kernel(Loss a) {
  SMEM_ARRAY(double, shared, kWarps);
  const double tokens = a.totals->kept;
  const auto kept_of = [&](int64_t g) {
    double kept = 0;
    for (int32_t j = a.group_starts[g]; j < a.group_starts[g + 1]; ++j)
      kept += a.per_sequence[a.group_order[j]].kept;
    return kept;
  };
  double prompts = 0;
  for (int64_t g = threadIdx.x; g < a.groups; g += kBlock)
    prompts += a.count_empty || kept_of(g) > 0;
  prompts = block_sum<kWarps>(prompts, shared);
  for (int64_t g = threadIdx.x; g < a.groups; g += kBlock) {
    const double kept = kept_of(g);
    for (int32_t j = a.group_starts[g]; j < a.group_starts[g + 1]; ++j) {
      Sequence& sequence = a.per_sequence[a.group_order[j]];
      if (sequence.kept == 0) continue;
      if (a.aggregation == Aggregation::prompt_mean)
        sequence.policy_weight = weight_of(a, a.aggregation, tokens, kept, prompts);
      if (a.term_aggregation == Aggregation::prompt_mean)
        sequence.term_weight = weight_of(a, a.term_aggregation, tokens, kept, prompts);
    }
  }
}

struct Term {
  float value, gradient;
};

__device__ __forceinline__ float clamped(float x, float low, float high) {
  return x > high ? high : x < low ? low : x;  // NaN stays NaN
}

// e^x - 1 - x, by its series for |x| < 1, where the difference would cancel.
__device__ float expm1_minus_x(float x) {
  if (!(x > -1 && x < 1)) return expf(x) - x - 1;
  float p = 1.0f / 6227020800.0f;
  p = fmaf(p, x, 1.0f / 479001600);
  p = fmaf(p, x, 1.0f / 39916800);
  p = fmaf(p, x, 1.0f / 3628800);
  p = fmaf(p, x, 1.0f / 362880);
  p = fmaf(p, x, 1.0f / 40320);
  p = fmaf(p, x, 1.0f / 5040);
  p = fmaf(p, x, 1.0f / 720);
  p = fmaf(p, x, 1.0f / 120);
  p = fmaf(p, x, 1.0f / 24);
  p = fmaf(p, x, 1.0f / 6);
  p = fmaf(p, x, 0.5f);
  return x * x * p;
}

__device__ Term kl_term(const Loss& a, float x) {
  switch (a.kl) {
    case Kl::k1:
      return {-x, 1};
    case Kl::k1_plus:
      return {-x, -x};
    case Kl::k2:
      return {0.5f * x * x, -x};
    case Kl::abs:
      return {fabsf(x), x > 0 ? -1.0f : x < 0 ? 1.0f : x};
    default: {
      const bool bounded = a.kl_clamp < INFINITY;
      const float at = bounded ? clamped(x, -20, 20) : x;
      const float value = expm1_minus_x(at);
      if (a.kl == Kl::k3_plus) return {value > a.kl_clamp ? a.kl_clamp : value, -x};
      if (bounded && (value > a.kl_clamp || x > 20 || x < -20))
        return {value > a.kl_clamp ? a.kl_clamp : value, 0};
      return {value, -(value + at)};
    }
  }
}

struct PolicyTerm {
  Term term;
  bool clipped, dual_clipped;
};

// Whether the trust region of dppo excludes a token.
__device__ bool outside_region(const Loss& a, float advantage, float log_p, float log_q) {
  const float p = expf(log_p), q = expf(log_q);
  const float low = static_cast<float>(a.clip_low), high = static_cast<float>(a.clip_high);
  if (a.objective == Objective::dppo_tv) return advantage > 0 ? p - q > high : p - q < -low;
  const float chosen = q > 0 ? q * (log_q - log_p) : 0;
  const float not_p = -expm1f(log_p), not_q = -expm1f(log_q);
  const float divergence = chosen + not_q * logf((not_q + 1e-8f) / (not_p + 1e-8f));
  return advantage > 0 ? divergence > high && p > q : divergence > low && p < q;
}

// Of one sequence, for the objectives of sequences.
struct SequenceTerm {
  float ratio, phi_positive, phi_negative;
  bool inside;
};

__device__ PolicyTerm policy_term(const Loss& a, bool chosen, float advantage, float log_prob,
                                  float log_ratio, float old_log_prob, float ratio, bool in_range,
                                  const SequenceTerm& sequence) {
  PolicyTerm out = {{0, 0}, false, false};
  switch (a.objective) {
    case Objective::ppo:
    case Objective::gspo: {
      const float unclipped = -advantage * (ratio > a.delta ? a.delta : ratio);
      const float bounded = -advantage * clamped(ratio, a.ratio_low, a.ratio_high);
      out.clipped = bounded > unclipped;
      out.term.value = out.clipped ? bounded : unclipped;
      if (a.objective == Objective::ppo && a.dual_clip < INFINITY && advantage < 0) {
        const float limit = -advantage * a.dual_clip;
        out.dual_clipped = out.term.value > limit;
        if (out.dual_clipped) out.term.value = limit;
      }
      if (in_range && !out.clipped && ratio > a.delta) out.dual_clipped = true;
      out.term.gradient = in_range && !out.clipped && !out.dual_clipped ? unclipped : 0;
      break;
    }
    case Objective::dppo_tv:
    case Objective::dppo_kl:
      out.clipped = outside_region(a, advantage, log_prob, old_log_prob);
      out.dual_clipped = !out.clipped && ratio > a.delta;
      if (out.clipped) break;
      out.term.gradient = -advantage * (ratio > a.delta ? a.delta : ratio);
      out.term.value = out.term.gradient * log_prob;
      break;
    case Objective::gmpo:
      out.clipped = advantage > 0 && log_ratio > static_cast<float>(a.clip_high);
      out.dual_clipped = advantage < 0 && log_ratio < -static_cast<float>(a.clip_low);
      out.term.value = -advantage * ratio;
      out.term.gradient = in_range && !out.clipped && !out.dual_clipped ? out.term.value : 0;
      break;
    case Objective::clip_cov: {
      const float own = -advantage * ratio;
      const float bounded = -advantage * clamped(ratio, a.ratio_low, a.ratio_high);
      out.clipped = bounded > own;
      out.dual_clipped = chosen;
      if (chosen) break;
      out.term.value = out.clipped ? bounded : own;
      out.term.gradient = in_range && !out.clipped ? own : 0;
      break;
    }
    case Objective::kl_cov:
      out.dual_clipped = chosen;
      out.term.value =
          -advantage * ratio + (chosen ? a.cov_kl * fabsf(clamped(log_ratio, -20, 20)) : 0);
      out.term.gradient = !in_range ? 0
                          : chosen
                              ? -advantage * ratio + a.cov_kl * ((log_ratio > 0) - (log_ratio < 0))
                              : -advantage * ratio;
      break;
    case Objective::vespo:
      out.term.gradient =
          -advantage * (advantage < 0 ? sequence.phi_negative : sequence.phi_positive);
      out.term.value = out.term.gradient * log_prob;
      break;
    case Objective::cispo: {
      const float clipped_ratio = clamped(ratio, a.ratio_low, a.ratio_high);
      out.clipped = clipped_ratio != ratio;
      out.term.gradient = -advantage * clipped_ratio;
      out.term.value = out.term.gradient * log_prob;
      break;
    }
    case Objective::sapo: {
      const float tau = advantage > 0 ? a.tau_positive : a.tau_negative;
      const float gate = 1 / (1 + expf(-tau * (ratio - 1)));
      const float one_minus_gate = 1 / (1 + expf(tau * (ratio - 1)));
      out.term.value = -advantage * gate * 4 / tau;
      out.term.gradient = in_range ? -advantage * 4 * gate * one_minus_gate * ratio : 0;
      break;
    }
    default:
      out.term.gradient = -advantage;
      out.term.value = out.term.gradient * log_prob;
  }
  return out;
}

// Where a kept token stands in the order of choice; 0 for one that is no candidate.
__device__ uint64_t entropy_rank(const Loss& a, int64_t t) {
  const float entropy = a.entropy[t];
  return choice_rank(entropy == entropy ? ordered_bits(__float_as_uint(entropy)) : 0xFFFFFFFF, t);
}
__device__ uint64_t covariance_rank(const Loss& a, const LossRun& run, int64_t t) {
  const float log_prob = a.log_probs[t], advantage = a.advantages[a.per_token ? t : run.sequence];
  const float covariance =
      (advantage - a.totals->mean_advantage) * (log_prob - a.totals->mean_log_prob);
  if (a.objective == Objective::kl_cov)
    return covariance == covariance ? choice_rank(ordered_bits(__float_as_uint(covariance)), t) : 0;
  if (!(covariance > a.cov_low && covariance < a.cov_high)) return 0;
  const float d = a.old_log_probs ? clamped(log_prob - a.old_log_probs[t], -20, 20) : 0;
  const float ratio = a.old_log_probs ? expf(d) : 1;
  if (-advantage * clamped(ratio, a.ratio_low, a.ratio_high) > -advantage * ratio) return 0;
  return choice_rank(random_key(a.cov_seed, static_cast<uint32_t>(t)), t);
}

__global__ void __launch_bounds__(kBlock) count_bytes_kernel(Loss a, bool entropies, int shift) {
  SMEM_ARRAY(uint32_t, counts, kBytes);
  const LossRun run = a.runs[blockIdx.x];
  counts[threadIdx.x] = 0;
  __syncthreads();
  const Choice& choice = entropies ? a.totals->by_entropy : a.totals->by_covariance;
  const uint64_t last = choice.last_rank;
  for (int64_t t = run.begin + threadIdx.x; t < run.begin + run.size; t += kBlock) {
    if (a.mask && !a.mask[t]) continue;
    const uint64_t rank = entropies ? entropy_rank(a, t) : covariance_rank(a, run, t);
    if (rank && (shift == 56 || rank >> (shift + 8) == last >> (shift + 8)))
      atomicAdd(&counts[rank >> shift & 255], 1u);
  }
  __syncthreads();
  a.byte_counts[blockIdx.x * kBytes + threadIdx.x] = counts[threadIdx.x];
}

__global__ void __launch_bounds__(kBlock) choose_byte_kernel(Loss a, bool entropies, int shift) {
  SMEM_ARRAY(int64_t, counts, kBytes);
  int64_t count = 0;
  for (int64_t i = 0; i < a.run_count; ++i) count += a.byte_counts[i * kBytes + threadIdx.x];
  counts[threadIdx.x] = count;
  __syncthreads();
  Choice& choice = entropies ? a.totals->by_entropy : a.totals->by_covariance;
  if (threadIdx.x != 0 || choice.all) return;
  int64_t left = choice.left;
  int byte = kBytes - 1;
  for (; byte >= 0 && counts[byte] < left; --byte) left -= counts[byte];
  choice.all = byte < 0;  // at the first byte or never
  if (choice.all) return;
  choice.left = left;
  choice.last_rank |= static_cast<uint64_t>(byte) << shift;
}

__global__ void __launch_bounds__(kBlock) loss_terms_kernel(Loss a) {
  SMEM_ARRAY(double, shared, kWarps);
  const LossRun run = a.runs[blockIdx.x];
  const Sequence sequence = a.per_sequence[run.sequence];
  const bool has_ratio = a.objective == Objective::gspo || a.objective == Objective::gmpo;
  const SequenceLogRatio sequence_ratio =
      sequence_log_ratio(a.objective, sequence.log_ratio, sequence.kept);
  SequenceTerm of_sequence = {static_cast<float>(exp(sequence_ratio.value)), 0, 0,
                              sequence_ratio.inside};
  if (a.objective == Objective::vespo) {
    const double m = sequence_ratio.value, w = exp(m);
    of_sequence.phi_positive =
        static_cast<float>(exp(a.lambda_positive + a.k_positive * m - a.lambda_positive * w));
    of_sequence.phi_negative =
        static_cast<float>(exp(a.lambda_negative + a.k_negative * m - a.lambda_negative * w));
  }
  const float policy_weight = static_cast<float>(sequence.policy_weight);
  const float kl_weight = static_cast<float>(a.kl_coef * sequence.term_weight);
  const float entropy_weight = static_cast<float>(-a.entropy_coef * sequence.term_weight);
  const bool covariances = by_covariance(a.objective), by_entropy = a.top_entropy < 1;
  const uint64_t last_covariance = a.totals->by_covariance.last_rank;
  const uint64_t last_entropy = a.totals->by_entropy.last_rank >> 32;
  double sums[kLossSums] = {};
  for (int64_t t = run.begin + threadIdx.x; t < run.begin + run.size; t += kBlock) {
    const int mask = a.mask ? a.mask[t] : 1;
    float gradient = 0;
    if (mask) {
      const float log_prob = a.log_probs[t];
      const float advantage = a.advantages[a.per_token ? t : run.sequence];
      const float log_ratio = a.old_log_probs ? log_prob - a.old_log_probs[t] : 0;
      const float d = clamped(log_ratio, -20, 20);
      const bool in_range = has_ratio ? of_sequence.inside : log_ratio >= -20 && log_ratio <= 20;
      const float ratio = has_ratio ? of_sequence.ratio : a.old_log_probs ? expf(d) : 1;
      const uint64_t rank = covariances ? covariance_rank(a, run, t) : 0;
      const bool chosen = rank && rank >= last_covariance;
      PolicyTerm policy = policy_term(a, chosen, advantage, log_prob, log_ratio,
                                      a.old_log_probs ? a.old_log_probs[t] : log_prob, ratio,
                                      in_range, of_sequence);
      if (a.importance && a.objective != Objective::vespo) {
        policy.term.value *= a.importance[t];
        policy.term.gradient *= a.importance[t];
      }
      if (by_entropy && entropy_rank(a, t) >> 32 < last_entropy) policy.term = {0, 0};
      gradient = policy.term.gradient * policy_weight;
      if (a.kl != Kl::none) {
        Term kl = kl_term(a, a.ref_log_probs[t] - log_prob);
        if (a.kl_unbiased) {
          const float token_ratio = expf(d);
          kl.gradient = token_ratio * (kl.gradient + (d == log_ratio ? kl.value : 0));
          kl.value *= token_ratio;
        }
        sums[kKlSum] += kl.value;
        if (kl_weight != 0) gradient += kl.gradient * kl_weight;
      }
      if (mask > 1) policy.term.value = gradient = NAN;
      sums[kPolicySum] += policy.term.value;
      if (a.entropy) sums[kEntropySum] += a.entropy[t];
      sums[kClippedSum] += policy.clipped;
      sums[kDualClippedSum] += policy.dual_clipped;
      sums[kApproxKlSum] -= d;
      sums[kRatioSum] += ratio;
    }
    a.d_log_probs[t] = gradient;
    if (a.d_entropy) a.d_entropy[t] = mask ? entropy_weight : 0;
  }
  for (int k = 0; k < kLossSums; ++k) {
    const double total = block_sum<kWarps>(sums[k], shared);
    if (threadIdx.x == 0) a.run_sums[blockIdx.x].sums[k] = total;
  }
}

__global__ void __launch_bounds__(kBlock) reduce_loss_kernel(Loss a) {
  SMEM_ARRAY(double, shared, kWarps);
  double sums[kLossSums] = {};
  for (int64_t i = threadIdx.x; i < a.run_count; i += kBlock) {
    const Sequence& sequence = a.per_sequence[a.runs[i].sequence];
    if (sequence.kept == 0) continue;
    for (int k = 0; k < kLossSums; ++k)
      sums[k] +=
          a.run_sums[i].sums[k] * loss_sum_weight(k, sequence.policy_weight, sequence.term_weight);
  }
  for (int k = 0; k < kLossSums; ++k) sums[k] = block_sum<kWarps>(sums[k], shared);
  if (threadIdx.x != 0) return;
  loss_metrics(sums, a.totals->kept, a.kl_coef, a.entropy_coef, a.metrics);
  *a.loss = a.metrics[0];
}

struct Penalty {
  const float *rewards, *log_probs, *ref_log_probs;
  const uint8_t* mask;
  const int64_t* cu_seqlens;
  Kl kl;
  double kl_coef, kl_clamp;  // inf: none
  float* out;
  FaultFlag fault;
};

__device__ double kl_estimate(const Penalty& a, double x) {
  switch (a.kl) {
    case Kl::k1:
    case Kl::k1_plus:
      return -x;
    case Kl::k2:
      return x * x / 2;
    case Kl::abs:
      return fabs(x);
    default: {
      if (a.kl_clamp < INFINITY) x = x > 20 ? 20 : x < -20 ? -20 : x;
      const double value = expm1(x) - x;
      return value > a.kl_clamp ? a.kl_clamp : value;
    }
  }
}

// A block a sequence.
__global__ void __launch_bounds__(kBlock) kl_penalty_kernel(Penalty a) {
  SMEM_ARRAY(double, shared, kWarps);
  const int64_t s = blockIdx.x;
  double total = 0;
  for (int64_t t = a.cu_seqlens[s] + threadIdx.x; t < a.cu_seqlens[s + 1]; t += kBlock) {
    const int mask = a.mask ? a.mask[t] : 1;
    if (!mask) continue;
    if (mask > 1) ptx::raise(a.fault, t, static_cast<uint32_t>(mask), true);
    total += mask > 1 ? NAN
                      : kl_estimate(a, static_cast<double>(a.ref_log_probs[t]) -
                                           static_cast<double>(a.log_probs[t]));
  }
  total = block_sum<kWarps>(total, shared);
  const double penalty = a.kl_coef != 0 ? a.kl_coef * total : 0;
  if (threadIdx.x == 0) a.out[s] = static_cast<float>(a.rewards[s] - penalty);
}

float bound_or_inf(double given) { return given > 0 ? static_cast<float>(given) : INFINITY; }

}  // namespace

void policy_loss(const PolicyLossArgs& a, Device& device) {
  const LossRuns table = loss_runs(a.cu_seqlens);
  const GroupIndex groups = index_groups(a.groups);
  const bool covariances = by_covariance(a.objective), entropies = a.top_entropy < 1;
  Loss p;
  p.log_probs = a.log_probs.as<const float>();
  p.old_log_probs = a.old_log_probs.as<const float>();
  p.ref_log_probs = a.ref_log_probs.as<const float>();
  p.entropy = a.entropy.as<const float>();
  p.importance = a.importance_weights.as<const float>();
  p.advantages = a.advantages.as<const float>();
  p.mask = a.mask.as<const uint8_t>();
  p.objective = a.objective;
  p.kl = a.kl;
  p.aggregation = a.aggregation;
  p.term_aggregation = a.term_aggregation;
  p.count_empty = a.count_empty;
  p.per_token = a.per_token;
  p.ratio_low = static_cast<float>(1 - a.clip_low);
  p.ratio_high = static_cast<float>(1 + a.clip_high);
  p.dual_clip = bound_or_inf(a.dual_clip);
  p.kl_unbiased = a.kl_unbiased;
  p.clip_low = a.clip_low;
  p.clip_high = a.clip_high;
  p.delta = bound_or_inf(a.delta);
  p.k_positive = a.k_positive;
  p.lambda_positive = a.lambda_positive;
  p.k_negative = a.k_negative;
  p.lambda_negative = a.lambda_negative;
  p.tau_positive = static_cast<float>(a.tau_positive);
  p.tau_negative = static_cast<float>(a.tau_negative);
  p.kl_clamp = bound_or_inf(a.kl_clamp);
  p.kl_coef = a.kl_coef;
  p.entropy_coef = a.entropy_coef;
  p.loss_scale = a.loss_scale;
  p.normalizer = a.normalizer;
  p.cov_ratio = a.cov_ratio;
  p.cov_low = static_cast<float>(a.cov_low);
  p.cov_high = static_cast<float>(a.cov_high);
  p.cov_kl = static_cast<float>(a.cov_kl);
  p.cov_seed = a.cov_seed;
  p.top_entropy = a.top_entropy;
  p.groups = a.groups.empty() ? 0 : groups.count();
  p.run_count = static_cast<int64_t>(table.runs.size());
  p.sequences = static_cast<int64_t>(table.starts.size()) - 1;
  p.loss = a.loss.as<float>();
  p.d_log_probs = a.d_log_probs.as<float>();
  p.d_entropy = a.d_entropy.as<float>();
  p.metrics = a.metrics.as<float>();
  p.fault = a.fault;

  const ScratchWorkspace scratch(device, [&](Workspace& workspace) {
    p.runs = upload(device, workspace, table.runs);
    p.starts = upload(device, workspace, table.starts);
    p.run_sums = workspace.take<RunSums>(p.run_count);
    p.per_sequence = workspace.take<Sequence>(p.sequences);
    p.totals = workspace.take<Totals>(1);
    p.byte_counts =
        covariances || entropies ? workspace.take<uint32_t>(p.run_count * kBytes) : nullptr;
    p.group_order = p.groups ? upload(device, workspace, groups.order) : nullptr;
    p.group_starts = p.groups ? upload(device, workspace, groups.starts) : nullptr;
  });

  cudaStream_t stream = stream_of(device);
  const unsigned runs = static_cast<unsigned>(p.run_count);
  if (runs) launch(count_kept_kernel, runs, kBlock, 0, stream, p);
  launch(sequence_weights_kernel, 1u, kBlock, 0, stream, p);
  if (p.groups) launch(prompt_weights_kernel, 1u, kBlock, 0, stream, p);
  const auto choose = [&](bool entropies, int last_shift) {
    for (int shift = 56; shift >= last_shift; shift -= 8) {
      launch(count_bytes_kernel, runs, kBlock, 0, stream, p, entropies, shift);
      launch(choose_byte_kernel, 1u, kBlock, 0, stream, p, entropies, shift);
    }
  };
  if (runs && covariances) choose(false, 0);
  if (runs && entropies) choose(true, 32);
  if (runs) launch(loss_terms_kernel, runs, kBlock, 0, stream, p);
  launch(reduce_loss_kernel, 1u, kBlock, 0, stream, p);
}

void apply_kl_penalty(const ApplyKlPenaltyArgs& a, Device& device) {
  Penalty p;
  p.rewards = a.rewards.as<const float>();
  p.log_probs = a.log_probs.as<const float>();
  p.ref_log_probs = a.ref_log_probs.as<const float>();
  p.mask = a.mask.as<const uint8_t>();
  p.kl = a.kl;
  p.kl_coef = a.kl_coef;
  p.kl_clamp = a.kl_clamp > 0 ? a.kl_clamp : INFINITY;
  p.out = a.out.as<float>();
  p.fault = a.fault;
  const ScratchWorkspace scratch(device, [&](Workspace& workspace) {
    p.cu_seqlens = upload(device, workspace, a.cu_seqlens);
  });
  const unsigned sequences = static_cast<unsigned>(a.rewards.shape[0]);
  if (sequences) launch(kl_penalty_kernel, sequences, kBlock, 0, stream_of(device), p);
}

}  // namespace p2r::cuda
