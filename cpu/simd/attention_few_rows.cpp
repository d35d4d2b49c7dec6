// Attention of a few rows that see the same keys, as in decoding:
//
//   for each block of keys
//     for each W keys of it            a lane of the sums is a key
//       S[r] = q[r] . K                as cpu/simd/linear.cpp: W x W words transposed in registers
//     P[r] = exp(S[r] - max[r])        of the block, in place
//     for each two keys of it          a lane of the sums is an entry of the head
//       acc[r] += P[r] * V
//     O[r] = O[r] rescale + acc[r]
//
// Every sum has the terms and the order that it has in a tile of many rows (cpu/attention/
// grouped_forward.cpp), where a lane is a row: a logit is one chain over D, a block's sum of
// weights has four chains of every fourth key, an output has one chain over a block's keys. So a
// row has the same bits in either.
//
// A core of Zen 4 reads 30 GB/s from memory, or 8 bytes a cycle. Of 32 keys of D 128 in bf16, 8 KiB
// each of K and V, the transposition of K takes 512 cycles, and with two rows the products of S and
// of P V take 128 each, the interleaving of V 256: 1024 of the 2048 cycles that memory takes. While
// K is read, V is prefetched and the next keys are; while V is read, the next block's keys.
#include "cpu/simd/attention.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/softmax.h"
#include "cpu/simd/words.h"

