// Layer normalisation and its backward pass, a row at a time: the row stays in the first-level
// cache between its passes. 16-bit rows are converted to f32 in a buffer. Backward, g is dOut
// weight; the means of g and of g x̂ (ops/layer_norm.h) are dnorm_mean and dnorm_norm_mean.
#include "cpu/simd/rows.h"
#include "cpu/simd/simd.h"

namespace p2r::cpu::P2R_ISA {

namespace {

// Two accumulators hide the latency of the additions.
inline float sum_of(const float* x, int64_t c) {
  vf s = {}, t = {};
  int64_t i = 0;
  for (; i + 2 * W <= c; i += 2 * W) {
    s += loadf(x + i);
    t += loadf(x + i + W);
  }
  if (i + W <= c) {
    s += loadf(x + i);
    i += W;
  }
  float rest = 0;
  for (; i < c; ++i) rest += x[i];
  return sum_lanes(s + t) + rest;
}

// Sums of x - mean and of its square.
inline void deviations(const float* x, int64_t c, float mean, float* first, float* second) {
  vf s = {}, t = {};
  int64_t i = 0;
  for (; i + W <= c; i += W) {
    const vf d = loadf(x + i) - mean;
    s += d;
    t += d * d;
  }
  float rest = 0, squares = 0;
  for (; i < c; ++i) {
    const float d = x[i] - mean;
    rest += d;
    squares += d * d;
  }
  *first = sum_lanes(s) + rest;
  *second = sum_lanes(t) + squares;
}

}  // namespace

void layer_norm(DType dtype, const void* x, const float* weight, const float* bias, float eps,
                void* y, float* stats, float* buffer, int64_t rows, int64_t c) {
  const float inv_c = c ? 1.0f / static_cast<float>(c) : 0;
  for (int64_t r = 0; r < rows; ++r) {
    const float* in = row_f32(dtype, x, r * c, c, buffer);
    const float first_mean = sum_of(in, c) * inv_c;
    float first, second;
    deviations(in, c, first_mean, &first, &second);
    const float correction = first * inv_c;
    const float mean = first_mean + correction;
    const float variance = second * inv_c - correction * correction;
    const float rstd = 1 / __builtin_sqrtf((variance < 0 ? 0 : variance) + eps);
    stats[2 * r] = mean;
    stats[2 * r + 1] = rstd;
    float* out = result_f32(dtype, y, r * c, buffer);
    int64_t i = 0;
    for (; i + W <= c; i += W)
      store(out + i, (loadf(in + i) - mean) * rstd * loadf(weight + i) + loadf(bias + i));
    for (; i < c; ++i) out[i] = (in[i] - mean) * rstd * weight[i] + bias[i];
    store_row(dtype, out, y, r * c, c);
  }
}

void layer_norm_backward(DType dtype, const void* d_out, const void* x, const float* weight,
                         const float* stats, void* d_x, float* d_weight, float* d_bias,
                         float* buffer, int64_t rows, int64_t c) {
  const float inv_c = c ? 1.0f / static_cast<float>(c) : 0;
  float* second = buffer ? buffer + c : nullptr;
  for (int64_t r = 0; r < rows; ++r) {
    const float* in = row_f32(dtype, x, r * c, c, buffer);
    const float* d = row_f32(dtype, d_out, r * c, c, second);
    const float mean = stats[2 * r], rstd = stats[2 * r + 1];
    vf s = {}, t = {};
    int64_t i = 0;
    for (; i + W <= c; i += W) {
      const vf dv = loadf(d + i), hat = (loadf(in + i) - mean) * rstd, g = dv * loadf(weight + i);
      s += g;
      t += g * hat;
      store(d_weight + i, loadf(d_weight + i) + dv * hat);
      store(d_bias + i, loadf(d_bias + i) + dv);
    }
    float rest = 0, rest_norm = 0;
    for (; i < c; ++i) {
      const float hat = (in[i] - mean) * rstd, g = d[i] * weight[i];
      rest += g;
      rest_norm += g * hat;
      d_weight[i] += d[i] * hat;
      d_bias[i] += d[i];
    }
    const float dnorm_mean = (sum_lanes(s) + rest) * inv_c,
                dnorm_norm_mean = (sum_lanes(t) + rest_norm) * inv_c;
    float* out = result_f32(dtype, d_x, r * c, buffer);
    for (i = 0; i + W <= c; i += W) {
      const vf hat = (loadf(in + i) - mean) * rstd;
      store(out + i,
            rstd * (loadf(d + i) * loadf(weight + i) - dnorm_mean - hat * dnorm_norm_mean));
    }
    for (; i < c; ++i)
      out[i] = rstd * (d[i] * weight[i] - dnorm_mean - (in[i] - mean) * rstd * dnorm_norm_mean);
    store_row(dtype, out, d_x, r * c, c);
  }
}

}  // namespace p2r::cpu::P2R_ISA
