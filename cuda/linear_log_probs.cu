// Chunk by chunk of rows. Where tensor cores take the products (cuda/gemm/gemm.cuh), the first
// one's epilogue keeps each row's running maximum and sums over spans of the vocabulary, and the
// logits reach memory only where a gradient follows; then dz, scaled and in 16 bits, goes through
// the two other products. Elsewhere a chunk's logits are made in f32, the kernels of log_probs.cu
// work on them, and dz takes their place. The loss differs from the gradient of given slopes only
// in what stands between: its logits have their log-probabilities first, and policy_loss.cu makes
// the slopes.
//
// What the gradient costs beside its products, [16384, 2560] x [151936, 2560] on an H200: a chunk
// of 1024 rows writes and reads 0.62 GB of logits and 0.31 GB of dz three times, and reads and
// writes 1.56 GB of dweight, 5 GB in all: 1.2 ms, most of which passes under 3.6 ms of products at
// 660 TFLOP/s. Not hidden are the pass from logits to dz, 0.22 ms, and what of dweight's reading
// the epilogue waits for, some 5000 cycles of 21 000 in a product of 1024 deep, 0.25 ms. Predicted
// for linear_policy_loss: 16 x 4.1 = 66 ms, against a floor of 48 (6 NVC at 790 TFLOP/s). The aim
// is 60: multicast between two blocks (cuda/gemm/wgmma.cuh) would bring the products to 3.3 ms.
#include "cuda/gemm/gemm.cuh"
#include "cuda/linear.cuh"
#include "cuda/log_probs.cuh"
#include "ops/linear_log_probs.h"

namespace p2r::cuda {

void token_log_probs(const TokenLogProbsArgs& a, Device& device);
void token_log_probs_backward(const TokenLogProbsBackwardArgs& a, Device& device);
void policy_loss(const PolicyLossArgs& a, Device& device);

namespace {

constexpr int kBlock = 256;

// What tells whether a row takes part in a gradient.
struct Parts {
  const int32_t* targets;
  const float *d_log_probs, *d_entropy;  // the latter may be null

  __device__ __forceinline__ bool has(int64_t row) const {
    return targets[row] != kSkippedTarget &&
           (d_log_probs[row] != 0 || (d_entropy && d_entropy[row] != 0));
  }
};

// to = from where a row takes part, else 0: 0 times what stands there could be NaN. A row with a
// wrong target takes part, by dz = NaN.
template <class T>
__global__ void __launch_bounds__(kBlock)
    taken_rows_kernel(const T* from, T* to, Parts parts, int64_t rows, int64_t channels) {
  for (int64_t e = blockIdx.x * int64_t{kBlock} + threadIdx.x; e < rows * channels;
       e += int64_t{gridDim.x} * kBlock)
    to[e] = parts.has(e / channels) ? from[e] : from_float<T>(0);
}

// scale[0]: the power of two by which the largest slope of a row is brought to 512 .. 1024, so that
// dz keeps its digits in f16 too, whose smallest numbers p can fall far below; scale[1] = 1 /
// scale[0].
__global__ void __launch_bounds__(kBlock)
    slope_scale_kernel(Parts parts, int64_t rows, float inverse, float* scale) {
  SMEM_ARRAY(float, largest, kBlock);
  float own = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kBlock)
    if (parts.has(i)) {
      own = fmaxf(own, fabsf(parts.d_log_probs[i] * inverse));
      if (parts.d_entropy) own = fmaxf(own, fabsf(parts.d_entropy[i] * inverse));
    }
  largest[threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kBlock; ++i) own = fmaxf(own, largest[i]);
  int exponent = 0;
  if (own > 0 && own < INFINITY) exponent = 9 - ilogbf(own);
  exponent = exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
  scale[0] = ldexpf(1.0f, exponent);
  scale[1] = ldexpf(1.0f, -exponent);
}

// The epilogue of the logits (cuda/gemm/tiles.cuh): over the columns of a span, each row's sums;
// the target's logit; and the logits themselves, if they are wanted. Which lane sums which column,
// and when, depends on the column alone.
struct Logits {
  gemm_tiles::Store<float> store;  // to nowhere without a place to
  Bias bias;
  const int32_t* targets;
  float* target_logits;  // [m]
  Sums* sums;            // [m, spans]
  int64_t spans;
  float inverse;
  bool moments;

  struct State {
    Sums row[2];
  };

  __device__ __forceinline__ void begin(State& state) const {
    state.row[0] = state.row[1] = {-INFINITY, 0, 0};
  }

