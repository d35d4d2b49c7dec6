// Vectors of the instruction set that a file is being compiled for, through the compiler's vector
// types: one source serves AVX-512, AVX2 and the portable (SSE2, NEON) build. Loads and stores,
// conversions between f32, f16 and bf16, bf16 dot products, exp2, exp and log.
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

// f32 lanes of a vector.
#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

// W lanes of f32, i32, u32; of 16 and of 8 bits.
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint8_t vb __attribute__((vector_size(W)));

constexpr float kLog2e = 1.44269504f;

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
// The first n elements, followed by zeros; and a store of the first n elements only.
template <class V, class T>
inline V load_first(const T* p, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (V)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
  else if constexpr (sizeof(V) == 64)
    return (V)_mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
  else
    return (V)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
#else
  V v = {};
  memcpy(&v, p, n * sizeof(T));
  return v;
#endif
}
inline void store_first(float* p, vf v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  memcpy(p, &v, n * 4);
#endif
}
inline void store_first(uint16_t* p, vh v, int n) {
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)v);
#else
  memcpy(p, &v, n * 2);
#endif
}
// Non-temporal stores; p is aligned to the vector. Other threads see them after the next locked
// instruction, which every loop of a ThreadPool ends with.
inline void store_nontemporal(float* p, vf v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
inline void store_nontemporal(uint16_t* p, vh v) {
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#else
  store(p, v);
#endif
}
inline vf loadf(const float* p) { return load<vf>(p); }
inline vf set1(float x) { return x - vf{}; }

// b where either is a NaN.
inline vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
inline vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
// Lanes of a, by indices below W, and of b, by indices from W on. Clang has GCC's builtin for
// constant indices only, and makes the same of the loop once they are constant.
inline vf shuffle(vf a, vf b, vi lanes) {
#if defined(__clang__)
  vf out;
  for (int i = 0; i < W; ++i) out[i] = lanes[i] < W ? a[lanes[i]] : b[lanes[i] - W];
  return out;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}
inline vu bits(vf x) { return (vu)x; }
inline vf from_bits(vu x) { return (vf)x; }

// A bit for each lane of a comparison, the first lane's the lowest.
inline uint32_t lanes(vi which) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)which);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps((__m256)which);
#elif defined(__x86_64__)
  return (uint32_t)_mm_movemask_ps((__m128)which);
#else
  uint32_t out = 0;
  for (int i = 0; i < W; ++i) out |= (uint32_t)(which[i] != 0) << i;
  return out;
#endif
}

// Sum of the lanes in a fixed order, so that results do not depend on the compiler.
inline float sum(vf v) {
  float s = 0;
  for (int i = 0; i < W; ++i) s += v[i];
  return s;
}
// The same with f64 accumulators, each for a lane of both halves of a vector.
typedef float vf_half __attribute__((vector_size(W * 2)));
typedef double vd_half __attribute__((vector_size(W * 4)));
inline void add_to(vd_half* total, vf v) {
  vf_half half[2];
  memcpy(half, &v, sizeof v);
  *total += __builtin_convertvector(half[0], vd_half) + __builtin_convertvector(half[1], vd_half);
}
inline double sum(vd_half v) {
  double s = 0;
  for (int i = 0; i < W / 2; ++i) s += v[i];
  return s;
}
inline float max(vf v) {
  float m = v[0];
  for (int i = 1; i < W; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// Zero extension of 8- and 16-bit lanes to 32 bits, and truncation to 16. (The compiler's own
// conversion takes several instructions, or goes element by element.)
inline vu widen(vb x) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu8_epi32((__m128i)x);
#elif defined(__AVX2__)
  uint64_t bytes;
  memcpy(&bytes, &x, sizeof bytes);
  return (vu)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bytes));
#else
  return __builtin_convertvector(x, vu);
#endif
}

inline vu widen(vh x) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32((__m256i)x);
#else
  return __builtin_convertvector(x, vu);
