// Layer normalisation. Forward and dX: a warp takes a row and reads it from memory once; the later
// passes over it hit L1. dWeight and dBias: cuda/row_slices.cuh.
#include "cuda/reduce.cuh"
#include "cuda/row_slices.cuh"
#include "ops/layer_norm.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256, kRows = kBlock / 32;

template <class T, class B>
__global__ void __launch_bounds__(kBlock)
    layer_norm_kernel(const T* x, const T* weight, const B* bias, T* out, float* stats,
                      int64_t rows, int64_t c, float eps) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float inv_c = c ? 1.0f / static_cast<float>(c) : 0.0f;
  for (int64_t r = int64_t{blockIdx.x} * kRows + threadIdx.x / 32; r < rows;
       r += int64_t{gridDim.x} * kRows) {
    const T* in = x + r * c;
    float sum = 0;
    for (int64_t i = lane; i < c; i += 32) sum += to_float(in[i]);
    const float estimate = warp_sum(sum) * inv_c;
    float sum_d = 0, sum_d_squared = 0;
    for (int64_t i = lane; i < c; i += 32) {
      const float d = to_float(in[i]) - estimate;
      sum_d += d;
      sum_d_squared += d * d;
    }
    const float correction = warp_sum(sum_d) * inv_c;
    const float mean = estimate + correction;
    const float variance = warp_sum(sum_d_squared) * inv_c - correction * correction;
    const float rstd = 1.0f / sqrtf((variance < 0 ? 0.0f : variance) + eps);
    for (int64_t i = lane; i < c; i += 32)
      out[r * c + i] =
          from_float<T>((to_float(in[i]) - mean) * rstd * to_float(weight[i]) + to_float(bias[i]));
    if (lane == 0) {
      stats[2 * r] = mean;
      stats[2 * r + 1] = rstd;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    layer_norm_d_x_kernel(const T* d_out, const T* x, const T* weight, const float* stats, T* d_x,
                          int64_t rows, int64_t c) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float inv_c = 1.0f / static_cast<float>(c);
  for (int64_t r = int64_t{blockIdx.x} * kRows + threadIdx.x / 32; r < rows;
       r += int64_t{gridDim.x} * kRows) {
    const T* in = x + r * c;
    const T* d = d_out + r * c;
    const float mean = stats[2 * r], rstd = stats[2 * r + 1];
    float sum_dnorm = 0, sum_dnorm_norm = 0;
    for (int64_t i = lane; i < c; i += 32) {
      const float dnorm = to_float(d[i]) * to_float(weight[i]);
      sum_dnorm += dnorm;
      sum_dnorm_norm += dnorm * ((to_float(in[i]) - mean) * rstd);
    }
    const float dnorm_mean = warp_sum(sum_dnorm) * inv_c,
                dnorm_norm_mean = warp_sum(sum_dnorm_norm) * inv_c;
    for (int64_t i = lane; i < c; i += 32) {
      const float norm = (to_float(in[i]) - mean) * rstd;
      d_x[r * c + i] = from_float<T>(
          rstd * (to_float(d[i]) * to_float(weight[i]) - dnorm_mean - norm * dnorm_norm_mean));
    }
  }
}

// dOut x̂ and dOut, of which dWeight and dBias are the sums.
template <class T>
struct LayerNormTerms {
  static constexpr int count = 2;
  const T *d_out, *x;
  const float* stats;
  int64_t c;

  __device__ __forceinline__ void add(int64_t r, int64_t column, float (&sums)[2]) const {
    const float d = to_float(d_out[r * c + column]);
    sums[0] += d * ((to_float(x[r * c + column]) - stats[2 * r]) * stats[2 * r + 1]);
    sums[1] += d;
  }
};

template <class T, class B>
void forward(const LayerNormArgs& a, Device& device) {
  const int64_t c = a.x.shape[-1], rows = a.stats.shape[0];
  launch(layer_norm_kernel<T, B>, blocks_for(rows, kRows), kBlock, 0, stream_of(device),
         a.x.as<const T>(), a.weight.as<const T>(), a.bias.as<const B>(), a.out.as<T>(),
         a.stats.as<float>(), rows, c, static_cast<float>(a.eps));
}

}  // namespace

void layer_norm(const LayerNormArgs& a, Device& device) {
  if (!a.stats.shape[0]) return;
  with_float_type(a.x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    if (a.bias.dtype == DType::f32)
      forward<T, float>(a, device);
    else
      forward<T, T>(a, device);
  });
}

void layer_norm_backward(const LayerNormBackwardArgs& a, Device& device) {
  const int64_t c = a.x.shape[-1], rows = a.stats.shape[0];
  if (!c) return;
  with_float_type(a.x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    if (rows)
      launch(layer_norm_d_x_kernel<T>, blocks_for(rows, kRows), kBlock, 0, stream_of(device),
             a.d_out.as<const T>(), a.x.as<const T>(), a.weight.as<const T>(),
             a.stats.as<const float>(), a.d_x.as<T>(), rows, c);
    row_gradients(
        LayerNormTerms<T>{a.d_out.as<const T>(), a.x.as<const T>(), a.stats.as<const float>(), c},
        rows, c, a.d_weight.as<float>(), a.d_bias.as<float>(), device);
  });
}

}  // namespace p2r::cuda
