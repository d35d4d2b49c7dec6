// Log-probabilities. A block owns one slice of kSlice columns of one row, reads it once and keeps a
// running (maximum, Σ e^d, Σ e^d d) a thread, rescaled at most once a vector.
// Threads are merged by a fixed tree, slices in order by a second, tiny kernel in f64. Which thread
// sums which column depends on the column alone, so a row gives the same bits in any batch, and so
// that few rows are many blocks (10 a row of 151 936); an unaligned row (V odd) loads element by
// element in the same order. The gradient is one pass of the same shape, without a merge.
//
// What binds, on an H200 (132 SMs at some 1.7 GHz, 4.3 TB/s by copying) and bf16:
//
//   bytes in flight  4.3 TB/s is 19 bytes a clock and SM; over some 800 ns of latency 26 KB have to
//                    be under way in each SM. A thread asks for 64 bytes before it touches the
//                    first (four loads of 16), so 1024 resident threads, half of what fits, ask for
//                    64 KB.
//   forward          9.6 elements a clock and SM. Each costs a conversion, max, subtract, multiply,
//                    ex2 and add: of 128 lanes a clock that is 60 %, and of the 16 ex2 a clock 60
//                    %. Taking ex2 once more (a rescale each element) would bind, and so would
//                    little more arithmetic: the moment's two more instructions make it 80 %.
//   backward         4 bytes an element, 4.8 elements a clock: a third of the lanes.
//
// So both should run at the rate of memory: of bf16 [16384, 151936] 4.98 GB read in 1.16 ms, and
// 9.96 GB moved in 2.3. The merge reads 120 bytes a row. A prediction, which nothing here measures.
#include <cfloat>

#include "cuda/log_probs.cuh"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256, kVector = 8, kWarps = kBlock / 32;
constexpr int64_t kStride = kBlock * kVector;  // from one vector of a thread to its next
constexpr int64_t kSlice = 8 * kStride;
constexpr int64_t kTile = 4 * kStride;
constexpr int kRows = 128;  // a thread each, where rows are finished

// What a thread loads before it uses any of it: kLoads times 16 bytes.
constexpr int kLoads = 4;
template <class T>
struct Batch {
  static constexpr int words = kVector * sizeof(T) / 16, vectors = kLoads / words;
  static constexpr int64_t reach = (vectors - 1) * kStride + kVector;  // of columns
  uint4 raw[kLoads];

  __device__ __forceinline__ void load(const T* p) {
#pragma unroll
    for (int v = 0; v < vectors; ++v)
#pragma unroll
      for (int w = 0; w < words; ++w)
        raw[v * words + w] = reinterpret_cast<const uint4*>(p + v * kStride)[w];
  }
  __device__ __forceinline__ void get(int v, float (&x)[kVector]) const {
    const T* values = reinterpret_cast<const T*>(raw + v * words);
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = to_float(values[i]);
  }
};

template <class T>
__device__ __forceinline__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Eight elements from p, `pad` from the n-th on.
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

// f(x, at, whole) for this thread's vectors of columns first .. end of z: eight elements from
// column `at` on, `pad` from `end` on; `whole` where all of them are there and were loaded
// together.
template <class T, class F>
__device__ __forceinline__ void each_vector(const T* z, int64_t first, int64_t end, bool aligned,
                                            float pad, const F& f) {
  Batch<T> batch;
  for (int64_t c = first + threadIdx.x * kVector; c < end; c += batch.vectors * kStride) {
    const bool whole = aligned && end - c >= batch.reach;
    if (whole) batch.load(z + c);
#pragma unroll
    for (int v = 0; v < batch.vectors; ++v) {
      const int64_t at = c + v * kStride;
      float x[kVector];
      if (whole)
        batch.get(v, x);
      else if (at < end)
        load_vector(z + at, end - at, aligned, pad, x);
      else
        break;
      f(x, at, whole);
    }
  }
}

