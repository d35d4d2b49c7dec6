// Log-probabilities of logits in memory, by an online softmax. A block takes one slice of kSlice
// columns of one row and reads it once; a thread keeps a running (max, Σ e^d, Σ e^d d), rescaled at
// most once a vector. Threads are merged by a fixed tree, and the slices of a row in order, in f64,
// by a second, tiny kernel. Which thread sums which column depends on the column alone, so a row
// gives the same bits in any batch, and few rows still make many blocks (10 a row of 151 936). An
// unaligned row (V odd) is loaded element by element, in the same order. The gradient is one
// elementwise pass over tiles of kTile columns.
//
// What limits it, on an H200 (132 SMs at some 1.7 GHz, 4.3 TB/s by copying) and bf16:
//
//   bytes in flight  4.3 TB/s is 19 bytes a clock and SM; over some 800 ns of latency 26 KB have to
//                    be in flight in each SM. A thread issues loads of 64 bytes (four of 16) before
//                    it uses the first, so 1024 resident threads, half of what fits, have 64 KB in
//                    flight.
//   forward          9.6 elements a clock and SM. Each costs a conversion, max, subtract, multiply,
//                    ex2 and add: 60 % of the 128 lanes a clock, and 60 % of the 16 ex2 a clock. A
//                    second ex2 (a rescale each element) would be the limit, and so would little
//                    more arithmetic: the moment's two more instructions make it 80 %.
//   backward         4 bytes an element, 4.8 elements a clock: a third of the lanes.
//
// So both should run at the rate of memory: of bf16 [16384, 151936] 4.98 GB are read in 1.16 ms,
// and 9.96 GB read and written in 2.3. The merge reads 120 bytes a row. A prediction, which nothing
// here measures.
#include <cfloat>

#include "cuda/log_probs.cuh"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256, kWarps = kBlock / 32;
constexpr int64_t kStride = kBlock * kVector;  // from one vector of a thread to its next
constexpr int64_t kSlice = 8 * kStride;
constexpr int64_t kTile = 4 * kStride;
constexpr int kRows = 128;  // rows, one a thread, of a block that finishes rows

// What a thread loads before it uses any of it: kLoads times 16 bytes.
constexpr int kLoads = 4;
template <class T>
struct Batch {
  static constexpr int words = kVector * sizeof(T) / 16, vectors = kLoads / words;
  static constexpr int64_t span = (vectors - 1) * kStride + kVector;  // columns, first to last
  uint4 raw[kLoads];

  __device__ __forceinline__ void load(const T* p) {
#pragma unroll
    for (int v = 0; v < vectors; ++v)
#pragma unroll
      for (int w = 0; w < words; ++w)
        raw[v * words + w] = reinterpret_cast<const uint4*>(p + v * kStride)[w];
  }
  __device__ __forceinline__ void unpack(int v, float (&x)[kVector]) const {
    const T* values = reinterpret_cast<const T*>(raw + v * words);
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = to_float(values[i]);
  }
};

// Calls f(x, at, full) for each of this thread's vectors of columns [first, end) of z: x is the
// eight elements from column `at`, with `pad` for those past `end`; `full` if the whole batch was
// inside.
template <class T, class F>
__device__ __forceinline__ void each_vector(const T* z, int64_t first, int64_t end, bool aligned,
                                            float pad, const F& f) {
  Batch<T> batch;
  for (int64_t c = first + threadIdx.x * kVector; c < end; c += batch.vectors * kStride) {
    const bool full = aligned && end - c >= batch.span;
    if (full) batch.load(z + c);
#pragma unroll
    for (int v = 0; v < batch.vectors; ++v) {
      const int64_t at = c + v * kStride;
      float x[kVector];
      if (full)
        batch.unpack(v, x);
      else if (at < end)
        load_vector(z + at, end - at, aligned, pad, x);
      else
        break;
      f(x, at, full);
    }
  }
}

