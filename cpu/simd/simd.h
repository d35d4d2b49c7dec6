// The SIMD kernels of one instruction set, as a table of function pointers. The .cpp files beside
// this one are compiled once per instruction set (CMakeLists.txt), each time into a namespace of
// its own; a device picks its table when it is opened.
//
// Those files must not instantiate inline code of the standard library: the linker keeps one copy
// of an inline function, and it could be the one that needs AVX-512. They include only vec.h and
// C headers, and work on plain pointers.
#pragma once
#include <cstdint>

#include "ops/enums.h"
#include "ops/tensor.h"

namespace p2r::cpu {

struct FewQueries;  // attention.h
struct FewRows;     // linear.h
struct QuantizedRows;
struct LogitGradientRow;  // arguments.h
struct DivergenceRow;
struct PolicyRun;
struct RolloutRun;
enum class Arithmetic : uint8_t;
struct ResampleRows;  // resample.h
struct PatchRow;
struct PatchValues;

// Software prefetch into L2 of rows of up to three tensors that the next task will read, and of one
// that it will write. A product prefetches one cache line of each between its k steps, so that
// memory and arithmetic overlap. Lines prefetched too early would evict what is being read now:
// set_interval() in gemm.h spreads them over the product.
struct Prefetch {
  const char* line = nullptr;     // the next line of the first tensor
  int64_t second = 0, third = 0;  // bytes from it to the same line of the other tensors; 0: none
  int64_t rows = 0;               // rows left
  int64_t lines = 0, skip = 0;    // lines of a row; bytes from their end to the next row
  const char* output = nullptr;   // the next line of the tensor to be written, or null
  int64_t output_skip = 0;        // as skip
  int64_t lines_left = 0;         // of the current row
  int64_t interval = 1;           // prefetch slots (four k steps of a register tile) per line
  int64_t countdown = 1;          // slots until the next line
};

// C[m, n] = A B without packing A, see gemm_panels for its words: A in rows lda words apart, B in
// panels, with ldb = NR, or in rows ldb words apart, which are read to the end of the last vector.
struct RowGemm {
  int64_t m, n, k;
  const float* a;
  int64_t lda;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  bool a_transposed = false;  // A is [k][m], lda words from one k to the next
  bool accumulate = false;
  const float* row_scale = nullptr;  // multiplies each row of the final C; null: 1
  // Unless null, C is written here instead, in rows of f32, or of bf16 with pairs, ld_out elements
  // apart. Non-temporal stores need it aligned and made of whole vectors.
  void* out = nullptr;
  int64_t ld_out = 0;
  bool nontemporal = false;
  Prefetch* prefetch = nullptr;
};

struct Simd {
  const char* name;
#define KERNEL(result, name, parameters) result(*name) parameters;
#include "cpu/simd/kernels.def"
#undef KERNEL
};

// Extensions that some kernels of a set use where the CPU has them: AVX512-BF16 (dot products of
// bf16 pairs) and AVX512-VNNI (of bytes and of 16-bit pairs).
struct SimdFeatures {
  bool bf16 = false, vnni = false;
};
// The extensions that this CPU has for the set.
SimdFeatures simd_features(const Simd& table);

// The tables that were built and that this CPU can run, best first; `count` is at least 1.
const Simd* const* simd_tables(int* count);

}  // namespace p2r::cpu
