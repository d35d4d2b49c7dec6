// What the normalisations share: parameters as f32, and their gradients from the sums of slices of
// rows (ops/row_slices.h).
#pragma once
#include <algorithm>
#include <initializer_list>

#include "cpu/device.h"

namespace p2r::cpu {

// Rows of one task, of so many elements each.
inline int64_t rows_of_task(int64_t elements) {
  constexpr int64_t kElements = 16384;
  return std::max<int64_t>(1, kElements / (elements + 1));
}

// The vector itself if it is f32, else its copy.
inline const float* as_f32(const Simd& simd, const View& v, float* copy) {
  if (v.dtype == DType::f32) return v.as<const float>();
  simd.to_f32(v.dtype, v.data, copy, v.size());
  return copy;
}

// The gradients [c] from partial [slices][gradients][c], added in order in f64. Inside queued work.
inline void sum_slices(CpuDevice& cpu, const float* partial, int64_t slices, int64_t c,
                       std::initializer_list<float*> gradients) {
  constexpr int64_t kColumns = 256;
  const int64_t width = static_cast<int64_t>(gradients.size()) * c;
  const auto of = gradients.begin();
  cpu.parallel(width, std::max(kColumns, rows_of_task(slices)),
               [&](int64_t begin, int64_t end, int) {
                 for (int64_t first = begin; first < end; first += kColumns) {
                   const int64_t n = std::min(kColumns, end - first);
                   double sums[kColumns] = {};
                   for (int64_t s = 0; s < slices; ++s)
                     for (int64_t i = 0; i < n; ++i) sums[i] += partial[s * width + first + i];
                   for (int64_t i = 0; i < n; ++i)
                     of[(first + i) / c][(first + i) % c] = static_cast<float>(sums[i]);
                 }
               });
}

}  // namespace p2r::cpu
