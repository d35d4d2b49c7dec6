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
#include "cuda/attention/attention.cuh"

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

// Starts copying Rows rows to a tile; zeros beyond the first `rows` and beyond d. Chunks are taken
// 8 a row (128 bytes) at a time, then 4 and 2, so that those of a thread are in one column.
template <int Rows, int D, int Threads, int First = 0, class T>
__device__ __forceinline__ void copy_tile(uint32_t tile, const T* x, int64_t stride, int rows,
                                          int d) {
  constexpr int kRemaining = TileRow<D>::kChunks - First;
  if constexpr (kRemaining > 0) {
    constexpr int kAcross = kRemaining >= 8 ? 8 : kRemaining >= 4 ? 4 : 2;
    constexpr int kDown = Threads / kAcross;
    const int r = threadIdx.x / kAcross, c = First + threadIdx.x % kAcross;
    const T* from = x + r * stride + c * 8;
    const uint32_t to = tile + TileRow<D>::offset(r, c);
    static_assert(kDown % 8 == 0);  // the swizzle repeats
#pragma unroll
    for (int i = 0; i < Rows; i += kDown) {
      if (kDown > Rows && r >= Rows) break;
      const bool inside = r + i < rows && c * 8 < d;
      ptx::cp_async16(to + i * TileRow<D>::kBytes, inside ? from + i * stride : x, inside);
    }
    copy_tile<Rows, D, Threads, First + kAcross>(tile, x, stride, rows, d);
  }
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

// Runs kernel(problem, grid, rest...) with a block for every tile and head.
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
  const int64_t count = static_cast<int64_t>(tiles.size());
  AttentionGrid grid{0, count, tiles[0].length <= tile.rows()};
  constexpr int64_t kMaxBlocks = int64_t{1} << 30;  // blocks of a launch; 2^31 - 1 is the limit
  for (; grid.first < count * problem.heads; grid.first += kMaxBlocks)
    launch(kernel, static_cast<unsigned>(std::min(kMaxBlocks, count * problem.heads - grid.first)),
           tile.threads(), smem, stream_of(device), problem, grid, rest...);
}

// Whether to use tiles of 128 rows rather than 64: not where much of them would be padding.
inline bool large_tiles_pay(const Ints& cu_seqlens) {
  double large = 0, small = 0;
  for (size_t s = 1; s < cu_seqlens.size(); ++s) {
    const int64_t length = cu_seqlens[s] - cu_seqlens[s - 1];
    large += static_cast<double>(round_up(length, 128)) * length;
    small += static_cast<double>(round_up(length, 64)) * length;
  }
  return large < 1.25 * small;
}

// Calls f with the smallest of the head dimensions that holds d and whether tiles are large, as
// constants. The head dimensions of vision towers are exact and have large tiles too.
template <class F>
void with_mma_tiles(int64_t d, const Ints& cu_seqlens, F&& f) {
  with_head_dim<32, 64, 72, 80, 96, 128>(d, [&](auto dim) {
    if constexpr (decltype(dim)::value != 32 && decltype(dim)::value != 96)
      if (large_tiles_pay(cu_seqlens)) return f(dim, std::true_type());
    f(dim, std::false_type());
  });
}

}  // namespace p2r::cuda
