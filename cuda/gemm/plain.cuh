// C = A B in f32 arithmetic, for float types and strides of any kind and on any chip.
//
// A block of 256 threads owns a tile of 128 x 64 of C, a thread 8 x 4 of it in registers. Along k,
// 16 at a time, the block brings A's and B's part into shared memory as f32, laid out k by k so
// that a thread reads its 8 and 4 factors as vectors, while the next part is on its way to
// registers. Threads walk along whichever axis of A and B is contiguous, so every transpose is read
// coalesced.
//
// When C has few tiles and k is long, as for the gradient of a weight, blockIdx.z cuts k into
// slices with a partial C each, which a second kernel adds up in order. The number of slices
// follows from the shape alone, so results are the same on every chip.
#pragma once
#include "cuda/gemm/operands.cuh"

namespace p2r::cuda {

namespace gemm_plain {

constexpr int kM = 128, kN = 64, kK = 16, kThreads = 256;
constexpr int kRows = 8, kColumns = 4;               // of a thread
constexpr int kStrideA = kM + 4, kStrideB = kN + 4;  // keeps vectors aligned, spreads the banks
constexpr int kLoadsA = kM * kK / kThreads, kLoadsB = kN * kK / kThreads;

// Which elements of a part of `lanes` (rows of A, columns of B) x kK a thread carries: the
// first, and the steps to the next; neighbouring threads lie along the contiguous axis.
template <int lanes>
struct Share {
  int lane, k, lane_step, k_step;
  __device__ __forceinline__ explicit Share(bool along_k) {
    const int t = static_cast<int>(threadIdx.x);
    lane = along_k ? t / kK : t % lanes;
    k = along_k ? t % kK : t / lanes;
    lane_step = along_k ? kThreads / kK : 0;
    k_step = along_k ? 0 : kThreads / lanes;
  }
};

template <int lanes, int loads, class T>
__device__ __forceinline__ void fetch(float (&values)[loads], const Share<lanes>& s, const T* x,
                                      int64_t lane_stride, int64_t k_stride, int lanes_left,
                                      int k_left) {
  const T* from = x + s.lane * lane_stride + s.k * k_stride;
  const int64_t step = s.lane_step * lane_stride + s.k_step * k_stride;
#pragma unroll
  for (int r = 0; r < loads; ++r)
    values[r] = s.lane + r * s.lane_step < lanes_left && s.k + r * s.k_step < k_left
                    ? to_float(from[r * step])
                    : 0.0f;
}

template <int lanes, int stride, int loads>
__device__ __forceinline__ void put(float* tile, const float (&values)[loads],
                                    const Share<lanes>& s) {
#pragma unroll
  for (int r = 0; r < loads; ++r)
    tile[(s.k + r * s.k_step) * stride + s.lane + r * s.lane_step] = values[r];
}

// From one row or column of an operand to the next, in elements.
struct Strides {
  int64_t row, column;
};

// With `partial`, slice blockIdx.z of k goes to partial[blockIdx.z] of m x n.
template <class A, class B, class C>
__global__ void __launch_bounds__(kThreads, 2)
    gemm_kernel(Gemm<A, B, C> g, Strides a_by, Strides b_by, int64_t slice_k, float* partial) {
  SMEM_ARRAY(float4, a_vectors, kK * kStrideA / 4);
  SMEM_ARRAY(float4, b_vectors, kK * kStrideB / 4);
  float* a_tile = reinterpret_cast<float*>(&a_vectors[0]);
  float* b_tile = reinterpret_cast<float*>(&b_vectors[0]);
  const int64_t across = ceil_div(g.n, kN);
  const int64_t i0 = blockIdx.x / across * kM, j0 = blockIdx.x % across * kN;
  const int64_t k_begin = blockIdx.z * slice_k;
  const int64_t k_end = k_begin + slice_k < g.k ? k_begin + slice_k : g.k;
  const int row = static_cast<int>(threadIdx.x) / (kN / kColumns) * kRows;
  const int column = static_cast<int>(threadIdx.x) % (kN / kColumns) * kColumns;

  float sum[kRows][kColumns] = {};
  float a_next[kLoadsA], b_next[kLoadsB];
  const Share<kM> a_share(a_by.column == 1);
  const Share<kN> b_share(b_by.row == 1);
  const auto left = [](int64_t n, int most) { return n < most ? static_cast<int>(n) : most; };
  const int rows_left = left(g.m - i0, kM), columns_left = left(g.n - j0, kN);
  const auto fetch_both = [&](int64_t k0) {
    const int k_left = left(k_end - k0, kK);
    fetch(a_next, a_share, g.a.data + i0 * a_by.row + k0 * a_by.column, a_by.row, a_by.column,
          rows_left, k_left);
    fetch(b_next, b_share, g.b.data + k0 * b_by.row + j0 * b_by.column, b_by.column, b_by.row,
          columns_left, k_left);
  };
  fetch_both(k_begin);
  for (int64_t k0 = k_begin; k0 < k_end; k0 += kK) {
    put<kM, kStrideA>(a_tile, a_next, a_share);
    put<kN, kStrideB>(b_tile, b_next, b_share);
    __syncthreads();
    if (k0 + kK < k_end) fetch_both(k0 + kK);
#pragma unroll 4
    for (int k = 0; k < kK; ++k) {
      const float4 low = a_vectors[(k * kStrideA + row) / 4];
      const float4 high = a_vectors[(k * kStrideA + row) / 4 + 1];
      const float4 right = b_vectors[(k * kStrideB + column) / 4];
      const float a[kRows] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      const float b[kColumns] = {right.x, right.y, right.z, right.w};
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sum[r][c] = fmaf(a[r], b[c], sum[r][c]);
    }
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int64_t i = i0 + row + r, j = j0 + column + c;
      if (i >= g.m || j >= g.n) continue;
      float v = sum[r][c];
      if (partial) {
        partial[(blockIdx.z * g.m + i) * g.n + j] = v;
        continue;
      }
      C* to = g.c + i * g.c_row_stride + j;
      if (g.scale) v *= *g.scale;
      if (g.bias.data) v += g.bias[j];
      if (g.accumulate) v += to_float(*to);
      *to = from_float<C>(v);
    }
}

template <class A, class B, class C>
void run(Device& device, const Gemm<A, B, C>& g, Along a, Along b) {
  constexpr int64_t kWantedBlocks = 256, kLeastSlice = 256, kMostSlices = 64;
  const int64_t tiles = ceil_div(g.m, kM) * ceil_div(g.n, kN);
  const int64_t wanted = std::min({ceil_div(kWantedBlocks, tiles), g.k / kLeastSlice, kMostSlices});
  const int64_t slices = g.whole_k ? 1 : std::max<int64_t>(1, wanted);
  const int64_t slice_k = ceil_div(ceil_div(g.k, slices), kK) * kK;
  const Scratch scratch = device.scratch(slices > 1 ? slices * g.m * g.n * sizeof(float) : 0);
  float* partial = scratch.as<float>();
  const Strides a_by = a == Along::k ? Strides{g.a.stride, 1} : Strides{1, g.a.stride};
  const Strides b_by = b == Along::k ? Strides{1, g.b.stride} : Strides{g.b.stride, 1};
  launch(gemm_kernel<A, B, C>, dim3(static_cast<unsigned>(tiles), 1, static_cast<unsigned>(slices)),
         kThreads, 0, stream_of(device), g, a_by, b_by, slice_k, partial);
  if (partial)
    gemm_detail::finish(partial, slices, g.m, g.n, g.c, g.c_row_stride, g.accumulate, g.bias,
                        g.scale, stream_of(device));
}

}  // namespace gemm_plain

}  // namespace p2r::cuda
