// Importance weights in three launches, all deterministic: a block a run of kLossRun tokens
// computes the ratios and their sums (9 bytes read and 5 written for a token: 0.9 us for 512 x 1024
// at 8 TB/s of L2, so latency is what remains); one block adds the runs by sequence and decides
// what a sequence or the batch does; a block a run revises weights and mask, where that is needed.
#include "cuda/reduce.cuh"
#include "cuda/workspace.h"
#include "ops/rollout_correction.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256, kWarps = kBlock / 32;

struct RunSums {
  double sums[kRolloutRunSums];
};

struct Correction {
  const float *log_probs, *rollout_log_probs, *advantages;
  const uint8_t* mask;
  RatioLevel level;
  RatioMode mode;
  double low, high;
  bool normalize, masks_off_policy;
  double max_divergence;
  Rejections rejections;
  const LossRun* runs;
  const int64_t* starts;
  int64_t sequences;
  RunSums* run_sums;
  RolloutSequence* per_sequence;
  double* divisor;
  float *weights, *metrics;
  uint8_t* kept;
  FaultFlag fault;
};

__device__ __forceinline__ float clamped(float x) {
  return x > 20 ? 20 : x < -20 ? -20 : x;  // NaN stays NaN
}

__device__ float measured(DivergenceMeasure measure, float d, float ratio) {
  switch (measure) {
    case DivergenceMeasure::k1:
      return -d;
    case DivergenceMeasure::k2:
      return 0.5f * d * d;
    case DivergenceMeasure::k3:
      return static_cast<float>(expm1(static_cast<double>(d)) - d);
    default:
      return ratio;
  }
}

// The maximum over a block, NaN if one is NaN.
__device__ double block_max(double x, double* shared) {
  for (int step = 16; step > 0; step /= 2)
    x = reduced(RejectOver::max, x, __shfl_xor_sync(0xffffffffu, x, step));
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) x = reduced(RejectOver::max, x, shared[i]);
  return x;
}

__global__ void __launch_bounds__(kBlock) ratios_kernel(Correction a) {
  SMEM_ARRAY(double, shared, kWarps);
  const LossRun run = a.runs[blockIdx.x];
  const float low = static_cast<float>(a.low), high = static_cast<float>(a.high);
  // Every index is a constant, so that both stay in registers.
  double sums[kRolloutSums] = {}, rules[kMaxRejections];
#pragma unroll
  for (int i = 0; i < kMaxRejections; ++i) rules[i] = reduction_of_none(a.rejections.rules[i].over);
  for (int64_t t = run.begin + threadIdx.x; t < run.begin + run.size; t += kBlock) {
    const int mask = a.mask ? a.mask[t] : 1;
    if (mask > 1) ptx::raise(a.fault, t, static_cast<uint32_t>(mask), true);
    bool passes = mask != 0;
    float weight = 0;
    if (mask) {
      const float trainer = a.log_probs[t], rollout = a.rollout_log_probs[t];
      const float d = clamped(trainer - rollout), ratio = expf(d);
#pragma unroll
      for (int i = 0; i < kMaxRejections; ++i) {
        if (i >= a.rejections.count) break;
        const Rejection rule = a.rejections.rules[i];
        const float x = measured(rule.measure, d, ratio);
        rules[i] = reduced(rule.over, rules[i], x);
        if (rule.over == RejectOver::token) passes &= x >= rule.low && x <= rule.high;
      }
      const RolloutWeight w = rollout_weight(a.mode, ratio, low, high);
      weight = static_cast<float>(w.weight);
      sums[kRolloutKept] += 1;
      sums[kRolloutLogRatio] += trainer - rollout;
      sums[kRolloutTrainer] += trainer;
      sums[kRolloutRollout] += rollout;
      sums[kRolloutK3] += measured(DivergenceMeasure::k3, d, ratio);
      sums[kRolloutSquare] += ratio * ratio;
      sums[kRolloutWeight] += weight;
      sums[kRolloutWeightSquare] += weight * weight;
      sums[kRolloutCut] += w.cut;
      sums[kRolloutRejected] += !passes;
    }
    a.kept[t] = passes;
    if (a.level == RatioLevel::token) a.weights[t] = passes ? weight : 0;
  }
#pragma unroll
  for (int k = 0; k < kRolloutSums; ++k) {
    const double total = block_sum<kWarps>(sums[k], shared);
    if (threadIdx.x == 0) a.run_sums[blockIdx.x].sums[k] = total;
  }
#pragma unroll
  for (int i = 0; i < kMaxRejections; ++i) {
    if (i >= a.rejections.count) break;
    const bool maximum = a.rejections.rules[i].over == RejectOver::max;
    const double total =
        maximum ? block_max(rules[i], shared) : block_sum<kWarps>(rules[i], shared);
    if (threadIdx.x == 0) a.run_sums[blockIdx.x].sums[kRolloutSums + i] = total;
  }
}

