// Root mean square normalisation and its backward pass, a row at a time: the row stays in the
// first-level cache between its passes. 16-bit rows are converted to f32 in a buffer. The order of
// a row's sums depends on its length alone.
#include "cpu/simd/arguments.h"
#include "cpu/simd/rows.h"
#include "cpu/simd/simd.h"

namespace p2r::cpu::P2R_ISA {

void elementwise(Arithmetic operation, DType dtype, const void* x, bool repeat_x, const void* y,
                 bool repeat_y, void* out, int64_t n);

namespace {

// Four accumulators hide the latency of the additions.
inline float sum_of_squares(const float* x, int64_t c) {
  vf sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= c; i += 4 * W)
    for (int k = 0; k < 4; ++k) {
      const vf v = loadf(x + i + k * W);
      sums[k] += v * v;
    }
  for (; i + W <= c; i += W) {
    const vf v = loadf(x + i);
    sums[0] += v * v;
  }
  float rest = 0;
  for (; i < c; ++i) rest += x[i] * x[i];
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

}  // namespace

void rms_norm(DType dtype, const void* x, const void* residual, const float* weight, float eps,
              void* y, void* sum, float* rstd, float* buffer, int64_t rows, int64_t c) {
  const float inv_c = c ? 1.0f / static_cast<float>(c) : 0;
  const int64_t size = dtype == DType::f32 ? 4 : 2;
  const auto at = [=](const void* p, int64_t r) {
    return static_cast<const char*>(p) + r * c * size;
  };
  for (int64_t r = 0; r < rows; ++r) {
    if (residual)
      elementwise(Arithmetic::add, dtype, at(x, r), false, at(residual, r), false,
                  static_cast<char*>(sum) + r * c * size, c);
    const float* in = row_f32(dtype, residual ? sum : x, r * c, c, buffer);
    const float inverse = 1 / __builtin_sqrtf(sum_of_squares(in, c) * inv_c + eps);
    rstd[r] = inverse;
    float* out = result_f32(dtype, y, r * c, buffer);
    int64_t i = 0;
    for (; i + W <= c; i += W) store(out + i, loadf(in + i) * inverse * loadf(weight + i));
    for (; i < c; ++i) out[i] = in[i] * inverse * weight[i];
    store_row(dtype, out, y, r * c, c);
  }
}

void rms_norm_backward(DType dtype, const void* d_out, const void* x, const float* weight,
                       const float* rstd, const void* d_sum, void* d_x, float* d_weight,
                       float* buffer, int64_t rows, int64_t c) {
  const float inv_c = c ? 1.0f / static_cast<float>(c) : 0;
  float* second = buffer ? buffer + c : nullptr;
  float* third = buffer ? buffer + 2 * c : nullptr;
  for (int64_t r = 0; r < rows; ++r) {
    const float* in = row_f32(dtype, x, r * c, c, buffer);
    const float* d = row_f32(dtype, d_out, r * c, c, second);
    const float* more = d_sum ? row_f32(dtype, d_sum, r * c, c, third) : nullptr;
    const float inverse = rstd[r];
    vf s = {}, t = {};
    int64_t i = 0;
    for (; i + W <= c; i += W) {
      const vf scaled = loadf(d + i) * (loadf(in + i) * inverse);
      store(d_weight + i, loadf(d_weight + i) + scaled);
      (i / W % 2 ? t : s) += scaled * loadf(weight + i);
    }
    float rest = 0;
    for (; i < c; ++i) {
      const float scaled = d[i] * (in[i] * inverse);
      d_weight[i] += scaled;
      rest += scaled * weight[i];
    }
    const float mean = (sum_lanes(s + t) + rest) * inv_c;
    float* out = result_f32(dtype, d_x, r * c, buffer);
    for (i = 0; i + W <= c; i += W) {
      vf v = inverse * (loadf(d + i) * loadf(weight + i) - loadf(in + i) * inverse * mean);
      if (more) v += loadf(more + i);
      store(out + i, v);
    }
    for (; i < c; ++i)
      out[i] = inverse * (d[i] * weight[i] - in[i] * inverse * mean) + (more ? more[i] : 0.0f);
    store_row(dtype, out, d_x, r * c, c);
  }
}

}  // namespace p2r::cpu::P2R_ISA
