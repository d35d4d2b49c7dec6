// Gradients of a row of parameters are sums over all rows of a batch. They are taken over slices of
// rows, whose size depends on the number of rows alone, and the slices' sums are added in order, so
// that the result does not depend on the thread count.
#pragma once
#include "ops/integer.h"

namespace p2r {

// Rows of one slice: about 64 slices.
constexpr int64_t row_slice(int64_t rows) {
  const int64_t slice = ceil_div(rows, 64);
  return slice < 16 ? 16 : slice > 512 ? 512 : slice;
}

}  // namespace p2r
