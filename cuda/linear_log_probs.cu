// Chunk by chunk of rows: the product (gemm.cuh) makes the chunk's logits in scratch, the kernels
// of log_probs.cu and policy_loss.cu work on them, and three products of dz, in their place, make
// the gradients.
#include "cuda/linear.cuh"
#include "ops/linear_log_probs.h"

namespace p2r::cuda {

void token_log_probs(const TokenLogProbsArgs& a, Device& device);
void token_log_probs_backward(const TokenLogProbsBackwardArgs& a, Device& device);
void policy_loss(const PolicyLossArgs& a, Device& device);

namespace {

constexpr int kBlock = 256;
constexpr int64_t kLogits = 32 * 1024 * 1024;  // floats of a chunk
constexpr int64_t kFewestRows = 12, kMostRows = 4096;

int64_t chunk_rows(int64_t rows, int64_t columns) {
  const int64_t fit = kLogits / std::max<int64_t>(columns, 1);
  return std::clamp(std::min(fit, std::max<int64_t>(rows, 1)), kFewestRows, kMostRows);
}

// What tells whether a row takes part in a gradient.
struct Parts {
  const int32_t* targets;
  const float *d_log_probs, *d_entropy;  // the latter may be null
};

// to = from where a row takes part, else 0: 0 times what stands there could be NaN. A row with a
// wrong target takes part, by dz = NaN.
template <class T>
__global__ void __launch_bounds__(kBlock)
    taken_rows_kernel(const T* from, T* to, Parts parts, int64_t rows, int64_t channels) {
  for (int64_t e = blockIdx.x * int64_t{kBlock} + threadIdx.x; e < rows * channels;
       e += int64_t{gridDim.x} * kBlock) {
    const int64_t row = e / channels;
    const bool taken =
        parts.targets[row] != kSkippedTarget &&
        (parts.d_log_probs[row] != 0 || (parts.d_entropy && parts.d_entropy[row] != 0));
    to[e] = taken ? from[e] : from_float<T>(0);
  }
}

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

template <class Tensor>
Tensor floats(float* data, const Shape& shape) {
  Tensor t;
  t.data = data;
  t.shape = shape;
  return t;
}

template <class T, class Args>
void make_logits(const Args& a, int64_t first, int64_t n, float* logits, Device& device) {
  const int64_t columns = a.weight.shape[0], channels = a.weight.shape[1];
  gemm(device,
       Gemm<T, T, float>{.m = n,
                         .n = columns,
                         .k = channels,
                         .a = {a.hidden.template as<const T>() + first * channels, channels, 1},
                         .b = {a.weight.template as<const T>(), 1, channels},
                         .c = logits,
                         .c_row_stride = columns,
                         .bias = {a.bias.data, a.bias.dtype}});
}

// The gradients of a chunk's rows, from dz.
template <class T, class Args>
void multiply(const Args& a, int64_t first, int64_t n, const float* dz, T* hidden, Parts parts,
              Device& device) {
  const int64_t columns = a.weight.shape[0], channels = a.weight.shape[1];
  const View weight = a.into_weight ? View(a.into_weight) : View(a.d_weight);
  const View bias = a.into_bias ? View(a.into_bias) : View(a.d_bias);
  T* d_hidden = a.d_hidden.template as<T>() + first * channels;
  const unsigned blocks = blocks_for(n * channels, kBlock);
  launch(taken_rows_kernel<T>, blocks, kBlock, 0, stream_of(device),
         a.hidden.template as<const T>() + first * channels, hidden, parts, n, channels);
  gemm(device, Gemm<float, T, T>{.m = n,
                                 .n = channels,
                                 .k = columns,
                                 .a = {dz, columns, 1},
                                 .b = {a.weight.template as<const T>(), channels, 1},
                                 .c = d_hidden,
                                 .c_row_stride = channels});
  launch(taken_rows_kernel<T>, blocks, kBlock, 0, stream_of(device), d_hidden, d_hidden, parts, n,
         channels);
  gemm(device, Gemm<float, T, float>{.m = columns,
                                     .n = channels,
                                     .k = n,
                                     .a = {dz, 1, columns},
                                     .b = {hidden, channels, 1},
                                     .c = weight.as<float>(),
                                     .c_row_stride = channels,
                                     .accumulate = a.into_weight || first > 0});
  if (bias) column_sums(device, dz, n, columns, bias.as<float>(), a.into_bias || first > 0);
}

// Without rows there is nothing to write what was not given.
template <class Args>
void clear(const Args& a, Device& device) {
  if (a.d_weight && a.d_weight.bytes()) device.zero(a.d_weight.data, a.d_weight.bytes());
  if (a.d_bias && a.d_bias.bytes()) device.zero(a.d_bias.data, a.d_bias.bytes());
}

}  // namespace

void linear_log_probs(const LinearLogProbsArgs& a, Device& device) {
  const int64_t rows = a.hidden.shape[0], columns = a.weight.shape[0];
  const int64_t most = chunk_rows(rows, columns);
  const Scratch logits = device.scratch(most * columns * sizeof(float));
  with_float_type(a.hidden.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    for (int64_t first = 0; first < rows; first += most) {
      const int64_t n = std::min(most, rows - first);
      make_logits<T>(a, first, n, logits.as<float>(), device);
      TokenLogProbsArgs part;
      part.logits = floats<In>(logits.as<float>(), {n, columns});
      part.targets = rows_of(a.targets, first, n);
      part.temperature = a.temperature;
      part.log_probs = rows_of(a.log_probs, first, n);
      part.stats = rows_of(a.stats, first, n);
      part.entropy = rows_of(a.entropy, first, n);
      part.fault = a.fault;
      token_log_probs(part, device);
    }
  });
}

