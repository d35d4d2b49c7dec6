// y += 2 x by tiles of 64 columns: threads write a tile to shared memory, one of them has TMA add
// it to the tensor, and the buffer is used again for the block's next tile.
#pragma once
#include "cuda/tensor_map.cuh"

namespace specimens {
using namespace p2r::cuda;

namespace scale_bug {
enum { none, no_proxy_fence, fenced_before_writing, not_waited_before_reuse, not_waited_at_end };
}

template <int Bug>
__global__ void __launch_bounds__(64)
    scale_tiles(const float* __restrict__ x, const __grid_constant__ TensorMap y, int rows,
                int cols) {
  SMEM_DYN(bytes);
  float* tile = reinterpret_cast<float*>(bytes);
  const uint32_t address = ptx::smem_u32(bytes);
  const int tid = threadIdx.x, row0 = blockIdx.x * 8;
  for (int col0 = 0; col0 < cols; col0 += 64) {
    if (tid == 0 && Bug != scale_bug::not_waited_before_reuse) ptx::tma_wait_read<0>();
    __syncthreads();
    if (Bug == scale_bug::fenced_before_writing) ptx::fence_proxy_async();
    for (int i = tid; i < 8 * 64; i += 64) {
      const int row = row0 + i / 64, col = col0 + i % 64;
      tile[i] = row < rows && col < cols ? 2.f * x[int64_t(row) * cols + col] : 0.f;
    }
    if (Bug != scale_bug::no_proxy_fence && Bug != scale_bug::fenced_before_writing)
      ptx::fence_proxy_async();
    __syncthreads();
    if (tid == 0) {
      ptx::tma_reduce_add(y, address, {col0, row0});
      ptx::tma_commit();
    }
  }
  if (tid == 0 && Bug != scale_bug::not_waited_at_end) ptx::tma_wait_read<0>();
}

}  // namespace specimens
