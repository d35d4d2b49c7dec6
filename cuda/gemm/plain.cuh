// C = A B on CUDA cores in f32 arithmetic, for any float types and strides and on any chip.
//
// A block of 256 threads computes a tile of 128 x 64 of C, a thread 8 x 4 of it in registers. k is
// taken 16 at a time: the block stores A's and B's next part as f32 in shared memory, [k][mn], so
// that a thread reads its 8 and 4 factors as vectors, and loads the part after that
// into registers meanwhile. Threads load along whichever axis of an operand is contiguous, so all
// layouts are read coalesced.
//
// When C has few tiles and k is long, as for the gradient of a weight, split-K: blockIdx.z takes a
// part of k and writes a partial C, and a second kernel adds these in order. The number of splits
// follows from the shape alone, so results are the same on every chip.
#pragma once
#include "cuda/gemm/operands.cuh"

namespace p2r::cuda {

namespace gemm_plain {

constexpr int kM = 128, kN = 64, kK = 16, kThreads = 256;
constexpr int kRows = 8, kColumns = 4;  // of a thread
// Padded: vectors stay aligned, and stores along k conflict in fewer banks.
constexpr int kStrideA = kM + 4, kStrideB = kN + 4;
constexpr int kLoadsA = kM * kK / kThreads, kLoadsB = kN * kK / kThreads;

// Which elements of a part of `extent` (rows of A, columns of B) x kK a thread loads: the first,
// and the steps to the next. Adjacent threads load adjacent elements of the contiguous axis.
template <int extent>
struct ThreadMap {
  int mn, k, mn_step, k_step;
  __device__ __forceinline__ explicit ThreadMap(bool k_major) {
    const int t = static_cast<int>(threadIdx.x);
    mn = k_major ? t / kK : t % extent;
    k = k_major ? t % kK : t / extent;
    mn_step = k_major ? kThreads / kK : 0;
    k_step = k_major ? 0 : kThreads / extent;
  }
};

template <int extent, int loads, class T>
__device__ __forceinline__ void load_global(float (&values)[loads], const ThreadMap<extent>& s,
                                            const T* x, int64_t mn_stride, int64_t k_stride,
                                            int mn_left, int k_left) {
  const T* from = x + s.mn * mn_stride + s.k * k_stride;
  const int64_t step = s.mn_step * mn_stride + s.k_step * k_stride;
#pragma unroll
  for (int r = 0; r < loads; ++r)
    values[r] = s.mn + r * s.mn_step < mn_left && s.k + r * s.k_step < k_left
                    ? to_float(from[r * step])
                    : 0.0f;
}

template <int extent, int stride, int loads>
__device__ __forceinline__ void store_shared(float* tile, const float (&values)[loads],
                                             const ThreadMap<extent>& s) {
#pragma unroll
  for (int r = 0; r < loads; ++r)
    tile[(s.k + r * s.k_step) * stride + s.mn + r * s.mn_step] = values[r];
}

// Elements from one row or column of an operand to the next.
struct Strides {
  int64_t row, column;
};

// With `partials`, split blockIdx.z of k is stored to partials[blockIdx.z], [m, n].
template <class A, class B, class C>
__global__ void __launch_bounds__(kThreads, 2)
    gemm_plain_kernel(Gemm<A, B, C> g, Strides a_strides, Strides b_strides, int64_t k_per_split,
                      float* partials) {
  SMEM_ARRAY(float4, a_vectors, kK * kStrideA / 4);
  SMEM_ARRAY(float4, b_vectors, kK * kStrideB / 4);
  float* a_tile = reinterpret_cast<float*>(&a_vectors[0]);
  float* b_tile = reinterpret_cast<float*>(&b_vectors[0]);
  const int64_t tile_columns = ceil_div(g.n, kN);
  const int64_t i0 = blockIdx.x / tile_columns * kM, j0 = blockIdx.x % tile_columns * kN;
  const int64_t k_begin = blockIdx.z * k_per_split;
  const int64_t k_end = k_begin + k_per_split < g.k ? k_begin + k_per_split : g.k;
  const int row = static_cast<int>(threadIdx.x) / (kN / kColumns) * kRows;
  const int column = static_cast<int>(threadIdx.x) % (kN / kColumns) * kColumns;

  float sum[kRows][kColumns] = {};
  float a_regs[kLoadsA], b_regs[kLoadsB];
  const ThreadMap<kM> a_map(a_strides.column == 1);
  const ThreadMap<kN> b_map(b_strides.row == 1);
  const auto left = [](int64_t n, int limit) { return n < limit ? static_cast<int>(n) : limit; };
  const int rows_left = left(g.m - i0, kM), columns_left = left(g.n - j0, kN);
  const auto load_both = [&](int64_t k0) {
    const int k_left = left(k_end - k0, kK);
    load_global(a_regs, a_map, g.a.data + i0 * a_strides.row + k0 * a_strides.column, a_strides.row,
                a_strides.column, rows_left, k_left);
    load_global(b_regs, b_map, g.b.data + k0 * b_strides.row + j0 * b_strides.column,
                b_strides.column, b_strides.row, columns_left, k_left);
  };
  load_both(k_begin);
  for (int64_t k0 = k_begin; k0 < k_end; k0 += kK) {
    store_shared<kM, kStrideA>(a_tile, a_regs, a_map);
    store_shared<kN, kStrideB>(b_tile, b_regs, b_map);
    __syncthreads();
    if (k0 + kK < k_end) load_both(k0 + kK);
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
      if (partials) {
        partials[(blockIdx.z * g.m + i) * g.n + j] = v;
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
void run(Device& device, const Gemm<A, B, C>& g, Major a, Major b) {
  constexpr int64_t kTargetBlocks = 256, kMinSplitK = 256, kMaxSplits = 64;
  const int64_t tiles = ceil_div(g.m, kM) * ceil_div(g.n, kN);
  const int64_t target = std::min({ceil_div(kTargetBlocks, tiles), g.k / kMinSplitK, kMaxSplits});
  const int64_t splits = g.split_k ? std::max<int64_t>(1, target) : 1;
  const int64_t k_per_split = round_up(ceil_div(g.k, splits), kK);
  const Scratch scratch = device.scratch(splits > 1 ? splits * g.m * g.n * sizeof(float) : 0);
  float* partials = scratch.as<float>();
  const Strides a_strides = a == Major::k ? Strides{g.a.stride, 1} : Strides{1, g.a.stride};
  const Strides b_strides = b == Major::k ? Strides{1, g.b.stride} : Strides{g.b.stride, 1};
  launch(gemm_plain_kernel<A, B, C>,
         dim3(static_cast<unsigned>(tiles), 1, static_cast<unsigned>(splits)), kThreads, 0,
         stream_of(device), g, a_strides, b_strides, k_per_split, partials);
  if (partials)
    gemm_detail::reduce_splits(partials, splits, g.m, g.n, g.c, g.c_row_stride, g.accumulate,
                               g.bias, g.scale, stream_of(device));
}

}  // namespace gemm_plain

}  // namespace p2r::cuda
