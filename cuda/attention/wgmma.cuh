// What the "wgmma" attention kernels share (Hopper, sm_90a, f16 and bf16): the layout of a head's
// rows in shared memory, the products of such tiles, the list of tiles that blocks take work from,
// and the mbarriers between one producer warp, which loads by TMA, and the consumer warpgroups.
//
// Tiles are stored in panels: all rows' first `width` columns, then all rows' next, each panel
// [rows][width] under the swizzle as wide as its rows, which is the layout of a TMA box and that of
// a wgmma operand of either major. 64 and 128 columns are whole panels of 64. For 72 and 80 the
// panels are 32 wide: a product over d then stops at 80 and one into d columns takes exactly 72 or
// 80, from one descriptor. Columns of the last panel beyond D are zeros, since TMA fills what is
// outside the tensor.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/attention/attention.cuh"
#include "cuda/tensor_map.cuh"

namespace p2r::cuda::attention_wgmma {

// scale == 0 is excluded: masking writes ±inf before scaling, and inf * 0 is NaN.
inline bool can_run(double scale) { return static_cast<float>(scale) != 0; }

// Calls f with the head dimension, one of those that the kernels are for, as a constant.
template <class F>
void with_wgmma_head_dim(int64_t d, F&& f) {
  with_head_dim<64, 72, 80, 128>(d, f);
}

template <int D>
struct Panels {
  static constexpr int width = D % 64 == 0 ? 64 : 32;
  static constexpr Swizzle swizzle = width == 64 ? Swizzle::b128 : Swizzle::b64;
  static constexpr int count = (D + width - 1) / width;
  static constexpr int row_bytes = width * 2, group_bytes = 8 * row_bytes;
  static constexpr int steps = (D + 15) / 16;  // of a product over d
  static constexpr int bytes(int rows) { return count * rows * row_bytes; }
};

// The map of [token][head][column], with `row` elements from token to token, by boxes of Rows
// tokens of one head.
template <class T, int D, int Rows>
TensorMap attention_map(const T* x, int64_t row, int64_t tokens, int64_t heads) {
  return make_tensor_map<T, 3>(
      x, {uint64_t{D}, static_cast<uint64_t>(heads), static_cast<uint64_t>(tokens)},
      {uint64_t{D} * sizeof(T), static_cast<uint64_t>(row) * sizeof(T)},
      {uint32_t{Panels<D>::width}, 1, uint32_t{Rows}}, Panels<D>::swizzle);
}

template <int D, int Rows>
__device__ __forceinline__ void load_rows(uint32_t tile, const TensorMap& map, uint32_t bar,
                                          int head, int token) {
#pragma unroll
  for (int p = 0; p < Panels<D>::count; ++p)
    ptx::tma_load(tile + p * Rows * Panels<D>::row_bytes, map, bar,
                  {p * Panels<D>::width, head, token});
}

// Zeros rows first.. of a tile: TMA loaded them from the next sequence, and a NaN there times a
// probability of 0 is NaN. A whole warp calls it.
template <int D, int Rows>
__device__ __forceinline__ void clear_rows(unsigned char* tile, int first) {
  constexpr int chunks = Panels<D>::row_bytes / 16;
  const int n = (Rows - first) * chunks;
  for (int p = 0; p < Panels<D>::count; ++p) {
    uint4* panel = reinterpret_cast<uint4*>(tile + (p * Rows + first) * Panels<D>::row_bytes);
    for (int i = threadIdx.x % 32; i < n; i += 32) panel[i] = make_uint4(0, 0, 0, 0);
  }
  ptx::fence_proxy_async();
  __syncwarp();
}

// s = A B^T over d, both in shared memory: 64 rows of a tile of ARows, and N of a tile of BRows.
template <class T, int D, int ARows, int N, int BRows = N>
__device__ __forceinline__ void gemm_ss(float (&s)[N / 2], uint32_t a, uint32_t b) {
  using P = Panels<D>;
#pragma unroll
  for (int k = 0; k < P::steps; ++k) {
    const int panel = k * 16 / P::width, inside = k * 16 % P::width * 2;
    ptx::wgmma_ss<T, N>(
        s,
        ptx::matrix_desc(a + panel * ARows * P::row_bytes + inside, 0, P::group_bytes, P::swizzle),
        ptx::matrix_desc(b + panel * BRows * P::row_bytes + inside, 0, P::group_bytes, P::swizzle),
        k > 0);
  }
}

// acc += A X, for 64 rows of A [64][K] in registers and K rows of a tile X of XRows.
template <class T, int D, int K, int XRows = K>
__device__ __forceinline__ void gemm_rs(float (&acc)[D / 2], const uint32_t (&a)[K / 16][4],
                                        uint32_t x) {
  using P = Panels<D>;
#pragma unroll
  for (int k = 0; k < K / 16; ++k)
    ptx::wgmma_rs<T, D, true>(acc, a[k],
                              ptx::matrix_desc(x + 2 * k * P::group_bytes, XRows * P::row_bytes,
                                               P::group_bytes, P::swizzle),
                              true);
}

// An accumulator as the A operand of the next product, rounded to T.
template <class T, int N>
__device__ __forceinline__ void pack_operand(uint32_t (&a)[N / 16][4], const float (&s)[N / 2]) {
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
#pragma unroll
    for (int r = 0; r < 4; ++r) a[k][r] = ptx::pack2<T>(s[8 * k + 2 * r], s[8 * k + 2 * r + 1]);
}

template <int N>
__device__ __forceinline__ void keep_operand(uint32_t (&a)[N / 16][4]) {
#pragma unroll
  for (int k = 0; k < N / 16; ++k) ptx::wgmma_keep(a[k]);
}

// ---- warp specialisation ----
// Warpgroups 0 to Groups - 1 are consumers; the first warp of the last warpgroup is the producer.
template <int Groups>
struct Roles {
  static constexpr int threads = (Groups + 1) * 128;
  // By setmaxnreg, which moves registers from the producer's warpgroup to the others.
  static constexpr int producer_registers = Groups == 2 ? 40 : 32;
  static constexpr int consumer_registers = Groups == 2 ? 232 : 160;
};

// One arrival for the whole warp.
__device__ __forceinline__ void arrive_warp(uint32_t bar) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbar_arrive(bar);
}

