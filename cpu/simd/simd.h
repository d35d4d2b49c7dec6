// The SIMD kernels of one instruction set, as a table of functions. The files beside this one are
// compiled once for every set (CMakeLists.txt); which table is used is decided when a device is
// opened.
//
// Those files must not instantiate inline code of the standard library: the linker keeps one copy
// of an inline function, and it could be the one that needs AVX-512. They include only vec.h and
// C headers, and work on plain pointers.
#pragma once
#include <cstdint>

#include "ops/tensor.h"

namespace p2r::cpu {

struct SoftmaxRow;  // rows.h
struct PolicyRun;
struct ResampleRows;  // resample.h
struct PatchRow;

// Rows of up to three tensors that the next task will read, and of one that it will write: a
// product asks for their lines one by one between its steps, so that memory is busy while the
// arithmetic is. Asked for sooner than need be, they would be in the way of what is read now: see
// spread() in gemm.h.
struct Ahead {
  const char* line = nullptr;     // of the first tensor, the next to be asked for
  int64_t second = 0, third = 0;  // bytes from there to the lines of others, or 0
  int64_t rows = 0;               // left
  int64_t lines = 0, skip = 0;    // of a row; bytes from its last line to the next row's first
  const char* result = nullptr;   // of the one to be written, or null
  int64_t result_skip = 0;        // as skip
  int64_t left = 0;               // lines of this row
  int64_t pace = 1, wait = 1;     // chances to ask from one line to the next, and still to pass
};

// C[m, n] = A B of words as they lie, see gemm_panels: A in rows lda words apart, B in panels, with
// ldb = NR, or in rows ldb words apart, which are read to the end of the last vector.
struct RowsProduct {
  int64_t m, n, k;
  const float* a;
  int64_t lda;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  bool turned = false;  // A lies in rows of a step of k, m words each, lda apart
  bool accumulate = false;
  const float* factor = nullptr;  // of each row of C at last; null: 1
  // Unless null, where C goes instead, in rows of f32, or of bf16 with pairs, ld_out apart. It may
  // go past the caches if it is aligned and made of whole vectors.
  void* out = nullptr;
  int64_t ld_out = 0;
  bool past_caches = false;
  Ahead* ahead = nullptr;
};

struct Simd {
  const char* name;
#define KERNEL(result, name, parameters) result(*name) parameters;
#include "cpu/simd/kernels.def"
#undef KERNEL
};

// Instructions beyond a set that some of its kernels use, in functions compiled for them by
// attribute: AVX512-BF16 (dot products of bf16 pairs) and AVX512-VNNI (of bytes and of 16-bit
// pairs).
struct SimdFeatures {
  bool bf16 = false, vnni = false;
};
// Which of them this CPU has beside the set.
SimdFeatures simd_features(const Simd& table);

// The tables that this build and this CPU have, best first; `count` is at least 1.
const Simd* const* simd_tables(int* count);

}  // namespace p2r::cpu
