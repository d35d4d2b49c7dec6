// Casts, a function of each element (elementwise.cuh): through f32 except between the integer
// types.
#include "cuda/elementwise.cuh"
#include "ops/cast.h"

namespace p2r::cuda {

namespace {

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

template <class To>
struct Convert {
  template <class From>
  __device__ __forceinline__ To operator()(From x) const {
    return convert<To>(x);
  }
};

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
  if (a.x.dtype == a.out.dtype) return device.copy(a.out.data, a.x.data, a.x.bytes());
  with_any_type(a.x.dtype, [&](auto* from) {
    with_any_type(a.out.dtype, [&](auto* to) {
      using From = std::remove_pointer_t<decltype(from)>;
      using To = std::remove_pointer_t<decltype(to)>;
      if constexpr (!std::is_same_v<From, To>)
        elementwise(device, a.x.size(), a.out.as<To>(), Convert<To>(), a.x.as<const From>());
    });
  });
}

}  // namespace p2r::cuda
