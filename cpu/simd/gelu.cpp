// GELU and its gradient, without branches and without a difference that cancels.
//
// none: the lower tail Φ(-|x|) = e^{-x²/2} q(t), t = 1 / (1 + 0.3 |x|), the form of Abramowitz and
// Stegun 7.1.26. q is our own fit: the polynomial of degree 8 with the smallest relative error on
// 0 <= |x| <= 14 (5.8e-8; 3.6e-7 when evaluated in f32), where Φ leaves the range of f32.
// tanh: (1 + tanh u) / 2 = 1 / (1 + e^{-2u}).
#include "cpu/simd/simd.h"
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

namespace {

constexpr float kTail[] = {7.168876e-06f, 0.11948769f, 0.12192034f,  0.09468352f, 0.14253552f,
                           -0.07650648f,  0.22866008f, -0.16916612f, 0.03837829f};
constexpr float kRsqrt2Pi = 0.39894228040143268f;
constexpr float kTwoSqrt2OverPi = 1.5957691216057308f, kCubic = 0.044715f;

// Clamps that pass on a NaN.
inline vf at_least(vf x, float low) { return x < low ? set1(low) : x; }
inline vf at_most(vf x, float high) { return x > high ? set1(high) : x; }

// e^x for x <= 88 with a relative error of some 1e-7; 0 below -87. Cody and Waite's reduction by
// ln 2 in two parts, then the series to x^6 on |x| <= ln(2) / 2.
inline vf exponential(vf x) {
  constexpr float kShift = 12582912.0f;  // 1.5 · 2^23: adding it rounds to a whole number
  const vf y = at_least(x, -88.0f);
  const vf shifted = y * kLog2e + kShift;
  const vf n = shifted - kShift;
  const vf r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = set1(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const vf scale = from_bits((bits(shifted) + 127u) << 23);
  return x < -87.0f ? vf{} : p * scale;
}

inline vf magnitude(vf x) { return from_bits(bits(x) & 0x7FFFFFFFu); }

// Φ(x), and e^{-x²/2} for the derivative.
inline vf cdf(vf x, vf* gaussian) {
  const vf z = magnitude(x);
  const vf t = 1.0f / (1.0f + 0.3f * z);
  vf q = set1(kTail[8]);
  for (int i = 7; i >= 0; --i) q = q * t + kTail[i];
  *gaussian = exponential(-0.5f * z * z);
  const vf tail = *gaussian * q;
  return x > 0 ? 1.0f - tail : tail;
}

// Clamping x does not change the result, but avoids infinity times 0.
inline vf value(vf x, bool tanh) {
  const vf y = at_least(x, -1e4f);
  vf gaussian;
  if (!tanh) return y * cdf(y, &gaussian);
  const vf z = at_most(y, 1e4f);
  const vf u2 = kTwoSqrt2OverPi * (z + kCubic * z * z * z);
  // For u < 0, e^{2u} / (1 + e^{2u}), which cannot overflow.
  const vf e = exponential(-magnitude(u2));
  return y * ((u2 < 0 ? e : set1(1.0f)) / (1.0f + e));
}

inline vf derivative(vf x, bool tanh) {
  const vf y = at_most(at_least(x, -100.0f), 100.0f);
  if (!tanh) {
    vf gaussian;
    const vf below = cdf(y, &gaussian);
    return below + y * gaussian * kRsqrt2Pi;
  }
  const vf u2 = kTwoSqrt2OverPi * (y + kCubic * y * y * y);
  const vf e = exponential(-magnitude(u2));
  const vf inverse = 1.0f / (1.0f + e);
  const vf sigmoid = (u2 < 0 ? e : set1(1.0f)) * inverse;
  return sigmoid + y * (e * inverse * inverse) * kTwoSqrt2OverPi * (1.0f + 3 * kCubic * y * y);
}

}  // namespace

void gelu(const float* x, float* y, int64_t n, bool tanh) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, value(loadf(x + i), tanh));
  if (i < n) {
    vf tail = {};
    memcpy(&tail, x + i, (n - i) * 4);
    tail = value(tail, tanh);
    memcpy(y + i, &tail, (n - i) * 4);
  }
}

void gelu_backward(const float* d_out, const float* x, float* d_x, int64_t n, bool tanh) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(d_x + i, loadf(d_out + i) * derivative(loadf(x + i), tanh));
  if (i < n) {
    vf tail = {}, d = {};
    memcpy(&tail, x + i, (n - i) * 4);
    memcpy(&d, d_out + i, (n - i) * 4);
    d *= derivative(tail, tanh);
    memcpy(d_x + i, &d, (n - i) * 4);
  }
}

}  // namespace p2r::cpu::P2R_ISA
