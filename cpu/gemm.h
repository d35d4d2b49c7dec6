// GEMM on the CPU: C = A B (+ bias), or C += A B, for any mixture of float types and any strides;
// queued like an operation:
//
//   // out [N, F] = x [N, C] . weight [F, C]^T + bias
//   gemm(cpu, {.m = N, .n = F, .k = C,
//              .a = matrix_of(x), .b = matrix_of(weight).transposed(),
//              .c = out.data, .c_dtype = out.dtype, .c_row_stride = F, .bias = bias});
//
// Sums are f32, each in an order that depends on m, n and k alone: never on the number of threads.
// Without split-K it depends on k alone: a row has the same bits in any batch (sum_block).
// A result of 16 bits is rounded once, at its end. Scratch comes from the device's allocator,
// before the work is queued. Sizes of 0 are fine; with k = 0 the sums are 0.
#pragma once
#include "cpu/device.h"

namespace p2r::cpu {

// Entry (i, j) is i * row_stride + j * column_stride elements past data.
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
  // m x n, each row contiguous.
  void* c = nullptr;
  DType c_dtype = DType::f32;
  int64_t c_row_stride = 0;
  bool accumulate = false;  // C must then be f32
  bool split_k = true;      // allows split-K, of which m and n decide
  View bias = {};           // n entries of any float type, added to each row, or none
};

void gemm(CpuDevice& cpu, const Gemm& g);

// The same executed at once, inside queued work, for an f32 C; `workspace` has
// gemm_workspace_floats(cpu, n) floats.
void gemm_in_task(CpuDevice& cpu, const Gemm& g, float* workspace);
int64_t gemm_workspace_floats(const CpuDevice& cpu, int64_t n);

// The order of an entry's sum without split-K: k is cut into blocks of sum_block(k, pairs) terms,
// the last one shorter; each is summed from 0 by one f32 in the order of k, pair by pair with
// `pairs`; and its sum is added to those of the blocks before it, which start with the bias. Few
// rows (cpu/linear.cpp) and the linear head (cpu/linear_log_probs/) follow it too.
constexpr int64_t kBlockK = 256;  // words: a panel of B, 32 KiB for 32 columns, fits L1
int64_t sum_block(int64_t k, bool pairs);
// Whether a product is of pairs of bf16, which needs AVX512-BF16.
bool uses_pairs(const CpuDevice& cpu, DType a, DType b);

// For callers of the kernels of kernels.def:

// Converts n rows of k entries, `stride` apart, to rows of panel words, ld words apart in `to`.
// With pairs the entries are bf16.
void to_panel_words(const Simd& simd, bool pairs, DType type, const void* rows, int64_t stride,
                    int64_t n, int64_t k, float* to, int64_t ld);

// The prefetch slots (simd.h) of a product of m rows, n columns and k words. set_interval spreads
// the lines to prefetch evenly over a number of slots.
int64_t prefetch_slots(const Simd& simd, int64_t m, int64_t n, int64_t k);
void set_interval(Prefetch& prefetch, int64_t slots);

}  // namespace p2r::cpu
