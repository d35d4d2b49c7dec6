// Gradient clipping and AdamW. Clipping takes three steps: a block sums the squares of kNormBlock
// elements in f64; one block adds those sums in a fixed order and stores the factor; every gradient
// is scaled by it. Memory-bound, one launch a tensor.
#include "cuda/launch.cuh"
#include "cuda/workspace.h"
#include "ops/optimizer.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256;

// The sum over the block by a tree in shared memory, for every thread.
__device__ __forceinline__ double block_sum(double v, double (&shared)[kBlock]) {
  shared[threadIdx.x] = v;
  __syncthreads();
  for (int half = kBlock / 2; half; half >>= 1) {
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  return shared[0];
}

template <class T>
__global__ void __launch_bounds__(kBlock) sum_squares_kernel(const T* x, double* sums, int64_t n) {
  SMEM_ARRAY(double, shared, kBlock);
  const int64_t first = int64_t{blockIdx.x} * kNormBlock;
  const int64_t last = first + kNormBlock < n ? first + kNormBlock : n;
  double sum = 0;
  for (int64_t i = first + threadIdx.x; i < last; i += kBlock) {
    const double value = to_float(x[i]);
    sum += value * value;
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kBlock)
    norm_kernel(const double* sums, int64_t n, double max_norm, float* norm, float* factor) {
  SMEM_ARRAY(double, shared, kBlock);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kBlock) sum += sums[i];
  sum = sqrt(block_sum(sum, shared));
  if (threadIdx.x == 0) {
    *norm = static_cast<float>(sum);
    *factor = static_cast<float>(clip_factor(max_norm, sum));
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock) scale_kernel(T* x, const float* factor, int64_t n) {
  const float f = *factor;
  if (f == 1) return;
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kBlock)
    x[i] = from_float<T>(to_float(x[i]) * f);
}

template <class P, class G>
__global__ void __launch_bounds__(kBlock)
    adam_w_kernel(P* params, const G* grads, float* moments, int64_t n, AdamStep k) {
  for (int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kBlock) {
    const float p = to_float(params[i]), g = to_float(grads[i]);
    float m = moments[i], v = moments[n + i];
    m += (g - m) * k.one_minus_beta1;
    v = v * k.beta2 + g * g * k.one_minus_beta2;
    moments[i] = m;
    moments[n + i] = v;
    params[i] = from_float<P>(p * k.keep - k.rate * m / (sqrtf(v) * k.root + k.eps));
  }
}

template <class P, class G>
void step(const View& p, const View& g, const View& moments, const AdamStep& k, Device& device) {
  launch(adam_w_kernel<P, G>, blocks_for(p.size(), kBlock), kBlock, 0, stream_of(device), p.as<P>(),
         g.as<const G>(), moments.as<float>(), p.size(), k);
}

}  // namespace

void clip_grad_norm(const ClipGradNormArgs& a, Device& device) {
  int64_t blocks = 0;
  for (const View& g : a.grads) blocks += ceil_div(g.size(), kNormBlock);
  double* sums = nullptr;
  float* factor = nullptr;
  const ScratchWorkspace scratch(device, [&](Workspace& workspace) {
    sums = workspace.take<double>(blocks);
    factor = workspace.take<float>(1);
  });
  const cudaStream_t stream = stream_of(device);
  int64_t first = 0;
  for (const View& g : a.grads) {
    const int64_t n = ceil_div(g.size(), kNormBlock);
    if (!n) continue;
    with_float_type(g.dtype, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      launch(sum_squares_kernel<T>, static_cast<unsigned>(n), kBlock, 0, stream, g.as<const T>(),
             sums + first, g.size());
    });
    first += n;
  }
  launch(norm_kernel, 1, kBlock, 0, stream, sums, blocks, a.max_norm, a.norm.as<float>(), factor);
  for (const View& g : a.grads) {
    if (!g.size()) continue;
    with_float_type(g.dtype, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      launch(scale_kernel<T>, blocks_for(g.size(), kBlock), kBlock, 0, stream, g.as<T>(), factor,
             g.size());
    });
  }
}

void adam_w(const AdamWArgs& a, Device& device) {
  const AdamStep k = adam_step(a);
  for (size_t i = 0; i < a.params.size(); ++i) {
    const View &p = a.params[i], &g = a.grads[i], &moments = a.moments[i];
    if (!p.size()) continue;
    with_float_type(p.dtype, [&](auto* t) {
      using P = std::remove_pointer_t<decltype(t)>;
      if (g.dtype == DType::f32)
        step<P, float>(p, g, moments, k, device);
      else
        step<P, P>(p, g, moments, k, device);
    });
  }
}

}  // namespace p2r::cuda
