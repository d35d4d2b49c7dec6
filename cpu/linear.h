// What linear layers share, of weights in floating point and quantised ones.
#pragma once
#include <cstdint>
#include <vector>

#include "ops/tensor.h"

namespace p2r::cpu {

// The product of the leading axes.
inline int64_t rows_of(const View& v) {
  int64_t rows = 1;
  for (int i = 0; i + 1 < v.shape.rank; ++i) rows *= v.shape[i];
  return rows;
}

// `tiles` tiles of features cut into chunks, as their first tiles and the end. A thread that takes
// a chunk gets half of its share of what is left, so that it reads long stretches of the weight, of
// at least `least` tiles, and still all threads end together.
std::vector<int64_t> cut_features(int64_t tiles, int64_t least, int threads);

}  // namespace p2r::cpu
