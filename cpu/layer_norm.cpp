// Layer normalisation: threads take rows, the backward pass takes slices of rows, whose partial
// sums of dWeight and dBias are then added in order.
#include "ops/layer_norm.h"

#include <algorithm>

#include "cpu/row_slices.h"
#include "ops/row_slices.h"

namespace p2r::cpu {

void layer_norm(const LayerNormArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t c = a.x.shape[-1], rows = a.stats.shape[0];
  const bool half = a.x.dtype != DType::f32;
  const Scratch scratch =
      cpu.scratch(half ? static_cast<size_t>(2 + cpu.threads()) * c * sizeof(float) : 0);
  float* copies = scratch.as<float>();
  cpu.submit([a, c, rows, copies, half, &cpu] {
    const Simd& simd = cpu.simd();
    const float* weight = as_f32(simd, a.weight, copies);
    const float* bias = as_f32(simd, a.bias, half ? copies + c : nullptr);
    cpu.parallel(rows, rows_of_task(c), [&](int64_t begin, int64_t end, int thread) {
      simd.layer_norm(a.x.dtype, a.x.element(begin * c), weight, bias, static_cast<float>(a.eps),
                      a.out.element(begin * c), a.stats.as<float>() + 2 * begin,
                      half ? copies + (2 + thread) * c : nullptr, end - begin, c);
    });
  });
}

void layer_norm_backward(const LayerNormBackwardArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t c = a.x.shape[-1], rows = a.stats.shape[0];
  const bool half = a.x.dtype != DType::f32;
  const int64_t slice = row_slice(rows), slices = ceil_div(rows, slice);
  // dWeight and dBias of each slice; for 16-bit types the weight as f32 and two rows a thread.
  const int64_t copies = half ? 1 + 2 * cpu.threads() : 0;
  const Scratch scratch = cpu.scratch(static_cast<size_t>(2 * slices + copies) * c * sizeof(float));
  float* partial = scratch.as<float>();
  cpu.submit([a, c, rows, half, slice, slices, partial, &cpu] {
    const Simd& simd = cpu.simd();
    float* copy = half ? partial + 2 * slices * c : nullptr;
    const float* weight = as_f32(simd, a.weight, copy);
    cpu.parallel(slices, rows_of_task(slice * c), [&](int64_t begin, int64_t end, int thread) {
      float* buffer = half ? copy + (1 + 2 * thread) * c : nullptr;
      for (int64_t s = begin; s < end; ++s) {
        const int64_t first = s * slice, n = std::min(slice, rows - first);
        float* sums = partial + 2 * s * c;
        std::fill(sums, sums + 2 * c, 0.0f);
        simd.layer_norm_backward(a.x.dtype, a.d_out.element(first * c), a.x.element(first * c),
                                 weight, a.stats.as<const float>() + 2 * first,
                                 a.d_x.element(first * c), sums, sums + c, buffer, n, c);
      }
    });
    sum_slices(cpu, partial, slices, c, {a.d_weight.as<float>(), a.d_bias.as<float>()});
  });
}

}  // namespace p2r::cpu
