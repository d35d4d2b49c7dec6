// Divergences of two distributions over the vocabulary. A block takes one row: a pass over both
// heads' logits for an online softmax of each and for the sum that a KL divergence needs, one more
// for the mixture of jsd, and one for the gradient. Lanes and warps are merged by a fixed tree. A
// row a block leaves SMs idle only where there are fewer rows than a training step has.
//
// What limits it, on an H200 (4.3 TB/s by copying, 132 SMs at some 1.7 GHz): a column of both heads
// costs two ex2 (0.56 ps at 16 a clock and SM) and some 24 other instructions (0.84 ps at 128), and
// takes 0.93 ps to read in bf16, 1.9 in f32. So all three are near their limits at once for bf16:
// predicted for [4096, 151936] are 0.75 ms forward, where reading alone takes 0.58, and 1.6 ms with
// the gradient, which reads the row again, half of it from L2, and writes it.
//
// Of linear heads: chunk by chunk both heads' logits by GEMMs, stored in f32, this kernel, whose dz
// overwrites the student's logits or is scaled and in 16 bits, and the gradients' GEMMs
// (cuda/linear_head.cuh). An epilogue sees one head's accumulators, so that keeping the logits in
// registers would need a tile of each head at once, 128 KB of a block's 256 KB of registers.
// Predicted for [4096, 2560] and a teacher's [4096, 4096], bf16, on a vocabulary of 151 936: GEMMs
// 12.6 ms for the logits and 9.7 for the gradients at 660 TFLOP/s; writing both logits and reading
// them once 2.3 ms; the gradient's pass 1.3; and in 8 chunks of 512 rows 1.3 ms of waiting for
// dweight: 27 ms, 16 of them forward.
#include <cfloat>

#include "cuda/linear_head.cuh"
#include "cuda/log_probs.cuh"
#include "cuda/reduce.cuh"
#include "cuda/workspace.h"
#include "ops/distillation.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 512, kWarps = kBlock / 32;
constexpr int kScan = 256;  // tokens of a step of the advantages' sums

// Over some columns of a row, with d = (z - max_z) / temperature and e likewise of y: the maxima,
// Σ exp(d), Σ exp(d) (d - e) and Σ exp(e).
struct PairPartial {
  float max_z, sum_z, cross, max_y, sum_y;
};

// Makes the sums relative to maxima at least as large, which the caller then stores there.
__device__ __forceinline__ void rescale(PairPartial& p, float max_z, float max_y,
                                        float inv_temperature) {
  // Without a column above -inf there is nothing to rescale.
  const float shift_z = p.max_z == -INFINITY ? 0 : (p.max_z - max_z) * inv_temperature;
  const float shift_y = p.max_y == -INFINITY ? 0 : (p.max_y - max_y) * inv_temperature;
  const float scale = ptx::ex2(shift_z * kLog2e);
  p.cross = scale == 0 ? 0 * p.sum_z : scale * (p.cross + (shift_z - shift_y) * p.sum_z);
  p.sum_z *= scale;
  p.sum_y *= ptx::ex2(shift_y * kLog2e);
}

__device__ __forceinline__ PairPartial merged(PairPartial a, PairPartial b, float inv_temperature) {
  const float z = fmaxf(a.max_z, b.max_z), y = fmaxf(a.max_y, b.max_y);
  rescale(a, z, y, inv_temperature);
  rescale(b, z, y, inv_temperature);
  return {z, a.sum_z + b.sum_z, a.cross + b.cross, y, a.sum_y + b.sum_y};
}

// Merges the partials of `width` adjacent lanes, a power of two, into each of them.
__device__ __forceinline__ void merge_lanes(PairPartial& p, int width, float inv_temperature) {
  for (int step = width / 2; step > 0; step /= 2) {
    PairPartial other;
    other.max_z = __shfl_xor_sync(0xffffffffu, p.max_z, step);
    other.sum_z = __shfl_xor_sync(0xffffffffu, p.sum_z, step);
    other.cross = __shfl_xor_sync(0xffffffffu, p.cross, step);
    other.max_y = __shfl_xor_sync(0xffffffffu, p.max_y, step);
    other.sum_y = __shfl_xor_sync(0xffffffffu, p.sum_y, step);
    p = merged(p, other, inv_temperature);
  }
}

