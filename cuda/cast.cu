// Casts: one grid-stride loop over the elements, through f32 except between the integer types.
#include "cuda/launch.cuh"
#include "ops/cast.h"

namespace p2r::cuda {

namespace {

constexpr int kBlock = 256;

__device__ __forceinline__ float widen(int32_t x) { return static_cast<float>(x); }
__device__ __forceinline__ float widen(uint8_t x) { return x; }
template <class T>
__device__ __forceinline__ float widen(T x) {
  return to_float(x);
}

template <class To, class From>
__device__ __forceinline__ To convert(From x) {
  if constexpr (std::is_same_v<To, int32_t> && std::is_same_v<From, uint8_t>) {
    return x;
  } else if constexpr (std::is_same_v<To, uint8_t> && std::is_same_v<From, int32_t>) {
    return static_cast<uint8_t>(x < 0 ? 0 : x > 255 ? 255 : x);
  } else if constexpr (std::is_same_v<To, int32_t>) {
    const float f = widen(x);
    return f != f                ? 0
           : f >= 2147483648.0f  ? INT32_MAX
           : f <= -2147483648.0f ? INT32_MIN
                                 : static_cast<int32_t>(f);
  } else if constexpr (std::is_same_v<To, uint8_t>) {
    const float f = widen(x);
    return static_cast<uint8_t>(f != f || f <= 0.0f ? 0 : f >= 255.0f ? 255 : static_cast<int>(f));
  } else {
    return from_float<To>(widen(x));
  }
}

template <class From, class To>
__global__ void __launch_bounds__(kBlock) cast_kernel(const From* x, To* out, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t{kBlock} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * kBlock)
    out[i] = convert<To>(x[i]);
}

template <class F>
void with_any_type(DType t, F&& f) {
  if (t == DType::i32)
    f(static_cast<int32_t*>(nullptr));
  else if (t == DType::u8)
    f(static_cast<uint8_t*>(nullptr));
  else
    with_float_type(t, f);
}

}  // namespace

void cast(const CastArgs& a, Device& device) {
  const int64_t n = a.x.size();
  if (!n) return;
  if (a.x.dtype == a.out.dtype) return device.copy(a.out.data, a.x.data, a.x.bytes());
  with_any_type(a.x.dtype, [&](auto* from) {
    with_any_type(a.out.dtype, [&](auto* to) {
      using From = std::remove_pointer_t<decltype(from)>;
      using To = std::remove_pointer_t<decltype(to)>;
      if constexpr (!std::is_same_v<From, To>)
        launch(cast_kernel<From, To>, blocks_for(n, kBlock), kBlock, 0, stream_of(device),
               a.x.as<const From>(), a.out.as<To>(), n);
    });
  });
}

}  // namespace p2r::cuda
