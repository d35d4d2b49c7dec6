// Rows of any float type: the weighted sum of four, and the sum of many.
#include "cpu/simd/arguments.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

void to_f32(DType from, const void* x, float* y, int64_t n);
void from_f32(DType to, const float* x, void* y, int64_t n);

namespace {

constexpr int64_t kBlock = 512;

}  // namespace

void blend_rows(DType dtype, const void* const* rows, const float* weights, int64_t n, void* out) {
  const int64_t size = dtype == DType::f32 ? 4 : 2;
  float row[kBlock], sum[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t part = n - i < kBlock ? n - i : kBlock;
    for (int k = 0; k < 4; ++k) {
      to_f32(dtype, static_cast<const char*>(rows[k]) + i * size, row, part);
      for (int64_t j = 0; j < part; ++j)
        sum[j] = k ? sum[j] + weights[k] * row[j] : weights[k] * row[j];
    }
    from_f32(dtype, sum, static_cast<char*>(out) + i * size, part);
  }
}

void sum_rows(DType dtype, const char* rows, int64_t pitch, const int64_t* list, int64_t n,
              int64_t columns, float* out) {
  float total[kSumColumns] = {}, buffer[kSumColumns];
  for (int64_t first = 0; first < n; first += kRowsPerRun) {
    const int64_t last = n - first < kRowsPerRun ? n : first + kRowsPerRun;
    float run[kSumColumns] = {};
    for (int64_t k = first; k < last; ++k) {
      const char* at = rows + (list ? list[k] : k) * pitch;
      const float* row = buffer;
      if (dtype == DType::f32)
        row = reinterpret_cast<const float*>(at);
      else
        to_f32(dtype, at, buffer, columns);
      if (columns == kSumColumns)
        for (int64_t i = 0; i < kSumColumns; ++i) run[i] += row[i];
      else
        for (int64_t i = 0; i < columns; ++i) run[i] += row[i];
    }
    for (int64_t i = 0; i < kSumColumns; ++i) total[i] += run[i];
  }
  memcpy(out, total, columns * sizeof(float));
}

}  // namespace p2r::cpu::P2R_ISA