__device__ __forceinline__ void accumulate(PairPartial& a, const float (&z)[kVector],
                                           const float (&y)[kVector], float inv_temperature) {
  float max_z = a.max_z, max_y = a.max_y;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    max_z = fmaxf(max_z, z[i]);
    max_y = fmaxf(max_y, y[i]);
  }
  if (max_z > a.max_z || max_y > a.max_y) rescale(a, max_z, max_y, inv_temperature);
  a.max_z = max_z;
  a.max_y = max_y;
  const float from_z = max_z == -INFINITY ? 0 : max_z, from_y = max_y == -INFINITY ? 0 : max_y;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float d = (z[i] - from_z) * inv_temperature, e = (y[i] - from_y) * inv_temperature;
    const float p = ptx::ex2(d * kLog2e);
    a.sum_z += p;
    a.sum_y += ptx::ex2(e * kLog2e);
    a.cross += p == 0 ? 0 : p * (d - e);  // where p is 0, d - e may be infinite or NaN
  }
}

// What a pass after the first needs of a row. The log-probabilities are relative to stats of
// ops/log_probs.h.
struct RowState {
  float2 student, teacher;
  double divergence;
  float subtract;  // reverse_kl: the divergence; jsd: KL(p||m)
};

__device__ float2 row_stats(float max, float sum, double inv_temperature) {
  const double x = max * inv_temperature;
  const float m = static_cast<float>(x);
  const double residue = fabsf(m) < INFINITY ? x - m : 0;
  return make_float2(m, static_cast<float>(log(static_cast<double>(sum)) + residue));
}

struct LogProb {
  float inverse, inverse_low;  // 1 / temperature, in two parts

  __device__ __forceinline__ float operator()(float x, float2 stats) const {
    // The low part of the product is of a finite x: -inf times 0 is not 0.
    return fmaf(x, inverse, -stats.x) +
           (inverse_low == 0 ? -stats.y : fmaf(fmaxf(x, -FLT_MAX), inverse_low, -stats.y));
  }
};
__device__ __forceinline__ float prob(float log_p) { return ptx::ex2(log_p * kLog2e); }

// log(p / m), and log(q / p) within the bounds between which both of it and m are as good as exact.
__device__ __forceinline__ float log_of_mixture(float log_p, float log_q, float beta,
                                                float& log_ratio) {
  // A NaN of two columns of -inf becomes a bound.
  log_ratio = fminf(fmaxf(log_q - log_p, -80.0f), 80.0f);
  // 1 + beta (q/p - 1) is exactly 1 where p = q.
  return -logf(fmaf(prob(log_ratio) - 1, beta, 1.0f));
}

struct Rows {
  const uint8_t* mask;
  const float* d_divergence;
  float* divergence;
  int64_t columns, d_stride;
  Divergence objective;
  float beta;
  double inv_temperature;
  const float* scale;  // of the gradient; null: 1
  FaultFlag fault;
};

// Calls f(z, y, at) for each of this thread's vectors of columns; `pad` past the last.
template <class T, class F>
__device__ __forceinline__ void each_pair(const T* z, const T* y, int64_t columns, bool aligned,
                                          float pad, const F& f) {
  for (int64_t at = threadIdx.x * kVector; at < columns; at += kBlock * kVector) {
    float a[kVector], b[kVector];
    load_vector(z + at, columns - at, aligned, pad, a);
    load_vector(y + at, columns - at, aligned, pad, b);
    f(a, b, at);
  }
}

