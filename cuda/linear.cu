// The linear layer: three matrix products (gemm.cuh) and the column sums that are the gradient of
// the bias.
#include "cuda/gemm.cuh"
#include "ops/linear.h"

namespace p2r::cuda {

namespace {

constexpr int kAcross = 32, kDown = 8;

// A block owns 32 columns of one slice of the rows; its 8 rows of threads take turns down the
// slice. partial [slices, n].
template <class T>
__global__ void __launch_bounds__(kAcross* kDown)
    column_sums_kernel(const T* x, int64_t rows, int64_t n, int64_t slice_rows, float* partial) {
  SMEM_ARRAY(float, sums, kDown* kAcross);
  const int across = static_cast<int>(threadIdx.x) % kAcross;
  const int down = static_cast<int>(threadIdx.x) / kAcross;
  const int64_t j = blockIdx.x * int64_t{kAcross} + across;
  const int64_t begin = blockIdx.y * slice_rows;
  const int64_t end = begin + slice_rows < rows ? begin + slice_rows : rows;
  float sum = 0;
  if (j < n)
    for (int64_t i = begin + down; i < end; i += kDown) sum += to_float(x[i * n + j]);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (down == 0 && j < n) {
    for (int d = 1; d < kDown; ++d) sum += sums[d * kAcross + across];
    partial[blockIdx.y * n + j] = sum;
  }
}

// sums[j] (+)= Σ_i x[i, j], the slices cut by the shape alone and added in order.
template <class T>
void column_sums(Device& device, const T* x, int64_t rows, int64_t n, float* sums, bool add) {
  if (!n) return;
  constexpr int64_t kMostSlices = 64, kSliceRows = 128;
  const int64_t slices = std::clamp<int64_t>(rows / kSliceRows, 1, kMostSlices);
  const Scratch scratch = device.scratch(slices * n * sizeof(float));
  float* partial = scratch.as<float>();
  launch(column_sums_kernel<T>,
         dim3(static_cast<unsigned>(ceil_div(n, kAcross)), static_cast<unsigned>(slices)),
         kAcross * kDown, 0, stream_of(device), x, rows, n, ceil_div(rows, slices), partial);
  launch(gemm_detail::finish_kernel<float>, blocks_for(n, gemm_detail::kThreads),
         gemm_detail::kThreads, 0, stream_of(device), partial, slices, int64_t{1}, n, sums, n, add,
         Bias{});
}

// The leading axes taken together.
int64_t rows_of(const View& v) {
  int64_t rows = 1;
  for (int i = 0; i + 1 < v.shape.rank; ++i) rows *= v.shape[i];
  return rows;
}

}  // namespace

void linear(const LinearArgs& a, Device& device) {
  const int64_t features = a.weight.shape[0], channels = a.weight.shape[1];
  with_float_type(a.x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    gemm(device, Gemm<T, T, T>{.m = rows_of(a.x),
                               .n = features,
                               .k = channels,
                               .a = {a.x.as<const T>(), channels, 1},
                               .b = {a.weight.as<const T>(), 1, channels},
                               .c = a.out.as<T>(),
                               .c_row_stride = features,
                               .bias = {a.bias.data, a.bias.dtype}});
  });
}

void linear_backward(const LinearBackwardArgs& a, Device& device) {
  const int64_t rows = rows_of(a.x), features = a.weight.shape[0], channels = a.weight.shape[1];
  const View weight = a.into_weight ? View(a.into_weight) : View(a.d_weight);
  const View bias = a.into_bias ? View(a.into_bias) : View(a.d_bias);
  with_float_type(a.x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const T* d_out = a.d_out.as<const T>();
    gemm(device, Gemm<T, T, T>{.m = rows,
                               .n = channels,
                               .k = features,
                               .a = {d_out, features, 1},
                               .b = {a.weight.as<const T>(), channels, 1},
                               .c = a.d_x.as<T>(),
                               .c_row_stride = channels});
    gemm(device, Gemm<T, T, float>{.m = features,
                                   .n = channels,
                                   .k = rows,
                                   .a = {d_out, 1, features},
                                   .b = {a.x.as<const T>(), channels, 1},
                                   .c = weight.as<float>(),
                                   .c_row_stride = channels,
                                   .accumulate = bool(a.into_weight)});
    if (bias) column_sums(device, d_out, rows, features, bias.as<float>(), bool(a.into_bias));
  });
}

}  // namespace p2r::cuda
