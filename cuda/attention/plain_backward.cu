// Attention, backward: two passes and no atomics, so every sum has one owner and one order.
//
// delta = rowsum(dOut * out), 16 bytes a lane. Then one kernel owns keys and walks over the queries
// for dK and dV, and one owns queries and walks over the keys for dQ; both make P again from lse.
// What a block owns is kRows a thread row high; what it walks over comes kStep tokens at a time,
// which together keep shared memory below 99 KB, the least that chips of sm_80 to sm_90 have.
#include "cuda/attention/attention.cuh"

namespace p2r::cuda {

namespace {

constexpr int kStep = 32, kStepRows = kStep / kSide;

// Tokens that a block owns.
template <int Dim>
constexpr int kOwned = Dim > 80 ? 32 : 64;

// Lanes that share a row, of up to 128 entries, at 16 bytes each.
template <class T>
constexpr int kDeltaLanes = 8 * sizeof(T);

template <class T>
__global__ void __launch_bounds__(kThreads)
    attention_delta_kernel(const T* d_out, const T* out, float* delta, int64_t tokens, int heads,
                           int d) {
  constexpr int kLanes = kDeltaLanes<T>, kEntries = 16 / sizeof(T);
  const int c = threadIdx.x % kLanes * kEntries;
  const int64_t rows = tokens * heads, step = int64_t{gridDim.x} * (kThreads / kLanes);
  // All lanes of a warp go on while one of them has a row.
  for (int64_t row = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / kLanes;
       row - threadIdx.x % 32 / kLanes < rows; row += step) {
    float sum = 0;
    if (row < rows && c < d) {
      const uint4 x = *reinterpret_cast<const uint4*>(d_out + row * d + c);
      const uint4 y = *reinterpret_cast<const uint4*>(out + row * d + c);
      T a[kEntries], b[kEntries];
      memcpy(static_cast<void*>(a), &x, 16);
      memcpy(static_cast<void*>(b), &y, 16);
#pragma unroll
      for (int i = 0; i < kEntries; ++i) sum += to_float(a[i]) * to_float(b[i]);
    }
#pragma unroll
    for (int lane = kLanes / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lane);
    if (c == 0 && row < rows) delta[row % heads * tokens + row / heads] = sum;
  }
}

template <class T, int Dim>
__global__ void __launch_bounds__(kThreads, Dim > 80 ? 1 : 2)
    attention_d_kv_kernel(AttentionProblem<T> a, const T* d_out, const float* lse,
                          const float* delta, T* d_k, T* d_v, int64_t d_row) {
  constexpr int Owned = kOwned<Dim>, Rows = Owned / kSide;
  SMEM_DYN(memory);
  float* k = reinterpret_cast<float*>(memory);
  float* v = k + Owned * (Dim + kPad);
  float* q = v + Owned * (Dim + kPad);
  float* g = q + kStep * (Dim + kPad);
  float* p = g + kStep * (Dim + kPad);
  float* ds = p + kStep * (Owned + kPad);
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
  const AttentionTile tile = a.tiles[blockIdx.x];
  const int64_t g_row = static_cast<int64_t>(a.heads) * a.d;

  for (int head = blockIdx.y; head < a.heads; head += gridDim.y) {
    const int64_t column = static_cast<int64_t>(head) * a.d;
    const int64_t scalars = head * a.tokens + tile.begin;
    __syncthreads();
    load_tile<Owned, Dim>(k, a.k + tile.begin * a.qk_row + column, a.qk_row, tile.first,
                          tile.length, a.d);
    load_tile<Owned, Dim>(v, a.v + tile.begin * a.v_row + column, a.v_row, tile.first, tile.length,
                          a.d);
    float dk[Rows][Dim / kSide] = {}, dv[Rows][Dim / kSide] = {};
    for (int query = 0; query < tile.length; query += kStep) {
      load_tile<kStep, Dim>(q, a.q + tile.begin * a.qk_row + column, a.qk_row, query, tile.length,
                            a.d);
      load_tile<kStep, Dim>(g, d_out + tile.begin * g_row + column, g_row, query, tile.length, a.d);
      __syncthreads();
      float s[kStepRows][Rows], dp[kStepRows][Rows];
      dot_rows<Dim>(s, q, k, a.d);
      dot_rows<Dim>(dp, g, v, a.d);
#pragma unroll
      for (int i = 0; i < kStepRows; ++i) {
        const int at = y * kStepRows + i;
        const bool inside = query + at < tile.length;
        const float shift = inside ? lse[scalars + query + at] : 0.0f;
        const float mean = inside ? delta[scalars + query + at] : 0.0f;
#pragma unroll
        for (int j = 0; j < Rows; ++j) {
          const float weight = inside ? expf(s[i][j] * a.scale - shift) : 0.0f;
          const int to = at * (Owned + kPad) + x + j * kSide;
          p[to] = weight;
          ds[to] = inside ? weight * (dp[i][j] - mean) * a.scale : 0.0f;
        }
      }
      __syncthreads();
      const int left = tile.length - query, n = left < kStep ? left : kStep;
      add_weighted_columns<Owned, Dim>(dv, p, g, n);
      add_weighted_columns<Owned, Dim>(dk, ds, q, n);
      __syncthreads();
    }
    put_tile<Dim>(k, dk);
    put_tile<Dim>(v, dv);
    __syncthreads();
    const int64_t to = tile.begin * d_row + column, turn = static_cast<int64_t>(tile.begin) * a.d;
    store_tile<Owned, Dim>(k, d_k + to, d_row, tile.first, tile.length, a.d,
                           a.cos ? a.cos + turn : nullptr, a.cos ? a.sin + turn : nullptr);
    store_tile<Owned, Dim>(v, d_v + to, d_row, tile.first, tile.length, a.d, nullptr, nullptr);
  }
}

template <class T, int Dim>
__global__ void __launch_bounds__(kThreads, Dim > 80 ? 1 : 2)
    attention_d_q_kernel(AttentionProblem<T> a, const T* d_out, const float* lse,
                         const float* delta, T* d_q, int64_t d_row) {
  constexpr int Owned = kOwned<Dim>, Rows = Owned / kSide;
  SMEM_DYN(memory);
  float* q = reinterpret_cast<float*>(memory);
  float* g = q + Owned * (Dim + kPad);
  float* k = g + Owned * (Dim + kPad);
  float* v = k + kStep * (Dim + kPad);
  float* ds = v + kStep * (Dim + kPad);
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
  const AttentionTile tile = a.tiles[blockIdx.x];
  const int64_t g_row = static_cast<int64_t>(a.heads) * a.d;

  for (int head = blockIdx.y; head < a.heads; head += gridDim.y) {
    const int64_t column = static_cast<int64_t>(head) * a.d;
    __syncthreads();
    load_tile<Owned, Dim>(q, a.q + tile.begin * a.qk_row + column, a.qk_row, tile.first,
                          tile.length, a.d);
    load_tile<Owned, Dim>(g, d_out + tile.begin * g_row + column, g_row, tile.first, tile.length,
                          a.d);
    float shift[Rows], mean[Rows], dq[Rows][Dim / kSide] = {};
#pragma unroll
    for (int i = 0; i < Rows; ++i) {
      const int row = tile.first + y * Rows + i;
      const int64_t at = head * a.tokens + tile.begin + row;
      shift[i] = row < tile.length ? lse[at] : 0.0f;
      mean[i] = row < tile.length ? delta[at] : 0.0f;
    }
    for (int key = 0; key < tile.length; key += kStep) {
      load_tile<kStep, Dim>(k, a.k + tile.begin * a.qk_row + column, a.qk_row, key, tile.length,
                            a.d);
      load_tile<kStep, Dim>(v, a.v + tile.begin * a.v_row + column, a.v_row, key, tile.length, a.d);
      __syncthreads();
      float s[Rows][kStepRows], dp[Rows][kStepRows];
      dot_rows<Dim>(s, q, k, a.d);
      dot_rows<Dim>(dp, g, v, a.d);
#pragma unroll
      for (int i = 0; i < Rows; ++i)
#pragma unroll
        for (int j = 0; j < kStepRows; ++j) {
          const int at = x + j * kSide;
          const float weight = expf(s[i][j] * a.scale - shift[i]);
          ds[(y * Rows + i) * (kStep + kPad) + at] =
              key + at < tile.length ? weight * (dp[i][j] - mean[i]) * a.scale : 0.0f;
        }
      __syncthreads();
      const int left = tile.length - key;
      add_weighted<kStep, Dim>(dq, ds, k, left < kStep ? left : kStep);
      __syncthreads();
    }
    put_tile<Dim>(q, dq);
    __syncthreads();
    const int64_t turn = static_cast<int64_t>(tile.begin) * a.d;
    store_tile<Owned, Dim>(q, d_q + tile.begin * d_row + column, d_row, tile.first, tile.length,
                           a.d, a.cos ? a.cos + turn : nullptr, a.cos ? a.sin + turn : nullptr);
  }
}

}  // namespace

template <class T>
void attention_delta(const T* d_out, const T* out, float* delta, const AttentionLayout& in,
                     Device& device) {
  const int64_t rows = in.tokens * in.heads;
  if (!rows) return;
  launch(attention_delta_kernel<T>, blocks_for(rows * kDeltaLanes<T>, kThreads), kThreads, 0,
         stream_of(device), d_out, out, delta, in.tokens, static_cast<int>(in.heads),
         static_cast<int>(in.head_dim));
}
template void attention_delta(const __half*, const __half*, float*, const AttentionLayout&,
                              Device&);
template void attention_delta(const __nv_bfloat16*, const __nv_bfloat16*, float*,
                              const AttentionLayout&, Device&);

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
    AttentionOnDevice<T> call(in, a.cos, a.sin, a.scale, device);
    with_head_dim(in.head_dim, [&](auto dim) {
      constexpr int Dim = decltype(dim)::value, Owned = kOwned<Dim>;
      const size_t inputs = 2 * tile_bytes(Owned, Dim) + 2 * tile_bytes(kStep, Dim);
      call.run(attention_d_kv_kernel<T, Dim>, a.cu_seqlens, Owned,
               inputs + 2 * tile_bytes(kStep, Owned), d_out, lse, delta,
               reinterpret_cast<T*>(grad.k), reinterpret_cast<T*>(grad.v), grad.row);
      call.run(attention_d_q_kernel<T, Dim>, a.cu_seqlens, Owned, inputs + tile_bytes(Owned, kStep),
               d_out, lse, delta, reinterpret_cast<T*>(grad.q), grad.row);
    });
  });
}

}  // namespace p2r::cuda
