// Arguments of the products of a few rows (cpu/simd/linear.cpp).
#pragma once
#include <stdint.h>

#include "ops/tensor.h"

namespace p2r::cpu {

// out [rows][ld] = x weight^T + bias in f32, each entry in the order of cpu/gemm.h.
struct FewRows {
  int64_t rows, n, k, block_k;  // n rows of the weight, k channels
  bool pairs;                   // as in gemm_panels, for a weight of bf16
  DType type;                   // of the weight
  const void* weight;
  const float* x;     // of pack_few_rows
  const float* bias;  // n, or null
  float* out;
  int64_t ld;
};

}  // namespace p2r::cpu
