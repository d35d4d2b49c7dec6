// Sampling from logits: a row a task, read in tiles of f32.
//
// sample_tokens: a row of 151936 f32 fits into the second-level cache, so that memory is read once.
// The first pass takes the sums of log-probabilities, and with them the largest logit. Each filter
// then becomes a bound on the logits: top_k's is found on the way through the row, from the entries
// that reach the bound so far; the others' from a list of the entries that can be kept, which is
// short for the distributions of language models. Only top_p without top_k needs the weights of all
// logits before.
#include "ops/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/device.h"
#include "cpu/log_probs.h"
#include "ops/half.h"
#include "ops/integer.h"
#include "ops/philox.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kGrain = 8192;  // logits of one task
constexpr int64_t kTile = 1024, kSums = 1024;

// One row of logits, as f32, a tile at a time.
class Row {
 public:
  Row(const View& logits, int64_t row, const Simd& simd)
      : v_(logits.shape[1]), dtype_(logits.dtype), simd_(simd), data_(logits.element(row * v_)) {}

  // f(first, values, n) over begin..end until it returns true.
  template <class F>
  void tiles(int64_t begin, int64_t end, F&& f) {
    float wide[kTile];
    for (int64_t i = begin; i < end; i += kTile) {
      const int64_t n = std::min(kTile, end - i);
      const char* at = data_ + i * static_cast<int64_t>(size_of(dtype_));
      const float* x = wide;
      if (dtype_ == DType::f32)
        x = reinterpret_cast<const float*>(at);
      else
        simd_.to_f32(dtype_, at, wide, n);
      if (f(i, x, n)) return;
    }
  }

  // The largest logit and its first index; -1 for a row without a distribution, and then the value
  // that tells why: +infinity, NaN, or -infinity if there is nothing else.
  int64_t maximum(float* value) {
    float best = -std::numeric_limits<float>::infinity();
    int64_t where = -1;
    bool bad = false;
    tiles(0, v_, [&](int64_t first, const float* x, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        if (x[i] > best) {
          best = x[i];
          where = first + i;
        }
        bad |= x[i] != x[i];
      }
      return false;
    });
    *value = best;
    if (bad && best < std::numeric_limits<float>::infinity())
      *value = std::numeric_limits<float>::quiet_NaN();
    return bad || std::isinf(best) ? -1 : where;
  }

  // sum_of_all: of the weights.
  int64_t draw(float maximum, float rate, uint64_t random, uint64_t* sum_of_all) {
    const int bits = weight_bits(v_);
    // Sums of equal parts of the row, so that the search reads only one part again.
    const int64_t part = std::max<int64_t>(64, ceil_div(v_, kSums));
    uint64_t sums[kSums], total = 0;
    const int64_t parts = ceil_div(v_, part);
    for (int64_t p = 0; p < parts; ++p) {
      uint64_t sum = 0;
      tiles(p * part, std::min(v_, (p + 1) * part), [&](int64_t, const float* x, int64_t n) {
        for (int64_t i = 0; i < n; ++i) sum += weight(maximum - x[i], rate, bits);
        return false;
      });
      sums[p] = sum;
      total += sum;
    }
    *sum_of_all = total;
    uint64_t rest = multiply_high(random, total);
    int64_t p = 0, drawn = -1;
    while (rest >= sums[p]) rest -= sums[p++];
    tiles(p * part, v_, [&](int64_t first, const float* x, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        const uint64_t w = weight(maximum - x[i], rate, bits);
        if (rest < w) {
          drawn = first + i;
          return true;
        }
        rest -= w;
      }
      return false;
    });
    return drawn;
  }

 private:
  const int64_t v_;
  const DType dtype_;
  const Simd& simd_;
  const char* data_;
};

// Temporary memory of one thread: a row as f32, and the places of those of its logits that may be
// drawn.
struct RowScratch {
  float* values;
  int32_t* places;

  static size_t bytes(int64_t v) { return static_cast<size_t>(v) * 8; }
  RowScratch(char* memory, int64_t v)
      : values(reinterpret_cast<float*>(memory)), places(reinterpret_cast<int32_t*>(values + v)) {}
};

// One row of sample_tokens: its logits after the penalty, z, and what the filters leave of them.
class FilteredRow {
 public:
  FilteredRow(const float* z, int64_t v, float maximum, const SampleRow& row, const Simd& simd,
              const RowScratch& scratch)
      : z_(z),
        v_(v),
        maximum_(maximum),
        row_(row),
        bits_(weight_bits(v)),
        simd_(simd),
        scratch_(scratch) {}

  int64_t greedy() { return find(maximum_) ? scratch_.places[0] : -1; }

