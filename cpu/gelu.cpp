#include "ops/gelu.h"

#include <cmath>

#include "cpu/device.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kGrain = 4096;
constexpr float kRsqrt2 = 0.70710678118654752f, kSqrt2OverPi = 0.79788456080286536f,
                kCubic = 0.044715f, kRsqrt2Pi = 0.39894228040143268f;

float value(float x, bool tanh) {
  if (tanh) return 0.5f * x * (1 + std::tanh(kSqrt2OverPi * (x + kCubic * x * x * x)));
  return 0.5f * x * (1 + std::erf(x * kRsqrt2));
}

float slope(float x, bool tanh) {
  if (tanh) {
    const float t = std::tanh(kSqrt2OverPi * (x + kCubic * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * kSqrt2OverPi * (1 + 3 * kCubic * x * x);
  }
  return 0.5f * (1 + std::erf(x * kRsqrt2)) + x * kRsqrt2Pi * std::exp(-0.5f * x * x);
}

char* at(const View& v, int64_t i) { return v.as<char>() + i * size_of(v.dtype); }

}  // namespace

void gelu(const GeluArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  cpu.launch(a.x.size(), kGrain, [a, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
    float x[kGrain];
    simd.to_f32(a.x.dtype, at(a.x, begin), x, end - begin);
    for (int64_t i = 0; i < end - begin; ++i) x[i] = value(x[i], a.tanh);
    simd.from_f32(a.out.dtype, x, at(a.out, begin), end - begin);
  });
}

void gelu_backward(const GeluBackwardArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  cpu.launch(a.x.size(), kGrain, [a, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
    float x[kGrain], d[kGrain];
    simd.to_f32(a.x.dtype, at(a.x, begin), x, end - begin);
    simd.to_f32(a.d_out.dtype, at(a.d_out, begin), d, end - begin);
    for (int64_t i = 0; i < end - begin; ++i) d[i] *= slope(x[i], a.tanh);
    simd.from_f32(a.d_x.dtype, d, at(a.d_x, begin), end - begin);
  });
}

}  // namespace p2r::cpu