__device__ __forceinline__ void accumulate(SoftmaxPartial& a, const float (&x)[kVector],
                                           float inv_temperature, SoftmaxExtra extra) {
  float max = a.max;
#pragma unroll
  for (int i = 0; i < kVector; ++i) max = fmaxf(max, x[i]);
  if (max > a.max) rescale(a, max, inv_temperature, extra);
  a.max = max;
  const float reference = max == -INFINITY ? 0 : max, scale_log2 = inv_temperature * kLog2e;
  if (extra == SoftmaxExtra::moment) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float d = x[i] - reference, e = ptx::ex2(d * scale_log2);
      a.sum += e;
      a.extra += e * fmaxf(d * inv_temperature, -128.0f);  // where e is 0 and 0 * -inf would be NaN
    }
  } else if (extra == SoftmaxExtra::squares) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float e = ptx::ex2((x[i] - reference) * scale_log2);
      a.sum += e;
      a.extra += e * e;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) a.sum += ptx::ex2((x[i] - reference) * scale_log2);
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    softmax_partials_kernel(const T* logits, const int32_t* targets, int64_t columns,
                            int64_t slices, float inv_temperature, SoftmaxExtra extra,
                            SoftmaxPartial* out) {
  SMEM_ARRAY(SoftmaxPartial, warp_partials, kWarps);
  const int64_t row = blockIdx.x / slices, first = blockIdx.x % slices * kSlice;
  if (targets[row] == kSkippedTarget) return;
  const T* z = logits + row * columns;
  const int64_t end = first + kSlice < columns ? first + kSlice : columns;
  SoftmaxPartial partial = {-INFINITY, 0, 0};
  each_vector(z, first, end, is_aligned(z), -INFINITY, [&](float(&x)[kVector], int64_t, bool) {
    accumulate(partial, x, inv_temperature, extra);
  });
  merge_lanes(partial, 32, inv_temperature, extra);
  if (threadIdx.x % 32 == 0) warp_partials[threadIdx.x / 32] = partial;
  __syncthreads();
  if (threadIdx.x < 32) {
    partial = warp_partials[threadIdx.x % kWarps];
    merge_lanes(partial, kWarps, inv_temperature, extra);
    if (threadIdx.x == 0) out[blockIdx.x] = partial;
  }
}

struct RowSoftmax {
  double max = -INFINITY, sum = 0, extra = 0;
};

__device__ void merge_into(RowSoftmax& into, RowSoftmax part, double inv_temperature,
                           SoftmaxExtra extra) {
  if (part.sum == 0) return;
  const double max = part.max > into.max ? part.max : into.max;
  const auto rescale = [&](RowSoftmax& r) {
    const double shift = (r.max - max) * inv_temperature, scale = exp(shift);
    const double further =
        extra == SoftmaxExtra::squares ? scale * r.extra : r.extra + shift * r.sum;
    r.extra = scale == 0 ? 0 * r.extra : scale * further;
    r.sum *= scale;
  };
  rescale(part);
  if (into.sum == 0)
    into = {max, part.sum, part.extra};
  else {
    rescale(into);
    into = {max, into.sum + part.sum, into.extra + part.extra};
  }
}

__device__ RowSoftmax merge_slices(const SoftmaxPartial* slices, int64_t count,
                                   double inv_temperature, SoftmaxExtra extra) {
  RowSoftmax row;
  for (int64_t k = 0; k < count; ++k)
    merge_into(row, {slices[k].max, slices[k].sum, slices[k].extra}, inv_temperature, extra);
  return row;
}

// stats of ops/log_probs.h: (m, log s), with s relative to the rounded m.
__device__ float2 row_stats(const RowSoftmax& row, double inv_temperature) {
  const double max = row.max * inv_temperature;
  const float m = static_cast<float>(max);
  const double residue = fabsf(m) < INFINITY ? max - m : 0;
  return make_float2(m, static_cast<float>(log(row.sum) + residue));
}

// With a row_stride of 0, logits holds each row's target logit only.
template <class T>
__global__ void __launch_bounds__(kRows)
    finish_rows_kernel(const T* logits, int64_t row_stride, const int32_t* targets,
                       const SoftmaxPartial* partials, int64_t rows, int64_t columns,
                       int64_t slices, double inv_temperature, SoftmaxExtra extra, float* log_probs,
                       float2* stats, float* further, FaultFlag fault) {
  const int64_t i = int64_t{blockIdx.x} * kRows + threadIdx.x;
  if (i >= rows) return;
  const int32_t target = targets[i];
  float log_prob = 0, h = 0;
  float2 s = make_float2(0, 0);
  if (target != kSkippedTarget) {
    const RowSoftmax row = merge_slices(partials + i * slices, slices, inv_temperature, extra);
    s = row_stats(row, inv_temperature);
    const double log_sum = row.sum == 0 ? static_cast<double>(NAN) : log(row.sum);
    h = static_cast<float>(extra == SoftmaxExtra::squares ? row.extra / (row.sum * row.sum)
                                                          : log_sum - row.extra / row.sum);
    if (row.sum == 0) s.y = NAN;
    if (target < 0 || target >= columns) {
      log_prob = h = s.x = s.y = NAN;
      ptx::raise(fault, i, static_cast<uint32_t>(target));
    } else {
      const double x = to_float(logits[row_stride ? i * row_stride + target : i]);
      log_prob = static_cast<float>((x - row.max) * inv_temperature - log_sum);
    }
  }
  log_probs[i] = log_prob;
  stats[i] = s;
  if (further) further[i] = h;
}

