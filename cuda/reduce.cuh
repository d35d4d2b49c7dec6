// Sums over a warp and over a block, always in the same order.
#pragma once
#include "cuda/launch.cuh"

namespace p2r::cuda {

// The sum over the warp, for every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// The sum over a block of `warps` warps, for every thread; `shared` holds a value for each warp.
template <int warps>
__device__ double block_sum(double x, double* shared) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < warps; ++i) total += shared[i];
  return total;
}

}  // namespace p2r::cuda
