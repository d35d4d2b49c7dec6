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

typedef int32_t v4 __attribute__((vector_size(16)));

// kPixels RGB pixels, four lanes each; each of kPixels weights in four lanes; the sum of the
// pixels. By intrinsics, since the compiler takes such shuffles apart.
#if defined(__AVX512F__)
inline vi widen(const uint8_t* p) {
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
}
inline vi pixels(const uint8_t* p) {
  const __m128i spread = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
  return (vi)_mm512_cvtepu8_epi32(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)p), spread));
}
inline vi weights_of(const int32_t* w) {
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return (vi)_mm512_permutexvar_epi32(lanes,
                                      _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)w)));
}
inline v4 add_pixels(vi a) {
  const __m256i b = _mm256_add_epi32(_mm512_castsi512_si256((__m512i)a),
                                     _mm512_extracti64x4_epi64((__m512i)a, 1));
  return (v4)_mm_add_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
}
#elif defined(__AVX2__)
inline vi widen(const uint8_t* p) {
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
}
inline vi pixels(const uint8_t* p) {
  const __m128i spread = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  return (vi)_mm256_cvtepu8_epi32(_mm_shuffle_epi8(_mm_loadl_epi64((const __m128i*)p), spread));
}
inline vi weights_of(const int32_t* w) {
  const __m256i lanes = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  return (vi)_mm256_permutevar8x32_epi32(_mm256_castsi128_si256(_mm_loadl_epi64((const __m128i*)w)),
                                         lanes);
}
inline v4 add_pixels(vi a) {
  return (v4)_mm_add_epi32(_mm256_castsi256_si128((__m256i)a),
                           _mm256_extracti128_si256((__m256i)a, 1));
}
#else
inline vi widen(const uint8_t* p) { return __builtin_convertvector(load<vb>(p), vi); }
inline vi pixels(const uint8_t* p) { return widen(p); }
inline vi weights_of(const int32_t* w) { return w[0] - vi{}; }
inline v4 add_pixels(vi a) { return a; }
#endif

// A sum to bytes.
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
      s0 += w * widen(p);
      s1 += w * widen(p + W);
      s2 += w * widen(p + 2 * W);
      s3 += w * widen(p + 3 * W);
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
