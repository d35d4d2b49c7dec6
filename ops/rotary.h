// Rotary position embedding (Su et al., RoFormer, 2021) in the rotate-half form, with the tables of
// the Qwen-VL models (Wang et al., Qwen2-VL, 2024): two-dimensional ones of the vision towers, and
// multimodal ones of the language models.
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
// mrope_tables: tables for tokens of text, images and videos. positions [3, T] are each token's in
// time, height and width, all equal for text. The frequencies f_i = theta^(-2i / D), i = 0..D/2-1,
// are dealt out to the axes in turn (interleaved, as in Qwen3-VL; Qwen2-VL has contiguous
// sections):
//
//   axis(i) = height   if i % 3 = 1 and i < 3 sections[1]
//             width    if i % 3 = 2 and i < 3 sections[2]
//             time     otherwise
//   angle   = [position[axis(0)] f_0 .. position[axis(D/2-1)] f_(D/2-1)], twice
//   cos, sin [T, D] f32
//
// Without sections positions are [T], one a token: the ordinary tables of text. Positions,
// frequencies and angles are rounded to f32 as in the models' own code, cosine and sine are those
// of that angle, however large. A token's rows depend on its positions alone.
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

struct MropeTablesArgs {
  Ints positions;  // [3, T] or, without sections, [T]
  Ints sections;   // 3, or none
  double theta = 10000;
  Out cos, sin;
  auto fields() { return std::tie(positions, sections, theta, cos, sin); }
  double work() const { return 16.0 * cos.size(); }
};

struct ApplyRotaryArgs {
  In x, cos, sin;
  bool inverse = false;
  Out out;
  auto fields() { return std::tie(x, cos, sin, inverse, out); }
};

// theta^(-2i / dim), i = 0..dim/2-1, rounded where the models' code rounds: the exponent, the
// power, its reciprocal.
inline std::vector<float> rotary_frequencies(double theta, int64_t dim) {
  std::vector<float> out;
  for (int64_t i = 0; i < dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(dim);
    out.push_back(1.0f / static_cast<float>(std::pow(theta, static_cast<double>(exponent))));
  }
  return out;
}

// Which of a token's positions turns frequency i: 0 time, 1 height, 2 width.
struct MropeAxes {
  int64_t height_end = 0, width_end = 0;

  explicit MropeAxes(const Ints& sections) {
    if (sections.empty()) return;
    height_end = 3 * sections[1];
    width_end = 3 * sections[2];
  }
  constexpr int of(int64_t i) const {
    return i % 3 == 1 && i < height_end ? 1 : i % 3 == 2 && i < width_end ? 2 : 0;
  }
};

}  // namespace p2r
