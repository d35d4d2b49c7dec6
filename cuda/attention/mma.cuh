// What the "mma" attention kernels share, for f16 and bf16 on the tensor cores of sm_80 and later:
// tiles in shared memory, their products by mma.sync, and how work is divided into blocks.
//
// Each warp of a block owns M x 16 rows of the block's tile; one mma takes 16. With M = 2 every
// fragment of the other operand is used twice: without that, reading shared memory at 128 bytes a
// clock takes as long as the products. M = 1 is for short sequences, which would fill half of a
// large tile, and where registers do not suffice.
//
// Rows of a tile are read along the head dimension by ldmatrix (Q K^T) or across it by
// ldmatrix.trans (P V), so K, V, Q and dOut have the same layout in shared as in global memory. The
// accumulator layout of the first kind of product is the A operand layout of the second: P and dS
// stay in registers.
//
// Rows are padded with zeros to a multiple of 16 for the first kind; the second takes 8 columns at
// a time. Head dimension 72 thus costs 80 for the logits and 72 for the output.
#pragma once
#include "cuda/attention/grouped.cuh"

namespace p2r::cuda {

// Rows of a tile: D entries, and zeros up to a multiple of 16, in chunks of 16 bytes. ldmatrix
// reads one chunk of each of 8 rows at a time, so chunks are swizzled by their row to be in
// different banks: the first kSwizzleChunks of a row among each other, the next, and so on.
template <int D>
struct TileRow {
  static constexpr int kSteps = (D + 15) / 16, kChunks = 2 * kSteps, kBytes = 16 * kChunks;
  static constexpr int kSwizzleChunks = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;

