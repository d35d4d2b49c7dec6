// The arithmetic of the online softmax, which has the same bits in every kernel that a row of
// logits may meet, whatever a lane stands for.
#pragma once
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

// exp2(logit scale - origin) fuses the product but not the one in `origin`, whose rounding error
// scales every weight of a row alike: the division by their sum removes it. From here on the error
// could leave f32's range.
constexpr float kLargeOrigin = 0x1p27f;

// After a maximum `before` (a minimum if scale < 0) has become `after`: the factor for sums and
// outputs so far, what is subtracted from logits first (0 but where the origin would be large), and
// what exponents are relative to. Where every logit so far is -inf, weights are 0, not
// exp(-inf + inf).
struct Rescaling {
  vf factor, shift, origin;
};
inline Rescaling rescaling(vf before, vf after, float scale, float scale_log2) {
  const float infinity = __builtin_inff();
  const vi none = after == (scale < 0 ? infinity : -infinity);
  const vf extreme = none ? vf{} : after, origin = extreme * scale_log2;
  const vi large = from_bits(bits(origin) & 0x7FFFFFFFu) > kLargeOrigin;
  return {exp2((before - extreme) * scale_log2), large ? extreme : vf{}, large ? vf{} : origin};
}

// exp(scale (logit - max)), of a logit less rescaling's shift, and its origin.
inline vf softmax_weight(vf logit, float scale_log2, vf origin) {
  return exp2(logit * scale_log2 - origin);
}

}  // namespace p2r::cpu::P2R_ISA
