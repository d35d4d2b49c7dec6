// What every launcher needs: the launch itself (ptx.cuh), the stream, the grid of a grid-stride
// loop, and a kernel's instance by element type. Kernel files see no more of the CUDA runtime than
// this includes, so that the kernel twin can compile them (test/twin).
#pragma once
#include "cuda/float_types.cuh"
#include "cuda/ptx.cuh"
#include "cuda/stream.h"
#include "ops/integer.h"

namespace p2r::cuda {

// Blocks for a grid-stride loop over n items: enough to fill any chip, few enough to be cheap.
inline unsigned blocks_for(int64_t n, int block) {
  const int64_t wanted = ceil_div(n, block);
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted > 65536 ? 65536 : wanted);
}

// Calls f with a null pointer of the element type of a float dtype.
template <class F>
void with_float_type(DType t, F&& f) {
  if (t == DType::f32)
    f(static_cast<float*>(nullptr));
  else if (t == DType::f16)
    f(static_cast<__half*>(nullptr));
  else
    f(static_cast<__nv_bfloat16*>(nullptr));
}

}  // namespace p2r::cuda
