// One f16 or bf16 value to f32 and back, rounding to nearest even. For host data and tails; long
// rows go through the SIMD kernels.
#pragma once
#include <cstdint>
#include <cstring>

namespace p2r {

inline float f32_of_bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t bits_of_f32(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float f32_of_bf16(uint16_t h) { return f32_of_bits(static_cast<uint32_t>(h) << 16); }
inline uint16_t bf16_of_f32(float x) {
  const uint32_t u = bits_of_f32(x);
  if (x != x) return static_cast<uint16_t>(u >> 16 | 0x40);
  return static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

inline float f32_of_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, mantissa = h & 0x3FF;
  const uint32_t exponent = h >> 10 & 0x1F;
  if (exponent == 31) return f32_of_bits(sign | 0x7F800000 | mantissa << 13);
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24 is exact
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return f32_of_bits(sign | bits_of_f32(magnitude));
  }
  return f32_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline uint16_t f16_of_f32(float x) {
  const uint32_t u = bits_of_f32(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7FFFFFFF;
  if (magnitude > 0x7F800000)
    return static_cast<uint16_t>(sign | 0x7E00 | (magnitude >> 13 & 0x3FF));
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds to infinity
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 lets the adder round at 2^-24
    const float aligned = f32_of_bits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of_f32(aligned) - 0x3F000000));
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xFFF + odd) >> 13);
}

}  // namespace p2r
