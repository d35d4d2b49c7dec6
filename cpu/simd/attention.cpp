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

// 2 to the x, for x <= 0 or NaN.
inline vf weight_of(vf x) {
  const Power p = power_of_two(x, 1);
  return p.scale * p.rest;
}

}  // namespace

int vector_width() { return W; }

// The largest of `keys` rows in each lane; the smallest if the scale is negative.
template <vf (*Best)(vf, vf)>
inline vf extreme(int64_t keys, int64_t ld, const float* s, float start) {
  vf m[4];
  for (vf& each : m) each = set1(start);
  int64_t key = 0;
  for (; key + 4 <= keys; key += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) m[i] = Best(m[i], loadf(s + (key + i) * ld));
  for (; key < keys; ++key) m[0] = Best(m[0], loadf(s + key * ld));
  return Best(Best(m[0], m[1]), Best(m[2], m[3]));
}

bool softmax_step(bool pairs, int64_t keys, int64_t ld, int64_t columns, float scale, float* s,
                  float* max, float* sum, float* decay) {
  const float slope = scale * 1.44269504f;
  vi moved = {};
  for (int64_t c = 0; c < columns; c += W) {
    float* x = s + c;
    const vf before = loadf(max + c);
    const vf after = scale < 0 ? vmin(before, extreme<vmin>(keys, ld, x, kInfinity))
                               : vmax(before, extreme<vmax>(keys, ld, x, -kInfinity));
    // Where every logit so far is -inf, all weights are 0, not exp(-inf + inf).
    const vi none = after == (scale < 0 ? kInfinity : -kInfinity);
    const vf shift = none ? vf{} : after;
    const vf factor = weight_of((before - shift) * slope), origin = shift * slope;

    vf total[4] = {};
    const auto weight = [&](int64_t key, int i) {
      const vf p = weight_of(loadf(x + key * ld) * slope - origin);
      total[i] += p;
      return p;
    };
    int64_t key = 0;
    if (pairs) {
      // The words of a pair of keys take the place of earlier logits.
      for (; key + 4 <= keys; key += 4)
#pragma GCC unroll 2
        for (int i = 0; i < 4; i += 2) {
          const vf low = weight(key + i, i);
          store(x + (key + i) / 2 * ld, bf16_pairs(low, weight(key + i + 1, i + 1)));
        }
      for (; key < keys; key += 2) {
        const vf low = weight(key, 0);
        store(x + key / 2 * ld, bf16_pairs(low, key + 1 < keys ? weight(key + 1, 1) : vf{}));
      }
    } else {
      for (; key + 4 <= keys; key += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) store(x + (key + i) * ld, weight(key + i, i));
      for (; key < keys; ++key) store(x + key * ld, weight(key, 0));
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

void softmax_finish(int64_t columns, float scale, const float* max, const float* sum, float* lse,
                    float* inverse) {
  for (int64_t c = 0; c < columns; c += W) {
    const vf total = loadf(sum + c);
    store(lse + c, loadf(max + c) * scale + vlog(total));
    store(inverse + c, 1.0f / total);
  }
}

void scale_rows(int64_t rows, int64_t n, const float* factor, float* x) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; ++i) x[r * n + i] *= factor[r];
}

namespace {

// Of the first `keys` of two vectors of keys. kWhole: there are no fewer.
template <bool kPairs, bool kWhole>
inline void slopes(int64_t queries, int64_t ld, int64_t keys, float scale, const float* lse,
                   const float* delta, float* s, float* d, float* rows, int64_t ld_rows) {
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  for (int64_t r = 0; r < queries; r += 2) {
    vf p[2][2] = {}, g[2][2] = {};  // of two queries
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        if (r + i == queries || (!kWhole && v * W >= keys)) continue;
        const int64_t at = (r + i) * ld + v * W;
        const Power power = power_of_two(loadf(s + at) * scale - set1(lse[r + i]), 1.44269504f);
        p[i][v] = power.scale * power.rest;
        g[i][v] = p[i][v] * ((loadf(d + at) - set1(delta[r + i])) * scale);
        if (kPairs && !kWhole) {
          g[i][v] = lane < static_cast<int32_t>(keys - v * W) ? g[i][v] : vf{};
        } else if (!kPairs) {
          store(s + at, p[i][v]);
          store(d + at, g[i][v]);
          if (rows) store(rows + (r + i) * ld_rows + v * W, g[i][v]);
        }
      }
    if (!kPairs) continue;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      if (!kWhole && v * W >= keys) continue;
      store(s + r / 2 * ld + v * W, bf16_pairs(p[0][v], p[1][v]));
      store(d + r / 2 * ld + v * W, bf16_pairs(g[0][v], g[1][v]));
    }
    if (rows)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
        if (r + i < queries) store(rows + (r + i) * ld_rows, bf16_neighbours(g[i][0], g[i][1]));
  }
}

}  // namespace

void softmax_backward(bool pairs, int64_t queries, int64_t ld, int64_t keys, float scale,
                      const float* lse, const float* delta, float* s, float* d, float* rows,
                      int64_t ld_rows) {
  for (int64_t c = 0; c < keys; c += 2 * W) {
    const bool whole = c + 2 * W <= keys;
    (pairs   ? whole ? slopes<true, true> : slopes<true, false>
       : whole ? slopes<false, true>
             : slopes<false, false>)(queries, ld, keys - c, scale, lse, delta, s + c, d + c,
                                     rows ? rows + (pairs ? c / 2 : c) : nullptr, ld_rows);
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

// Lane i: the sum of the lanes of row[i], in a fixed order. Two rows that have been halved D times
// share a vector, as a transpose goes.
template <int D = W / 2>
inline vf sums_across(vf* row) {
  vi left, right;
  for (int i = 0; i < W; ++i) {
    left[i] = i & D ? W + i - D : i;
    right[i] = i & D ? W + i : i + D;
  }
#pragma GCC unroll 16
  for (int i = 0; i < D; ++i)
    row[i] =
        __builtin_shuffle(row[i], row[i + D], left) + __builtin_shuffle(row[i], row[i + D], right);
  if constexpr (D > 1)
    return sums_across<D / 2>(row);
  else
    return row[0];
}

template <class Load>
inline void dot_rows_of(int64_t rows, int64_t n, int64_t stride, float* out, Load load_at) {
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
    store(out + first, sums_across(total));
  }
}

}  // namespace

void dot_rows(DType type, int64_t rows, int64_t n, const void* x, const void* y, int64_t stride,
              float* out) {
  const void* of[2] = {x, y};
  if (type == DType::f32)
    dot_rows_of(rows, n, stride, out, [&](int which, int64_t at, int count) {
      const float* from = static_cast<const float*>(of[which]) + at;
      return count == W ? loadf(from) : load_first<vf>(from, count);
    });
  else
    dot_rows_of(rows, n, stride, out, [&](int which, int64_t at, int count) {
      const uint16_t* from = static_cast<const uint16_t*>(of[which]) + at;
      const vh h = count == W ? load<vh>(from) : load_first<vh>(from, count);
      return type == DType::bf16 ? from_bf16(h) : from_f16(h);
    });
}

}  // namespace p2r::cpu::P2R_ISA
