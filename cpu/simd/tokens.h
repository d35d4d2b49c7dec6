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

}  // namespace p2r::cpu::P2R_ISA
