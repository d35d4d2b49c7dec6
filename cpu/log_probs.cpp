// Log-probabilities: every row is cut into slices of kSlice columns, whatever N and the number of
// threads are. A first loop sums slices, a second merges each row's slices in their order, so one
// row alone keeps all threads busy and gets the bits it would get in any batch.
#include "ops/log_probs.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/device.h"
#include "cpu/simd/rows.h"
#include "ops/half.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kSlice = 8192;
constexpr int64_t kRowGrain = 64;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

int64_t slices_of(int64_t columns) { return (columns + kSlice - 1) / kSlice; }

// Chunks large enough to be worth handing out, small enough to share a few rows.
int64_t grain_for(int64_t items, int threads) {
  return std::clamp<int64_t>(items / (int64_t{8} * threads), 1, 16);
}

const char* at(const View& v, int64_t i) { return v.as<char>() + i * int64_t(size_of(v.dtype)); }

float element(const View& v, int64_t i) {
  if (v.dtype == DType::f32) return v.as<float>()[i];
  const uint16_t h = v.as<uint16_t>()[i];
  return v.dtype == DType::f16 ? f32_of_f16(h) : f32_of_bf16(h);
}
void set_element(const View& v, int64_t i, float x) {
  if (v.dtype == DType::f32)
    v.as<float>()[i] = x;
  else
    v.as<uint16_t>()[i] = v.dtype == DType::f16 ? f16_of_f32(x) : bf16_of_f32(x);
}

// Of a row or a part of one: its maximum, Σ e^d and Σ e^d d.
struct Sums {
  double maximum = -kInfinity, sum = 0, moment = 0;
};

// Adds a part whose maximum and sums are given; log-ratios are (difference of maxima) * inverse.
void merge(Sums& into, const Sums& part, double inverse) {
  if (part.sum == 0) return;
  const double top = part.maximum > into.maximum ? part.maximum : into.maximum;
  const auto scaled = [&](const Sums& s) {
    const double shift = (s.maximum - top) * inverse, scale = std::exp(shift);
    // A part so far below that it vanishes has a shift that may be infinite; NaN does not vanish.
    return scale == 0 ? Sums{top, 0 * s.sum, 0 * s.moment}
                      : Sums{top, scale * s.sum, scale * (s.moment + shift * s.sum)};
  };
  const Sums b = scaled(part);
  if (into.sum == 0) {
    into = b;
    return;
  }
  const Sums a = scaled(into);
  into = {top, a.sum + b.sum, a.moment + b.moment};
}

Sums merge_slices(const float* partials, int64_t slices, double inverse) {
  Sums row;
  for (int64_t k = 0; k < slices; ++k, partials += 3)
    merge(row, {partials[0], partials[1], partials[2]}, inverse);
  return row;
}

// (m, log s) with m rounded first; log s of an empty row is -inf.
void write_stats(const Sums& row, double inverse, float* stats) {
  const double maximum = row.maximum * inverse;
  stats[0] = static_cast<float>(maximum);
  const double residue = std::isfinite(stats[0]) ? maximum - stats[0] : 0;
  stats[1] = static_cast<float>(std::log(row.sum) + residue);
}

struct Job {
  In logits, targets;
  double temperature;
  bool moment;
};

void queue_slices(const Job& job, float* partials, CpuDevice& cpu) {
  const int64_t rows = job.logits.shape[0], columns = job.logits.shape[1];
  const int64_t slices = slices_of(columns);
  cpu.launch(rows * slices, grain_for(rows * slices, cpu.threads()),
             [=, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
               const float inverse = static_cast<float>(1 / job.temperature);
               for (int64_t i = begin; i < end; ++i) {
                 const int64_t row = i / slices, first = i % slices * kSlice;
                 if (job.targets.as<int32_t>()[row] == kSkippedTarget) continue;
                 simd.softmax_sums(job.logits.dtype, at(job.logits, row * columns + first),
                                   std::min(kSlice, columns - first), inverse, job.moment,
                                   partials + 3 * i);
               }
             });
}

}  // namespace

void token_log_probs(const TokenLogProbsArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t rows = a.logits.shape[0], columns = a.logits.shape[1];
  const int64_t slices = slices_of(columns);
  Scratch scratch = device.scratch(rows * slices * 3 * sizeof(float));
  float* partials = scratch.as<float>();
  queue_slices({a.logits, a.targets, a.temperature, bool(a.entropy)}, partials, cpu);
  cpu.launch(rows, kRowGrain, [=](int64_t begin, int64_t end, int) {
    const double inverse = 1 / a.temperature;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t target = a.targets.as<int32_t>()[i];
      float log_prob = 0, entropy = 0, stats[2] = {0, 0};
      if (target != kSkippedTarget) {
        const Sums row = merge_slices(partials + 3 * i * slices, slices, inverse);
        write_stats(row, inverse, stats);
        const double log_sum = row.sum == 0 ? double(kNan) : std::log(row.sum);
        entropy = static_cast<float>(log_sum - row.moment / row.sum);
        if (row.sum == 0) stats[1] = kNan;
        if (target < 0 || target >= columns) {
          log_prob = entropy = stats[0] = stats[1] = kNan;
          *a.fault = 1;
        } else {
          const double x = element(a.logits, i * columns + target);
          log_prob = static_cast<float>((x - row.maximum) * inverse - log_sum);
        }
      }
      a.log_probs.as<float>()[i] = log_prob;
      a.stats.as<float>()[2 * i] = stats[0];
      a.stats.as<float>()[2 * i + 1] = stats[1];
      if (a.entropy) a.entropy.as<float>()[i] = entropy;
    }
  });
}

