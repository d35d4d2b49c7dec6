// A linear layer and its gradients: GEMMs (cpu/gemm.h), and column sums for the bias.
#include "ops/linear.h"

#include <algorithm>

#include "cpu/gemm.h"
#include "ops/integer.h"

namespace p2r::cpu {

namespace {

// sums[f] (+)= Σ_n rows[n, f]: fixed slices of rows, each added up in order, then the slices, so
// that the order does not depend on the number of threads.
void column_sums(CpuDevice& cpu, const View& rows, int64_t n, float* sums, bool add) {
  constexpr int64_t kChunk = 1024, kMaxSlices = 64, kSliceRows = 128;
  constexpr int64_t kMinParallelEntries = 64 * 1024;  // fewer do not pay for waking a worker
  const int64_t width = rows.shape[-1], chunks = ceil_div(width, kChunk);
  const int64_t slices = std::clamp<int64_t>(n / kSliceRows, 1, kMaxSlices);
  const Scratch scratch = cpu.scratch(slices * width * 4);
  float* partial = scratch.as<float>();
  const int64_t items = slices * chunks, grain = n * width < kMinParallelEntries ? items : 1;
  cpu.launch(items, grain, [=, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
    float row[kChunk];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t slice = item / chunks, first = item % chunks * kChunk;
      const int64_t count = std::min(kChunk, width - first);
      float* sum = partial + slice * width + first;
      std::fill(sum, sum + count, 0.0f);
      for (int64_t i = n * slice / slices; i < n * (slice + 1) / slices; ++i) {
        simd.to_f32(rows.dtype, rows.element(i * width + first), row, count);
        for (int64_t j = 0; j < count; ++j) sum[j] += row[j];
      }
    }
  });
  cpu.launch(width, kChunk, [=](int64_t begin, int64_t end, int) {
    for (int64_t j = begin; j < end; ++j) {
      float sum = 0;
      for (int64_t s = 0; s < slices; ++s) sum += partial[s * width + j];
      sums[j] = add ? sums[j] + sum : sum;
    }
  });
}

// The product of the leading axes.
int64_t rows_of(const View& v) {
  int64_t rows = 1;
  for (int i = 0; i + 1 < v.shape.rank; ++i) rows *= v.shape[i];
  return rows;
}

}  // namespace

void linear(const LinearArgs& a, Device& device) {
  const int64_t features = a.weight.shape[0];
  gemm(cpu_device(device), {.m = rows_of(a.x),
                            .n = features,
                            .k = a.weight.shape[1],
                            .a = matrix_of(a.x),
                            .b = matrix_of(a.weight).transposed(),
                            .c = a.out.data,
                            .c_dtype = a.out.dtype,
                            .c_row_stride = features,
                            .bias = a.bias});
}

void linear_backward(const LinearBackwardArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t rows = rows_of(a.x), features = a.weight.shape[0], channels = a.weight.shape[1];
  gemm(cpu, {.m = rows,
             .n = channels,
             .k = features,
             .a = matrix_of(a.d_out),
             .b = matrix_of(a.weight),
             .c = a.d_x.data,
             .c_dtype = a.d_x.dtype,
             .c_row_stride = channels});
  const View weight = a.into_weight ? View(a.into_weight) : View(a.d_weight);
  gemm(cpu, {.m = features,
             .n = channels,
             .k = rows,
             .a = matrix_of(a.d_out).transposed(),
             .b = matrix_of(a.x),
             .c = weight.data,
             .c_row_stride = channels,
             .accumulate = bool(a.into_weight)});
  const View bias = a.into_bias ? View(a.into_bias) : View(a.d_bias);
  if (bias) column_sums(cpu, a.d_out, rows, bias.as<float>(), bool(a.into_bias));
}

}  // namespace p2r::cpu
