// Row-wise log-sum-exp of bf16 logits: one block a row, 16-byte loads between an unaligned head and
// tail, an online (max, sum) pair merged by shuffles and then through shared memory.
#pragma once
#include "cuda/ptx.cuh"

namespace specimens {
using namespace p2r::cuda;

namespace lse_bug {
enum {
  none,
  no_barrier,
  writes_past_array,
  other_barrier,
  half_warp_shuffles,
  one_vector_too_many
};
}

struct MaxSum {
  float max, sum;
};

__device__ __forceinline__ MaxSum merge(MaxSum a, MaxSum b) {
  constexpr float log2e = 1.44269504f;
  const float m = fmaxf(a.max, b.max);
  if (m == -INFINITY) return {m, 0.f};
  return {m, a.sum * ptx::ex2((a.max - m) * log2e) + b.sum * ptx::ex2((b.max - m) * log2e)};
}

__device__ __forceinline__ MaxSum merge_warp(MaxSum a) {
#pragma unroll
  for (int lanes = 16; lanes; lanes >>= 1) {
    const MaxSum b{__shfl_xor_sync(~0u, a.max, lanes), __shfl_xor_sync(~0u, a.sum, lanes)};
    a = merge(a, b);
  }
  return a;
}

template <int Threads, int Bug>
__global__ void __launch_bounds__(Threads)
    log_sum_exp(const __nv_bfloat16* __restrict__ x, float* __restrict__ out, int n,
                int64_t pitch) {
  SMEM_ARRAY(MaxSum, parts, Threads / 32);
  const __nv_bfloat16* row = x + int64_t(blockIdx.x) * pitch;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int head = min(n, int((16 - uintptr_t(row) % 16) % 16 / 2));
  const int vectors = (n - head) / 8, tail = head + vectors * 8;
  MaxSum mine{-INFINITY, 0.f};
  if (tid < head) mine = merge(mine, {__bfloat162float(row[tid]), 1.f});
  for (int i = tid; i < vectors + (Bug == lse_bug::one_vector_too_many); i += Threads) {
    const uint4 v = *reinterpret_cast<const uint4*>(row + head + i * 8);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      mine = merge(mine, {__uint_as_float(words[j] << 16), 1.f});
      mine = merge(mine, {__uint_as_float(words[j] & 0xFFFF0000u), 1.f});
    }
  }
  if (tail + tid < n) mine = merge(mine, {__bfloat162float(row[tail + tid]), 1.f});
  if (Bug != lse_bug::half_warp_shuffles || lane < 16) mine = merge_warp(mine);
  if (lane == 0) parts[warp + (Bug == lse_bug::writes_past_array)] = mine;
  if (Bug == lse_bug::other_barrier && warp == 1)
    ptx::bar_sync(1, Threads);
  else if (Bug != lse_bug::no_barrier)
    __syncthreads();
  if (warp == 0) {
    const MaxSum all = merge_warp(lane < Threads / 32 ? parts[lane] : MaxSum{-INFINITY, 0.f});
    if (lane == 0) out[blockIdx.x] = all.max + ptx::lg2(all.sum) * 0.69314718f;
  }
}

}  // namespace specimens
