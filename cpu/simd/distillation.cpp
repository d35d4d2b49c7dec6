// Divergences of two rows of logits, and their gradients; ops/distillation.h has the formulas.
//
// A run of both rows is read twice, the second time from the first-level cache: once for the maxima
// and once for the sums. Two exponentials a column are 3 ns for a vector of 16 (Zen 5; see
// cpu/simd/log_probs.cpp), in which a core reads the 128 bytes that they take from memory in about
// 4 ns: bound by memory for f32, by arithmetic for 16 bits. jsd takes five exponentials and a
// logarithm, and is bound by these.
#include <float.h>
#include <math.h>

#include "cpu/simd/arguments.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

namespace {

constexpr float kLn2 = 0.693147181f;

template <class E>
inline vf load_f32(const typename E::Element* p) {
  return E::to_f32(load<typename E::Vector>(p));
}
template <class E>
inline void store_f32(typename E::Element* p, vf x) {
  store(p, E::from_f32(x));
}

// Calls f(z, y, i, count) for every vector of two rows; lanes past the last column, from `count`
// on, are -inf in both.
template <class E, class F>
inline void each_pair(const typename E::Element* z, const typename E::Element* y, int64_t n,
                      const F& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(load_f32<E>(z + i), load_f32<E>(y + i), i, (int)W);
  if (i == n) return;
  typename E::Element rest[2][W] = {};
  memcpy(rest[0], z + i, (n - i) * sizeof *z);
  memcpy(rest[1], y + i, (n - i) * sizeof *y);
  vi lane;
  for (int k = 0; k < W; ++k) lane[k] = k;
  const vi inside = lane < (int32_t)(n - i);
  const vf lowest = set1(-INFINITY);
  f(inside ? load_f32<E>(rest[0]) : lowest, inside ? load_f32<E>(rest[1]) : lowest, i,
    (int)(n - i));
}

// x where weight is not 0, else 0: x may be infinite or NaN there.
inline vf where_not_zero(vf weight, vf x) { return weight == 0.0f ? vf{} : x; }

template <class E>
void sums(const void* z, const void* y, int64_t n, float inverse, float* out) {
  const auto* a = static_cast<const typename E::Element*>(z);
  const auto* b = static_cast<const typename E::Element*>(y);
  vf top[2] = {set1(-INFINITY), set1(-INFINITY)};
  each_pair<E>(a, b, n, [&](vf x, vf w, int64_t, int) {
    top[0] = vmax(x, top[0]);
    top[1] = vmax(w, top[1]);
  });
  const float maximum[2] = {max(top[0]), max(top[1])};
  const vf from[2] = {set1(maximum[0] == -INFINITY ? 0 : maximum[0]),
                      set1(maximum[1] == -INFINITY ? 0 : maximum[1])};
  const float to_binary = inverse * kLog2e;
  // Two of each hide some of the latency.
  vf sum_z[2] = {}, sum_y[2] = {}, cross[2] = {};
  each_pair<E>(a, b, n, [&](vf x, vf w, int64_t i, int) {
    const int k = (int)(i / W % 2);
    const vf d = (x - from[0]) * to_binary, e = (w - from[1]) * to_binary;
    const Exp2 p = exp2_factors(d, 1), q = exp2_factors(e, 1);
    // No product is shared, so that equal logits have equal sums, to the bit.
    sum_z[k] += p.scale * p.rest;
    sum_y[k] += q.scale * q.rest;
    cross[k] += where_not_zero(p.scale, p.scale * (p.rest * (d - e)));
  });
  out[0] = maximum[0];
  out[1] = sum(sum_z[0] + sum_z[1]);
  out[2] = sum(cross[0] + cross[1]) * kLn2;
  out[3] = maximum[1];
  out[4] = sum(sum_y[0] + sum_y[1]);
}

// log p, or log q, of logits.
inline vf log_prob(vf x, const DivergenceRow& row, int head) {
  // The low part of the product is of a finite x: -inf times 0 is not 0.
  const vf rest = vmax(set1(-FLT_MAX), x) * row.inverse_low - row.log_sum[head];
  return (x * row.inverse - row.maximum[head]) + rest;
}
// The maximum with 0 keeps the last product out of a fused p - q, which would be its rounding error
// where p = q.
inline vf prob(vf log_p) { return vmax(vf{}, exp2(log_p * kLog2e)); }

// log(p / m), and log(q / p) within the bounds between which both of it and m are as good as exact.
inline vf log_of_mixture(vf log_p, vf log_q, float beta, vf* log_ratio) {
  // A NaN of two columns of -inf becomes a bound.
  const vf w = vmin(vmax(log_q - log_p, set1(-80.0f)), set1(80.0f));
  *log_ratio = w;
  // 1 + beta (q/p - 1) is exactly 1 where p = q.
  return -vlog((vexp(w) - 1.0f) * beta + 1.0f);
}

template <class E>
void mixture(const void* z, const void* y, int64_t n, const DivergenceRow& row, float* out) {
  vf teacher = {}, student = {};
  each_pair<E>(static_cast<const typename E::Element*>(z),
               static_cast<const typename E::Element*>(y), n, [&](vf x, vf w, int64_t, int) {
                 const vf log_p = log_prob(x, row, 0), log_q = log_prob(w, row, 1);
                 const vf p = prob(log_p), q = prob(log_q);
                 vf ratio;
                 const vf of_p = log_of_mixture(log_p, log_q, row.beta, &ratio);
                 teacher += q * (of_p + ratio);
                 student += p * of_p;
               });
  out[0] = sum(teacher);
  out[1] = sum(student);
}

template <class E, Divergence objective>
void gradient(const void* z, const void* y, void* dz, int64_t n, const DivergenceRow& row) {
  auto* to = static_cast<typename E::Element*>(dz);
  each_pair<E>(static_cast<const typename E::Element*>(z),
               static_cast<const typename E::Element*>(y), n,
               [&](vf x, vf w, int64_t i, int count) {
                 const vf log_p = log_prob(x, row, 0), log_q = log_prob(w, row, 1);
                 const vf p = prob(log_p);
                 vf d;
                 if constexpr (objective == Divergence::forward_kl) {
                   d = p - prob(log_q);
                 } else if constexpr (objective == Divergence::reverse_kl) {
                   d = where_not_zero(p, p * ((log_p - log_q) - row.subtract));
                 } else {
                   vf ratio;
                   d = p * (log_of_mixture(log_p, log_q, row.beta, &ratio) - row.subtract);
                 }
                 d *= row.scale;
                 if (count == W) {
                   store_f32<E>(to + i, d);
                 } else {
                   typename E::Element rest[W];
                   store_f32<E>(rest, d);
                   memcpy(to + i, rest, count * sizeof *to);
                 }
               });
}

template <class E>
void gradient_as(const void* z, const void* y, void* dz, int64_t n, const DivergenceRow& row) {
  if (row.objective == Divergence::reverse_kl)
    gradient<E, Divergence::reverse_kl>(z, y, dz, n, row);
  else if (row.objective == Divergence::forward_kl)
    gradient<E, Divergence::forward_kl>(z, y, dz, n, row);
  else
    gradient<E, Divergence::jsd>(z, y, dz, n, row);
}

}  // namespace

void divergence_sums(DType type, const void* z, const void* y, int64_t n, float inverse,
                     float* out) {
  if (type == DType::f32)
    sums<F32>(z, y, n, inverse, out);
  else if (type == DType::f16)
    sums<F16>(z, y, n, inverse, out);
  else
    sums<Bf16>(z, y, n, inverse, out);
}

void mixture_sums(DType type, const void* z, const void* y, int64_t n, const DivergenceRow* row,
                  float* out) {
  if (type == DType::f32)
    mixture<F32>(z, y, n, *row, out);
  else if (type == DType::f16)
    mixture<F16>(z, y, n, *row, out);
  else
    mixture<Bf16>(z, y, n, *row, out);
}

void divergence_gradient(DType type, const void* z, const void* y, void* dz, int64_t n,
                         const DivergenceRow* row) {
  if (type == DType::f32)
    gradient_as<F32>(z, y, dz, n, *row);
  else if (type == DType::f16)
    gradient_as<F16>(z, y, dz, n, *row);
  else
    gradient_as<Bf16>(z, y, dz, n, *row);
}

}  // namespace p2r::cpu::P2R_ISA
