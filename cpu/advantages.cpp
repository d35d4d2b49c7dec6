// Advantages: threads take groups, in f64. What the whole batch decides (its standard deviation,
// whitening) is one thread's loop over a value for each sequence.
#include "ops/advantages.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/device.h"
#include "ops/half.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kGroupGrain = 64;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// The members of one group and their rewards of one kind. NaN: the sequence does not count.
struct Group {
  const int32_t* members;
  int64_t size;
  const double* rewards;
  int64_t kinds, kind;
  double operator[](int64_t i) const { return rewards[members[i] * kinds + kind]; }
};

RewardStats stats_of(const Group& g) {
  RewardStats s = {true, 0, kInfinity, -kInfinity, 0};
  for (int64_t i = 0; i < g.size; ++i) {
    if (std::isnan(g[i])) continue;
    s.finite &= std::isfinite(g[i]);
    s.low = std::fmin(s.low, g[i]);
    s.high = std::fmax(s.high, g[i]);
    s.mean += g[i];
    s.n += 1;
  }
  s.mean = s.finite ? s.mean / s.n : kNan;
  return s;
}

double deviation(const Group& g, double mean, double n) {
  double squares = 0;
  for (int64_t i = 0; i < g.size; ++i)
    if (!std::isnan(g[i])) squares += (g[i] - mean) * (g[i] - mean);
  return std::sqrt(squares / (n - 1));
}

// The estimator's own baseline over a group of at least two, where it is not the mean.
double own_baseline(const GroupAdvantagesArgs& a, const Group& g, const RewardStats& s,
                    const double* lengths) {
  if (a.estimator == Estimator::grpo_passk) {
    double best = -kInfinity, second = -kInfinity;
    for (int64_t i = 0; i < g.size; ++i)
      if (g[i] > best) {
        second = best;
        best = g[i];
      } else if (g[i] > second) {
        second = g[i];
      }
    return second;
  }
  double tokens = 0, weighted = 0;
  for (int64_t i = 0; i < g.size; ++i) {
    if (std::isnan(g[i])) continue;
    tokens += lengths[g.members[i]];
    weighted += lengths[g.members[i]] * g[i];
  }
  return tokens > 0 ? weighted / tokens : s.mean;
}

// Over the batch, for scale 'batch' and gpg.
struct BatchStats {
  double std = 1, alpha = 1;
};

// Adds weight * the advantage to each member's entry of `out`.
void add_advantages(const GroupAdvantagesArgs& a, const Group& g, double weight,
                    const double* lengths, const BatchStats& batch, double* out) {
  const RewardStats s = stats_of(g);
  const bool own = a.estimator == Estimator::opo || a.estimator == Estimator::grpo_passk;
  const bool several = s.finite && s.n > 1;
  const bool by_std = takes_scale(a.estimator) || a.estimator == Estimator::gdpo;
  const Baseline b =
      baseline_of(a.estimator, a.scale, a.epsilon, a.singleton_zero, s,
                  several && by_std ? deviation(g, s.mean, s.n) : 0,
                  several && own ? own_baseline(a, g, s, lengths) : s.mean, batch.std, batch.alpha);
  if (b.is_zero) return;
  for (int64_t i = 0; i < g.size; ++i) {
    if (std::isnan(g[i])) continue;
    const double above = g[i] - b.baseline;
    if (a.estimator == Estimator::grpo_passk && above <= 0) continue;
    out[g.members[i]] += weight * (above / b.divisor);
  }
}

