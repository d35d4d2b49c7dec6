// Moving and summing rows: threads take elements, rows, or segments of rows by blocks of columns.
#include "ops/rows.h"

#include <algorithm>
#include <cstring>

#include "cpu/device.h"
#include "cpu/simd/arguments.h"
#include "ops/integer.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kGrain = 32768;  // elements of one task

static_assert(kRowsPerRun == kSumRun);

int64_t grain_of(int64_t elements) { return std::max<int64_t>(1, kGrain / (elements + 1)); }

// out[s] = the sum of the rows of segment s (offsets[s] to offsets[s + 1], through `list` unless it
// is empty), divided by their number for a mean.
void sum_segments(CpuDevice& cpu, const View& x, Ints offsets, Ints list, bool mean,
                  const View& out) {
  const int64_t segments = out.shape[0], c = row_size(out.shape), blocks = ceil_div(c, kSumColumns);
  const int64_t rows = offsets.back();
  const int64_t tasks = segments * blocks;
  const int64_t grain = tasks > 0 ? grain_of(rows * c / tasks) : 1;
  cpu.launch(tasks, grain,
             [=, offsets = std::move(offsets), list = std::move(list), &simd = cpu.simd()](
                 int64_t begin, int64_t end, int) {
               float sums[kSumColumns];
               for (int64_t i = begin; i < end; ++i) {
                 const int64_t s = i / blocks, column = i % blocks * kSumColumns;
                 const int64_t columns = std::min(kSumColumns, c - column);
                 const int64_t first = offsets[s], n = offsets[s + 1] - first;
                 const char* base = x.element(column);
                 const int64_t pitch = c * static_cast<int64_t>(size_of(x.dtype));
                 if (list.empty())
                   simd.sum_rows(x.dtype, base + first * pitch, pitch, nullptr, n, columns, sums);
                 else
                   simd.sum_rows(x.dtype, base, pitch, list.data() + first, n, columns, sums);
                 if (mean && n)
                   for (int64_t k = 0; k < columns; ++k) sums[k] /= static_cast<float>(n);
                 simd.from_f32(out.dtype, sums, out.element(s * c + column), columns);
               }
             });
}

}  // namespace

void gather_rows(const GatherRowsArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t n = a.out.shape[0], c = row_size(a.out.shape);
  if (!c) return;
  cpu.launch(n, grain_of(c), [a, c](int64_t begin, int64_t end, int) {
    const size_t bytes = static_cast<size_t>(c) * size_of(a.x.dtype);
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(a.out.element(i * c), a.x.element(a.index[static_cast<size_t>(i)] * c), bytes);
  });
}

void gather_rows_backward(const GatherRowsBackwardArgs& a, Device& device) {
  if (!a.d_x.size()) return;
  Inverse inverse = invert(a.index, a.d_x.shape[0]);
  sum_segments(cpu_device(device), a.d_out, std::move(inverse.offsets), std::move(inverse.list),
               false, a.d_x);
}

void scatter_rows(const ScatterRowsArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t rows = a.out.shape[0], c = row_size(a.out.shape);
  if (!c) return;
  cpu.launch(rows, grain_of(c),
             [a, c, source = sources_of(a.index, rows)](int64_t begin, int64_t end, int) {
               const size_t bytes = static_cast<size_t>(c) * size_of(a.x.dtype);
               for (int64_t r = begin; r < end; ++r) {
                 const int64_t i = source[static_cast<size_t>(r)];
                 char* out = a.out.element(r * c);
                 if (i < 0)
                   std::memcpy(out, a.x.element(r * c), bytes);
                 else if (a.y)
                   std::memcpy(out, a.y.element(i * c), bytes);
                 else
                   std::memset(out, 0, bytes);
               }
             });
}

void scatter_add_rows(const ScatterAddRowsArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t rows = a.out.shape[0], c = row_size(a.out.shape);
  if (!c) return;
  cpu.launch(
      rows, grain_of(c),
      [a, c, inverse = invert(a.index, rows), &simd = cpu.simd()](int64_t begin, int64_t end, int) {
        const DType dtype = a.x.dtype;
        for (int64_t r = begin; r < end; ++r) {
          const int64_t first = inverse.offsets[r], last = inverse.offsets[r + 1];
          if (first == last) {
            std::memcpy(a.out.element(r * c), a.x.element(r * c), c * size_of(dtype));
            continue;
          }
          for (int64_t i = 0; i < c; i += kSumColumns) {
            const int64_t columns = std::min(kSumColumns, c - i);
            float sum[kSumColumns], row[kSumColumns];
            simd.to_f32(dtype, a.x.element(r * c + i), sum, columns);
            for (int64_t k = first; k < last; ++k) {
              simd.to_f32(dtype, a.y.element(inverse.list[k] * c + i), row, columns);
              for (int64_t j = 0; j < columns; ++j) sum[j] += row[j];
            }
            simd.from_f32(dtype, sum, a.out.element(r * c + i), columns);
          }
        }
      });
}

void mean_pool(const MeanPoolArgs& a, Device& device) {
  sum_segments(cpu_device(device), a.x, a.cu_seqlens, {}, true, a.out);
}

void mean_pool_backward(const MeanPoolBackwardArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t rows = a.d_x.shape[0], c = a.d_x.shape[1];
  if (!c) return;
  cpu.launch(rows, grain_of(c), [a, c, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
    const DType dtype = a.d_x.dtype;
    const size_t bytes = static_cast<size_t>(c) * size_of(dtype);
    const auto after = std::upper_bound(a.cu_seqlens.begin(), a.cu_seqlens.end(), begin);
    for (int64_t b = after - a.cu_seqlens.begin() - 1, t = begin; t < end; ++b) {
      const int64_t first = a.cu_seqlens[b], last = a.cu_seqlens[b + 1];
      if (t >= last) continue;
      // One row is computed, the sequence's other rows are copies of it.
      for (int64_t i = 0; i < c; i += kSumColumns) {
        const int64_t columns = std::min(kSumColumns, c - i);
        float row[kSumColumns];
        simd.to_f32(dtype, a.d_out.element(b * c + i), row, columns);
        for (int64_t k = 0; k < columns; ++k) row[k] /= static_cast<float>(last - first);
        simd.from_f32(dtype, row, a.d_x.element(t * c + i), columns);
      }
      const char* row = a.d_x.element(t * c);
      for (++t; t < std::min(last, end); ++t) std::memcpy(a.d_x.element(t * c), row, bytes);
    }
  });
}

}  // namespace p2r::cpu
