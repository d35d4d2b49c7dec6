// Rotary embedding of one head of one token, in the rotate-half form.
#include "cpu/simd/simd.h"
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

namespace {

struct Pair {
  vf low, high;
};

// c, s and d, t: cosine and sine for the lower and the upper half.
inline Pair rotate(vf x, vf y, vf c, vf s, vf d, vf t, bool inverse) {
  if (inverse) return {c * x + t * y, d * y - s * x};
  return {c * x - s * y, d * y + t * x};
}

}  // namespace

void rotate_half(const float* x, const float* cos, const float* sin, int64_t half, bool inverse,
                 float* y) {
  for (int64_t i = 0; i < half; i += W) {
    const int n = half - i < W ? static_cast<int>(half - i) : W;
    const auto part = [n](const float* p) { return n == W ? loadf(p) : load_first<vf>(p, n); };
    const Pair p = rotate(part(x + i), part(x + half + i), part(cos + i), part(sin + i),
                          part(cos + half + i), part(sin + half + i), inverse);
    store_first(y + i, p.low, n);
    store_first(y + half + i, p.high, n);
  }
}

}  // namespace p2r::cpu::P2R_ISA
