// Arguments of attention's kernel for few rows (cpu/simd/attention_few_rows.cpp).
#pragma once
#include <stdint.h>

#include "ops/tensor.h"

namespace p2r::cpu {

// Rows of q that see the same keys, one chunk of them: the running maximum, the sum and the outputs
// of ops/attention.h's online softmax, from an empty one, before the division by the sum.
struct FewQueries {
  int64_t rows, d, keys, block;  // block: keys of a step of the softmax
  bool pairs;                    // as in gemm_panels, for bf16
  DType type;                    // of keys and values
  float scale;
  const float* q;        // of pack_few_rows
  const char* const* k;  // the rows of keys, and kFewQueriesMargin more, any that may be read
  int64_t v;             // bytes from a row of keys to the same of values
  float* s;              // rows x round_up(block, kFewQueriesMargin)
  float *max, *sum, *o;  // a row's maximum as it starts; its sum; [rows][d]
};
constexpr int64_t kFewQueriesMargin = 32;

}  // namespace p2r::cpu
