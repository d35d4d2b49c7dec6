// The last step of the gradients of a row of parameters: a thread adds a column's slices in order.
#include "cuda/row_slices.cuh"

namespace p2r::cuda {

namespace {

__global__ void __launch_bounds__(kSliceBlock)
    add_slices_kernel(const float* partials, float* first, float* second, int64_t slices,
                      int64_t c) {
  const int64_t width = second ? 2 * c : c;
  const int64_t i = int64_t{blockIdx.x} * kSliceBlock + threadIdx.x;
  if (i >= width) return;
  double sum = 0;
  for (int64_t s = 0; s < slices; ++s) sum += static_cast<double>(partials[s * width + i]);
  (i < c ? first[i] : second[i - c]) = static_cast<float>(sum);
}

}  // namespace

void add_slices(const float* partials, int64_t slices, int64_t c, float* first, float* second,
                Device& device) {
  const int64_t width = second ? 2 * c : c;
  launch(add_slices_kernel, static_cast<unsigned>(ceil_div(width, kSliceBlock)), kSliceBlock, 0,
         stream_of(device), partials, first, second, slices, c);
}

}  // namespace p2r::cuda
