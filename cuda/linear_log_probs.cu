// Log-probabilities and the policy loss under a linear head, in chunks of rows. On tensor cores
// (cuda/gemm/gemm.cuh) the epilogue of the logits' GEMM keeps an online softmax of each row over
// spans of the vocabulary, and logits are stored only for a backward pass; that computes dz, scaled
// and in 16 bits, for the two other GEMMs. Otherwise a chunk's logits are stored in f32, the
// kernels of log_probs.cu read them, and dz overwrites them. The policy loss is forward and
// backward chunk by chunk, with the kernels of policy_loss.cu between for the log-probabilities'
// gradients.
//
// What the gradient costs beside its GEMMs, [16384, 2560] x [151936, 2560] on an H200: a chunk of
// 1024 rows writes and reads 0.62 GB of logits, writes 0.31 GB of dz and reads it twice, and reads
// and writes 1.56 GB of dweight, 5 GB in all: 1.2 ms, most of it overlapped with 3.6 ms of GEMMs at
// 660 TFLOP/s. Not overlapped are the pass from logits to dz, 0.22 ms, and what the epilogue waits
// for dweight's loads, some 5000 of the 21 000 cycles of a tile with k = 1024, 0.25 ms. Predicted
// for linear_policy_loss: 16 x 4.1 = 66 ms, against a lower bound of 48 (6 NVC at 790 TFLOP/s). The
// goal is 60: TMA multicast between two blocks (cuda/gemm/wgmma.cuh) would bring the GEMMs to 3.3
// ms.
#include "cuda/gemm/gemm.cuh"
#include "cuda/linear.cuh"
#include "cuda/log_probs.cuh"
#include "cuda/workspace.h"
#include "ops/linear_log_probs.h"

namespace p2r::cuda {

void token_log_probs(const TokenLogProbsArgs& a, Device& device);
void token_log_probs_backward(const TokenLogProbsBackwardArgs& a, Device& device);
void policy_loss(const PolicyLossArgs& a, Device& device);

namespace {

constexpr int kBlock = 256;

// The gradients with respect to each row's log-probability and entropy.
struct RowGradients {
  const int32_t* targets;
  const float *d_log_probs, *d_entropy;  // d_entropy may be null

  __device__ __forceinline__ bool has_gradient(int64_t row) const {
    return targets[row] != kSkippedTarget &&
           (d_log_probs[row] != 0 || (d_entropy && d_entropy[row] != 0));
  }
};

// Copies the rows that have a gradient and stores 0 for the others, whose values could be NaN,
// which times 0 is NaN. A row with an invalid target has a gradient: its dz is NaN.
template <class T>
__global__ void __launch_bounds__(kBlock)
    masked_copy_kernel(const T* source, T* destination, RowGradients gradients, int64_t rows,
                       int64_t channels) {
  for (int64_t e = blockIdx.x * int64_t{kBlock} + threadIdx.x; e < rows * channels;
       e += int64_t{gridDim.x} * kBlock)
    destination[e] = gradients.has_gradient(e / channels) ? source[e] : from_float<T>(0);
}

// scale[0]: the power of two that brings the largest gradient of a row to 512 .. 1024, as in loss
// scaling: dz = g p keeps its digits in f16, although p can be far below f16's smallest number.
// scale[1] = 1 / scale[0].
__global__ void __launch_bounds__(kBlock)
    gradient_scale_kernel(RowGradients gradients, int64_t rows, float inv_temperature,
                          float* scale) {
  SMEM_ARRAY(float, thread_max, kBlock);
  float own = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kBlock)
    if (gradients.has_gradient(i)) {
      own = fmaxf(own, fabsf(gradients.d_log_probs[i] * inv_temperature));
      if (gradients.d_entropy) own = fmaxf(own, fabsf(gradients.d_entropy[i] * inv_temperature));
    }
  thread_max[threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kBlock; ++i) own = fmaxf(own, thread_max[i]);
  int exponent = 0;
  if (own > 0 && own < INFINITY) exponent = 9 - ilogbf(own);
  exponent = exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
  scale[0] = ldexpf(1.0f, exponent);
  scale[1] = ldexpf(1.0f, -exponent);
}

// The epilogue of the logits' GEMM (cuda/gemm/tiles.cuh): each row's online softmax over the
// columns of a span, the target's logit, and optionally the logits. Which lane sums which column,
// and when, depends on the column alone.
struct LogitsEpilogue {
  gemm_tiles::StoreEpilogue<float> store;  // stores nothing if store.c is null
  Bias bias;
  const int32_t* targets;
  float* target_logits;      // [m]
  SoftmaxPartial* partials;  // [m, spans]
  int64_t spans;
  float inv_temperature;
  bool moments;

