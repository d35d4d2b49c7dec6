// The softmax of attention, forward and backward, on tiles of logits.
//
// Tiles are panels of the matrix product (cpu/simd/gemm.cpp) as they come out of it and as they go
// in again. Lanes are independent: a maximum or a sum over a column never crosses lanes, and four
// rows at a time keep the latencies apart.
#include "cpu/simd/simd.h"
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

namespace {

const float kInfinity = __builtin_inff();

}  // namespace

int vector_width() { return W; }

bool softmax_step(int64_t keys, int64_t ld, int64_t columns, float scale, float* s, float* max,
                  float* sum, float* decay) {
  vi moved = {};
  for (int64_t c = 0; c < columns; c += W) {
    float* x = s + c;
    vf m[4];
    for (vf& each : m) each = set1(-kInfinity);
    int64_t key = 0;
    for (; key + 4 <= keys; key += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) m[i] = vmax(m[i], loadf(x + (key + i) * ld) * scale);
    for (; key < keys; ++key) m[0] = vmax(m[0], loadf(x + key * ld) * scale);

    const vf before = loadf(max + c);
    const vf after = vmax(before, vmax(vmax(m[0], m[1]), vmax(m[2], m[3])));
    // Where every logit so far is -inf, all weights are 0, not exp(-inf + inf).
    const vf shift = after == -kInfinity ? vf{} : after;
    const vf factor = vexp(before - shift);

    vf total[4] = {};
    for (key = 0; key + 4 <= keys; key += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const vf p = vexp(loadf(x + (key + i) * ld) * scale - shift);
        store(x + (key + i) * ld, p);
        total[i] += p;
      }
    for (; key < keys; ++key) {
      const vf p = vexp(loadf(x + key * ld) * scale - shift);
      store(x + key * ld, p);
      total[0] += p;
    }
    store(max + c, after);
    store(sum + c, loadf(sum + c) * factor + ((total[0] + total[1]) + (total[2] + total[3])));
    store(decay + c, factor);
    moved |= factor != 1.0f;
  }
  int32_t any = 0;
  for (int i = 0; i < W; ++i) any |= moved[i];
  return any != 0;
}

void softmax_finish(int64_t columns, const float* max, const float* sum, float* lse,
                    float* inverse) {
  for (int64_t c = 0; c < columns; c += W) {
    const vf total = loadf(sum + c);
    store(lse + c, loadf(max + c) + vlog(total));
    store(inverse + c, 1.0f / total);
  }
}

void scale_columns(int64_t rows, int64_t ld, int64_t columns, const float* factor, float* x) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += W)
      store(x + r * ld + c, loadf(x + r * ld + c) * loadf(factor + c));
}

void softmax_backward(int64_t queries, int64_t ld, int64_t columns, float scale, const float* lse,
                      const float* delta, float* s, float* d) {
  for (int64_t r = 0; r < queries; ++r) {
    const vf shift = set1(lse[r]), mean = set1(delta[r]);
    for (int64_t c = 0; c < columns; c += W) {
      const int64_t at = r * ld + c;
      const vf p = vexp(loadf(s + at) * scale - shift);
      store(s + at, p);
      store(d + at, p * (loadf(d + at) - mean) * scale);
    }
  }
}

void softmax_mass(int64_t queries, int64_t ld, int64_t columns, float scale, const float* lse,
                  const float* s, float* mass) {
  for (int64_t c = 0; c < columns; c += W) {
    vf total[4] = {};
    int64_t r = 0;
    for (; r + 4 <= queries; r += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        total[i] += vexp(loadf(s + (r + i) * ld + c) * scale - set1(lse[r + i]));
    for (; r < queries; ++r) total[0] += vexp(loadf(s + r * ld + c) * scale - set1(lse[r]));
    store(mass + c, loadf(mass + c) + ((total[0] + total[1]) + (total[2] + total[3])));
  }
}

float dot(const float* x, const float* y, int64_t n) {
  vf total = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) total += loadf(x + i) * loadf(y + i);
  if (i < n) {
    const int left = static_cast<int>(n - i);
    total += load_first<vf>(x + i, left) * load_first<vf>(y + i, left);
  }
  return sum(total);
}

}  // namespace p2r::cpu::P2R_ISA
