// Layer normalisation (Ba, Kiros and Hinton, 2016) over the last axis.
//
//   mean = Σ x / C,   rstd = 1 / √(Σ (x - mean)² / C + eps)
//   out  = x̂ weight + bias,   x̂ = (x - mean) rstd
//
//   g  = dOut weight
//   dX = rstd (g - Σ g / C - x̂ Σ g x̂ / C)
//   dWeight = Σ_rows dOut x̂,   dBias = Σ_rows dOut
//
// x, out, dOut, dX [..., C] f32 | f16 | bf16; weight [C] as x; bias [C] as x or f32; stats f32
// [rows, 2] holds mean and rstd; dWeight, dBias f32 [C]. Everything is computed in f32. The mean
// and the variance are taken in two passes, the second of which also corrects the mean that the
// first found, so that rows far from zero keep their digits. dWeight and dBias are summed by
// ops/row_slices.h; without rows they are 0. Outputs may not overlap inputs.
#pragma once
#include <tuple>

#include "ops/tensor.h"

namespace p2r {

struct LayerNormArgs {
  In x, weight, bias;
  double eps = 1e-6;
  Out out, stats;
  auto fields() { return std::tie(x, weight, bias, eps, out, stats); }
};

struct LayerNormBackwardArgs {
  In d_out, x, weight, stats;
  Out d_x, d_weight, d_bias;
  auto fields() { return std::tie(d_out, x, weight, stats, d_x, d_weight, d_bias); }
};

}  // namespace p2r