  // The drawn token and its logarithm under what it was drawn from.
  int64_t draw(float* log_prob) {
    if (row_.top_k) low_ = kth_largest();
    if (row_.top_p) limit_to_top_p();
    if (row_.min_weight) {
      // Somewhat below the logit of that weight, which is compared itself.
      const float low = maximum_ - (log2_of_inverse(row_.min_weight) + 1) / row_.rate;
      if (low > low_) {
        low_ = low;
        ties_ = kAll;
      }
    }
    const int64_t count = find(low_);
    uint64_t total = 0;
    int64_t kept = 0;
    for (int64_t k = 0; k < count; ++k) {
      const int32_t i = scratch_.places[k];
      if (z_[i] == low_ && ties_-- <= 0) continue;
      const uint64_t w = weight_at(i);
      if (w < row_.min_weight) continue;
      total += w;
      scratch_.places[kept++] = i;
    }
    uint64_t rest = multiply_high(row_.random, total);
    int64_t k = 0;
    while (rest >= weight_at(scratch_.places[k])) rest -= weight_at(scratch_.places[k++]);
    const int32_t drawn = scratch_.places[k];
    *log_prob = log_prob_of(drawn, total);
    return drawn;
  }
  // The same from all logits, without a list of them.
  int64_t draw_from_all(float* log_prob) {
    View z;
    z.data = const_cast<float*>(z_);
    z.shape = {1, v_};
    uint64_t total = 0;
    const int64_t drawn = Row(z, 0, simd_).draw(maximum_, row_.rate, row_.random, &total);
    *log_prob = log_prob_of(drawn, total);
    return drawn;
  }

 private:
  static constexpr int64_t kAll = std::numeric_limits<int64_t>::max();

  // Of the share that a weight is of the largest.
  float log2_of_inverse(uint64_t w) const {
    return static_cast<float>(bits_ - std::log2(static_cast<double>(w)));
  }
  static constexpr int32_t kIntervals = 1024;
  // Of the distance from the largest logit; it does not fall with the distance. Weights are 0 in
  // the last one, from 64 halvings on.
  int32_t interval_of(int64_t i) const {
    const float distance = (maximum_ - z_[i]) * row_.rate * (kIntervals / 64);
    return distance < kIntervals - 1 ? static_cast<int32_t>(distance) : kIntervals - 1;
  }
  uint64_t weight_at(int64_t i) const { return weight(maximum_ - z_[i], row_.rate, bits_); }

  // Lists the places of all logits of at least `low`.
  int64_t find(float low) { return simd_.find_at_least(z_, v_, low, 0, scratch_.places); }

  // The entries that reach the bound so far are kept, until there are so many that a new bound is
  // worth finding.
  float kth_largest() {
    const auto larger = [this](int32_t a, int32_t b) { return z_[a] > z_[b]; };
    int32_t* places = scratch_.places;
    const int64_t k = row_.top_k, enough = std::max<int64_t>(4 * k, 2 * kTile);
    float low = -std::numeric_limits<float>::infinity();
    int64_t count = 0;
    for (int64_t i = 0; i < v_; i += kTile) {
      count += simd_.find_at_least(z_ + i, std::min(kTile, v_ - i), low, static_cast<int32_t>(i),
                                   places + count);
      if (count >= enough || i + kTile >= v_) {
        std::nth_element(places, places + k - 1, places + count, larger);
        low = z_[places[k - 1]];
        count = k;
      }
    }
    return low;
  }

  // Raises low_ to the last logit that top_p keeps, and says how many of its equals are kept.
  void limit_to_top_p() {
    int32_t* places = scratch_.places;
    uint64_t target = 0, before = 0;
    int64_t count = 0;
    if (row_.top_k) {
      count = find(low_);
      target = mass_to_keep(mass(places, count), row_.top_p);
    } else {
      // The weights by distance from the largest logit: the bound is in the interval where their
      // sum reaches the target.
      uint64_t intervals[kIntervals] = {}, total = 0;
      for (int64_t i = 0; i < v_; ++i) {
        const uint64_t w = weight_at(i);
        intervals[interval_of(i)] += w;
        total += w;
      }
      target = mass_to_keep(total, row_.top_p);
      int32_t last = 0;
      while (before + intervals[last] < target) before += intervals[last++];
      for (int64_t i = 0; i < v_; ++i)
        if (interval_of(i) == last) places[count++] = static_cast<int32_t>(i);
    }
    // Selection among these by mass: those before `first` are kept, the last kept one is before
    // `last`.
    const auto earlier = [this](int32_t a, int32_t b) {
      return z_[a] > z_[b] || (z_[a] == z_[b] && a < b);
    };
    int64_t first = 0, last = count;
    while (last - first > 1) {
      const int64_t middle = first + (last - first) / 2;
      std::nth_element(places + first, places + middle, places + last, earlier);
      const uint64_t upper = mass(places + first, middle - first);
      if (before + upper >= target) {
        last = middle;
      } else {
        before += upper;
        first = middle;
      }
    }
    low_ = z_[places[first]];
    ties_ = 1;
    for (int64_t k = 0; k < first; ++k) ties_ += z_[places[k]] == low_;
  }

