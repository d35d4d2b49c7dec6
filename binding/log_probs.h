// What operations that divide logits by a temperature share.
#pragma once

namespace p2r::binding {

constexpr double kColdest = 1e-6, kHottest = 1e6;

}  // namespace p2r::binding
