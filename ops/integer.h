// Integer arithmetic of tilings.
#pragma once
#include <cstdint>

namespace p2r {

// The number of tiles of b that cover a: ceil(a / b). a >= 0, b > 0.
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// a rounded up to a multiple of b. a >= 0, b > 0.
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace p2r
