// SwiGLU and its gradient. Bound by memory: forward reads gate and up and writes out once, backward
// reads three and writes two tensors. A grid-stride loop, 16 bytes of each tensor a thread and
// step.
//
// Predicted on an H200 (4.8 TB/s) for 4096 rows of 6144 bf16: 151 MB forward, 39 µs at 80 %;
// 252 MB backward, 66 µs.
#include "cuda/vectors.cuh"
#include "ops/swiglu.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Below -1e4 the sigmoid is 0: the clamp avoids infinity times 0.
__device__ __forceinline__ float silu(float x) {
  const float y = x < -1e4f ? -1e4f : x;
  return y * sigmoid(y);
}

// 1 - σ(x) is taken as e^-x σ(x), which does not cancel. Beyond the clamp, where e^-x would be
// infinite, the derivative is 0 or 1 in f32.
__device__ __forceinline__ float silu_derivative(float x) {
  const float y = x < -88.0f ? -88.0f : x > 88.0f ? 88.0f : x;
  const float e = expf(-y), s = 1.0f / (1.0f + e);
  return s * (1.0f + y * (e * s));
}

template <class T, int N>
__global__ void __launch_bounds__(kBlock)
    swiglu_kernel(const T* gate, const T* up, T* out, int64_t n, GateUp rows) {
  using V = Vector<T, N>;
  for (int64_t i = (blockIdx.x * int64_t{kBlock} + threadIdx.x) * N; i < n;
       i += int64_t{gridDim.x} * kBlock * N) {
    const int64_t at = i / rows.width * rows.pitch + i % rows.width;
    V g = V::load(gate + at);
    const V u = V::load(up + at);
#pragma unroll
    for (int k = 0; k < N; ++k) g.v[k] = from_float<T>(silu(to_float(g.v[k])) * to_float(u.v[k]));
    g.store(out + i);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kBlock)
    swiglu_backward_kernel(const T* d_out, const T* gate, const T* up, T* d_gate, T* d_up,
                           int64_t n, GateUp rows) {
  using V = Vector<T, N>;
  for (int64_t i = (blockIdx.x * int64_t{kBlock} + threadIdx.x) * N; i < n;
       i += int64_t{gridDim.x} * kBlock * N) {
    const int64_t at = i / rows.width * rows.pitch + i % rows.width;
    const V d = V::load(d_out + i);
    V g = V::load(gate + at), u = V::load(up + at);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float x = to_float(g.v[k]), dv = to_float(d.v[k]);
      g.v[k] = from_float<T>(dv * to_float(u.v[k]) * silu_derivative(x));
      u.v[k] = from_float<T>(dv * silu(x));
    }
    g.store(d_gate + at);
    u.store(d_up + at);
  }
}

}  // namespace

void swiglu(const SwigluArgs& a, Device& device) {
  const int64_t n = a.out.size();
  if (!n) return;
  const GateUp rows(a.up, a.out);
  const View up = rows.up_of(a.gate, a.up);
  with_vectors(a.out.dtype, rows.width, {a.gate.data, up.data, a.out.data}, [&](auto* t, auto v) {
    using T = std::remove_pointer_t<decltype(t)>;
    launch(swiglu_kernel<T, v.value>, blocks_for(n / v.value, kBlock), kBlock, 0, stream_of(device),
           a.gate.as<const T>(), up.as<const T>(), a.out.as<T>(), n, rows);
  });
}

void swiglu_backward(const SwigluBackwardArgs& a, Device& device) {
  const int64_t n = a.d_out.size();
  if (!n) return;
  const GateUp rows(a.up, a.d_out);
  const View up = rows.up_of(a.gate, a.up), d_up = rows.up_of(a.d_gate, a.d_up);
  with_vectors(a.d_out.dtype, rows.width,
               {a.d_out.data, a.gate.data, up.data, a.d_gate.data, d_up.data},
               [&](auto* t, auto v) {
                 using T = std::remove_pointer_t<decltype(t)>;
                 launch(swiglu_backward_kernel<T, v.value>, blocks_for(n / v.value, kBlock), kBlock,
                        0, stream_of(device), a.d_out.as<const T>(), a.gate.as<const T>(),
                        up.as<const T>(), a.d_gate.as<T>(), d_up.as<T>(), n, rows);
               });
}

}  // namespace p2r::cuda
