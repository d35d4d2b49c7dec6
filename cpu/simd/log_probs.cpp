// Softmax statistics of a slice of a row, and its gradient.
//
// A block of logits is read twice, the second time from the first-level cache: once for its
// maximum, once for its sums, so that the running sums are rescaled once a block and not once a
// vector. While a block is summed, the next one is prefetched.
//
// A core reads the 64 bytes of a vector of f32 in about 2 ns (30 GB/s), so its 16 exponentials must
// take less. With vexp a vector took 2.7 ns from the first-level cache, forward
// and backward, and two cores were no nearer to memory's bandwidth than one; with exp2_factors and
// its second factor inside the sum's multiply-add it takes 1.4 (Zen 5), and is memory-bound. The
// backward pass has to read the logits again: the last of them are in the third-level cache, but
// reading from the end backwards was slower than reading in order.
#include <float.h>
#include <math.h>

#include "cpu/simd/arguments.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

namespace {

constexpr int64_t kBlock = 2048;
constexpr double kLn2 = 0.693147180559945309;

template <class E>
inline vf load_f32(const typename E::Element* p) {
  return E::to_f32(load<typename E::Vector>(p));
}
template <class E>
inline void store_f32(typename E::Element* p, vf x) {
  store(p, E::from_f32(x));
}

// The last elements of a row, padded to a whole number of vectors with `padding`.
template <class E>
inline vf get_part(const typename E::Element* p, int64_t n, vf padding) {
  typename E::Element rest[W] = {};
  memcpy(rest, p, n * sizeof *p);
  const vf x = load_f32<E>(rest);
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane < (int32_t)n ? x : padding;
}

// Σ 2^d and the extra sum, Σ 2^d d or Σ 2^2d, in four accumulators that hide the latency.
template <SoftmaxExtra extra>
struct Powers {
  vf s[4] = {}, t[4] = {};
  void add(int k, vf d) {
    const Exp2 e = exp2_factors(d, 1);
    s[k] += e.scale * e.rest;  // the same bits whatever the extra: no product is shared
    if (extra == SoftmaxExtra::moment)
      t[k] += e.scale * (e.rest * vmax(set1(-160.0f), d));  // 0 · -inf is not 0
    if (extra == SoftmaxExtra::squares) t[k] += (e.scale * e.scale) * (e.rest * e.rest);
  }
  vf sum() const { return (s[0] + s[1]) + (s[2] + s[3]); }
  vf further() const { return (t[0] + t[1]) + (t[2] + t[3]); }
};

template <class E, SoftmaxExtra extra>
void sums(const typename E::Element* z, int64_t n, float inverse, float* out) {
  const vf lowest = set1(-INFINITY);
  const float to_binary = (float)(inverse / kLn2);
  float maximum = -INFINITY;
  double total = 0, further = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const typename E::Element* block = z + begin;
    const int64_t size = n - begin < kBlock ? n - begin : kBlock;
    const int64_t whole = size / W * W;

    vf top[4] = {lowest, lowest, lowest, lowest};
    int64_t i = 0;
    for (; i + 4 * W <= whole; i += 4 * W)
      for (int k = 0; k < 4; ++k) top[k] = vmax(load_f32<E>(block + i + k * W), top[k]);
    for (; i < whole; i += W) top[0] = vmax(load_f32<E>(block + i), top[0]);
    if (whole < size) top[0] = vmax(get_part<E>(block + whole, size - whole, lowest), top[0]);
    const float block_maximum = max(vmax(vmax(top[0], top[1]), vmax(top[2], top[3])));

    if (block_maximum > maximum) {
      if (total != 0) {
        const double shift = ((double)maximum - (double)block_maximum) * inverse;
        const double scale = exp(shift);
        further = extra == SoftmaxExtra::squares ? scale * scale * further
                                                 : scale * (further + shift * total);
        total *= scale;
      }
      maximum = block_maximum;
    }
    // A block of -inf alone adds 0 with any reference; a NaN reaches the sum.
    const vf from = set1(maximum == -INFINITY ? 0 : maximum);
    Powers<extra> powers;
    const auto add = [&](int k, vf x) { powers.add(k, (x - from) * to_binary); };
    for (i = 0; i + 4 * W <= whole; i += 4 * W) {
      for (size_t byte = 0; byte < 4 * W * sizeof *block; byte += 64)
        __builtin_prefetch((const char*)(block + kBlock + i) + byte);
      for (int k = 0; k < 4; ++k) add(k, load_f32<E>(block + i + k * W));
    }
    for (; i < whole; i += W) add(0, load_f32<E>(block + i));
    if (whole < size) add(0, get_part<E>(block + whole, size - whole, lowest));
    total += sum(powers.sum());
    if (extra == SoftmaxExtra::moment) further += kLn2 * sum(powers.further());
    if (extra == SoftmaxExtra::squares) further += sum(powers.further());
  }
  out[0] = maximum;
  out[1] = (float)total;
  out[2] = extra == SoftmaxExtra::none ? 0 : (float)further;
}

