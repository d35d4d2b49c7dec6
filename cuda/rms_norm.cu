// Root mean square normalisation, forward and backward. Bound by memory: forward reads x (and the
// residual) and writes out (and the sum) once. A thread holds vectors of 16 bytes; the second pass
// over a row hits L1, where a row of 16 KB stays. A warp takes a row of up to kWarpRow elements
// (queries and keys have rows of 128), else the whole block takes one: in decoding there are few
// rows, and 256 threads read one of 4096 bf16 in two loads each. dWeight: cuda/row_slices.cuh.
//
// Predicted on an H200 (4.8 TB/s) for 4096 rows of 2048 bf16: 34 MB forward, 9 µs at 80 %; with the
// residual 67 MB, 17 µs; dX 50 MB, 13 µs, and dWeight as many reads again, 9 µs. One row takes the
// time of a launch.
#include "cuda/reduce.cuh"
#include "cuda/row_slices.cuh"
#include "cuda/vectors.cuh"
#include "ops/rms_norm.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256, kWarps = kBlock / 32;
constexpr int64_t kWarpRow = 512;

// A row's threads, and which rows a block takes: `warps` warps a row, 1 or all of the block.
struct RowThreads {
  int warps, threads, thread;
  int64_t first, step;

  __device__ __forceinline__ explicit RowThreads(int warps)
      : warps(warps),
        threads(32 * warps),
        thread(static_cast<int>(threadIdx.x) % threads),
        first(int64_t{blockIdx.x} * (kWarps / warps) + threadIdx.x / threads),
        step(int64_t{gridDim.x} * (kWarps / warps)) {}
};

// The sum over a row's threads, for each of them.
__device__ __forceinline__ float row_sum(float x, int warps, float* shared) {
  x = warp_sum(x);
  if (warps == 1) return x;
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0;
  for (int i = 0; i < kWarps; ++i) total += shared[i];
  return total;
}

