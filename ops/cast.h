// out[i] = x[i] in another type, any shape. Between float types to nearest even; from a float type
// to i32 and u8 by truncation towards zero, saturating, NaN to 0; from integers exactly where the
// type can hold the value, else to nearest even (through f32).
#pragma once
#include <tuple>

#include "ops/tensor.h"

namespace p2r {

struct CastArgs {
  In x;
  Out out;
  auto fields() { return std::tie(x, out); }
};

}  // namespace p2r
