// Column sums: the gradient of a bias.
#pragma once
#include "cuda/gemm/gemm.cuh"

namespace p2r::cuda {

namespace linear_detail {

constexpr int kAcross = 32, kDown = 8;

// A block owns 32 columns of one slice of the rows; its 8 rows of threads take turns down the
// slice. partial [slices, n].
template <class T>
__global__ void __launch_bounds__(kAcross* kDown)
    column_sums_kernel(const T* x, int64_t rows, int64_t n, int64_t stride, int64_t slice_rows,
                       float* partial) {
  SMEM_ARRAY(float, sums, kDown* kAcross);
  const int across = static_cast<int>(threadIdx.x) % kAcross;
  const int down = static_cast<int>(threadIdx.x) / kAcross;
  const int64_t j = blockIdx.x * int64_t{kAcross} + across;
  const int64_t begin = blockIdx.y * slice_rows;
  const int64_t end = begin + slice_rows < rows ? begin + slice_rows : rows;
  float sum = 0;
  if (j < n)
    for (int64_t i = begin + down; i < end; i += kDown) sum += to_float(x[i * stride + j]);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (down == 0 && j < n) {
    for (int d = 1; d < kDown; ++d) sum += sums[d * kAcross + across];
    partial[blockIdx.y * n + j] = sum;
  }
}

}  // namespace linear_detail

// sums[j] (+)= scale * Σ_i x[i, j], the slices cut by the shape alone and added in order.
template <class T>
void column_sums(Device& device, const T* x, int64_t rows, int64_t n, int64_t row_stride,
                 float* sums, bool add, const float* scale) {
  using namespace linear_detail;
  if (!n) return;
  constexpr int64_t kMostSlices = 64, kSliceRows = 128;
  const int64_t slices = std::clamp<int64_t>(rows / kSliceRows, 1, kMostSlices);
  const Scratch scratch = device.scratch(slices * n * sizeof(float));
  float* partial = scratch.as<float>();
  launch(column_sums_kernel<T>,
         dim3(static_cast<unsigned>(ceil_div(n, kAcross)), static_cast<unsigned>(slices)),
         kAcross * kDown, 0, stream_of(device), x, rows, n, row_stride, ceil_div(rows, slices),
         partial);
  gemm_detail::finish(partial, slices, 1, n, sums, n, add, {}, scale, stream_of(device));
}

}  // namespace p2r::cuda
