// The arguments that drawing and resampling share (binding/draw_boxes.cc).
#pragma once
#include "binding/op.h"

namespace p2r::binding {

// boxes [n, 4], colors [m, 3], line width or null: checked, corners in order.
void read_boxes(Call& call, Ints* boxes, Ints* colors, int64_t* width);
// [height, width, 3].
void check_image(const Call& call, const char* name, const View& image);

}  // namespace p2r::binding
