// A function of each element: out[i] = f(in[i], ...).
//
// Such kernels are bound by memory, and one element a thread keeps too few bytes in flight to reach
// its rate. By Little's law an H200 needs 4.8 TB/s x some 600 ns = 2.9 MB in flight, 22 KB a
// multiprocessor; 2048 threads that load 2 bytes each are 4 KB. So a thread loads several vectors
// of 16 bytes before it computes with them: 64 KB a multiprocessor, also with registers for half of
// the threads.
#pragma once
#include <algorithm>

#include "cuda/vectors.cuh"

namespace p2r::cuda {

constexpr int kElementwiseBlock = 256;

// 16 bytes of the smallest of these types.
template <class... T>
constexpr int kVectorWidth = 16 / static_cast<int>(std::min({sizeof(T)...}));

template <class... T>
bool begin_at_16_bytes(const T*... arrays) {
  return ((reinterpret_cast<uintptr_t>(arrays) % 16 == 0) && ...);
}

constexpr int kVectorsInFlight = 2;

template <class T, int N>
struct LoadedVectors {
  Vector<T, N> at[kVectorsInFlight];

  __device__ __forceinline__ LoadedVectors(const T* x, int64_t first, int64_t stride,
                                           int64_t vectors) {
#pragma unroll
    for (int j = 0; j < kVectorsInFlight; ++j)
      if (first + j * stride < vectors) at[j] = Vector<T, N>::load(x + (first + j * stride) * N);
  }
};

template <int N, class Out, class F, class... In>
__global__ void __launch_bounds__(kElementwiseBlock)
    elementwise_kernel(int64_t n, Out* out, F f, const In*... in) {
  const int64_t vectors = n / N, stride = int64_t{gridDim.x} * kElementwiseBlock;
  const int64_t thread = int64_t{blockIdx.x} * kElementwiseBlock + threadIdx.x;
  for (int64_t first = thread; first < vectors; first += kVectorsInFlight * stride) {
    const auto compute = [&](const LoadedVectors<In, N>&... x) {
#pragma unroll
      for (int j = 0; j < kVectorsInFlight; ++j) {
        if (first + j * stride >= vectors) break;
        Vector<Out, N> result;
#pragma unroll
        for (int i = 0; i < N; ++i) result.v[i] = f(x.at[j].v[i]...);
        result.store(out + (first + j * stride) * N);
      }
    };
    // All loads come before the first store, which the compiler could not move them above: `out`
    // may be one of the inputs.
    compute(LoadedVectors<In, N>(in, first, stride, vectors)...);
  }
  const int64_t last = vectors * N + thread;
  if (last < n) out[last] = f(in[last]...);
}

// out may be one of `in`. Arrays that begin elsewhere than at a multiple of 16 bytes, as views can,
// are moved one element at a time.
template <class Out, class F, class... In>
void elementwise(Device& device, int64_t n, Out* out, F f, const In*... in) {
  if (!n) return;
  const auto run = [&](auto width) {
    constexpr int N = decltype(width)::value;
    launch(elementwise_kernel<N, Out, F, In...>,
           blocks_for(ceil_div(n, N * kVectorsInFlight), kElementwiseBlock), kElementwiseBlock, 0,
           stream_of(device), n, out, f, in...);
  };
  if (begin_at_16_bytes(out, in...))
    run(std::integral_constant<int, kVectorWidth<Out, In...>>());
  else
    run(std::integral_constant<int, 1>());
}

}  // namespace p2r::cuda
