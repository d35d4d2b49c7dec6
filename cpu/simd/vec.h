// Vectors of the instruction set that a file is being compiled for, through the compiler's vector
// types: one source serves AVX-512, AVX2 and the portable (SSE2, NEON) build.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef P2R_ISA
#define P2R_ISA scalar
#endif

namespace p2r::cpu::P2R_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

template <class V, class T>
inline V load(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
inline void store(T* p, V v) {
  memcpy(p, &v, sizeof v);
}
inline vf loadf(const float* p) { return load<vf>(p); }
inline vf set1(float x) { return x - vf{}; }

inline vf vmax(vf a, vf b) { return a > b ? a : b; }
inline vf vmin(vf a, vf b) { return a < b ? a : b; }
inline vu bits(vf x) { return (vu)x; }
inline vf from_bits(vu x) { return (vf)x; }

// Fixed-order sums, so that a result does not depend on the compiler's mood.
inline float sum(vf v) {
  float s = 0;
  for (int i = 0; i < W; ++i) s += v[i];
  return s;
}
inline float max_of(vf v) {
  float m = v[0];
  for (int i = 1; i < W; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// bf16 is the upper half of an f32; rounding to nearest even, NaN kept a NaN.
inline vf from_bf16(vh h) { return from_bits(__builtin_convertvector(h, vu) << 16); }
inline vh to_bf16(vf x) {
  const vu u = bits(x);
  const vu rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const vu quiet = (u >> 16) | 0x40u;
  return __builtin_convertvector((vu)((x == x) ? (vi)rounded : (vi)quiet), vh);
}

}  // namespace p2r::cpu::P2R_ISA
