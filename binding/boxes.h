// Arguments shared by drawing and resampling; defined in binding/draw_boxes.cc.
#pragma once
#include "binding/op.h"

namespace p2r::binding {

// Reads boxes [n, 4], colors [m, 3] and the line width (or null, as -1); sorts corners.
void read_boxes(Call& call, Ints* boxes, Ints* colors, int64_t* width);
// Must be [height, width, 3].
void check_image(const Call& call, const char* name, const View& image);

}  // namespace p2r::binding
