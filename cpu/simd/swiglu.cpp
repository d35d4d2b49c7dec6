// SwiGLU and its gradient over rows of f32, without branches.
#include "cpu/simd/simd.h"
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

namespace {

// Clamps that pass on a NaN.
inline vf at_least(vf x, float low) { return x < low ? set1(low) : x; }
inline vf at_most(vf x, float high) { return x > high ? set1(high) : x; }

inline vf sigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }

// Below -1e4 the sigmoid is 0: the clamp avoids infinity times 0.
inline vf silu(vf x) {
  const vf y = at_least(x, -1e4f);
  return y * sigmoid(y);
}

// 1 - σ(x) is taken as e^-x σ(x), which does not cancel. Beyond the clamp, where e^-x would be
// infinite, the derivative is 0 or 1 in f32.
inline vf silu_derivative(vf x) {
  const vf y = at_most(at_least(x, -88.0f), 88.0f);
  const vf e = vexp(-y), s = 1.0f / (1.0f + e);
  return s * (1.0f + y * (e * s));
}

}  // namespace

void swiglu(const float* gate, const float* up, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    const int count = n - i < W ? static_cast<int>(n - i) : W;
    const auto part = [count](const float* p) {
      return count == W ? loadf(p) : load_first<vf>(p, count);
    };
    store_first(out + i, silu(part(gate + i)) * part(up + i), count);
  }
}

void swiglu_backward(const float* d_out, const float* gate, const float* up, float* d_gate,
                     float* d_up, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    const int count = n - i < W ? static_cast<int>(n - i) : W;
    const auto part = [count](const float* p) {
      return count == W ? loadf(p) : load_first<vf>(p, count);
    };
    const vf d = part(d_out + i), g = part(gate + i), u = part(up + i);
    store_first(d_gate + i, d * u * silu_derivative(g), count);
    store_first(d_up + i, d * silu(g), count);
  }
}

}  // namespace p2r::cpu::P2R_ISA
