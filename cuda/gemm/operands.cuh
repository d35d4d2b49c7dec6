// The operands of a GEMM, whichever kernel computes it (cuda/gemm/gemm.cuh), and the reduction that
// ends a split-K one.
#pragma once
#include <algorithm>

#include "cuda/launch.cuh"

namespace p2r::cuda {

// Which axis of an operand is contiguous: k, which is summed over, or the other one (m of A, n of
// B).
enum class Major { k, mn };

// `stride`: elements from one contiguous line to the next, BLAS's leading dimension.
template <class T>
struct Operand {
  const T* data = nullptr;
  int64_t stride = 0;
};

// n values of any float type; none where data is null.
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
  // m x n, row-major.
  C* c = nullptr;
  int64_t c_row_stride = 0;
  bool accumulate = false;       // C should then be f32
  Bias bias = {};                // added to each row
  const float* scale = nullptr;  // of A B alone; in device memory; 1 unless given
  // Allows split-K, whose number of splits depends on m: without it a row has the same bits in any
  // batch.
  bool split_k = true;
};

namespace gemm_detail {

constexpr int kReduceBlock = 256;

// c (+)= scale * (the sum of the splits' partial products, in order) + bias.
template <class C>
__global__ void __launch_bounds__(kReduceBlock)
    reduce_splits_kernel(const float* partials, int64_t splits, int64_t m, int64_t n, C* c,
                         int64_t c_row_stride, bool accumulate, Bias bias, const float* scale) {
  for (int64_t e = blockIdx.x * int64_t{kReduceBlock} + threadIdx.x; e < m * n;
       e += int64_t{gridDim.x} * kReduceBlock) {
    float v = partials[e];
    for (int64_t s = 1; s < splits; ++s) v += partials[s * m * n + e];
    C* out = c + e / n * c_row_stride + e % n;
    if (scale) v *= *scale;
    if (bias.data) v += bias[e % n];
    if (accumulate) v += to_float(*out);
    *out = from_float<C>(v);
  }
}

template <class C>
void reduce_splits(const float* partials, int64_t splits, int64_t m, int64_t n, C* c,
                   int64_t c_row_stride, bool accumulate, Bias bias, const float* scale,
                   cudaStream_t stream) {
  launch(reduce_splits_kernel<C>, blocks_for(m * n, kReduceBlock), kReduceBlock, 0, stream,
         partials, splits, m, n, c, c_row_stride, accumulate, bias, scale);
}

}  // namespace gemm_detail

}  // namespace p2r::cuda
