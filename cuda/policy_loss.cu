// The policy loss in four launches, all deterministic: runs of kLossRun tokens are counted, a block
// a run; one block adds them up by sequence (the gradient needs the divisors first); a block a run
// computes terms and gradients in f32 and sums the terms in f64; one block adds the runs up in a
// fixed order.
#include "cuda/launch.cuh"
#include "ops/policy_loss.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256, kWarps = kBlock / 32;
constexpr unsigned kFull = 0xffffffffu;

enum Sum { kPolicy, kKl, kEntropy, kClipped, kClippedLower, kApproxKl, kRatio, kSums };

struct Run {
  double kept, log_ratio, sums[kSums];
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
  bool count_empty, per_token;
  float low, high, dual_clip, tau_positive, tau_negative, kl_clamp;  // inf: no bound
  double kl_coef, entropy_coef, loss_scale, normalizer;
  const LossRun* runs;
  const int64_t* starts;
  int64_t count, sequences;
  Run* parts;
  Sequence* of;
  double* totals;  // kept tokens
  float *loss, *d_log_probs, *d_entropy, *metrics;
  int32_t* fault;
};

// The sum over the block, for every thread; `shared` holds kWarps values.
__device__ double block_sum(double x, double* shared) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFull, x, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < kWarps; ++i) total += shared[i];
  return total;
}

__global__ void __launch_bounds__(kBlock) count_kernel(Loss a) {
  SMEM_ARRAY(double, shared, kWarps);
  const LossRun run = a.runs[blockIdx.x];
  const bool ratios = a.objective == Objective::gspo && a.old_log_probs;
  double kept = 0, log_ratio = 0;
  for (int64_t t = run.begin + threadIdx.x; t < run.begin + run.size; t += kBlock) {
    const int mark = a.mask ? a.mask[t] : 1;
    if (mark > 1) ptx::raise(a.fault);
    if (!mark) continue;
    kept += 1;
    if (ratios)
      log_ratio += static_cast<double>(a.log_probs[t]) - static_cast<double>(a.old_log_probs[t]);
  }
  kept = block_sum(kept, shared);
  log_ratio = block_sum(log_ratio, shared);
  if (threadIdx.x == 0) {
    a.parts[blockIdx.x].kept = kept;
    a.parts[blockIdx.x].log_ratio = log_ratio;
  }
}

__global__ void __launch_bounds__(kBlock) weigh_kernel(Loss a) {
  SMEM_ARRAY(double, shared, kWarps);
  double tokens = 0, rows = 0;
  for (int64_t s = threadIdx.x; s < a.sequences; s += kBlock) {
    double kept = 0, log_ratio = 0;
    for (int64_t i = a.starts[s]; i < a.starts[s + 1]; ++i) {
      kept += a.parts[i].kept;
      log_ratio += a.parts[i].log_ratio;
    }
    a.of[s].kept = kept;
    a.of[s].log_ratio = log_ratio;
    tokens += kept;
    rows += a.count_empty || kept > 0;
  }
  tokens = block_sum(tokens, shared);
  rows = block_sum(rows, shared);
  const auto weight = [&](Aggregation how, double kept) {
    const bool given = a.normalizer > 0 && (how == Aggregation::token_mean) ==
                                               (a.aggregation == Aggregation::token_mean);
    return loss_weight(how, kept, given ? a.normalizer : tokens, given ? a.normalizer : rows,
                       a.loss_scale);
  };
  for (int64_t s = threadIdx.x; s < a.sequences; s += kBlock) {
    a.of[s].policy_weight = weight(a.aggregation, a.of[s].kept);
    a.of[s].term_weight = weight(a.term_aggregation, a.of[s].kept);
  }
  if (threadIdx.x == 0) *a.totals = tokens;
}

struct Term {
  float value, slope;
};

__device__ __forceinline__ float clamped(float x, float low, float high) {
  return x > high ? high : x < low ? low : x;  // NaN stays
}

// e^x - x - 1, by its series near 0, where the difference would cancel.
__device__ float above_tangent(float x) {
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
    case Kl::k2:
      return {0.5f * x * x, -x};
    case Kl::abs:
      return {fabsf(x), x > 0 ? -1.0f : x < 0 ? 1.0f : x};
    default: {
      const bool bounded = a.kl_clamp < INFINITY;
      const float at = bounded ? clamped(x, -20, 20) : x;
      const float value = above_tangent(at);
      if (bounded && (value > a.kl_clamp || x > 20 || x < -20))
        return {value > a.kl_clamp ? a.kl_clamp : value, 0};
      return {value, -(value + at)};
    }
  }
}