template <class T>
__global__ void __launch_bounds__(kRows)
    finish_shard_kernel(const T* logits, const int32_t* targets, const SoftmaxPartial* partials,
                        int64_t rows, int64_t columns, int64_t slices, double inv_temperature,
                        int64_t vocab_offset, float2* stats, float* target_logit, float* moment,
                        FaultFlag fault) {
  const int64_t i = int64_t{blockIdx.x} * kRows + threadIdx.x;
  if (i >= rows) return;
  const int32_t target = targets[i];
  const int64_t local = target - vocab_offset;
  RowSoftmax row;
  float x = 0;
  if (target != kSkippedTarget) {
    row = merge_slices(partials + i * slices, slices, inv_temperature, SoftmaxExtra::moment);
    x = local < 0 || local >= columns
            ? -INFINITY
            : static_cast<float>(to_float(logits[i * columns + local]) * inv_temperature);
  }
  float2 s = row_stats(row, inv_temperature);
  const double shift = row.sum == 0 ? 0 : row.max * inv_temperature - s.x;
  float t = static_cast<float>(exp(shift) * (row.extra + shift * row.sum));
  if (target < 0 && target != kSkippedTarget) {
    x = t = s.x = s.y = NAN;
    ptx::raise(fault, i, static_cast<uint32_t>(target));
  }
  stats[i] = s;
  target_logit[i] = x;
  if (moment) moment[i] = t;
}

__global__ void __launch_bounds__(kRows)
    merge_shards_kernel(const float* const* table, int shards, bool moments, int64_t rows,
                        float* log_probs, float2* merged_stats, float* entropy) {
  const int64_t i = int64_t{blockIdx.x} * kRows + threadIdx.x;
  if (i >= rows) return;
  RowSoftmax row;
  double target = -INFINITY;
  for (int k = 0; k < shards; ++k) {
    const float* stats = table[k] + 2 * i;
    const double moment = moments ? table[2 * shards + k][i] : 0;
    merge_into(row, {stats[0], exp(static_cast<double>(stats[1])), moment}, 1,
               SoftmaxExtra::moment);
    const double x = table[shards + k][i];
    if (!(x <= target)) target = x;
  }
  float log_prob = 0, h = 0;
  float2 s = make_float2(0, 0);
  if (row.sum != 0) {
    s = row_stats(row, 1);
    const double log_sum = log(row.sum);
    log_prob = static_cast<float>((target - row.max) - log_sum);
    h = static_cast<float>(log_sum - row.extra / row.sum);
  } else if (target == -INFINITY) {  // every logit is -inf; a skipped row has target 0
    log_prob = h = s.y = NAN;
    s.x = -INFINITY;
  }
  log_probs[i] = log_prob;
  merged_stats[i] = s;
  if (entropy) entropy[i] = h;
}

struct LogitGradient {
  const int32_t* targets;
  const float *stats, *d_log_probs, *entropy, *d_entropy;
  int64_t columns, tiles, vocab_offset, d_stride;
  double inv_temperature;
  const float* scale;  // of the gradient; null: 1
  bool shard;
  FaultFlag fault;
};

