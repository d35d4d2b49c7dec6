// Pixels of an image under an overlay of strokes (filled rectangles), for draw_boxes and
// crop_resample.
#pragma once
#include "cuda/launch.cuh"
#include "ops/draw_boxes.h"

namespace p2r::cuda {

// Stores to range, in shared memory, the first stroke that intersects the rows [top, bottom) and
// the last + 1; called by the whole block. Most blocks intersect none, and then a pixel costs one
// read.
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

// The colour of a pixel: of the last stroke in [begin, end) that covers it, or the image's own.
__device__ inline const uint8_t* pixel_color(const uint8_t* own, const Stroke* strokes,
                                             int32_t begin, int32_t end, int64_t y, int64_t x) {
  for (int32_t i = end - 1; i >= begin; --i) {
    const Stroke& s = strokes[i];
    if (y >= s.y0 && y < s.y1 && x >= s.x0 && x < s.x1) return s.color;
  }
  return own;
}

}  // namespace p2r::cuda
