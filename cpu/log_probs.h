// The arithmetic of one row of logits, shared by logits in memory (cpu/log_probs.cpp) and logits
// that are computed block by block (cpu/linear_log_probs/).
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/simd/arguments.h"
#include "cpu/simd/simd.h"
#include "ops/integer.h"
#include "ops/log_probs.h"

namespace p2r::cpu {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Of a row or a part of one: its maximum, Σ e^d and the extra sum.
struct Sums {
  double maximum = -kInfinity, sum = 0, extra = 0;
};

// A part's sums relative to another maximum; log-ratios are (difference of maxima) * inverse.
inline Sums rescaled(const Sums& s, double maximum, double inverse, SoftmaxExtra extra) {
  const double shift = s.maximum == maximum ? 0 : (s.maximum - maximum) * inverse;
  const double scale = shift == 0 ? 1 : std::exp(shift);
  // The shift may be infinite where exp(shift) is 0, and 0 * inf is NaN; a NaN of the part
  // remains.
  if (scale == 0) return {maximum, 0 * s.sum, 0 * s.extra};
  const double further = extra == SoftmaxExtra::squares ? scale * s.extra : s.extra + shift * s.sum;
  return {maximum, scale * s.sum, scale * further};
}

// Adds a part whose maximum and sums are given.
inline void merge(Sums& into, const Sums& part, double inverse, SoftmaxExtra extra) {
  if (part.sum == 0) return;
  const double maximum = part.maximum > into.maximum ? part.maximum : into.maximum;
  const Sums b = rescaled(part, maximum, inverse, extra);
  if (into.sum == 0) {
    into = b;
    return;
  }
  const Sums a = rescaled(into, maximum, inverse, extra);
  into = {maximum, a.sum + b.sum, a.extra + b.extra};
}

constexpr int64_t kMaxSpans = 128;

// Columns that are summed at once, a whole number of steps: few enough spans that merging them
// costs little beside the sums, and enough of them for many threads.
inline int64_t sum_span(int64_t columns) {
  constexpr int64_t kFewSpans = 8, kFewColumns = 6 * kSoftmaxColumns;
  const int64_t least = std::min(ceil_div(columns, kFewSpans), kFewColumns);
  return round_up(std::max({ceil_div(columns, kMaxSpans), least, int64_t{1}}), kSoftmaxColumns);
}

// A row's sums from those of its spans, in their order.
inline Sums merge_spans(const Simd& simd, const float* partials, int64_t spans, double inverse,
                        SoftmaxExtra extra) {
  float row[3];
  simd.softmax_spans(spans, static_cast<float>(inverse), extra, partials, row);
  return {row[0], row[1], row[2]};
}

// (m, log s) with m rounded first; log s of an empty row is -inf.
inline void write_stats(const Sums& row, double inverse, float* stats) {
  const double maximum = row.maximum * inverse;
  stats[0] = static_cast<float>(maximum);
  const double residue = std::isfinite(stats[0]) ? maximum - stats[0] : 0;
  stats[1] = static_cast<float>(std::log(row.sum) + residue);
}

// The results of a row; the defaults are those of a skipped one.
struct RowLogProb {
  float log_prob = 0, extra = 0, stats[2] = {0, 0};  // extra: the entropy, or Σ p²
};
constexpr RowLogProb kNoLogProb = {kNan, kNan, {kNan, kNan}};

// x: the target's logit.
inline RowLogProb row_log_prob(const Sums& row, double x, double inverse, SoftmaxExtra extra) {
  RowLogProb r;
  write_stats(row, inverse, r.stats);
  if (row.sum == 0) r.stats[1] = kNan;
  const double log_sum = row.sum == 0 ? double(kNan) : std::log(row.sum);
  r.extra = static_cast<float>(extra == SoftmaxExtra::squares ? row.extra / (row.sum * row.sum)
                                                              : log_sum - row.extra / row.sum);
  r.log_prob = static_cast<float>((x - row.maximum) * inverse - log_sum);
  return r;
}

// Writes a row's results to those of the operation.
template <class Args>
void write_row(const Args& a, int64_t row, const RowLogProb& r) {
  a.log_probs.template as<float>()[row] = r.log_prob;
  a.stats.template as<float>()[2 * row] = r.stats[0];
  a.stats.template as<float>()[2 * row + 1] = r.stats[1];
  if (a.entropy) a.entropy.template as<float>()[row] = r.extra;
  if (a.squared_probs) a.squared_probs.template as<float>()[row] = r.extra;
}

// The gradient of a row's logits, from those of its log-probability (g) and entropy (h), divided by
// the temperature.
struct LogitGradient {
  LogitGradientRow row;
  double inverse, g, h, entropy;

  LogitGradient(double inverse, const float* stats, double g, double h, double entropy)
      : inverse(inverse), g(g), h(h), entropy(entropy) {
    row.inverse = static_cast<float>(inverse);
    row.inverse_low = static_cast<float>(inverse - row.inverse);
    row.maximum = stats[0];
    row.log_sum = stats[1];
    row.scale_p = static_cast<float>(-g - h * entropy);
    row.scale_h = static_cast<float>(-h);
  }
  // At the target, whose logit is x: g (1 - p), without the cancellation near p = 1.
  float at_target(double x) const {
    const double log_p = (x * inverse - row.maximum) - row.log_sum, p = std::exp(log_p);
    const double entropy_term = p == 0 ? 0 : h * p * (log_p + entropy);
    return static_cast<float>(-g * std::expm1(log_p) - entropy_term);
  }
};

}  // namespace p2r::cpu
