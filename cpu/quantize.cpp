// Weights in 8 or 4 bits: rounding, the way back, and the linear layer (cpu/simd/quantize.cpp).
#include "ops/quantize.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/linear.h"
#include "cpu/simd/linear.h"
#include "ops/half.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kMaxGroup = 64;

// To the nearest integer, of two the even one; |x| is below 2^22.
float round_to_even(float x) {
  constexpr float kShift = 0x1.8p23f;
  return (x + kShift) - kShift;
}

// The byte of column c of a group and feature `lane` of a panel, and of 4 bits the lowest bit in
// it.
struct Place {
  int64_t byte;
  int shift;
};
Place place_of(const QuantizedLayout& layout, int64_t c, int64_t lane) {
  if (layout.bits == 8) return {c * kQuantizedPanel + lane, 0};
  const int64_t bit = c % 2 * 16 + c % 8 / 2 * 4;
  return {(c / 8 * kQuantizedPanel + lane) * 4 + bit / 8, static_cast<int>(bit % 8)};
}

// Panel by group: each is written by one thread alone, and all of its bytes are.
template <class F>
void for_each_group(CpuDevice& cpu, const QuantizedLayout& layout, const F& f) {
  const int64_t groups = layout.groups();
  cpu.launch(layout.panels() * groups, std::max<int64_t>(1, 64 * 32 / layout.group),
             [=](int64_t begin, int64_t end, int) {
               for (int64_t i = begin; i < end; ++i) f(i / groups, i % groups);
             });
}

}  // namespace

void quantize(const QuantizeArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const QuantizedLayout layout = a.layout();
  const float largest = a.bits == 8 ? 127 : 7;
  for_each_group(cpu, layout, [=, &simd = cpu.simd()](int64_t panel, int64_t g) {
    const int64_t index = panel * layout.groups() + g, first = g * layout.group;
    const int64_t columns = std::min(layout.group, layout.channels - first);
    uint8_t* values = a.values.as<uint8_t>() + index * layout.group_bytes();
    uint16_t* scales = a.scales.as<uint16_t>() + index * kQuantizedPanel;
    std::fill_n(values, layout.group_bytes(), uint8_t{0});
    std::fill_n(scales, kQuantizedPanel, uint16_t{0});
    for (int64_t lane = 0; lane < kQuantizedPanel; ++lane) {
      const int64_t row = panel * kQuantizedPanel + lane;
      if (row == layout.features) break;
      float w[kMaxGroup];
      simd.to_f32(a.weight.dtype, a.weight.element(row * layout.channels + first), w, columns);
      float magnitude = 0;
      for (int64_t c = 0; c < columns; ++c)
        if (const float x = std::fabs(w[c]); x > magnitude || x != x) magnitude = x;  // a NaN stays
      scales[lane] = f16_of_f32(magnitude / largest);
      const float scale = f32_of_f16(scales[lane]);
      if (!(scale < INFINITY)) {
        scales[lane] = 0x7e00;  // NaN
        raise(a.fault, row, bits_of_f32(magnitude));
        continue;
      }
      if (scale == 0) continue;
      for (int64_t c = 0; c < columns; ++c) {
        const float q = std::clamp(round_to_even(w[c] / scale), -largest, largest);
        const Place to = place_of(layout, c, lane);
        const int mask = a.bits == 8 ? 255 : 15;
        values[to.byte] |= static_cast<uint8_t>((static_cast<int>(q) & mask) << to.shift);
      }
    }
  });
}

void dequantize(const DequantizeArgs& a, Device& device) {
  const QuantizedLayout layout = a.layout();
  for_each_group(cpu_device(device), layout, [=](int64_t panel, int64_t g) {
    const int64_t index = panel * layout.groups() + g, first = g * layout.group;
    const int64_t columns = std::min(layout.group, layout.channels - first);
    const uint8_t* values = a.values.as<const uint8_t>() + index * layout.group_bytes();
    const uint16_t* scales = a.scales.as<const uint16_t>() + index * kQuantizedPanel;
    for (int64_t lane = 0; lane < kQuantizedPanel; ++lane) {
      const int64_t row = panel * kQuantizedPanel + lane;
      if (row == layout.features) break;
      float* to = a.out.as<float>() + row * layout.channels + first;
      for (int64_t c = 0; c < columns; ++c) {
        const Place from = place_of(layout, c, lane);
        const int up = 32 - layout.bits;
        const int q = static_cast<int>(uint32_t{values[from.byte]} >> from.shift << up) >> up;
        to[c] = static_cast<float>(q) * f32_of_f16(scales[lane]);
      }
    }
  });
}

