// Host-side preparation of resampling that both backends share: integer weights for each axis, the
// strokes of the overlay, and the table of normalised values. Computed in float64 without
// contraction, in Pillow's order of operations, so that every weight equals Pillow's.
//
// Weights of one axis of n source pixels, with scale = n / out and f = max(scale, 1): output x has
// its centre at (x + 0.5) scale and takes the source pixels within support · f of it, weighted by
// the filter at their distance / f, normalised to a sum of 1 and rounded to 22 bits, half away from
// zero. Pixels beyond the ends are dropped, not repeated.
//
//   box 0.5: 1     bilinear 1: 1 - |x|     bicubic 2: Keys, a = -0.5     lanczos 3: sinc(x)
//   sinc(x/3)
#pragma once
#include <map>
#include <utility>
#include <vector>

#include "ops/crop_resample.h"
#include "ops/draw_boxes.h"

namespace p2r {

constexpr int kWeightBits = 22;

struct Axis {
  int64_t in = 0, out = 0;
  bool copy = true;    // in == out: nothing is filtered
  int64_t taps = 1;    // of every output, weights of 0 included; first + taps <= in
  int64_t stride = 4;  // of a row of weights: taps rounded up to 4, padded with zeros
  std::vector<int32_t> first, weights;
};
Axis resample_axis(int64_t in, int64_t out, Filter filter);

struct RegionPlan {
  int64_t image, x0, y0, x1, y1, height, width;
  bool overlay;
  const Axis *x, *y;
  int64_t crop_width() const { return x1 - x0; }
  int64_t crop_height() const { return y1 - y0; }
};

struct ResamplePlan {
  ResamplePlan(const std::vector<In>& images, const Ints& regions, Filter filter, const Ints& boxes,
               const Ints& colors, int64_t line_width);
  ResamplePlan(const ResamplePlan&) = delete;

  std::vector<RegionPlan> regions;
  std::vector<std::vector<Stroke>> strokes;  // of each image
  std::map<std::pair<int64_t, int64_t>, Axis> axes;
};

// 3 x 256 values of a float type: (v / 255 - mean[c]) / std[c]. Of u8: nothing, bytes stay as they
// are.
std::vector<char> pixel_table(const std::vector<double>& mean, const std::vector<double>& std,
                              DType dtype);

}  // namespace p2r
