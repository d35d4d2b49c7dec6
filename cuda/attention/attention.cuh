// What the attention kernels share: the list of tiles, tiles in shared memory, and the products of
// one tile by another.
//
// A block has 256 threads, 16 x 16. Thread (y, x) owns rows y * R .. y * R + R-1 of a tile's
// product and its columns x, x + 16, ...: rows are read as broadcasts within a half warp, columns
// without bank conflicts, since rows of shared memory are 4 floats longer than what they hold.
// Everything is f32 on the plain cores; any head dimension takes the next of the widths Dim.
#pragma once
#include <algorithm>
#include <vector>

#include "cuda/rotary.cuh"
#include "ops/attention.h"

namespace p2r::cuda {

// Attention by the kernels of a name.
void plain_attention(const AttentionArgs& a, Device& device);
void plain_attention_backward(const AttentionBackwardArgs& a, Device& device);
void mma_attention(const AttentionArgs& a, Device& device);
void mma_attention_backward(const AttentionBackwardArgs& a, Device& device);
void mma_attention_mass(const AttentionMassArgs& a, Device& device);
void wgmma_attention(const AttentionArgs& a, Device& device);
void wgmma_attention_backward(const AttentionBackwardArgs& a, Device& device);

constexpr int kSide = 16, kThreads = kSide * kSide;
constexpr int kPad = 4;

// Some tokens of a sequence, the part of the work that a block owns.
struct AttentionTile {
  int32_t begin, length;  // the sequence
  int32_t first;          // token of it
};

template <class T>
struct AttentionProblem {
  const T *q, *k, *v;
  int64_t qk_row, v_row;  // elements from token to token
  const AttentionTile* tiles;
  int64_t tokens;
  int heads, d;
  float scale;
  const float *cos, *sin;  // null: no rotary; for gradients, since q and k come turned
};

// Rows first .. first + Rows-1 of one head of a sequence, f32, zeros beyond its end and beyond d.
template <int Rows, int Dim, class T>
__device__ __forceinline__ void load_tile(float* tile, const T* x, int64_t row, int first,
                                          int length, int d) {
  for (int i = threadIdx.x; i < Rows * Dim; i += kThreads) {
    const int r = i / Dim, c = i % Dim;
    const bool inside = first + r < length && c < d;
    tile[r * (Dim + kPad) + c] =
        inside ? to_float(x[static_cast<int64_t>(first + r) * row + c]) : 0.0f;
  }
}

// The reverse, with rows turned back by their rows of the tables on the way, if there are tables.
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

// s[i][j] = a[row i] . b[row j], rows of d entries.
template <int Dim, int R, int C>
__device__ __forceinline__ void dot_rows(float (&s)[R][C], const float* a, const float* b, int d) {
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

// acc[i][j] += sum over n of w[row i][n] x[n][column j]; w has rows of Width weights.
template <int Width, int Dim, int R, int C>
__device__ __forceinline__ void add_weighted(float (&acc)[R][C], const float* w, const float* x,
                                             int n) {
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

// acc[i][j] += sum over n of w[n][column i] x[n][column j]: the weights transposed.
template <int Width, int Dim, int R, int C>
__device__ __forceinline__ void add_weighted_columns(float (&acc)[R][C], const float* w,
                                                     const float* x, int n) {
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

template <int Dim, int R, int C>
__device__ __forceinline__ void put_tile(float* tile, const float (&acc)[R][C]) {
  const int row = threadIdx.x / kSide * R, column = threadIdx.x % kSide;
#pragma unroll
  for (int i = 0; i < R; ++i)
#pragma unroll
    for (int j = 0; j < C; ++j) tile[(row + i) * (Dim + kPad) + column + j * kSide] = acc[i][j];
}

// Calls f with a null pointer of a type of 16 bits.
template <class F>
void with_half_type(DType t, F&& f) {
  if (t == DType::f16)
    f(static_cast<__half*>(nullptr));
  else
    f(static_cast<__nv_bfloat16*>(nullptr));
}

// Calls f with the smallest of the widths that holds d, as a constant.
template <class F>
void with_head_dim(int64_t d, F&& f) {
  if (d <= 32)
    f(std::integral_constant<int, 32>());
  else if (d <= 64)
    f(std::integral_constant<int, 64>());
  else if (d <= 80)
    f(std::integral_constant<int, 80>());
  else
    f(std::integral_constant<int, 128>());
}

// Every `step` tokens of every sequence, the longest sequences first: a block's work grows with the
// length, so that none is left with much at the end.
inline std::vector<AttentionTile> attention_tiles(const Ints& cu_seqlens, int64_t step) {
  std::vector<AttentionTile> tiles;
  for (size_t s = 1; s < cu_seqlens.size(); ++s) {
    const int64_t length = cu_seqlens[s] - cu_seqlens[s - 1];
    for (int64_t first = 0; first < length; first += step)
      tiles.push_back({static_cast<int32_t>(cu_seqlens[s - 1]), static_cast<int32_t>(length),
                       static_cast<int32_t>(first)});
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const AttentionTile& a, const AttentionTile& b) {
    return a.length > b.length;
  });
  return tiles;
}

// Shared memory for rows of Width floats.
constexpr size_t tile_bytes(int rows, int width) { return sizeof(float) * rows * (width + kPad); }

// One call on the device: its tiles of `step` tokens, and q and k turned if there are tables, into
// `room`'s if it is given.
template <class T>
class AttentionOnDevice {
 public:
  AttentionOnDevice(const AttentionLayout& in, const View& cos, const View& sin, double scale,
                    Device& device, const AttentionLayout* room = nullptr)
      : device_(device),
        turned_(device, cos && !room ? 2 * in.tokens * in.heads * in.head_dim * sizeof(T) : 0) {
    p_.q = reinterpret_cast<const T*>(in.q);
    p_.k = reinterpret_cast<const T*>(in.k);
    p_.v = reinterpret_cast<const T*>(in.v);
    p_.qk_row = p_.v_row = in.row;
    p_.tokens = in.tokens;
    p_.heads = static_cast<int>(in.heads);
    p_.d = static_cast<int>(in.head_dim);
    p_.scale = static_cast<float>(scale);
    p_.cos = cos.as<const float>();
    p_.sin = sin.as<const float>();
    if (!cos) return;
    const int64_t inner = in.heads * in.head_dim, row = room ? room->row : inner;
    T* q = room ? reinterpret_cast<T*>(room->q) : turned_.template as<T>();
    T* k = room ? reinterpret_cast<T*>(room->k) : q + in.tokens * inner;
    rotate_rows<T>(p_.q, in.row, p_.cos, p_.sin, q, row, in.tokens, in.heads, in.head_dim, false,
                   device);
    rotate_rows<T>(p_.k, in.row, p_.cos, p_.sin, k, row, in.tokens, in.heads, in.head_dim, false,
                   device);
    p_.q = q;
    p_.k = k;
    p_.qk_row = row;
  }

  const AttentionProblem<T>& problem() const { return p_; }
  Device& device() const { return device_; }

  // Runs kernel(problem, rest...) with a block for every `step` tokens of a sequence and every
  // head.
  template <class... P, class... A>
  void run(void (*kernel)(AttentionProblem<T>, P...), const Ints& cu_seqlens, int step, size_t smem,
           A... rest) {
    const std::vector<AttentionTile> tiles = attention_tiles(cu_seqlens, step);
    if (tiles.empty() || p_.heads == 0) return;
    const Scratch memory = device_.scratch(tiles.size() * sizeof tiles[0]);
    device_.upload(memory.as<void>(), tiles.data(), tiles.size() * sizeof tiles[0]);
    AttentionProblem<T> problem = p_;
    problem.tiles = memory.as<const AttentionTile>();
    const dim3 grid(static_cast<unsigned>(tiles.size()),
                    static_cast<unsigned>(p_.heads < 65535 ? p_.heads : 65535));
    launch(kernel, grid, kThreads, smem, stream_of(device_), problem, rest...);
  }

 private:
  Device& device_;
  Scratch turned_;
  AttentionProblem<T> p_{};
};

// delta [H, T] = rowsum(dOut * out), before a backward pass (cuda/attention/plain_backward.cu).
template <class T>
void attention_delta(const T* d_out, const T* out, float* delta, const AttentionLayout& in,
                     Device& device);

}  // namespace p2r::cuda
