// The linear layer: three GEMMs (cuda/gemm/gemm.cuh), and column sums (cuda/linear.cuh) for the
// gradient of the bias. Up to 16 rows are multiplied by cuda/gemm/few_rows.cuh, where lines of C
// are aligned to 16 bytes: there, a row has the same bits in any batch of up to 16.
#include "cuda/gemm/few_rows.cuh"
#include "cuda/linear.cuh"
#include "ops/linear.h"

namespace p2r::cuda {

void linear(const LinearArgs& a, Device& device) {
  const int64_t features = a.weight.shape[0], channels = a.weight.shape[1];
  const int64_t rows = rows_of(a.x);
  const Bias bias = {a.bias.data, a.bias.dtype};
  with_float_type(a.x.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const T *x = a.x.as<const T>(), *weight = a.weight.as<const T>();
    if (few_rows::takes(rows, channels, x, weight))
      with_result<T>(a.out, [&](auto* out) {
        few_rows::run(device, x, weight, bias, out, rows, features, channels);
      });
    else
      multiply_many_rows(device, x, weight, bias, a.out, rows, features, channels);
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