// Keeps the lanes together: if one lane went on and its arrival completed the next phase, a lane
// that still polls would miss this phase and wait for the one after.
__device__ __forceinline__ void wait_warp(uint32_t bar, int parity) {
  ptx::mbar_wait(bar, parity);
  __syncwarp();
}

// The full and empty barriers of a ring of Stages stages. `step` counts the stages filled over a
// block's lifetime.
template <int Stages>
struct Ring {
  uint32_t full, empty;
  static constexpr int bytes = 16 * Stages;
  __device__ __forceinline__ explicit Ring(uint32_t barriers)
      : full(barriers), empty(barriers + 8 * Stages) {}
  __device__ __forceinline__ static int stage(uint32_t step) {
    return static_cast<int>(step % Stages);
  }
  __device__ __forceinline__ uint32_t full_bar(uint32_t step) const {
    return full + 8 * stage(step);
  }
  __device__ __forceinline__ uint32_t empty_bar(uint32_t step) const {
    return empty + 8 * stage(step);
  }
  __device__ __forceinline__ void wait_full(uint32_t step) const {
    ptx::mbar_wait(full_bar(step), static_cast<int>(step / Stages % 2));
  }
  __device__ __forceinline__ void wait_empty(uint32_t step) const {
    wait_warp(empty_bar(step), static_cast<int>(step / Stages % 2 ^ 1));
  }
  // By one thread, before the block synchronises. `consumers` warps release a stage.
  __device__ __forceinline__ void init(int consumers) const {
    for (int i = 0; i < Stages; ++i) {
      ptx::mbar_init(full + 8 * i, 1);
      ptx::mbar_init(empty + 8 * i, consumers);
    }
  }
};

