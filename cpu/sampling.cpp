// Sampling from logits: a row a task, read in tiles of f32.
#include "ops/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/device.h"
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

  int64_t draw(float maximum, float rate, uint64_t random) {
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

}  // namespace

void sample(const SampleArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t grain = std::max<int64_t>(1, kGrain / (a.logits.shape[1] + 1));
  cpu.launch(a.logits.shape[0], grain, [a, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      Row row(a.logits, r, simd);
      float maximum;
      int64_t drawn = row.maximum(&maximum);
      if (drawn < 0)
        raise(a.fault, r, bits_of_f32(maximum));
      else if (a.temperature > 0)
        drawn = row.draw(maximum, weight_rate(a.temperature),
                         philox(static_cast<uint64_t>(a.seed), static_cast<uint64_t>(r)));
      a.out.as<int32_t>()[r] = static_cast<int32_t>(drawn);
    }
  });
}

}  // namespace p2r::cpu
