// Values of packed tokens, W at a time, with a tail of fewer.
#pragma once
#include <string.h>

#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

// NaN stays.
inline vf clamp(vf x, float low, float high) { return vmax(set1(low), vmin(set1(high), x)); }
inline vf load_floats(const float* p, int n) { return n == W ? loadf(p) : load_first<vf>(p, n); }
inline void store_floats(float* p, vf x, int n) {
  if (n == W)
    store(p, x);
  else
    store_first(p, x, n);
}

// e^x - x - 1, by its series near 0, where the difference would cancel.
inline vf expm1_minus_x(vf x, vf e) {
  vf p = set1(1.0f / 6227020800.0f);
  const float terms[] = {1.0f / 479001600, 1.0f / 39916800, 1.0f / 3628800, 1.0f / 362880,
                         1.0f / 40320,     1.0f / 5040,     1.0f / 720,     1.0f / 120,
                         1.0f / 24,        1.0f / 6,        1.0f / 2};
  for (float term : terms) p = p * x + term;
  const vi near = (x > -1.0f) & (x < 1.0f);
  return near ? x * x * p : e - x - 1.0f;
}

inline vi load_marks(const uint8_t* p, int n) {
  if (p && n == W) return (vi)widen(load<vb>(p));
  vb marks = {};
  if (p)
    memcpy(&marks, p, n);
  else
    memset(&marks, 1, n);
  return (vi)widen(marks);
}

inline void count(vi which, vi& total) { total = which ? total + 1 : total; }

// A truth value for each lane. On AVX-512 a mask register: of comparisons that are combined as
// vectors, the compiler makes vectors of 0 and -1 first, and masks again for the selects.
#if defined(__AVX512F__)
typedef __mmask16 Lanes;
inline Lanes less(vf x, vf y) { return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_LT_OQ); }
inline Lanes equal(vf x, vf y) { return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_EQ_OQ); }
inline Lanes not_less(vf x, vf y) { return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_NLT_UQ); }
inline vf select(Lanes which, vf x, vf y) {
  return (vf)_mm512_mask_blend_ps(which, (__m512)y, (__m512)x);
}
inline void count(Lanes which, vi& total) {
  total = (vi)_mm512_mask_sub_epi32((__m512i)total, which, (__m512i)total, _mm512_set1_epi32(-1));
}
inline uint32_t lanes(Lanes which) { return which; }
// Where the first n bytes of p are not 0; without p everywhere.
inline Lanes load_kept(const uint8_t* p, int n) {
  if (!p) return (Lanes)((1u << n) - 1);
  const __m128i bytes =
      n == W ? _mm_loadu_si128((const __m128i*)p) : _mm_maskz_loadu_epi8((Lanes)((1u << n) - 1), p);
  return _mm_test_epi8_mask(bytes, bytes);
}
#else
typedef vi Lanes;
inline Lanes less(vf x, vf y) { return x < y; }
inline Lanes equal(vf x, vf y) { return x == y; }
inline Lanes not_less(vf x, vf y) { return ~(x < y); }
inline vf select(Lanes which, vf x, vf y) { return which ? x : y; }
inline Lanes load_kept(const uint8_t* p, int n) { return load_marks(p, n) != 0; }
#endif

}  // namespace p2r::cpu::P2R_ISA
