// Layer normalisation. Forward and dX: a warp takes a row and reads it from memory once; the later
// passes over it hit L1. dWeight and dBias: a block sums 32 columns over one slice of the rows
// (ops/layer_norm.h); a second kernel adds the slices in order, in f64.
#include "cuda/reduce.cuh"
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

// partials: [slices, 2, c]. Blocks (columns / 32, slices) of 32 x 8 threads.
template <class T>
__global__ void __launch_bounds__(kBlock)
    layer_norm_slices_kernel(const T* d_out, const T* x, const float* stats, float* partials,
                             int64_t rows, int64_t c, int64_t slice) {
  SMEM_ARRAY(float, sums, 2 * kBlock);
  const int lane = static_cast<int>(threadIdx.x) % 32, group = static_cast<int>(threadIdx.x) / 32;
  const int64_t column = int64_t{blockIdx.x} * 32 + lane;
  const int64_t first = int64_t{blockIdx.y} * slice;
  const int64_t last = first + slice < rows ? first + slice : rows;
  float d_weight = 0, d_bias = 0;
  if (column < c)
    for (int64_t r = first + group; r < last; r += kRows) {
      const float d = to_float(d_out[r * c + column]);
      d_weight += d * ((to_float(x[r * c + column]) - stats[2 * r]) * stats[2 * r + 1]);
      d_bias += d;
    }
  sums[threadIdx.x] = d_weight;
  sums[kBlock + threadIdx.x] = d_bias;
  __syncthreads();
  if (group < 2 && column < c) {
    float sum = 0;
    for (int i = 0; i < kRows; ++i) sum += sums[group * kBlock + i * 32 + lane];
    partials[(int64_t{blockIdx.y} * 2 + group) * c + column] = sum;
  }
}

__global__ void __launch_bounds__(kBlock)
    layer_norm_columns_kernel(const float* partials, float* d_weight, float* d_bias, int64_t slices,
                              int64_t c) {
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (i >= 2 * c) return;
  double sum = 0;
  for (int64_t s = 0; s < slices; ++s) sum += static_cast<double>(partials[s * 2 * c + i]);
  (i < c ? d_weight[i] : d_bias[i - c]) = static_cast<float>(sum);
}

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
  const int64_t slice = layer_norm_slice(rows), slices = ceil_div(rows, slice);
  const Scratch scratch = device.scratch(static_cast<size_t>(slices * 2 * c) * sizeof(float));
  float* partials = scratch.as<float>();
  const cudaStream_t stream = stream_of(device);
  if (rows)
    with_float_type(a.x.dtype, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      launch(layer_norm_d_x_kernel<T>, blocks_for(rows, kRows), kBlock, 0, stream,
             a.d_out.as<const T>(), a.x.as<const T>(), a.weight.as<const T>(),
             a.stats.as<const float>(), a.d_x.as<T>(), rows, c);
      // Slices are blockIdx.y, at most 65 535 a launch.
      constexpr int64_t kMaxSlices = 65535;
      for (int64_t s = 0; s < slices; s += kMaxSlices) {
        const int64_t n = slices - s < kMaxSlices ? slices - s : kMaxSlices, first = s * slice;
        launch(layer_norm_slices_kernel<T>,
               dim3(static_cast<unsigned>(ceil_div(c, 32)), static_cast<unsigned>(n)), kBlock, 0,
               stream, a.d_out.as<const T>() + first * c, a.x.as<const T>() + first * c,
               a.stats.as<const float>() + 2 * first, partials + s * 2 * c, rows - first, c, slice);
      }
    });
  launch(layer_norm_columns_kernel, static_cast<unsigned>(ceil_div(2 * c, kBlock)), kBlock, 0,
         stream, partials, a.d_weight.as<float>(), a.d_bias.as<float>(), slices, c);
}

}  // namespace p2r::cuda
