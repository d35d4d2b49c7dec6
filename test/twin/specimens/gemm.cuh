// C[M][N] = A[M][K] B in the style of sm_90: a producer warp fills a ring of TMA stages, a
// warpgroup multiplies by wgmma. B is [N][K], or [K][N] (NMajor).
#pragma once
#include "cuda/tensor_map.cuh"

namespace specimens {
using namespace p2r::cuda;

namespace gemm_bug {
enum {
  none,
  released_too_early,
  expects_half,
  wrong_stride,
  full_not_waited,
  wrong_first_parity,
  never_fenced,
  clears_unfenced,
  reads_before_wait,
  barrier_overwritten
};
}

constexpr int gemm_stages = 3, gemm_tile_bytes = 64 * 64 * 2;
constexpr size_t gemm_smem = 2 * gemm_stages * gemm_tile_bytes;

template <bool NMajor, int Bug>
__global__ void __launch_bounds__(160)
    gemm(const __grid_constant__ TensorMap ta, const __grid_constant__ TensorMap tb,
         float* __restrict__ c, int m, int n, int k) {
  SMEM_DYN(bytes);
  SMEM_ARRAY(uint64_t, bars, 2 * gemm_stages);
  const uint32_t sa = ptx::smem_u32(bytes), sb = sa + gemm_stages * gemm_tile_bytes;
  const uint32_t full = ptx::smem_u32(bars), empty = full + 8 * gemm_stages;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int m0 = blockIdx.y * 64, n0 = blockIdx.x * 64, steps = (k + 63) / 64;
  if (tid == 0) {
    for (int i = 0; i < gemm_stages; ++i) {
      ptx::mbar_init(full + 8 * i, 1);
      ptx::mbar_init(empty + 8 * i, 4);
    }
    ptx::mbar_fence_init();
    if (Bug == gemm_bug::barrier_overwritten) bars[1] = 0;
  }
  __syncthreads();

  if (warp == 4) {
    if (lane != 0) return;
    for (int t = 0; t < steps; ++t) {
      const int stage = t % gemm_stages, parity = t / gemm_stages & 1;
      const uint32_t bar = full + 8 * stage;
      ptx::mbar_wait(empty + 8 * stage, Bug == gemm_bug::wrong_first_parity ? parity : parity ^ 1);
      ptx::mbar_arrive_expect_tx(
          bar, Bug == gemm_bug::expects_half ? gemm_tile_bytes : 2 * gemm_tile_bytes);
      ptx::tma_load(sa + stage * gemm_tile_bytes, ta, bar, {t * 64, m0});
      if (NMajor)
        ptx::tma_load(sb + stage * gemm_tile_bytes, tb, bar, {n0, t * 64});
      else
        ptx::tma_load(sb + stage * gemm_tile_bytes, tb, bar, {t * 64, n0});
    }
    return;
  }

  float acc[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) acc[i] = 0.f;
  constexpr int stride = Bug == gemm_bug::wrong_stride ? 512 : 1024;
  for (int t = 0; t < steps; ++t) {
    const int stage = t % gemm_stages, parity = t / gemm_stages & 1;
    if (Bug != gemm_bug::full_not_waited) ptx::mbar_wait(full + 8 * stage, parity);
    if (Bug == gemm_bug::clears_unfenced && t == 1) acc[1] *= 2.f;
    ptx::wgmma_keep(acc);
    if (Bug != gemm_bug::never_fenced && !(Bug == gemm_bug::clears_unfenced && t == 1))
      ptx::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      const uint32_t a = sa + stage * gemm_tile_bytes + kk * 32;
      const uint32_t b = sb + stage * gemm_tile_bytes + (NMajor ? kk * 2048 : kk * 32);
      ptx::wgmma_ss<__nv_bfloat16, 64, false, NMajor>(
          acc, ptx::matrix_desc(a, 0, stride, Swizzle::b128),
          ptx::matrix_desc(b, 0, 1024, Swizzle::b128), true);
    }
    ptx::wgmma_commit();
    if (Bug == gemm_bug::released_too_early) {
      if (lane == 0) ptx::mbar_arrive(empty + 8 * stage);
      ptx::wgmma_wait<0>();
    } else if (Bug == gemm_bug::clears_unfenced) {
      ptx::wgmma_wait<0>();
      if (lane == 0) ptx::mbar_arrive(empty + 8 * stage);
    } else {
      // The previous step's wgmmas are done, so its stage can be filled again.
      ptx::wgmma_wait<1>();
      if (t && lane == 0) ptx::mbar_arrive(empty + 8 * ((t - 1) % gemm_stages));
    }
  }
  const float early = acc[0];
  ptx::wgmma_wait<0>();
  ptx::wgmma_keep(acc);
  if (Bug == gemm_bug::reads_before_wait) acc[0] = early;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int row = m0 + warp * 16 + (lane >> 2) + (i >> 1 & 1) * 8;
    const int col = n0 + (i >> 2) * 8 + (lane & 3) * 2 + (i & 1);
    if (row < m && col < n) c[int64_t(row) * n + col] = acc[i];
  }
}

}  // namespace specimens