// b_t of a group and the advantages of its tokens. cumulative: scratch, W_t of each token.
void token_advantages(const GroupAdvantagesArgs& a, const Group& g, double* cumulative) {
  const RewardStats s = stats_of(g);
  const float *log_probs = a.log_probs.as<float>(), *squared = a.squared_probs.as<float>(),
              *importance = a.importance_weights.as<float>();
  const uint8_t* mask = a.mask.as<uint8_t>();
  float* out = a.advantages.as<float>();
  const bool alone = s.n == 1, equal = s.finite && !alone && !(s.high > s.low);
  int64_t longest = 0;
  // Past the last kept token of all sequences, and of all but one.
  int64_t last_end = 0, second_end = 0;
  for (int64_t i = 0; i < g.size; ++i) {
    const int64_t begin = a.cu_seqlens[g.members[i]], end = a.cu_seqlens[g.members[i] + 1];
    longest = std::max(longest, end - begin);
    double total = 0;
    int64_t kept_end = 0;
    for (int64_t t = begin; t < end; ++t) {
      const double w = importance ? importance[t] : 1;
      if (!mask || mask[t]) {
        total += w * w * (1 - 2 * std::exp(double{log_probs[t]}) + double{squared[t]});
        kept_end = t + 1 - begin;
      }
      cumulative[t] = total;
    }
    if (std::isnan(g[i])) continue;
    second_end = std::max(second_end, std::min(last_end, kept_end));
    last_end = std::max(last_end, kept_end);
  }
  for (int64_t at = 0; at < longest; ++at) {
    double weighted = 0, weights = 0;
    const auto token = [&](int64_t i) {
      const int64_t t = a.cu_seqlens[g.members[i]] + at;
      return t < a.cu_seqlens[g.members[i] + 1] ? t : -1;
    };
    const auto kept = [&](int64_t t) { return t >= 0 && (!mask || mask[t]); };
    for (int64_t i = 0; i < g.size; ++i) {
      const int64_t t = token(i);
      if (!kept(t) || std::isnan(g[i])) continue;
      weighted += g[i] * cumulative[t];
      weights += cumulative[t];
    }
    const bool without = alone || (a.zero_tail && at >= second_end);
    const double baseline = without ? 0 : weighted / (weights + 1e-8);
    for (int64_t i = 0; i < g.size; ++i) {
      const int64_t t = token(i);
      if (t < 0) continue;
      const bool zero = !kept(t) || std::isnan(g[i]) ||
                        (s.finite && ((equal && !without) || (alone && a.singleton_zero)));
      out[t] = static_cast<float>(zero ? 0 : s.finite ? g[i] - baseline : kNan);
    }
  }
}

void whiten(const double* lengths, double* values, int64_t n) {
  double tokens = 0, total = 0, squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    tokens += lengths[i];
    total += lengths[i] * values[i];
  }
  const double mean = total / (tokens + 1e-8);
  for (int64_t i = 0; i < n; ++i) squares += lengths[i] * (values[i] - mean) * (values[i] - mean);
  const double variance = squares / (tokens + 1e-8) * tokens / (tokens - 1);
  for (int64_t i = 0; i < n; ++i)
    values[i] = tokens > 1 ? (values[i] - mean) / std::sqrt(variance + 1e-8) : 0;
}

// Whether a sequence counts: one of its kinds does.
bool counts(const double* rewards, int64_t kinds, int64_t i) {
  for (int64_t k = 0; k < kinds; ++k)
    if (!std::isnan(rewards[i * kinds + k])) return true;
  return false;
}

// normalize_then_sum: the second normalization, over the sequences that count.
void normalize(const double* rewards, int64_t kinds, double epsilon, double* values, int64_t n) {
  double count = 0, total = 0, squares = 0, low = kInfinity, high = -kInfinity;
  for (int64_t i = 0; i < n; ++i) {
    if (!counts(rewards, kinds, i)) continue;
    count += 1;
    total += values[i];
    low = std::fmin(low, values[i]);
    high = std::fmax(high, values[i]);
  }
  const double mean = total / count;
  for (int64_t i = 0; i < n; ++i)
    if (counts(rewards, kinds, i)) squares += (values[i] - mean) * (values[i] - mean);
  const double divisor = std::sqrt(squares / (count - 1)) + epsilon;
  const bool equal = low == high && std::isfinite(mean);
  for (int64_t i = 0; i < n; ++i) values[i] = equal ? 0 : (values[i] - mean) / divisor;
}

BatchStats batch_stats(const double* rewards, int64_t n) {
  double count = 0, nonzero = 0, total = 0, squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(rewards[i])) continue;
    count += 1;
    nonzero += rewards[i] != 0;
    total += rewards[i];
  }
  for (int64_t i = 0; i < n; ++i)
    if (!std::isnan(rewards[i]))
      squares += (rewards[i] - total / count) * (rewards[i] - total / count);
  return {count > 1 ? std::sqrt(squares / (count - 1)) : 1, count / std::fmax(nonzero, 1)};
}

