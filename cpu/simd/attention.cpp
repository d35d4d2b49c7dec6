// Attention's softmax on tiles of logits: the online softmax's update and its final step, the
// backward pass, the sums of attention mass, and delta = rowsum(dO * O).
//
// A tile is the output of one product of cpu/simd/gemm.cpp and an operand of the next, in place.
// Lanes are independent: a maximum or a sum over a column never crosses lanes. Four rows at a time
// have accumulators of their own, which hides the latency of a chain of additions.
#include "cpu/simd/simd.h"
#include "cpu/simd/softmax.h"

namespace p2r::cpu::P2R_ISA {

namespace {

const float kInfinity = __builtin_inff();

// Each lane's extreme over `keys` rows, the first seen[lane] of them if kMasked, and `start`.
template <vf (*Extreme)(vf, vf), bool kMasked>
inline vf extreme(int64_t keys, int64_t ld, const float* s, float start, vi seen) {
  const auto logits = [&](int64_t key) {
    const vf x = loadf(s + key * ld);
    return kMasked ? (seen > static_cast<int32_t>(key) ? x : set1(start)) : x;
  };
  vf m[4];
  for (vf& lanes : m) lanes = set1(start);
  int64_t key = 0;
  for (; key + 4 <= keys; key += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) m[i] = Extreme(m[i], logits(key + i));
  for (; key < keys; ++key) m[0] = Extreme(m[0], logits(key));
  return Extreme(Extreme(m[0], m[1]), Extreme(m[2], m[3]));
}

// A step of the online softmax; `visible`, if kMasked, has the keys that each lane sees.
template <bool kMasked>
inline bool update(bool pairs, int64_t keys, int64_t ld, int64_t columns, float scale,
                   const int32_t* visible, float* s, float* max, float* sum, float* rescale) {
  const float scale_log2 = scale * kLog2e;  // exp(scale s) = 2^(scale_log2 s)
  vi changed = {};
  for (int64_t c = 0; c < columns; c += W) {
    float* x = s + c;
    const vi seen = kMasked ? load<vi>(visible + c) : vi{};
    const vf before = loadf(max + c);
    const vf after = scale < 0
                         ? vmin(before, extreme<vmin, kMasked>(keys, ld, x, kInfinity, seen))
                         : vmax(before, extreme<vmax, kMasked>(keys, ld, x, -kInfinity, seen));
    const auto [factor, shift, origin] = rescaling(before, after, scale, scale_log2);
    if (lanes(shift != vf{}))
      for (int64_t key = 0; key < keys; ++key) store(x + key * ld, loadf(x + key * ld) - shift);

    vf total[4] = {};
    const auto probability = [&, origin = origin](int64_t key, int i) {
      const vf e = softmax_weight(loadf(x + key * ld), scale_log2, origin);
      const vf p = kMasked ? (seen > static_cast<int32_t>(key) ? e : vf{}) : e;
      total[i] += p;
      return p;
    };
    int64_t key = 0;
    if (pairs) {
      // The words of a pair of keys overwrite logits that were read before.
      for (; key + 4 <= keys; key += 4)
#pragma GCC unroll 2
        for (int i = 0; i < 4; i += 2) {
          const vf low = probability(key + i, i);
          store(x + (key + i) / 2 * ld, bf16_pairs(low, probability(key + i + 1, i + 1)));
        }
      for (; key < keys; key += 2) {
        const vf low = probability(key, 0);
        store(x + key / 2 * ld, bf16_pairs(low, key + 1 < keys ? probability(key + 1, 1) : vf{}));
      }
    } else {
      for (; key + 4 <= keys; key += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) store(x + (key + i) * ld, probability(key + i, i));
      for (; key < keys; ++key) store(x + key * ld, probability(key, 0));
    }
    store(max + c, after);
    store(sum + c, loadf(sum + c) * factor + ((total[0] + total[1]) + (total[2] + total[3])));
    store(rescale + c, factor);
    changed |= factor != 1.0f;
  }
  return lanes(changed) != 0;
}

}  // namespace

int vector_width() { return W; }

bool softmax_update(bool pairs, int64_t keys, int64_t ld, int64_t columns, float scale, float* s,
                    float* max, float* sum, float* rescale) {
  return update<false>(pairs, keys, ld, columns, scale, nullptr, s, max, sum, rescale);
}

bool softmax_update_visible(bool pairs, int64_t keys, int64_t ld, int64_t columns, float scale,
                            const int32_t* visible, float* s, float* max, float* sum,
                            float* rescale) {
  return update<true>(pairs, keys, ld, columns, scale, visible, s, max, sum, rescale);
}

void softmax_merge(int64_t columns, float scale, float* max, float* sum, const float* other_max,
                   const float* other_sum, float* factor, float* other_factor) {
  const float scale_log2 = scale * kLog2e;
  for (int64_t c = 0; c < columns; c += W) {
    const vf one = loadf(max + c), two = loadf(other_max + c);
    const vf after = scale < 0 ? vmin(one, two) : vmax(one, two);
    const vi none = after == (scale < 0 ? kInfinity : -kInfinity);
    const vf shift = none ? vf{} : after;
    const vf f = exp2((one - shift) * scale_log2), g = exp2((two - shift) * scale_log2);
    store(sum + c, loadf(sum + c) * f + loadf(other_sum + c) * g);
    store(max + c, after);
    store(factor + c, f);
    store(other_factor + c, g);
  }
}

void merge_rows(int64_t rows, int64_t n, const float* factor, const float* other_factor, float* x,
                const float* other) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; ++i)
      x[r * n + i] = x[r * n + i] * factor[r] + other[r * n + i] * other_factor[r];
}