__device__ __forceinline__ void add_vector(Sums& a, const float (&x)[kVector], float inverse,
                                           bool moment) {
  float top = a.maximum;
#pragma unroll
  for (int i = 0; i < kVector; ++i) top = fmaxf(top, x[i]);
  if (top > a.maximum) lower_to(a, top, inverse);
  a.maximum = top;
  const float from = top == -INFINITY ? 0 : top, binary = inverse * kLog2e;
  if (moment) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float d = x[i] - from, e = ptx::ex2(d * binary);
      a.sum += e;
      a.moment += e * fmaxf(d * inverse, -128.0f);  // e is 0 there, and 0 · -inf is not
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) a.sum += ptx::ex2((x[i] - from) * binary);
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    slice_sums_kernel(const T* logits, const int32_t* targets, int64_t columns, int64_t slices,
                      float inverse, bool moment, Sums* out) {
  SMEM_ARRAY(Sums, parts, kWarps);
  const int64_t row = blockIdx.x / slices, first = blockIdx.x % slices * kSlice;
  if (targets[row] == kSkippedTarget) return;
  const T* z = logits + row * columns;
  const int64_t end = first + kSlice < columns ? first + kSlice : columns;
  Sums own = {-INFINITY, 0, 0};
  each_vector(z, first, end, is_aligned(z), -INFINITY,
              [&](float(&x)[kVector], int64_t, bool) { add_vector(own, x, inverse, moment); });
  merge_lanes(own, 32, inverse);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x < 32) {
    own = parts[threadIdx.x % kWarps];
    merge_lanes(own, kWarps, inverse);
    if (threadIdx.x == 0) out[blockIdx.x] = own;
  }
}

struct Row {
  double maximum = -INFINITY, sum = 0, moment = 0;
};

__device__ void add(Row& into, Row part, double inverse) {
  if (part.sum == 0) return;
  const double top = part.maximum > into.maximum ? part.maximum : into.maximum;
  const auto lower = [&](Row& r) {
    const double shift = (r.maximum - top) * inverse, scale = exp(shift);
    r.moment = scale == 0 ? 0 * r.moment : scale * (r.moment + shift * r.sum);
    r.sum *= scale;
  };
  lower(part);
  if (into.sum == 0)
    into = {top, part.sum, part.moment};
  else {
    lower(into);
    into = {top, into.sum + part.sum, into.moment + part.moment};
  }
}

__device__ Row whole_row(const Sums* slices, int64_t count, double inverse) {
  Row row;
  for (int64_t k = 0; k < count; ++k)
    add(row, {slices[k].maximum, slices[k].sum, slices[k].moment}, inverse);
  return row;
}

// (m, log s) with m rounded first.
__device__ float2 stats_of(const Row& row, double inverse) {
  const double maximum = row.maximum * inverse;
  const float m = static_cast<float>(maximum);
  const double residue = fabsf(m) < INFINITY ? maximum - m : 0;
  return make_float2(m, static_cast<float>(log(row.sum) + residue));
}

// With a row_stride of 0, logits has the targets' alone.
template <class T>
__global__ void __launch_bounds__(kRows)
    finish_kernel(const T* logits, int64_t row_stride, const int32_t* targets, const Sums* partials,
                  int64_t rows, int64_t columns, int64_t slices, double inverse, float* log_probs,
                  float2* stats, float* entropy, int32_t* fault) {
  const int64_t i = int64_t{blockIdx.x} * kRows + threadIdx.x;
  if (i >= rows) return;
  const int32_t target = targets[i];
  float log_prob = 0, h = 0;
  float2 s = make_float2(0, 0);
  if (target != kSkippedTarget) {
    const Row row = whole_row(partials + i * slices, slices, inverse);
    s = stats_of(row, inverse);
    const double log_sum = row.sum == 0 ? static_cast<double>(NAN) : log(row.sum);
    h = static_cast<float>(log_sum - row.moment / row.sum);
    if (row.sum == 0) s.y = NAN;
    if (target < 0 || target >= columns) {
      log_prob = h = s.x = s.y = NAN;
      ptx::raise(fault);
    } else {
      const double x = to_float(logits[row_stride ? i * row_stride + target : i]);
      log_prob = static_cast<float>((x - row.maximum) * inverse - log_sum);
    }
  }
  log_probs[i] = log_prob;
  stats[i] = s;
  if (entropy) entropy[i] = h;
}

