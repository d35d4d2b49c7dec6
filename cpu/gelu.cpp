// GELU and its gradient, element by element, in chunks over threads.
#include "ops/gelu.h"

#include "cpu/device.h"

namespace p2r::cpu {

namespace {

// Elements of one task; 16-bit types are converted to f32 in blocks of kBlock within it.
constexpr int64_t kGrain = 16384, kBlock = 1024;

}  // namespace

void gelu(const GeluArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  cpu.launch(a.x.size(), kGrain, [a, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
    if (a.x.dtype == DType::f32) {
      simd.gelu(a.x.as<const float>() + begin, a.out.as<float>() + begin, end - begin, a.tanh);
      return;
    }
    float x[kBlock];
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t n = end - i < kBlock ? end - i : kBlock;
      simd.to_f32(a.x.dtype, a.x.element(i), x, n);
      simd.gelu(x, x, n, a.tanh);
      simd.from_f32(a.out.dtype, x, a.out.element(i), n);
    }
  });
}

void gelu_backward(const GeluBackwardArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  cpu.launch(a.x.size(), kGrain, [a, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
    if (a.x.dtype == DType::f32) {
      simd.gelu_backward(a.d_out.as<const float>() + begin, a.x.as<const float>() + begin,
                         a.d_x.as<float>() + begin, end - begin, a.tanh);
      return;
    }
    float x[kBlock], d[kBlock];
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t n = end - i < kBlock ? end - i : kBlock;
      simd.to_f32(a.x.dtype, a.x.element(i), x, n);
      simd.to_f32(a.d_out.dtype, a.d_out.element(i), d, n);
      simd.gelu_backward(d, x, d, n, a.tanh);
      simd.from_f32(a.d_x.dtype, d, a.d_x.element(i), n);
    }
  });
}

}  // namespace p2r::cpu
