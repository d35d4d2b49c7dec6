// The tile of dS^T in the one-pass backward (cuda/attention/wgmma_one_pass.cu): how threads store
// it to shared memory, and the product that reads it there.
#pragma once
#include "cuda/attention/wgmma_backward.cuh"

namespace p2r::cuda::attention_wgmma {

// Zeros the rows of packed dS^T from `inside` on, of a warpgroup's 64.
template <int N>
__device__ __forceinline__ void zero_rows(uint32_t (&ds)[N / 16][4], int inside) {
  const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h)
    if (row + 8 * h >= inside) {
#pragma unroll
      for (int k = 0; k < N / 16; ++k) ds[k][h] = ds[k][h + 2] = 0;
    }
}

// Stores packed rows of dS^T to shared memory: panels of 64 queries under the 128-byte swizzle.
template <int N>
__device__ __forceinline__ void store_ds(unsigned char* ds_tile, const uint32_t (&ds)[N / 16][4]) {
  const int lane = threadIdx.x % 32;
  unsigned char* row = ds_tile + (threadIdx.x / 32 * 16 + lane / 4) * 128 + 4 * (lane % 4);
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int chunk = 2 * (k % 4) + r / 2;
      *reinterpret_cast<uint32_t*>(row + k / 4 * kOwned * 128 + r % 2 * 8 * 128 +
                                   (chunk ^ lane / 4) * 16) = ds[k][r];
    }
}

// dq = dS K for the 64 queries of a panel of dS^T and Width columns of the owned K, both MN-major.
template <class T, int D, int Width>
__device__ __forceinline__ void gemm_dq(float (&dq)[Width / 2], uint32_t ds_tile, uint32_t keys) {
  using P = Panels<D>;
#pragma unroll
  for (int k = 0; k < kOwned / 16; ++k)
    ptx::wgmma_ss<T, Width, true, true>(
        dq, ptx::matrix_desc(ds_tile + 2 * k * 1024, 0, 1024, Swizzle::b128),
        ptx::matrix_desc(keys + 2 * k * P::group_bytes, kOwned * P::row_bytes, P::group_bytes,
                         P::swizzle),
        k > 0);
}

}  // namespace p2r::cuda::attention_wgmma
