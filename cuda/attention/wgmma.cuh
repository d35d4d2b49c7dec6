// What Hopper's attention kernels share: how a head's rows lie in shared memory, the products of
// such tiles by wgmma, the queue of work, and the mbarriers between one warp that loads and the
// warpgroups that multiply.
//
// Rows lie in panels: all rows' first `width` columns, then all rows' next, each panel
// [rows][width] under the swizzle as wide as its rows, which is how TMA writes boxes and how wgmma
// reads operands of either major. 64 and 128 columns are whole panels of 64. For 72 and 80 the
// panels are 32 wide: a product over d then stops at 80 and one into d columns takes exactly 72 or
// 80, from one descriptor. Columns of the last panel beyond D are zeros, since TMA fills what lies
// outside the tensor.
#pragma once
#include <algorithm>

#include "cuda/attention/attention.cuh"
#include "cuda/tensor_map.cuh"

namespace p2r::cuda::attention_sm90 {

// Whether TMA can read these inputs, and the masks of these kernels hold: masked products are
// infinite, and times a scale of 0 that is not -inf.
inline bool can_run(const AttentionLayout& in, double scale) {
  const auto aligned = [](const char* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return aligned(in.q) && aligned(in.k) && aligned(in.v) && static_cast<float>(scale) != 0;
}

// Calls f with the head dimension as a constant.
template <class F>
void with_head_dim(int64_t d, F&& f) {
  if (d == 64)
    f(std::integral_constant<int, 64>());
  else if (d == 72)
    f(std::integral_constant<int, 72>());
  else if (d == 80)
    f(std::integral_constant<int, 80>());
  else
    f(std::integral_constant<int, 128>());
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

// Of one head's rows, as [token][head][column] with `row` elements from token to token.
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

// Zeros rows first.. of a tile: what TMA read there belongs to the next sequence, whose NaN would
// pass through weights of 0. A whole warp calls it.
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

// s = A B^T over d, for 64 rows of a tile of ARows (from row_bytes * row) and N of B's BRows.
template <class T, int D, int ARows, int N, int BRows = N>
__device__ __forceinline__ void multiply_rows(float (&s)[N / 2], uint32_t a, uint32_t b) {
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

// acc += W X for 64 rows of K weights in registers and the K rows of X.
template <class T, int D, int K>
__device__ __forceinline__ void add_rows(float (&acc)[D / 2], const uint32_t (&w)[K / 16][4],
                                         uint32_t x) {
  using P = Panels<D>;
#pragma unroll
  for (int k = 0; k < K / 16; ++k)
    ptx::wgmma_rs<T, D, true>(
        acc, w[k],
        ptx::matrix_desc(x + 2 * k * P::group_bytes, K * P::row_bytes, P::group_bytes, P::swizzle),
        true);
}

// An accumulator as the A operand of the next product, rounded to T.
template <class T, int N>
__device__ __forceinline__ void pack_weights(uint32_t (&w)[N / 16][4], const float (&s)[N / 2]) {
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
#pragma unroll
    for (int r = 0; r < 4; ++r) w[k][r] = ptx::pack2<T>(s[8 * k + 2 * r], s[8 * k + 2 * r + 1]);
}

template <int N>
__device__ __forceinline__ void keep_weights(uint32_t (&w)[N / 16][4]) {
#pragma unroll
  for (int k = 0; k < N / 16; ++k) ptx::wgmma_keep(w[k]);
}

// ---- roles ----
// Warpgroups 0.. multiply, the last one's first warp loads.
template <int Groups>
struct Roles {
  static constexpr int threads = (Groups + 1) * 128;
  // setmaxnreg: what the register file holds, moved from the loading warpgroup to the others.
  static constexpr int loader_registers = Groups == 2 ? 40 : 32;
  static constexpr int registers = Groups == 2 ? 232 : 160;
};

// One arrival of a warp, after all of its lanes are done.
__device__ __forceinline__ void arrive_warp(uint32_t bar) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::mbar_arrive(bar);
}

// Keeps the lanes together: one left behind here while another goes on to what completes the next
// phase would wait for the phase after that.
__device__ __forceinline__ void wait_warp(uint32_t bar, int parity) {
  ptx::mbar_wait(bar, parity);
  __syncwarp();
}

// The barriers of a ring of Stages tiles that are filled and emptied in turn; `step` counts them
// over a block's whole life.
template <int Stages>
struct Ring {
  uint32_t full, empty;
  static constexpr int bytes = 16 * Stages;
  __device__ __forceinline__ explicit Ring(uint32_t bars) : full(bars), empty(bars + 8 * Stages) {}
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
  // Before the block's first barrier, by one thread.
  __device__ __forceinline__ void init(int readers) const {
    for (int i = 0; i < Stages; ++i) {
      ptx::mbar_init(full + 8 * i, 1);
      ptx::mbar_init(empty + 8 * i, readers);
    }
  }
};

// ---- work ----
// A block takes tiles off the list until it is empty; what it computes does not depend on who took
// what. All tiles of a head come before those of the next, so that the head's rows stay in L2;
// within a head those of the longest sequences come first.
struct WorkList {
  const AttentionTile* tiles;
  // Of tiles, each of which is there for every head. 2^32 of them would be half a terabyte of
  // queries.
  uint32_t count;
  int heads;
  uint32_t* taken;
};

struct Work {
  int begin, length, first;  // the sequence and the tile's first token of it
  int head;                  // below 0: there is no more
};

// The next work, for all lanes of the warp that asks.
__device__ __forceinline__ Work next_work(const WorkList& list) {
  uint32_t item = 0;
  if (threadIdx.x % 32 == 0) item = atomicAdd(list.taken, 1u);
  item = __shfl_sync(0xFFFFFFFFu, item, 0);
  const int head = static_cast<int>(item / list.count);
  if (head >= list.heads) return {0, 0, 0, -1};
  const AttentionTile t = list.tiles[item % list.count];
  return {t.begin, t.length, t.first, head};
}

// The list on the device, for tiles of `step` tokens.
class WorkOnDevice {
 public:
  WorkOnDevice(const Ints& cu_seqlens, int step, int64_t heads, Device& device)
      : memory_(device, fill(cu_seqlens, step)) {
    list_.taken = memory_.as<uint32_t>();
    list_.tiles = reinterpret_cast<const AttentionTile*>(memory_.as<char>() + kCounter);
    list_.count = static_cast<uint32_t>(tiles_.size());
    list_.heads = static_cast<int>(heads);
    restart(device);
    device.upload(memory_.as<char>() + kCounter, tiles_.data(), tiles_.size() * sizeof tiles_[0]);
  }
  const WorkList& list() const { return list_; }
  // For a second kernel over the same tiles.
  void restart(Device& device) const { device.zero(memory_.as<void>(), kCounter); }
  unsigned blocks(Device& device) const {
    return static_cast<unsigned>(
        std::min<int64_t>(int64_t{list_.count} * list_.heads, multiprocessors(device)));
  }

 private:
  static constexpr size_t kCounter = 16;

  size_t fill(const Ints& cu_seqlens, int step) {
    std::vector<AttentionTile> sequences;
    for (size_t s = 1; s < cu_seqlens.size(); ++s)
      sequences.push_back({static_cast<int32_t>(cu_seqlens[s - 1]),
                           static_cast<int32_t>(cu_seqlens[s] - cu_seqlens[s - 1]), 0});
    std::stable_sort(sequences.begin(), sequences.end(),
                     [](const auto& a, const auto& b) { return a.length > b.length; });
    for (const AttentionTile& s : sequences)
      for (int64_t first = 0; first < s.length; first += step)
        tiles_.push_back({s.begin, s.length, static_cast<int32_t>(first)});
    return kCounter + tiles_.size() * sizeof(AttentionTile);
  }

  std::vector<AttentionTile> tiles_;
  Scratch memory_;
  WorkList list_{};
};

}  // namespace p2r::cuda::attention_sm90
