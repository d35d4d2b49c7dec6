// Three loops: count the kept tokens of every run (the gradient needs the divisors), add the counts
// in order, then compute loss terms and gradients run by run and add the runs' sums in order. Runs,
// not sequences, are the tasks of the threads, so one long sequence is parallel too.
#include "ops/policy_loss.h"

#include <cmath>
#include <limits>

#include "cpu/device.h"
#include "cpu/simd/arguments.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kRunGrain = 4;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Sequence {
  double kept = 0, log_ratio = 0;  // the sum of its log_ratio_term
  double policy_weight = 0, term_weight = 0;
};
struct RunSums {
  bool faulty = false;
  double kept = 0, log_ratio = 0, sums[kLossSums] = {};
};

const float* from(const View& v, int64_t t) { return v ? v.as<float>() + t : nullptr; }

void count_run(const PolicyLossArgs& a, const LossRun& run, const Simd& simd, RunSums& out) {
  const uint8_t* mask = a.mask ? a.mask.as<uint8_t>() + run.begin : nullptr;
  out.faulty = false;
  const int64_t kept = mask ? simd.count_kept(mask, run.size, &out.faulty) : run.size;
  if (out.faulty) raise_invalid_mask(a.fault, mask, run.begin, run.size);
  double log_ratio = 0;
  const bool weighted = a.objective == Objective::vespo && a.importance_weights;
  if (by_sequence(a.objective) && (a.old_log_probs || weighted)) {
    const float *now = from(a.log_probs, run.begin), *old = from(a.old_log_probs, run.begin),
                *importance = from(a.importance_weights, run.begin);
    const float* advantages = a.advantages.as<float>() + (a.per_token ? run.begin : run.sequence);
    for (int32_t t = 0; t < run.size; ++t)
      if (!mask || mask[t])
        log_ratio +=
            log_ratio_term(a.objective, a.clip_low, a.clip_high, advantages[a.per_token ? t : 0],
                           old ? double(now[t]) - double(old[t]) : 0,
                           weighted ? std::log(double(importance[t])) : 0);
  }
  out.kept = static_cast<double>(kept);
  out.log_ratio = log_ratio;
}

bool counts_tokens(Aggregation how) { return how == Aggregation::token_mean; }

}  // namespace

void policy_loss(const PolicyLossArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  LossRuns table = loss_runs(a.cu_seqlens);
  const int64_t count = static_cast<int64_t>(table.runs.size());
  const int64_t sequences = static_cast<int64_t>(table.starts.size()) - 1;
  Scratch run_scratch = device.scratch(count * sizeof(RunSums));
  Scratch sequence_scratch = device.scratch(sequences * sizeof(Sequence));
  cpu.submit([=, &cpu, table = std::move(table), parts = run_scratch.as<RunSums>(),
              of = sequence_scratch.as<Sequence>()] {
    cpu.parallel(count, kRunGrain, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) count_run(a, table.runs[i], cpu.simd(), parts[i]);
    });

    double tokens = 0, rows = 0;
    for (int64_t s = 0; s < sequences; ++s) {
      of[s] = Sequence{};
      for (int64_t i = table.starts[s]; i < table.starts[s + 1]; ++i) {
        of[s].kept += parts[i].kept;
        of[s].log_ratio += parts[i].log_ratio;
      }
      tokens += of[s].kept;
      rows += a.count_empty || of[s].kept > 0;
    }
    const auto weight = [&](Aggregation how, double kept) {
      const bool given = a.normalizer > 0 && counts_tokens(how) == counts_tokens(a.aggregation);
      return loss_weight(how, kept, given ? a.normalizer : tokens, given ? a.normalizer : rows,
                         a.loss_scale);
    };
    for (int64_t s = 0; s < sequences; ++s) {
      of[s].policy_weight = weight(a.aggregation, of[s].kept);
      of[s].term_weight = weight(a.term_aggregation, of[s].kept);
    }

    cpu.parallel(count, kRunGrain, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const LossRun& run = table.runs[i];
        const Sequence& sequence = of[run.sequence];
        const SequenceLogRatio log_ratio =
            sequence_log_ratio(a.objective, sequence.log_ratio, sequence.kept);
        const auto phi = [&](double k, double lambda) {
          return static_cast<float>(
              std::exp(lambda + k * log_ratio.value - lambda * std::exp(log_ratio.value)));
        };
        PolicyRun r;
        r.log_probs = from(a.log_probs, run.begin);
        r.old_log_probs = from(a.old_log_probs, run.begin);
        r.ref_log_probs = from(a.ref_log_probs, run.begin);
        r.entropy = from(a.entropy, run.begin);
        r.importance = from(a.importance_weights, run.begin);
        r.advantages = a.per_token ? from(a.advantages, run.begin) : nullptr;
        r.advantage = a.per_token ? 0 : a.advantages.as<float>()[run.sequence];
        r.mask = a.mask ? a.mask.as<uint8_t>() + run.begin : nullptr;
        r.faulty = parts[i].faulty;
        r.d_log_probs = a.d_log_probs.as<float>() + run.begin;
        r.d_entropy = a.d_entropy ? a.d_entropy.as<float>() + run.begin : nullptr;
        r.n = run.size;
        r.objective = a.objective;
        r.kl = a.kl;
        r.low = static_cast<float>(1 - a.clip_low);
        r.high = static_cast<float>(1 + a.clip_high);
        r.dual_clip = a.dual_clip > 0 ? static_cast<float>(a.dual_clip) : kInfinity;
        r.clip_low = static_cast<float>(a.clip_low);
        r.clip_high = static_cast<float>(a.clip_high);
        r.delta = a.delta > 0 ? static_cast<float>(a.delta) : kInfinity;
        r.kl_unbiased = a.kl_unbiased;
        r.tau_positive = static_cast<float>(a.tau_positive);
        r.tau_negative = static_cast<float>(a.tau_negative);
        r.kl_clamp = a.kl_clamp > 0 ? static_cast<float>(a.kl_clamp) : kInfinity;
        r.sequence_ratio = static_cast<float>(std::exp(log_ratio.value));
        r.sequence_inside = log_ratio.inside;
        if (a.objective == Objective::vespo) {
          r.phi_positive = phi(a.k_positive, a.lambda_positive);
          r.phi_negative = phi(a.k_negative, a.lambda_negative);
        }
        r.policy_weight = static_cast<float>(sequence.policy_weight);
        r.kl_weight = static_cast<float>(a.kl_coef * sequence.term_weight);
        r.entropy_weight = static_cast<float>(-a.entropy_coef * sequence.term_weight);
        cpu.simd().policy_run(&r, parts[i].sums);
      }
    });

    double sums[kLossSums] = {};
    for (int64_t i = 0; i < count; ++i) {
      const Sequence& sequence = of[table.runs[i].sequence];
      if (sequence.kept == 0) continue;
      for (int k = 0; k < kLossSums; ++k)
        sums[k] +=
            loss_sum_weight(k, sequence.policy_weight, sequence.term_weight) * parts[i].sums[k];
    }
    loss_metrics(sums, tokens, a.kl_coef, a.entropy_coef, a.metrics.as<float>());
    a.loss.as<float>()[0] = a.metrics.as<float>()[0];
  });
}

}  // namespace p2r::cpu
