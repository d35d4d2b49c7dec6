// Root mean square normalisation (Zhang and Sennrich, 2019) over the last axis, as in Llama and
// Qwen, with the addition of a residual stream fused into it.
//
//   s = x, or x + residual, rounded to their type and returned as `sum`
//   rstd = 1 / √(Σ s² / C + eps),   out = s rstd weight
//
//   g  = dOut weight
//   dX = rstd (g - s rstd² Σ g s / C) + dSum       also the gradient of the residual
//   dWeight = Σ_rows dOut s rstd
//
// x, residual, sum, out, dOut, dSum, dX [..., C] f32 | f16 | bf16, of one type; weight [C] as x;
// rstd f32 [...]; dWeight f32 [C]. backward's x is the sum where there was a residual. Everything
// is computed in f32 and rounded once: a row whose squares exceed f32 has rstd 0. A row's result
// does not depend on the other rows or their number. dWeight is summed by ops/row_slices.h; without
// rows it is 0. Outputs may not overlap inputs.
#pragma once
#include <tuple>

#include "ops/tensor.h"

namespace p2r {

struct RmsNormArgs {
  In x, weight;
  double eps = 1e-6;
  In residual;  // may be absent, and with it sum
  Out out, rstd, sum;
  auto fields() { return std::tie(x, weight, eps, residual, out, rstd, sum); }
};

struct RmsNormBackwardArgs {
  In d_out, x, weight, rstd;
  In d_sum;  // may be absent
  Out d_x, d_weight;
  auto fields() { return std::tie(d_out, x, weight, rstd, d_sum, d_x, d_weight); }
};

}  // namespace p2r