template <class T, class D>
__global__ void __launch_bounds__(kBlock)
    logit_gradient_kernel(const T* logits, D* d_logits, LogitGradient a) {
  const int64_t row = blockIdx.x / a.tiles, first = blockIdx.x % a.tiles * kTile;
  const int64_t end = first + kTile < a.columns ? first + kTile : a.columns;
  // Columns of dz past the last are padding, stored as zeros.
  const int64_t stored = end < a.columns ? end : a.d_stride;
  const T* z = logits + row * a.columns;
  D* dz = d_logits + row * a.d_stride;
  const bool aligned = is_aligned(z) && is_aligned(dz);
  const int32_t target = a.targets[row];
  const int64_t target_column = target - a.vocab_offset;
  const bool invalid =
      target != kSkippedTarget && (target < 0 || (!a.shard && target_column >= a.columns));
  const double scale = a.scale ? a.inv_temperature * *a.scale : a.inv_temperature;
  const double g = a.d_log_probs[row] * scale;
  const double h = a.d_entropy ? a.d_entropy[row] * scale : 0;
  if (invalid || target == kSkippedTarget || (g == 0 && h == 0)) {
    if (invalid && threadIdx.x == 0) ptx::raise(a.fault, row, static_cast<uint32_t>(target));
    float x[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = invalid ? NAN : 0;
    for (int64_t c = first + threadIdx.x * kVector; c < end; c += kStride)
      store_vector(dz + c, stored - c, aligned, x);
    return;
  }

  const float inv_temperature = static_cast<float>(a.inv_temperature);
  const float inv_temperature_low = static_cast<float>(a.inv_temperature - inv_temperature);
  const float max = a.stats[2 * row], log_sum = a.stats[2 * row + 1];
  const double entropy = h != 0 ? a.entropy[row] : 0;
  const float scale_p = static_cast<float>(-g - h * entropy), scale_h = static_cast<float>(-h);
  const auto to_gradient = [&](float(&x)[kVector], int64_t at) {
    const int64_t offset = target_column - at;  // of the target in this vector, if inside
    float target_logit = 0;
    if (offset >= 0 && offset < kVector) {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (i == offset) target_logit = x[i];
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      float log_p = fmaf(x[i], inv_temperature, -max);
      // x is clamped to finite values: -inf times a low part below 0 would be inf, and the sum NaN.
      log_p += inv_temperature_low == 0
                   ? -log_sum
                   : fmaf(fmaxf(x[i], -FLT_MAX), inv_temperature_low, -log_sum);
      const float p = ptx::ex2(log_p * kLog2e);
      x[i] = p * (scale_h == 0 ? scale_p : scale_p + scale_h * fmaxf(log_p, -128.0f));
    }
    if (offset >= 0 && offset < kVector) {  // g (1 - p), without the cancellation near p = 1
      const double log_p = (target_logit * a.inv_temperature - max) - log_sum, p = exp(log_p);
      const double gradient = -g * expm1(log_p) - (p == 0 ? 0 : h * p * (log_p + entropy));
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (i == offset) x[i] = static_cast<float>(gradient);
    }
  };
  each_vector(z, first, end, aligned, 0, [&](float(&x)[kVector], int64_t at, bool full) {
    to_gradient(x, at);
    if (!full) {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (at + i >= a.columns) x[i] = 0;
    }
    store_vector(dz + at, stored - at, aligned, x);
  });
}

// Computes the partials of all slices of all rows; finish(logits, partials, slices) turns them into
// results.
template <class Args, class F>
void with_partials(const Args& a, SoftmaxExtra extra, Device& device, const F& finish) {
  const int64_t rows = a.logits.shape[0], columns = a.logits.shape[1];
  if (!rows) return;
  const int64_t slices = ceil_div(columns, kSlice);
  Scratch scratch = device.scratch(rows * slices * sizeof(SoftmaxPartial));
  with_float_type(a.logits.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const T* logits = a.logits.template as<const T>();
    if (slices > 0)
      launch(softmax_partials_kernel<T>, static_cast<unsigned>(rows * slices), kBlock, 0,
             stream_of(device), logits, a.targets.template as<const int32_t>(), columns, slices,
             static_cast<float>(1 / a.temperature), extra, scratch.as<SoftmaxPartial>());
    finish(logits, scratch.as<const SoftmaxPartial>(), slices);
  });
}

float* extra_result(const TokenLogProbsArgs& a) {
  return (a.entropy ? a.entropy : a.squared_probs).as<float>();
}

unsigned row_blocks(int64_t rows) { return static_cast<unsigned>(ceil_div(rows, kRows)); }

}  // namespace