#endif
}
inline vh narrow(vu x) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtepi32_epi16((__m512i)x);
#else
  return __builtin_convertvector(x, vh);
#endif
}

// bf16 is the upper half of an f32; rounding is to nearest even, and a NaN stays a NaN.
inline vf from_bf16(vh h) { return from_bits(widen(h) << 16); }
inline vh to_bf16(vf x) {
  const vu u = bits(x);
  const vu rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const vu quiet = (u >> 16) | 0x40u;
  return narrow((vu)((x == x) ? (vi)rounded : (vi)quiet));
}

// AVX512-BF16's instructions on AVX-512, emulated elsewhere. Inline assembly, because a function's
// target attribute would not reach through the templates that use them. They run only where the CPU
// has them (SimdFeatures), and treat subnormal numbers as 0. A pair is a 32-bit word of two bf16.
//
// Pairs (low[i], high[i]), low in the lower half.
inline vf bf16_pairs(vf low, vf high) {
#if defined(__AVX512F__)
  __m512i both;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(low), "v"(high));
  const __m512i order = _mm512_or_si512(
      _mm512_slli_epi32(
          _mm512_setr_epi32(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31), 16),
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  return (vf)_mm512_permutexvar_epi16(order, both);
#else
  return from_bits(__builtin_convertvector(to_bf16(low), vu) |
                   __builtin_convertvector(to_bf16(high), vu) << 16);
#endif
}
// Pairs of neighbouring lanes, (x[2 i], x[2 i + 1]), of `first`, then of `second`.
inline vf bf16_adjacent_pairs(vf first, vf second) {
#if defined(__AVX512F__)
  vf both;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(first), "v"(second));
  return both;
#else
  vi even, odd;
  for (int i = 0; i < W; ++i) {
    even[i] = 2 * i;
    odd[i] = 2 * i + 1;
  }
  return bf16_pairs(shuffle(first, second, even), shuffle(first, second, odd));
#endif
}
// sum + x[i].low y[i].low + x[i].high y[i].high, for pairs x and y.
inline vf bf16_dot(vf sum, vf x, vf y) {
#if defined(__AVX512F__)
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
  return sum;
#else
  const vu u = bits(x), v = bits(y);
  sum += from_bits(u << 16) * from_bits(v << 16);
  return sum + from_bits(u & 0xFFFF0000u) * from_bits(v & 0xFFFF0000u);
#endif
}
// As to_bf16, in one instruction.
inline vh to_bf16_native(vf x) {
#if defined(__AVX512F__)
  vh h;
  asm("vcvtneps2bf16 %1, %0" : "=v"(h) : "v"(x));
  return h;
#else
  return to_bf16(x);
#endif
}