  template <int count>
  __device__ __forceinline__ void tile(State& state, float (&z)[count],
                                       const gemm_tiles::Place& at) const {
    const int64_t past = store.n - at.column;
    const int left = past < 2 * count ? static_cast<int>(past) : 2 * count;
    if (bias.data) {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const int j = 8 * (i / 4) + i % 2;
        if (j < left) z[i] += bias[at.column + j];
      }
    }
    if (store.c) {
      gemm_tiles::Store<float>::State none;
      store.tile(none, z, at);
    }
    if (left < 2 * count) {
#pragma unroll
      for (int i = 0; i < count; ++i)
        if (8 * (i / 4) + i % 2 >= left) z[i] = -INFINITY;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = at.row + 8 * half;
      const int64_t target = row < store.m ? targets[row] - at.column : -1;
      if (target >= 0 && target < left) {
#pragma unroll
        for (int i = 2 * half; i < count; i += i % 2 ? 3 : 1)
          if (8 * (i / 4) + i % 2 == target) target_logits[row] = z[i];
      }
      Sums& own = state.row[half];
      float top = own.maximum;
#pragma unroll
      for (int g = 0; g < count; g += 4)
        top = fmaxf(top, fmaxf(z[g + 2 * half], z[g + 2 * half + 1]));
      if (top > own.maximum) lower_to(own, top, inverse);
      own.maximum = top;
      const float from = top == -INFINITY ? 0 : top;
      // In two runs, so that additions need not wait for each other.
      float sum[2] = {0, 0};
      if (!moments) {
        const float by = inverse * kLog2e;
#pragma unroll
        for (int g = 0; g < count; g += 4)
#pragma unroll
          for (int e = 0; e < 2; ++e) sum[e] += ptx::ex2((z[g + 2 * half + e] - from) * by);
      } else {
        float moment[2] = {0, 0};
#pragma unroll
        for (int g = 0; g < count; g += 4)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float d = (z[g + 2 * half + e] - from) * inverse, p = ptx::ex2(d * kLog2e);
            sum[e] += p;
            moment[e] += p * fmaxf(d, -128.0f);
          }
        own.moment += moment[0] + moment[1];
      }
      own.sum += sum[0] + sum[1];
    }
  }

  __device__ __forceinline__ void end(State& state, const gemm_tiles::Place& at) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = at.row + 8 * half;
      merge_lanes(state.row[half], 4, inverse);  // of the four lanes that share the row
      if (threadIdx.x % 4 == 0 && row < store.m) sums[row * spans + at.span] = state.row[half];
    }
  }
};

// Rows first .. first + n of a tensor.
template <class Tensor>
Tensor rows_of(const Tensor& t, int64_t first, int64_t n) {
  if (!t) return t;
  Tensor part = t;
  const int64_t width = t.shape.rank > 1 ? t.shape[1] : 1;
  part.data = t.template as<char>() + first * width * static_cast<int64_t>(size_of(t.dtype));
  part.shape.dim[0] = n;
  return part;
}

template <class To, class From>
To as(const From& t) {
  To to;
  static_cast<View&>(to) = t;
  return to;
}

template <class Tensor>
Tensor floats(float* data, const Shape& shape) {
  Tensor t;
  t.data = data;
  t.shape = shape;
  return t;
}

// A call's head and the memory for one chunk of its rows.
template <class T, class Args>
class Chunks {
 public:
  Chunks(const Args& a, Device& device, bool logits, bool gradient)
      : a_(a),
        device_(device),
        rows_(a.hidden.shape[0]),
        columns_(a.weight.shape[0]),
        channels_(a.weight.shape[1]),
        dz_stride_(ceil_div(columns_, 8) * 8),
        tensor_cores_(on_tensor_cores(rows_, columns_, channels_, hidden_rows(0), weight())),
        most_(most_rows(logits)),
        logits_(device, logits || !tensor_cores_ ? bytes<float>(columns_) : 0),
        target_logits_(device, tensor_cores_ ? bytes<float>(1) : 0),
        sums_(device, tensor_cores_ ? bytes<Sums>(kSpans) : 0),
        dz_(device, gradient && tensor_cores_ ? bytes<T>(dz_stride_) : 0),
        scale_(device, gradient && tensor_cores_ ? 2 * sizeof(float) : 0),
        taken_(device, gradient ? bytes<T>(channels_) : 0) {}

  template <class F>
  void each(F f) {
    for (first_ = 0; first_ < rows_; first_ += most_) {
      n_ = std::min(most_, rows_ - first_);
      f();
    }
  }

  // This chunk's rows of a tensor.
  template <class Tensor>
  Tensor part(const Tensor& t) const {
    return rows_of(t, first_, n_);
  }

  // Log-probabilities, stats and entropy, of which `args` has the chunk's places; and the logits.
  void forward(TokenLogProbsArgs& args) {
    args.targets = part(a_.targets);
    args.temperature = a_.temperature;
    args.fault = a_.fault;
    if constexpr (ptx::is_half<T>) {
      if (tensor_cores_) return forward_on_tensor_cores(args);
    }
    make_logits();
    args.logits = floats<In>(logits_.template as<float>(), {n_, columns_});
    token_log_probs(args, device_);
  }

