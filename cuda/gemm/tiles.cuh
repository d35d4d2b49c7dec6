// What the GEMMs on tensor cores (cuda/gemm/wgmma.cuh, cuda/gemm/mma.cuh) share: the tile scheduler
// of their persistent blocks, and the epilogue that stores C.
//
// An epilogue is a struct of
//
//   State                    what a thread carries from tile to tile of a work unit, for two rows
//   begin(state)
//   tile(state, acc, at)     the accumulators of a finished tile, which it may overwrite
//   end(state, at)           after the last tile of the unit
//
// and sees 16 rows of a tile per warp, in the layout of the tensor core's accumulators: entry i of
// a lane is row at.row + 8 (i / 2 % 2), column at.column + 8 (i / 4) + i % 2. Entries outside C are
// unspecified, and the epilogue skips them.
#pragma once
#include "cuda/gemm/operands.cuh"

namespace p2r::cuda::gemm_tiles {

struct FragmentCoord {
  int64_t row, column;  // of the lane's first accumulator
  int64_t span, split;
};

// One iteration of a block: tiles [first_tile, last_tile) of one row of tiles, each over steps
// [first_step, last_step) of k.
struct WorkUnit {
  int64_t row, first_tile, last_tile, first_step, last_step, span, split;
};

// C has `rows` x `columns` tiles, each summed over `steps` steps of k. A row of tiles is cut into
// spans, ranges of adjacent tiles that one block takes in order: of one tile, unless the epilogue
// carries a state across tiles. k is cut into splits (split-K). Both as evenly as possible.
//
// Rasterization: blocks that run at the same time take consecutive units, which go down a panel of
// kPanel rows of tiles and then on to the next span, so that A's panel stays in L2 while B is read
// once. 16 tiles of 128 rows and 2560 channels of 16 bits are 10 MB of an H100's 50.
struct TileScheduler {
  int64_t rows, columns, steps, spans, splits;
  static constexpr int64_t kPanel = 16;

  __host__ __device__ int64_t units() const { return rows * spans * splits; }

  __device__ WorkUnit operator[](int64_t index) const {
    const int64_t split = index / (rows * spans), in_split = index % (rows * spans);
    const int64_t panel = in_split / (kPanel * spans), in_panel = in_split % (kPanel * spans);
    const int64_t left = rows - panel * kPanel, height = left < kPanel ? left : kPanel;
    const int64_t span = in_panel / height;
    return {panel * kPanel + in_panel % height,
            span * columns / spans,
            (span + 1) * columns / spans,
            split * steps / splits,
            (split + 1) * steps / splits,
            span,
            split};
  }
};

// C (+)= scale * acc + bias. Split s of k stores to c + s * split_stride.
//
// Accumulating sends additions to L2 instead of loading C, for which a tile would wait in eight
// round trips. A launch adds to each element once, so that the result does not depend on their
// order.
template <class C>
struct StoreEpilogue {
  C* c;
  int64_t m, n, row_stride, split_stride;
  bool accumulate;
  Bias bias;
  const float* scale;

  struct State {};
  __device__ __forceinline__ void begin(State&) const {}
  __device__ __forceinline__ void end(State&, const FragmentCoord&) const {}

  template <int count>
  __device__ __forceinline__ void tile(State&, float (&acc)[count], const FragmentCoord& at) const {
    if constexpr (std::is_same_v<C, float>)
      if (accumulate) return put_tile<add_pair>(acc, at);
    put_tile<store_pair>(acc, at);
  }

 private:
  // put(to, left, vectorized, x, y) takes two adjacent columns, which can be moved as one word if
  // `vectorized`; `left` columns are within C. The bias is loaded in batches of eight pairs.
  template <auto put, int count>
  __device__ __forceinline__ void put_tile(const float (&acc)[count],
                                           const FragmentCoord& at) const {
    constexpr int kBatch = 8;
    static_assert(count % (4 * kBatch) == 0);
    C* base = c + at.split * split_stride;
    const bool vectorized =
        row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(base) % (2 * sizeof(C)) == 0;
    const int64_t remaining = n - at.column;
    const int left = remaining < 2 * count ? static_cast<int>(remaining) : 2 * count;
    const float alpha = scale ? *scale : 1.0f;
#pragma unroll
    for (int first = 0; first < count / 4; first += kBatch) {
      float bias_pairs[kBatch][2] = {};
      if (bias.data)
#pragma unroll
        for (int g = 0; g < kBatch; ++g) {
          const int j = 8 * (first + g);
          if (j < left) bias_pairs[g][0] = bias[at.column + j];
          if (j + 1 < left) bias_pairs[g][1] = bias[at.column + j + 1];
        }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = at.row + 8 * half;
        if (row >= m) continue;
        C* to = base + row * row_stride + at.column + 8 * first;
#pragma unroll
        for (int g = 0; g < kBatch; ++g) {
          const int i = 4 * (first + g) + 2 * half;
          put(to + 8 * g, left - 8 * (first + g), vectorized, acc[i] * alpha + bias_pairs[g][0],
              acc[i + 1] * alpha + bias_pairs[g][1]);
        }
      }
    }
  }

  static __device__ __forceinline__ void add_pair(float* to, int left, bool vectorized, float x,
                                                  float y) {
    if (vectorized && left >= 2) return ptx::red_add2(to, x, y);
    if (left >= 1) atomicAdd(to, x);
    if (left >= 2) atomicAdd(to + 1, y);
  }

  static __device__ __forceinline__ void store_pair(C* to, int left, bool vectorized, float x,
                                                    float y) {
    if (vectorized && left >= 2) {
      if constexpr (std::is_same_v<C, float>)
        *reinterpret_cast<float2*>(to) = make_float2(x, y);
      else
        *reinterpret_cast<uint32_t*>(to) = ptx::pack2<C>(x, y);
      return;
    }
    if (left >= 1) to[0] = from_float<C>(x);
    if (left >= 2) to[1] = from_float<C>(y);
  }
};

}  // namespace p2r::cuda::gemm_tiles
