// Numbers by which tokens are drawn. Templates, so that vectors of 32-bit words do as well; this
// header includes nothing of ops, for the kernels of cpu/simd.
#pragma once
#include <stdint.h>

namespace p2r {

// Different for different words: each step is a bijection (the constants are those of murmur3's).
template <class Word>
constexpr Word scrambled(Word x) {
  x = (x ^ x >> 16) * 0x85EBCA6Bu;
  x = (x ^ x >> 13) * 0xC2B2AE35u;
  return x ^ x >> 16;
}

// Of a token, whose index is below 2^32; different for each.
template <class Word>
constexpr Word random_key(int64_t seed, Word token) {
  const uint32_t low = static_cast<uint32_t>(seed),
                 high = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  return scrambled(scrambled(scrambled(token) ^ low) + high);
}

}  // namespace p2r
