#include "ops/draw_boxes.h"

#include <algorithm>

namespace p2r {

std::vector<Stroke> strokes_of(const Ints& boxes, const Ints& colors, int64_t width,
                               int64_t image_height, int64_t image_width) {
  if (width < 0)
    width = std::max<int64_t>(3, static_cast<int64_t>(0.003 * static_cast<double>(image_width)));
  std::vector<Stroke> out;
  if (width == 0 || colors.empty()) return out;
  for (size_t i = 0; i + 4 <= boxes.size(); i += 4) {
    const int64_t x0 = boxes[i], y0 = boxes[i + 1], x1 = boxes[i + 2], y1 = boxes[i + 3];
    const int64_t* color = &colors[i / 4 * 3 % colors.size()];
    // Rows and columns [x0, x1) x [y0, y1), clipped.
    auto fill = [&](int64_t left, int64_t top, int64_t right, int64_t bottom) {
      left = std::max<int64_t>(left, 0);
      top = std::max<int64_t>(top, 0);
      right = std::min(right, image_width);
      bottom = std::min(bottom, image_height);
      if (left >= right || top >= bottom) return;
      out.push_back({static_cast<int32_t>(left),
                     static_cast<int32_t>(top),
                     static_cast<int32_t>(right),
                     static_cast<int32_t>(bottom),
                     {static_cast<uint8_t>(color[0]), static_cast<uint8_t>(color[1]),
                      static_cast<uint8_t>(color[2])}});
    };
    fill(x0, y0, x1 + 1, y0 + width);
    fill(x0, y1 - width + 1, x1 + 1, y1 + 1);
    // The columns run from y0 + width to y1 - width + 1 (exclusive), downwards or upwards.
    int64_t top = y0 + width, bottom = y1 - width + 1;
    if (bottom < top) {
      std::swap(top, bottom);
      ++top;
      ++bottom;
    }
    fill(x0, top, x0 + width, bottom);
    fill(x1 - width + 1, top, x1 + 1, bottom);
  }
  return out;
}

}  // namespace p2r