template <class T>
__global__ void __launch_bounds__(kRows)
    finish_shard_kernel(const T* logits, const int32_t* targets, const Sums* partials, int64_t rows,
                        int64_t columns, int64_t slices, double inverse, int64_t vocab_offset,
                        float2* stats, float* target_logit, float* moment, int32_t* fault) {
  const int64_t i = int64_t{blockIdx.x} * kRows + threadIdx.x;
  if (i >= rows) return;
  const int32_t target = targets[i];
  const int64_t local = target - vocab_offset;
  Row row;
  float x = 0;
  if (target != kSkippedTarget) {
    row = whole_row(partials + i * slices, slices, inverse);
    x = local < 0 || local >= columns
            ? -INFINITY
            : static_cast<float>(to_float(logits[i * columns + local]) * inverse);
  }
  float2 s = stats_of(row, inverse);
  const double shift = row.sum == 0 ? 0 : row.maximum * inverse - s.x;
  float t = static_cast<float>(exp(shift) * (row.moment + shift * row.sum));
  if (target < 0 && target != kSkippedTarget) {
    x = t = s.x = s.y = NAN;
    ptx::raise(fault);
  }
  stats[i] = s;
  target_logit[i] = x;
  if (moment) moment[i] = t;
}

__global__ void __launch_bounds__(kRows)
    merge_kernel(const float* const* table, int shards, bool moments, int64_t rows,
                 float* log_probs, float2* merged_stats, float* entropy) {
  const int64_t i = int64_t{blockIdx.x} * kRows + threadIdx.x;
  if (i >= rows) return;
  Row row;
  double target = -INFINITY;
  for (int k = 0; k < shards; ++k) {
    const float* stats = table[k] + 2 * i;
    const double moment = moments ? table[2 * shards + k][i] : 0;
    add(row, {stats[0], exp(static_cast<double>(stats[1])), moment}, 1);
    const double x = table[shards + k][i];
    if (!(x <= target)) target = x;
  }
  float log_prob = 0, h = 0;
  float2 s = make_float2(0, 0);
  if (row.sum != 0) {
    s = stats_of(row, 1);
    const double log_sum = log(row.sum);
    log_prob = static_cast<float>((target - row.maximum) - log_sum);
    h = static_cast<float>(log_sum - row.moment / row.sum);
  } else if (target == -INFINITY) {  // no probability anywhere; else the row was skipped
    log_prob = h = s.y = NAN;
    s.x = -INFINITY;
  }
  log_probs[i] = log_prob;
  merged_stats[i] = s;
  if (entropy) entropy[i] = h;
}

struct Slopes {
  const int32_t* targets;
  const float *stats, *d_log_probs, *entropy, *d_entropy;
  int64_t columns, tiles, vocab_offset, d_stride;
  double inverse;
  const float* scale;  // of the gradient; none is 1
  bool shard;
  int32_t* fault;
};