  __device__ static __forceinline__ int offset(int row, int chunk) {
    return row * kBytes + ((chunk ^ (row / (8 / kSwizzleChunks) % kSwizzleChunks)) << 4);
  }
  // From a lane's address of chunk 0 or 1 to that of `chunk` or the next, and down by `row` rows,
  // for an even `chunk` that is a constant: one exclusive or at most.
  __device__ static __forceinline__ uint32_t advance(uint32_t address, int row, int chunk) {
    return (address ^ (chunk % kSwizzleChunks << 4)) +
           (chunk / kSwizzleChunks * kSwizzleChunks << 4) + row * kBytes;
  }
};

// A lane's ldmatrix address in a tile: of 16 x 16 of an A operand, or of a transposed B operand.
template <int D>
__device__ __forceinline__ uint32_t ldmatrix_a_lane(uint32_t tile) {
  const int lane = threadIdx.x % 32;
  return tile + TileRow<D>::offset(lane % 16, lane / 16);
}
// Of two B operands: 16 rows by 16 columns.
template <int D>
__device__ __forceinline__ uint32_t ldmatrix_b_lane(uint32_t tile) {
  const int lane = threadIdx.x % 32;
  return tile + TileRow<D>::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// Starts copying Rows rows, which begin at place(0), place(1), ..., to a tile; zeros beyond the
// first `rows`, of which there is one at least, and beyond d. Chunks are taken 8 a row (128 bytes)
// at a time, then 4 and 2, so that those of a thread are in one column.
template <int Rows, int D, int Threads, int First = 0, class Place>
__device__ __forceinline__ void copy_rows(uint32_t tile, int rows, int d, const Place& place) {
  constexpr int kRemaining = TileRow<D>::kChunks - First;
  if constexpr (kRemaining > 0) {
    constexpr int kAcross = kRemaining >= 8 ? 8 : kRemaining >= 4 ? 4 : 2;
    constexpr int kTimes = kAcross == 8 ? kRemaining / 8 : 1;
    constexpr int kDown = Threads / kAcross;
    const int r = threadIdx.x / kAcross, c = First + threadIdx.x % kAcross;
    const uint32_t to = tile + TileRow<D>::offset(r, c);
    static_assert(kDown % 8 == 0);  // the swizzle repeats
#pragma unroll
    for (int i = 0; i < Rows; i += kDown) {
      if (kDown > Rows && r >= Rows) break;
      const bool inside = r + i < rows;
      const auto* from = place(inside ? r + i : 0) + c * 8;
#pragma unroll
      for (int t = 0; t < kTimes; ++t) {
        const bool holds = inside && (c + 8 * t) * 8 < d;
        ptx::cp_async16(to + i * TileRow<D>::kBytes + t * 128, holds ? from + t * 64 : place(0),
                        holds);
      }
    }
    copy_rows<Rows, D, Threads, First + kAcross * kTimes>(tile, rows, d, place);
  }
}

// The same for rows `stride` elements apart.
template <int Rows, int D, int Threads, class T>
__device__ __forceinline__ void copy_tile(uint32_t tile, const T* x, int64_t stride, int rows,
                                          int d) {
  copy_rows<Rows, D, Threads>(tile, rows, d, [=](int r) { return x + r * stride; });
}

// s = X Y^T, where load(a, i, step) gives the fragments of X, for 8 * N rows of Y from `first` on.
// A tile directly behind another is best passed as the other's further rows: they share addresses.
template <class T, int D, int M, int N, class Load>
__device__ __forceinline__ void gemm_nt(float (&s)[M][N][4], uint32_t y, int first,
                                        const Load& load) {
  const uint32_t y_lane = ldmatrix_b_lane<D>(y);
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[i][j][e] = 0;
#pragma unroll
  for (int step = 0; step < TileRow<D>::kSteps; ++step) {
    uint32_t a[M][4];
#pragma unroll
    for (int i = 0; i < M; ++i) load(a[i], i, step);
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      uint32_t r[4];
      ptx::ldmatrix_x4(r, TileRow<D>::advance(y_lane, first + j * 8, 2 * step));
      const uint32_t b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
#pragma unroll
      for (int i = 0; i < M; ++i) {
        ptx::mma_m16n8k16<T>(s[i][j], a[i], b0);
        ptx::mma_m16n8k16<T>(s[i][j + 1], a[i], b1);
      }
    }
  }
}

// An accumulator, rounded to T, as the A operand of the next product.
template <class T, int M, int N>
__device__ __forceinline__ void pack_operand(uint32_t (&a)[M][N / 2][4],
                                             const float (&s)[M][N][4]) {
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int j = 0; j < N / 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        a[i][j][e] =
            ptx::pack2<T>(s[i][2 * j + e / 2][e % 2 * 2], s[i][2 * j + e / 2][e % 2 * 2 + 1]);
}

// acc += A X, for A in registers and 16 * N rows of X from `first` on.
template <class T, int D, int M, int N>
__device__ __forceinline__ void gemm_nn(float (&acc)[M][D / 8][4], const uint32_t (&a)[M][N][4],
                                        uint32_t x, int first) {
  const uint32_t x_lane = ldmatrix_a_lane<D>(x);
#pragma unroll
  for (int step = 0; step < N; ++step) {
#pragma unroll
    for (int j = 0; j + 1 < D / 8; j += 2) {
      uint32_t r[4];
      ptx::ldmatrix_x4<true>(r, TileRow<D>::advance(x_lane, first + step * 16, j));
      const uint32_t b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
#pragma unroll
      for (int i = 0; i < M; ++i) {
        ptx::mma_m16n8k16<T>(acc[i][j], a[i][step], b0);
        ptx::mma_m16n8k16<T>(acc[i][j + 1], a[i][step], b1);
      }
    }
    if constexpr (D / 8 % 2) {
      uint32_t b[2];
      ptx::ldmatrix_x2<true>(b, TileRow<D>::advance(x_lane, first + step * 16, D / 8 - 1));
#pragma unroll
      for (int i = 0; i < M; ++i) ptx::mma_m16n8k16<T>(acc[i][D / 8 - 1], a[i][step], b);
    }
  }
}

// Whether one of two values is NaN or infinite.
template <class T>
__device__ __forceinline__ bool any_not_finite(uint32_t pair) {
  constexpr uint32_t kExponent = ptx::is_bf16<T> ? 0x7F80 : 0x7C00;
  return (pair & kExponent) == kExponent || (pair >> 16 & kExponent) == kExponent;
}

// For a tile of V of which some rows do not see all: a value that is not finite would reach them as
// 0 times itself. So such values are added to those of the warp's rows that see them, and are then
// replaced by 0. A probability above 0 would not have changed them. `Threads` threads call it
// together: a block, or a warp.
template <int Threads>
__device__ __forceinline__ void sync_threads() {
  if constexpr (Threads == 32)
    __syncwarp();
  else
    __syncthreads();
}
template <class T, int D, int M, int Rows, int Threads, class Sees>
__device__ __forceinline__ void take_unseen_out(unsigned char* tile, float (&o)[M][D / 8][4],
                                                const Sees& sees) {
  constexpr int kPairs = Rows * TileRow<D>::kBytes / 4;
  uint32_t* pairs = reinterpret_cast<uint32_t*>(tile);
  bool found = false;
#pragma unroll 4
  for (int i = threadIdx.x % Threads; i < kPairs; i += Threads)
    found |= any_not_finite<T>(pairs[i]);
  if constexpr (Threads == 32)
    found = __any_sync(0xFFFFFFFFu, found);
  else
    found = __syncthreads_or(found);
  if (!found) return;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int j = 0; j < Rows; ++j) {
    bool seen[M][2];
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) seen[i][h] = sees(j, i, h);
#pragma unroll
    for (int c = 0; c < D / 8; ++c) {
      const uint32_t pair =
          *reinterpret_cast<const uint32_t*>(tile + TileRow<D>::offset(j, c) + lane % 4 * 4);
      const uint16_t halves[2] = {static_cast<uint16_t>(pair), static_cast<uint16_t>(pair >> 16)};
      T values[2];
      memcpy(static_cast<void*>(values), &pair, 4);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float x = any_not_finite<T>(halves[e]) ? to_float(values[e]) : 0.0f;
#pragma unroll
        for (int i = 0; i < M; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) o[i][c][2 * h + e] += seen[i][h] ? x : 0.0f;
      }
    }
  }
  sync_threads<Threads>();
