// Runs of neighbouring elements that a thread loads and stores at once.
#pragma once
#include <initializer_list>

#include "cuda/launch.cuh"

namespace p2r::cuda {

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T v[N];

  __device__ __forceinline__ static Vector load(const T* p) {
    return *reinterpret_cast<const Vector*>(p);
  }
  __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<Vector*>(p) = *this; }
};

// Calls f with a null pointer of the element type and the elements of a vector: 16 bytes, or 1
// where a row of `width` elements or one of the tensors, which may be views, is not so aligned.
template <class F>
void with_vectors(DType t, int64_t width, std::initializer_list<const void*> tensors, F&& f) {
  uint64_t alignment = static_cast<uint64_t>(width) * size_of(t);
  for (const void* p : tensors) alignment |= reinterpret_cast<uintptr_t>(p);
  with_float_type(t, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    if (alignment % 16 == 0)
      f(null, std::integral_constant<int, 16 / sizeof(T)>());
    else
      f(null, std::integral_constant<int, 1>());
  });
}

// Calls f with a null pointer of the largest word that divides a row of so many bytes and to which
// the tensors are aligned, which may be views into larger ones.
template <class F>
void with_words(int64_t bytes, std::initializer_list<const void*> tensors, F&& f) {
  uint64_t alignment = static_cast<uint64_t>(bytes);
  for (const void* p : tensors) alignment |= reinterpret_cast<uintptr_t>(p);
  if (alignment % 16 == 0)
    f(static_cast<uint4*>(nullptr));
  else if (alignment % 4 == 0)
    f(static_cast<uint32_t*>(nullptr));
  else if (alignment % 2 == 0)
    f(static_cast<uint16_t*>(nullptr));
  else
    f(static_cast<uint8_t*>(nullptr));
}

}  // namespace p2r::cuda
