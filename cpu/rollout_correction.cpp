// Threads take runs of tokens for the ratios and their sums; one thread adds these by sequence, in
// order; where a sequence or the batch decides, threads take runs of the results again.
#include "ops/rollout_correction.h"

#include <cmath>

#include "cpu/device.h"
#include "cpu/simd/arguments.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kRunGrain = 4;

struct RunSums {
  double sums[kRolloutRunSums];
};

}  // namespace

void rollout_correction(const RolloutCorrectionArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  LossRuns table = loss_runs(a.cu_seqlens);
  const int64_t count = static_cast<int64_t>(table.runs.size());
  const int64_t sequences = static_cast<int64_t>(table.starts.size()) - 1;
  Scratch run_scratch = device.scratch(count * sizeof(RunSums));
  Scratch sequence_scratch = device.scratch(sequences * sizeof(RolloutSequence));
  cpu.submit([=, &cpu, table = std::move(table), parts = run_scratch.as<RunSums>(),
              of = sequence_scratch.as<RolloutSequence>(), rejections = rejections_of(a)] {
    float* weights = a.importance_weights.as<float>();
    uint8_t* kept = a.kept.as<uint8_t>();
    cpu.parallel(count, kRunGrain, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const LossRun& run = table.runs[i];
        RolloutRun r;
        r.log_probs = a.log_probs.as<float>() + run.begin;
        r.rollout_log_probs = a.rollout_log_probs.as<float>() + run.begin;
        r.mask = a.mask ? a.mask.as<uint8_t>() + run.begin : nullptr;
        r.weights = weights + run.begin;
        r.kept = kept + run.begin;
        r.n = run.size;
        r.level = a.level;
        r.mode = a.mode;
        r.low = static_cast<float>(a.low);
        r.high = static_cast<float>(a.high);
        r.rules = rejections.rules;
        r.rule_count = rejections.count;
        if (!cpu.simd().rollout_run(&r, parts[i].sums))
          raise_invalid_mask(a.fault, r.mask, run.begin, run.size);
      }
    });

    double totals[kRolloutTotals] = {};
    for (int64_t s = 0; s < sequences; ++s) {
      double sums[kRolloutRunSums];
      clear_rollout_sums(rejections, sums);
      for (int64_t i = table.starts[s]; i < table.starts[s + 1]; ++i)
        add_rollout_sums(rejections, parts[i].sums, sums);
      of[s] = {0, false};
      if (sums[kRolloutKept] == 0) continue;
      const double product = rollout_log_ratio(RatioLevel::sequence, sums);
      const RolloutExponentials e = {std::exp(rollout_log_ratio(a.level, sums)),
                                     std::exp(2 * product),
                                     std::exp(-sums[kRolloutTrainer] / sums[kRolloutKept]),
                                     std::exp(-sums[kRolloutRollout] / sums[kRolloutKept])};
      const bool rejected = rollout_rejects(rejections, sums, a.masks_off_policy, a.max_divergence,
                                            a.advantages ? a.advantages.as<float>()[s] : 0);
      of[s] = add_rollout_sequence(a.level, a.mode, a.low, a.high, rejected, sums, e, totals);
    }
    rollout_metrics(totals, a.metrics.as<float>());
    if (!rollout_revises(a)) return;

    const double divisor = rollout_divisor(a.level, a.normalize, totals);
    cpu.parallel(count, kRunGrain, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const LossRun& run = table.runs[i];
        const RolloutSequence& sequence = of[run.sequence];
        const float weight = static_cast<float>(sequence.weight / divisor);
        for (int64_t t = run.begin; t < run.begin + run.size; ++t) {
          if (sequence.rejected) kept[t] = 0;
          if (a.level != RatioLevel::token)
            weights[t] = kept[t] ? weight : 0;
          else
            weights[t] = kept[t] ? static_cast<float>(weights[t] / divisor) : 0;
        }
      }
    });
  });
}

}  // namespace p2r::cpu