inline vf from_f16(vh h) {
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
inline vh to_f16(vf x) {
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

// The element types of rows, for templates over them.
struct F32 {
  typedef float Element;
  typedef vf Vector;
  static vf to_f32(vf x) { return x; }
  static vf from_f32(vf x) { return x; }
};
struct F16 {
  typedef uint16_t Element;
  typedef vh Vector;
  static vf to_f32(vh x) { return from_f16(x); }
  static vh from_f32(vf x) { return to_f16(x); }
};
struct Bf16 {
  typedef uint16_t Element;
  typedef vh Vector;
  static vf to_f32(vh x) { return from_bf16(x); }
  static vh from_f32(vf x) { return to_bf16(x); }
};

// 2^(x by) = scale (1 + excess), for x by within [-126, 127] or NaN. The excess is small and has a
// relative accuracy of its own, and around 0 the scale is 1, so 2^(x by) - 1 does not cancel:
// within 1.5e-5 of the excess, and 1e-6 if `fine`.
//
// x by = n + j/32 + r (j/8 with 8 lanes), a polynomial in r, whose missing next term is economised
// (Chebyshev) down to 5e-8, and a table of 2^(j/32). Adding kShift leaves 32 n + j in the low bits
// of the sum: the lowest are the table's index, and all of them, shifted up to the exponent, add n
// to it, and j to the bits below it, which the table's entries have subtracted.
struct Exp2Parts {
  vf scale, excess;
};
template <bool fine = false>
inline Exp2Parts exp2_parts(vf x, float by) {
#if defined(__AVX512F__)
  const float kShift = 0x1.8p18f;
  const vf low = {1.0f,        1.02189715f, 1.04427378f, 1.06714040f, 1.09050773f, 1.11438674f,
                  1.13878863f, 1.16372485f, 1.18920712f, 1.21524736f, 1.24185781f, 1.26905096f,
                  1.29683955f, 1.32523664f, 1.35425555f, 1.38390988f};
  const vf high = {1.41421356f, 1.44518081f, 1.47682615f, 1.50916443f, 1.54221083f, 1.57598085f,
                   1.61049033f, 1.64575548f, 1.68179283f, 1.71861930f, 1.75625216f, 1.79470907f,
                   1.83400809f, 1.87416763f, 1.91520656f, 1.95714412f};
  const vu j = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const __m512i lower = (__m512i)((vu)low - (j << 18)),
                upper = (__m512i)((vu)high - ((j + 16) << 18));
  const vf shifted = x * by + kShift;
  // One instruction rounds and subtracts, but it would take a product that was rounded already.
  const vf r = by == 1 ? (vf)_mm512_reduce_ps((__m512)x, 5 << 4) : x * by - (shifted - kShift);
  const vu entry = (vu)_mm512_permutex2var_epi32(lower, (__m512i)shifted, upper);
  const vf scale = (vf)(entry + ((vu)shifted << 18));
  if (fine) return {scale, ((r * 0.05550411f + 0.24022651f) * r + 0.69314718f) * r};
  return {scale, (r * 0.24022886f + 0.69315734f) * r};
#elif defined(__AVX2__)
  const float kShift = 0x1.8p20f;
  const vf powers = {1.0f,        1.09050773f, 1.18920712f, 1.29683955f,
                     1.41421356f, 1.54221083f, 1.68179283f, 1.83400809f};
  const vu j = {0, 1, 2, 3, 4, 5, 6, 7};
  const vu table = (vu)powers - (j << 20);
  const vf shifted = x * by + kShift;
  const vf r = x * by - (shifted - kShift);
  const vu entry = (vu)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)shifted);
  return {(vf)(entry + ((vu)shifted << 20)),
          ((r * 0.05550411f + 0.24026408f) * r + 0.69314718f) * r};
#else
  // As vexp, with Cephes' polynomial for 2^r, |r| <= 1/2.
  const float kShift = 0x1.8p23f;
  const vf shifted = x * by + kShift;
  const vf r = x * by - (shifted - kShift);
  vf p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  return {(vf)(((vu)shifted << 23) + 0x3f800000u), p * r};
#endif
}

// 2^(x by), for x by <= 127 or NaN, as a product of two factors, within 3 ulp: the multiplication
// can often be fused into an addition that follows, or merged with another factor. Both are 0 where
// the result would be subnormal. The fast exponential, for softmax; vexp underflows gradually.
struct Exp2 {
  vf scale, rest;
};
inline Exp2 exp2_factors(vf x, float by) {
  const Exp2Parts parts = exp2_parts(x, by);
  const vi underflows = x < -126.0f / by;
  return {underflows ? vf{} : parts.scale, underflows ? vf{} : parts.excess + 1.0f};
}
inline vf exp2(vf x) {
  const Exp2 e = exp2_factors(x, 1);
  return e.scale * e.rest;
}
// e^x, within 1 ulp: x = n ln 2 + r with ln 2 in two parts (Cody and Waite, 1980), a polynomial in
// r, and 2^n in two steps, so that results underflow gradually to an exact 0.
inline vf vexp(vf x) {
  const vf clamped = vmin(set1(89.0f), vmax(set1(-104.0f), x));  // both propagate a NaN
  const float kShift = 0x1.8p23f;  // adding it rounds to an integer, in the low bits
  const vf shifted = clamped * kLog2e + kShift;
  const vf n = shifted - kShift;
  const vf r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const vf y = (p * (r * r) + r) + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  const vu e = (vu)shifted - 0x4B400000u, half = (vu)((vi)e >> 1);
  return y * (vf)((half + 127u) << 23) * (vf)((e - half + 127u) << 23);
#endif
}