// ---- tile scheduling ----
// Persistent blocks take tiles off a list until it is empty; results do not depend on which block
// takes which. All tiles of a head come before those of the next, so that the head's rows stay in
// L2; within a head those of the longest sequences come first.
struct WorkList {
  const AttentionTile* tiles;
  uint32_t count;  // of tiles; each is processed for every head
  int heads;
  uint32_t* next;  // index of tile and head. 2^32 of them would be half a terabyte of queries.
};

struct Work {
  int begin, length, first;  // the sequence, and the tile's first token of it
  int head;                  // below 0: the list is empty
};

// Takes the next tile; the same for all lanes of the calling warp.
__device__ __forceinline__ Work next_work(const WorkList& list) {
  uint32_t item = 0;
  if (threadIdx.x % 32 == 0) item = atomicAdd(list.next, 1u);
  item = __shfl_sync(0xFFFFFFFFu, item, 0);
  const int head = static_cast<int>(item / list.count);
  if (head >= list.heads) return {0, 0, 0, -1};
  const AttentionTile t = list.tiles[item % list.count];
  return {t.begin, t.length, t.first, head};
}

// What a list of tiles of `step` tokens takes, in products of queries and keys that one
// multiprocessor computes one after another: the work divided by the number of multiprocessors and,
// for those that find no tile in the last round, as much again as one of the shortest tiles.
inline double scheduled_work(const Ints& cu_seqlens, int64_t step, int64_t heads,
                             int multiprocessors) {
  double tiles = 0, work = 0;
  int64_t shortest = INT64_MAX;
  for (size_t s = 1; s < cu_seqlens.size(); ++s) {
    const int64_t length = cu_seqlens[s] - cu_seqlens[s - 1];
    if (length == 0) continue;
    const double count = static_cast<double>((length + step - 1) / step);
    tiles += count;
    work += count * static_cast<double>(step * length);
    shortest = std::min(shortest, length);
  }
  if (tiles == 0) return 0;
  const double rounds = tiles * static_cast<double>(heads) / multiprocessors;
  return work * static_cast<double>(heads) / multiprocessors +
         (std::ceil(rounds) - rounds) * static_cast<double>(step * shortest);
}

// Small tiles fill the last round better, and hold fewer queries beyond the end of a sequence. They
// read keys more often, which is taken to cost 5 % until it is measured.
inline bool prefers_small_tiles(const Ints& cu_seqlens, int64_t small, int64_t large, int64_t heads,
                                int multiprocessors) {
  return 1.05 * scheduled_work(cu_seqlens, small, heads, multiprocessors) <
         scheduled_work(cu_seqlens, large, heads, multiprocessors);
}

// The list in device memory, for tiles of `step` tokens.
class WorkOnDevice {
 public:
  WorkOnDevice(const Ints& cu_seqlens, int step, int64_t heads, Device& device)
      : WorkOnDevice(attention_tiles(cu_seqlens, step), heads, device) {}
  const WorkList& list() const { return list_; }
  // For a second kernel over the same tiles.
  void restart(Device& device) const { device.zero(list_.next, sizeof *list_.next); }
  unsigned blocks(Device& device) const {
    return static_cast<unsigned>(
        std::min<int64_t>(int64_t{list_.count} * list_.heads, multiprocessors(device)));
  }

 private:
  WorkOnDevice(const std::vector<AttentionTile>& tiles, int64_t heads, Device& device)
      : counter_(device, sizeof(uint32_t)), tiles_(device, tiles.size() * sizeof tiles[0]) {
    list_.tiles = tiles_.as<const AttentionTile>();
    list_.count = static_cast<uint32_t>(tiles.size());
    list_.heads = static_cast<int>(heads);
    list_.next = counter_.as<uint32_t>();
    restart(device);
    device.upload(tiles_.as<void>(), tiles.data(), tiles.size() * sizeof tiles[0]);
  }

  Scratch counter_, tiles_;
  WorkList list_{};
};

}  // namespace p2r::cuda::attention_wgmma
