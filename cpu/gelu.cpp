#include "ops/gelu.h"

#include "cpu/device.h"

namespace p2r::cpu {

namespace {

// A chunk is worth a thread; within it, halves are widened a block at a time.
constexpr int64_t kGrain = 16384, kBlock = 1024;

char* at(const View& v, int64_t i) { return v.as<char>() + i * size_of(v.dtype); }

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
      simd.to_f32(a.x.dtype, at(a.x, i), x, n);
      simd.gelu(x, x, n, a.tanh);
      simd.from_f32(a.out.dtype, x, at(a.out, i), n);
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
      simd.to_f32(a.x.dtype, at(a.x, i), x, n);
      simd.to_f32(a.d_out.dtype, at(a.d_out, i), d, n);
      simd.gelu_backward(d, x, d, n, a.tanh);
      simd.from_f32(a.d_x.dtype, d, at(a.d_x, i), n);
    }
  });
}

}  // namespace p2r::cpu