namespace p2r::cpu::P2R_ISA {

void scale_rows(int64_t rows, int64_t n, const float* factor, float* x);

namespace {

typedef float Quad __attribute__((vector_size(16)));

// The logits of `keys` keys from `first` on, a multiple of W of them.
template <class Weight, int R>
void logits(const FewQueries& a, const float* q, int64_t first, int64_t keys, float* s,
            int64_t ld) {
  typedef typename Weight::Element Element;
  constexpr int kRowBytes = Weight::kLoaded * sizeof(Element);
  constexpr int kChannels = Weight::kLoaded / W;
  for (int64_t key = 0; key < keys; key += W) {
    const char* const* rows = a.k + first + key;
    const float* x = q;
    vf acc[R] = {};
    int64_t at = 0;
    for (int64_t left = a.d; left > 0; left -= Weight::kLoaded, at += kRowBytes) {
      const auto row = [&](int r) { return reinterpret_cast<const Element*>(rows[r] + at); };
      vf block[W];
      if (left >= Weight::kLoaded) {
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) block[r] = Weight::load(row(r));
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i, x += R * Weight::kSteps) {
          multiply_word<Weight, R>(acc, block[i], x, true);
          __builtin_prefetch(rows[W + i] + at);
          __builtin_prefetch(rows[i] + a.v + at, 0, 2);
        }
        continue;
      }
      for (int r = 0; r < W; ++r) block[r] = Weight::load(row(r), left);
      transpose(block);
      for (int i = 0; i * kChannels < left; ++i, x += R * Weight::kSteps)
        multiply_word<Weight, R>(acc, block[i], x, true);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store(s + r * ld + key, acc[r]);
  }
}

// A row's step of the online softmax over n logits, which become weights, with `pairs` as words of
// two neighbouring keys, followed by zeros. Returns the factor for what was before.
float weights(const FewQueries& a, int64_t n, float* s, float* max, float* sum) {
  const float scale_log2 = a.scale * kLog2e, infinity = __builtin_inff();
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  const auto seen = [&](int64_t key) { return lane < static_cast<int32_t>(n - key); };
  const bool least = a.scale < 0;
  const vf start = set1(least ? infinity : -infinity);
  vf extreme = start;
  for (int64_t key = 0; key < n; key += W) {
    const vf x = seen(key) ? loadf(s + key) : start;
    extreme = least ? vmin(extreme, x) : vmax(extreme, x);
  }
  float after = *max;
  for (int i = 0; i < W; ++i)
    if (least ? extreme[i] < after : extreme[i] > after) after = extreme[i];
  const Rescaling r = rescaling(set1(*max), set1(after), a.scale, scale_log2);
  if (r.shift[0] != 0)
    for (int64_t key = 0; key < n; key += W) store(s + key, loadf(s + key) - r.shift);
  Quad total = {};
  const auto weight = [&](int64_t key) {
    const vf p = seen(key) ? softmax_weight(loadf(s + key), scale_log2, r.origin) : vf{};
    store(s + key, p);
    for (int i = 0; i < W; i += 4) total += load<Quad>(s + key + i);
    return p;
  };
  if (a.pairs) {
    // The words overwrite weights that were read before.
    for (int64_t key = 0; key < n; key += 2 * W) {
      const vf low = weight(key);
      store(s + key / 2, bf16_adjacent_pairs(low, weight(key + W)));
    }
  } else {
    for (int64_t key = 0; key < n; key += W) weight(key);
  }
  *max = after;
  const float factor = r.factor[0];
  *sum = *sum * factor + ((total[0] + total[1]) + (total[2] + total[3]));
  return factor;
}

// O (=, +=) P V of n keys, of the entries of C vectors, the last of which has `last`; `rows` are
// rows of V at the first of these entries.
template <class Weight, int R, int C>
void add_values(const FewQueries& a, const char* const* rows, int64_t at, int64_t ahead, int64_t n,
                const float* p, int64_t ld, float* o, int last, bool first) {
  typedef typename Weight::Element Element;
  vf acc[R][C] = {};
  for (int64_t key = 0; key < n; ++key) {
    const Element* row = reinterpret_cast<const Element*>(rows[key] + a.v + at);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      vf value;
      if constexpr (Weight::kLoaded == W)
        value = C > 1 || last == W ? Weight::load(row + c * W) : Weight::load(row, last);
      else
        value = from_bf16(C > 1 || last == W ? load<vh>(row + c * W) : load_first<vh>(row, last));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        acc[r][c] = F32Words::multiply_add(acc[r][c], set1(p[r * ld + key]), value);
      __builtin_prefetch(rows[ahead + key] + at + c * W * sizeof(Element), 0, 2);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      float* to = o + r * a.d + c * W;
      if (C > 1 || last == W)
        store(to, first ? acc[r][c] : acc[r][c] + loadf(to));
      else
        store_first(to, first ? acc[r][c] : acc[r][c] + load_first<vf>(to, last), last);
    }
}

// The same of pairs: a vector has 2 W entries, the even and the odd ones in sums of their own.
template <int R, int C>
void add_pairs(const FewQueries& a, const char* const* rows, int64_t at, int64_t ahead, int64_t n,
               const float* p, int64_t ld, float* o, int last, bool first) {
  vf even[R][C] = {}, odd[R][C] = {};
  const auto step = [&](int64_t key, auto second) __attribute__((always_inline)) {
    const uint16_t* one = reinterpret_cast<const uint16_t*>(rows[key] + a.v + at);
    const uint16_t* two = reinterpret_cast<const uint16_t*>(rows[key + 1] + a.v + at);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const auto words = [&](const uint16_t* row) {
        return bits(C > 1 || last == 2 * W ? load<vf>(row + 2 * c * W) : load_first<vf>(row, last));
      };
      const vu x = words(one), y = second ? words(two) : vu{};
      const vf low = from_bits((x & 0xFFFFu) | y << 16);
      const vf high = from_bits(x >> 16 | (y & 0xFFFF0000u));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vf weight = set1(p[r * ld + key / 2]);
        even[r][c] = PairWords::multiply_add(even[r][c], weight, low);
        odd[r][c] = PairWords::multiply_add(odd[r][c], weight, high);
      }
      __builtin_prefetch(rows[ahead + key] + at + 4 * c * W, 0, 2);
      __builtin_prefetch(rows[ahead + key + 1] + at + 4 * c * W, 0, 2);
    }
  };
  int64_t key = 0;
  for (; key + 2 <= n; key += 2) step(key, true);
  if (key < n) step(key, false);
  vi lower, upper;
  for (int i = 0; i < W; ++i) {
    lower[i] = i / 2 + (i % 2) * W;
    upper[i] = lower[i] + W / 2;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      float* to = o + r * a.d + 2 * c * W;
      const auto put = [&](vf x, float* to, int count) {
        if (count >= W)
          store(to, first ? x : x + loadf(to));
        else if (count > 0)
          store_first(to, first ? x : x + load_first<vf>(to, count), count);
      };
      const int entries = C > 1 ? 2 * W : last;
      put(shuffle(even[r][c], odd[r][c], lower), to, entries);
      put(shuffle(even[r][c], odd[r][c], upper), to + W, entries - W);
    }
}

