// Arguments of the products of a few rows (cpu/simd/linear.cpp) and with a quantised weight
// (cpu/simd/quantize.cpp).
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

// The same of panels of a quantised weight, laid out as ops/quantize.h says.
struct QuantizedRows {
  int64_t rows, panels, groups, group;
  int bits;
  bool pairs;
  const uint8_t* values;
  const uint16_t* scales;
  const float* x;     // of pack_few_rows, whole groups of channels, those past the last 0
  const float* bias;  // of whole panels, or null
  float* out;         // likewise
  int64_t ld;
};

}  // namespace p2r::cpu
