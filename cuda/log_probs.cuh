// What log-probabilities of logits in memory (log_probs.cu) and of the logits of a linear head
// (linear_log_probs.cu) share: the online softmax, and the kernels that finish a row; and, also
// with distillation.cu, loads and stores of a row's vectors.
#pragma once
#include "cuda/launch.cuh"
#include "ops/log_probs.h"

namespace p2r::cuda {

constexpr int kVector = 8;  // elements

template <class T>
__device__ __forceinline__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Eight elements from p; `pad` for those from the n-th on.
template <class T>
__device__ __forceinline__ void load_vector(const T* p, int64_t n, bool aligned, float pad,
                                            float (&x)[kVector]) {
  if (aligned && n >= kVector) {
    constexpr int words = kVector * sizeof(T) / 16;
    uint4 raw[words];
#pragma unroll
    for (int w = 0; w < words; ++w) raw[w] = reinterpret_cast<const uint4*>(p)[w];
    const T* values = reinterpret_cast<const T*>(raw);
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = to_float(values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = i < n ? to_float(p[i]) : pad;
  }
}

template <class T>
__device__ __forceinline__ void store_vector(T* p, int64_t n, bool aligned,
                                             const float (&x)[kVector]) {
  if (aligned && n >= kVector) {
    constexpr int words = kVector * sizeof(T) / 16;
    uint4 raw[words];
    T* values = reinterpret_cast<T*>(raw);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = from_float<T>(x[i]);
#pragma unroll
    for (int w = 0; w < words; ++w) reinterpret_cast<uint4*>(p)[w] = raw[w];
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < n) p[i] = from_float<T>(x[i]);
  }
}

// The online softmax over some columns of a row: the largest logit, Σ e^d and the extra sum, Σ e^d
// d or Σ e^2d, where d = (logit - max) / temperature. Over no columns, or none above -inf, max is
// -inf and the sum 0, or NaN if one was NaN.
struct SoftmaxPartial {
  float max, sum, extra;
};

// Makes the sums relative to `max`, at least p.max, which the caller then stores there.
__device__ __forceinline__ void rescale(SoftmaxPartial& p, float max, float inv_temperature,
                                        SoftmaxExtra extra) {
  if (p.max == -INFINITY) return;
  const float shift = (p.max - max) * inv_temperature;
  const float scale = ptx::ex2(shift * kLog2e);
  const float further = extra == SoftmaxExtra::squares ? scale * p.extra : p.extra + shift * p.sum;
  p.extra = scale == 0 ? 0 * p.extra : scale * further;
  p.sum *= scale;
}

__device__ __forceinline__ SoftmaxPartial merged(SoftmaxPartial a, SoftmaxPartial b,
                                                 float inv_temperature, SoftmaxExtra extra) {
  const float max = fmaxf(a.max, b.max);
  rescale(a, max, inv_temperature, extra);
  rescale(b, max, inv_temperature, extra);
  return {max, a.sum + b.sum, a.extra + b.extra};
}

// Merges the partials of `width` adjacent lanes, a power of two, into each of them.
__device__ __forceinline__ void merge_lanes(SoftmaxPartial& p, int width, float inv_temperature,
                                            SoftmaxExtra extra) {
  for (int step = width / 2; step > 0; step /= 2) {
    SoftmaxPartial other;
    other.max = __shfl_xor_sync(0xffffffffu, p.max, step);
    other.sum = __shfl_xor_sync(0xffffffffu, p.sum, step);
    other.extra = __shfl_xor_sync(0xffffffffu, p.extra, step);
    p = merged(p, other, inv_temperature, extra);
  }
}

// The results of rows from the partials of their spans (ranges of columns), [rows, spans] and in
// order, and the targets' logits, [rows].
void finish_log_probs(const TokenLogProbsArgs& a, int64_t columns, const SoftmaxPartial* partials,
                      int64_t spans, const float* target_logits, Device& device);

// token_log_probs_backward of f32 logits; stores *scale times the gradient as T, in rows `stride`
// elements apart.
template <class T>
void scaled_logit_gradient(const TokenLogProbsBackwardArgs& a, const float* scale, T* d_logits,
                           int64_t stride, Device& device);

}  // namespace p2r::cuda
