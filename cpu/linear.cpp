// A linear layer and its gradients: GEMMs (cpu/gemm.h), and column sums for the bias. Few rows, as
// in decoding, read the weight in place, and take no longer than that (cpu/simd/linear.cpp).
#include "cpu/linear.h"

#include <algorithm>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/simd/linear.h"
#include "ops/integer.h"
#include "ops/linear.h"

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

constexpr int64_t kFewRows = 16;
constexpr int64_t kFeatureTile = 16;  // whole vectors of every instruction set

void multiply_few_rows(CpuDevice& cpu, const LinearArgs& a, int64_t rows) {
  constexpr int64_t kLeastChunkBytes = 128 * 1024;
  constexpr int64_t kStripFeatures = 512;  // sums of 16 rows, 32 KiB, before they are rounded
  const int64_t features = a.weight.shape[0], channels = a.weight.shape[1];
  const bool pairs = uses_pairs(cpu, a.x.dtype, a.weight.dtype);
  const int64_t depth = pairs ? ceil_div(channels, 2) : channels;
  const int64_t tiles = ceil_div(features, kFeatureTile);
  const int64_t tile_bytes = kFeatureTile * channels * int64_t(size_of(a.weight.dtype));
  const std::vector<int64_t> chunks = cut_features(
      tiles, ceil_div(kLeastChunkBytes, std::max<int64_t>(tile_bytes, 1)), cpu.threads());
  const int64_t strip = rows * kStripFeatures + kStripFeatures;  // and the bias
  const Scratch scratch = cpu.scratch((2 * rows * depth + cpu.threads() * strip) * 4);
  float* words = scratch.as<float>();
  float* packed = words + rows * depth;
  float* strips = packed + rows * depth;
  cpu.submit([=, &cpu] {
    const Simd& simd = cpu.simd();
    to_panel_words(simd, pairs, a.x.dtype, a.x.data, channels, rows, channels, words, depth);
    simd.pack_few_rows(rows, depth, words, packed);
    const auto compute = [&](int64_t begin, int64_t end, int thread) {
      float* sums = strips + thread * strip;
      float* bias = sums + rows * kStripFeatures;
      const int64_t last = std::min(features, chunks[end] * kFeatureTile);
      for (int64_t j = chunks[begin] * kFeatureTile; j < last; j += kStripFeatures) {
        const int64_t n = std::min(kStripFeatures, last - j);
        if (a.bias) simd.to_f32(a.bias.dtype, a.bias.element(j), bias, n);
        simd.multiply_few_rows({.rows = rows,
                                .n = n,
                                .k = channels,
                                .block_k = sum_block(channels, pairs),
                                .pairs = pairs,
                                .type = a.weight.dtype,
                                .weight = a.weight.element(j * channels),
                                .x = packed,
                                .bias = a.bias ? bias : nullptr,
                                .out = sums,
                                .ld = kStripFeatures});
        for (int64_t r = 0; r < rows; ++r)
          simd.from_f32(a.out.dtype, sums + r * kStripFeatures, a.out.element(r * features + j), n);
      }
    };
    cpu.parallel(static_cast<int64_t>(chunks.size()) - 1, 1, compute);
  });
}

}  // namespace

std::vector<int64_t> cut_features(int64_t tiles, int64_t least, int threads) {
  std::vector<int64_t> first = {0};
  while (first.back() < tiles) {
    const int64_t left = tiles - first.back();
    first.push_back(first.back() + std::min(left, std::max(least, left / (2 * threads))));
  }
  return first;
}

void linear(const LinearArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t rows = rows_of(a.x), features = a.weight.shape[0];
  if (rows == 0 || features == 0) return;
  if (rows <= kFewRows) return multiply_few_rows(cpu, a, rows);
  gemm(cpu, {.m = rows,
             .n = features,
             .k = a.weight.shape[1],
             .a = matrix_of(a.x),
             .b = matrix_of(a.weight).transposed(),
             .c = a.out.data,
             .c_dtype = a.out.dtype,
             .c_row_stride = features,
             .split_k = false,
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