template <class T, class D>
__global__ void __launch_bounds__(kBlock) slopes_kernel(const T* logits, D* d_logits, Slopes a) {
  const int64_t row = blockIdx.x / a.tiles, first = blockIdx.x % a.tiles * kTile;
  const int64_t end = first + kTile < a.columns ? first + kTile : a.columns;
  // Rows of dz that are longer end in zeros.
  const int64_t stored = end < a.columns ? end : a.d_stride;
  const T* z = logits + row * a.columns;
  D* dz = d_logits + row * a.d_stride;
  const bool aligned = is_aligned(z) && is_aligned(dz);
  const int32_t target = a.targets[row];
  const int64_t label = target - a.vocab_offset;
  const bool wrong = target != kSkippedTarget && (target < 0 || (!a.shard && label >= a.columns));
  const double scale = a.scale ? a.inverse * *a.scale : a.inverse;
  const double g = a.d_log_probs[row] * scale;
  const double h = a.d_entropy ? a.d_entropy[row] * scale : 0;
  if (wrong || target == kSkippedTarget || (g == 0 && h == 0)) {
    if (wrong && threadIdx.x == 0) ptx::raise(a.fault);
    float x[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = wrong ? NAN : 0;
    for (int64_t c = first + threadIdx.x * kVector; c < end; c += kStride)
      store_vector(dz + c, stored - c, aligned, x);
    return;
  }

  const float inverse = static_cast<float>(a.inverse);
  const float inverse_low = static_cast<float>(a.inverse - inverse);
  const float maximum = a.stats[2 * row], log_sum = a.stats[2 * row + 1];
  const double entropy = h != 0 ? a.entropy[row] : 0;
  const float scale_p = static_cast<float>(-g - h * entropy), scale_h = static_cast<float>(-h);
  const auto slopes = [&](float(&x)[kVector], int64_t at) {
    const int64_t own = label - at;  // the target's place in this vector, if it is there
    float at_label = 0;
    if (own >= 0 && own < kVector) {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (i == own) at_label = x[i];
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      float log_p = fmaf(x[i], inverse, -maximum);
      // The low part of the product is of a finite x: -inf times 0 is not 0.
      log_p += inverse_low == 0 ? -log_sum : fmaf(fmaxf(x[i], -FLT_MAX), inverse_low, -log_sum);
      const float p = ptx::ex2(log_p * kLog2e);
      x[i] = p * (scale_h == 0 ? scale_p : scale_p + scale_h * fmaxf(log_p, -128.0f));
    }
    if (own >= 0 && own < kVector) {  // g (1 - p), without the cancellation near p = 1
      const double log_p = (at_label * a.inverse - maximum) - log_sum, p = exp(log_p);
      const double slope = -g * expm1(log_p) - (p == 0 ? 0 : h * p * (log_p + entropy));
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (i == own) x[i] = static_cast<float>(slope);
    }
  };
  each_vector(z, first, end, aligned, 0, [&](float(&x)[kVector], int64_t at, bool whole) {
    slopes(x, at);
    if (!whole) {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (at + i >= a.columns) x[i] = 0;
    }
    store_vector(dz + at, stored - at, aligned, x);
  });
}

// Sums the slices of the rows' logits; finish(logits, sums, slices) turns them into results.
template <class Args, class F>
void sum_rows(const Args& a, bool moment, Device& device, const F& finish) {
  const int64_t rows = a.logits.shape[0], columns = a.logits.shape[1];
  if (!rows) return;
  const int64_t slices = ceil_div(columns, kSlice);
  Scratch scratch = device.scratch(rows * slices * sizeof(Sums));
  with_float_type(a.logits.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const T* logits = a.logits.template as<const T>();
    if (slices > 0)
      launch(slice_sums_kernel<T>, static_cast<unsigned>(rows * slices), kBlock, 0,
             stream_of(device), logits, a.targets.template as<const int32_t>(), columns, slices,
             static_cast<float>(1 / a.temperature), moment, scratch.as<Sums>());
    finish(logits, scratch.as<const Sums>(), slices);
  });
}

unsigned row_blocks(int64_t rows) { return static_cast<unsigned>(ceil_div(rows, kRows)); }

}  // namespace