  struct State {
    SoftmaxPartial row[2];
  };

  __device__ __forceinline__ void begin(State& state) const {
    state.row[0] = state.row[1] = {-INFINITY, 0, 0};
  }

  template <int count>
  __device__ __forceinline__ void tile(State& state, float (&z)[count],
                                       const gemm_tiles::FragmentCoord& at) const {
    const int64_t remaining = store.n - at.column;
    const int left = remaining < 2 * count ? static_cast<int>(remaining) : 2 * count;
    if (bias.data) {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const int j = 8 * (i / 4) + i % 2;
        if (j < left) z[i] += bias[at.column + j];
      }
    }
    if (store.c) {
      gemm_tiles::StoreEpilogue<float>::State none;
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
      SoftmaxPartial& own = state.row[half];
      float max = own.max;
#pragma unroll
      for (int g = 0; g < count; g += 4)
        max = fmaxf(max, fmaxf(z[g + 2 * half], z[g + 2 * half + 1]));
      if (max > own.max) rescale(own, max, inv_temperature);
      own.max = max;
      const float reference = max == -INFINITY ? 0 : max;
      // Two sums, for two independent chains of additions.
      float sum[2] = {0, 0};
      if (!moments) {
        const float scale_log2 = inv_temperature * kLog2e;
#pragma unroll
        for (int g = 0; g < count; g += 4)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            sum[e] += ptx::ex2((z[g + 2 * half + e] - reference) * scale_log2);
      } else {
        float moment[2] = {0, 0};
#pragma unroll
        for (int g = 0; g < count; g += 4)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float d = (z[g + 2 * half + e] - reference) * inv_temperature,
                        p = ptx::ex2(d * kLog2e);
            sum[e] += p;
            moment[e] += p * fmaxf(d, -128.0f);
          }
        own.moment += moment[0] + moment[1];
      }
      own.sum += sum[0] + sum[1];
    }
  }

  __device__ __forceinline__ void end(State& state, const gemm_tiles::FragmentCoord& at) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = at.row + 8 * half;
      merge_lanes(state.row[half], 4, inv_temperature);  // of the four lanes that share the row
      if (threadIdx.x % 4 == 0 && row < store.m) partials[row * spans + at.span] = state.row[half];
    }
  }
};

// Rows [first, first + n) of a tensor.
template <class Tensor>
Tensor rows_of(const Tensor& t, int64_t first, int64_t n) {
  if (!t) return t;
  Tensor part = t;
  const int64_t width = t.shape.rank > 1 ? t.shape[1] : 1;
  part.data = t.element(first * width);
  part.shape.dim[0] = n;
  return part;
}

template <class To, class From>
To view_as(const From& t) {
  To to;
  static_cast<View&>(to) = t;
  return to;
}

template <class Tensor>
Tensor f32_tensor(float* data, const Shape& shape) {
  Tensor t;
  t.data = data;
  t.shape = shape;
  return t;
}

