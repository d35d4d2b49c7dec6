// Pixels of an image with strokes over it, for draw_boxes and crop_resample.
#pragma once
#include "cuda/launch.cuh"
#include "ops/draw_boxes.h"

namespace p2r::cuda {

// Which strokes [range[0], range[1]) of a list meet the rows [top, bottom); one call by the whole
// block. Most blocks meet none, and then a pixel costs one read.
__device__ inline void strokes_in_rows(const Stroke* strokes, int32_t count, int64_t top,
                                       int64_t bottom, int32_t* range) {
  if (threadIdx.x == 0) {
    range[0] = count;
    range[1] = 0;
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < count; i += blockDim.x)
    if (strokes[i].y0 < bottom && strokes[i].y1 > top) {
      atomicMin(&range[0], i);
      atomicMax(&range[1], i + 1);
    }
  __syncthreads();
}

// The colour that lies over a pixel: the image's own or that of the last stroke upon it.
__device__ inline const uint8_t* stroked(const uint8_t* own, const Stroke* strokes, int32_t begin,
                                         int32_t end, int64_t y, int64_t x) {
  for (int32_t i = end - 1; i >= begin; --i) {
    const Stroke& s = strokes[i];
    if (y >= s.y0 && y < s.y1 && x >= s.x0 && x < s.x1) return s.color;
  }
  return own;
}

}  // namespace p2r::cuda
