// Three loops: count the kept tokens of every run (the gradient needs the divisors), add the counts
// in order, then compute loss terms and gradients run by run and add the runs' sums in order. Runs,
// not sequences, are the tasks of the threads, so one long sequence is parallel too.
//
// clip_cov and kl_cov choose a few tokens of the batch. The main loop takes none as chosen and
// lists candidates, few of which are left once some runs have shown how high the covariance must
// be; afterwards the chosen tokens' terms are computed once more, and the difference is added. So a
// batch is read once more than for ppo, in the first loop, for the mean of its log-probabilities.
//
// Time of the objectives by ppo's on Zen 5, 512 x 1024 tokens in the cache, AVX-512 and AVX2, one
// thread: dppo_tv 1.13, 1.15; dppo_kl 1.25, 1.24 where no token is near its bound, and up
// to 2.9, 2.5 where one in each vector is; gmpo 1.03, 0.95; vespo 1.05, 1.00; luspo 0.94, 0.87;
// clip_cov 1.33 with AVX-512: 0.13 the mean, as fast as the cache is read, 0.05 candidates, of
// which one in 15 vectors has one, which no branch predictor foresees, and 0.03 the 100 chosen
// tokens; kl_cov 0.97. With two hyperthreads of one core clip_cov is at 1.35 and kl_cov at 1.24.
#include "ops/policy_loss.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <mutex>

#include "cpu/device.h"
#include "cpu/simd/arguments.h"
#include "ops/advantages.h"
#include "ops/half.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kRunGrain = 4, kChosenGrain = 64;
constexpr int64_t kOffered = 256;  // ranks at once, at least
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Sequence {
  double kept = 0, log_ratio = 0;  // the sum of its log_ratio_term
  double policy_weight = 0, term_weight = 0;
};
struct RunSums {
  bool faulty = false;
  double kept = 0, log_ratio = 0, sums[kLossSums] = {};
  double advantages = 0, log_probs = 0;  // for covariances
};

// What a chosen token changes in the policy terms of its run.
struct Change {
  int64_t run;
  double policy;
};

// The highest `most` of the ranks that threads offer. `items` has room for 2 most + kRanks.
class Highest {
 public:
  static constexpr int64_t kRanks = 2 * kLossRun;
  // A thread's ranks that are not offered yet. They are offered some hundred at a time: threads
  // that wait for each other at every run would lose more time than all of this takes.
  struct Pending {
    int64_t size;
    uint64_t ranks[kRanks];
  };
  Highest(uint64_t* items, int64_t most) : items_(items), most_(most) {}
  void offer(Pending& pending) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::copy(pending.ranks, pending.ranks + pending.size, items_ + size_);
    size_ += pending.size;
    pending.size = 0;
    if (size_ < 2 * most_) return;
    keep_highest(most_);
    least_key_.store(static_cast<uint32_t>(items_[most_ - 1] >> 32), std::memory_order_relaxed);
  }
  // Ranks of lower keys need not be offered.
  uint32_t least_key() const { return least_key_.load(std::memory_order_relaxed); }
  // The n highest of all; returns how many there are.
  int64_t keep_highest(int64_t n) {
    if (size_ <= n) return size_;
    std::nth_element(items_, items_ + n - 1, items_ + size_, std::greater<uint64_t>());
    return size_ = n;
  }

 private:
  uint64_t* items_;
  const int64_t most_;
  int64_t size_ = 0;
  std::mutex mutex_;
  std::atomic<uint32_t> least_key_{0};
};

const float* from(const View& v, int64_t t) { return v ? v.as<float>() + t : nullptr; }