template <SoftmaxExtra extra>
void lane_sums(int64_t n, int64_t ld, int64_t lanes, float inverse, const float* z, float* sums) {
  const float to_binary = (float)(inverse / kLn2);
  for (int64_t l = 0; l < lanes; l += W, z += W, sums += W) {
    const vf before = loadf(sums);
    vf top[4] = {before, before, before, before};
    int64_t j = 0;
    for (; j + 4 <= n; j += 4)
      for (int k = 0; k < 4; ++k) top[k] = vmax(loadf(z + (j + k) * ld), top[k]);
    for (; j < n; ++j) top[0] = vmax(loadf(z + j * ld), top[0]);
    const vf maximum = vmax(vmax(top[0], top[1]), vmax(top[2], top[3]));
    const vf from = maximum == -INFINITY ? vf{} : maximum;

    Powers<extra> powers;
    const auto add = [&](int k, vf x) { powers.add(k, (x - from) * to_binary); };
    for (j = 0; j + 4 <= n; j += 4)
      for (int k = 0; k < 4; ++k) add(k, loadf(z + (j + k) * ld));
    for (; j < n; ++j) add(0, loadf(z + j * ld));

    // The sums so far are rescaled to the new maximum; initially they are 0, and stay 0.
    const vf shift = vmax(set1(-160.0f), (before - from) * to_binary);
    const Exp2 e = exp2_factors(shift, 1);
    const vf scale = e.scale * e.rest, sum = loadf(sums + ld);
    store(sums, maximum);
    store(sums + ld, scale * sum + powers.sum());
    if (extra == SoftmaxExtra::moment) {
      const vf so_far = loadf(sums + 2 * ld) + shift * (float)kLn2 * sum;
      store(sums + 2 * ld, scale * so_far + powers.further() * (float)kLn2);
    }
    if (extra == SoftmaxExtra::squares)
      store(sums + 2 * ld, scale * scale * loadf(sums + 2 * ld) + powers.further());
  }
}

// `exact`: 1 / temperature is an f32, so that its low part is 0.
template <class E, bool entropy, bool exact>
void gradient(const typename E::Element* z, typename E::Element* dz, int64_t n,
              const LogitGradientRow& row) {
  const auto gradient_of = [&](vf x) {
    vf rest = set1(-row.log_sum);
    // The low part of the product is of a finite x: -inf times 0 is not 0.
    if (!exact) rest = vmax(set1(-FLT_MAX), x) * row.inverse_low + rest;
    const vf log_p = (x * row.inverse - row.maximum) + rest;
    const Exp2 p = exp2_factors(log_p * kLog2e, 1);
    // p is 0 at -128, and 0 · -inf is not.
    vf scale = set1(row.scale_p);
    if (entropy) scale += row.scale_h * vmax(set1(-128.0f), log_p);
    return p.scale * (p.rest * scale);
  };
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    vf out[4];
    for (int k = 0; k < 4; ++k) out[k] = gradient_of(load_f32<E>(z + i + k * W));
    for (int k = 0; k < 4; ++k) store_f32<E>(dz + i + k * W, out[k]);
  }
  for (; i + W <= n; i += W) store_f32<E>(dz + i, gradient_of(load_f32<E>(z + i)));
  if (i < n) {
    typename E::Element rest[W];
    store_f32<E>(rest, gradient_of(get_part<E>(z + i, n - i, vf{})));
    memcpy(dz + i, rest, (n - i) * sizeof *dz);
  }
}

template <class E>
void sums_of(const void* z, int64_t n, float inverse, SoftmaxExtra extra, float* out) {
  const auto* p = static_cast<const typename E::Element*>(z);
  if (extra == SoftmaxExtra::moment)
    sums<E, SoftmaxExtra::moment>(p, n, inverse, out);
  else if (extra == SoftmaxExtra::squares)
    sums<E, SoftmaxExtra::squares>(p, n, inverse, out);
  else
    sums<E, SoftmaxExtra::none>(p, n, inverse, out);
}

template <class E>
void gradient_as(const void* z, void* dz, int64_t n, const LogitGradientRow& row) {
  const auto* from = static_cast<const typename E::Element*>(z);
  auto* to = static_cast<typename E::Element*>(dz);
  const bool exact = row.inverse_low == 0;
  if (row.scale_h != 0)
    exact ? gradient<E, true, true>(from, to, n, row) : gradient<E, true, false>(from, to, n, row);
  else
    exact ? gradient<E, false, true>(from, to, n, row)
          : gradient<E, false, false>(from, to, n, row);
}

}  // namespace

void softmax_sums(DType type, const void* z, int64_t n, float inverse, SoftmaxExtra extra,
                  float* out) {
  if (type == DType::f32)
    sums_of<F32>(z, n, inverse, extra, out);
  else if (type == DType::f16)
    sums_of<F16>(z, n, inverse, extra, out);
  else
    sums_of<Bf16>(z, n, inverse, extra, out);
}

void softmax_lanes(int64_t n, int64_t ld, int64_t lanes, float inverse, SoftmaxExtra extra,
                   const float* z, float* sums) {
  if (extra == SoftmaxExtra::moment)
    lane_sums<SoftmaxExtra::moment>(n, ld, lanes, inverse, z, sums);
  else if (extra == SoftmaxExtra::squares)
    lane_sums<SoftmaxExtra::squares>(n, ld, lanes, inverse, z, sums);
  else
    lane_sums<SoftmaxExtra::none>(n, ld, lanes, inverse, z, sums);
}

void logit_gradient(DType type, const void* z, void* dz, int64_t n, const LogitGradientRow* row) {
  if (type == DType::f32)
    gradient_as<F32>(z, dz, n, *row);
  else if (type == DType::f16)
    gradient_as<F16>(z, dz, n, *row);
  else
    gradient_as<Bf16>(z, dz, n, *row);
}

}  // namespace p2r::cpu::P2R_ISA
