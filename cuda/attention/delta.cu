// delta = rowsum(dOut * out), before every backward pass: 16 bytes a lane, bound by memory.
#include "cuda/attention/attention.cuh"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256;

// Lanes that share a row, of up to 128 entries, at 16 bytes each.
template <class T>
constexpr int kLanes = 8 * sizeof(T);

template <class T>
__global__ void __launch_bounds__(kBlock)
    attention_delta_kernel(const T* d_out, const T* out, float* delta, int64_t tokens, int heads,
                           int d) {
  constexpr int kEntries = 16 / sizeof(T);
  const int c = threadIdx.x % kLanes<T> * kEntries;
  const int64_t rows = tokens * heads, step = int64_t{gridDim.x} * (kBlock / kLanes<T>);
  // All lanes of a warp stay in the loop while one of them has a row: they shuffle.
  for (int64_t row = (blockIdx.x * int64_t{kBlock} + threadIdx.x) / kLanes<T>;
       row - threadIdx.x % 32 / kLanes<T> < rows; row += step) {
    float sum = 0;
    if (row < rows && c < d) {
      const uint4 x = *reinterpret_cast<const uint4*>(d_out + row * d + c);
      const uint4 y = *reinterpret_cast<const uint4*>(out + row * d + c);
      T a[kEntries], b[kEntries];
      memcpy(static_cast<void*>(a), &x, 16);
      memcpy(static_cast<void*>(b), &y, 16);
#pragma unroll
      for (int i = 0; i < kEntries; ++i) sum += to_float(a[i]) * to_float(b[i]);
    }
#pragma unroll
    for (int lanes = kLanes<T> / 2; lanes > 0; lanes /= 2)
      sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lanes);
    if (c == 0 && row < rows) delta[row % heads * tokens + row / heads] = sum;
  }
}

}  // namespace

template <class T>
void attention_delta(const T* d_out, const T* out, float* delta, const AttentionLayout& in,
                     Device& device) {
  const int64_t rows = in.tokens * in.heads;
  if (!rows) return;
  launch(attention_delta_kernel<T>, blocks_for(rows * kLanes<T>, kBlock), kBlock, 0,
         stream_of(device), d_out, out, delta, in.tokens, static_cast<int>(in.heads),
         static_cast<int>(in.head_dim));
}
template void attention_delta(const float*, const float*, float*, const AttentionLayout&, Device&);
template void attention_delta(const __half*, const __half*, float*, const AttentionLayout&,
                              Device&);
template void attention_delta(const __nv_bfloat16*, const __nv_bfloat16*, float*,
                              const AttentionLayout&, Device&);

}  // namespace p2r::cuda
