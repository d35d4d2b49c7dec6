// Regions cut out of images and resampled, byte for byte as Pillow's crop(box).resize(size,
// filter); and the same laid out as the patches that a Qwen-VL vision tower takes.
//
// A region: image, x0, y0, x1, y1, height, width, overlay. The box is half open, in whole pixels,
// not empty; what it has outside the image is black. The filter reads nothing beyond the crop.
// Where overlay is 1 the boxes of ops/draw_boxes.h are drawn over the image as it is read (line
// width and colours as there): the values are those of an annotated copy, without making one.
//
//   middle[y, x] = clamp8((2^21 + Σ_i wx[x, i] crop[y, fx[x] + i]) >> 22)      u8, every row needed
//   result[y, x] = clamp8((2^21 + Σ_j wy[y, j] middle[fy[y] + j, x]) >> 22)    u8
//
// with integer weights from ops/resample_plan.h; an axis whose size does not change is copied.
// Channels are independent. The pass along x always comes first (Pillow 12.2 and later start with y
// for images over 100 times as tall as wide). Source: Pillow, libImaging/Resample.c.
//
// crop_resample: out[i] u8 [height, width, 3], one a region.
//
// pixel_values: out [P, 3 · temporal · patch²], f32 | f16 | bf16 | u8, P = Σ (height / patch)(width
// / patch); height and width are multiples of patch · merge. A value is (v / 255 - mean[c]) /
// std[c] in float64, rounded once, by a table of 256 entries a channel; of u8 it is v itself, and
// mean and std are not used. Patch (py, px) of a region, with m = merge and g = width / patch, is
// row ((py / m)(g / m) + px / m) m² + (py mod m) m + px mod m after the regions before it; column
// ((c · temporal + t) patch + y) patch + x, the same for every t. merge 1: row-major. Source:
// Qwen2VLImageProcessor in Hugging Face transformers.
//
// normalize_patches: patches u8 [P, 3 n] to out f32 | f16 | bf16 of that shape, by the same table:
// column j is of channel j / n. As v is rounded to a byte before it is normalised in either way,
// pixel_values of u8 and then normalize_patches are pixel_values of a float type, bit for bit.
//
// Exact and so the same on every backend. No regions: nothing, or [0, ...].
#pragma once
#include <tuple>
#include <vector>

#include "ops/enums.h"
#include "ops/tensor.h"

namespace p2r {

constexpr int64_t kRegionFields = 8;

// A bound on the multiply-adds of resampling regions, by the widest filter: lanczos, with six taps
// and one more, times the scale.
inline double resample_work(const Ints& regions) {
  double sum = 0;
  for (size_t i = 0; i + kRegionFields <= regions.size(); i += kRegionFields) {
    const int64_t* r = &regions[i];
    const double w = r[3] - r[1], h = r[4] - r[2], height = r[5], width = r[6];
    const auto taps = [](double from, double to) { return 7 * (from > to ? from / to : 1); };
    sum += 3 * width * (h * taps(w, width) + height * taps(h, height));
  }
  return sum;
}

struct CropResampleArgs {
  std::vector<In> images;  // u8 [h, w, 3]
  Ints regions;            // [n, kRegionFields]
  Filter filter = Filter::bicubic;
  Ints boxes, colors;  // of the overlay, as in DrawBoxesArgs
  int64_t line_width = -1;
  std::vector<Out> out;
  auto fields() { return std::tie(images, regions, filter, boxes, colors, line_width, out); }
  double work() const { return resample_work(regions); }
};

struct PixelValuesArgs {
  std::vector<In> images;
  Ints regions;
  Filter filter = Filter::bicubic;
  Ints boxes, colors;
  int64_t line_width = -1;
  int64_t patch = 16, temporal = 2, merge = 2;
  std::vector<double> mean, std;  // [3]
  Out out;
  auto fields() {
    return std::tie(images, regions, filter, boxes, colors, line_width, patch, temporal, merge,
                    mean, std, out);
  }
  double work() const { return resample_work(regions); }
};

struct NormalizePatchesArgs {
  In patches;
  std::vector<double> mean, std;  // [3]
  Out out;
  auto fields() { return std::tie(patches, mean, std, out); }
};

}  // namespace p2r
