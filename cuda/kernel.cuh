// What kernels and their launchers share. They see no more of the CUDA runtime than this and
// ptx.cuh, so that the kernel twin can compile them (test/twin).
#pragma once
#include "cuda/ptx.cuh"
#include "cuda/stream.h"

namespace p2r::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for a grid-stride loop over n items: enough to fill any chip, few enough to be cheap.
inline unsigned blocks_for(int64_t n, int block) {
  const int64_t wanted = ceil_div(n, block);
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted > 65536 ? 65536 : wanted);
}

// Calls f with a null pointer of the element type of a float dtype.
template <class F>
void with_float_type(DType t, F&& f) {
  if (t == DType::f32)
    f(static_cast<float*>(nullptr));
  else if (t == DType::f16)
    f(static_cast<__half*>(nullptr));
  else
    f(static_cast<__nv_bfloat16*>(nullptr));
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

}  // namespace p2r::cuda
