// Layer normalisation: threads take rows, the backward pass takes slices of rows, whose partial
// sums of dWeight and dBias are then added in order.
#include "ops/layer_norm.h"

#include <algorithm>

#include "cpu/device.h"
#include "ops/integer.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kGrain = 16384;  // elements of one task

int64_t grain_of(int64_t elements) { return std::max<int64_t>(1, kGrain / (elements + 1)); }

// The vector itself if it is f32, else its copy.
const float* as_f32(const Simd& simd, const View& v, float* copy) {
  if (v.dtype == DType::f32) return v.as<const float>();
  simd.to_f32(v.dtype, v.data, copy, v.size());
  return copy;
}

}  // namespace

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
    cpu.parallel(rows, grain_of(c), [&](int64_t begin, int64_t end, int thread) {
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
  const int64_t slice = layer_norm_slice(rows), slices = ceil_div(rows, slice);
  // dWeight and dBias of each slice; for 16-bit types the weight as f32 and two rows a thread.
  const int64_t copies = half ? 1 + 2 * cpu.threads() : 0;
  const Scratch scratch = cpu.scratch(static_cast<size_t>(2 * slices + copies) * c * sizeof(float));
  float* partial = scratch.as<float>();
  cpu.submit([a, c, rows, half, slice, slices, partial, &cpu] {
    const Simd& simd = cpu.simd();
    float* copy = half ? partial + 2 * slices * c : nullptr;
    const float* weight = as_f32(simd, a.weight, copy);
    cpu.parallel(slices, grain_of(slice * c), [&](int64_t begin, int64_t end, int thread) {
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
    constexpr int64_t kColumns = 256;
    cpu.parallel(2 * c, std::max(kColumns, grain_of(slices)), [&](int64_t begin, int64_t end, int) {
      for (int64_t first = begin; first < end; first += kColumns) {
        const int64_t n = std::min(kColumns, end - first);
        double sums[kColumns] = {};
        for (int64_t s = 0; s < slices; ++s)
          for (int64_t i = 0; i < n; ++i) sums[i] += partial[2 * s * c + first + i];
        for (int64_t i = 0; i < n; ++i) {
          const int64_t column = first + i;
          (column < c ? a.d_weight.as<float>()[column] : a.d_bias.as<float>()[column - c]) =
              static_cast<float>(sums[i]);
        }
      }
    });
  });
}

}  // namespace p2r::cpu