// The natural logarithm, within 1 ulp: x = m 2^e with m around 1 and a polynomial in m - 1
// (coefficients of exp and log: Moshier, Cephes, 1989). Of a positive and normal x.
inline vf log_normal(vf x, vi further_exponent = vi{}) {
  const vu u = (vu)x;
  const vi e = (vi)(u - 0x3F3504F3u) >> 23;
  const vf f = (vf)(u - ((vu)e << 23)) - 1.0f, square = f * f;
  const vf exponent = __builtin_convertvector(e + further_exponent, vf);
  // Terms in pairs, and pairs in pairs: half the latency of Horner's scheme.
  const vf fourth = square * square;
  const vf p01 = f * -2.4999993993e-1f + 3.3333331174e-1f;
  const vf p23 = f * -1.6668057665e-1f + 2.0000714765e-1f;
  const vf p45 = f * -1.2420140846e-1f + 1.4249322787e-1f;
  const vf p67 = f * -1.1514610310e-1f + 1.1676998740e-1f;
  const vf high = fourth * 7.0376836292e-2f + (p67 * square + p45);
  const vf p = high * fourth + (p23 * square + p01);
  const vf y = p * f * square - exponent * 2.12194440e-4f - square * 0.5f;
  return (f + y) + exponent * 0.693359375f;
}
// Of a normal x from 1 on, within 4e-6 of the result.
inline vf log_from_1(vf x) {
#if defined(__AVX512F__)
  // x = m 2^e with m in [1, 2), and m c = 1 + f with c from a table by m's first four bits: 1, or
  // the inverse of the middle of a sixteenth.
  const vf inverse = {1.0f,         0.914285719f, 0.864864886f, 0.820512831f,
                      0.780487776f, 0.744186044f, 0.711111128f, 0.680851042f,
                      0.653061211f, 0.627451003f, 0.603773594f, 0.581818163f,
                      0.561403513f, 0.542372882f, 0.524590135f, 0.507936537f};
  const vf log_of = {0.0f,         0.0896121531f, 0.145181986f, 0.19782573f,
                     0.247836201f, 0.295464217f,  0.340926563f, 0.384411731f,
                     0.426084416f, 0.466089695f,  0.504555996f, 0.541597314f,
                     0.577315358f, 0.611801539f,  0.645138017f, 0.677398766f};
  const __m512i which = (__m512i)((vu)x >> 19);
  const vf m = (vf)_mm512_getmant_ps((__m512)x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  const vf exponent = (vf)_mm512_getexp_ps((__m512)x);
  const vf f = m * (vf)_mm512_permutexvar_ps(which, (__m512)inverse) - 1.0f, square = f * f;
  const vf rest = exponent * 0.693147181f + (vf)_mm512_permutexvar_ps(which, (__m512)log_of);
  return square * f * (0.333333333f - 0.25f * f) + (f - 0.5f * square) + rest;
#else
  return log_normal(x);
#endif
}
// Of any x: -inf for 0, NaN for negative x.
inline vf vlog(vf x) {
  const vi tiny = x < 0x1p-126f;
  vf y = log_normal(tiny ? x * 0x1p23f : x, tiny & -23);
  y = x < __builtin_inff() ? y : x;  // +inf and NaN
  y = x > 0.0f ? y : x == 0.0f ? set1(-__builtin_inff()) : set1(__builtin_nanf(""));
  return y;
}

}  // namespace p2r::cpu::P2R_ISA
