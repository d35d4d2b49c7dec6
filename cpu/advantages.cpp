// Group-relative advantages: threads take groups, in f64.
#include "ops/advantages.h"

#include <cmath>
#include <limits>

#include "cpu/device.h"
#include "ops/half.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kGroupGrain = 64;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// The members of one group and their rewards of one kind.
struct Group {
  const int32_t* members;
  int64_t size;
  const float* rewards;
  int64_t kinds, kind;
  int64_t position(int64_t i) const { return members[i] * kinds + kind; }
  double operator[](int64_t i) const { return rewards[position(i)]; }
};

enum class Spread { equal, different, not_finite };

Spread spread_of(const Group& g) {
  double low = g[0], high = g[0];
  for (int64_t i = 0; i < g.size; ++i) {
    if (!std::isfinite(g[i])) return Spread::not_finite;
    low = std::fmin(low, g[i]);
    high = std::fmax(high, g[i]);
  }
  return high > low ? Spread::different : Spread::equal;
}

// Raises the first reward of the group that is not finite.
void raise_not_finite(const Group& g, const FaultFlag& fault) {
  for (int64_t i = 0; i < g.size; ++i)
    if (!std::isfinite(g[i]))
      return raise(fault, g.position(i), bits_of_f32(static_cast<float>(g[i])));
}

// Adds weight * the group-relative advantage to each member's entry of `out`.
void add_relative(const GroupAdvantagesArgs& a, const Group& g, double weight,
                  const double* lengths, double* out) {
  const Spread spread = spread_of(g);
  const bool scaled = a.estimator == Estimator::grpo || a.estimator == Estimator::gdpo;
  if (spread == Spread::not_finite) {
    for (int64_t i = 0; i < g.size; ++i) out[g.members[i]] = kNan;
    return raise_not_finite(g, a.fault);
  }
  if (g.size == 1) {
    if (!a.singleton_zero) out[g.members[0]] += weight * g[0] / (scaled ? 1 + a.epsilon : 1);
    return;
  }
  if (spread == Spread::equal) return;
  const double n = static_cast<double>(g.size);
  double total = 0, squares = 0;
  for (int64_t i = 0; i < g.size; ++i) total += g[i];
  double base = total / n, scale = 1;
  if (scaled) {
    for (int64_t i = 0; i < g.size; ++i) squares += (g[i] - base) * (g[i] - base);
    scale = 1 / (std::sqrt(squares / (n - 1)) + a.epsilon);
  } else if (a.estimator == Estimator::rloo) {
    scale = n / (n - 1);
  } else if (a.estimator == Estimator::opo) {
    double tokens = 0, weighted = 0;
    for (int64_t i = 0; i < g.size; ++i) {
      tokens += lengths[g.members[i]];
      weighted += lengths[g.members[i]] * g[i];
    }
    if (tokens > 0) base = weighted / tokens;
  }
  for (int64_t i = 0; i < g.size; ++i) out[g.members[i]] += weight * (g[i] - base) * scale;
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

}  // namespace

void group_advantages(const GroupAdvantagesArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t n = a.advantages.size();
  if (!n) return;
  Scratch scratch = device.scratch(2 * n * sizeof(double));
  double* values = scratch.as<double>();
  cpu.submit([=, &cpu, index = index_groups(a.groups)] {
    double* lengths = values + n;
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
    const int64_t kinds = static_cast<int64_t>(a.weights.size());
    cpu.parallel(index.count(), kGroupGrain, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t k = 0; k < kinds; ++k) {
          const int32_t first = index.starts[i];
          const Group group = {index.order.data() + first, index.starts[i + 1] - first,
                               a.rewards.as<float>(), kinds, k};
          add_relative(a, group, a.weights[k], lengths, values);
        }
    });
    if (whitens(a.estimator)) whiten(lengths, values, n);
    for (int64_t i = 0; i < n; ++i) a.advantages.as<float>()[i] = static_cast<float>(values[i]);
  });
}

void informative_groups(const InformativeGroupsArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  cpu.submit([=, &cpu, index = index_groups(a.groups)] {
    cpu.parallel(index.count(), kGroupGrain, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int32_t first = index.starts[i];
        const Group group = {index.order.data() + first, index.starts[i + 1] - first,
                             a.rewards.as<float>(), 1, 0};
        const Spread spread = spread_of(group);
        if (spread == Spread::not_finite) raise_not_finite(group, a.fault);
        const bool informative =
            spread == Spread::different || (spread == Spread::equal && group.size == 1);
        for (int64_t j = 0; j < group.size; ++j)
          a.informative.as<uint8_t>()[group.members[j]] = informative;
      }
    });
  });
}

}  // namespace p2r::cpu