void token_log_probs_shard(const TokenLogProbsShardArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t rows = a.logits.shape[0], columns = a.logits.shape[1];
  const int64_t slices = slices_of(columns);
  Scratch scratch = device.scratch(rows * slices * 3 * sizeof(float));
  float* partials = scratch.as<float>();
  queue_slices({a.logits, a.targets, a.temperature, bool(a.moment)}, partials, cpu);
  cpu.launch(rows, kRowGrain, [=](int64_t begin, int64_t end, int) {
    const double inverse = 1 / a.temperature;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t target = a.targets.as<int32_t>()[i];
      const int64_t local = target - a.vocab_offset;
      Sums row;
      float target_logit = 0;
      if (target != kSkippedTarget) {
        row = merge_slices(partials + 3 * i * slices, slices, inverse);
        target_logit = static_cast<float>(local < 0 || local >= columns
                                              ? -kInfinity
                                              : element(a.logits, i * columns + local) * inverse);
      }
      float stats[2];
      write_stats(row, inverse, stats);
      // The moment relative to the rounded maximum, like the sum.
      const double shift = row.sum == 0 ? 0 : row.maximum * inverse - stats[0];
      float moment = static_cast<float>(std::exp(shift) * (row.moment + shift * row.sum));
      if (target < 0 && target != kSkippedTarget) {
        target_logit = moment = stats[0] = stats[1] = kNan;
        *a.fault = 1;
      }
      a.target_logit.as<float>()[i] = target_logit;
      a.stats.as<float>()[2 * i] = stats[0];
      a.stats.as<float>()[2 * i + 1] = stats[1];
      if (a.moment) a.moment.as<float>()[i] = moment;
    }
  });
}

void merge_log_probs(const MergeLogProbsArgs& a, Device& device) {
  cpu_device(device).launch(a.log_probs.size(), kRowGrain, [a](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      Sums row;
      double target = -kInfinity;
      for (size_t k = 0; k < a.stats.size(); ++k) {
        const float* stats = a.stats[k].as<float>() + 2 * i;
        const double moment = a.moment.empty() ? 0 : a.moment[k].as<float>()[i];
        merge(row, {stats[0], std::exp(double(stats[1])), moment}, 1);
        const double x = a.target_logit[k].as<float>()[i];
        if (!(x <= target)) target = x;
      }
      float log_prob = 0, entropy = 0, stats[2] = {0, 0};
      if (row.sum != 0) {
        write_stats(row, 1, stats);
        const double log_sum = std::log(row.sum);
        log_prob = static_cast<float>((target - row.maximum) - log_sum);
        entropy = static_cast<float>(log_sum - row.moment / row.sum);
      } else if (target == -kInfinity) {  // no probability anywhere; else the row was skipped
        log_prob = entropy = stats[1] = kNan;
        stats[0] = -std::numeric_limits<float>::infinity();
      }
      a.log_probs.as<float>()[i] = log_prob;
      a.merged.as<float>()[2 * i] = stats[0];
      a.merged.as<float>()[2 * i + 1] = stats[1];
      if (a.entropy) a.entropy.as<float>()[i] = entropy;
    }
  });
}

void token_log_probs_backward(const TokenLogProbsBackwardArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t rows = a.logits.shape[0], columns = a.logits.shape[1];
  const int64_t slices = slices_of(columns), items = rows * slices;
  cpu.launch(items, grain_for(items, cpu.threads()),
             [=, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
               const double inverse = 1 / a.temperature;
               for (int64_t i = begin; i < end; ++i) {
                 const int64_t row = i / slices, first = i % slices * kSlice;
                 const int64_t size = std::min(kSlice, columns - first),
                               offset = row * columns + first;
                 char* out = const_cast<char*>(at(a.d_logits, offset));
                 const int32_t target = a.targets.as<int32_t>()[row];
                 const double g = a.d_log_probs.as<float>()[row] * inverse;
                 const double h = a.d_entropy ? a.d_entropy.as<float>()[row] * inverse : 0;
                 const int64_t label = target - a.vocab_offset;
                 if (target != kSkippedTarget && (target < 0 || (!a.shard && label >= columns))) {
                   for (int64_t j = 0; j < size; ++j) set_element(a.d_logits, offset + j, kNan);
                   *a.fault = 1;
                   continue;
                 }
                 if (target == kSkippedTarget || (g == 0 && h == 0)) {
                   std::fill(out, out + size * int64_t(size_of(a.d_logits.dtype)), char{0});
                   continue;
                 }
                 const float* stats = a.stats.as<float>() + 2 * row;
                 const double entropy = h != 0 ? a.entropy.as<float>()[row] : 0;
                 SoftmaxRow r;
                 r.inverse = static_cast<float>(inverse);
                 r.inverse_low = static_cast<float>(inverse - r.inverse);
                 r.maximum = stats[0];
                 r.log_sum = stats[1];
                 r.scale_p = static_cast<float>(-g - h * entropy);
                 r.scale_h = static_cast<float>(-h);
                 const bool here = label >= first && label < first + size;
                 const double x = here ? element(a.logits, row * columns + label) : 0;
                 simd.softmax_slopes(a.logits.dtype, at(a.logits, offset), out, size, &r);
                 if (here) {  // g (1 - p), without the cancellation near p = 1
                   const double log_p = (x * inverse - stats[0]) - stats[1], p = std::exp(log_p);
                   const double spread = p == 0 ? 0 : h * p * (log_p + entropy);
                   set_element(a.d_logits, row * columns + label,
                               static_cast<float>(-g * std::expm1(log_p) - spread));
                 }
               }
             });
}

}  // namespace p2r::cpu
