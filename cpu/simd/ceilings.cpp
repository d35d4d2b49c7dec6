#include "cpu/simd/ceilings.h"

#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

namespace {

// More chains than latency times throughput of any core's FMA pipes, and few enough for sixteen
// registers.
constexpr int kChains = 12;

float total(const vf* sums, int n) {
  float out = 0;
  for (int i = 0; i < n; ++i)
    for (int l = 0; l < W; ++l) out += sums[i][l];
  return out;
}

float multiply_adds(int64_t steps, float factor) {
  vf sums[kChains];
  const vf by = set1(factor), plus = set1(1e-9f);
  for (int i = 0; i < kChains; ++i) sums[i] = set1((float)i);
  for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sums[i] = sums[i] * by + plus;
  return total(sums, kChains);
}

#if defined(__AVX512F__)
// Where the processor has AVX512-BF16, which the set alone does not say.
float bf16_products(int64_t steps, float factor) {
  vf sums[kChains];
  const vu high = bits(set1(factor)) & 0xFFFF0000u;
  const vf pairs = from_bits(high | high >> 16);
  for (int i = 0; i < kChains; ++i) sums[i] = set1((float)i);
  for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sums[i] = bf16_dot(sums[i], pairs, pairs);
  return total(sums, kChains);
}
#else
constexpr float (*bf16_products)(int64_t, float) = nullptr;
#endif

float read(const float* x, int64_t n) {
  vf sums[8] = {};
  for (int64_t i = 0; i < n; i += 8 * W)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sums[j] += loadf(x + i + j * W);
  return total(sums, 8);
}

void copy(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 4 * W)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store(y + i + j * W, loadf(x + i + j * W));
}

void copy_nontemporal(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 4 * W)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store_nontemporal(y + i + j * W, loadf(x + i + j * W));
}

void update(float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i += 4 * W)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store(x + i + j * W, loadf(x + i + j * W) * factor);
}

}  // namespace

extern const CeilingLoops ceiling_loops;
#define P2R_STRING(x) #x
#define P2R_NAME(x) P2R_STRING(x)
const CeilingLoops ceiling_loops = {
    P2R_NAME(P2R_ISA), W, multiply_adds, bf16_products, read, copy, copy_nontemporal, update};

}  // namespace p2r::cpu::P2R_ISA
