// The places of the entries of a row that are at least a bound. Most vectors have none.
#include "cpu/simd/simd.h"
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

namespace {

inline bool any(vi lanes) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)lanes) != 0;
#else
  int32_t either = 0;
  for (int i = 0; i < W; ++i) either |= lanes[i];
  return either != 0;
#endif
}

}  // namespace

int64_t find_at_least(const float* x, int64_t n, float low, int32_t first, int32_t* places) {
  int64_t found = 0, i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    vi reached = {};
    for (int k = 0; k < 4; ++k) reached |= loadf(x + i + k * W) >= low;
    if (!any(reached)) continue;
    for (int64_t j = i; j < i + 4 * W; ++j)
      if (x[j] >= low) places[found++] = first + static_cast<int32_t>(j);
  }
  for (; i < n; ++i)
    if (x[i] >= low) places[found++] = first + static_cast<int32_t>(i);
  return found;
}

}  // namespace p2r::cpu::P2R_ISA