  void make_logits() {
    gemm<Along::k, Along::k>(device_, Gemm<T, T, float>{.m = n_,
                                                        .n = columns_,
                                                        .k = channels_,
                                                        .a = hidden_rows(first_),
                                                        .b = weight(),
                                                        .c = logits_.template as<float>(),
                                                        .c_row_stride = columns_,
                                                        .bias = {a_.bias.data, a_.bias.dtype},
                                                        .whole_k = true});
  }

  // From the logits, the gradients of hidden, weight and bias; `args` has the chunk's stats and
  // slopes.
  void backward(TokenLogProbsBackwardArgs& args) {
    args.logits = floats<In>(logits_.template as<float>(), {n_, columns_});
    args.targets = part(a_.targets);
    args.temperature = a_.temperature;
    args.fault = a_.fault;
    const Parts parts = {args.targets.as<const int32_t>(), args.d_log_probs.as<const float>(),
                         args.d_entropy.as<const float>()};
    if constexpr (ptx::is_half<T>) {
      if (tensor_cores_) {
        float* scale = scale_.template as<float>();
        launch(slope_scale_kernel, 1, kBlock, 0, stream_of(device_), parts, n_,
               static_cast<float>(1 / a_.temperature), scale);
        scaled_slopes(args, scale, dz_.template as<T>(), dz_stride_, device_);
        return multiply(parts, dz_.template as<const T>(), dz_stride_, scale + 1);
      }
    }
    args.d_logits = floats<Out>(logits_.template as<float>(), {n_, columns_});
    token_log_probs_backward(args, device_);
    multiply(parts, logits_.template as<const float>(), columns_, nullptr);
  }

 private:
  static constexpr int64_t kSpans = 128;

  void forward_on_tensor_cores(const TokenLogProbsArgs& args) {
    const int64_t spans = std::min(kSpans, ceil_div(columns_, tile_columns(device_)));
    multiply_tiles<Along::k, Along::k>(
        device_, n_, columns_, channels_, hidden_rows(first_), weight(), spans, 1,
        Logits{{logits_.template as<float>(), n_, columns_, columns_, 0, false, {}, nullptr},
               {a_.bias.data, a_.bias.dtype},
               args.targets.as<const int32_t>(),
               target_logits_.template as<float>(),
               sums_.template as<Sums>(),
               spans,
               static_cast<float>(1 / a_.temperature),
               bool(args.entropy)});
    finish_log_probs(args, columns_, sums_.template as<const Sums>(), spans,
                     target_logits_.template as<const float>(), device_);
  }

  // The chunk's part in the gradients; dz counts `scale` times.
  template <class Z>
  void multiply(const Parts& parts, const Z* dz, int64_t stride, const float* scale) {
    const View weight_to = a_.into_weight ? View(a_.into_weight) : View(a_.d_weight);
    const View bias_to = a_.into_bias ? View(a_.into_bias) : View(a_.d_bias);
    T* d_hidden = a_.d_hidden.template as<T>() + first_ * channels_;
    T* taken = taken_.template as<T>();
    const auto take = [&](const T* from, T* to) {
      launch(taken_rows_kernel<T>, blocks_for(n_ * channels_, kBlock), kBlock, 0,
             stream_of(device_), from, to, parts, n_, channels_);
    };
    take(hidden_rows(first_).data, taken);
    gemm<Along::k, Along::mn>(device_, Gemm<Z, T, T>{.m = n_,
                                                     .n = channels_,
                                                     .k = columns_,
                                                     .a = {dz, stride},
                                                     .b = weight(),
                                                     .c = d_hidden,
                                                     .c_row_stride = channels_,
                                                     .scale = scale});
    take(d_hidden, d_hidden);
    gemm<Along::mn, Along::mn>(device_,
                               Gemm<Z, T, float>{.m = columns_,
                                                 .n = channels_,
                                                 .k = n_,
                                                 .a = {dz, stride},
                                                 .b = {taken, channels_},
                                                 .c = weight_to.as<float>(),
                                                 .c_row_stride = channels_,
                                                 .accumulate = a_.into_weight || first_ > 0,
                                                 .scale = scale});
    if (bias_to)
      column_sums(device_, dz, n_, columns_, stride, bias_to.as<float>(),
                  a_.into_bias || first_ > 0, scale);
  }

  Operand<T> hidden_rows(int64_t first) const {
    return {a_.hidden.template as<const T>() + first * channels_, channels_};
  }
  Operand<T> weight() const { return {a_.weight.template as<const T>(), channels_}; }