template <class T, int N>
__global__ void __launch_bounds__(kBlock)
    rms_norm_kernel(const T* x, const T* residual, const T* weight, T* out, T* sum, float* rstd,
                    int64_t rows, int64_t c, float eps, int warps) {
  using V = Vector<T, N>;
  SMEM_ARRAY(float, shared, kWarps);
  const RowThreads row(warps);
  const float inv_c = c ? 1.0f / static_cast<float>(c) : 0.0f;
  for (int64_t r = row.first; r < rows; r += row.step) {
    const T* in = x + r * c;
    float squares = 0;
#pragma unroll 2
    for (int64_t i = row.thread * N; i < c; i += row.threads * N) {
      V v = V::load(in + i);
      if (residual) {
        const V other = V::load(residual + r * c + i);
#pragma unroll
        for (int k = 0; k < N; ++k) v.v[k] = from_float<T>(to_float(v.v[k]) + to_float(other.v[k]));
        v.store(sum + r * c + i);
      }
#pragma unroll
      for (int k = 0; k < N; ++k) squares += to_float(v.v[k]) * to_float(v.v[k]);
    }
    const float inverse = 1.0f / sqrtf(row_sum(squares, warps, shared) * inv_c + eps);
    // Each thread reads back what it wrote itself.
    if (residual) in = sum + r * c;
#pragma unroll 2
    for (int64_t i = row.thread * N; i < c; i += row.threads * N) {
      V v = V::load(in + i);
      const V w = V::load(weight + i);
#pragma unroll
      for (int k = 0; k < N; ++k)
        v.v[k] = from_float<T>(to_float(v.v[k]) * inverse * to_float(w.v[k]));
      v.store(out + r * c + i);
    }
    if (row.thread == 0) rstd[r] = inverse;
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kBlock)
    rms_norm_d_x_kernel(const T* d_out, const T* x, const T* weight, const float* rstd,
                        const T* d_sum, T* d_x, int64_t rows, int64_t c, int warps) {
  using V = Vector<T, N>;
  SMEM_ARRAY(float, shared, kWarps);
  const RowThreads row(warps);
  const float inv_c = c ? 1.0f / static_cast<float>(c) : 0.0f;
  for (int64_t r = row.first; r < rows; r += row.step) {
    const T* in = x + r * c;
    const T* d = d_out + r * c;
    const float inverse = rstd[r];
    float sum = 0;
#pragma unroll 2
    for (int64_t i = row.thread * N; i < c; i += row.threads * N) {
      const V dv = V::load(d + i), v = V::load(in + i), w = V::load(weight + i);
#pragma unroll
      for (int k = 0; k < N; ++k)
        sum += to_float(dv.v[k]) * (to_float(v.v[k]) * inverse) * to_float(w.v[k]);
    }
    const float mean = row_sum(sum, warps, shared) * inv_c;
#pragma unroll 2
    for (int64_t i = row.thread * N; i < c; i += row.threads * N) {
      const V dv = V::load(d + i), v = V::load(in + i), w = V::load(weight + i);
      V result;
      if (d_sum) result = V::load(d_sum + r * c + i);
#pragma unroll
      for (int k = 0; k < N; ++k)
        result.v[k] = from_float<T>(
            inverse * (to_float(dv.v[k]) * to_float(w.v[k]) - to_float(v.v[k]) * inverse * mean) +
            (d_sum ? to_float(result.v[k]) : 0.0f));
      result.store(d_x + r * c + i);
    }
  }
}

// dOut x rstd, of which dWeight is the sum.
template <class T>
struct RmsNormTerms {
  static constexpr int count = 1;
  const T *d_out, *x;
  const float* rstd;
  int64_t c;

  __device__ __forceinline__ void add(int64_t r, int64_t column, float (&sums)[1]) const {
    sums[0] += to_float(d_out[r * c + column]) * (to_float(x[r * c + column]) * rstd[r]);
  }
};

int warps_of(int64_t c) { return c <= kWarpRow ? 1 : kWarps; }
unsigned blocks_of(int64_t rows, int64_t c) { return blocks_for(rows, kWarps / warps_of(c)); }

}  // namespace

void rms_norm(const RmsNormArgs& a, Device& device) {
  const int64_t c = a.x.shape[-1], rows = a.rstd.size();
  if (!rows) return;
  with_vectors(a.x.dtype, c, {a.x.data, a.residual.data, a.weight.data, a.out.data, a.sum.data},
               [&](auto* t, auto n) {
                 using T = std::remove_pointer_t<decltype(t)>;
                 launch(rms_norm_kernel<T, n.value>, blocks_of(rows, c), kBlock, 0,
                        stream_of(device), a.x.as<const T>(), a.residual.as<const T>(),
                        a.weight.as<const T>(), a.out.as<T>(), a.sum.as<T>(), a.rstd.as<float>(),
                        rows, c, static_cast<float>(a.eps), warps_of(c));
               });
}

void rms_norm_backward(const RmsNormBackwardArgs& a, Device& device) {
  const int64_t c = a.x.shape[-1], rows = a.rstd.size();
  if (rows)
    with_vectors(a.x.dtype, c, {a.d_out.data, a.x.data, a.weight.data, a.d_sum.data, a.d_x.data},
                 [&](auto* t, auto n) {
                   using T = std::remove_pointer_t<decltype(t)>;
                   launch(rms_norm_d_x_kernel<T, n.value>, blocks_of(rows, c), kBlock, 0,
                          stream_of(device), a.d_out.as<const T>(), a.x.as<const T>(),
                          a.weight.as<const T>(), a.rstd.as<const float>(), a.d_sum.as<const T>(),
                          a.d_x.as<T>(), rows, c, warps_of(c));
                 });
  with_float_type(a.x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    row_gradients(
        RmsNormTerms<T>{a.d_out.as<const T>(), a.x.as<const T>(), a.rstd.as<const float>(), c},
        rows, c, a.d_weight.as<float>(), nullptr, device);
  });
}

}  // namespace p2r::cuda
