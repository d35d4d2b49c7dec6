// Rotary position embedding (Su et al., RoFormer, 2021) in the rotate-half form, with the
// two-dimensional tables of the Qwen-VL vision towers (Wang et al., Qwen2-VL, 2024).
//
// vision_rotary: tables for grids of patches (t, h, w), tokens in the order of ops/grid.h; all
// frames of a grid have the same positions (row, column). With frequencies f_i = theta^(-2i /
// (D/2)), i = 0..D/4-1,
//
//   angle = [row f_0 .. row f_(D/4-1), column f_0 .. column f_(D/4-1)], twice
//   cos, sin [T, D] f32
//
// Frequencies and angles are rounded to f32, as in the models' own code: at position 200 this alone
// changes an angle by some 1e-5, so a table from exact angles would differ from theirs.
//
// apply_rotary: x, out [T, H, D] f32 | f16 | bf16; cos, sin [T, D] f32, any values.
//
//   out_i       = x_i cos_i             - x_(i+D/2) sin_i                 i < D/2
//   out_(i+D/2) = x_(i+D/2) cos_(i+D/2) + x_i       sin_(i+D/2)
//
// or, with `inverse`, the transpose of that matrix: its inverse where the tables are cosines and
// sines, and its backward always. Computed in f32, rounded once. D is a multiple of 8 up to 128.
#pragma once
#include <cmath>
#include <tuple>
#include <vector>

#include "ops/tensor.h"

namespace p2r {

struct VisionRotaryArgs {
  Ints grid_thw;  // t, h, w of each grid; h and w are multiples of merge
  int64_t merge = 2;
  double theta = 10000;
  Out cos, sin;
  auto fields() { return std::tie(grid_thw, merge, theta, cos, sin); }
};

struct ApplyRotaryArgs {
  In x, cos, sin;
  bool inverse = false;
  Out out;
  auto fields() { return std::tie(x, cos, sin, inverse, out); }
};

// f_0 .. f_(D/4-1), rounded where the models' code rounds: the exponent, the power, its reciprocal.
inline std::vector<float> rotary_frequencies(double theta, int64_t head_dim) {
  const float axis_dim = static_cast<float>(head_dim / 2);
  std::vector<float> out;
  for (int64_t i = 0; i < head_dim / 4; ++i) {
    const float exponent = static_cast<float>(2 * i) / axis_dim;
    out.push_back(1.0f / static_cast<float>(std::pow(theta, static_cast<double>(exponent))));
  }
  return out;
}

}  // namespace p2r
