// Learned position embeddings of the Qwen3-VL vision tower: a square table of S x S rows, resized
// to each grid of patches (t, h, w) by bilinear interpolation with aligned corners
// (fast_pos_embed_interpolate in Hugging Face transformers). A patch in row r and column c has
//
//   y = r (S - 1) / (h - 1),  x = c (S - 1) / (w - 1)          0 on an axis of one patch
//   out[token] = Σ over the four corners of (y, x) of weight · table[corner]
//
// weight (1 - dy)(1 - dx), (1 - dy) dx, dy (1 - dx), dy dx with dy = y - floor(y), dx likewise; the
// upper corner of the last row or column is itself. All frames of a grid are alike; the order of
// tokens is that of ops/grid.h.
//
// table [S², C] f32 | f16 | bf16, out [T, C] as the table. y and x are f32, computed from the
// nearer end as torch.linspace has them; weights and sums are f32, rounded once.
#pragma once
#include <tuple>
#include <vector>

#include "ops/grid.h"
#include "ops/tensor.h"

namespace p2r {

struct VisionPositionsArgs {
  In table;
  Ints grid_thw;  // t, h, w of each grid; h and w are multiples of merge
  int64_t merge = 2, side = 0;
  Out out;
  auto fields() { return std::tie(table, grid_thw, merge, side, out); }
  double work() const { return 4.0 * out.size(); }
};

// The two rows (or columns) of the table that one of the grid is interpolated from, and the weight
// of the second.
struct AxisSample {
  int32_t low, high;
  float weight;
};

// Where the samples of a grid's rows and of its columns begin.
struct AxisStart {
  int32_t rows, columns;
};
struct AxisSamples {
  std::vector<AxisSample> samples;
  std::vector<AxisStart> starts;  // of each grid
};

inline AxisSamples axis_samples(const std::vector<PatchGrid>& grids, int64_t side) {
  AxisSamples out;
  const auto axis = [&](int32_t n) {
    const int32_t at = static_cast<int32_t>(out.samples.size());
    const float last = static_cast<float>(side - 1);
    const float step = n > 1 ? last / static_cast<float>(n - 1) : 0;
    for (int32_t i = 0; i < n; ++i) {
      const float position = i < n / 2 || n == 1 ? step * static_cast<float>(i)
                                                 : last - step * static_cast<float>(n - 1 - i);
      const int32_t low = static_cast<int32_t>(position);
      out.samples.push_back(
          {low, low + 1 < side ? low + 1 : low, position - static_cast<float>(low)});
    }
    return at;
  };
  for (const PatchGrid& g : grids) {
    const int32_t rows = axis(g.height);
    out.starts.push_back({rows, axis(g.width)});
  }
  return out;
}

}  // namespace p2r