#pragma unroll 1
  for (int i = threadIdx.x % Threads; i < kPairs; i += Threads) {
    if (any_not_finite<T>(pairs[i] & 0xFFFF)) pairs[i] &= 0xFFFF0000;
    if (any_not_finite<T>(pairs[i] & 0xFFFF0000)) pairs[i] &= 0xFFFF;
  }
  sync_threads<Threads>();
}

// Stores eight values, rounded to T, to a 16-byte-aligned address.
template <class T>
__device__ __forceinline__ void store8(T* to, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(ptx::pack2<T>(x[0], x[1]), ptx::pack2<T>(x[2], x[3]),
                                             ptx::pack2<T>(x[4], x[5]), ptx::pack2<T>(x[6], x[7]));
}

// A kernel's tile shape.
struct MmaTile {
  int m, warps;  // a block owns m * 16 rows a warp
  int step;      // rows of the other side at a time
  int blocks;    // that are to fit on a multiprocessor
  constexpr int rows() const { return m * 16 * warps; }
  constexpr int threads() const { return warps * 32; }
};

// The tile of a kernel that owns one tensor and loads one tile of the other side at a time.
constexpr MmaTile single_tile(bool large) {
  return large ? MmaTile{.m = 2, .warps = 4, .step = 64, .blocks = 2}
               : MmaTile{.m = 1, .warps = 4, .step = 64, .blocks = 3};
}
template <int D>
constexpr size_t single_tile_smem(const MmaTile& tile, int stages) {
  return static_cast<size_t>(tile.rows() + stages * tile.step) * TileRow<D>::kBytes;
}

// Which tile and head each block owns. Consecutive blocks take the tiles of one head, whose K and V
// thus stay in the L2 cache; or for short sequences the heads of one tile, which are adjacent in
// memory.
struct AttentionGrid {
  int64_t first;  // block of this launch
  int64_t tiles;
  bool heads_first;
};

struct BlockTile {
  AttentionTile tile;
  int head;
  int rows;        // of the sequence from the tile's first on
  int64_t token;   // the tile's first
  int64_t column;  // the head's first entry
};

