// One sample a row from softmax(logits / temperature), by inverting the cumulative distribution.
//
//   weight[i] = 2^S · 2^-((max - logits[i]) log2(e) / temperature), a whole number (ops/philox.h)
//   total     = Σ weight,   target = floor(total · u / 2^64)
//   out       = the smallest i whose weight[0] + ... + weight[i] exceeds target
//
// u: 64 bits of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)
// with the seed as key and the row as counter. Temperature 0 takes the largest logit, the first of
// equals. logits [N, V] f32 | f16 | bf16, V > 0 unless N is 0; out i32 [N]; seed 0 .. 2^53 - 1.
// After the one subtraction and one product in f32, which every machine rounds alike, all
// arithmetic is on integers. Sums of integers do not depend on their order, so every backend,
// instruction set and thread count draws the same tokens. A weight has a relative error of some
// 1e-7, plus 2^-S of the largest, S = 62 - log2(V) and at most 44. A logit of -infinity is never
// drawn. A row with NaN or +infinity, or of -infinity alone, faults and results in -1.
#pragma once
#include <tuple>

#include "ops/fault.h"
#include "ops/tensor.h"

namespace p2r {

struct SampleArgs {
  In logits;
  double temperature = 1;
  int64_t seed = 0;
  Out out;
  FaultFlag fault;
  FaultSource fault_source() const { return {Invalid::logits}; }
  auto fields() { return std::tie(logits, temperature, seed, out); }
  double work() const { return 256.0 * logits.shape[0]; }
};

}  // namespace p2r
