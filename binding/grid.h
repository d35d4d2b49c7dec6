// Checks of grids of patches.
#pragma once
#include "binding/op.h"

namespace p2r::binding {

// The number of tokens of gridThw (t, h, w of each grid), whose h and w must be multiples of
// mergeSize.
inline int64_t tokens_of_grids(const Call& call, const Ints& grid_thw, int64_t merge) {
  call.check(grid_thw.size() % 3 == 0, Code::value, "gridThw must have t, h, w for each grid");
  int64_t tokens = 0;
  for (size_t g = 0; g < grid_thw.size(); g += 3) {
    const int64_t t = grid_thw[g], h = grid_thw[g + 1], w = grid_thw[g + 2];
    const std::string name = "gridThw[" + std::to_string(g / 3) + "]";
    call.check(h % merge == 0 && w % merge == 0, Code::value,
               name + " must have h and w that are multiples of mergeSize " +
                   std::to_string(merge) + ", got " + std::to_string(h) + " x " +
                   std::to_string(w));
    const int64_t frame = h * w;  // below 2^62
    call.check(frame == 0 || t <= (INT32_MAX - tokens) / frame, Code::shape,
               name + " makes more than 2147483647 tokens");
    tokens += t * frame;
  }
  return tokens;
}

}  // namespace p2r::binding
