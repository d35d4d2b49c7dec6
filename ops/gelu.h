// GELU (Hendrycks and Gimpel, 2016), element by element.
//
//   none:  y = x Φ(x),                         Φ(x) = (1 + erf(x / √2)) / 2
//   tanh:  y = x (1 + tanh(u)) / 2,            u = √(2/π) (x + 0.044715 x³)
//   dx = dy · y'(x)
//
// x, y, dy, dx: any shape, f32 | f16 | bf16, computed in f32 and rounded once. out may be x.
// At -infinity y is -0 and y' 0, their limits; NaN stays NaN.
#pragma once
#include <tuple>

#include "ops/tensor.h"

namespace p2r {

struct GeluArgs {
  In x;
  bool tanh = false;
  Out out;
  auto fields() { return std::tie(x, tanh, out); }
};

struct GeluBackwardArgs {
  In d_out, x;
  bool tanh = false;
  Out d_x;
  auto fields() { return std::tie(d_out, x, tanh, d_x); }
};

}  // namespace p2r
