// Log-probabilities: every row is cut into the spans of a linear head's logits, whatever N and the
// number of threads are. A first loop sums spans, a second merges each row's spans in their order,
// so one row alone keeps all threads busy and gets the bits it would get in any batch, and those of
// the head (cpu/linear_log_probs/).
#include "cpu/log_probs.h"

#include <algorithm>

#include "cpu/device.h"
#include "ops/half.h"
#include "ops/integer.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kRowGrain = 64;

int64_t spans_of(int64_t columns) { return ceil_div(columns, sum_span(columns)); }

// Tasks large enough to be worth their scheduling, small enough to spread a few rows over threads.
int64_t grain_for(int64_t items, int threads) {
  return std::clamp<int64_t>(items / (int64_t{8} * threads), 1, 16);
}

float value_at(const View& v, int64_t i) {
  if (v.dtype == DType::f32) return v.as<float>()[i];
  const uint16_t h = v.as<uint16_t>()[i];
  return v.dtype == DType::f16 ? f32_of_f16(h) : f32_of_bf16(h);
}
void set_value(const View& v, int64_t i, float x) {
  if (v.dtype == DType::f32)
    v.as<float>()[i] = x;
  else
    v.as<uint16_t>()[i] = v.dtype == DType::f16 ? f16_of_f32(x) : bf16_of_f32(x);
}

struct Job {
  In logits, targets;
  double temperature;
  SoftmaxExtra extra;
};

void queue_spans(const Job& job, float* partials, CpuDevice& cpu) {
  const int64_t rows = job.logits.shape[0], columns = job.logits.shape[1];
  const int64_t span = sum_span(columns), spans = spans_of(columns);
  cpu.launch(rows * spans, grain_for(rows * spans, cpu.threads()),
             [=, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
               const float inverse = static_cast<float>(1 / job.temperature);
               for (int64_t i = begin; i < end; ++i) {
                 const int64_t row = i / spans, first = i % spans * span;
                 if (job.targets.as<int32_t>()[row] == kSkippedTarget) continue;
                 simd.softmax_sums(job.logits.dtype, job.logits.element(row * columns + first),
                                   std::min(span, columns - first), inverse, job.extra,
                                   partials + 3 * i);
               }
             });
}

}  // namespace

void token_log_probs(const TokenLogProbsArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t rows = a.logits.shape[0], columns = a.logits.shape[1];
  const int64_t spans = spans_of(columns);
  Scratch scratch = device.scratch(rows * spans * 3 * sizeof(float));
  float* partials = scratch.as<float>();
  queue_spans({a.logits, a.targets, a.temperature, extra_of(a)}, partials, cpu);
  cpu.launch(rows, kRowGrain, [=, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
    const double inverse = 1 / a.temperature;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t target = a.targets.as<int32_t>()[i];
      RowLogProb r;
      if (target != kSkippedTarget) {
        const Sums row = merge_spans(simd, partials + 3 * i * spans, spans, inverse, extra_of(a));
        if (target < 0 || target >= columns) {
          r = kNoLogProb;
          raise(a.fault, i, static_cast<uint32_t>(target));
        } else {
          r = row_log_prob(row, value_at(a.logits, i * columns + target), inverse, extra_of(a));
        }
      }
      write_row(a, i, r);
    }
  });
}

void token_log_probs_shard(const TokenLogProbsShardArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t rows = a.logits.shape[0], columns = a.logits.shape[1];
  const int64_t spans = spans_of(columns);
  Scratch scratch = device.scratch(rows * spans * 3 * sizeof(float));
  float* partials = scratch.as<float>();
  const SoftmaxExtra extra = a.moment ? SoftmaxExtra::moment : SoftmaxExtra::none;
  queue_spans({a.logits, a.targets, a.temperature, extra}, partials, cpu);
  cpu.launch(rows, kRowGrain, [=, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
    const double inverse = 1 / a.temperature;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t target = a.targets.as<int32_t>()[i];
      const int64_t local = target - a.vocab_offset;
      Sums row;
      float target_logit = 0;
      if (target != kSkippedTarget) {
        row = merge_spans(simd, partials + 3 * i * spans, spans, inverse, extra);
        target_logit = static_cast<float>(local < 0 || local >= columns
                                              ? -kInfinity
                                              : value_at(a.logits, i * columns + local) * inverse);
      }
      float stats[2];
      write_stats(row, inverse, stats);
      // The moment relative to the rounded maximum, like the sum.
      const double shift = row.sum == 0 ? 0 : row.maximum * inverse - stats[0];
      float moment = static_cast<float>(std::exp(shift) * (row.extra + shift * row.sum));
      if (target < 0 && target != kSkippedTarget) {
        target_logit = moment = stats[0] = stats[1] = kNan;
        raise(a.fault, i, static_cast<uint32_t>(target));
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
        merge(row, {stats[0], std::exp(double(stats[1])), moment}, 1, SoftmaxExtra::moment);
        const double x = a.target_logit[k].as<float>()[i];
        if (!(x <= target)) target = x;
      }
      float log_prob = 0, entropy = 0, stats[2] = {0, 0};
      if (row.sum != 0) {
        write_stats(row, 1, stats);
        const double log_sum = std::log(row.sum);
        log_prob = static_cast<float>((target - row.maximum) - log_sum);
        entropy = static_cast<float>(log_sum - row.extra / row.sum);
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
  const int64_t span = sum_span(columns), spans = spans_of(columns), items = rows * spans;
  cpu.launch(items, grain_for(items, cpu.threads()),
             [=, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
               const double inverse = 1 / a.temperature;
               for (int64_t i = begin; i < end; ++i) {
                 const int64_t row = i / spans, first = i % spans * span;
                 const int64_t size = std::min(span, columns - first),
                               offset = row * columns + first;
                 char* out = a.d_logits.element(offset);
                 const int32_t target = a.targets.as<int32_t>()[row];
                 const double g = a.d_log_probs.as<float>()[row] * inverse;
                 const double h = a.d_entropy ? a.d_entropy.as<float>()[row] * inverse : 0;
                 const int64_t label = target - a.vocab_offset;
                 if (target != kSkippedTarget && (target < 0 || (!a.shard && label >= columns))) {
                   for (int64_t j = 0; j < size; ++j) set_value(a.d_logits, offset + j, kNan);
                   raise(a.fault, row, static_cast<uint32_t>(target));
                   continue;
                 }
                 if (target == kSkippedTarget || (g == 0 && h == 0)) {
                   std::fill(out, out + size * int64_t(size_of(a.d_logits.dtype)), char{0});
                   continue;
                 }
                 const LogitGradient dz(inverse, a.stats.as<float>() + 2 * row, g, h,
                                        h != 0 ? a.entropy.as<float>()[row] : 0);
                 const bool here = label >= first && label < first + size;
                 const double x = here ? value_at(a.logits, row * columns + label) : 0;
                 simd.logit_gradient(a.logits.dtype, a.logits.element(offset), out, size, &dz.row);
                 if (here) set_value(a.d_logits, row * columns + label, dz.at_target(x));
               }
             });
}

}  // namespace p2r::cpu