void softmax_finalize(int64_t columns, float scale, const float* max, const float* sum, float* lse,
                      float* inverse_sum) {
  for (int64_t c = 0; c < columns; c += W) {
    const vf total = loadf(sum + c);
    store(lse + c, loadf(max + c) * scale + vlog(total));
    store(inverse_sum + c, 1.0f / total);
  }
}

void scale_rows(int64_t rows, int64_t n, const float* factor, float* x) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; ++i) x[r * n + i] *= factor[r];
}

namespace {

// P and dS of at most two vectors of keys. kFull: `keys` is at least 2 W. kMasked: row r sees the
// keys before `visible[r] - first`.
template <bool kPairs, bool kFull, bool kMasked>
inline void backward_columns(int64_t queries, int64_t ld, int64_t keys, float scale,
                             const float* lse, const float* delta, const int32_t* visible,
                             int32_t first, float* s, float* dp, float* ds_rows, int64_t ld_rows) {
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  for (int64_t r = 0; r < queries; r += 2) {
    vf p[2][2] = {}, ds[2][2] = {};  // of two queries
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        if (r + i == queries || (!kFull && v * W >= keys)) continue;
        const int64_t at = (r + i) * ld + v * W;
        const Exp2 e = exp2_factors(loadf(s + at) * scale - set1(lse[r + i]), kLog2e);
        p[i][v] = e.scale * e.rest;
        ds[i][v] = p[i][v] * ((loadf(dp + at) - set1(delta[r + i])) * scale);
        if constexpr (kMasked) {
          const vi seen = lane < visible[r + i] - first - v * W;
          p[i][v] = seen ? p[i][v] : vf{};
          ds[i][v] = seen ? ds[i][v] : vf{};
        }
        if (kPairs && !kFull) {
          ds[i][v] = lane < static_cast<int32_t>(keys - v * W) ? ds[i][v] : vf{};
        } else if (!kPairs) {
          store(s + at, p[i][v]);
          store(dp + at, ds[i][v]);
          if (ds_rows) store(ds_rows + (r + i) * ld_rows + v * W, ds[i][v]);
        }
      }
    if (!kPairs) continue;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      if (!kFull && v * W >= keys) continue;
      store(s + r / 2 * ld + v * W, bf16_pairs(p[0][v], p[1][v]));
      store(dp + r / 2 * ld + v * W, bf16_pairs(ds[0][v], ds[1][v]));
    }
    if (ds_rows)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
        if (r + i < queries)
          store(ds_rows + (r + i) * ld_rows, bf16_adjacent_pairs(ds[i][0], ds[i][1]));
  }
}

}  // namespace