template <class T, class D>
__global__ void __launch_bounds__(kBlock)
    distillation_kernel(const T* logits, const T* teacher_logits, D* d_logits, Rows a) {
  SMEM_ARRAY(PairPartial, warp_partials, kWarps);
  SMEM_ARRAY(RowState, row_state, 1);
  SMEM_ARRAY(double, warp_sums, kWarps);
  const int64_t row = blockIdx.x;
  const T *z = logits + row * a.columns, *y = teacher_logits + row * a.columns;
  D* dz = d_logits ? d_logits + row * a.d_stride : nullptr;
  const uint8_t mask = a.mask ? a.mask[row] : 1;
  const bool aligned = is_aligned(z) && is_aligned(y) && (!dz || is_aligned(dz));
  const auto store_all = [&](float value) {
    float x[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = value;
    for (int64_t at = threadIdx.x * kVector; at < a.d_stride; at += kBlock * kVector)
      store_vector(dz + at, a.d_stride - at, aligned, x);
  };
  if (mask != 1) {
    const float value = mask ? NAN : 0;
    if (threadIdx.x == 0) {
      a.divergence[row] = value;
      if (mask) ptx::raise(a.fault, row, mask, true);
    }
    if (dz) store_all(value);
    return;
  }

  const float inverse = static_cast<float>(a.inv_temperature);
  const bool forward = a.objective == Divergence::forward_kl;
  // KL(q||p) is KL(p||q) of the other.
  const T *weighting = forward ? y : z, *other = forward ? z : y;
  PairPartial partial = {-INFINITY, 0, 0, -INFINITY, 0};
  each_pair(
      weighting, other, a.columns, aligned, -INFINITY,
      [&](float(&p)[kVector], float(&q)[kVector], int64_t) { accumulate(partial, p, q, inverse); });
  merge_lanes(partial, 32, inverse);
  if (threadIdx.x % 32 == 0) warp_partials[threadIdx.x / 32] = partial;
  __syncthreads();
  if (threadIdx.x < 32) {
    partial = warp_partials[threadIdx.x % kWarps];
    merge_lanes(partial, kWarps, inverse);
    if (threadIdx.x == 0) {
      const double sum_z = partial.sum_z, sum_y = partial.sum_y;
      const bool empty = sum_z == 0 || sum_y == 0;
      const double d =
          empty ? static_cast<double>(NAN) : partial.cross / sum_z - log(sum_z) + log(sum_y);
      const float2 first = row_stats(partial.max_z, partial.sum_z, a.inv_temperature),
                   second = row_stats(partial.max_y, partial.sum_y, a.inv_temperature);
      row_state[0] = {forward ? second : first, forward ? first : second, d, static_cast<float>(d)};
    }
  }
  __syncthreads();
  RowState state = row_state[0];
  const LogProb log_prob = {inverse, static_cast<float>(a.inv_temperature - inverse)};
  if (a.objective == Divergence::jsd) {
    float of_teacher = 0, of_student = 0;
    each_pair(z, y, a.columns, aligned, -INFINITY,
              [&](float(&p)[kVector], float(&q)[kVector], int64_t) {
#pragma unroll
                for (int i = 0; i < kVector; ++i) {
                  const float log_p = log_prob(p[i], state.student),
                              log_q = log_prob(q[i], state.teacher);
                  float ratio;
                  const float of_p = log_of_mixture(log_p, log_q, a.beta, ratio);
                  of_teacher += prob(log_q) * (of_p + ratio);
                  of_student += prob(log_p) * of_p;
                }
              });
    const double teacher = block_sum<kWarps>(of_teacher, warp_sums),
                 student = block_sum<kWarps>(of_student, warp_sums);
    if (state.divergence == state.divergence)
      state.divergence = a.beta * teacher + (1 - a.beta) * student;
    state.subtract = static_cast<float>(student);
  }
  if (threadIdx.x == 0)  // below 0 by rounding alone
    a.divergence[row] = state.divergence < 0 ? 0 : static_cast<float>(state.divergence);
  if (!dz) return;

  double scale = a.d_divergence[row] * a.inv_temperature;
  if (scale == 0) return store_all(0);
  if (a.scale) scale *= *a.scale;
  if (a.objective == Divergence::jsd) scale *= 1 - a.beta;
  const bool defined =
      state.divergence == state.divergence && (forward || fabs(state.divergence) < INFINITY);
  const float factor = defined ? static_cast<float>(scale) : NAN;
  each_pair(z, y, a.columns, aligned, 0, [&](float(&p)[kVector], float(&q)[kVector], int64_t at) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float log_p = log_prob(p[i], state.student), log_q = log_prob(q[i], state.teacher);
      const float own = prob(log_p);
      float slope;
      if (a.objective == Divergence::forward_kl) {
        slope = own - prob(log_q);
      } else if (a.objective == Divergence::reverse_kl) {
        slope = own == 0 ? 0 : own * ((log_p - log_q) - state.subtract);
      } else {
        float ratio;
        slope = own * (log_of_mixture(log_p, log_q, a.beta, ratio) - state.subtract);
      }
      // Columns of dz past the last are padding, stored as zeros.
      p[i] = at + i < a.columns ? factor * slope : 0;
    }
    const int64_t end = a.columns - at > kVector ? a.columns : a.d_stride;
    store_vector(dz + at, end - at, aligned, p);
  });
}