void token_log_probs(const TokenLogProbsArgs& a, Device& device) {
  const int64_t rows = a.logits.shape[0], columns = a.logits.shape[1];
  sum_rows(
      a, bool(a.entropy), device, [&]<class T>(const T* logits, const Sums* sums, int64_t slices) {
        launch(finish_kernel<T>, row_blocks(rows), kRows, 0, stream_of(device), logits, columns,
               a.targets.as<const int32_t>(), sums, rows, columns, slices, 1 / a.temperature,
               a.log_probs.as<float>(), a.stats.as<float2>(), a.entropy.as<float>(), a.fault);
      });
}

void token_log_probs_shard(const TokenLogProbsShardArgs& a, Device& device) {
  const int64_t rows = a.logits.shape[0], columns = a.logits.shape[1];
  sum_rows(a, bool(a.moment), device,
           [&]<class T>(const T* logits, const Sums* sums, int64_t slices) {
             launch(finish_shard_kernel<T>, row_blocks(rows), kRows, 0, stream_of(device), logits,
                    a.targets.as<const int32_t>(), sums, rows, columns, slices, 1 / a.temperature,
                    a.vocab_offset, a.stats.as<float2>(), a.target_logit.as<float>(),
                    a.moment.as<float>(), a.fault);
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
  launch(merge_kernel, row_blocks(rows), kRows, 0, stream_of(device),
         scratch.as<const float* const>(), static_cast<int>(a.stats.size()), !a.moment.empty(),
         rows, a.log_probs.as<float>(), a.merged.as<float2>(), a.entropy.as<float>());
}

void finish_log_probs(const TokenLogProbsArgs& a, int64_t columns, const Sums* sums, int64_t spans,
                      const float* target_logits, Device& device) {
  const int64_t rows = a.targets.shape[0];
  launch(finish_kernel<float>, row_blocks(rows), kRows, 0, stream_of(device), target_logits,
         int64_t{0}, a.targets.as<const int32_t>(), sums, rows, columns, spans, 1 / a.temperature,
         a.log_probs.as<float>(), a.stats.as<float2>(), a.entropy.as<float>(), a.fault);
}

namespace {

template <class T, class D>
void slopes(const TokenLogProbsBackwardArgs& a, const float* scale, D* d_logits, int64_t stride,
            Device& device) {
  const int64_t rows = a.logits.shape[0], columns = a.logits.shape[1];
  if (!rows || !columns) return;
  Slopes s;
  s.targets = a.targets.as<const int32_t>();
  s.stats = a.stats.as<const float>();
  s.d_log_probs = a.d_log_probs.as<const float>();
  s.entropy = a.entropy.as<const float>();
  s.d_entropy = a.d_entropy.as<const float>();
  s.columns = columns;
  s.tiles = ceil_div(columns, kTile);
  s.vocab_offset = a.vocab_offset;
  s.d_stride = stride;
  s.inverse = 1 / a.temperature;
  s.scale = scale;
  s.shard = a.shard;
  s.fault = a.fault;
  launch(slopes_kernel<T, D>, static_cast<unsigned>(rows * s.tiles), kBlock, 0, stream_of(device),
         a.logits.as<const T>(), d_logits, s);
}

}  // namespace

void token_log_probs_backward(const TokenLogProbsBackwardArgs& a, Device& device) {
  with_float_type(a.logits.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    slopes<T>(a, nullptr, a.d_logits.as<T>(), a.logits.shape[1], device);
  });
}

template <class T>
void scaled_slopes(const TokenLogProbsBackwardArgs& a, const float* scale, T* d_logits,
                   int64_t stride, Device& device) {
  slopes<float>(a, scale, d_logits, stride, device);
}
template void scaled_slopes(const TokenLogProbsBackwardArgs&, const float*, __half*, int64_t,
                            Device&);
template void scaled_slopes(const TokenLogProbsBackwardArgs&, const float*, __nv_bfloat16*, int64_t,
                            Device&);

}  // namespace p2r::cuda
