// Rows of f16 and bf16 to f32 and back.
#include "cpu/simd/simd.h"
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

// Tails go through a padded vector: the scalar conversions of ops/half.h are inline functions that
// files for other instruction sets share.
namespace {

inline vf widen(DType from, vh h) {
  if (from == DType::bf16) return from_bf16(h);
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  const vu u = __builtin_convertvector(h, vu);
  const vu sign = (u & 0x8000u) << 16, rest = u & 0x7FFFu;
  const vf small = __builtin_convertvector((vi)rest, vf) * 0x1p-24f;
  const vu normal = (rest << 13) + (112u << 23);
  const vu special = (rest << 13) | 0x7F800000u;
  const vu magnitude = rest < 0x400u ? bits(small) : rest >= 0x7C00u ? special : normal;
  return from_bits(sign | magnitude);
#endif
}

inline vh narrow(DType to, vf x) {
  if (to == DType::bf16) return to_bf16(x);
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vu u = bits(x), sign = (u >> 16) & 0x8000u, rest = u & 0x7FFFFFFFu;
  const vu tiny = bits(from_bits(rest) + 0.5f) - 0x3F000000u;
  const vu normal = (rest - 0x38000000u + 0xFFFu + ((rest >> 13) & 1u)) >> 13;
  const vu nan = 0x7E00u | ((rest >> 13) & 0x3FFu);
  vu h = rest < 0x38800000u ? tiny : normal;
  h = rest >= 0x477FF000u ? vu{} + 0x7C00u : h;
  h = rest > 0x7F800000u ? nan : h;
  return __builtin_convertvector(sign | h, vh);
#endif
}

}  // namespace

void to_f32(DType from, const void* x, float* y, int64_t n) {
  if (from == DType::f32) {
    memcpy(y, x, n * 4);
    return;
  }
  const uint16_t* h = static_cast<const uint16_t*>(x);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, widen(from, load<vh>(h + i)));
  if (i < n) {
    vh tail = {};
    memcpy(&tail, h + i, (n - i) * 2);
    const vf wide = widen(from, tail);
    memcpy(y + i, &wide, (n - i) * 4);
  }
}

void from_f32(DType to, const float* x, void* y, int64_t n) {
  if (to == DType::f32) {
    memcpy(y, x, n * 4);
    return;
  }
  uint16_t* h = static_cast<uint16_t*>(y);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(h + i, narrow(to, loadf(x + i)));
  if (i < n) {
    vf tail = {};
    memcpy(&tail, x + i, (n - i) * 4);
    const vh narrowed = narrow(to, tail);
    memcpy(h + i, &narrowed, (n - i) * 2);
  }
}

}  // namespace p2r::cpu::P2R_ISA