// The linear head of a call, with temporary memory for one chunk of its rows.
template <class T, class Args>
class ChunkedHead {
 public:
  ChunkedHead(const Args& a, Device& device, bool logits, bool gradient)
      : a_(a),
        device_(device),
        rows_(a.hidden.shape[0]),
        columns_(a.weight.shape[0]),
        channels_(a.weight.shape[1]),
        dz_stride_(round_up(columns_, 8)),
        tensor_cores_(on_tensor_cores(rows_, columns_, channels_, hidden_rows(0), weight())),
        chunk_rows_(max_chunk_rows(logits)),
        logits_(device, logits || !tensor_cores_ ? chunk_bytes<float>(columns_) : 0),
        target_logits_(device, tensor_cores_ ? chunk_bytes<float>(1) : 0),
        partials_(device, tensor_cores_ ? chunk_bytes<SoftmaxPartial>(kSpans) : 0),
        dz_(device, gradient && tensor_cores_ ? chunk_bytes<T>(dz_stride_) : 0),
        scale_(device, gradient && tensor_cores_ ? 2 * sizeof(float) : 0),
        masked_hidden_(device, gradient ? chunk_bytes<T>(channels_) : 0) {}

  template <class F>
  void for_each_chunk(F f) {
    for (first_ = 0; first_ < rows_; first_ += chunk_rows_) {
      chunk_ = std::min(chunk_rows_, rows_ - first_);
      f();
    }
  }

  // This chunk's rows of a tensor.
  template <class Tensor>
  Tensor chunk_of(const Tensor& t) const {
    return rows_of(t, first_, chunk_);
  }

  // Computes the chunk's log-probabilities, stats and entropy, into the outputs of `args`, and the
  // logits.
  void forward(TokenLogProbsArgs& args) {
    args.targets = chunk_of(a_.targets);
    args.temperature = a_.temperature;
    args.fault = a_.fault.from(first_);
    if constexpr (ptx::is_half<T>) {
      if (tensor_cores_) return forward_on_tensor_cores(args);
    }
    compute_logits();
    args.logits = f32_tensor<In>(logits_.template as<float>(), {chunk_, columns_});
    token_log_probs(args, device_);
  }

  void compute_logits() {
    gemm<Major::k, Major::k>(device_, Gemm<T, T, float>{.m = chunk_,
                                                        .n = columns_,
                                                        .k = channels_,
                                                        .a = hidden_rows(first_),
                                                        .b = weight(),
                                                        .c = logits_.template as<float>(),
                                                        .c_row_stride = columns_,
                                                        .bias = {a_.bias.data, a_.bias.dtype},
                                                        .split_k = false});
  }

  // The gradients of hidden, weight and bias from the chunk's logits, and its stats and gradients
  // in `args`.
  void backward(TokenLogProbsBackwardArgs& args) {
    args.logits = f32_tensor<In>(logits_.template as<float>(), {chunk_, columns_});
    args.targets = chunk_of(a_.targets);
    args.temperature = a_.temperature;
    args.fault = a_.fault.from(first_);
    const RowGradients gradients = {args.targets.as<const int32_t>(),
                                    args.d_log_probs.as<const float>(),
                                    args.d_entropy.as<const float>()};
    if constexpr (ptx::is_half<T>) {
      if (tensor_cores_) {
        float* scale = scale_.template as<float>();
        launch(gradient_scale_kernel, 1, kBlock, 0, stream_of(device_), gradients, chunk_,
               static_cast<float>(1 / a_.temperature), scale);
        scaled_logit_gradient(args, scale, dz_.template as<T>(), dz_stride_, device_);
        return gradient_gemms(gradients, dz_.template as<const T>(), dz_stride_, scale + 1);
      }
    }
    args.d_logits = f32_tensor<Out>(logits_.template as<float>(), {chunk_, columns_});
    token_log_probs_backward(args, device_);
    gradient_gemms(gradients, logits_.template as<const float>(), columns_, nullptr);
  }

 private:
  static constexpr int64_t kSpans = 128;

