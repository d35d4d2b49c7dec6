// Count, sum and largest value by group: match_any finds the lanes of one group, their
// leader updates the block's table in shared memory, the table is added to the global one.
#pragma once
#include "cuda/ptx.cuh"

namespace specimens {
using namespace p2r::cuda;

namespace segment_bug {
enum { none, plain_addition, barrier_in_ragged_loop, no_last_barrier };
}

template <int Bug>
__global__ void __launch_bounds__(128)
    segment_stats(const int* __restrict__ group, const float* __restrict__ x, int n, int groups,
                  unsigned* count, float* sum, int* largest) {
  constexpr int chunk = 1024, least = -2147483647;
  SMEM_DYN(bytes);
  float* sums = reinterpret_cast<float*>(bytes);
  unsigned* counts = reinterpret_cast<unsigned*>(sums + groups);
  int* maxima = reinterpret_cast<int*>(counts + groups);
  for (int g = threadIdx.x; g < groups; g += blockDim.x) {
    sums[g] = 0.f;
    counts[g] = 0;
    maxima[g] = least;
  }
  __syncthreads();
  const int base = blockIdx.x * chunk, lane = threadIdx.x & 31;
  for (int i = base + threadIdx.x; i < min(n, base + chunk); i += blockDim.x) {
    const int g = group[i];
    const unsigned peers = __match_any_sync(__activemask(), g);
    float total = 0.f;
    unsigned members = 0;
    int best = least;
    for (unsigned rest = peers; rest; rest &= rest - 1) {
      const float v = __shfl_sync(peers, x[i], __ffs(rest) - 1);
      total += v;
      ++members;
      best = max(best, __float2int_rd(v * 1000.f));
    }
    if (lane == __ffs(peers) - 1) {
      if (Bug == segment_bug::plain_addition) {
        sums[g] += total;
        counts[g] += members;
        maxima[g] = max(maxima[g], best);
      } else {
        atomicAdd(&sums[g], total);
        atomicAdd(&counts[g], members);
        atomicMax(&maxima[g], best);
      }
    }
    if (Bug == segment_bug::barrier_in_ragged_loop) __syncthreads();
  }
  if (Bug != segment_bug::no_last_barrier) __syncthreads();
  for (int g = threadIdx.x; g < groups; g += blockDim.x) {
    if (!counts[g]) continue;
    atomicAdd(&count[g], counts[g]);
    atomicAdd(&sum[g], sums[g]);
    atomicMax(&largest[g], maxima[g]);
  }
}

}  // namespace specimens