void count_run(const PolicyLossArgs& a, const LossRun& run, const Simd& simd, RunSums& out) {
  const uint8_t* mask = a.mask ? a.mask.as<uint8_t>() + run.begin : nullptr;
  out.faulty = false;
  const int64_t kept = mask ? simd.count_kept(mask, run.size, &out.faulty) : run.size;
  if (out.faulty) raise_invalid_mask(a.fault, mask, run.begin, run.size);
  double log_ratio = 0;
  const float *now = from(a.log_probs, run.begin), *old = from(a.old_log_probs, run.begin);
  const float* advantages = a.advantages.as<float>() + (a.per_token ? run.begin : run.sequence);
  if (a.objective == Objective::vespo && a.importance_weights) {
    const float* importance = from(a.importance_weights, run.begin);
    for (int32_t t = 0; t < run.size; ++t)
      if (!mask || mask[t])
        log_ratio += log_ratio_term(
            a.objective, a.clip_low, a.clip_high, advantages[a.per_token ? t : 0],
            old ? double(now[t]) - double(old[t]) : 0, std::log(double(importance[t])));
  } else if (by_sequence(a.objective) && old) {
    PolicyRun r = {};
    r.log_probs = now;
    r.old_log_probs = old;
    r.advantages = a.per_token ? advantages : nullptr;
    r.advantage = a.per_token ? 0 : *advantages;
    r.mask = mask;
    r.n = run.size;
    r.objective = a.objective;
    r.clip_low = static_cast<float>(a.clip_low);
    r.clip_high = static_cast<float>(a.clip_high);
    log_ratio = simd.sum_log_ratios(&r);
  }
  out.kept = static_cast<double>(kept);
  out.log_ratio = log_ratio;
  if (!by_covariance(a.objective)) return;
  out.log_probs = simd.sum_kept(from(a.log_probs, run.begin), mask, run.size);
  out.advantages = a.per_token ? simd.sum_kept(from(a.advantages, run.begin), mask, run.size)
                   : kept > 0  ? double(a.advantages.as<float>()[run.sequence]) * out.kept
                               : 0;
}

bool counts_tokens(Aggregation how) { return how == Aggregation::token_mean; }

// The least entropy whose token keeps its policy term. keys: room for T.
float least_entropy(const PolicyLossArgs& a, uint32_t* keys) {
  const float* entropy = a.entropy.as<float>();
  const uint8_t* mask = a.mask ? a.mask.as<uint8_t>() : nullptr;
  int64_t n = 0;
  for (int64_t t = 0; t < a.entropy.shape[0]; ++t)
    if (!mask || mask[t]) {
      const float x = entropy[t];
      keys[n++] = x == x ? ordered_bits(bits_of_f32(x)) : 0xFFFFFFFF;
    }
  if (n == 0) return -kInfinity;
  const int64_t first = first_of_top(a.top_entropy, n);
  std::nth_element(keys, keys + first, keys + n);
  return f32_of_bits(from_ordered_bits(keys[first]));
}

// What all runs of a batch share, and each run's part.
struct Batch {
  float mean_advantage = 0, mean_log_prob = 0;  // for covariances
  float least_entropy = -kInfinity;
};

PolicyRun run_of(const PolicyLossArgs& a, const Batch& batch, const LossRun& run,
                 const Sequence& sequence, bool faulty) {
  const SequenceLogRatio log_ratio =
      sequence_log_ratio(a.objective, sequence.log_ratio, sequence.kept);
  const auto phi = [&](double k, double lambda) {
    return static_cast<float>(
        std::exp(lambda + k * log_ratio.value - lambda * std::exp(log_ratio.value)));
  };
  PolicyRun r = {};
  r.log_probs = from(a.log_probs, run.begin);
  r.old_log_probs = from(a.old_log_probs, run.begin);
  r.ref_log_probs = from(a.ref_log_probs, run.begin);
  r.entropy = from(a.entropy, run.begin);
  r.importance = from(a.importance_weights, run.begin);
  r.advantages = a.per_token ? from(a.advantages, run.begin) : nullptr;
  r.advantage = a.per_token ? 0 : a.advantages.as<float>()[run.sequence];
  r.mask = a.mask ? a.mask.as<uint8_t>() + run.begin : nullptr;
  r.faulty = faulty;
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
  r.mean_advantage = batch.mean_advantage;
  r.mean_log_prob = batch.mean_log_prob;
  r.cov_low = static_cast<float>(a.cov_low);
  r.cov_high = static_cast<float>(a.cov_high);
  r.cov_kl = static_cast<float>(a.cov_kl);
  r.least_entropy = batch.least_entropy;
  r.policy_weight = static_cast<float>(sequence.policy_weight);
  r.kl_weight = static_cast<float>(a.kl_coef * sequence.term_weight);
  r.entropy_weight = static_cast<float>(-a.entropy_coef * sequence.term_weight);
  return r;
}

