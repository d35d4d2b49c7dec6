// C = A B (+ bias), or C += A B, for float types and strides of any kind:
//
//   // out [N, F] = x [N, C] . weight [F, C]^T + bias
//   gemm(device, Gemm<T, T, T>{.m = N, .n = F, .k = C, .a = {x, C, 1},
//                              .b = Matrix<T>{weight, C, 1}.transposed(),
//                              .c = out, .c_row_stride = F, .bias = bias});
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
#include <algorithm>

#include "cuda/kernel.cuh"

namespace p2r::cuda {

// Entry (i, j) lies i * row_stride + j * column_stride elements behind data.
template <class T>
struct Matrix {
  const T* data = nullptr;
  int64_t row_stride = 0, column_stride = 1;

  Matrix transposed() const { return {data, column_stride, row_stride}; }
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
  Matrix<A> a = {};  // m x k
  Matrix<B> b = {};  // k x n
  // m x n, each row's entries side by side.
  C* c = nullptr;
  int64_t c_row_stride = 0;
  bool accumulate = false;  // C should then be f32
  Bias bias = {};           // added to each row
};

namespace gemm_detail {

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

// With `partial`, slice blockIdx.z of k goes to partial[blockIdx.z] of m x n.
template <class A, class B, class C>
__global__ void __launch_bounds__(kThreads, 2)
    gemm_kernel(Gemm<A, B, C> g, int64_t slice_k, float* partial) {
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
  const Share<kM> a_share(g.a.column_stride == 1);
  const Share<kN> b_share(g.b.row_stride == 1);
  const auto left = [](int64_t n, int most) { return n < most ? static_cast<int>(n) : most; };
  const int rows_left = left(g.m - i0, kM), columns_left = left(g.n - j0, kN);
  const auto fetch_both = [&](int64_t k0) {
    const int k_left = left(k_end - k0, kK);
    fetch(a_next, a_share, g.a.data + i0 * g.a.row_stride + k0 * g.a.column_stride, g.a.row_stride,
          g.a.column_stride, rows_left, k_left);
    fetch(b_next, b_share, g.b.data + k0 * g.b.row_stride + j0 * g.b.column_stride,
          g.b.column_stride, g.b.row_stride, columns_left, k_left);
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
      if (g.bias.data) v += g.bias[j];
      if (g.accumulate) v += to_float(*to);
      *to = from_float<C>(v);
    }
}

// c (+)= the partial Cs, in order, + bias.
template <class C>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const float* partial, int64_t slices, int64_t m, int64_t n, C* c,
                  int64_t c_row_stride, bool accumulate, Bias bias) {
  for (int64_t e = blockIdx.x * int64_t{kThreads} + threadIdx.x; e < m * n;
       e += int64_t{gridDim.x} * kThreads) {
    float v = partial[e];
    for (int64_t s = 1; s < slices; ++s) v += partial[s * m * n + e];
    C* to = c + e / n * c_row_stride + e % n;
    if (bias.data) v += bias[e % n];
    if (accumulate) v += to_float(*to);
    *to = from_float<C>(v);
  }
}

}  // namespace gemm_detail

template <class A, class B, class C>
void gemm(Device& device, const Gemm<A, B, C>& g) {
  using namespace gemm_detail;
  if (g.m <= 0 || g.n <= 0) return;
  constexpr int64_t kWantedBlocks = 256, kLeastSlice = 256, kMostSlices = 64;
  const int64_t tiles = ceil_div(g.m, kM) * ceil_div(g.n, kN);
  const int64_t slices = std::max<int64_t>(
      1, std::min({ceil_div(kWantedBlocks, tiles), g.k / kLeastSlice, kMostSlices}));
  const int64_t slice_k = ceil_div(ceil_div(g.k, slices), kK) * kK;
  const Scratch scratch = device.scratch(slices > 1 ? slices * g.m * g.n * sizeof(float) : 0);
  float* partial = scratch.as<float>();
  launch(gemm_kernel<A, B, C>, dim3(static_cast<unsigned>(tiles), 1, static_cast<unsigned>(slices)),
         kThreads, 0, stream_of(device), g, slice_k, partial);
  if (partial)
    launch(finish_kernel<C>, blocks_for(g.m * g.n, kThreads), kThreads, 0, stream_of(device),
           partial, slices, g.m, g.n, g.c, g.c_row_stride, g.accumulate, g.bias);
}

}  // namespace p2r::cuda
