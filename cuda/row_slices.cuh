// Gradients of a row of parameters: sums over rows by slices (ops/row_slices.h). A block sums 32
// columns over one slice; a second kernel adds the slices in order, in f64.
#pragma once
#include "cuda/launch.cuh"
#include "ops/row_slices.h"

namespace p2r::cuda {

constexpr int kSliceBlock = 256, kSliceRows = kSliceBlock / 32;

// Terms: what a row adds to each of `count` gradients in a column,
//   void add(int64_t row, int64_t column, float (&sums)[count]) const.
// partials: [slices, count, c]. Blocks (columns / 32, slices) of 32 x 8 threads; slice 0 begins at
// row `first`.
template <class Terms>
__global__ void __launch_bounds__(kSliceBlock)
    slice_sums_kernel(Terms terms, float* partials, int64_t first, int64_t rows, int64_t c,
                      int64_t slice) {
  constexpr int count = Terms::count;
  static_assert(count <= kSliceRows);
  SMEM_ARRAY(float, shared, count* kSliceBlock);
  const int lane = static_cast<int>(threadIdx.x) % 32, group = static_cast<int>(threadIdx.x) / 32;
  const int64_t column = int64_t{blockIdx.x} * 32 + lane;
  const int64_t begin = first + int64_t{blockIdx.y} * slice;
  const int64_t end = begin + slice < rows ? begin + slice : rows;
  float sums[count] = {};
  if (column < c)
    for (int64_t r = begin + group; r < end; r += kSliceRows) terms.add(r, column, sums);
#pragma unroll
  for (int k = 0; k < count; ++k) shared[k * kSliceBlock + threadIdx.x] = sums[k];
  __syncthreads();
  if (group < count && column < c) {
    float sum = 0;
    for (int i = 0; i < kSliceRows; ++i) sum += shared[group * kSliceBlock + i * 32 + lane];
    partials[(int64_t{blockIdx.y} * count + group) * c + column] = sum;
  }
}

// The gradients [c] from partials [slices, gradients, c]; the second may be null.
void add_slices(const float* partials, int64_t slices, int64_t c, float* first, float* second,
                Device& device);

// The gradients of all rows; the second is null where Terms has one.
template <class Terms>
void row_gradients(const Terms& terms, int64_t rows, int64_t c, float* first, float* second,
                   Device& device) {
  if (!c) return;
  const int64_t slice = row_slice(rows), slices = ceil_div(rows, slice);
  const Scratch scratch =
      device.scratch(static_cast<size_t>(slices * Terms::count * c) * sizeof(float));
  float* partials = scratch.as<float>();
  // Slices are blockIdx.y, at most 65 535 a launch.
  constexpr int64_t kMaxSlices = 65535;
  for (int64_t s = 0; s < slices; s += kMaxSlices) {
    const int64_t n = slices - s < kMaxSlices ? slices - s : kMaxSlices;
    launch(slice_sums_kernel<Terms>,
           dim3(static_cast<unsigned>(ceil_div(c, 32)), static_cast<unsigned>(n)), kSliceBlock, 0,
           stream_of(device), terms, partials + s * Terms::count * c, s * slice, rows, c, slice);
  }
  add_slices(partials, slices, c, first, second, device);
}

}  // namespace p2r::cuda
