// Attention, backward, "plain" (plain.cuh): two passes and no atomics, so every sum has one owner
// and one order.
//
// One kernel owns keys and loops over the queries for dK and dV, and one owns queries and loops
// over the keys for dQ; both make P again from lse. The owned tile has Owned tokens, the other side
// is loaded kStep tokens at a time, which together keep shared memory below 99 KB, the least that
// chips of sm_80 to sm_90 have.
#include "cuda/attention/plain.cuh"

namespace p2r::cuda {

namespace {

constexpr int kStep = 32, kStepRows = kStep / kSide;

// Tokens that a block owns.
template <int Dim>
constexpr int kOwned = Dim > 80 ? 32 : 64;

template <class T, int Dim>
__global__ void __launch_bounds__(kThreads, Dim > 80 ? 1 : 2)
    attention_d_kv_plain_kernel(AttentionProblem<T> a, const T* d_out, const float* lse,
                                const float* delta, T* d_k, T* d_v, int64_t d_row) {
  constexpr int Owned = kOwned<Dim>, Rows = Owned / kSide;
  SMEM_DYN(memory);
  float* k = reinterpret_cast<float*>(memory);
  float* v = k + Owned * (Dim + kPad);
  float* q = v + Owned * (Dim + kPad);
  float* dout = q + kStep * (Dim + kPad);
  float* p = dout + kStep * (Dim + kPad);
  float* ds = p + kStep * (Owned + kPad);
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
  const AttentionTile tile = a.tiles[blockIdx.x];
  const int64_t dout_row = static_cast<int64_t>(a.heads) * a.d;

  for (int head = blockIdx.y; head < a.heads; head += gridDim.y) {
    const int64_t column = static_cast<int64_t>(head) * a.d;
    const int64_t row_offset = head * a.tokens + tile.begin;
    __syncthreads();
    load_tile<Owned, Dim>(k, a.k + tile.begin * a.qk_row + column, a.qk_row, tile.first,
                          tile.length, a.d);
    load_tile<Owned, Dim>(v, a.v + tile.begin * a.v_row + column, a.v_row, tile.first, tile.length,
                          a.d);
    float dk[Rows][Dim / kSide] = {}, dv[Rows][Dim / kSide] = {};
    for (int query = 0; query < tile.length; query += kStep) {
      load_tile<kStep, Dim>(q, a.q + tile.begin * a.qk_row + column, a.qk_row, query, tile.length,
                            a.d);
      load_tile<kStep, Dim>(dout, d_out + tile.begin * dout_row + column, dout_row, query,
                            tile.length, a.d);
      __syncthreads();
      float s[kStepRows][Rows], dp[kStepRows][Rows];
      gemm_nt<Dim>(s, q, k, a.d);
      gemm_nt<Dim>(dp, dout, v, a.d);
#pragma unroll
      for (int i = 0; i < kStepRows; ++i) {
        const int at = y * kStepRows + i;
        const bool inside = query + at < tile.length;
        const float lse_row = inside ? lse[row_offset + query + at] : 0.0f;
        const float delta_row = inside ? delta[row_offset + query + at] : 0.0f;
#pragma unroll
        for (int j = 0; j < Rows; ++j) {
          const float prob = inside ? expf(s[i][j] * a.scale - lse_row) : 0.0f;
          const int to = at * (Owned + kPad) + x + j * kSide;
          p[to] = prob;
          ds[to] = inside ? prob * (dp[i][j] - delta_row) * a.scale : 0.0f;
        }
      }
      __syncthreads();
      const int queries = tile.length - query, n = queries < kStep ? queries : kStep;
      gemm_tn<Owned, Dim>(dv, p, dout, n);
      gemm_tn<Owned, Dim>(dk, ds, q, n);
      __syncthreads();
    }
    store_to_shared<Dim>(k, dk);
    store_to_shared<Dim>(v, dv);
    __syncthreads();
    const int64_t to = tile.begin * d_row + column,
                  rotary_offset = static_cast<int64_t>(tile.begin) * a.d;
    store_tile<Owned, Dim>(k, d_k + to, d_row, tile.first, tile.length, a.d,
                           a.cos ? a.cos + rotary_offset : nullptr,
                           a.cos ? a.sin + rotary_offset : nullptr);
    store_tile<Owned, Dim>(v, d_v + to, d_row, tile.first, tile.length, a.d, nullptr, nullptr);
  }
}

template <class T, int Dim>
__global__ void __launch_bounds__(kThreads, Dim > 80 ? 1 : 2)
    attention_d_q_plain_kernel(AttentionProblem<T> a, const T* d_out, const float* lse,
                               const float* delta, T* d_q, int64_t d_row) {
  constexpr int Owned = kOwned<Dim>, Rows = Owned / kSide;
  SMEM_DYN(memory);
  float* q = reinterpret_cast<float*>(memory);
  float* dout = q + Owned * (Dim + kPad);
  float* k = dout + Owned * (Dim + kPad);
  float* v = k + kStep * (Dim + kPad);
  float* ds = v + kStep * (Dim + kPad);
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
  const AttentionTile tile = a.tiles[blockIdx.x];
  const int64_t dout_row = static_cast<int64_t>(a.heads) * a.d;

  for (int head = blockIdx.y; head < a.heads; head += gridDim.y) {
    const int64_t column = static_cast<int64_t>(head) * a.d;
    __syncthreads();
    load_tile<Owned, Dim>(q, a.q + tile.begin * a.qk_row + column, a.qk_row, tile.first,
                          tile.length, a.d);
    load_tile<Owned, Dim>(dout, d_out + tile.begin * dout_row + column, dout_row, tile.first,
                          tile.length, a.d);
    float lse_row[Rows], delta_row[Rows], dq[Rows][Dim / kSide] = {};
#pragma unroll
    for (int i = 0; i < Rows; ++i) {
      const int row = tile.first + y * Rows + i;
      const int64_t at = head * a.tokens + tile.begin + row;
      lse_row[i] = row < tile.length ? lse[at] : 0.0f;
      delta_row[i] = row < tile.length ? delta[at] : 0.0f;
    }
    for (int key = 0; key < tile.length; key += kStep) {
      load_tile<kStep, Dim>(k, a.k + tile.begin * a.qk_row + column, a.qk_row, key, tile.length,
                            a.d);
      load_tile<kStep, Dim>(v, a.v + tile.begin * a.v_row + column, a.v_row, key, tile.length, a.d);
      __syncthreads();
      float s[Rows][kStepRows], dp[Rows][kStepRows];
      gemm_nt<Dim>(s, q, k, a.d);
      gemm_nt<Dim>(dp, dout, v, a.d);
#pragma unroll
      for (int i = 0; i < Rows; ++i)
#pragma unroll
        for (int j = 0; j < kStepRows; ++j) {
          const int at = x + j * kSide;
          const float prob = expf(s[i][j] * a.scale - lse_row[i]);
          ds[(y * Rows + i) * (kStep + kPad) + at] =
              key + at < tile.length ? prob * (dp[i][j] - delta_row[i]) * a.scale : 0.0f;
        }
      __syncthreads();
      const int keys = tile.length - key;
      gemm_nn<kStep, Dim>(dq, ds, k, keys < kStep ? keys : kStep);
      __syncthreads();
    }
    store_to_shared<Dim>(q, dq);
    __syncthreads();
    const int64_t rotary_offset = static_cast<int64_t>(tile.begin) * a.d;
    store_tile<Owned, Dim>(q, d_q + tile.begin * d_row + column, d_row, tile.first, tile.length,
                           a.d, a.cos ? a.cos + rotary_offset : nullptr,
                           a.cos ? a.sin + rotary_offset : nullptr);
  }
}

}  // namespace

void plain_attention_backward(const AttentionBackwardArgs& a, Device& device) {
  const AttentionLayout in = attention_layout(a.q, a.k, a.v, a.qkv);
  const AttentionLayout grad = attention_layout(a.d_q, a.d_k, a.d_v, a.d_qkv);
  const Scratch delta_memory = device.scratch(in.tokens * in.heads * sizeof(float));
  float* delta = delta_memory.as<float>();
  const float* lse = a.lse.as<const float>();
  with_float_type(in.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const T* d_out = a.d_out.as<const T>();
    attention_delta(d_out, a.out.as<const T>(), delta, in, device);
    const AttentionOnDevice<T> call(in, a.cos, a.sin, a.scale, device);
    with_tile_width(in.head_dim, [&](auto dim) {
      constexpr int Dim = decltype(dim)::value, Owned = kOwned<Dim>;
      const size_t inputs = 2 * tile_bytes(Owned, Dim) + 2 * tile_bytes(kStep, Dim);
      run_plain(call, attention_d_kv_plain_kernel<T, Dim>, a.cu_seqlens, Owned,
                inputs + 2 * tile_bytes(kStep, Owned), d_out, lse, delta,
                reinterpret_cast<T*>(grad.k), reinterpret_cast<T*>(grad.v), grad.row);
      run_plain(call, attention_d_q_plain_kernel<T, Dim>, a.cu_seqlens, Owned,
                inputs + tile_bytes(Owned, kStep), d_out, lse, delta, reinterpret_cast<T*>(grad.q),
                grad.row);
    });
  });
}

}  // namespace p2r::cuda