// A run of an objective of covariances, whose candidates are offered to `highest`.
void run_and_offer(const PolicyLossArgs& a, const Simd& simd, const LossRun& run, PolicyRun& r,
                   Highest& highest, Highest::Pending& pending, double* sums) {
  const bool of_kl = a.objective == Objective::kl_cov;
  const uint32_t least_key = highest.least_key();
  int32_t candidates[kLossRun + kMaxLanes];
  int64_t count = 0;
  r.candidates = candidates;
  r.candidate_count = &count;
  if (of_kl) r.cov_low = least_key ? f32_of_bits(from_ordered_bits(least_key)) : -kInfinity;
  simd.policy_run(&r, sums);
  for (int64_t j = 0; j < count; ++j) {
    const int32_t i = candidates[j];
    const int64_t token = run.begin + i;
    const float advantage = r.advantages ? r.advantages[i] : r.advantage;
    const float covariance = (advantage - r.mean_advantage) * (r.log_probs[i] - r.mean_log_prob);
    const uint32_t key = of_kl ? ordered_bits(bits_of_f32(covariance))
                               : random_key(a.cov_seed, static_cast<uint32_t>(token));
    pending.ranks[pending.size] = choice_rank(key, token);
    pending.size += key >= least_key;
  }
  if (pending.size >= kOffered) highest.offer(pending);
}

}  // namespace

