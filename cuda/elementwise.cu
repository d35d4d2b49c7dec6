// Sums and products with broadcasting: a grid-stride loop, an element a thread and step. Bound by
// memory: neighbouring threads take neighbouring elements, and what is repeated comes from the
// caches. An axis of the result costs two divisions, but the last one, where operands that are not
// repeated have one axis in all.
//
// Predicted on an H200 (4.8 TB/s) for 8192 x 1152 f32, two operands: 113 MB, 30 µs at 80 %.
#include "cuda/launch.cuh"
#include "ops/elementwise.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256;

struct Plus {
  __device__ __forceinline__ float operator()(float x, float y) const { return x + y; }
};
struct Times {
  __device__ __forceinline__ float operator()(float x, float y) const { return x * y; }
};

template <class F, class T>
__global__ void __launch_bounds__(kBlock)
    elementwise_kernel(const T* x, const T* y, T* out, int64_t n, BroadcastAxes axes) {
  for (int64_t i = blockIdx.x * int64_t{kBlock} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kBlock) {
    int64_t rest = i, at_x = 0, at_y = 0;
    for (int k = 0; k < axes.rank; ++k) {
      const int64_t place = k + 1 < axes.rank ? rest % axes.size[k] : rest;
      if (k + 1 < axes.rank) rest /= axes.size[k];
      at_x += place * axes.x[k];
      at_y += place * axes.y[k];
    }
    out[i] = from_float<T>(F()(to_float(x[at_x]), to_float(y[at_y])));
  }
}

template <class F>
void combine(const View& x, const View& y, const View& out, Device& device) {
  const int64_t n = out.size();
  if (!n) return;
  with_float_type(out.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    launch(elementwise_kernel<F, T>, blocks_for(n, kBlock), kBlock, 0, stream_of(device),
           x.as<const T>(), y.as<const T>(), out.as<T>(), n,
           BroadcastAxes(x.shape, y.shape, out.shape));
  });
}

}  // namespace

void add(const AddArgs& a, Device& device) { combine<Plus>(a.x, a.y, a.out, device); }
void mul(const MulArgs& a, Device& device) { combine<Times>(a.x, a.y, a.out, device); }

}  // namespace p2r::cuda
