// What log-probabilities of logits in memory (log_probs.cu) and of logits that are made on the way
// (linear_log_probs.cu) share.
#pragma once
#include "cuda/launch.cuh"
#include "ops/log_probs.h"

namespace p2r::cuda {

// Over some columns of a row: the largest logit, Σ e^d and Σ e^d d, where d = (logit - maximum) /
// temperature. Nothing summed yet has maximum -inf; its sum is 0, or NaN when NaN was met.
struct Sums {
  float maximum, sum, moment;
};

__device__ __forceinline__ void lower_to(Sums& a, float top, float inverse) {
  if (a.maximum == -INFINITY) return;
  const float shift = (a.maximum - top) * inverse;
  const float scale = ptx::ex2(shift * kLog2e);
  a.moment = scale == 0 ? 0 * a.moment : scale * (a.moment + shift * a.sum);
  a.sum *= scale;
}

__device__ __forceinline__ Sums merged(Sums a, Sums b, float inverse) {
  const float top = fmaxf(a.maximum, b.maximum);
  lower_to(a, top, inverse);
  lower_to(b, top, inverse);
  return {top, a.sum + b.sum, a.moment + b.moment};
}

// With the lanes whose number differs in a bit below `width`.
__device__ __forceinline__ void merge_lanes(Sums& own, int width, float inverse) {
  for (int step = width / 2; step > 0; step /= 2) {
    Sums other;
    other.maximum = __shfl_xor_sync(0xffffffffu, own.maximum, step);
    other.sum = __shfl_xor_sync(0xffffffffu, own.sum, step);
    other.moment = __shfl_xor_sync(0xffffffffu, own.moment, step);
    own = merged(own, other, inverse);
  }
}

// The results of rows from the sums of their spans, [rows, spans], and the targets' logits, [rows].
void finish_log_probs(const TokenLogProbsArgs& a, int64_t columns, const Sums* sums, int64_t spans,
                      const float* target_logits, Device& device);

// token_log_probs_backward of f32 logits, whose gradient comes out times *scale, in T, in rows that
// lie `stride` behind each other.
template <class T>
void scaled_slopes(const TokenLogProbsBackwardArgs& a, const float* scale, T* d_logits,
                   int64_t stride, Device& device);

}  // namespace p2r::cuda
