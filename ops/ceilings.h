// What the processor can do at most with a number of threads: the ceilings that benchmarks hold
// operations to.
#pragma once
#include <cstdint>

namespace p2r {

// Operations and bytes a second; bytes written count too. The best of the rounds, since whatever
// disturbs a round only makes it slower.
struct Ceilings {
  double fma = 0;     // f32 multiply-adds from registers, two operations each
  double bf16 = 0;    // products of bf16 added to f32, likewise; 0 without such instructions
  double read = 0;    // of the buffers
  double copy = 0;    // from one to another, past the caches where the buffers are larger
  double update = 0;  // in place
};

// The buffers of all threads together have `bytes`, so that a small number measures the caches. At
// most `rounds` of some milliseconds. Errors: Code::value, memory.
Ceilings measure_ceilings(int threads, int64_t bytes, int rounds);

}  // namespace p2r
