// Rotary position embedding: tables for grids of patches, and their application.
#include "ops/rotary.h"

#include <algorithm>
#include <cmath>

#include "cpu/device.h"

namespace p2r::cpu {

// Cosine and sine of each position once; a token's row is assembled from those of its row and
// column.
void vision_rotary(const VisionRotaryArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t dim = a.cos.shape[1], n = dim / 4;
  int64_t positions = 0;
  for (size_t g = 0; g < a.grid_thw.size(); g += 3)
    positions = std::max({positions, a.grid_thw[g + 1], a.grid_thw[g + 2]});
  const Scratch scratch = cpu.scratch(positions * 2 * n * sizeof(float));
  float* table = scratch.as<float>();  // [positions][cos, sin][n]

  const std::vector<float> frequencies = rotary_frequencies(a.theta, dim / 2);
  cpu.launch(positions, 256, [=](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t i = 0; i < n; ++i) {
        const double angle = static_cast<float>(p) * frequencies[i];  // rounded to f32 before
        table[p * 2 * n + i] = static_cast<float>(std::cos(angle));
        table[p * 2 * n + n + i] = static_cast<float>(std::sin(angle));
      }
  });

  // A band is one row of merge blocks: `merge` rows of patches of one frame.
  struct Band {
    int64_t token, row, width;
  };
  std::vector<Band> bands;
  int64_t token = 0;
  for (size_t g = 0; g < a.grid_thw.size(); g += 3) {
    const int64_t t = a.grid_thw[g], h = a.grid_thw[g + 1], w = a.grid_thw[g + 2];
    for (int64_t frame = 0; frame < t && h * w > 0; ++frame)
      for (int64_t row = 0; row < h; row += a.merge, token += a.merge * w)
        bands.push_back({token, row, w});
  }
  const int64_t count = static_cast<int64_t>(bands.size());
  cpu.launch(count, 1,
             [=, merge = a.merge, cos = a.cos.as<float>(), sin = a.sin.as<float>(),
              bands = std::move(bands)](int64_t begin, int64_t end, int) {
               const auto fill = [=](float* out, const float* row, const float* column) {
                 std::copy_n(row, n, out);
                 std::copy_n(column, n, out + n);
                 std::copy_n(out, 2 * n, out + 2 * n);
               };
               for (int64_t b = begin; b < end; ++b) {
                 int64_t at = bands[b].token * dim;
                 for (int64_t left = 0; left < bands[b].width; left += merge)
                   for (int64_t r = 0; r < merge; ++r)
                     for (int64_t c = 0; c < merge; ++c, at += dim) {
                       const float* row = table + (bands[b].row + r) * 2 * n;
                       const float* column = table + (left + c) * 2 * n;
                       fill(cos + at, row, column);
                       fill(sin + at, row + n, column + n);
                     }
               }
             });
}

void mrope_tables(const MropeTablesArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t tokens = a.cos.shape[0], dim = a.cos.shape[1], half = dim / 2;
  const MropeAxes axes(a.sections);
  const std::vector<float> frequencies = rotary_frequencies(a.theta, dim);
  cpu.launch(tokens, 8, [=](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i = 0; i < half; ++i) {
        const float position = static_cast<float>(a.positions[axes.of(i) * tokens + t]);
        const double angle = position * frequencies[i];  // rounded to f32 before
        float* cos = a.cos.as<float>() + t * dim + i;
        float* sin = a.sin.as<float>() + t * dim + i;
        cos[0] = cos[half] = static_cast<float>(std::cos(angle));
        sin[0] = sin[half] = static_cast<float>(std::sin(angle));
      }
  });
}

void apply_rotary(const ApplyRotaryArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  const int64_t heads = a.x.shape[1], dim = a.x.shape[2], width = heads * dim;
  if (!width) return;
  const int64_t grain = std::max<int64_t>(1, 16384 / width);
  cpu.launch(a.x.shape[0], grain, [=, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
    float row[128];
    for (int64_t t = begin; t < end; ++t)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = t * width + h * dim;
        simd.to_f32(a.x.dtype, a.x.element(at), row, dim);
        simd.rotate_half(row, a.cos.as<float>() + t * dim, a.sin.as<float>() + t * dim, dim / 2,
                         a.inverse, row);
        simd.from_f32(a.out.dtype, row, a.out.element(at), dim);
      }
  });
}

}  // namespace p2r::cpu
