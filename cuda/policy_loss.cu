// The policy loss in four launches, all deterministic. A block a run of kLossRun tokens counts the
// kept ones; one block adds these by sequence and computes the weights, which the gradient needs; a
// block a run computes terms and gradients in f32 and sums the terms in f64; one block adds the
// runs in a fixed order.
#include "cuda/reduce.cuh"
#include "cuda/workspace.h"
#include "ops/policy_loss.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256, kWarps = kBlock / 32;

struct RunSums {
  double kept, log_ratio;  // the latter: the sum of log_ratio_term
  double sums[kLossSums];
};
struct Sequence {
  double kept, log_ratio, policy_weight, term_weight;
};

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
  const LossRun* runs;
  const int64_t* starts;
  int64_t run_count, sequences;
  RunSums* run_sums;
  Sequence* per_sequence;
  double* kept_tokens;  // of the batch
  float *loss, *d_log_probs, *d_entropy, *metrics;
  FaultFlag fault;
};

__global__ void __launch_bounds__(kBlock) count_kept_kernel(Loss a) {
  SMEM_ARRAY(double, shared, kWarps);
  const LossRun run = a.runs[blockIdx.x];
  const bool weighted = a.objective == Objective::vespo && a.importance;
  const bool ratios = by_sequence(a.objective) && (a.old_log_probs || weighted);
  double kept = 0, log_ratio = 0;
  for (int64_t t = run.begin + threadIdx.x; t < run.begin + run.size; t += kBlock) {
    const int mask = a.mask ? a.mask[t] : 1;
    if (mask > 1) ptx::raise(a.fault, t, static_cast<uint32_t>(mask), true);
    if (!mask) continue;
    kept += 1;
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
}

__global__ void __launch_bounds__(kBlock) sequence_weights_kernel(Loss a) {
  SMEM_ARRAY(double, shared, kWarps);
  double tokens = 0, rows = 0;
  for (int64_t s = threadIdx.x; s < a.sequences; s += kBlock) {
    double kept = 0, log_ratio = 0;
    for (int64_t i = a.starts[s]; i < a.starts[s + 1]; ++i) {
      kept += a.run_sums[i].kept;
      log_ratio += a.run_sums[i].log_ratio;
    }
    a.per_sequence[s].kept = kept;
    a.per_sequence[s].log_ratio = log_ratio;
    tokens += kept;
    rows += a.count_empty || kept > 0;
  }
  tokens = block_sum<kWarps>(tokens, shared);
  rows = block_sum<kWarps>(rows, shared);
  const auto weight = [&](Aggregation aggregation, double kept) {
    const bool given = a.normalizer > 0 && (aggregation == Aggregation::token_mean) ==
                                               (a.aggregation == Aggregation::token_mean);
    return loss_weight(aggregation, kept, given ? a.normalizer : tokens,
                       given ? a.normalizer : rows, a.loss_scale);
  };
  for (int64_t s = threadIdx.x; s < a.sequences; s += kBlock) {
    a.per_sequence[s].policy_weight = weight(a.aggregation, a.per_sequence[s].kept);
    a.per_sequence[s].term_weight = weight(a.term_aggregation, a.per_sequence[s].kept);
  }
  if (threadIdx.x == 0) *a.kept_tokens = tokens;
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

__device__ PolicyTerm policy_term(const Loss& a, float advantage, float log_prob, float log_ratio,
                                  float old_log_prob, float ratio, bool in_range,
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
      PolicyTerm policy = policy_term(a, advantage, log_prob, log_ratio,
                                      a.old_log_probs ? a.old_log_probs[t] : log_prob, ratio,
                                      in_range, of_sequence);
      if (a.importance && a.objective != Objective::vespo) {
        policy.term.value *= a.importance[t];
        policy.term.gradient *= a.importance[t];
      }
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
  loss_metrics(sums, *a.kept_tokens, a.kl_coef, a.entropy_coef, a.metrics);
  *a.loss = a.metrics[0];
}

float bound_or_inf(double given) { return given > 0 ? static_cast<float>(given) : INFINITY; }

}  // namespace

void policy_loss(const PolicyLossArgs& a, Device& device) {
  const LossRuns table = loss_runs(a.cu_seqlens);
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
    p.kept_tokens = workspace.take<double>(1);
  });

  cudaStream_t stream = stream_of(device);
  const unsigned runs = static_cast<unsigned>(p.run_count);
  if (runs) launch(count_kept_kernel, runs, kBlock, 0, stream, p);
  launch(sequence_weights_kernel, 1u, kBlock, 0, stream, p);
  if (runs) launch(loss_terms_kernel, runs, kBlock, 0, stream, p);
  launch(reduce_loss_kernel, 1u, kBlock, 0, stream, p);
}

}  // namespace p2r::cuda