  float log_prob_of(int64_t i, uint64_t total) const {
    const double mass = static_cast<double>(total) / static_cast<double>(weight(0, 1, bits_));
    return static_cast<float>((double(z_[i]) - maximum_) * row_.inverse - std::log(mass));
  }
  uint64_t mass(const int32_t* places, int64_t count) const {
    uint64_t sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += weight_at(places[k]);
    return sum;
  }

  const float* z_;
  const int64_t v_;
  const float maximum_;
  const SampleRow& row_;
  const int bits_;
  const Simd& simd_;
  const RowScratch& scratch_;
  // What is kept: z above low_, and the first ties_ of those equal to it.
  float low_ = -std::numeric_limits<float>::infinity();
  int64_t ties_ = kAll;
};

// The sums of one row's log-probabilities, as token_log_probs takes them.
Sums sums_of(const Simd& simd, DType dtype, const View& logits, int64_t row, double inverse) {
  const int64_t v = logits.shape[1], span = sum_span(v);
  float parts[3 * kMaxSpans];
  int64_t spans = 0;
  for (int64_t first = 0; first < v; first += span)
    simd.softmax_sums(dtype, logits.element(row * v + first), std::min(span, v - first),
                      static_cast<float>(inverse), SoftmaxExtra::none, parts + 3 * spans++);
  return merge_spans(simd, parts, spans, inverse, SoftmaxExtra::none);
}

float largest_of(const Simd& simd, const float* z, int64_t v) {
  float part[3];
  simd.softmax_sums(DType::f32, z, v, 1, SoftmaxExtra::none, part);
  return part[0];
}

}  // namespace

void sample_tokens(const SampleTokensArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t rows = a.logits.shape[0], v = a.logits.shape[1];
  const size_t bytes = RowScratch::bytes(v);
  const Scratch scratch = cpu.scratch(rows ? bytes * static_cast<size_t>(cpu.threads()) : 0);
  char* memory = scratch.as<char>();
  cpu.launch(rows, 1, [=, &simd = cpu.simd()](int64_t begin, int64_t end, int thread) {
    const RowScratch own(memory + static_cast<size_t>(thread) * bytes, v);
    for (int64_t r = begin; r < end; ++r) {
      const SampleRow row = sample_row(a, r);
      const Sums sums = sums_of(simd, a.logits.dtype, a.logits, r, row.inverse);
      const float* z = a.logits.as<const float>() + r * v;
      float maximum = static_cast<float>(sums.maximum);
      if (a.logits.dtype != DType::f32 || row.has_history()) {
        simd.to_f32(a.logits.dtype, a.logits.element(r * v), own.values, v);
        for (int64_t k = row.history_begin; k < row.history_end; ++k) {
          float& at = own.values[a.history[static_cast<size_t>(k)]];
          at = penalized(at, row.penalty);
        }
        z = own.values;
        if (row.has_history()) maximum = largest_of(simd, z, v);
      }
      int64_t token = -1;
      float filtered = kNan, log_prob = kNan;
      const bool has_nan = sums.sum != sums.sum && sums.maximum < kInfinity;
      if (has_nan || std::isinf(maximum)) {
        raise(a.fault, r, bits_of_f32(has_nan ? kNan : maximum));
      } else {
        FilteredRow filter(z, v, maximum, row, simd, own);
        if (row.rate == 0) {
          token = filter.greedy();
          filtered = 0;
        } else {
          token = row.has_filter() ? filter.draw(&filtered) : filter.draw_from_all(&filtered);
        }
        float drawn;
        simd.to_f32(a.logits.dtype, a.logits.element(r * v + token), &drawn, 1);
        log_prob = row_log_prob(sums, drawn, row.inverse, SoftmaxExtra::none).log_prob;
        if (row.rate > 0 && !row.has_filter() && !row.has_history()) filtered = log_prob;
      }
      a.tokens.as<int32_t>()[r] = static_cast<int32_t>(token);
      a.log_probs.as<float>()[r] = log_prob;
      a.log_probs_filtered.as<float>()[r] = filtered;
    }
  });
}

void sample(const SampleArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t grain = std::max<int64_t>(1, kGrain / (a.logits.shape[1] + 1));
  cpu.launch(a.logits.shape[0], grain, [a, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      Row row(a.logits, r, simd);
      float maximum;
      uint64_t total;
      int64_t drawn = row.maximum(&maximum);
      if (drawn < 0)
        raise(a.fault, r, bits_of_f32(maximum));
      else if (a.temperature > 0)
        drawn = row.draw(maximum, weight_rate(a.temperature),
                         philox(static_cast<uint64_t>(a.seed), static_cast<uint64_t>(r)), &total);
      a.out.as<int32_t>()[r] = static_cast<int32_t>(drawn);
    }
  });
}

}  // namespace p2r::cpu