void quantized_linear(const QuantizedLinearArgs& a, Device& device) {
  constexpr int64_t kMaxChunkRows = 1024;
  constexpr int64_t kStripFloats = 64 * 1024;  // of sums, before they are rounded
  constexpr int64_t kLeastChunkBytes = 128 * 1024;
  CpuDevice& cpu = cpu_device(device);
  const QuantizedLayout layout = a.layout();
  const int64_t total = rows_of(a.x);
  if (total == 0 || layout.features == 0) return;
  const bool pairs = cpu.features().bf16 && a.x.dtype == DType::bf16;
  const int64_t padded = layout.groups() * layout.group, depth = pairs ? padded / 2 : padded;
  const int64_t chunk_rows = std::min(total, kMaxChunkRows);
  const int64_t panel_bytes = layout.groups() * layout.group_bytes();
  const std::vector<int64_t> chunks =
      cut_features(layout.panels(), ceil_div(kLeastChunkBytes, std::max<int64_t>(panel_bytes, 1)),
                   cpu.threads());
  const int64_t strip_panels =
      std::clamp<int64_t>(kStripFloats / kQuantizedPanel / chunk_rows, 1, 64);
  const int64_t ld = strip_panels * kQuantizedPanel;
  const int64_t strip = (chunk_rows + 1) * ld;  // and the bias
  const Scratch scratch = cpu.scratch((2 * chunk_rows * depth + cpu.threads() * strip) * 4);
  float* words = scratch.as<float>();
  float* packed = words + chunk_rows * depth;
  float* strips = packed + chunk_rows * depth;
  cpu.submit([=, &cpu] {
    const Simd& simd = cpu.simd();
    for (int64_t first = 0; first < total; first += chunk_rows) {
      const int64_t rows = std::min(chunk_rows, total - first);
      cpu.parallel(rows, 32, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) {
          float* to = words + r * depth;
          std::fill_n(to, depth, 0.0f);
          to_panel_words(simd, pairs, a.x.dtype, a.x.element((first + r) * layout.channels),
                         layout.channels, 1, layout.channels, to, depth);
        }
      });
      simd.pack_few_rows(rows, depth, words, packed);
      cpu.parallel(
          static_cast<int64_t>(chunks.size()) - 1, 1, [&](int64_t begin, int64_t end, int thread) {
            float* sums = strips + thread * strip;
            float* bias = sums + chunk_rows * ld;
            for (int64_t p = chunks[begin]; p < chunks[end]; p += strip_panels) {
              const int64_t panels = std::min(strip_panels, chunks[end] - p);
              const int64_t j = p * kQuantizedPanel;
              const int64_t n = std::min(panels * kQuantizedPanel, layout.features - j);
              if (a.bias) simd.to_f32(a.bias.dtype, a.bias.element(j), bias, n);
              simd.multiply_quantized(
                  {.rows = rows,
                   .panels = panels,
                   .groups = layout.groups(),
                   .group = layout.group,
                   .bits = layout.bits,
                   .pairs = pairs,
                   .values = a.values.as<const uint8_t>() + p * panel_bytes,
                   .scales = a.scales.as<const uint16_t>() + p * layout.groups() * kQuantizedPanel,
                   .x = packed,
                   .bias = a.bias ? bias : nullptr,
                   .out = sums,
                   .ld = ld});
              for (int64_t r = 0; r < rows; ++r)
                simd.from_f32(a.out.dtype, sums + r * ld,
                              a.out.element((first + r) * layout.features + j), n);
            }
          });
    }
  });
}

}  // namespace p2r::cpu
