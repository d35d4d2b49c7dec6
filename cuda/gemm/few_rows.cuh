// out [m, n] = x [m, k] weight [n, k]^T + bias for up to 16 rows, as in decoding, on CUDA cores.
//
// Traffic: the weight, once; x stays in L1 and L2. A block of four warps owns four features and up
// to eight rows of x, and its threads take 16 bytes of k each in turn, from all four features'
// rows, so that every load of x serves four of the weight: 32 accumulators a thread. Warps take
// turns along k, not features, because a layer of 2048 features has just 512 such blocks, four for
// each multiprocessor of an H200: 16 warps with 64 bytes a thread in flight, 32 KB, and by Little's
// law 4.8 TB/s at 0.7 us need 25 KB. The sums of lanes are merged by a fixed tree, then those of
// the warps in order; a row's arithmetic does not depend on how many there are. Nine to sixteen
// rows are two blocks that run side by side, of which one reads the weight from L2.
//
// Predicted (H200, bf16, [6144, 2048], 25 MB): 6.6 us for 1 row, 80 % of 4.8 TB/s. With 8 rows a
// multiprocessor does 85 multiply-adds a cycle of 128, at 21 bytes of the weight: still bound by
// memory, 7 us; with 16 by arithmetic, 13 us.
#pragma once
#include "cuda/gemm/operands.cuh"
#include "cuda/reduce.cuh"

namespace p2r::cuda::few_rows {

constexpr int kMaxRows = 16;
constexpr int kThreads = 128, kWarps = kThreads / 32, kFeatures = 4, kRows = 8;

template <class T>
constexpr int kVector = 16 / sizeof(T);

// The f32 values of 16 bytes.
template <class T>
__device__ __forceinline__ void load_vector(float (&v)[kVector<T>], const T* p) {
  const uint4 bytes = *reinterpret_cast<const uint4*>(p);
  T values[kVector<T>];
  memcpy(values, &bytes, 16);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) v[i] = to_float(values[i]);
}

template <class T, class Out>
__global__ void __launch_bounds__(kThreads)
    few_rows_kernel(const T* x, const T* weight, Bias bias, Out* out, int64_t m, int64_t n,
                    int64_t k) {
  SMEM_ARRAY(float, sums, kWarps* kFeatures* kRows);
  const int64_t row_tiles = ceil_div(m, kRows);
  const int64_t first_row = blockIdx.x % row_tiles * kRows;
  const int64_t first = blockIdx.x / row_tiles * kFeatures;
  const int rows = static_cast<int>(m - first_row < kRows ? m - first_row : kRows);
  const int features = static_cast<int>(n - first < kFeatures ? n - first : kFeatures);
  float acc[kFeatures][kRows] = {};
  for (int64_t c = int64_t{threadIdx.x} * kVector<T>; c < k; c += kThreads * kVector<T>) {
    float w[kFeatures][kVector<T>] = {};
#pragma unroll
    for (int f = 0; f < kFeatures; ++f)
      if (f < features) load_vector(w[f], weight + (first + f) * k + c);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      float v[kVector<T>];
      load_vector(v, x + (first_row + r) * k + c);
#pragma unroll
      for (int f = 0; f < kFeatures; ++f)
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) acc[f][r] = fmaf(w[f][i], v[i], acc[f][r]);
    }
  }
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
#pragma unroll
    for (int f = 0; f < kFeatures; ++f) {
      const float sum = warp_sum(acc[f][r]);
      if (lane == 0) sums[(warp * kRows + r) * kFeatures + f] = sum;
    }
  }
  __syncthreads();
  const int r = static_cast<int>(threadIdx.x) / kFeatures;
  const int f = static_cast<int>(threadIdx.x) % kFeatures;
  if (r >= rows || f >= features) return;
  float sum = sums[r * kFeatures + f];
  for (int i = 1; i < kWarps; ++i) sum += sums[(i * kRows + r) * kFeatures + f];
  if (bias.data) sum += bias[first + f];
  out[(first_row + r) * n + first + f] = from_float<Out>(sum);
}

// Whether the kernel takes these operands, whose lines have k elements.
template <class T>
bool takes(int64_t m, int64_t k, const T* x, const T* weight) {
  return m <= kMaxRows && k * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(weight) % 16 == 0;
}

template <class T, class Out>
void run(Device& device, const T* x, const T* weight, Bias bias, Out* out, int64_t m, int64_t n,
         int64_t k) {
  if (m <= 0 || n <= 0) return;
  const int64_t blocks = ceil_div(n, kFeatures) * ceil_div(m, kRows);
  launch(few_rows_kernel<T, Out>, static_cast<unsigned>(blocks), kThreads, 0, stream_of(device), x,
         weight, bias, out, m, n, k);
}

}  // namespace p2r::cuda::few_rows
