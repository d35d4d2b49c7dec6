// What a matrix product is, however it is computed (cuda/gemm/gemm.cuh).
#pragma once
#include <algorithm>

#include "cuda/launch.cuh"

namespace p2r::cuda {

// Which axis of an operand has its entries side by side: the one summed over, or the other one.
enum class Along { k, mn };

// The lines of an operand lie `stride` elements behind each other.
template <class T>
struct Operand {
  const T* data = nullptr;
  int64_t stride = 0;
};

// n values of any float type, or none.
struct Bias {
  const void* data = nullptr;
  DType dtype = DType::f32;

  __device__ __forceinline__ float operator[](int64_t i) const {
    if (dtype == DType::f32) return static_cast<const float*>(data)[i];
    if (dtype == DType::f16) return to_float(static_cast<const __half*>(data)[i]);
    return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
  }
};

template <class A, class B, class C>
struct Gemm {
  int64_t m = 0, n = 0, k = 0;
  Operand<A> a = {};  // m x k
  Operand<B> b = {};  // k x n
  // m x n, each row's entries side by side.
  C* c = nullptr;
  int64_t c_row_stride = 0;
  bool accumulate = false;       // C should then be f32
  Bias bias = {};                // added to each row
  const float* scale = nullptr;  // of A B alone; in device memory; 1 unless given
  // Sums over k in one run, so that a row's do not depend on how many rows there are.
  bool whole_k = false;
};

// c (+)= scale * the partial Cs, added in order, + bias.
namespace gemm_detail {

constexpr int kFinishBlock = 256;

template <class C>
__global__ void __launch_bounds__(kFinishBlock)
    finish_kernel(const float* partial, int64_t slices, int64_t m, int64_t n, C* c,
                  int64_t c_row_stride, bool accumulate, Bias bias, const float* scale) {
  for (int64_t e = blockIdx.x * int64_t{kFinishBlock} + threadIdx.x; e < m * n;
       e += int64_t{gridDim.x} * kFinishBlock) {
    float v = partial[e];
    for (int64_t s = 1; s < slices; ++s) v += partial[s * m * n + e];
    C* to = c + e / n * c_row_stride + e % n;
    if (scale) v *= *scale;
    if (bias.data) v += bias[e % n];
    if (accumulate) v += to_float(*to);
    *to = from_float<C>(v);
  }
}

template <class C>
void finish(const float* partial, int64_t slices, int64_t m, int64_t n, C* c, int64_t c_row_stride,
            bool accumulate, Bias bias, const float* scale, cudaStream_t stream) {
  launch(finish_kernel<C>, blocks_for(m * n, kFinishBlock), kFinishBlock, 0, stream, partial,
         slices, m, n, c, c_row_stride, accumulate, bias, scale);
}

}  // namespace gemm_detail

}  // namespace p2r::cuda
