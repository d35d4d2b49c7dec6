// Inner loops of gradient clipping (sum of squares, scaling) and of AdamW.
#include "cpu/simd/simd.h"
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

void to_f32(DType from, const void* x, float* y, int64_t n);
void from_f32(DType to, const float* x, void* y, int64_t n);

namespace {

constexpr int64_t kBlock = 512;

typedef double vd __attribute__((vector_size(W * 8)));

inline vf square_root(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (vf)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// A square of an f32 is exact in f64.
inline double squares(const float* x, int64_t n) {
  vd s = {}, t = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    const vd a = __builtin_convertvector(loadf(x + i), vd);
    const vd b = __builtin_convertvector(loadf(x + i + W), vd);
    s += a * a;
    t += b * b;
  }
  double rest = 0;
  for (; i < n; ++i) rest += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  s += t;
  for (int k = 0; k < W; ++k) rest += s[k];
  return rest;
}

inline void scale_f32(float* x, float factor, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(x + i, loadf(x + i) * factor);
  for (; i < n; ++i) x[i] *= factor;
}

struct Step {
  float keep, beta2, one_minus_beta1, one_minus_beta2, rate, root, eps;
};

inline void step_once(vf& p, vf g, vf& m, vf& v, const Step& k) {
  m += (g - m) * k.one_minus_beta1;
  v = v * k.beta2 + g * g * k.one_minus_beta2;
  p = p * k.keep - k.rate * m / (square_root(v) * k.root + k.eps);
}

}  // namespace

double sum_squares(DType dtype, const void* x, int64_t n) {
  if (dtype == DType::f32) return squares(static_cast<const float*>(x), n);
  double sum = 0;
  float wide[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t part = n - i < kBlock ? n - i : kBlock;
    to_f32(dtype, static_cast<const uint16_t*>(x) + i, wide, part);
    sum += squares(wide, part);
  }
  return sum;
}

void scale(DType dtype, void* x, float factor, int64_t n) {
  if (dtype == DType::f32) {
    scale_f32(static_cast<float*>(x), factor, n);
    return;
  }
  float wide[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t part = n - i < kBlock ? n - i : kBlock;
    uint16_t* at = static_cast<uint16_t*>(x) + i;
    to_f32(dtype, at, wide, part);
    scale_f32(wide, factor, part);
    from_f32(dtype, wide, at, part);
  }
}

void adam_w(float* p, const float* g, float* m, float* v, int64_t n, float keep, float beta2,
            float one_minus_beta1, float one_minus_beta2, float rate, float root, float eps) {
  const Step k = {keep, beta2, one_minus_beta1, one_minus_beta2, rate, root, eps};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    vf pv = loadf(p + i), mv = loadf(m + i), vv = loadf(v + i);
    step_once(pv, loadf(g + i), mv, vv, k);
    store(p + i, pv);
    store(m + i, mv);
    store(v + i, vv);
  }
  if (i < n) {
    vf pv = {}, gv = {}, mv = {}, vv = {};
    const int64_t bytes = (n - i) * 4;
    memcpy(&pv, p + i, bytes);
    memcpy(&gv, g + i, bytes);
    memcpy(&mv, m + i, bytes);
    memcpy(&vv, v + i, bytes);
    step_once(pv, gv, mv, vv, k);
    memcpy(p + i, &pv, bytes);
    memcpy(m + i, &mv, bytes);
    memcpy(v + i, &vv, bytes);
  }
}

}  // namespace p2r::cpu::P2R_ISA
