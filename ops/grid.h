// Grids of patches (t, h, w) in the order of the Qwen-VL vision towers: frame by frame, each frame
// in merge-block order: block row, block column, row in the block, column in the block, for blocks
// of `merge` x `merge` patches. Every patch is a token.
#pragma once
#include <cstdint>
#include <vector>

#include "ops/tensor.h"

namespace p2r {

struct PatchGrid {
  int64_t first = 0, frame = 0;  // its first token, and the tokens of a frame
  int32_t height = 0, width = 0;
};

// Those that have patches, in order.
inline std::vector<PatchGrid> patch_grids(const Ints& grid_thw) {
  std::vector<PatchGrid> grids;
  int64_t first = 0;
  for (size_t g = 0; g + 3 <= grid_thw.size(); g += 3) {
    const int64_t t = grid_thw[g], h = grid_thw[g + 1], w = grid_thw[g + 2];
    if (t * h * w == 0) continue;
    grids.push_back({first, h * w, static_cast<int32_t>(h), static_cast<int32_t>(w)});
    first += t * h * w;
  }
  return grids;
}

// The grid of a token: the last that starts at or before it.
constexpr int grid_of(const PatchGrid* grids, int count, int64_t token) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (grids[middle].first <= token)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

struct PatchPlace {
  int32_t row, column;
};
constexpr PatchPlace place_of(const PatchGrid& grid, int64_t token, int32_t merge) {
  const int64_t place = (token - grid.first) % grid.frame;
  const int64_t block = place / (merge * merge), blocks = grid.width / merge;
  const int32_t inside = static_cast<int32_t>(place % (merge * merge));
  return {static_cast<int32_t>(block / blocks) * merge + inside / merge,
          static_cast<int32_t>(block % blocks) * merge + inside % merge};
}

}  // namespace p2r
