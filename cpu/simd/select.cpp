// Detects which SIMD tables this CPU can run, of those that were built, and which extensions it has
// (CPUID). Compiled for the baseline instruction set.
#include "cpu/simd/simd.h"

namespace p2r::cpu {

#if defined(__x86_64__)
namespace avx512 {
extern const Simd table;
}
namespace avx2 {
extern const Simd table;
}
#endif
#if defined(__aarch64__)
namespace neon {
extern const Simd table;
}
#else
namespace scalar {
extern const Simd table;
}
#endif

SimdFeatures simd_features(const Simd& table) {
  SimdFeatures features;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (&table == &avx512::table) {
    features.bf16 = __builtin_cpu_supports("avx512bf16");
    features.vnni = __builtin_cpu_supports("avx512vnni");
  }
#else
  (void)table;
#endif
  return features;
}

const Simd* const* simd_tables(int* count) {
  static const Simd* tables[3];
  static const int found = [] {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      tables[n++] = &avx512::table;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
      tables[n++] = &avx2::table;
#endif
#if defined(__aarch64__)
    tables[n++] = &neon::table;
#else
    tables[n++] = &scalar::table;
#endif
    return n;
  }();
  *count = found;
  return tables;
}

}  // namespace p2r::cpu