void softmax_backward(bool pairs, int64_t queries, int64_t ld, int64_t keys, float scale,
                      const float* lse, const float* delta, const int32_t* visible, float* s,
                      float* dp, float* ds_rows, int64_t ld_rows) {
  for (int64_t c = 0; c < keys; c += 2 * W) {
    const bool full = c + 2 * W <= keys;
    float* rows = ds_rows ? ds_rows + (pairs ? c / 2 : c) : nullptr;
    const auto columns = [&](auto f) {
      f(queries, ld, keys - c, scale, lse, delta, visible, static_cast<int32_t>(c), s + c, dp + c,
        rows, ld_rows);
    };
    if (visible)
      columns(pairs
                  ? full ? backward_columns<true, true, true> : backward_columns<true, false, true>
              : full ? backward_columns<false, true, true>
                     : backward_columns<false, false, true>);
    else
      columns(pairs  ? full ? backward_columns<true, true, false>
                            : backward_columns<true, false, false>
               : full ? backward_columns<false, true, false>
                     : backward_columns<false, false, false>);
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

namespace {

// Lane i of the result is the sum of the lanes of row[i], in a fixed order: a tree of shuffles and
// additions, in the pattern of a transpose, which halves the number of vectors D = W / 2, ..., 1.
template <int D = W / 2>
inline vf horizontal_sums(vf* row) {
  vi left, right;
  for (int i = 0; i < W; ++i) {
    left[i] = i & D ? W + i - D : i;
    right[i] = i & D ? W + i : i + D;
  }
#pragma GCC unroll 16
  for (int i = 0; i < D; ++i)
    row[i] = shuffle(row[i], row[i + D], left) + shuffle(row[i], row[i + D], right);
  if constexpr (D > 1)
    return horizontal_sums<D / 2>(row);
  else
    return row[0];
}

// load_at(which, at, count): `count` elements from index `at` on, of x (0) or y (1), as f32.
template <class Load>
inline void dot_rows_loading(int64_t rows, int64_t n, int64_t stride, float* out, Load load_at) {
  for (int64_t first = 0; first < rows; first += W) {
    vf total[W];
    for (int r = 0; r < W; ++r) {
      total[r] = vf{};
      if (first + r < rows)
        for (int64_t i = 0; i < n; i += W) {
          const int64_t at = (first + r) * stride + i;
          const int count = static_cast<int>(n - i < W ? n - i : W);
          total[r] += load_at(0, at, count) * load_at(1, at, count);
        }
    }
    store(out + first, horizontal_sums(total));
  }
}

}  // namespace

void dot_rows(DType type, int64_t rows, int64_t n, const void* x, const void* y, int64_t stride,
              float* out) {
  const void* inputs[2] = {x, y};
  if (type == DType::f32)
    dot_rows_loading(rows, n, stride, out, [&](int which, int64_t at, int count) {
      const float* from = static_cast<const float*>(inputs[which]) + at;
      return count == W ? loadf(from) : load_first<vf>(from, count);
    });
  else
    dot_rows_loading(rows, n, stride, out, [&](int which, int64_t at, int count) {
      const uint16_t* from = static_cast<const uint16_t*>(inputs[which]) + at;
      const vh h = count == W ? load<vh>(from) : load_first<vh>(from, count);
      return type == DType::bf16 ? from_bf16(h) : from_f16(h);
    });
}

}  // namespace p2r::cpu::P2R_ISA
