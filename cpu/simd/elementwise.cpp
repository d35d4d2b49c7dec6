// Sums and products of two rows of any float type, each of which may be one element that is
// repeated.
#include "cpu/simd/arguments.h"
#include "cpu/simd/rows.h"
#include "cpu/simd/simd.h"

namespace p2r::cpu::P2R_ISA {

namespace {

constexpr int64_t kBlock = 512;

template <class F>
void combine(const float* x, const float* y, float* out, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, f(loadf(x + i), loadf(y + i)));
  for (; i < n; ++i) out[i] = f(x[i], y[i]);
}

// Rows of f32 in blocks; an operand that is repeated, or is not f32, is copied into its buffer.
template <class F>
void combine_rows(DType dtype, const void* x, bool repeat_x, const void* y, bool repeat_y,
                  void* out, int64_t n, const F& f) {
  float a[kBlock], b[kBlock], result[kBlock];
  const int64_t most = n < kBlock ? n : kBlock;
  const auto fill = [=](const void* from, float* buffer) {
    to_f32(dtype, from, buffer, 1);
    for (int64_t i = 1; i < most; ++i) buffer[i] = buffer[0];
  };
  if (repeat_x) fill(x, a);
  if (repeat_y) fill(y, b);
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t part = n - i < kBlock ? n - i : kBlock;
    const float* from_x = repeat_x ? a : row_f32(dtype, x, i, part, a);
    const float* from_y = repeat_y ? b : row_f32(dtype, y, i, part, b);
    combine(from_x, from_y, result_f32(dtype, out, i, result), part, f);
    store_row(dtype, result, out, i, part);
  }
}

}  // namespace

void elementwise(Arithmetic operation, DType dtype, const void* x, bool repeat_x, const void* y,
                 bool repeat_y, void* out, int64_t n) {
  if (operation == Arithmetic::add)
    combine_rows(dtype, x, repeat_x, y, repeat_y, out, n, [](auto a, auto b) { return a + b; });
  else
    combine_rows(dtype, x, repeat_x, y, repeat_y, out, n, [](auto a, auto b) { return a * b; });
}

float sum_row(DType dtype, const void* x, int64_t n) {
  float buffer[kBlock];
  float total = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t part = n - i < kBlock ? n - i : kBlock;
    const float* row = row_f32(dtype, x, i, part, buffer);
    vf sums[4] = {};
    int64_t j = 0;
    for (; j + 4 * W <= part; j += 4 * W)
      for (int k = 0; k < 4; ++k) sums[k] += loadf(row + j + k * W);
    for (; j + W <= part; j += W) sums[0] += loadf(row + j);
    float rest = 0;
    for (; j < part; ++j) rest += row[j];
    total += sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
  }
  return total;
}

}  // namespace p2r::cpu::P2R_ISA