void linear_log_probs_backward(const LinearLogProbsBackwardArgs& a, Device& device) {
  const int64_t rows = a.hidden.shape[0], columns = a.weight.shape[0];
  const int64_t most = chunk_rows(rows, columns);
  if (!rows) return clear(a, device);
  const Scratch logits = device.scratch(most * columns * sizeof(float));
  const Scratch hidden =
      device.scratch(most * a.weight.shape[1] * static_cast<int64_t>(size_of(a.hidden.dtype)));
  with_float_type(a.hidden.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    for (int64_t first = 0; first < rows; first += most) {
      const int64_t n = std::min(most, rows - first);
      make_logits<T>(a, first, n, logits.as<float>(), device);
      TokenLogProbsBackwardArgs part;
      part.logits = floats<In>(logits.as<float>(), {n, columns});
      part.targets = rows_of(a.targets, first, n);
      part.stats = rows_of(a.stats, first, n);
      part.d_log_probs = rows_of(a.d_log_probs, first, n);
      part.entropy = rows_of(a.entropy, first, n);
      part.d_entropy = rows_of(a.d_entropy, first, n);
      part.temperature = a.temperature;
      part.d_logits = floats<Out>(logits.as<float>(), {n, columns});
      part.fault = a.fault;
      token_log_probs_backward(part, device);
      multiply<T>(a, first, n, logits.as<float>(), hidden.as<T>(),
                  {part.targets.as<const int32_t>(), part.d_log_probs.as<const float>(),
                   part.d_entropy.as<const float>()},
                  device);
    }
  });
}

void linear_policy_loss(const LinearPolicyLossArgs& a, Device& device) {
  const int64_t rows = a.hidden.shape[0], columns = a.weight.shape[0];
  const int64_t most = chunk_rows(rows, columns);
  const bool with_entropy = a.loss.entropy_coef != 0;
  const Scratch logits = device.scratch(most * columns * sizeof(float));
  const Scratch hidden =
      device.scratch(most * a.weight.shape[1] * static_cast<int64_t>(size_of(a.hidden.dtype)));
  const Scratch stats = device.scratch(most * 2 * sizeof(float));
  // By token: the gradient of the log-probabilities, the entropy, its gradient.
  const int64_t tokens = std::max<int64_t>(rows, 1);
  const Scratch by_token = device.scratch((with_entropy ? 3 : 1) * tokens * sizeof(float));

  PolicyLossArgs loss = a.loss;
  loss.fault = a.fault;
  static_cast<View&>(loss.log_probs) = a.log_probs;
  loss.d_log_probs = floats<Out>(by_token.as<float>(), {rows});
  Out entropy;
  if (with_entropy) {
    entropy = floats<Out>(by_token.as<float>() + tokens, {rows});
    static_cast<View&>(loss.entropy) = entropy;
    loss.d_entropy = floats<Out>(by_token.as<float>() + 2 * tokens, {rows});
  }
  if (!rows) {
    policy_loss(loss, device);
    return clear(a, device);
  }
  device.zero(a.log_probs.data, a.log_probs.bytes());
  if (entropy) device.zero(entropy.data, entropy.bytes());
  with_float_type(a.hidden.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    for (int64_t first = 0; first < rows; first += most) {
      const int64_t n = std::min(most, rows - first);
      make_logits<T>(a, first, n, logits.as<float>(), device);
      TokenLogProbsArgs forward;
      forward.logits = floats<In>(logits.as<float>(), {n, columns});
      forward.targets = rows_of(a.targets, first, n);
      forward.temperature = a.temperature;
      forward.log_probs = rows_of(a.log_probs, first, n);
      forward.stats = floats<Out>(stats.as<float>(), {n, 2});
      forward.entropy = rows_of(entropy, first, n);
      forward.fault = a.fault;
      token_log_probs(forward, device);
      // A token's gradient depends on its own log-probability alone, so it is right as soon as that
      // is known; the loss is right after the last chunk.
      policy_loss(loss, device);
      TokenLogProbsBackwardArgs back;
      back.logits = forward.logits;
      back.targets = forward.targets;
      static_cast<View&>(back.stats) = forward.stats;
      static_cast<View&>(back.d_log_probs) = rows_of(loss.d_log_probs, first, n);
      static_cast<View&>(back.entropy) = forward.entropy;
      static_cast<View&>(back.d_entropy) = rows_of(loss.d_entropy, first, n);
      back.temperature = a.temperature;
      static_cast<View&>(back.d_logits) = forward.logits;
      back.fault = a.fault;
      token_log_probs_backward(back, device);
      multiply<T>(a, first, n, logits.as<float>(), hidden.as<T>(),
                  {back.targets.as<const int32_t>(), back.d_log_probs.as<const float>(),
                   back.d_entropy.as<const float>()},
                  device);
    }
  });
}

}  // namespace p2r::cuda