  void forward_on_tensor_cores(const TokenLogProbsArgs& args) {
    const int64_t spans = std::min(kSpans, ceil_div(columns_, tile_columns(device_)));
    multiply_tiles<Major::k, Major::k>(
        device_, chunk_, columns_, channels_, hidden_rows(first_), weight(), spans, 1,
        LogitsEpilogue{
            {logits_.template as<float>(), chunk_, columns_, columns_, 0, false, {}, nullptr},
            {a_.bias.data, a_.bias.dtype},
            args.targets.as<const int32_t>(),
            target_logits_.template as<float>(),
            partials_.template as<SoftmaxPartial>(),
            spans,
            static_cast<float>(1 / a_.temperature),
            bool(args.entropy)});
    finish_log_probs(args, columns_, partials_.template as<const SoftmaxPartial>(), spans,
                     target_logits_.template as<const float>(), device_);
  }

  // Adds the chunk's share of the gradients: *scale * dz times the operands.
  template <class Z>
  void gradient_gemms(const RowGradients& gradients, const Z* dz, int64_t stride,
                      const float* scale) {
    const View weight_out = a_.into_weight ? View(a_.into_weight) : View(a_.d_weight);
    const View bias_out = a_.into_bias ? View(a_.into_bias) : View(a_.d_bias);
    T* d_hidden = a_.d_hidden.template as<T>() + first_ * channels_;
    T* masked_hidden = masked_hidden_.template as<T>();
    const auto masked_copy = [&](const T* source, T* destination) {
      launch(masked_copy_kernel<T>, blocks_for(chunk_ * channels_, kBlock), kBlock, 0,
             stream_of(device_), source, destination, gradients, chunk_, channels_);
    };
    masked_copy(hidden_rows(first_).data, masked_hidden);
    gemm<Major::k, Major::mn>(device_, Gemm<Z, T, T>{.m = chunk_,
                                                     .n = channels_,
                                                     .k = columns_,
                                                     .a = {dz, stride},
                                                     .b = weight(),
                                                     .c = d_hidden,
                                                     .c_row_stride = channels_,
                                                     .scale = scale});
    masked_copy(d_hidden, d_hidden);
    gemm<Major::mn, Major::mn>(device_,
                               Gemm<Z, T, float>{.m = columns_,
                                                 .n = channels_,
                                                 .k = chunk_,
                                                 .a = {dz, stride},
                                                 .b = {masked_hidden, channels_},
                                                 .c = weight_out.as<float>(),
                                                 .c_row_stride = channels_,
                                                 .accumulate = a_.into_weight || first_ > 0,
                                                 .scale = scale});
    if (bias_out)
      column_sums(device_, dz, chunk_, columns_, stride, bias_out.as<float>(),
                  a_.into_bias || first_ > 0, scale);
  }

  Operand<T> hidden_rows(int64_t first) const {
    return {a_.hidden.template as<const T>() + first * channels_, channels_};
  }
  Operand<T> weight() const { return {a_.weight.template as<const T>(), channels_}; }

  // A chunk holds 128 MB of logits; on tensor cores 640 MB, or 1024 rows of 151 936 columns, since
  // they would otherwise wait for dweight, which is read and written once a chunk. Where the logits
  // are not stored, any number of rows up to kMaxRows.
  int64_t max_chunk_rows(bool logits) const {
    constexpr int64_t kMaxRows = 4096;
    const int64_t rows = std::clamp<int64_t>(rows_, 12, kMaxRows);
    if (tensor_cores_ && !logits) return rows;
    const int64_t budget = (tensor_cores_ ? 160 : 32) * 1024 * 1024;
    int64_t rows_fit = budget / std::max<int64_t>(columns_, 1);
    if (tensor_cores_ && rows_fit > kTileRows) rows_fit -= rows_fit % kTileRows;
    return std::clamp<int64_t>(rows_fit, 12, rows);
  }

  template <class E>
  size_t chunk_bytes(int64_t row_size) const {
    return static_cast<size_t>(chunk_rows_ * row_size) * sizeof(E);
  }

  const Args& a_;
  Device& device_;
  const int64_t rows_, columns_, channels_, dz_stride_;
  const bool tensor_cores_;
  const int64_t chunk_rows_;
  const Scratch logits_, target_logits_, partials_, dz_, scale_, masked_hidden_;
  int64_t first_ = 0, chunk_ = 0;
};