struct PolicyTerm {
  Term term;
  bool clipped, lower;
};

__device__ PolicyTerm policy_term(const Loss& a, float advantage, float log_prob, float ratio,
                                  bool inside) {
  PolicyTerm out = {{0, 0}, false, false};
  switch (a.objective) {
    case Objective::ppo:
    case Objective::gspo: {
      const float free = -advantage * ratio;
      const float bounded = -advantage * clamped(ratio, a.low, a.high);
      out.clipped = bounded > free;
      out.term.value = out.clipped ? bounded : free;
      if (a.objective == Objective::ppo && a.dual_clip < INFINITY && advantage < 0) {
        const float most = -advantage * a.dual_clip;
        out.lower = out.term.value > most;
        if (out.lower) out.term.value = most;
      }
      out.term.slope = inside && !out.clipped && !out.lower ? free : 0;
      break;
    }
    case Objective::cispo: {
      const float held = clamped(ratio, a.low, a.high);
      out.clipped = held != ratio;
      out.term.slope = -advantage * held;
      out.term.value = out.term.slope * log_prob;
      break;
    }
    case Objective::sapo: {
      const float tau = advantage > 0 ? a.tau_positive : a.tau_negative;
      const float gate = 1 / (1 + expf(-tau * (ratio - 1)));
      const float away = 1 / (1 + expf(tau * (ratio - 1)));
      out.term.value = -advantage * gate * 4 / tau;
      out.term.slope = inside ? -advantage * 4 * gate * away * ratio : 0;
      break;
    }
    default:
      out.term.slope = -advantage;
      out.term.value = out.term.slope * log_prob;
  }
  return out;
}

__global__ void __launch_bounds__(kBlock) run_kernel(Loss a) {
  SMEM_ARRAY(double, shared, kWarps);
  const LossRun run = a.runs[blockIdx.x];
  const Sequence sequence = a.of[run.sequence];
  const bool whole = a.objective == Objective::gspo;
  const double mean = sequence.kept > 0 ? sequence.log_ratio / sequence.kept : 0;
  const float sequence_ratio = static_cast<float>(exp(mean > 10    ? 10.0
                                                      : mean < -20 ? -20.0
                                                                   : mean));
  const float policy_weight = static_cast<float>(sequence.policy_weight);
  const float kl_weight = static_cast<float>(a.kl_coef * sequence.term_weight);
  const float entropy_weight = static_cast<float>(-a.entropy_coef * sequence.term_weight);
  double sums[kSums] = {};
  for (int64_t t = run.begin + threadIdx.x; t < run.begin + run.size; t += kBlock) {
    const int mark = a.mask ? a.mask[t] : 1;
    float slope = 0;
    if (mark) {
      const float log_prob = a.log_probs[t];
      const float advantage = a.advantages[a.per_token ? t : run.sequence];
      const float step = a.old_log_probs ? log_prob - a.old_log_probs[t] : 0;
      const float d = clamped(step, -20, 20);
      const bool inside = whole ? mean >= -20 && mean <= 10 : step >= -20 && step <= 20;
      const float ratio = whole ? sequence_ratio : a.old_log_probs ? expf(d) : 1;
      PolicyTerm policy = policy_term(a, advantage, log_prob, ratio, inside);
      if (a.importance) {
        policy.term.value *= a.importance[t];
        policy.term.slope *= a.importance[t];
      }
      slope = policy.term.slope * policy_weight;
      if (a.kl != Kl::none) {
        const Term kl = kl_term(a, a.ref_log_probs[t] - log_prob);
        sums[kKl] += kl.value;
        if (kl_weight != 0) slope += kl.slope * kl_weight;
      }
      if (mark > 1) policy.term.value = slope = NAN;
      sums[kPolicy] += policy.term.value;
      if (a.entropy) sums[kEntropy] += a.entropy[t];
      sums[kClipped] += policy.clipped;
      sums[kClippedLower] += policy.lower;
      sums[kApproxKl] -= d;
      sums[kRatio] += ratio;
    }
    a.d_log_probs[t] = slope;
    if (a.d_entropy) a.d_entropy[t] = mark ? entropy_weight : 0;
  }
  for (int k = 0; k < kSums; ++k) {
    const double total = block_sum(sums[k], shared);
    if (threadIdx.x == 0) a.parts[blockIdx.x].sums[k] = total;
  }
}

