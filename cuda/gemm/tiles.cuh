// What the products on tensor cores share (cuda/gemm/wgmma.cuh, cuda/gemm/mma.cuh): the order in
// which tiles of C are worked on, and what becomes of a finished tile.
//
// An epilogue is a struct of
//
//   State                        what a thread keeps over the tiles of one item, for two rows
//   begin(state)
//   tile(state, sums, place)     a finished tile's sums; it may change them
//   end(state, place)            after the last tile of the item
//
// and sees a warp's 16 rows of a tile as the tensor core leaves them: entry i of a lane lies at row
// place.row + 8 (i / 2 % 2), column place.column + 8 (i / 4) + i % 2. Rows and columns past the
// end of C come along, with sums that mean nothing.
#pragma once
#include "cuda/gemm/operands.cuh"

namespace p2r::cuda::gemm_tiles {

struct Place {
  int64_t row, column;  // of the lane's first entry
  int64_t span, slice;
};

// An item is what a block does at a time: tiles first_tile .. last_tile of one row of tiles, over
// steps first_step .. last_step of k.
struct Item {
  int64_t row, first_tile, last_tile, first_step, last_step, span, slice;
};

// C has `rows` x `columns` tiles and its sums `steps` steps of k. Rows of tiles are cut into spans,
// of a tile each unless an epilogue keeps a state, k into slices, as evenly as can be.
//
// Blocks that run at the same time take neighbouring items. They go down a panel of kPanel tiles,
// then to the next span, so that a panel of A stays in L2 while B passes by it once: for 16 tiles
// of 128 rows and 2560 channels of 16 bits that is 10 MB of 50.
struct Work {
  int64_t rows, columns, steps, spans, slices;
  static constexpr int64_t kPanel = 16;

  __host__ __device__ int64_t items() const { return rows * spans * slices; }

  __device__ Item operator[](int64_t index) const {
    const int64_t slice = index / (rows * spans), in_slice = index % (rows * spans);
    const int64_t panel = in_slice / (kPanel * spans), in_panel = in_slice % (kPanel * spans);
    const int64_t left = rows - panel * kPanel, height = left < kPanel ? left : kPanel;
    const int64_t span = in_panel / height;
    return {panel * kPanel + in_panel % height,
            span * columns / spans,
            (span + 1) * columns / spans,
            slice * steps / slices,
            (slice + 1) * steps / slices,
            span,
            slice};
  }
};

// C (+)= scale * sums + bias. Slice s of k has its C slice_stride * s behind c.
template <class C>
struct Store {
  C* c;
  int64_t m, n, row_stride, slice_stride;
  bool accumulate;
  Bias bias;
  const float* scale;

  struct State {};
  __device__ __forceinline__ void begin(State&) const {}
  __device__ __forceinline__ void end(State&, const Place&) const {}

  template <int count>
  __device__ __forceinline__ void tile(State&, float (&sums)[count], const Place& at) const {
    // Two columns side by side are stored as one word; loads go out eight at a time.
    constexpr int kBatch = 8;
    static_assert(count % (4 * kBatch) == 0);
    C* from = c + at.slice * slice_stride;
    const bool paired =
        row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(from) % (2 * sizeof(C)) == 0;
    const int64_t past = n - at.column;
    const int left = past < 2 * count ? static_cast<int>(past) : 2 * count;
    const float by = scale ? *scale : 1.0f;
#pragma unroll
    for (int first = 0; first < count / 4; first += kBatch) {
      float add[kBatch][2] = {};
      if (bias.data)
#pragma unroll
        for (int g = 0; g < kBatch; ++g) {
          const int j = 8 * (first + g);
          if (j < left) add[g][0] = bias[at.column + j];
          if (j + 1 < left) add[g][1] = bias[at.column + j + 1];
        }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = at.row + 8 * half;
        if (row >= m) continue;
        C* to = from + row * row_stride + at.column + 8 * first;
        float before[kBatch][2] = {};
        if (accumulate)
#pragma unroll
          for (int g = 0; g < kBatch; ++g)
            load_pair(to + 8 * g, left - 8 * (first + g), paired, before[g]);
#pragma unroll
        for (int g = 0; g < kBatch; ++g) {
          const int i = 4 * (first + g) + 2 * half;
          store_pair(to + 8 * g, left - 8 * (first + g), paired,
                     sums[i] * by + add[g][0] + before[g][0],
                     sums[i + 1] * by + add[g][1] + before[g][1]);
        }
      }
    }
  }

  static __device__ __forceinline__ void load_pair(const C* from, int left, bool paired,
                                                   float (&v)[2]) {
    if constexpr (std::is_same_v<C, float>) {
      if (paired && left >= 2) {
        const float2 pair = *reinterpret_cast<const float2*>(from);
        v[0] = pair.x;
        v[1] = pair.y;
        return;
      }
    }
    if (left >= 1) v[0] = to_float(from[0]);
    if (left >= 2) v[1] = to_float(from[1]);
  }

  static __device__ __forceinline__ void store_pair(C* to, int left, bool paired, float x,
                                                    float y) {
    if (paired && left >= 2) {
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
