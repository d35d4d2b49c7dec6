// Loops that do one thing as fast as an instruction set can, for the benchmarks' ceilings.
#pragma once
#include <stdint.h>

namespace p2r::cpu {

struct CeilingLoops {
  const char* name;  // that of the set's Simd
  int lanes;
  // `steps` times twelve independent multiply-adds of `lanes` each, and twelve bf16 products of
  // twice as many; the sums are returned so that they are computed. Null: no such instructions.
  float (*multiply_adds)(int64_t steps, float factor);
  float (*bf16_products)(int64_t steps, float factor);
  // n is a multiple of 128, and the arrays are aligned to 64 bytes.
  float (*read)(const float* x, int64_t n);
  void (*copy)(const float* x, float* y, int64_t n);
  void (*copy_nontemporal)(const float* x, float* y, int64_t n);
  void (*update)(float* x, float factor, int64_t n);
};

}  // namespace p2r::cpu