// d_logits [rows, d_stride] may be null.
template <class T, class D, class Args>
void run(const Args& a, const T* logits, const T* teacher_logits, D* d_logits, int64_t d_stride,
         const float* scale, int64_t rows, int64_t columns, const View& mask,
         const View& d_divergence, const View& divergence, const FaultFlag& fault, Device& device) {
  launch(distillation_kernel<T, D>, static_cast<unsigned>(rows), kBlock, 0, stream_of(device),
         logits, teacher_logits, d_logits,
         Rows{mask.as<const uint8_t>(), d_divergence.as<const float>(), divergence.as<float>(),
              columns, d_stride, a.objective, static_cast<float>(a.beta), 1 / a.temperature, scale,
              fault});
}

template <class Args>
void distill_logits(const Args& a, const View& d_divergence, const View& d_logits, Device& device) {
  const int64_t rows = a.logits.shape[0], columns = a.logits.shape[1];
  if (!rows) return;
  with_float_type(a.logits.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    run(a, a.logits.template as<const T>(), a.teacher_logits.template as<const T>(),
        d_logits.as<T>(), columns, nullptr, rows, columns, a.mask, d_divergence, a.divergence,
        a.fault, device);
  });
}

// A chunk of the teacher's logits, from its own types.
template <class Args>
void teacher_logits(const Args& a, int64_t first, int64_t chunk, float* logits, Device& device) {
  const int64_t columns = a.teacher_weight.shape[0], channels = a.teacher_weight.shape[1];
  with_float_type(a.teacher_hidden.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    gemm<Major::k, Major::k>(
        device, Gemm<T, T, float>{
                    .m = chunk,
                    .n = columns,
                    .k = channels,
                    .a = {a.teacher_hidden.template as<const T>() + first * channels, channels},
                    .b = {a.teacher_weight.template as<const T>(), channels},
                    .c = logits,
                    .c_row_stride = columns,
                    .bias = {a.teacher_bias.data, a.teacher_bias.dtype},
                    .split_k = false});
  });
}

// Calls f(head, the teacher's logits) for every chunk of rows, with both heads' logits computed.
template <class Args, class F>
void each_chunk(const Args& a, bool gradient, Device& device, const F& f) {
  with_float_type(a.hidden.dtype, [&](auto* t) {
    LinearHead<std::remove_pointer_t<decltype(t)>, Args> head(a, device, true, 2, gradient);
    const Scratch teacher(device, head.template chunk_bytes<float>(a.weight.shape[0]));
    head.for_each_chunk([&] {
      head.compute_logits();
      teacher_logits(a, head.first(), head.chunk(), teacher.as<float>(), device);
      f(head, teacher.as<float>());
    });
  });
}

