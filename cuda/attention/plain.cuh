// What the "plain" attention kernels share: f32 on the CUDA cores, for every type and head
// dimension. Tiles in shared memory are f32 and have rows of Dim floats, the next of a few widths
// above the head dimension.
//
// A block has 256 threads, 16 x 16. Thread (y, x) owns rows y * R .. y * R + R-1 of a product and
// its columns x, x + 16, ...: row entries are read as broadcasts within a half warp, columns
// without bank conflicts, since rows of shared memory are padded by 4 floats.
#pragma once
#include "cuda/attention/attention.cuh"

namespace p2r::cuda {

constexpr int kSide = 16, kThreads = kSide * kSide;
constexpr int kPad = 4;

// Bytes of a tile in shared memory.
constexpr size_t tile_bytes(int rows, int width) { return sizeof(float) * rows * (width + kPad); }

// A tile of rows that begin at place(0), place(1), ...; zeros from row n on and beyond d.
template <int Rows, int Dim, class Place>
__device__ __forceinline__ void load_rows(float* tile, int n, int d, Place place) {
  for (int i = threadIdx.x; i < Rows * Dim; i += kThreads) {
    const int r = i / Dim, c = i % Dim;
    tile[r * (Dim + kPad) + c] = r < n && c < d ? to_float(place(r)[c]) : 0.0f;
  }
}

// Rows first .. first + Rows-1 of one head of a sequence; zeros beyond its end and beyond d.
template <int Rows, int Dim, class T>
__device__ __forceinline__ void load_tile(float* tile, const T* x, int64_t row, int first,
                                          int length, int d) {
  load_rows<Rows, Dim>(tile, length - first, d,
                       [&](int r) { return x + static_cast<int64_t>(first + r) * row; });
}

// The reverse. With tables, rows are rotated back by their angles.
template <int Rows, int Dim, class T>
__device__ __forceinline__ void store_tile(const float* tile, T* x, int64_t row, int first,
                                           int length, int d, const float* cos, const float* sin) {
  for (int i = threadIdx.x; i < Rows * Dim; i += kThreads) {
    const int r = i / Dim, c = i % Dim;
    if (first + r >= length || c >= d) continue;
    const float* from = tile + r * (Dim + kPad);
    const int64_t token = first + r;
    const auto entry = [from](int j) { return from[j]; };
    const float value =
        cos ? rotate_half(entry, cos + token * d, sin + token * d, c, d / 2, true) : from[c];
    x[token * row + c] = from_float<T>(value);
  }
}

// s = A B^T for rows of d entries: s[i][j] = a[row i] . b[row j].
template <int Dim, int R, int C>
__device__ __forceinline__ void gemm_nt(float (&s)[R][C], const float* a, const float* b, int d) {
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
#pragma unroll
  for (int i = 0; i < R; ++i)
#pragma unroll
    for (int j = 0; j < C; ++j) s[i][j] = 0;
  for (int c = 0; c < d; c += 4) {
    float4 p[R], q[C];
#pragma unroll
    for (int i = 0; i < R; ++i)
      p[i] = *reinterpret_cast<const float4*>(a + (y * R + i) * (Dim + kPad) + c);
#pragma unroll
    for (int j = 0; j < C; ++j)
      q[j] = *reinterpret_cast<const float4*>(b + (x + j * kSide) * (Dim + kPad) + c);
#pragma unroll
    for (int i = 0; i < R; ++i)
#pragma unroll
      for (int j = 0; j < C; ++j)
        s[i][j] += p[i].x * q[j].x + p[i].y * q[j].y + p[i].z * q[j].z + p[i].w * q[j].w;
  }
}

// acc += A B over n rows of B; A has rows of Width entries.
template <int Width, int Dim, int R, int C>
__device__ __forceinline__ void gemm_nn(float (&acc)[R][C], const float* w, const float* x, int n) {
  const int row = threadIdx.x / kSide * R, column = threadIdx.x % kSide;
  for (int k = 0; k < n; k += 4) {
    float4 p[R];
#pragma unroll
    for (int i = 0; i < R; ++i)
      p[i] = *reinterpret_cast<const float4*>(w + (row + i) * (Width + kPad) + k);
#pragma unroll
    for (int j = 0; j < C; ++j) {
      const float* v = x + k * (Dim + kPad) + column + j * kSide;
      const float v0 = v[0], v1 = v[Dim + kPad], v2 = v[2 * (Dim + kPad)], v3 = v[3 * (Dim + kPad)];
#pragma unroll
      for (int i = 0; i < R; ++i)
        acc[i][j] += p[i].x * v0 + p[i].y * v1 + p[i].z * v2 + p[i].w * v3;
    }
  }
}

// acc += A^T B over n rows of both; A has rows of Width entries.
template <int Width, int Dim, int R, int C>
__device__ __forceinline__ void gemm_tn(float (&acc)[R][C], const float* w, const float* x, int n) {
  const int row = threadIdx.x / kSide * R, column = threadIdx.x % kSide;
  for (int k = 0; k < n; ++k) {
    float p[R];
#pragma unroll
    for (int i = 0; i < R; ++i) p[i] = w[k * (Width + kPad) + row + i];
#pragma unroll
    for (int j = 0; j < C; ++j) {
      const float v = x[k * (Dim + kPad) + column + j * kSide];
#pragma unroll
      for (int i = 0; i < R; ++i) acc[i][j] += p[i] * v;
    }
  }
}

// A thread's part of a product to a tile.
template <int Dim, int R, int C>
__device__ __forceinline__ void store_to_shared(float* tile, const float (&acc)[R][C]) {
  const int row = threadIdx.x / kSide * R, column = threadIdx.x % kSide;
#pragma unroll
  for (int i = 0; i < R; ++i)
#pragma unroll
    for (int j = 0; j < C; ++j) tile[(row + i) * (Dim + kPad) + column + j * kSide] = acc[i][j];
}

// Calls f with a width of tiles that holds d, as a constant.
template <class F>
void with_tile_width(int64_t d, F&& f) {
  with_head_dim<32, 64, 80, 128>(d, f);
}

// Runs kernel(problem, rest...) with a block for every `step` tokens of a sequence and every head.
template <class T, class... P, class... A>
void run_plain(const AttentionOnDevice<T>& call, void (*kernel)(AttentionProblem<T>, P...),
               const Ints& cu_seqlens, int step, size_t smem, A... rest) {
  AttentionProblem<T> problem = call.problem();
  const std::vector<AttentionTile> tiles = attention_tiles(cu_seqlens, step);
  if (tiles.empty() || problem.heads == 0) return;
  Device& device = call.device();
  const Scratch memory = device.scratch(tiles.size() * sizeof tiles[0]);
  device.upload(memory.as<void>(), tiles.data(), tiles.size() * sizeof tiles[0]);
  problem.tiles = memory.as<const AttentionTile>();
  const dim3 grid(static_cast<unsigned>(tiles.size()),
                  static_cast<unsigned>(problem.heads < 65535 ? problem.heads : 65535));
  launch(kernel, grid, kThreads, smem, stream_of(device), problem, rest...);
}

}  // namespace p2r::cuda