template <class T>
__device__ __forceinline__ BlockTile block_tile(const AttentionProblem<T>& a,
                                                const AttentionGrid& grid) {
  const int64_t index = grid.first + blockIdx.x;
  BlockTile block;
  block.tile = a.tiles[grid.heads_first ? index / a.heads : index % grid.tiles];
  block.head = static_cast<int>(grid.heads_first ? index % a.heads : index / grid.tiles);
  block.rows = block.tile.length - block.tile.first;
  block.token = int64_t{block.tile.begin} + block.tile.first;
  block.column = int64_t{block.head} * a.d;
  return block;
}

// What a block of a kernel that owns queries sees: its rows, from the tile's first to the last of
// the sequence, the keys of those that are in the tile, and where both are. Here, whole sequences.
template <class T>
struct SequenceBlock {
  using Element = T;
  using Problem = AttentionProblem<T>;
  static constexpr bool kMasked = false;  // whether some rows see fewer keys than others
  const Problem& a;
  const BlockTile own;
  const T *k_rows, *v_rows;
  int rows, keys;

  __device__ __forceinline__ SequenceBlock(const Problem& problem, const AttentionGrid& grid, int)
      : a(problem),
        own(block_tile(problem, grid)),
        k_rows(a.k + own.tile.begin * a.qk_row + own.column),
        v_rows(a.v + own.tile.begin * a.v_row + own.column),
        rows(own.rows),
        keys(own.tile.length) {}
  __device__ __forceinline__ const T* q(int r) const { return a.q + entry(r, a.qk_row); }
  // Where keys or values are, from `first` on.
  __device__ __forceinline__ auto key_rows(bool is_v, int first) const {
    const int64_t stride = is_v ? a.v_row : a.qk_row;
    const T* x = (is_v ? v_rows : k_rows) + first * stride;
    return [=](int r) { return x + r * stride; };
  }
  __device__ __forceinline__ int visible(int) const { return keys; }
  // Elements of a row in a tensor with `row` elements a token, and its number in [H, T].
  __device__ __forceinline__ int64_t entry(int r, int64_t row) const {
    return (own.token + r) * row + own.column;
  }
  __device__ __forceinline__ int64_t log(int r) const {
    return own.head * a.tokens + own.token + r;
  }
  __device__ __forceinline__ int64_t token(int r) const { return own.token + r; }
};

// The same with any of AttentionKeys, grouped heads, or keys in pages.
template <class T>
struct GroupedBlock {
  using Element = T;
  using Problem = GroupedProblem<T>;
  static constexpr bool kMasked = true;
  const Problem& a;
  GroupedSequence s;
  int head, first, rows, keys;

  __device__ __forceinline__ GroupedBlock(const Problem& problem, const AttentionGrid& grid,
                                          int tile_rows)
      : a(problem) {
    const int64_t index = grid.first + blockIdx.x;
    const GroupedTile tile = a.tiles[grid.heads_first ? index / a.key_heads : index % grid.tiles];
    head = static_cast<int>(grid.heads_first ? index % a.key_heads : index / grid.tiles);
    s = a.sequences[tile.sequence];
    first = tile.first;
    rows = s.queries * a.group - first;
    keys = visible((rows < tile_rows ? rows : tile_rows) - 1);
  }
  __device__ __forceinline__ const T* q(int r) const {
    return a.q + a.row(s, first + r, head, a.q_row);
  }
  __device__ __forceinline__ auto key_rows(bool is_v, int first) const {
    const T* x = (is_v ? a.v : a.k) + head * a.key_head;
    const int64_t stride = is_v ? a.v_row : a.k_row;
    return [=, this](int r) { return x + a.key(s, first + r, stride); };
  }
  __device__ __forceinline__ int visible(int r) const { return a.visible(s, first + r); }
  __device__ __forceinline__ int64_t entry(int r, int64_t row) const {
    return a.row(s, first + r, head, row);
  }
  __device__ __forceinline__ int64_t log(int r) const { return a.log(s, first + r, head); }
  __device__ __forceinline__ int64_t token(int r) const {
    return s.query + a.by_group.quotient(first + r);
  }
};

