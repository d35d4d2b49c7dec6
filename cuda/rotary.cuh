// The rotation itself, for kernels that rotate rows of their own (cuda/rotary.cu, cuda/attention).
#pragma once
#include "cuda/launch.cuh"

namespace p2r::cuda {

// Entry c of a rotated row, or with `inverse` of one rotated back; x(i) gives the row's entries,
// cos and sin are its rows of the tables.
template <class Row>
__device__ __forceinline__ float rotate_half(const Row& x, const float* cos, const float* sin,
                                             int c, int half, bool inverse) {
  if (inverse)
    return c < half ? cos[c] * x(c) + sin[c + half] * x(c + half)
                    : cos[c] * x(c) - sin[c - half] * x(c - half);
  return c < half ? cos[c] * x(c) - sin[c] * x(c + half) : cos[c] * x(c) + sin[c] * x(c - half);
}

// Rotates x [tokens, heads, d] into out; x_row and out_row are the elements from token to token.
template <class T>
void rotate_rows(const T* x, int64_t x_row, const float* cos, const float* sin, T* out,
                 int64_t out_row, int64_t tokens, int64_t heads, int64_t d, bool inverse,
                 Device& device);

}  // namespace p2r::cuda
