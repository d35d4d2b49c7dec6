// Placeholder for the twin's header: what plain kernels need.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "ops/error.h"

#define SMEM_DYN(name) extern __shared__ __align__(1024) unsigned char name[]
#define SMEM_ARRAY(T, name, N) __shared__ T name[N]

namespace p2r::cuda {

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream,
            A&&... args) {
  if (smem > 48 * 1024) {
    const cudaError_t e = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem));
    if (e != cudaSuccess) throw Error(Code::cuda, cudaGetErrorString(e));
  }
  kernel<<<grid, block, smem, stream>>>(static_cast<P>(args)...);
  if (const cudaError_t e = cudaGetLastError(); e != cudaSuccess)
    throw Error(Code::cuda, cudaGetErrorString(e));
}

namespace ptx {
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
}  // namespace ptx

}  // namespace p2r::cuda
