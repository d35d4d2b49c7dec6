// A linear layer, y = x Wᵀ + b, and its gradients:
//
//   y[n, f]  = Σ_c x[n, c] W[f, c] + b[f]
//   dx[n, c] = Σ_f dy[n, f] W[f, c]
//   dW[f, c] = Σ_n dy[n, f] x[n, c],    db[f] = Σ_n dy[n, f]
//
// x [..., C] of any rank from 1, its leading axes taken together as N rows; W [F, C]; b [F] or
// none; y, dy [..., F]. x, W, dy, dx have one type, f32 | f16 | bf16; y that type or f32; b that
// type or f32; dW and db f32. Sums are f32, in an order that depends on the shapes alone, and are
// rounded once (y f32: not at all). N, F or C may be 0: an empty sum is 0.
//
// On the CPU the order of y's sums depends on C alone: a row of y has the same bits alone, in any
// batch and with any number of threads, for each instruction set; and they are those of the logits
// inside linear_log_probs, before y is rounded. On CUDA so for the rows of one kernel, see
// cuda/linear.cu.
//
// The gradients of W and b are written to d_weight and d_bias, or added to into_weight and
// into_bias; of each pair one is given (of the second, none when there is no bias). Outputs share
// no memory with inputs.
#pragma once
#include <tuple>

#include "ops/tensor.h"

namespace p2r {

struct LinearArgs {
  In x, weight, bias;
  Out out;
  auto fields() { return std::tie(x, weight, bias, out); }
  double work() const { return 1.0 * out.size() * weight.shape[1]; }
};

struct LinearBackwardArgs {
  In d_out, x, weight;
  InOut into_weight, into_bias;
  Out d_x, d_weight, d_bias;
  auto fields() {
    return std::tie(d_out, x, weight, into_weight, into_bias, d_x, d_weight, d_bias);
  }
  double work() const { return 2.0 * d_out.size() * weight.shape[1]; }
};

}  // namespace p2r
