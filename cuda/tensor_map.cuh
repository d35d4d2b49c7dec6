// Tensor maps, the descriptors from which TMA computes the addresses of a tile.
#pragma once
#include <array>

#include "cuda/ptx.cuh"

namespace p2r::cuda {

template <class T>
constexpr Element element_of() {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return Element::bf16;
  else if constexpr (std::is_same_v<T, __half>)
    return Element::f16;
  else if constexpr (std::is_same_v<T, float>)
    return Element::f32;
  else if constexpr (std::is_same_v<T, int>)
    return Element::i32;
  else {
    static_assert(std::is_same_v<T, unsigned char>, "TMA elements: bf16, f16, f32, int, bytes");
    return Element::u8;
  }
}

constexpr uint32_t swizzle_bytes(Swizzle s) {
  return s == Swizzle::b128 ? 128 : s == Swizzle::b64 ? 64 : s == Swizzle::b32 ? 32 : 0;
}

// Dimensions, box and coordinates start with the innermost; `strides` are the bytes from one index
// to the next of every dimension but the innermost. A swizzled tile has rows of exactly the
// swizzle's width. Checks what the driver would reject, to say why.
template <class T, size_t Rank>
TensorMap make_tensor_map(const T* base, const std::array<uint64_t, Rank>& dims,
                          const std::array<uint64_t, Rank - 1>& strides,
                          const std::array<uint32_t, Rank>& box, Swizzle swizzle) {
  static_assert(Rank == 2 || Rank == 3, "the ranks of ptx::tma_load");
  const auto reject = [](const std::string& why) { throw Error(Code::cuda, "tensor map: " + why); };
  if (reinterpret_cast<uintptr_t>(base) % 16) reject("the tensor is not 16-byte aligned");
  for (size_t i = 0; i < Rank; ++i) {
    if (dims[i] < 1 || dims[i] > (uint64_t(1) << 32))
      reject("dimension " + std::to_string(i) + " is " + std::to_string(dims[i]));
    if (box[i] < 1 || box[i] > 256)
      reject("box size " + std::to_string(box[i]) + " is not in 1..256");
  }
  for (size_t i = 0; i + 1 < Rank; ++i)
    if (strides[i] % 16 || strides[i] >= (uint64_t(1) << 40))
      reject("stride " + std::to_string(strides[i]) + " is not a multiple of 16 below 2^40");
  const uint64_t row = box[0] * sizeof(T);
  if (row % 16) reject("box rows of " + std::to_string(row) + " bytes are not a multiple of 16");
  if (swizzle != Swizzle::none && row != swizzle_bytes(swizzle))
    reject("box rows of " + std::to_string(row) + " bytes under a swizzle of " +
           std::to_string(swizzle_bytes(swizzle)));
  TensorMap map;
  if (const char* why =
          encode_tensor_map(map, element_of<T>(), swizzle, int(Rank), const_cast<T*>(base),
                            dims.data(), strides.data(), box.data()))
    reject(why);
  return map;
}

}  // namespace p2r::cuda
