// C = A B (+ bias), or C += A B, for any mixture of float types and any strides; queued like an
// operation:
//
//   // out [N, F] = x [N, C] . weight [F, C]^T + bias
//   gemm(cpu, {.m = N, .n = F, .k = C,
//              .a = matrix_of(x), .b = matrix_of(weight).transposed(),
//              .c = out.data, .c_dtype = out.dtype, .c_row_stride = F, .bias = bias});
//
// Sums are f32, each in an order that depends on m, n and k alone: never on the number of threads.
// A result of 16 bits is rounded once, at its end. Scratch comes from the device's allocator,
// before the work is queued. Sizes of 0 are fine; with k = 0 the sums are 0.
#pragma once
#include "cpu/device.h"

namespace p2r::cpu {

// Entry (i, j) lies i * row_stride + j * column_stride elements behind data.
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t row_stride = 0, column_stride = 1;

  Matrix transposed() const { return {data, dtype, column_stride, row_stride}; }
  // The matrix without its first i rows and j columns.
  Matrix from(int64_t i, int64_t j) const {
    const int64_t skip = (i * row_stride + j * column_stride) * int64_t(size_of(dtype));
    return {static_cast<const char*>(data) + skip, dtype, row_stride, column_stride};
  }
};

// The rows of a tensor's last axis.
inline Matrix matrix_of(const View& v) { return {v.data, v.dtype, v.shape[-1], 1}; }

struct Gemm {
  int64_t m = 0, n = 0, k = 0;
  Matrix a = {};  // m x k
  Matrix b = {};  // k x n
  // m x n, each row's entries side by side.
  void* c = nullptr;
  DType c_dtype = DType::f32;
  int64_t c_row_stride = 0;
  bool accumulate = false;  // C must then be f32
  View bias = {};           // n entries of any float type, added to each row, or none
};

void gemm(CpuDevice& cpu, const Gemm& g);

// The same inside queued work, for an f32 C, in memory of gemm_floats(cpu, n) floats.
void gemm_now(CpuDevice& cpu, const Gemm& g, float* memory);
int64_t gemm_floats(const CpuDevice& cpu, int64_t n);

// For those who call the kernels themselves: n rows of k entries, `stride` apart, as rows of words
// (kernels.def), ld words apart in `to`. With pairs they are bf16.
void to_words(const Simd& simd, bool pairs, DType type, const void* rows, int64_t stride, int64_t n,
              int64_t k, float* to, int64_t ld);

// Chances to ask for lines ahead in a gemm_rows of m rows, n columns and k words (simd.h); and the
// pace that spreads the lines over `chances`.
int64_t chances_of(const Simd& simd, int64_t m, int64_t n, int64_t k);
void spread(Ahead& ahead, int64_t chances);

}  // namespace p2r::cpu
