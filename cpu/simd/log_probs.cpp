// Softmax statistics of a slice of a row, and its gradient.
//
// There is one order of a row's sums, for logits in memory and for those that a linear head makes
// block by block, so that both have the same bits. A row's columns are W runs, those of equal j %
// W, and each run has its own maximum: of a row in memory a run is a lane and nothing crosses
// lanes, and of a transposed block a row is a lane and a run a loop. kSoftmaxColumns columns are a
// step, which is read twice, the second time from the first-level cache or registers: once for the
// runs' maxima, once for their sums. The runs of a span of the vocabulary are added up at its end.
//
// A core reads the 64 bytes of a vector of f32 in about 2 ns (30 GB/s), so its 16 exponentials must
// take less. With vexp a vector took 2.7 ns from the first-level cache, forward
// and backward, and two cores were no nearer to memory's bandwidth than one; with exp2_factors and
// its second factor inside the sum's multiply-add it takes 1.9 from the second-level cache (Zen 5;
// of which the runs' bookkeeping is 0.6), and is memory-bound. The backward pass has to read the
// logits again: the last of them are in the third-level cache, but reading from the end backwards
// was slower than reading in order.
#include <float.h>
#include <math.h>

#include "cpu/simd/arguments.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

namespace {

constexpr double kLn2 = 0.693147180559945309;
constexpr float to_binary_of(float inverse) { return (float)(inverse / kLn2); }

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

// The sums of W runs of columns, a lane each: a row's columns of equal j % W, or in softmax_lanes
// one such run of W rows. Sums are relative to a reference, which follows the maximum only where
// that is far above it: most steps need no factor for the sums so far.
struct Runs {
  vf reference, maximum, sum, further;
};
constexpr float kFar = 32;  // in binary orders of magnitude
constexpr Runs kNoRuns = {vf{} - INFINITY, vf{} - INFINITY, vf{}, vf{}};

// In binary orders of magnitude; where there is no number to subtract, 2 to it is 0.
inline vf distance(vf x, vf from, float to_binary) {
  const vf d = (x - from) * to_binary;
  return d > -160.0f ? d : set1(-160.0f);
}
// Of runs of -inf alone any is right.
inline vf finite(vf reference) { return reference == -INFINITY ? vf{} : reference; }

// Adds a step's columns: x(i) has the i-th of each run. A run that is shorter than the others is
// filled up with -inf, which changes no bit.
template <SoftmaxExtra extra, class Columns>
inline void add_step(Runs& runs, int n, float to_binary, const Columns& x) {
  vf top[4] = {runs.maximum, runs.maximum, runs.maximum, runs.maximum};
  int i = 0;
  for (; i + 4 <= n; i += 4)
    for (int k = 0; k < 4; ++k) top[k] = vmax(x(i + k), top[k]);
  for (int k = 0; k < 3; ++k)
    if (i + k < n) top[k] = vmax(x(i + k), top[k]);
  runs.maximum = vmax(vmax(top[0], top[1]), vmax(top[2], top[3]));

  const vi far = (runs.maximum - runs.reference) * to_binary > kFar;
  if (lanes(far)) {
    const vf reference = far ? runs.maximum : runs.reference;
    const vf shift = distance(runs.reference, finite(reference), to_binary), scale = exp2(shift);
    if (extra == SoftmaxExtra::moment)
      runs.further = scale * (runs.further + shift * (float)kLn2 * runs.sum);
    if (extra == SoftmaxExtra::squares) runs.further = scale * scale * runs.further;
    runs.sum = scale * runs.sum;
    runs.reference = reference;
  }
  const vf from = finite(runs.reference);
  Powers<extra> powers;
  const auto add = [&](int k, vf z) { powers.add(k, (z - from) * to_binary); };
  for (i = 0; i + 4 <= n; i += 4)
    for (int k = 0; k < 4; ++k) add(k, x(i + k));
  for (int k = 0; k < 3; ++k)
    if (i + k < n) add(k, x(i + k));
  runs.sum += powers.sum();
  if (extra == SoftmaxExtra::moment) runs.further += powers.further() * (float)kLn2;
  if (extra == SoftmaxExtra::squares) runs.further += powers.further();
}

template <class E, SoftmaxExtra extra>
void add_row(Runs& runs, const typename E::Element* z, int64_t n, float to_binary) {
  constexpr int64_t kAhead = 16 * kSoftmaxColumns;
  for (; n >= kSoftmaxColumns; n -= kSoftmaxColumns, z += kSoftmaxColumns) {
    for (size_t byte = 0; byte < kSoftmaxColumns * sizeof *z; byte += 64)
      __builtin_prefetch((const char*)(z + kAhead) + byte);
    add_step<extra>(runs, (int)kSoftmaxColumns / W, to_binary,
                    [&](int i) { return load_f32<E>(z + i * W); });
  }
  if (n == 0) return;
  vf last[kSoftmaxColumns / W];
  const int rest = (int)n, whole = rest / W, vectors = (rest + W - 1) / W;
  for (int i = 0; i < whole; ++i) last[i] = load_f32<E>(z + i * W);
  if (whole < vectors) last[whole] = get_part<E>(z + whole * W, rest - whole * W, set1(-INFINITY));
  add_step<extra>(runs, vectors, to_binary, [&](int i) { return last[i]; });
}

// All lanes are added, or the largest is taken, half by half.
template <class F>
inline float folded(vf v, const F& f) {
#pragma GCC unroll 4
  for (int half = W / 2; half > 0; half /= 2) {
    vi other;
    for (int i = 0; i < W; ++i) other[i] = (i + half) % W;
    v = f(v, shuffle(v, v, other));
  }
  return v[0];
}
inline float folded_sum(vf v) {
  return folded(v, [](vf a, vf b) { return a + b; });
}

// The results of n vectors of runs.
template <SoftmaxExtra extra, class Each>
inline void finish(int64_t n, float to_binary, const Each& runs, float* out) {
  vf top = set1(-INFINITY);
  const auto larger = [](vf a, vf b) { return a > b ? a : b; };
  for (int64_t i = 0; i < n; ++i) top = larger(runs(i).maximum, top);
  const float maximum = folded(top, larger);
  const vf from = finite(set1(maximum));
  vf sum = {}, further = {};
  for (int64_t i = 0; i < n; ++i) {
    const Runs r = runs(i);
    const vf shift = distance(r.reference, from, to_binary), scale = exp2(shift);
    sum += scale * r.sum;
    if (extra == SoftmaxExtra::moment) further += scale * (r.further + shift * (float)kLn2 * r.sum);
    if (extra == SoftmaxExtra::squares) further += scale * scale * r.further;
  }
  out[0] = maximum;
  out[1] = folded_sum(sum);
  out[2] = extra == SoftmaxExtra::none ? 0 : folded_sum(further);
}

// The results of spans of a row from those of each.
template <SoftmaxExtra extra>
void merge_spans(int64_t spans, float inverse, const float* parts, float* out) {
  const auto each = [&](int64_t i) {
    float lane[3][W];
    for (int k = 0; k < W; ++k) {
      const int64_t span = i * W + k;
      lane[0][k] = span < spans ? parts[3 * span] : -INFINITY;
      lane[1][k] = span < spans ? parts[3 * span + 1] : 0;
      lane[2][k] = span < spans ? parts[3 * span + 2] : 0;
    }
    return Runs{loadf(lane[0]), loadf(lane[0]), loadf(lane[1]), loadf(lane[2])};
  };
  finish<extra>((spans + W - 1) / W, to_binary_of(inverse), each, out);
}

inline Runs load_runs(const float* sums, int64_t ld) {
  return {loadf(sums), loadf(sums + ld), loadf(sums + 2 * ld), loadf(sums + 3 * ld)};
}
inline void store_runs(float* sums, int64_t ld, const Runs& runs) {
  store(sums, runs.reference);
  store(sums + ld, runs.maximum);
  store(sums + 2 * ld, runs.sum);
  store(sums + 3 * ld, runs.further);
}

template <class E, SoftmaxExtra extra>
void sums(const typename E::Element* z, int64_t n, float inverse, float* out) {
  Runs runs = kNoRuns;
  add_row<E, extra>(runs, z, n, to_binary_of(inverse));
  finish<extra>(
      1, to_binary_of(inverse), [&](int64_t) { return runs; }, out);
}

template <SoftmaxExtra extra>
void add_lanes(int64_t n, int64_t ld, int64_t lanes, float inverse, const float* z, float* sums) {
  for (int64_t l = 0; l < lanes; l += W)
    for (int64_t run = 0; run < W && run < n; ++run) {
      Runs runs = load_runs(sums + run * ld + l, W * ld);
      const float* first = z + run * ld + l;
      add_step<extra>(runs, (int)(n - run + W - 1) / W, to_binary_of(inverse),
                      [&](int i) { return loadf(first + i * W * ld); });
      store_runs(sums + run * ld + l, W * ld, runs);
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
    add_lanes<SoftmaxExtra::moment>(n, ld, lanes, inverse, z, sums);
  else if (extra == SoftmaxExtra::squares)
    add_lanes<SoftmaxExtra::squares>(n, ld, lanes, inverse, z, sums);
  else
    add_lanes<SoftmaxExtra::none>(n, ld, lanes, inverse, z, sums);
}

void softmax_row(int64_t n, float inverse, SoftmaxExtra extra, const float* z, float* sums) {
  const float to_binary = to_binary_of(inverse);
  Runs runs = load_runs(sums, W);
  if (extra == SoftmaxExtra::moment)
    add_row<F32, SoftmaxExtra::moment>(runs, z, n, to_binary);
  else if (extra == SoftmaxExtra::squares)
    add_row<F32, SoftmaxExtra::squares>(runs, z, n, to_binary);
  else
    add_row<F32, SoftmaxExtra::none>(runs, z, n, to_binary);
  store_runs(sums, W, runs);
}

void softmax_runs(int64_t ld, float inverse, SoftmaxExtra extra, const float* sums, float* out) {
  float run[4 * W];
  for (int i = 0; i < 4 * W; ++i) run[i] = sums[i * ld];
  const auto runs = [&](int64_t) { return load_runs(run, W); };
  const float to_binary = to_binary_of(inverse);
  if (extra == SoftmaxExtra::moment)
    finish<SoftmaxExtra::moment>(1, to_binary, runs, out);
  else if (extra == SoftmaxExtra::squares)
    finish<SoftmaxExtra::squares>(1, to_binary, runs, out);
  else
    finish<SoftmaxExtra::none>(1, to_binary, runs, out);
}

void softmax_spans(int64_t spans, float inverse, SoftmaxExtra extra, const float* parts,
                   float* out) {
  if (extra == SoftmaxExtra::moment)
    merge_spans<SoftmaxExtra::moment>(spans, inverse, parts, out);
  else if (extra == SoftmaxExtra::squares)
    merge_spans<SoftmaxExtra::squares>(spans, inverse, parts, out);
  else
    merge_spans<SoftmaxExtra::none>(spans, inverse, parts, out);
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