  // With logits in memory, 128 MB of them; on tensor cores, which would wait for dweight to be read
  // and written once a chunk, 640 MB, or 1024 rows of 151 936 columns.
  int64_t most_rows(bool logits) const {
    constexpr int64_t kMost = 4096;
    const int64_t rows = std::clamp<int64_t>(rows_, 12, kMost);
    if (tensor_cores_ && !logits) return rows;
    const int64_t budget = (tensor_cores_ ? 160 : 32) * 1024 * 1024;
    int64_t fit = budget / std::max<int64_t>(columns_, 1);
    if (tensor_cores_ && fit > kTileRows) fit -= fit % kTileRows;
    return std::clamp<int64_t>(fit, 12, rows);
  }

  template <class E>
  size_t bytes(int64_t of_row) const {
    return static_cast<size_t>(most_ * of_row) * sizeof(E);
  }

  const Args& a_;
  Device& device_;
  const int64_t rows_, columns_, channels_, dz_stride_;
  const bool tensor_cores_;
  const int64_t most_;
  const Scratch logits_, target_logits_, sums_, dz_, scale_, taken_;
  int64_t first_ = 0, n_ = 0;
};

// Without rows there is nothing to write what was not given.
template <class Args>
void clear(const Args& a, Device& device) {
  if (a.d_weight && a.d_weight.bytes()) device.zero(a.d_weight.data, a.d_weight.bytes());
  if (a.d_bias && a.d_bias.bytes()) device.zero(a.d_bias.data, a.d_bias.bytes());
}

}  // namespace

void linear_log_probs(const LinearLogProbsArgs& a, Device& device) {
  if (!a.hidden.shape[0]) return;
  with_float_type(a.hidden.dtype, [&](auto* t) {
    Chunks<std::remove_pointer_t<decltype(t)>, LinearLogProbsArgs> c(a, device, false, false);
    c.each([&] {
      TokenLogProbsArgs part;
      part.log_probs = c.part(a.log_probs);
      part.stats = c.part(a.stats);
      part.entropy = c.part(a.entropy);
      c.forward(part);
    });
  });
}

void linear_log_probs_backward(const LinearLogProbsBackwardArgs& a, Device& device) {
  if (!a.hidden.shape[0]) return clear(a, device);
  with_float_type(a.hidden.dtype, [&](auto* t) {
    Chunks<std::remove_pointer_t<decltype(t)>, LinearLogProbsBackwardArgs> c(a, device, true, true);
    c.each([&] {
      c.make_logits();
      TokenLogProbsBackwardArgs part;
      part.stats = c.part(a.stats);
      part.d_log_probs = c.part(a.d_log_probs);
      part.entropy = c.part(a.entropy);
      part.d_entropy = c.part(a.d_entropy);
      c.backward(part);
    });
  });
}

void linear_policy_loss(const LinearPolicyLossArgs& a, Device& device) {
  const int64_t rows = a.hidden.shape[0];
  const bool with_entropy = a.loss.entropy_coef != 0;
  // By token: stats, the gradient of the log-probabilities, the entropy, its gradient.
  const int64_t tokens = std::max<int64_t>(rows, 1);
  const Scratch by_token = device.scratch((with_entropy ? 5 : 3) * tokens * sizeof(float));
  float* at = by_token.as<float>();
  const Out stats = floats<Out>(at, {rows, 2});
  Out entropy;

  PolicyLossArgs loss = a.loss;
  loss.fault = a.fault;
  loss.log_probs = as<In>(a.log_probs);
  loss.d_log_probs = floats<Out>(at + 2 * tokens, {rows});
  if (with_entropy) {
    entropy = floats<Out>(at + 3 * tokens, {rows});
    loss.entropy = as<In>(entropy);
    loss.d_entropy = floats<Out>(at + 4 * tokens, {rows});
  }
  if (!rows) {
    policy_loss(loss, device);
    return clear(a, device);
  }
  device.zero(a.log_probs.data, a.log_probs.bytes());
  if (entropy) device.zero(entropy.data, entropy.bytes());
  with_float_type(a.hidden.dtype, [&](auto* t) {
    Chunks<std::remove_pointer_t<decltype(t)>, LinearPolicyLossArgs> c(a, device, true, true);
    c.each([&] {
      TokenLogProbsArgs forward;
      forward.log_probs = c.part(a.log_probs);
      forward.stats = c.part(stats);
      forward.entropy = c.part(entropy);
      c.forward(forward);
      // A token's gradient depends on its own log-probability alone, so it is right as soon as that
      // is known; the loss is right after the last chunk.
      policy_loss(loss, device);
      TokenLogProbsBackwardArgs back;
      back.stats = as<In>(forward.stats);
      back.d_log_probs = as<In>(c.part(loss.d_log_probs));
      back.entropy = as<In>(forward.entropy);
      back.d_entropy = as<In>(c.part(loss.d_entropy));
      c.backward(back);
    });
  });
}

}  // namespace p2r::cuda
