// A linear head in chunks of rows, shared by its log-probabilities (linear_log_probs.cu) and its
// divergence from another head (distillation.cu): the chunk's logits, and the gradients' GEMMs from
// the gradient of the logits, dz, which is f32, or on tensor cores scaled and of 16 bits.
#pragma once
#include <algorithm>

#include "cuda/gemm/gemm.cuh"
#include "cuda/linear.cuh"
#include "ops/log_probs.h"

namespace p2r::cuda {

// The gradients with respect to each row's result, and which rows take part.
struct RowGradients {
  const int32_t* targets;          // null: every row takes part
  const uint8_t* mask;             // likewise
  const float *d_row, *d_entropy;  // d_entropy may be null

  // A row with an invalid target or mask has a gradient: its dz is NaN.
  __device__ __forceinline__ bool has_gradient(int64_t row) const {
    if (targets && targets[row] == kSkippedTarget) return false;
    if (mask && mask[row] != 1) return mask[row] != 0;
    return d_row[row] != 0 || (d_entropy && d_entropy[row] != 0);
  }
};

namespace linear_head {

constexpr int kBlock = 256;

// Copies the rows that have a gradient and stores 0 for the others, whose values could be NaN,
// which times 0 is NaN.
template <class T>
__global__ void __launch_bounds__(kBlock)
    masked_copy_kernel(const T* source, T* destination, RowGradients gradients, int64_t rows,
                       int64_t channels) {
  for (int64_t e = blockIdx.x * int64_t{kBlock} + threadIdx.x; e < rows * channels;
       e += int64_t{gridDim.x} * kBlock)
    destination[e] = gradients.has_gradient(e / channels) ? source[e] : from_float<T>(0);
}

// scale[0]: the power of two that brings the largest gradient of a row to 2^exponent or up to twice
// that, as in loss scaling: dz keeps its digits in f16, although a probability can be far below
// f16's smallest number. scale[1] = 1 / scale[0].
template <int exponent>
__global__ void __launch_bounds__(kBlock)
    gradient_scale_kernel(RowGradients gradients, int64_t rows, float inv_temperature,
                          float* scale) {
  SMEM_ARRAY(float, thread_max, kBlock);
  float own = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kBlock)
    if (gradients.has_gradient(i)) {
      own = fmaxf(own, fabsf(gradients.d_row[i] * inv_temperature));
      if (gradients.d_entropy) own = fmaxf(own, fabsf(gradients.d_entropy[i] * inv_temperature));
    }
  thread_max[threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kBlock; ++i) own = fmaxf(own, thread_max[i]);
  int power = 0;
  if (own > 0 && own < INFINITY) power = exponent - ilogbf(own);
  power = power < -100 ? -100 : power > 100 ? 100 : power;
  scale[0] = ldexpf(1.0f, power);
  scale[1] = ldexpf(1.0f, -power);
}

}  // namespace linear_head

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

// The linear head of a call, with temporary memory for one chunk of its rows. Args has the fields
// of LinearLogProbsArgs that it uses, and with gradients those of LinearLogProbsBackwardArgs.
template <class T, class Args>
class LinearHead {
 public:
  // logits: whether they are stored on tensor cores too; heads: how many chunks of logits there
  // are; gradient: whether gradient_gemms will be called.
  LinearHead(const Args& a, Device& device, bool logits, int heads, bool gradient)
      : a_(a),
        device_(device),
        rows_(a.hidden.shape[0]),
        columns_(a.weight.shape[0]),
        channels_(a.weight.shape[1]),
        dz_stride_(round_up(columns_, 8)),
        tensor_cores_(on_tensor_cores(rows_, columns_, channels_, hidden_rows(0), weight())),
        chunk_rows_(max_chunk_rows(logits, heads)),
        logits_(device, logits || !tensor_cores_ ? chunk_bytes<float>(columns_) : 0),
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
  int64_t first() const { return first_; }
  int64_t chunk() const { return chunk_; }
  float* logits() const { return logits_.template as<float>(); }

  // Of an array of the largest chunk.
  template <class E>
  size_t chunk_bytes(int64_t row_size) const {
    return static_cast<size_t>(chunk_rows_ * row_size) * sizeof(E);
  }

