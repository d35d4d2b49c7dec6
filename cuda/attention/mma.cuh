// What the tensor-core attention kernels of sm_80 share ("mma", for f16 and bf16): tiles in shared
// memory, their products, and how the work is cut up.
//
// A block has some warps, each of which owns M x 16 rows of the block's tile: 16 rows are what one
// mma takes. With M = 2 every fragment that a warp reads of the other operand is used twice, and
// without that the reading (128 bytes a clock) takes as long as the products; M = 1 is for short
// sequences, which would fill half of a large tile, and where registers do not suffice.
//
// Rows of a tile are read along the head dimension by ldmatrix (Q K^T) or across it by
// ldmatrix.trans (P V), so K, V, Q and dOut lie in shared memory just as they lie in global memory.
// The products of the first kind leave each thread the very entries that the second kind wants of
// its left operand: P and dS stay in registers.
//
// Rows are padded with zeros to whole steps of 16 for the first kind; the second kind takes 8
// columns at a time. So of head dimension 72, 80 are multiplied for the logits and 72 for the
// output.
#pragma once
#include "cuda/attention/attention.cuh"

namespace p2r::cuda {

// Rows of a tile: D entries, and zeros up to a multiple of 16, in chunks of 16 bytes, of which
// ldmatrix reads one of each of 8 rows at a time. A chunk's place is swizzled by its row, so that
// those lie in different banks: among the first kPlaces chunks, among the next, and so on.
template <int D>
struct TileRow {
  static constexpr int kSteps = (D + 15) / 16, kChunks = 2 * kSteps, kBytes = 16 * kChunks;
  static constexpr int kPlaces = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;

