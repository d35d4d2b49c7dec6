// Converts rows of f32, f16 and bf16 to f32 and back, rounding to nearest even.
#include "cpu/simd/simd.h"
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

// Tails are converted as padded vectors: the scalar conversions of ops/half.h are inline functions,
// of which the linker may keep another instruction set's copy (simd.h).
namespace {

inline vf widen(DType from, vh h) { return from == DType::bf16 ? from_bf16(h) : from_f16(h); }
inline vh narrow(DType to, vf x) { return to == DType::bf16 ? to_bf16(x) : to_f16(x); }

}  // namespace

void to_f32(DType from, const void* x, float* y, int64_t n) {
  if (from == DType::f32) {
    memcpy(y, x, n * 4);
    return;
  }
  const uint16_t* h = static_cast<const uint16_t*>(x);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, widen(from, load<vh>(h + i)));
  const int left = static_cast<int>(n - i);
  if (left) store_first(y + i, widen(from, load_first<vh>(h + i, left)), left);
}

void from_f32(DType to, const float* x, void* y, int64_t n) {
  if (to == DType::f32) {
    memcpy(y, x, n * 4);
    return;
  }
  uint16_t* h = static_cast<uint16_t*>(y);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(h + i, narrow(to, loadf(x + i)));
  const int left = static_cast<int>(n - i);
  if (left) store_first(h + i, narrow(to, load_first<vf>(x + i, left)), left);
}

}  // namespace p2r::cpu::P2R_ISA
