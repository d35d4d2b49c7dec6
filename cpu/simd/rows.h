// A row of any float type as f32, and the sum of a vector's lanes: what kernels share that work
// on one row at a time.
#pragma once
#include "cpu/simd/vec.h"
#include "ops/tensor.h"

namespace p2r::cpu::P2R_ISA {

void to_f32(DType from, const void* x, float* y, int64_t n);
void from_f32(DType to, const float* x, void* y, int64_t n);

// The row as f32: itself, or converted into the buffer.
inline const float* row_f32(DType dtype, const void* x, int64_t at, int64_t c, float* buffer) {
  if (dtype == DType::f32) return static_cast<const float*>(x) + at;
  to_f32(dtype, static_cast<const uint16_t*>(x) + at, buffer, c);
  return buffer;
}
inline float* result_f32(DType dtype, void* y, int64_t at, float* buffer) {
  return dtype == DType::f32 ? static_cast<float*>(y) + at : buffer;
}
inline void store_row(DType dtype, const float* row, void* y, int64_t at, int64_t c) {
  if (dtype != DType::f32) from_f32(dtype, row, static_cast<uint16_t*>(y) + at, c);
}

// Horizontal sum by quarters of a vector: short rows spend their time here.
inline float sum_lanes(vf v) {
  typedef float v4 __attribute__((vector_size(16)));
  v4 quarters[W / 4];
  memcpy(quarters, &v, sizeof v);
  v4 s = quarters[0];
  for (int i = 1; i < W / 4; ++i) s += quarters[i];
  return (s[0] + s[2]) + (s[1] + s[3]);
}

}  // namespace p2r::cpu::P2R_ISA
