// Outlines of boxes on an image, byte for byte as Pillow's ImageDraw.rectangle(outline, width).
//
//   out = image, then for each box (x0, y0, x1, y1), both corners inclusive, for i = 0 .. width -
//   1:
//     row y0 + i and row y1 - i over the columns x0 .. x1,
//     column x0 + i and column x1 - i over the rows between the two bands of rows.
//
// image, out: u8 [h, w, 3]. boxes [n, 4] with x0 <= x1 and y0 <= y1, of any size and position:
// what is outside the image is clipped. colors [m, 3]: box i has colour i mod m. Later boxes
// overwrite earlier ones; there is no blending. width < 0: max(3, floor(0.003 w))
// (Perceive-to-Reason); width 0 draws nothing. The border grows inwards; where a box is thinner
// than two borders it extends past the opposite edge, as in Pillow (libImaging/Draw.c,
// ImagingDrawRectangle): bands of rows reach to y0 + width - 1 beyond y1, and columns fill the rows
// y1 - width + 2 .. y0 + width.
#pragma once
#include <tuple>
#include <vector>

#include "ops/tensor.h"

namespace p2r {

struct DrawBoxesArgs {
  In image;
  Ints boxes, colors;
  int64_t width = -1;
  Out out;
  auto fields() { return std::tie(image, boxes, colors, width, out); }
};

// A filled rectangle of one colour, half open and inside its image.
struct Stroke {
  int32_t x0, y0, x1, y1;
  uint8_t color[3];
};

// The strokes that draw the boxes on an image of this size, to be filled in order.
std::vector<Stroke> strokes_of(const Ints& boxes, const Ints& colors, int64_t width,
                               int64_t image_height, int64_t image_width);

}  // namespace p2r
