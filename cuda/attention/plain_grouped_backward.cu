// Attention of rows (grouped.cuh), backward, "plain" (plain.cuh): two passes and no atomics, as in
// plain_backward.cu. The kernel of dK and dV owns a tile of rows of k and v that the same sequences
// see, and loops over the rows of each of them in order, so that a shared key's gradient has one
// owner; the kernel of dQ owns rows and loops over the keys that the last of them sees.
//
// f32 on the CUDA cores: seven products of 4096 causal tokens of 16 heads of 128, 240 GFLOP of
// useful work, take 9 ms at some 30 TFLOP/s of an H200's 67.
//
// dQ's kernel keeps some 50 bytes of a thread's registers in local memory on sm_80, 8 on sm_90a at
// a width of 80: addresses of rows, as the forward's.
//
// ptxas: grouped_attention_d_q_plain_kernel spills
#include "cuda/attention/grouped.cuh"
#include "cuda/attention/plain.cuh"

namespace p2r::cuda {

namespace {

constexpr int kStep = 32, kStepRows = kStep / kSide;

// Rows that a block owns.
template <int Dim>
constexpr int kOwned = Dim > 80 ? 32 : 64;

template <class T, int Dim>
__global__ void __launch_bounds__(kThreads, Dim > 80 ? 1 : 2)
    grouped_attention_d_kv_plain_kernel(GroupedProblem<T> a, const T* d_out, const float* lse,
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
  const KeyTile tile = a.key_tiles[blockIdx.x];
  const int64_t dout_row = static_cast<int64_t>(a.heads) * a.d;

  for (int head = blockIdx.y; head < a.key_heads; head += gridDim.y) {
    const int64_t column = static_cast<int64_t>(head) * a.d;
    __syncthreads();
    load_tile<Owned, Dim>(k, a.k + tile.row * a.k_row + column, a.k_row, 0, tile.length, a.d);
    load_tile<Owned, Dim>(v, a.v + tile.row * a.v_row + column, a.v_row, 0, tile.length, a.d);
    float dk[Rows][Dim / kSide] = {}, dv[Rows][Dim / kSide] = {};
    for (int reader = tile.first_reader; reader < tile.first_reader + tile.readers; ++reader) {
      const int first_key = a.readers[reader].key;
      const GroupedSequence s = a.sequences[a.readers[reader].sequence];
      const int rows = s.queries * a.group;
      int row = s.first_query(first_key, a.causal) * a.group / kStep * kStep;
      for (; row < rows; row += kStep) {
        load_rows<kStep, Dim>(q, rows - row, a.d,
                              [&](int r) { return a.q + a.row(s, row + r, head, a.q_row); });
        load_rows<kStep, Dim>(dout, rows - row, a.d,
                              [&](int r) { return d_out + a.row(s, row + r, head, dout_row); });
        __syncthreads();
        float logits[kStepRows][Rows], dp[kStepRows][Rows];
        gemm_nt<Dim>(logits, q, k, a.d);
        gemm_nt<Dim>(dp, dout, v, a.d);
#pragma unroll
        for (int i = 0; i < kStepRows; ++i) {
          const int at = y * kStepRows + i;
          const bool inside = row + at < rows;
          const int seen = inside ? a.visible(s, row + at) - first_key : 0;
          const float lse_row = inside ? lse[a.log(s, row + at, head)] : 0.0f;
          const float delta_row = inside ? delta[a.log(s, row + at, head)] : 0.0f;
#pragma unroll
          for (int j = 0; j < Rows; ++j) {
            const bool sees = x + j * kSide < seen;
            const float prob = sees ? expf(logits[i][j] * a.scale - lse_row) : 0.0f;
            const int to = at * (Owned + kPad) + x + j * kSide;
            p[to] = prob;
            ds[to] = sees ? prob * (dp[i][j] - delta_row) * a.scale : 0.0f;
          }
        }
        __syncthreads();
        const int left = rows - row, n = left < kStep ? left : kStep;
        gemm_tn<Owned, Dim>(dv, p, dout, n);
        gemm_tn<Owned, Dim>(dk, ds, q, n);
        __syncthreads();
      }
    }
    __syncthreads();  // without readers, k and v are still being loaded
    store_to_shared<Dim>(k, dk);
    store_to_shared<Dim>(v, dv);
    __syncthreads();
    const int64_t to = tile.row * d_row + column, angles = static_cast<int64_t>(tile.row) * a.d;
    store_tile<Owned, Dim>(k, d_k + to, d_row, 0, tile.length, a.d,
                           a.cos ? a.cos + angles : nullptr, a.cos ? a.sin + angles : nullptr);
    store_tile<Owned, Dim>(v, d_v + to, d_row, 0, tile.length, a.d, nullptr, nullptr);
  }
}

template <class T, int Dim>
__global__ void __launch_bounds__(kThreads, Dim > 80 ? 1 : 2)
    grouped_attention_d_q_plain_kernel(GroupedProblem<T> a, const T* d_out, const float* lse,
                                       const float* delta, T* d_q, int64_t d_row) {
  constexpr int Owned = kOwned<Dim>, Rows = Owned / kSide;
  SMEM_DYN(memory);
  float* q = reinterpret_cast<float*>(memory);
  float* dout = q + Owned * (Dim + kPad);
  float* k = dout + Owned * (Dim + kPad);
  float* v = k + kStep * (Dim + kPad);
  float* ds = v + kStep * (Dim + kPad);
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
  const GroupedTile tile = a.tiles[blockIdx.x];
  const GroupedSequence s = a.sequences[tile.sequence];
  const int rows = s.queries * a.group - tile.first;
  const int last = (rows < Owned ? rows : Owned) - 1;
  const int keys = a.visible(s, tile.first + last);
  const int64_t dout_row = static_cast<int64_t>(a.heads) * a.d;

  for (int head = blockIdx.y; head < a.key_heads; head += gridDim.y) {
    const int64_t column = static_cast<int64_t>(head) * a.d;
    __syncthreads();
    load_rows<Owned, Dim>(q, rows, a.d,
                          [&](int r) { return a.q + a.row(s, tile.first + r, head, a.q_row); });
    load_rows<Owned, Dim>(dout, rows, a.d,
                          [&](int r) { return d_out + a.row(s, tile.first + r, head, dout_row); });
    float lse_row[Rows], delta_row[Rows], dq[Rows][Dim / kSide] = {};
    int visible[Rows];
#pragma unroll
    for (int i = 0; i < Rows; ++i) {
      const int r = y * Rows + i;
      const bool inside = r < rows;
      visible[i] = inside ? a.visible(s, tile.first + r) : 0;
      lse_row[i] = inside ? lse[a.log(s, tile.first + r, head)] : 0.0f;
      delta_row[i] = inside ? delta[a.log(s, tile.first + r, head)] : 0.0f;
    }
    for (int key = 0; key < keys; key += kStep) {
      load_rows<kStep, Dim>(k, keys - key, a.d,
                            [&](int r) { return a.k + a.key(s, key + r, a.k_row) + column; });
      load_rows<kStep, Dim>(v, keys - key, a.d,
                            [&](int r) { return a.v + a.key(s, key + r, a.v_row) + column; });
      __syncthreads();
      float logits[Rows][kStepRows], dp[Rows][kStepRows];
      gemm_nt<Dim>(logits, q, k, a.d);
      gemm_nt<Dim>(dp, dout, v, a.d);
#pragma unroll
      for (int i = 0; i < Rows; ++i)
#pragma unroll
        for (int j = 0; j < kStepRows; ++j) {
          const int at = x + j * kSide;
          const float prob = expf(logits[i][j] * a.scale - lse_row[i]);
          ds[(y * Rows + i) * (kStep + kPad) + at] =
              key + at < visible[i] ? prob * (dp[i][j] - delta_row[i]) * a.scale : 0.0f;
        }
      __syncthreads();
      const int left = keys - key;
      gemm_nn<kStep, Dim>(dq, ds, k, left < kStep ? left : kStep);
      __syncthreads();
    }
    __syncthreads();  // without keys, q is still being loaded
    store_to_shared<Dim>(q, dq);
    __syncthreads();
    for (int i = threadIdx.x; i < Owned * Dim; i += kThreads) {
      const int r = i / Dim, c = i % Dim;
      if (r >= rows || c >= a.d) continue;
      const float* from = q + r * (Dim + kPad);
      const int64_t angles =
          (s.query + a.by_group.quotient(tile.first + r)) * static_cast<int64_t>(a.d);
      const auto entry = [from](int j) { return from[j]; };
      const float value =
          a.cos ? rotate_half(entry, a.cos + angles, a.sin + angles, c, a.d / 2, true) : from[c];
      d_q[a.row(s, tile.first + r, head, d_row) + c] = from_float<T>(value);
    }
  }
}

}  // namespace

void plain_grouped_attention_backward(const AttentionBackwardArgs& a, Device& device) {
  const AttentionLayout in = attention_layout(a.q, a.k, a.v, a.qkv);
  const AttentionLayout grad = attention_layout(a.d_q, a.d_k, a.d_v, a.d_qkv);
  if (!in.key_heads) return;
  const GroupedKeys keys(a.keys, a.cu_seqlens);
  const Scratch delta_memory = device.scratch(in.tokens * in.heads * sizeof(float));
  float* delta = delta_memory.as<float>();
  const float* lse = a.lse.as<const float>();
  with_float_type(in.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const T* d_out = a.d_out.as<const T>();
    if (in.tokens) attention_delta(d_out, a.out.as<const T>(), delta, in, device);
    const AttentionOnDevice<T> rotated(in, a.cos, a.sin, a.scale, device);
    GroupedOnDevice<T> call(rotated.problem(), in, keys, device);
    with_tile_width(in.head_dim, [&](auto dim) {
      constexpr int Dim = decltype(dim)::value, Owned = kOwned<Dim>;
      const size_t inputs = 2 * tile_bytes(Owned, Dim) + 2 * tile_bytes(kStep, Dim);
      call.run(grouped_attention_d_q_plain_kernel<T, Dim>, Owned, kThreads,
               inputs + tile_bytes(Owned, kStep), d_out, lse, static_cast<const float*>(delta),
               reinterpret_cast<T*>(grad.q), grad.row);
      call.with_key_tiles(in.key_tokens, Owned, [&](const GroupedProblem<T>& p, int64_t tiles) {
        const dim3 grid(static_cast<unsigned>(tiles),
                        static_cast<unsigned>(p.key_heads < 65535 ? p.key_heads : 65535));
        launch(grouped_attention_d_kv_plain_kernel<T, Dim>, grid, kThreads,
               inputs + 2 * tile_bytes(kStep, Owned), stream_of(device), p, d_out, lse,
               static_cast<const float*>(delta), reinterpret_cast<T*>(grad.k),
               reinterpret_cast<T*>(grad.v), grad.key_row);
      });
    });
  });
}

}  // namespace p2r::cuda
