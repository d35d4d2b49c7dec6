// Conversion between element types, through f32 except between u8 and i32.
#include "ops/cast.h"

#include <cmath>

#include "cpu/device.h"

namespace p2r::cpu {

namespace {

constexpr int64_t kGrain = 4096;

template <class T>
T saturate(float x, float low, float high) {
  if (!(x == x)) return 0;
  if (x <= low) return static_cast<T>(low);
  if (x >= high) return high == 255.0f ? T(255) : static_cast<T>(INT32_MAX);
  return static_cast<T>(x);
}

void read(const View& v, int64_t i, int64_t n, float* f, const Simd& simd) {
  if (v.dtype == DType::i32)
    for (int64_t j = 0; j < n; ++j) f[j] = static_cast<float>(v.as<int32_t>()[i + j]);
  else if (v.dtype == DType::u8)
    for (int64_t j = 0; j < n; ++j) f[j] = v.as<uint8_t>()[i + j];
  else
    simd.to_f32(v.dtype, v.element(i), f, n);
}

void write(const View& v, int64_t i, int64_t n, const float* f, const Simd& simd) {
  if (v.dtype == DType::i32)
    for (int64_t j = 0; j < n; ++j)
      v.as<int32_t>()[i + j] = saturate<int32_t>(f[j], -2147483648.0f, 2147483648.0f);
  else if (v.dtype == DType::u8)
    for (int64_t j = 0; j < n; ++j) v.as<uint8_t>()[i + j] = saturate<uint8_t>(f[j], 0.0f, 255.0f);
  else
    simd.from_f32(v.dtype, f, v.element(i), n);
}

}  // namespace

void cast(const CastArgs& a, Device& device) {
  CpuDevice& cpu = cpu_device(device);
  if (a.x.dtype == a.out.dtype) return cpu.copy(a.out.data, a.x.data, a.x.bytes());
  cpu.launch(a.x.size(), kGrain, [a, &simd = cpu.simd()](int64_t begin, int64_t end, int) {
    if (a.x.dtype == DType::u8 && a.out.dtype == DType::i32) {
      for (int64_t i = begin; i < end; ++i) a.out.as<int32_t>()[i] = a.x.as<uint8_t>()[i];
    } else if (a.x.dtype == DType::i32 && a.out.dtype == DType::u8) {
      for (int64_t i = begin; i < end; ++i) {
        const int32_t v = a.x.as<int32_t>()[i];
        a.out.as<uint8_t>()[i] = static_cast<uint8_t>(v < 0 ? 0 : v > 255 ? 255 : v);
      }
    } else {
      float f[kGrain];
      read(a.x, begin, end - begin, f, simd);
      write(a.out, begin, end - begin, f, simd);
    }
  });
}

}  // namespace p2r::cpu