// Launches kernel(problem, grid, rest...) with a block for every tile and head.
template <class Problem, class... P, class... A>
void launch_tiles(void (*kernel)(Problem, AttentionGrid, P...), const Problem& problem,
                  AttentionGrid grid, int64_t heads, const MmaTile& tile, size_t smem,
                  Device& device, A... rest) {
  constexpr int64_t kMaxBlocks = int64_t{1} << 30;  // blocks of a launch; 2^31 - 1 is the limit
  for (; grid.first < grid.tiles * heads; grid.first += kMaxBlocks)
    launch(kernel, static_cast<unsigned>(std::min(kMaxBlocks, grid.tiles * heads - grid.first)),
           tile.threads(), smem, stream_of(device), problem, grid, rest...);
}

template <class T, class... P, class... A>
void run_mma(const AttentionOnDevice<T>& call,
             void (*kernel)(AttentionProblem<T>, AttentionGrid, P...), const Ints& cu_seqlens,
             const MmaTile& tile, size_t smem, A... rest) {
  AttentionProblem<T> problem = call.problem();
  const std::vector<AttentionTile> tiles = attention_tiles(cu_seqlens, tile.rows());
  if (tiles.empty() || problem.heads == 0) return;
  Device& device = call.device();
  const Scratch memory = device.scratch(tiles.size() * sizeof tiles[0]);
  device.upload(memory.as<void>(), tiles.data(), tiles.size() * sizeof tiles[0]);
  problem.tiles = memory.as<const AttentionTile>();
  launch_tiles(kernel, problem,
               {0, static_cast<int64_t>(tiles.size()), tiles[0].length <= tile.rows()},
               problem.heads, tile, smem, device, rest...);
}

// A tile's heads are consecutive blocks, so that over all heads those with most keys come first.
template <class T, class... P, class... A>
void run_mma(const GroupedOnDevice<T>& call, void (*kernel)(GroupedProblem<T>, AttentionGrid, P...),
             const MmaTile& tile, size_t smem, A... rest) {
  call.with_tiles(tile.rows(), [&](const GroupedProblem<T>& problem, int64_t tiles) {
    launch_tiles(kernel, problem, {0, tiles, true}, problem.key_heads, tile, smem, call.device(),
                 rest...);
  });
}

// Whether to use tiles of 128 rows rather than 64: not where much of them would be padding.
class LargeTiles {
 public:
  explicit LargeTiles(const Ints& cu_seqlens) {
    for (size_t s = 1; s < cu_seqlens.size(); ++s) {
      const int64_t length = cu_seqlens[s] - cu_seqlens[s - 1];
      add(length, length);
    }
  }
  LargeTiles(const GroupedKeys& keys, int64_t group) {
    for (const GroupedSequence& s : keys.sequences) add(s.queries * group, s.keys());
  }
  bool pay() const { return large_ < 1.25 * small_; }

 private:
  void add(int64_t rows, int64_t keys) {
    large_ += static_cast<double>(round_up(rows, 128)) * static_cast<double>(keys);
    small_ += static_cast<double>(round_up(rows, 64)) * static_cast<double>(keys);
  }
  double large_ = 0, small_ = 0;
};

// Calls f with the smallest of the head dimensions that holds d and whether tiles are large, as
// constants. The head dimensions of vision towers are exact and have large tiles too.
template <class F>
void with_mma_tiles(int64_t d, const Ints& cu_seqlens, F&& f) {
  with_head_dim<32, 64, 72, 80, 96, 128>(d, [&](auto dim) {
    if constexpr (decltype(dim)::value != 32 && decltype(dim)::value != 96)
      if (LargeTiles(cu_seqlens).pay()) return f(dim, std::true_type());
    f(dim, std::false_type());
  });
}

// The same with any keys: those of language models are 64 or 128 wide, others are padded.
template <class F>
void with_mma_tiles(int64_t d, const GroupedKeys& keys, int64_t group, F&& f) {
  with_head_dim<64, 128>(d, [&](auto dim) {
    if (LargeTiles(keys, group).pay()) return f(dim, std::true_type());
    f(dim, std::false_type());
  });
}

// Forward (mma_forward.cu), with any keys.
template <class T>
void mma_grouped_forward(const GroupedOnDevice<T>& call, const GroupedKeys& keys, const Out& out,
                         const Out& lse);

}  // namespace p2r::cuda
