// Root mean square normalisation: threads take rows, the backward pass takes slices of rows.
#include "ops/rms_norm.h"

#include <algorithm>

#include "cpu/row_slices.h"
#include "ops/row_slices.h"

namespace p2r::cpu {

void rms_norm(const RmsNormArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t c = a.x.shape[-1], rows = a.rstd.size();
  const bool half = a.x.dtype != DType::f32;
  // For 16-bit types the weight as f32 and a row a thread.
  const Scratch scratch =
      cpu.scratch(half ? static_cast<size_t>(1 + cpu.threads()) * c * sizeof(float) : 0);
  float* copies = scratch.as<float>();
  cpu.submit([a, c, rows, copies, half, &cpu] {
    const Simd& simd = cpu.simd();
    const float* weight = as_f32(simd, a.weight, copies);
    cpu.parallel(rows, rows_of_task(c), [&](int64_t begin, int64_t end, int thread) {
      simd.rms_norm(a.x.dtype, a.x.element(begin * c),
                    a.residual ? a.residual.element(begin * c) : nullptr, weight,
                    static_cast<float>(a.eps), a.out.element(begin * c),
                    a.residual ? a.sum.element(begin * c) : nullptr, a.rstd.as<float>() + begin,
                    half ? copies + (1 + thread) * c : nullptr, end - begin, c);
    });
  });
}

void rms_norm_backward(const RmsNormBackwardArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t c = a.x.shape[-1], rows = a.rstd.size();
  const bool half = a.x.dtype != DType::f32;
  const int64_t slice = row_slice(rows), slices = ceil_div(rows, slice);
  // dWeight of each slice; for 16-bit types the weight as f32 and three rows a thread.
  const int64_t copies = half ? 1 + 3 * cpu.threads() : 0;
  const Scratch scratch = cpu.scratch(static_cast<size_t>(slices + copies) * c * sizeof(float));
  float* partial = scratch.as<float>();
  cpu.submit([a, c, rows, half, slice, slices, partial, &cpu] {
    const Simd& simd = cpu.simd();
    float* copy = half ? partial + slices * c : nullptr;
    const float* weight = as_f32(simd, a.weight, copy);
    cpu.parallel(slices, rows_of_task(slice * c), [&](int64_t begin, int64_t end, int thread) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t first = s * slice, n = std::min(slice, rows - first);
        float* sums = partial + s * c;
        std::fill(sums, sums + c, 0.0f);
        simd.rms_norm_backward(
            a.x.dtype, a.d_out.element(first * c), a.x.element(first * c), weight,
            a.rstd.as<const float>() + first, a.d_sum ? a.d_sum.element(first * c) : nullptr,
            a.d_x.element(first * c), sums, half ? copy + (1 + 3 * thread) * c : nullptr, n, c);
      }
    });
    sum_slices(cpu, partial, slices, c, {a.d_weight.as<float>()});
  });
}

}  // namespace p2r::cpu
