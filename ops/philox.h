// Philox4x32-10 and the arithmetic of sampling (ops/sampling.h), shared by all backends: integers
// only, so that every compiler and machine computes the same bits.
#pragma once
#include <cstdint>

namespace p2r {

// Philox4x32 with 10 rounds; its first two words as one number.
constexpr uint64_t philox(uint64_t key, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return uint64_t{c1} << 32 | c0;
}
static_assert(philox(0, 0) == 0xE169C58D6627E8D5, "the authors' known answer");

// floor(a b / 2^64).
constexpr uint64_t multiply_high(uint64_t a, uint64_t b) {
  const uint64_t a0 = a & 0xFFFFFFFF, a1 = a >> 32, b0 = b & 0xFFFFFFFF, b1 = b >> 32;
  const uint64_t middle = a1 * b0 + (a0 * b0 >> 32);
  return a1 * b1 + (middle >> 32) + ((a0 * b1 + (middle & 0xFFFFFFFF)) >> 32);
}

// S: the largest at which the weights of a vocabulary cannot overflow 63 bits.
constexpr int weight_bits(int64_t vocabulary) {
  int log2 = 0;
  while ((int64_t{1} << log2) < vocabulary) ++log2;
  return log2 < 18 ? 44 : 62 - log2;
}

// floor(2^bits · 2^-z) with a relative error of 2e-9, for z = distance · rate. 2^-f for the
// fraction f is the polynomial of degree 6 with the smallest relative error on [0, 1] (1.9e-9); its
// signs alternate, so that Horner's rule stays within unsigned 32-bit fractions.
constexpr uint64_t weight(float distance, float rate, int bits) {
  const float z = distance * rate;
  if (!(z < 64)) return 0;  // negligible, or NaN from infinity times 0
  const uint32_t fixed = static_cast<uint32_t>(static_cast<int32_t>(z * 33554432.0f));  // 2^25
  const uint64_t f = (fixed & 0x1FFFFFF) << 7;
  uint64_t p = 466052;
  p = 5467717 - (p * f >> 32);
  p = 41132952 - (p * f >> 32);
  p = 238325255 - (p * f >> 32);
  p = 1031754083 - (p * f >> 32);
  p = 2977043751 - (p * f >> 32);
  p = 2147483644 - (p * f >> 33);  // 2^31 parts
  return p << (bits - 31) >> (fixed >> 25);
}

// log2(e) / temperature as the f32 that every backend multiplies by; finite, so that the largest
// logit's own distance, 0, gives 0.
inline float weight_rate(double temperature) {
  const double rate = 1.4426950408889634 / temperature;
  return rate > 3.0e38 ? 3.0e38f : static_cast<float>(rate);
}

}  // namespace p2r