  __device__ static __forceinline__ int at(int row, int chunk) {
    return row * kBytes + ((chunk ^ (row / (8 / kPlaces) % kPlaces)) << 4);
  }
  // From where a lane finds chunk 0 or 1, to `chunk` or the one behind it, for an even `chunk` that
  // is a constant: then all that is left to do is one exclusive or, or nothing.
  __device__ static __forceinline__ uint32_t move(uint32_t address, int row, int chunk) {
    return (address ^ (chunk % kPlaces << 4)) + (chunk / kPlaces * kPlaces << 4) + row * kBytes;
  }
};

// Where a lane finds its row of the 16 x 16 fragment of a left operand; of a transposed right one.
template <int D>
__device__ __forceinline__ uint32_t left_lane(uint32_t tile) {
  const int lane = threadIdx.x % 32;
  return tile + TileRow<D>::at(lane % 16, lane / 16);
}
// And of two right operands, 16 rows by 16 columns.
template <int D>
__device__ __forceinline__ uint32_t right_lane(uint32_t tile) {
  const int lane = threadIdx.x % 32;
  return tile + TileRow<D>::at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// Starts copying `Rows` rows to a tile; zeros beyond the `rows` that there are and beyond d. Chunks
// are taken 8 a row (128 bytes) at a time, then 4 and 2, so that a thread's lie below each other.
template <int Rows, int D, int Threads, int First = 0, class T>
__device__ __forceinline__ void copy_tile(uint32_t tile, const T* x, int64_t stride, int rows,
                                          int d) {
  constexpr int kLeft = TileRow<D>::kChunks - First;
  if constexpr (kLeft > 0) {
    constexpr int kAcross = kLeft >= 8 ? 8 : kLeft >= 4 ? 4 : 2, kDown = Threads / kAcross;
    const int r = threadIdx.x / kAcross, c = First + threadIdx.x % kAcross;
    const T* from = x + r * stride + c * 8;
    const uint32_t to = tile + TileRow<D>::at(r, c);
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

// s = x y^T, where load(a, i, step) gives the fragments of x, by 8 * N rows of y from `first` on. A
// tile that lies behind another is best named as the other's further rows: so they share addresses.
template <class T, int D, int M, int N, class Load>
__device__ __forceinline__ void multiply_rows(float (&s)[M][N][4], uint32_t y, int first,
                                              const Load& load) {
  const uint32_t y_lane = right_lane<D>(y);
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
      ptx::ldmatrix_x4(r, TileRow<D>::move(y_lane, first + j * 8, 2 * step));
      const uint32_t b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
#pragma unroll
      for (int i = 0; i < M; ++i) {
        ptx::mma_m16n8k16<T>(s[i][j], a[i], b0);
        ptx::mma_m16n8k16<T>(s[i][j + 1], a[i], b1);
      }
    }
  }
}

// A product's entries, rounded to T, as the left operand of the next.
template <class T, int M, int N>
__device__ __forceinline__ void as_operand(uint32_t (&w)[M][N / 2][4], const float (&s)[M][N][4]) {
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int j = 0; j < N / 2; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        w[i][j][e] =
            ptx::pack2<T>(s[i][2 * j + e / 2][e % 2 * 2], s[i][2 * j + e / 2][e % 2 * 2 + 1]);
}

// acc += w x, for 16 * N rows of x from `first` on.
template <class T, int D, int M, int N>
__device__ __forceinline__ void multiply_add(float (&acc)[M][D / 8][4],
                                             const uint32_t (&w)[M][N][4], uint32_t x, int first) {
  const uint32_t x_lane = left_lane<D>(x);
#pragma unroll
  for (int step = 0; step < N; ++step) {
#pragma unroll
    for (int j = 0; j + 1 < D / 8; j += 2) {
      uint32_t r[4];
      ptx::ldmatrix_x4<true>(r, TileRow<D>::move(x_lane, first + step * 16, j));
      const uint32_t b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
#pragma unroll
      for (int i = 0; i < M; ++i) {
        ptx::mma_m16n8k16<T>(acc[i][j], w[i][step], b0);
        ptx::mma_m16n8k16<T>(acc[i][j + 1], w[i][step], b1);
      }
    }
    if constexpr (D / 8 % 2) {
      uint32_t b[2];
      ptx::ldmatrix_x2<true>(b, TileRow<D>::move(x_lane, first + step * 16, D / 8 - 1));
#pragma unroll
      for (int i = 0; i < M; ++i) ptx::mma_m16n8k16<T>(acc[i][D / 8 - 1], w[i][step], b);
    }
  }
}

// Eight values, rounded to T, to where 16 bytes are aligned.
template <class T>
__device__ __forceinline__ void store8(T* to, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(to) = make_uint4(ptx::pack2<T>(x[0], x[1]), ptx::pack2<T>(x[2], x[3]),
                                             ptx::pack2<T>(x[4], x[5]), ptx::pack2<T>(x[6], x[7]));
}

// How a block is cut, and how many of them a multiprocessor shall hold.
struct MmaTile {
  int m, warps;  // it owns m * 16 rows a warp
  int step;      // rows of the other side at a time
  int blocks;
  constexpr int rows() const { return m * 16 * warps; }
  constexpr int threads() const { return warps * 32; }
};

// Which tile and head each block owns: all tiles of a head in turn, so that its K and V stay in the
// L2 cache; or for short sequences all heads of a tile, which lie side by side in memory.
struct AttentionGrid {
  int64_t first;  // block of this launch
  int64_t tiles;
  bool heads_in_turn;
};

struct AttentionShare {
  AttentionTile tile;
  int head;
  int rows;        // of the sequence, from the tile's first on
  int64_t token;   // the tile's first
  int64_t column;  // the head's first entry
};

template <class T>
__device__ __forceinline__ AttentionShare share_of(const AttentionProblem<T>& a,
                                                   const AttentionGrid& grid) {
  const int64_t block = grid.first + blockIdx.x;
  AttentionShare share;
  share.tile = a.tiles[grid.heads_in_turn ? block / a.heads : block % grid.tiles];
  share.head = static_cast<int>(grid.heads_in_turn ? block % a.heads : block / grid.tiles);
  share.rows = share.tile.length - share.tile.first;
  share.token = int64_t{share.tile.begin} + share.tile.first;
  share.column = int64_t{share.head} * a.d;
  return share;
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
  constexpr int64_t kMost = int64_t{1} << 30;  // blocks of a launch; 2^31 - 1 is the limit
  for (; grid.first < count * problem.heads; grid.first += kMost)
    launch(kernel, static_cast<unsigned>(std::min(kMost, count * problem.heads - grid.first)),
           tile.threads(), smem, stream_of(device), problem, grid, rest...);
}

// Whether large tiles pay, of 128 rows for 64: not where many rows would be padding.
inline bool large_tiles_pay(const Ints& cu_seqlens) {
  double large = 0, small = 0;
  for (size_t s = 1; s < cu_seqlens.size(); ++s) {
    const int64_t length = cu_seqlens[s] - cu_seqlens[s - 1];
    large += static_cast<double>(ceil_div(length, 128) * 128) * length;
    small += static_cast<double>(ceil_div(length, 64) * 64) * length;
  }
  return large < 1.25 * small;
}

// Calls f with the smallest of the head dimensions that holds d and whether tiles are large, as
// constants. The head dimensions of vision towers are exact and have large tiles too.
template <class F>
void with_mma_tiles(int64_t d, const Ints& cu_seqlens, F&& f) {
  const auto either = [&](auto dim) {
    if (large_tiles_pay(cu_seqlens))
      f(dim, std::true_type());
    else
      f(dim, std::false_type());
  };
  if (d <= 32)
    f(std::integral_constant<int, 32>(), std::false_type());
  else if (d <= 64)
    either(std::integral_constant<int, 64>());
  else if (d <= 72)
    either(std::integral_constant<int, 72>());
  else if (d <= 80)
    either(std::integral_constant<int, 80>());
  else if (d <= 96)
    f(std::integral_constant<int, 96>(), std::false_type());
  else
    either(std::integral_constant<int, 128>());
}

}  // namespace p2r::cuda
