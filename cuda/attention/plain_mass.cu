// The mass of each key, "plain" (plain.cuh), for f32: a block owns 64 keys of one sequence and head
// and loops over the queries. Each thread sums its rows' probabilities, made again from lse; the
// partial sums of the 16 thread rows are added at the end.
#include "cuda/attention/plain.cuh"

namespace p2r::cuda {

namespace {

constexpr int kTile = 64, kRows = kTile / kSide;

template <int Dim>
__global__ void __launch_bounds__(kThreads)
    attention_mass_plain_kernel(AttentionProblem<float> a, const float* lse, float* mass) {
  SMEM_DYN(memory);
  float* k = reinterpret_cast<float*>(memory);
  float* q = k + kTile * (Dim + kPad);
  float* partial = q;  // [kSide][kTile], at the end
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
  const AttentionTile tile = a.tiles[blockIdx.x];

  for (int head = blockIdx.y; head < a.heads; head += gridDim.y) {
    const int64_t column = static_cast<int64_t>(head) * a.d;
    const float* lse_head = lse + head * a.tokens + tile.begin;
    __syncthreads();
    load_tile<kTile, Dim>(k, a.k + tile.begin * a.qk_row + column, a.qk_row, tile.first,
                          tile.length, a.d);
    float sums[kRows] = {};
    for (int query = 0; query < tile.length; query += kTile) {
      load_tile<kTile, Dim>(q, a.q + tile.begin * a.qk_row + column, a.qk_row, query, tile.length,
                            a.d);
      __syncthreads();
      float s[kRows][kRows];
      gemm_nt<Dim>(s, q, k, a.d);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = query + y * kRows + i;
        if (row < tile.length) {
          const float lse_row = lse_head[row];
#pragma unroll
          for (int j = 0; j < kRows; ++j) sums[j] += expf(s[i][j] * a.scale - lse_row);
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) partial[y * kTile + x + j * kSide] = sums[j];
    __syncthreads();
    const int key = tile.first + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kTile && key < tile.length) {
      float sum = 0;
      for (int i = 0; i < kSide; ++i) sum += partial[i * kTile + threadIdx.x];
      mass[head * a.tokens + tile.begin + key] = sum;
    }
  }
}

}  // namespace

void plain_attention_mass(const AttentionMassArgs& a, Device& device) {
  const AttentionLayout in = attention_layout(a.q, a.k, View(), a.qkv);
  const AttentionOnDevice<float> call(in, a.cos, a.sin, a.scale, device);
  with_tile_width(in.head_dim, [&](auto dim) {
    constexpr int Dim = decltype(dim)::value;
    run_plain(call, attention_mass_plain_kernel<Dim>, a.cu_seqlens, kTile,
              2 * tile_bytes(kTile, Dim), a.lse.as<const float>(), a.mass.as<float>());
  });
}

}  // namespace p2r::cuda