// The advantages of a block's sequence, from its end: a step of kScan tokens is a scan of
// s_t = x_t + discount s_{t+1}.
__global__ void __launch_bounds__(kScan)
    distillation_advantages_kernel(const float* log_probs, const float* teacher_log_probs,
                                   const uint8_t* mask, const float* base, bool per_token,
                                   const int64_t* bounds, double coef, double discount,
                                   double clamp, float* advantages, FaultFlag fault) {
  SMEM_ARRAY(double, sums, kScan);
  const int64_t sequence = blockIdx.x, begin = bounds[sequence];
  const int thread = static_cast<int>(threadIdx.x);
  // weight x, where 0 times infinity would be NaN.
  const auto weighted = [](double weight, double x) { return fabs(x) < INFINITY ? weight * x : x; };
  const double weight_of_carry = pow(discount, thread + 1.0);
  double carry = 0;  // the sum at the token after this step's
  for (int64_t end = bounds[sequence + 1]; end > begin; end -= kScan) {
    const int64_t t = end - 1 - thread;
    const uint8_t kept = t < begin ? 0 : mask ? mask[t] : 1;
    double x = 0;
    if (kept == 1) {
      x = static_cast<double>(log_probs[t]) - teacher_log_probs[t];
      if (clamp > 0) x = x < -clamp ? -clamp : x > clamp ? clamp : x;
    }
    double sum = x;
    if (discount != 0) {
      double weight = discount;
      for (int step = 1; step < kScan; step *= 2) {
        __syncthreads();
        sums[thread] = sum;
        __syncthreads();
        if (thread >= step) sum += weighted(weight, sums[thread - step]);
        weight *= weight;
      }
      sum += weighted(weight_of_carry, carry);
      __syncthreads();
      sums[thread] = sum;
      __syncthreads();
      carry = sums[kScan - 1];
    }
    if (t < begin) continue;
    const double own = base ? base[per_token ? t : sequence] : 0;
    advantages[t] = kept == 1 ? static_cast<float>(own - coef * sum) : kept ? NAN : 0;
    if (kept > 1) ptx::raise(fault, t, kept, true);
  }
}

}  // namespace

void distillation(const DistillationArgs& a, Device& device) { distill_logits(a, {}, {}, device); }

void distillation_backward(const DistillationBackwardArgs& a, Device& device) {
  distill_logits(a, a.d_divergence, a.d_logits, device);
}

void linear_distillation(const LinearDistillationArgs& a, Device& device) {
  if (!a.hidden.shape[0]) return;
  each_chunk(a, false, device, [&](auto& head, const float* teacher) {
    run<float, float>(a, head.logits(), teacher, nullptr, 0, nullptr, head.chunk(),
                      a.weight.shape[0], head.chunk_of(a.mask), {}, head.chunk_of(a.divergence),
                      a.fault.from(head.first()), device);
  });
}

void linear_distillation_backward(const LinearDistillationBackwardArgs& a, Device& device) {
  if (!a.hidden.shape[0]) return zero_gradients(a, device);
  each_chunk(a, true, device, [&](auto& head, const float* teacher) {
    const View mask = head.chunk_of(a.mask), d_divergence = head.chunk_of(a.d_divergence);
    const RowGradients gradients = {nullptr, mask.as<const uint8_t>(),
                                    d_divergence.as<const float>(), nullptr};
    // A log-ratio in dz can be some 60, where f16 ends at 65504.
    head.template backward<5>(gradients, [&]<class D>(D* dz, int64_t stride, const float* scale) {
      run<float, D>(a, head.logits(), teacher, dz, stride, scale, head.chunk(), a.weight.shape[0],
                    mask, d_divergence, head.chunk_of(a.divergence), a.fault.from(head.first()),
                    device);
    });
  });
}

void distillation_advantages(const DistillationAdvantagesArgs& a, Device& device) {
  const int64_t sequences = static_cast<int64_t>(a.cu_seqlens.size()) - 1;
  if (!sequences) return;
  const int64_t* bounds = nullptr;
  const ScratchWorkspace scratch(
      device, [&](Workspace& workspace) { bounds = upload(device, workspace, a.cu_seqlens); });
  launch(distillation_advantages_kernel, static_cast<unsigned>(sequences), kScan, 0,
         stream_of(device), a.log_probs.as<const float>(), a.teacher_log_probs.as<const float>(),
         a.mask.as<const uint8_t>(), a.base.as<const float>(), a.per_token, bounds, a.coef,
         a.discount, a.clamp, a.advantages.as<float>(), a.fault);
}

}  // namespace p2r::cuda
