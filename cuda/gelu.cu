// GELU: one grid-stride loop over the elements; memory-bound.
#include "cuda/launch.cuh"
#include "ops/gelu.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256;
constexpr float kRsqrt2 = 0.70710678118654752f, kSqrt2OverPi = 0.79788456080286536f,
                kCubic = 0.044715f, kRsqrt2Pi = 0.39894228040143268f;

template <class T>
__global__ void __launch_bounds__(kBlock) gelu_kernel(const T* x, T* out, int64_t n, bool tanh) {
  for (int64_t i = blockIdx.x * int64_t{kBlock} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kBlock) {
    const float raw = to_float(x[i]);
    const float v = raw < -1e4f ? -1e4f : raw;  // so that -infinity gives -0, its limit
    const float cdf = tanh ? 0.5f * (1 + tanhf(kSqrt2OverPi * (v + kCubic * v * v * v)))
                           : 0.5f * (1 + erff(v * kRsqrt2));
    out[i] = from_float<T>(v * cdf);
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    gelu_backward_kernel(const T* d_out, const T* x, T* d_x, int64_t n, bool tanh) {
  for (int64_t i = blockIdx.x * int64_t{kBlock} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kBlock) {
    const float raw = to_float(x[i]);
    // Beyond these bounds the derivative is 0 or 1; x = inf would give inf * 0 = NaN.
    const float v = raw < -100.0f ? -100.0f : raw > 100.0f ? 100.0f : raw;
    float derivative;
    if (tanh) {
      const float t = tanhf(kSqrt2OverPi * (v + kCubic * v * v * v));
      derivative =
          0.5f * (1 + t) + 0.5f * v * (1 - t * t) * kSqrt2OverPi * (1 + 3 * kCubic * v * v);
    } else {
      derivative = 0.5f * (1 + erff(v * kRsqrt2)) + v * kRsqrt2Pi * expf(-0.5f * v * v);
    }
    d_x[i] = from_float<T>(to_float(d_out[i]) * derivative);
  }
}

}  // namespace

void gelu(const GeluArgs& a, Device& device) {
  const int64_t n = a.x.size();
  if (!n) return;
  with_float_type(a.x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    launch(gelu_kernel<T>, blocks_for(n, kBlock), kBlock, 0, stream_of(device), a.x.as<const T>(),
           a.out.as<T>(), n, a.tanh);
  });
}

void gelu_backward(const GeluBackwardArgs& a, Device& device) {
  const int64_t n = a.x.size();
  if (!n) return;
  with_float_type(a.x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    launch(gelu_backward_kernel<T>, blocks_for(n, kBlock), kBlock, 0, stream_of(device),
           a.d_out.as<const T>(), a.x.as<const T>(), a.d_x.as<T>(), n, a.tanh);
  });
}

}  // namespace p2r::cuda