__global__ void __launch_bounds__(kBlock) finish_kernel(Loss a) {
  SMEM_ARRAY(double, shared, kWarps);
  double sums[kSums] = {};
  for (int64_t i = threadIdx.x; i < a.count; i += kBlock) {
    const Sequence& sequence = a.of[a.runs[i].sequence];
    if (sequence.kept == 0) continue;
    for (int k = 0; k < kSums; ++k)
      sums[k] += a.parts[i].sums[k] * (k == kPolicy    ? sequence.policy_weight
                                       : k <= kEntropy ? sequence.term_weight
                                                       : 1);
  }
  const double tokens = *a.totals;
  double total[kSums];
  for (int k = 0; k < kSums; ++k) {
    total[k] = block_sum(sums[k], shared);
    if (k > kEntropy) total[k] = tokens > 0 ? total[k] / tokens : 0;
  }
  if (threadIdx.x != 0) return;
  const double loss = total[kPolicy] + (a.kl_coef != 0 ? a.kl_coef * total[kKl] : 0) -
                      (a.entropy_coef != 0 ? a.entropy_coef * total[kEntropy] : 0);
  *a.loss = static_cast<float>(loss);
  a.metrics[0] = static_cast<float>(loss);
  for (int k = 0; k < kSums; ++k) a.metrics[1 + k] = static_cast<float>(total[k]);
  a.metrics[1 + kSums] = static_cast<float>(floor(tokens / 65536));
  a.metrics[2 + kSums] = static_cast<float>(tokens - floor(tokens / 65536) * 65536);
}
static_assert(3 + kSums == kLossMetrics);

float bound(double given) { return given > 0 ? static_cast<float>(given) : INFINITY; }

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
  p.low = static_cast<float>(1 - a.clip_low);
  p.high = static_cast<float>(1 + a.clip_high);
  p.dual_clip = bound(a.dual_clip);
  p.tau_positive = static_cast<float>(a.tau_positive);
  p.tau_negative = static_cast<float>(a.tau_negative);
  p.kl_clamp = bound(a.kl_clamp);
  p.kl_coef = a.kl_coef;
  p.entropy_coef = a.entropy_coef;
  p.loss_scale = a.loss_scale;
  p.normalizer = a.normalizer;
  p.count = static_cast<int64_t>(table.runs.size());
  p.sequences = static_cast<int64_t>(table.starts.size()) - 1;
  p.loss = a.loss.as<float>();
  p.d_log_probs = a.d_log_probs.as<float>();
  p.d_entropy = a.d_entropy.as<float>();
  p.metrics = a.metrics.as<float>();
  p.fault = a.fault;

  const size_t run_bytes = table.runs.size() * sizeof(LossRun);
  const size_t start_bytes = table.starts.size() * sizeof(int64_t);
  Scratch tables = device.scratch(run_bytes + start_bytes);
  Scratch parts = device.scratch(p.count * sizeof(Run));
  Scratch of = device.scratch(p.sequences * sizeof(Sequence) + sizeof(double));
  p.runs = tables.as<const LossRun>();
  p.starts = reinterpret_cast<const int64_t*>(tables.as<char>() + run_bytes);
  p.parts = parts.as<Run>();
  p.totals = of.as<double>();
  p.of = reinterpret_cast<Sequence*>(p.totals + 1);
  if (run_bytes) device.upload(tables.as<char>(), table.runs.data(), run_bytes);
  device.upload(tables.as<char>() + run_bytes, table.starts.data(), start_bytes);

  cudaStream_t stream = stream_of(device);
  const unsigned runs = static_cast<unsigned>(p.count);
  if (runs) launch(count_kernel, runs, kBlock, 0, stream, p);
  launch(weigh_kernel, 1u, kBlock, 0, stream, p);
  if (runs) launch(run_kernel, runs, kBlock, 0, stream, p);
  launch(finish_kernel, 1u, kBlock, 0, stream, p);
}

}  // namespace p2r::cuda
