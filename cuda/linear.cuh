// What linear layers share: products of rows (linear.cu, quantize.cu), and column sums of a matrix,
// the gradient of a bias (linear.cu, linear_log_probs.cu).
#pragma once
#include "cuda/gemm/gemm.cuh"

namespace p2r::cuda {

// The product of the leading axes.
inline int64_t rows_of(const View& v) {
  int64_t rows = 1;
  for (int i = 0; i + 1 < v.shape.rank; ++i) rows *= v.shape[i];
  return rows;
}

// Calls f with out's data as T*, or float* where it is f32.
template <class T, class F>
void with_result(const View& out, const F& f) {
  if constexpr (!std::is_same_v<T, float>)
    if (out.dtype != DType::f32) return f(out.as<T>());
  f(out.as<float>());
}

// out [m, n] = x [m, k] weight [n, k]^T + bias by the GEMM; out f32 or of T.
template <class T>
void multiply_many_rows(Device& device, const T* x, const T* weight, Bias bias, const View& out,
                        int64_t m, int64_t n, int64_t k) {
  with_result<T>(out, [&](auto* to) {
    using Out = std::remove_pointer_t<decltype(to)>;
    gemm<Major::k, Major::k>(device, Gemm<T, T, Out>{.m = m,
                                                     .n = n,
                                                     .k = k,
                                                     .a = {x, k},
                                                     .b = {weight, k},
                                                     .c = to,
                                                     .c_row_stride = n,
                                                     .bias = bias});
  });
}

namespace linear_detail {

constexpr int kColumns = 32, kRows = 8;

// A block sums 32 columns over one split of the rows; its 8 warps take the rows in turn. partials:
// [splits, n].
template <class T>
__global__ void __launch_bounds__(kColumns* kRows)
    column_sums_kernel(const T* x, int64_t rows, int64_t n, int64_t stride, int64_t split_rows,
                       float* partials) {
  SMEM_ARRAY(float, sums, kRows* kColumns);
  const int lane = static_cast<int>(threadIdx.x) % kColumns;
  const int warp = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t j = blockIdx.x * int64_t{kColumns} + lane;
  const int64_t begin = blockIdx.y * split_rows;
  const int64_t end = begin + split_rows < rows ? begin + split_rows : rows;
  float sum = 0;
  if (j < n)
    for (int64_t i = begin + warp; i < end; i += kRows) sum += to_float(x[i * stride + j]);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp == 0 && j < n) {
    for (int d = 1; d < kRows; ++d) sum += sums[d * kColumns + lane];
    partials[blockIdx.y * n + j] = sum;
  }
}

}  // namespace linear_detail

// sums[j] (+)= scale * Σ_i x[i, j]. The number of splits follows from the shape alone, and they are
// added in order.
template <class T>
void column_sums(Device& device, const T* x, int64_t rows, int64_t n, int64_t row_stride,
                 float* sums, bool add, const float* scale) {
  using namespace linear_detail;
  if (!n) return;
  constexpr int64_t kMaxSplits = 64, kMinSplitRows = 128;
  const int64_t splits = std::clamp<int64_t>(rows / kMinSplitRows, 1, kMaxSplits);
  const Scratch scratch = device.scratch(splits * n * sizeof(float));
  float* partials = scratch.as<float>();
  launch(column_sums_kernel<T>,
         dim3(static_cast<unsigned>(ceil_div(n, kColumns)), static_cast<unsigned>(splits)),
         kColumns * kRows, 0, stream_of(device), x, rows, n, row_stride, ceil_div(rows, splits),
         partials);
  gemm_detail::reduce_splits(partials, splits, 1, n, sums, n, add, {}, scale, stream_of(device));
}

}  // namespace p2r::cuda