void policy_loss(const PolicyLossArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  LossRuns table = loss_runs(a.cu_seqlens);
  GroupIndex groups;
  if (!a.groups.empty()) groups = index_groups(a.groups);
  const int64_t count = static_cast<int64_t>(table.runs.size());
  const int64_t sequences = static_cast<int64_t>(table.starts.size()) - 1;
  const int64_t all_tokens = a.log_probs.shape[0];
  const int64_t most =
      by_covariance(a.objective) ? chosen_of(a.cov_ratio, static_cast<double>(all_tokens)) : 0;
  const bool by_entropy = a.top_entropy < 1;
  Scratch run_scratch = device.scratch(count * sizeof(RunSums));
  Scratch sequence_scratch = device.scratch(sequences * sizeof(Sequence));
  Scratch rank_scratch = device.scratch(
      most ? (2 * most + Highest::kRanks) * static_cast<int64_t>(sizeof(uint64_t)) : 0);
  Scratch pending_scratch =
      device.scratch(most ? cpu.threads() * static_cast<int64_t>(sizeof(Highest::Pending)) : 0);
  Scratch change_scratch = device.scratch(most * static_cast<int64_t>(sizeof(Change)));
  Scratch key_scratch = device.scratch(by_entropy ? all_tokens * 4 : 0);
  cpu.submit([=, &cpu, table = std::move(table), groups = std::move(groups),
              parts = run_scratch.as<RunSums>(), of = sequence_scratch.as<Sequence>(),
              ranks = rank_scratch.as<uint64_t>(), pending = pending_scratch.as<Highest::Pending>(),
              changes = change_scratch.as<Change>(), keys = key_scratch.as<uint32_t>()] {
    cpu.parallel(count, kRunGrain, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) count_run(a, table.runs[i], cpu.simd(), parts[i]);
    });

    double tokens = 0, rows = 0, advantages = 0, log_probs = 0;
    for (int64_t s = 0; s < sequences; ++s) {
      of[s] = Sequence{};
      for (int64_t i = table.starts[s]; i < table.starts[s + 1]; ++i) {
        of[s].kept += parts[i].kept;
        of[s].log_ratio += parts[i].log_ratio;
        advantages += parts[i].advantages;
        log_probs += parts[i].log_probs;
      }
      tokens += of[s].kept;
      rows += a.count_empty || of[s].kept > 0;
    }
    // `kept`: the tokens among which a mean is taken, of a sequence or a prompt; `counted` of
    // these.
    const auto weigh = [&](Sequence& sequence, Aggregation how, double kept, double counted) {
      const bool given = a.normalizer > 0 && counts_tokens(how) == counts_tokens(a.aggregation);
      return sequence.kept > 0 ? loss_weight(how, kept, given ? a.normalizer : tokens,
                                             given ? a.normalizer : counted, a.loss_scale)
                               : 0;
    };
    double prompts = 0;
    const auto kept_of = [&](int64_t g) {
      double kept = 0;
      for (int32_t j = groups.starts[g]; j < groups.starts[g + 1]; ++j)
        kept += of[groups.order[j]].kept;
      return kept;
    };
    const int64_t group_count = groups.starts.empty() ? 0 : groups.count();
    for (int64_t g = 0; g < group_count; ++g) prompts += a.count_empty || kept_of(g) > 0;
    for (int64_t s = 0; s < sequences; ++s) {
      of[s].policy_weight = weigh(of[s], a.aggregation, of[s].kept, rows);
      of[s].term_weight = weigh(of[s], a.term_aggregation, of[s].kept, rows);
    }
    for (int64_t g = 0; g < group_count; ++g) {
      const double kept = kept_of(g);
      for (int32_t j = groups.starts[g]; j < groups.starts[g + 1]; ++j) {
        Sequence& sequence = of[groups.order[j]];
        if (a.aggregation == Aggregation::prompt_mean)
          sequence.policy_weight = weigh(sequence, a.aggregation, kept, prompts);
        if (a.term_aggregation == Aggregation::prompt_mean)
          sequence.term_weight = weigh(sequence, a.term_aggregation, kept, prompts);
      }
    }

    Batch batch;
    if (tokens > 0) {
      batch.mean_advantage = static_cast<float>(advantages / tokens);
      batch.mean_log_prob = static_cast<float>(log_probs / tokens);
    }
    if (by_entropy) batch.least_entropy = least_entropy(a, keys);
    Highest highest(ranks, most);
    for (int thread = 0; most && thread < cpu.threads(); ++thread) pending[thread].size = 0;
    cpu.parallel(count, kRunGrain, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t i = begin; i < end; ++i) {
        const LossRun& run = table.runs[i];
        PolicyRun r = run_of(a, batch, run, of[run.sequence], parts[i].faulty);
        if (most)
          run_and_offer(a, cpu.simd(), run, r, highest, pending[thread], parts[i].sums);
        else
          cpu.simd().policy_run(&r, parts[i].sums);
      }
    });
    if (most && tokens > 0) {
      for (int thread = 0; thread < cpu.threads(); ++thread) highest.offer(pending[thread]);
      const int64_t chosen = highest.keep_highest(chosen_of(a.cov_ratio, tokens));
      const auto token_of = [&](int64_t j) {
        return static_cast<int64_t>(0xFFFFFFFF - static_cast<uint32_t>(ranks[j]));
      };
      std::sort(ranks, ranks + chosen, [](uint64_t x, uint64_t y) {
        return static_cast<uint32_t>(x) > static_cast<uint32_t>(y);
      });
      cpu.parallel(chosen, kChosenGrain, [&](int64_t begin, int64_t end, int) {
        const auto first =
            std::upper_bound(table.runs.begin(), table.runs.end(), token_of(begin),
                             [](int64_t token, const LossRun& run) { return token < run.begin; });
        int64_t i = first - table.runs.begin() - 1;
        for (int64_t j = begin; j < end; ++j) {
          const int64_t token = token_of(j);
          while (i + 1 < count && table.runs[i + 1].begin <= token) ++i;
          const LossRun& run = table.runs[i];
          PolicyRun r = run_of(a, batch, run, of[run.sequence], parts[i].faulty);
          r.chosen = true;
          changes[j] = {i, cpu.simd().choose_token(&r, token - run.begin)};
        }
      });
      for (int64_t j = 0; j < chosen; ++j) {
        double* sums = parts[changes[j].run].sums;
        sums[kPolicySum] += changes[j].policy;
        sums[kDualClippedSum] += 1;
      }
    }

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

void apply_kl_penalty(const ApplyKlPenaltyArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  cpu.launch(a.rewards.shape[0], 1, [=, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t first = a.cu_seqlens[s], n = a.cu_seqlens[s + 1] - first;
      const uint8_t* mask = a.mask ? a.mask.as<uint8_t>() + first : nullptr;
      bool wrong = false;
      double total = simd.kl_sum(a.kl, from(a.log_probs, first), from(a.ref_log_probs, first), mask,
                                 n, a.kl_clamp > 0 ? a.kl_clamp : double(kInfinity), &wrong);
      if (wrong) {
        raise_invalid_mask(a.fault, mask, first, n);
        total = std::numeric_limits<double>::quiet_NaN();
      }
      const double penalty = a.kl_coef != 0 ? a.kl_coef * total : 0;
      a.out.as<float>()[s] = static_cast<float>(a.rewards.as<float>()[s] - penalty);
    }
  });
}

}  // namespace p2r::cpu