// The gradients of weight and bias where there are no rows: 0, unless they are added to given ones.
template <class Args>
void zero_gradients(const Args& a, Device& device) {
  if (a.d_weight && a.d_weight.bytes()) device.zero(a.d_weight.data, a.d_weight.bytes());
  if (a.d_bias && a.d_bias.bytes()) device.zero(a.d_bias.data, a.d_bias.bytes());
}

}  // namespace

void linear_log_probs(const LinearLogProbsArgs& a, Device& device) {
  if (!a.hidden.shape[0]) return;
  with_float_type(a.hidden.dtype, [&](auto* t) {
    ChunkedHead<std::remove_pointer_t<decltype(t)>, LinearLogProbsArgs> c(a, device, false, false);
    c.for_each_chunk([&] {
      TokenLogProbsArgs args;
      args.log_probs = c.chunk_of(a.log_probs);
      args.stats = c.chunk_of(a.stats);
      args.entropy = c.chunk_of(a.entropy);
      c.forward(args);
    });
  });
}

void linear_log_probs_backward(const LinearLogProbsBackwardArgs& a, Device& device) {
  if (!a.hidden.shape[0]) return zero_gradients(a, device);
  with_float_type(a.hidden.dtype, [&](auto* t) {
    ChunkedHead<std::remove_pointer_t<decltype(t)>, LinearLogProbsBackwardArgs> c(a, device, true,
                                                                                  true);
    c.for_each_chunk([&] {
      c.compute_logits();
      TokenLogProbsBackwardArgs args;
      args.stats = c.chunk_of(a.stats);
      args.d_log_probs = c.chunk_of(a.d_log_probs);
      args.entropy = c.chunk_of(a.entropy);
      args.d_entropy = c.chunk_of(a.d_entropy);
      c.backward(args);
    });
  });
}

void linear_policy_loss(const LinearPolicyLossArgs& a, Device& device) {
  const int64_t rows = a.hidden.shape[0];
  const bool with_entropy = a.loss.entropy_coef != 0;
  Out stats, entropy;
  PolicyLossArgs loss = a.loss;
  const ScratchWorkspace scratch(device, [&](Workspace& workspace) {
    // Room for one token at least: a null tensor would be an absent one.
    const int64_t tokens = std::max<int64_t>(rows, 1);
    stats = f32_tensor<Out>(workspace.take<float>(2 * tokens), {rows, 2});
    loss.d_log_probs = f32_tensor<Out>(workspace.take<float>(tokens), {rows});
    if (!with_entropy) return;
    entropy = f32_tensor<Out>(workspace.take<float>(tokens), {rows});
    loss.d_entropy = f32_tensor<Out>(workspace.take<float>(tokens), {rows});
  });
  loss.fault = a.fault;
  loss.log_probs = view_as<In>(a.log_probs);
  loss.entropy = view_as<In>(entropy);
  if (!rows) {
    policy_loss(loss, device);
    return zero_gradients(a, device);
  }
  device.zero(a.log_probs.data, a.log_probs.bytes());
  if (entropy) device.zero(entropy.data, entropy.bytes());
  with_float_type(a.hidden.dtype, [&](auto* t) {
    ChunkedHead<std::remove_pointer_t<decltype(t)>, LinearPolicyLossArgs> c(a, device, true, true);
    c.for_each_chunk([&] {
      TokenLogProbsArgs forward;
      forward.log_probs = c.chunk_of(a.log_probs);
      forward.stats = c.chunk_of(stats);
      forward.entropy = c.chunk_of(entropy);
      c.forward(forward);
      // A token's gradient depends on its own log-probability alone, so this chunk's are final; the
      // loss is final after the last chunk.
      policy_loss(loss, device);
      TokenLogProbsBackwardArgs backward;
      backward.stats = view_as<In>(forward.stats);
      backward.d_log_probs = view_as<In>(c.chunk_of(loss.d_log_probs));
      backward.entropy = view_as<In>(forward.entropy);
      backward.d_entropy = view_as<In>(c.chunk_of(loss.d_entropy));
      c.backward(backward);
    });
  });
}

}  // namespace p2r::cuda
