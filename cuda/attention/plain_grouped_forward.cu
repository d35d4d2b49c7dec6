// Attention of rows (grouped.cuh), forward, "plain" (plain.cuh): a block owns 64 rows of one
// sequence and key head, 64 / group queries, and loops over the keys that the last of them sees, 64
// at a time, as attention_plain_kernel does. Rows that do not see all keys of a step multiply only
// those that they see, whatever is in the others.
//
// f32 on the CUDA cores: for prefill, some 30 TFLOP/s of an H200's 67, so 4096 causal tokens of 16
// heads of 128 (69 GFLOP of useful work, and 3 % more in the diagonal's tiles) take 2.4 ms; for
// decoding, one block a key head reads 1500 keys and values of 128 f16 (6.1 MB for 8 heads) by
// loads of single elements: 24 steps of some 6 us, 0.15 ms.
//
// On sm_80 some 90 bytes of a thread's registers go to local memory: addresses of rows, which pages
// and shared ranges make long, and which a step reads once from L1. f16 and bf16 have the tensor
// cores' kernels.
//
// ptxas: grouped_attention_plain_kernel spills
#include "cuda/attention/grouped.cuh"
#include "cuda/attention/plain.cuh"

namespace p2r::cuda {

namespace {

constexpr int kTile = 64, kRows = kTile / kSide;

template <class T, int Dim>
__global__ void __launch_bounds__(kThreads)
    grouped_attention_plain_kernel(GroupedProblem<T> a, T* out, float* lse) {
  SMEM_DYN(memory);
  float* q = reinterpret_cast<float*>(memory);
  float* kv = q + kTile * (Dim + kPad);
  float* p = kv + kTile * (Dim + kPad);
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
  const GroupedTile tile = a.tiles[blockIdx.x];
  const GroupedSequence s = a.sequences[tile.sequence];
  const int rows = s.queries * a.group - tile.first;  // from the tile's first to the last
  const int64_t out_row = static_cast<int64_t>(a.heads) * a.d;
  int visible[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int r = y * kRows + i;
    visible[i] = r < rows ? a.visible(s, tile.first + r) : 0;
  }
  const int last = (rows < kTile ? rows : kTile) - 1;
  const int keys = a.visible(s, tile.first + last);

  for (int head = blockIdx.y; head < a.key_heads; head += gridDim.y) {
    const int64_t column = head * a.key_head;
    __syncthreads();  // the previous head's q is no longer read
    load_rows<kTile, Dim>(q, rows, a.d,
                          [&](int r) { return a.q + a.row(s, tile.first + r, head, a.q_row); });
    float o[kRows][Dim / kSide] = {}, row_max[kRows], row_sum[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      row_max[i] = -INFINITY;
      row_sum[i] = 0;
    }

    for (int key = 0; key < keys; key += kTile) {
      load_rows<kTile, Dim>(kv, keys - key, a.d,
                            [&](int r) { return a.k + a.key(s, key + r, a.k_row) + column; });
      __syncthreads();
      float logits[kRows][kRows];
      gemm_nt<Dim>(logits, q, kv, a.d);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float new_max = row_max[i];
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          logits[i][j] *= a.scale;
          if (key + x + j * kSide < visible[i]) new_max = fmaxf(new_max, logits[i][j]);
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
          const float prob = key + at < visible[i] ? expf(logits[i][j] - max_finite) : 0.0f;
          p[(y * kRows + i) * (kTile + kPad) + at] = prob;
          total += prob;
        }
        row_sum[i] = row_sum[i] * rescale + total;
#pragma unroll
        for (int j = 0; j < Dim / kSide; ++j) o[i][j] *= rescale;
      }
      __syncthreads();  // P is complete, and K is no longer read
      load_rows<kTile, Dim>(kv, keys - key, a.d,
                            [&](int r) { return a.v + a.key(s, key + r, a.v_row) + column; });
      __syncthreads();
      if (key + kTile <= visible[0]) {  // of the thread's rows the first sees least
        gemm_nn<kTile, Dim>(o, p, kv, kTile);
      } else {
        for (int k = 0; k < kTile; ++k)
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            if (key + k >= visible[i]) continue;
            const float weight = p[(y * kRows + i) * (kTile + kPad) + k];
#pragma unroll
            for (int j = 0; j < Dim / kSide; ++j)
              o[i][j] += weight * kv[k * (Dim + kPad) + x + j * kSide];
          }
      }
      __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float total = row_sum[i];
#pragma unroll
      for (int step = kSide / 2; step > 0; step /= 2)
        total += __shfl_xor_sync(0xFFFFFFFFu, total, step);
      const int r = y * kRows + i;
      if (r >= rows) continue;
      if (x == 0) lse[a.log(s, tile.first + r, head)] = row_max[i] + logf(total);
      const float divisor = visible[i] ? total : 1.0f;
      T* to = out + a.row(s, tile.first + r, head, out_row);
#pragma unroll
      for (int j = 0; j < Dim / kSide; ++j) {
        const int c = x + j * kSide;
        if (c < a.d) to[c] = from_float<T>(o[i][j] / divisor);
      }
    }
  }
}

template <class T>
void run_forward(GroupedOnDevice<T>& call, const Out& out, const Out& lse) {
  with_tile_width(call.problem().d, [&](auto dim) {
    constexpr int Dim = decltype(dim)::value;
    call.run(grouped_attention_plain_kernel<T, Dim>, kTile, kThreads,
             2 * tile_bytes(kTile, Dim) + tile_bytes(kTile, kTile), out.as<T>(), lse.as<float>());
  });
}

}  // namespace

void plain_grouped_attention(const AttentionArgs& a, Device& device) {
  const AttentionLayout in = attention_layout(a.q, a.k, a.v, a.qkv);
  const GroupedKeys keys(a.keys, a.cu_seqlens);
  with_float_type(in.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const AttentionOnDevice<T> rotated(in, a.cos, a.sin, a.scale, device);
    GroupedOnDevice<T> call(rotated.problem(), in, keys, device);
    run_forward(call, a.out, a.lse);
  });
}

void plain_cached_attention(const CachedAttentionArgs& a, Device& device) {
  const GroupedKeys keys(a);
  with_float_type(a.q.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    GroupedOnDevice<T> call(a, keys, device);
    run_forward(call, a.out, a.lse);
  });
}

}  // namespace p2r::cuda