__global__ void __launch_bounds__(kBlock) rollout_sequences_kernel(Correction a) {
  SMEM_ARRAY(double, shared, kWarps);
  double totals[kRolloutTotals] = {};
  for (int64_t s = threadIdx.x; s < a.sequences; s += kBlock) {
    double sums[kRolloutRunSums];
    clear_rollout_sums(a.rejections, sums);
    for (int64_t i = a.starts[s]; i < a.starts[s + 1]; ++i)
      add_rollout_sums(a.rejections, a.run_sums[i].sums, sums);
    a.per_sequence[s] = {0, false};
    if (sums[kRolloutKept] == 0) continue;
    const double product = rollout_log_ratio(RatioLevel::sequence, sums);
    const RolloutExponentials e = {exp(rollout_log_ratio(a.level, sums)), exp(2 * product),
                                   exp(-sums[kRolloutTrainer] / sums[kRolloutKept]),
                                   exp(-sums[kRolloutRollout] / sums[kRolloutKept])};
    const bool rejected = rollout_rejects(a.rejections, sums, a.masks_off_policy, a.max_divergence,
                                          a.advantages ? static_cast<double>(a.advantages[s]) : 0);
    a.per_sequence[s] =
        add_rollout_sequence(a.level, a.mode, a.low, a.high, rejected, sums, e, totals);
  }
  for (int k = 0; k < kRolloutTotals; ++k) totals[k] = block_sum<kWarps>(totals[k], shared);
  if (threadIdx.x != 0) return;
  rollout_metrics(totals, a.metrics);
  *a.divisor = rollout_divisor(a.level, a.normalize, totals);
}

__global__ void __launch_bounds__(kBlock) revise_weights_kernel(Correction a) {
  const LossRun run = a.runs[blockIdx.x];
  const RolloutSequence sequence = a.per_sequence[run.sequence];
  const double divisor = *a.divisor;
  const float weight = static_cast<float>(sequence.weight / divisor);
  for (int64_t t = run.begin + threadIdx.x; t < run.begin + run.size; t += kBlock) {
    if (sequence.rejected) a.kept[t] = 0;
    if (a.level != RatioLevel::token)
      a.weights[t] = a.kept[t] ? weight : 0;
    else
      a.weights[t] = a.kept[t] ? static_cast<float>(a.weights[t] / divisor) : 0;
  }
}

}  // namespace

void rollout_correction(const RolloutCorrectionArgs& a, Device& device) {
  const LossRuns table = loss_runs(a.cu_seqlens);
  Correction p;
  p.log_probs = a.log_probs.as<const float>();
  p.rollout_log_probs = a.rollout_log_probs.as<const float>();
  p.advantages = a.advantages.as<const float>();
  p.mask = a.mask.as<const uint8_t>();
  p.level = a.level;
  p.mode = a.mode;
  p.low = a.low;
  p.high = a.high;
  p.normalize = a.normalize;
  p.masks_off_policy = a.masks_off_policy;
  p.max_divergence = a.max_divergence;
  p.rejections = rejections_of(a);
  p.sequences = static_cast<int64_t>(table.starts.size()) - 1;
  p.weights = a.importance_weights.as<float>();
  p.kept = a.kept.as<uint8_t>();
  p.metrics = a.metrics.as<float>();
  p.fault = a.fault;
  const ScratchWorkspace scratch(device, [&](Workspace& workspace) {
    p.runs = upload(device, workspace, table.runs);
    p.starts = upload(device, workspace, table.starts);
    p.run_sums = workspace.take<RunSums>(static_cast<int64_t>(table.runs.size()));
    p.per_sequence = workspace.take<RolloutSequence>(p.sequences);
    p.divisor = workspace.take<double>(1);
  });
  cudaStream_t stream = stream_of(device);
  const unsigned runs = static_cast<unsigned>(table.runs.size());
  if (runs) launch(ratios_kernel, runs, kBlock, 0, stream, p);
  launch(rollout_sequences_kernel, 1u, kBlock, 0, stream, p);
  if (runs && rollout_revises(a)) launch(revise_weights_kernel, runs, kBlock, 0, stream, p);
}

}  // namespace p2r::cuda