void token_log_probs(const TokenLogProbsArgs& a, Device& device) {
  const int64_t rows = a.logits.shape[0], columns = a.logits.shape[1];
  with_partials(a, extra_of(a), device,
                [&]<class T>(const T* logits, const SoftmaxPartial* partials, int64_t slices) {
                  launch(finish_rows_kernel<T>, row_blocks(rows), kRows, 0, stream_of(device),
                         logits, columns, a.targets.as<const int32_t>(), partials, rows, columns,
                         slices, 1 / a.temperature, extra_of(a), a.log_probs.as<float>(),
                         a.stats.as<float2>(), extra_result(a), a.fault);
                });
}

void token_log_probs_shard(const TokenLogProbsShardArgs& a, Device& device) {
  const int64_t rows = a.logits.shape[0], columns = a.logits.shape[1];
  with_partials(a, a.moment ? SoftmaxExtra::moment : SoftmaxExtra::none, device,
                [&]<class T>(const T* logits, const SoftmaxPartial* partials, int64_t slices) {
                  launch(finish_shard_kernel<T>, row_blocks(rows), kRows, 0, stream_of(device),
                         logits, a.targets.as<const int32_t>(), partials, rows, columns, slices,
                         1 / a.temperature, a.vocab_offset, a.stats.as<float2>(),
                         a.target_logit.as<float>(), a.moment.as<float>(), a.fault);
                });
}

void merge_log_probs(const MergeLogProbsArgs& a, Device& device) {
  const int64_t rows = a.log_probs.size();
  if (!rows) return;
  std::vector<const float*> table;
  for (const auto* list : {&a.stats, &a.target_logit, &a.moment})
    for (const In& t : *list) table.push_back(t.as<const float>());
  Scratch scratch = device.scratch(table.size() * sizeof(float*));
  device.upload(scratch.as<void>(), table.data(), table.size() * sizeof(float*));
  launch(merge_shards_kernel, row_blocks(rows), kRows, 0, stream_of(device),
         scratch.as<const float* const>(), static_cast<int>(a.stats.size()), !a.moment.empty(),
         rows, a.log_probs.as<float>(), a.merged.as<float2>(), a.entropy.as<float>());
}

void finish_log_probs(const TokenLogProbsArgs& a, int64_t columns, const SoftmaxPartial* partials,
                      int64_t spans, const float* target_logits, Device& device) {
  const int64_t rows = a.targets.shape[0];
  launch(finish_rows_kernel<float>, row_blocks(rows), kRows, 0, stream_of(device), target_logits,
         int64_t{0}, a.targets.as<const int32_t>(), partials, rows, columns, spans,
         1 / a.temperature, extra_of(a), a.log_probs.as<float>(), a.stats.as<float2>(),
         extra_result(a), a.fault);
}

namespace {

template <class T, class D>
void logit_gradient(const TokenLogProbsBackwardArgs& a, const float* scale, D* d_logits,
                    int64_t stride, Device& device) {
  const int64_t rows = a.logits.shape[0], columns = a.logits.shape[1];
  if (!rows || !columns) return;
  LogitGradient s;
  s.targets = a.targets.as<const int32_t>();
  s.stats = a.stats.as<const float>();
  s.d_log_probs = a.d_log_probs.as<const float>();
  s.entropy = a.entropy.as<const float>();
  s.d_entropy = a.d_entropy.as<const float>();
  s.columns = columns;
  s.tiles = ceil_div(columns, kTile);
  s.vocab_offset = a.vocab_offset;
  s.d_stride = stride;
  s.inv_temperature = 1 / a.temperature;
  s.scale = scale;
  s.shard = a.shard;
  s.fault = a.fault;
  launch(logit_gradient_kernel<T, D>, static_cast<unsigned>(rows * s.tiles), kBlock, 0,
         stream_of(device), a.logits.as<const T>(), d_logits, s);
}

}  // namespace

void token_log_probs_backward(const TokenLogProbsBackwardArgs& a, Device& device) {
  with_float_type(a.logits.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    logit_gradient<T>(a, nullptr, a.d_logits.as<T>(), a.logits.shape[1], device);
  });
}

template <class T>
void scaled_logit_gradient(const TokenLogProbsBackwardArgs& a, const float* scale, T* d_logits,
                           int64_t stride, Device& device) {
  logit_gradient<float>(a, scale, d_logits, stride, device);
}
template void scaled_logit_gradient(const TokenLogProbsBackwardArgs&, const float*, __half*,
                                    int64_t, Device&);
template void scaled_logit_gradient(const TokenLogProbsBackwardArgs&, const float*, __nv_bfloat16*,
                                    int64_t, Device&);

}  // namespace p2r::cuda
