// Attention, forward, and the mass of each key.
//
// Forward: a block owns 64 queries of one sequence and head and walks over the keys, 64 at a time,
// with K and then V in the same shared memory. Each row's running maximum and sum are kept by the
// 16 threads that share the row; rows of P pass through shared memory to the product with V. Mass:
// a block owns 64 keys and walks over the queries.
#include "cuda/attention/attention.cuh"
#include "ops/kernel_choice.h"

namespace p2r::cuda {

namespace {

constexpr int kTile = 64, kRows = kTile / kSide;

template <class T, int Dim>
__global__ void __launch_bounds__(kThreads)
    attention_kernel(AttentionProblem<T> a, T* out, float* lse) {
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
    __syncthreads();  // the last head's q is done with
    load_tile<kTile, Dim>(q, a.q + tile.begin * a.qk_row + column, a.qk_row, tile.first,
                          tile.length, a.d);
    float o[kRows][Dim / kSide] = {}, top[kRows], sum[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      top[i] = -INFINITY;
      sum[i] = 0;
    }

    for (int key = 0; key < tile.length; key += kTile) {
      load_tile<kTile, Dim>(kv, k_head, a.qk_row, key, tile.length, a.d);
      __syncthreads();
      float s[kRows][kRows];
      dot_rows<Dim>(s, q, kv, a.d);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float most = top[i];
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          s[i][j] *= a.scale;
          if (key + x + j * kSide < tile.length) most = fmaxf(most, s[i][j]);
        }
#pragma unroll
        for (int step = kSide / 2; step > 0; step /= 2)
          most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, step));
        // Where every logit so far is -inf, all weights are 0, not exp(-inf + inf).
        const float shift = most == -INFINITY ? 0.0f : most;
        const float decay = expf(top[i] - shift);
        top[i] = most;
        float total = 0;
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          const int at = x + j * kSide;
          const float weight = key + at < tile.length ? expf(s[i][j] - shift) : 0.0f;
          p[(y * kRows + i) * (kTile + kPad) + at] = weight;
          total += weight;
        }
        sum[i] = sum[i] * decay + total;
#pragma unroll
        for (int j = 0; j < Dim / kSide; ++j) o[i][j] *= decay;
      }
      __syncthreads();  // P is there, and K is done with
      load_tile<kTile, Dim>(kv, v_head, a.v_row, key, tile.length, a.d);
      __syncthreads();
      const int left = tile.length - key;
      add_weighted<kTile, Dim>(o, p, kv, left < kTile ? left : kTile);
      __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float total = sum[i];
#pragma unroll
      for (int step = kSide / 2; step > 0; step /= 2)
        total += __shfl_xor_sync(0xFFFFFFFFu, total, step);
      const int row = tile.first + y * kRows + i;
      if (row >= tile.length) continue;
      const int64_t token = static_cast<int64_t>(tile.begin) + row;
      if (x == 0) lse[head * a.tokens + token] = top[i] + logf(total);
#pragma unroll
      for (int j = 0; j < Dim / kSide; ++j) {
        const int c = x + j * kSide;
        if (c < a.d) out[token * out_row + column + c] = from_float<T>(o[i][j] / total);
      }
    }
  }
}

template <int Dim>
__global__ void __launch_bounds__(kThreads)
    attention_mass_kernel(AttentionProblem<float> a, const float* lse, float* mass) {
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
    float total[kRows] = {};
    for (int query = 0; query < tile.length; query += kTile) {
      load_tile<kTile, Dim>(q, a.q + tile.begin * a.qk_row + column, a.qk_row, query, tile.length,
                            a.d);
      __syncthreads();
      float s[kRows][kRows];
      dot_rows<Dim>(s, q, k, a.d);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = query + y * kRows + i;
        if (row < tile.length) {
          const float shift = lse_head[row];
#pragma unroll
          for (int j = 0; j < kRows; ++j) total[j] += expf(s[i][j] * a.scale - shift);
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) partial[y * kTile + x + j * kSide] = total[j];
    __syncthreads();
    const int key = tile.first + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kTile && key < tile.length) {
      float all = 0;
      for (int i = 0; i < kSide; ++i) all += partial[i * kTile + threadIdx.x];
      mass[head * a.tokens + tile.begin + key] = all;
    }
  }
}

}  // namespace

void plain_attention(const AttentionArgs& a, Device& device) {
  const AttentionLayout in = attention_layout(a.q, a.k, a.v, a.qkv);
  with_float_type(in.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    AttentionOnDevice<T> call(in, a.cos, a.sin, a.scale, device);
    with_head_dim(in.head_dim, [&](auto dim) {
      constexpr int Dim = decltype(dim)::value;
      call.run(attention_kernel<T, Dim>, a.cu_seqlens, kTile,
               2 * tile_bytes(kTile, Dim) + tile_bytes(kTile, kTile), a.out.as<T>(),
               a.lse.as<float>());
    });
  });
}

namespace {

struct Named {
  const char* name;
  void (*forward)(const AttentionArgs&, Device&);
  void (*backward)(const AttentionBackwardArgs&, Device&);
};

// What stands behind the names in ops/kernel_choice.cpp.
constexpr Named kNamed[] = {
    {"wgmma", wgmma_attention, wgmma_attention_backward},
    {"mma", mma_attention, mma_attention_backward},
    {"plain", plain_attention, plain_attention_backward},
};

const Named& named(int64_t kernel, Device& device) {
  const std::string name = kernel_choices("attention", device.info()).at(kernel).name;
  for (const Named& n : kNamed)
    if (name == n.name) return n;
  throw Error(Code::value, "there is no kernel '" + name + "'");
}

}  // namespace

void attention(const AttentionArgs& a, Device& device) {
  named(a.kernel, device).forward(a, device);
}

void attention_backward(const AttentionBackwardArgs& a, Device& device) {
  named(a.kernel, device).backward(a, device);
}

void attention_mass(const AttentionMassArgs& a, Device& device) {
  const AttentionLayout in = attention_layout(a.q, a.k, View(), a.qkv);
  if (in.dtype != DType::f32) return mma_attention_mass(a, device);
  AttentionOnDevice<float> call(in, a.cos, a.sin, a.scale, device);
  with_head_dim(in.head_dim, [&](auto dim) {
    constexpr int Dim = decltype(dim)::value;
    call.run(attention_mass_kernel<Dim>, a.cu_seqlens, kTile, 2 * tile_bytes(kTile, Dim),
             a.lse.as<const float>(), a.mass.as<float>());
  });
}

}  // namespace p2r::cuda
