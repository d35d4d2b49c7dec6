// Sums and means over axes: threads take the sums of slices, by blocks of columns where the summed
// axes are not the last ones.
#include "ops/reduce.h"

#include <algorithm>

#include "cpu/device.h"
#include "cpu/simd/arguments.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kGrain = 32768;  // elements of one task

// One step; the sums are multiplied by `factor`.
void reduce(CpuDevice& cpu, const ReduceStep& step, const View& x, const View& out, float factor) {
  const int64_t slices = step.slices(), blocks = ceil_div(step.inner, kSumColumns);
  const int64_t rows = std::min(step.n, kReduceSlice);
  const int64_t grain =
      std::max<int64_t>(1, kGrain / (rows * std::min(step.inner, kSumColumns) + 1));
  cpu.launch(step.outer * slices * blocks, grain,
             [=, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
               float sums[kSumColumns];
               for (int64_t i = begin; i < end; ++i) {
                 const int64_t segment = i / blocks, column = i % blocks * kSumColumns;
                 const int64_t columns = std::min(kSumColumns, step.inner - column);
                 const int64_t o = segment / slices, first = segment % slices * kReduceSlice;
                 const int64_t n = std::min(kReduceSlice, step.n - first);
                 const char* from = x.element((o * step.n + first) * step.inner + column);
                 if (step.inner == 1)
                   sums[0] = simd.sum_row(x.dtype, from, n);
                 else
                   simd.sum_rows(x.dtype, from, step.inner * static_cast<int64_t>(size_of(x.dtype)),
                                 nullptr, n, columns, sums);
                 for (int64_t k = 0; k < columns; ++k) sums[k] *= factor;
                 simd.from_f32(out.dtype, sums, out.element(segment * step.inner + column),
                               columns);
               }
             });
}

void reduce_all(const View& x, const Ints& axes, const View& out, float factor, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const std::vector<ReduceStep> steps = reduce_steps(x.shape, axes);
  const auto [even, odd] = between_steps(steps);
  const Scratch scratch = cpu.scratch(static_cast<size_t>(even + odd) * sizeof(float));
  View from = x;
  for (size_t k = 0; k < steps.size(); ++k) {
    const bool last = k + 1 == steps.size();
    View to = out;
    if (!last) {
      to.dtype = DType::f32;
      to.data = scratch.as<float>() + (k % 2 ? even : 0);
    }
    reduce(cpu, steps[k], from, to, last ? factor : 1);
    from = to;
  }
}

}  // namespace

void sum(const SumArgs& a, Device& device) { reduce_all(a.x, a.axes, a.out, 1, device); }
void mean(const MeanArgs& a, Device& device) {
  reduce_all(a.x, a.axes, a.out, mean_factor(a.x, a.out), device);
}

}  // namespace p2r::cpu
