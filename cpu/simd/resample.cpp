// Resampling of RGB bytes with 22-bit integer weights: exact, so that every instruction set gives
// the same bytes.
//
//   out = clamp8((2^21 + sum of pixel * weight) >> 22)
//
// A row: W lanes hold W / 4 pixels of four lanes each (red, green, blue and one that is thrown
// away), so that neighbouring taps are multiplied in one step and the lanes of the taps added up at
// the end. A column: W bytes of a row at a time, one tap a step.
#include "cpu/simd/simd.h"
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

namespace {

constexpr int kBits = 22;
constexpr int kPixels = W / 4;

typedef uint8_t vb __attribute__((vector_size(W)));
typedef int32_t v4 __attribute__((vector_size(16)));

// kPixels RGB pixels, four lanes each.
inline vi pixels(const uint8_t* p) {
  const vb raw = load<vb>(p);
#if defined(__AVX512F__)
  const vb spread =
      __builtin_shufflevector(raw, raw, 0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
#elif defined(__AVX2__)
  const vb spread = __builtin_shufflevector(raw, raw, 0, 1, 2, 2, 3, 4, 5, 5);
#else
  const vb spread = raw;
#endif
  return __builtin_convertvector(spread, vi);
}

// Each of kPixels weights in four lanes.
inline vi weights_of(const int32_t* w) {
#if defined(__AVX512F__)
  const v4 k = load<v4>(w);
  return __builtin_shufflevector(k, k, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
#elif defined(__AVX2__)
  typedef int32_t v2 __attribute__((vector_size(8)));
  const v2 k = load<v2>(w);
  return __builtin_shufflevector(k, k, 0, 0, 0, 0, 1, 1, 1, 1);
#else
  return w[0] - vi{};
#endif
}

inline v4 add_pixels(vi a) {
#if defined(__AVX512F__)
  const vi b =
      a + __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  return __builtin_shufflevector(b, b, 0, 1, 2, 3) + __builtin_shufflevector(b, b, 4, 5, 6, 7);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
#else
  return a;
#endif
}

template <class V>
inline V clamp8(V sum) {
  V v = sum >> kBits;
  v = v < 0 ? V{} : v;
  return v > 255 ? V{} + 255 : v;
}

}  // namespace

void resample_row(const uint8_t* in, uint8_t* out, int64_t n, const int32_t* first,
                  const int32_t* weights, int64_t taps) {
  typedef uint8_t b4 __attribute__((vector_size(4)));
  for (int64_t x = 0; x < n; ++x, weights += taps) {
    const uint8_t* p = in + int64_t{first[x]} * 3;
    vi sum = {};
    for (int64_t t = 0; t < taps; t += kPixels) sum += pixels(p + t * 3) * weights_of(weights + t);
    store(out + x * 3,
          __builtin_convertvector(clamp8<v4>(add_pixels(sum) + (1 << (kBits - 1))), b4));
  }
}

void resample_column(const uint8_t* const* rows, uint8_t* out, int64_t n, const int32_t* weights,
                     int64_t taps) {
  constexpr vi half = vi{} + (1 << (kBits - 1));
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    vi s0 = half, s1 = half, s2 = half, s3 = half;
    for (int64_t t = 0; t < taps; ++t) {
      const uint8_t* p = rows[t] + i;
      const vi w = weights[t] - vi{};
      s0 += w * __builtin_convertvector(load<vb>(p), vi);
      s1 += w * __builtin_convertvector(load<vb>(p + W), vi);
      s2 += w * __builtin_convertvector(load<vb>(p + 2 * W), vi);
      s3 += w * __builtin_convertvector(load<vb>(p + 3 * W), vi);
    }
    store(out + i, __builtin_convertvector(clamp8(s0), vb));
    store(out + i + W, __builtin_convertvector(clamp8(s1), vb));
    store(out + i + 2 * W, __builtin_convertvector(clamp8(s2), vb));
    store(out + i + 3 * W, __builtin_convertvector(clamp8(s3), vb));
  }
  for (; i < n; ++i) {
    int32_t sum = 1 << (kBits - 1);
    for (int64_t t = 0; t < taps; ++t) sum += weights[t] * rows[t][i];
    sum >>= kBits;
    out[i] = (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
  }
}

}  // namespace p2r::cpu::P2R_ISA
