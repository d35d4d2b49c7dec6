// Attention, forward, "plain" (plain.cuh): a block owns 64 queries of one sequence and head and
// loops over the keys, 64 at a time, with K and then V in the same shared memory. Each row's
// running maximum and sum are kept by the 16 threads that share the row; P passes through shared
// memory to the product with V.
#include "cuda/attention/plain.cuh"

namespace p2r::cuda {

namespace {

constexpr int kTile = 64, kRows = kTile / kSide;

template <class T, int Dim>
__global__ void __launch_bounds__(kThreads)
    attention_plain_kernel(AttentionProblem<T> a, T* out, float* lse) {
  SMEM_DYN(memory);
  float* q = reinterpret_cast<float*>(memory);
  float* kv = q + kTile * (Dim + kPad);
  float* p = kv + kTile * (Dim + kPad);
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
  const AttentionTile tile = a.tiles[blockIdx.x];
  const int64_t out_row = static_cast<int64_t>(a.heads) * a.d;

  for (int head = blockIdx.y; head < a.heads; head += gridDim.y) {
    const int64_t column = static_cast<int64_t>(head) * a.d;
    const T* k_head = a.k + tile.begin * a.qk_row + column;
    const T* v_head = a.v + tile.begin * a.v_row + column;
    __syncthreads();  // the previous head's q is no longer read
    load_tile<kTile, Dim>(q, a.q + tile.begin * a.qk_row + column, a.qk_row, tile.first,
                          tile.length, a.d);
    float o[kRows][Dim / kSide] = {}, row_max[kRows], row_sum[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      row_max[i] = -INFINITY;
      row_sum[i] = 0;
    }

    for (int key = 0; key < tile.length; key += kTile) {
      load_tile<kTile, Dim>(kv, k_head, a.qk_row, key, tile.length, a.d);
      __syncthreads();
      float s[kRows][kRows];
      gemm_nt<Dim>(s, q, kv, a.d);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float new_max = row_max[i];
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          s[i][j] *= a.scale;
          if (key + x + j * kSide < tile.length) new_max = fmaxf(new_max, s[i][j]);
        }
#pragma unroll
        for (int step = kSide / 2; step > 0; step /= 2)
          new_max = fmaxf(new_max, __shfl_xor_sync(0xFFFFFFFFu, new_max, step));
        // If every logit so far is -inf, all probabilities are 0, not exp(-inf + inf).
        const float max_finite = new_max == -INFINITY ? 0.0f : new_max;
        const float rescale = expf(row_max[i] - max_finite);
        row_max[i] = new_max;
        float total = 0;
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          const int at = x + j * kSide;
          const float prob = key + at < tile.length ? expf(s[i][j] - max_finite) : 0.0f;
          p[(y * kRows + i) * (kTile + kPad) + at] = prob;
          total += prob;
        }
        row_sum[i] = row_sum[i] * rescale + total;
#pragma unroll
        for (int j = 0; j < Dim / kSide; ++j) o[i][j] *= rescale;
      }
      __syncthreads();  // P is complete, and K is no longer read
      load_tile<kTile, Dim>(kv, v_head, a.v_row, key, tile.length, a.d);
      __syncthreads();
      const int keys = tile.length - key;
      gemm_nn<kTile, Dim>(o, p, kv, keys < kTile ? keys : kTile);
      __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float total = row_sum[i];
#pragma unroll
      for (int step = kSide / 2; step > 0; step /= 2)
        total += __shfl_xor_sync(0xFFFFFFFFu, total, step);
      const int row = tile.first + y * kRows + i;
      if (row >= tile.length) continue;
      const int64_t token = static_cast<int64_t>(tile.begin) + row;
      if (x == 0) lse[head * a.tokens + token] = row_max[i] + logf(total);
#pragma unroll
      for (int j = 0; j < Dim / kSide; ++j) {
        const int c = x + j * kSide;
        if (c < a.d) out[token * out_row + column + c] = from_float<T>(o[i][j] / total);
      }
    }
  }
}

}  // namespace

void plain_attention(const AttentionArgs& a, Device& device) {
  const AttentionLayout in = attention_layout(a.q, a.k, a.v, a.qkv);
  with_float_type(in.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const AttentionOnDevice<T> call(in, a.cos, a.sin, a.scale, device);
    with_tile_width(in.head_dim, [&](auto dim) {
      constexpr int Dim = decltype(dim)::value;
      run_plain(call, attention_plain_kernel<T, Dim>, a.cu_seqlens, kTile,
                2 * tile_bytes(kTile, Dim) + tile_bytes(kTile, kTile), a.out.as<T>(),
                a.lse.as<float>());
    });
  });
}

}  // namespace p2r::cuda