// The rows of a tile against the keys of a block.
template <class Weight, int R>
void attend_tile(const FewQueries& a, const float* q, int64_t first, float* s, float* max,
                 float* sum, float* o) {
  constexpr int64_t kVector = Weight::kLoaded;  // entries of a vector of V
  constexpr bool kPairs = Weight::kSteps == 1 && kVector == 2 * W;
  constexpr int64_t kWidth = kPairs ? kVector : W;
  // As many sums as hide an addition's latency, and fit the registers.
  constexpr int kSums = W == 8 ? 8 : 16, kMost = kSums / R / (kPairs ? 2 : 1);
  constexpr int C = kMost >= 4 ? 4 : kMost >= 2 ? 2 : 1;
  const int64_t n = min(a.block, a.keys - first);
  const int64_t ld = (a.block + kFewQueriesMargin - 1) / kFewQueriesMargin * kFewQueriesMargin;
  logits<Weight, R>(a, q, first, n, s, ld);
  float factor[R];
  bool rescaled = false;
  for (int r = 0; r < R; ++r) {
    factor[r] = weights(a, n, s + r * ld, max + r, sum + r);
    rescaled |= factor[r] != 1;
  }
  // Where they are not fused with what follows: the sum of a tile of many rows is not either.
  if (first && rescaled) scale_rows(R, a.d, factor, o);
  const char* const* rows = a.k + first;
  const int64_t ahead = first + a.block < a.keys ? min(a.block, a.keys - first - n) : 0;
  for (int64_t j = 0; j < a.d;) {
    const bool wide = C > 1 && a.d - j >= C * kWidth;
    const int last = static_cast<int>(min(kWidth, a.d - j));
    const int64_t at = j * sizeof(typename Weight::Element);
    const auto add = [&](auto f) { f(a, rows, at, ahead, n, s, ld, o + j, last, first == 0); };
    if constexpr (kPairs)
      add(wide ? add_pairs<R, C> : add_pairs<R, 1>);
    else
      add(wide ? add_values<Weight, R, C> : add_values<Weight, R, 1>);
    j += wide ? C * kWidth : kWidth;
  }
}

template <class Weight, int R = kTileRows>
inline void dispatch_rows(int64_t rows, const FewQueries& a, const float* q, int64_t first,
                          float* s, float* max, float* sum, float* o) {
  if (rows == R)
    attend_tile<Weight, R>(a, q, first, s, max, sum, o);
  else if constexpr (R > 1)
    dispatch_rows<Weight, R - 1>(rows, a, q, first, s, max, sum, o);
}

template <class Weight>
void attend(const FewQueries& a) {
  const int64_t tiles = tiles_of(a.rows), depth = a.pairs ? a.d / 2 : a.d;
  for (int64_t first = 0; first < a.keys; first += a.block)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t r = a.rows * t / tiles, end = a.rows * (t + 1) / tiles;
      dispatch_rows<Weight>(end - r, a, a.q + r * depth, first, a.s, a.max + r, a.sum + r,
                            a.o + r * a.d);
    }
}

}  // namespace

void attend_few_rows(const FewQueries& a) {
  if (a.type == DType::f32)
    attend<F32Weight>(a);
  else if (a.type == DType::f16)
    attend<F16Weight>(a);
  else if (a.pairs)
    attend<PairWeight>(a);
  else
    attend<Bf16Weight>(a);
}

}  // namespace p2r::cpu::P2R_ISA