// The rewards in f64, a row of `kinds` for each sequence; NaN where one does not count.
void read_rewards(const GroupAdvantagesArgs& a, const double* lengths, int64_t n, int64_t kinds,
                  double* out) {
  const int64_t given = static_cast<int64_t>(a.weights.size());
  const bool summed = a.combine == Combine::sum_then_normalize;
  for (int64_t i = 0; i < n; ++i) {
    const bool skipped = a.skip_empty && lengths[i] == 0;
    const auto checked = [&](float r, int64_t position) -> double {
      if (std::isfinite(r) || (a.combine != Combine::separate && std::isnan(r))) return r;
      raise(a.fault, position, bits_of_f32(r));
      return kInfinity;  // NaN would not count
    };
    double total = 0;
    bool any = false;
    for (int64_t k = 0; k < given; ++k) {
      const double r = checked(a.rewards.as<float>()[i * given + k], i * given + k);
      if (!summed) out[i * kinds + k] = skipped ? kNan : r;
      if (std::isnan(r)) continue;
      any = true;
      total += a.weights[k] * r;
    }
    if (summed) out[i] = any && !skipped ? total : kNan;
    if (a.baselines) out[i] -= checked(a.baselines.as<float>()[i], n * given + i);
  }
}

}  // namespace

void group_advantages(const GroupAdvantagesArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t n = a.rewards.shape[0], tokens = a.log_probs.size();
  if (!a.advantages.size()) return;
  const bool by_token = a.estimator == Estimator::opt_baseline;
  const bool summed = a.combine == Combine::sum_then_normalize;
  const int64_t kinds = summed ? 1 : static_cast<int64_t>(a.weights.size());
  Scratch scratch = device.scratch((2 + kinds) * n * sizeof(double));
  Scratch token_scratch = device.scratch(tokens * sizeof(double));
  cpu.submit([=, &cpu, values = scratch.as<double>(), cumulative = token_scratch.as<double>(),
              index = index_groups(a.groups)] {
    double *lengths = values + n, *rewards = lengths + n;
    for (int64_t i = 0; i < n; ++i) {
      values[i] = 0;
      lengths[i] = a.lengths.empty() ? 0 : static_cast<double>(a.lengths[i]);
    }
    if (a.mask)
      cpu.parallel(n, kGroupGrain, [&](int64_t begin, int64_t end, int) {
        const uint8_t* mask = a.mask.as<uint8_t>();
        for (int64_t i = begin; i < end; ++i) {
          int64_t kept = 0;
          bool wrong = false;
          for (int64_t t = a.cu_seqlens[i]; t < a.cu_seqlens[i + 1]; ++t) {
            kept += mask[t];
            if (mask[t] > 1) raise(a.fault, t, mask[t], true);
            wrong |= mask[t] > 1;
          }
          lengths[i] = wrong ? kNan : static_cast<double>(kept);
        }
      });
    read_rewards(a, lengths, n, kinds, rewards);
    for (int64_t i = 0; i < n; ++i)
      if (!counts(rewards, kinds, i)) lengths[i] = 0;
    const BatchStats batch = kinds == 1 ? batch_stats(rewards, n) : BatchStats{};
    cpu.parallel(index.count(), by_token ? 1 : kGroupGrain, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t k = 0; k < kinds; ++k) {
          const int32_t first = index.starts[i];
          const Group group = {index.order.data() + first, index.starts[i + 1] - first, rewards,
                               kinds, k};
          if (by_token)
            token_advantages(a, group, cumulative);
          else
            add_advantages(a, group, summed ? 1 : a.weights[k], lengths, batch, values);
        }
    });
    if (by_token) return;
    if (whitens(a.estimator)) whiten(lengths, values, n);
    if (a.combine == Combine::normalize_then_sum) normalize(rewards, kinds, a.epsilon, values, n);
    for (int64_t i = 0; i < n; ++i)
      a.advantages.as<float>()[i] = static_cast<float>(counts(rewards, kinds, i) ? values[i] : 0);
  });
}

void informative_groups(const InformativeGroupsArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  cpu.submit([=, &cpu, index = index_groups(a.groups)] {
    cpu.parallel(index.count(), kGroupGrain, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int32_t first = index.starts[i];
        const int32_t* members = index.order.data() + first;
        const int64_t size = index.starts[i + 1] - first;
        const float* rewards = a.rewards.as<float>();
        float low = rewards[members[0]], high = low;
        bool finite = true;
        for (int64_t j = 0; j < size; ++j) {
          if (!std::isfinite(rewards[members[j]])) {
            raise(a.fault, members[j], bits_of_f32(rewards[members[j]]));
            finite = false;
          }
          low = std::fmin(low, rewards[members[j]]);
          high = std::fmax(high, rewards[members[j]]);
        }
        for (int64_t j = 0; j < size; ++j)
          a.informative.as<uint8_t>()[members[j]] = finite && (high > low || size == 1);
      }
    });
  });
}

}  // namespace p2r::cpu