  // This chunk's rows of a tensor.
  template <class Tensor>
  Tensor chunk_of(const Tensor& t) const {
    return rows_of(t, first_, chunk_);
  }

  void compute_logits() {
    gemm<Major::k, Major::k>(device_, Gemm<T, T, float>{.m = chunk_,
                                                        .n = columns_,
                                                        .k = channels_,
                                                        .a = hidden_rows(first_),
                                                        .b = weight(),
                                                        .c = logits(),
                                                        .c_row_stride = columns_,
                                                        .bias = {a_.bias.data, a_.bias.dtype},
                                                        .split_k = false});
  }

  // The gradients of hidden, weight and bias from the chunk's dz. compute(dz, stride, scale) stores
  // *scale dz, in rows `stride` elements apart; scale is null for f32, where dz is logits().
  template <int exponent, class F>
  void backward(const RowGradients& gradients, const F& compute) {
    if constexpr (ptx::is_half<T>) {
      if (tensor_cores_) {
        float* scale = scale_.template as<float>();
        launch(linear_head::gradient_scale_kernel<exponent>, 1, linear_head::kBlock, 0,
               stream_of(device_), gradients, chunk_, static_cast<float>(1 / a_.temperature),
               scale);
        compute(dz_.template as<T>(), dz_stride_, scale);
        return gradient_gemms(gradients, dz_.template as<const T>(), dz_stride_, scale + 1);
      }
    }
    compute(logits(), columns_, static_cast<const float*>(nullptr));
    gradient_gemms(gradients, static_cast<const float*>(logits()), columns_, nullptr);
  }

 protected:
  Operand<T> hidden_rows(int64_t first) const {
    return {a_.hidden.template as<const T>() + first * channels_, channels_};
  }
  Operand<T> weight() const { return {a_.weight.template as<const T>(), channels_}; }

  const Args& a_;
  Device& device_;
  const int64_t rows_, columns_, channels_, dz_stride_;
  const bool tensor_cores_;
  const int64_t chunk_rows_;
  int64_t first_ = 0, chunk_ = 0;

 private:
  // Adds the chunk's share of the gradients: *scale * dz times the operands.
  template <class Z>
  void gradient_gemms(const RowGradients& gradients, const Z* dz, int64_t stride,
                      const float* scale) {
    const View weight_out = a_.into_weight ? View(a_.into_weight) : View(a_.d_weight);
    const View bias_out = a_.into_bias ? View(a_.into_bias) : View(a_.d_bias);
    T* d_hidden = a_.d_hidden.template as<T>() + first_ * channels_;
    T* masked_hidden = masked_hidden_.template as<T>();
    const auto masked_copy = [&](const T* source, T* destination) {
      launch(linear_head::masked_copy_kernel<T>,
             blocks_for(chunk_ * channels_, linear_head::kBlock), linear_head::kBlock, 0,
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

  // Chunks hold 128 MB of logits; on tensor cores 640 MB, or 1024 rows of 151 936 columns, since
  // they would otherwise wait for dweight, which is read and written once a chunk. Where the logits
  // are not stored, any number of rows up to kMaxRows.
  int64_t max_chunk_rows(bool logits, int heads) const {
    constexpr int64_t kMaxRows = 4096;
    const int64_t rows = std::clamp<int64_t>(rows_, 12, kMaxRows);
    if (tensor_cores_ && !logits) return rows;
    const int64_t budget = (tensor_cores_ ? 160 : 32) * 1024 * 1024 / heads;
    int64_t rows_fit = budget / std::max<int64_t>(columns_, 1);
    if (tensor_cores_ && rows_fit > kTileRows) rows_fit -= rows_fit % kTileRows;
    return std::clamp<int64_t>(rows_fit, 12, rows);
  }

  const Scratch logits_, dz_, scale_, masked_hidden_;
};

// The gradients of weight and bias where there are no rows: 0, unless they are added to given ones.
template <class Args>
void zero_gradients(const Args& a, Device& device) {
  if (a.d_weight && a.d_weight.bytes()) device.zero(a.d_weight.data, a.d_weight.bytes());
  if (a.d_bias && a.d_bias.bytes()) device.zero(a.d_bias.data, a.d_bias.bytes());
}

}  // namespace p2r::cuda
