// The linear layer: three GEMMs (cuda/gemm/gemm.cuh), and column sums (cuda/linear.cuh) for the
// gradient of the bias.
#include "cuda/linear.cuh"
#include "ops/linear.h"

namespace p2r::cuda {

namespace {

// The leading axes flattened.
int64_t rows_of(const View& v) {
  int64_t rows = 1;
  for (int i = 0; i + 1 < v.shape.rank; ++i) rows *= v.shape[i];
  return rows;
}

}  // namespace

void linear(const LinearArgs& a, Device& device) {
  const int64_t features = a.weight.shape[0], channels = a.weight.shape[1];
  with_float_type(a.x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const auto multiply = [&](auto* out) {
      using Out = std::remove_pointer_t<decltype(out)>;
      gemm<Major::k, Major::k>(device, Gemm<T, T, Out>{.m = rows_of(a.x),
                                                       .n = features,
                                                       .k = channels,
                                                       .a = {a.x.as<const T>(), channels},
                                                       .b = {a.weight.as<const T>(), channels},
                                                       .c = out,
                                                       .c_row_stride = features,
                                                       .bias = {a.bias.data, a.bias.dtype}});
    };
    if (a.out.dtype == a.x.dtype)
      multiply(a.out.as<T>());
    else
      multiply(a.out.as<float>());
  });
}

void linear_backward(const LinearBackwardArgs& a, Device& device) {
  const int64_t rows = rows_of(a.x), features = a.weight.shape[0], channels = a.weight.shape[1];
  const View weight = a.into_weight ? View(a.into_weight) : View(a.d_weight);
  const View bias = a.into_bias ? View(a.into_bias) : View(a.d_bias);
  with_float_type(a.x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const T* d_out = a.d_out.as<const T>();
    gemm<Major::k, Major::mn>(device, Gemm<T, T, T>{.m = rows,
                                                    .n = channels,
                                                    .k = features,
                                                    .a = {d_out, features},
                                                    .b = {a.weight.as<const T>(), channels},
                                                    .c = a.d_x.as<T>(),
                                                    .c_row_stride = channels});
    gemm<Major::mn, Major::mn>(device, Gemm<T, T, float>{.m = features,
                                                         .n = channels,
                                                         .k = rows,
                                                         .a = {d_out, features},
                                                         .b = {a.x.as<const T>(), channels},
                                                         .c = weight.as<float>(),
                                                         .c_row_stride = channels,
                                                         .accumulate = bool(a.into_weight)});
    if (bias)
      column_sums(device, d_out, rows, features, features, bias.as<float>(), bool(a.into_bias),
                  nullptr);
  });
}

}  // namespace p2r::cuda
