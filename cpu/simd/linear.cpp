// Products of a few rows with a weight that is read once, in place, as it is stored:
//
//   for each W rows of the weight                  a lane of the sums is a feature
//     for each block of k                          the order of cpu/gemm.h
//       for each W words of it
//         load W x W words, transpose in registers
//         acc[r] += x[r][word] * block[word]       for each row r and word; prefetch
//       sum[r] += acc[r]
//
// A bf16 weight that is not multiplied as pairs is transposed as words of two channels, half as
// many shuffles as after the conversion, and split into two steps; f16 is converted first.
//
// A core of Zen 4 reads 30 GB/s from memory, a KiB in 125 cycles. Of the 16 x 16 pairs in it, loads
// take 16 cycles, the transposition 64, and the products 16 for each row, on other ports. Rows
// apart by a power of two collide in L1, and memory is read faster in its own order than 16 rows at
// once, so the next W rows are prefetched line after line; they wait in L2. On Zen 5, where a core
// reads 43 GB/s: 32 GB/s of bf16 for 1 row, 36 for 4, 31 for 8.
#include "cpu/simd/linear.h"

#include "cpu/simd/simd.h"
#include "cpu/simd/words.h"

namespace p2r::cpu::P2R_ISA {

void transpose(int64_t m, int64_t n, const float* x, int64_t ldx, float* y, int64_t ldy);

namespace {

// Features j .. j + W of R rows.
template <class Weight, int R>
void multiply_tile(const FewRows& g, const float* x, int64_t j, float* out, bool prefetch) {
  typedef typename Weight::Element Element;
  constexpr int kRowBytes = Weight::kLoaded * sizeof(Element);  // loaded at once
  constexpr int kChannels = Weight::kLoaded / W;                // of a word
  const Element* weight = static_cast<const Element*>(g.weight) + j * g.k;
  const int features = static_cast<int>(min(W, g.n - j));
  // After the last tile there is nothing to fetch: lines that are there already cost nothing.
  const bool more = prefetch && j + 2 * W <= g.n;
  const char* ahead = reinterpret_cast<const char*>(more ? weight + W * g.k : weight);
  vf sum[R] = {};
  if (g.bias)
    for (int r = 0; r < R; ++r) sum[r] = load_first<vf>(g.bias + j, features);
  for (int64_t k0 = 0; k0 < g.k; k0 += g.block_k) {
    const int64_t k = min(g.block_k, g.k - k0);
    vf acc[R] = {};
    for (int64_t i = 0; i < k; i += Weight::kLoaded) {
      const int64_t left = k - i;
      const Element* row = weight + k0 + i;
      vf block[W];
      if (features == W && left >= Weight::kLoaded) {
        // The compiler must not compute the addresses of all rows before the loop, and spill them.
        asm("" : "+r"(row));
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r, row += g.k) block[r] = Weight::load(row);
        transpose(block);
#pragma GCC unroll 16
        for (int s = 0; s < W; ++s, x += R * Weight::kSteps) {
          multiply_word<Weight, R>(acc, block[s], x, true);
          if (s * kRowBytes % 64 == 0) __builtin_prefetch(ahead + s * kRowBytes);
        }
        ahead += W * kRowBytes;
        continue;
      }
      for (int r = 0; r < W; ++r, row += g.k)
        block[r] = r < features ? Weight::load(row, min(left, Weight::kLoaded)) : vf{};
      transpose(block);
#pragma GCC unroll 16
      for (int s = 0; s < W; ++s) {
        if (s * kChannels >= left) break;
        const bool second = s * kChannels + 1 < left;
        multiply_word<Weight, R>(acc, block[s], x, second);
        x += Weight::kSteps == 2 && !second ? R : R * Weight::kSteps;
      }
    }
    for (int r = 0; r < R; ++r) sum[r] = g.bias || k0 ? acc[r] + sum[r] : acc[r];
  }
  for (int r = 0; r < R; ++r) store_first(out + r * g.ld + j, sum[r], features);
}

template <class Weight, int R = kTileRows>
inline void dispatch_rows(int64_t rows, const FewRows& g, const float* x, int64_t j, float* out,
                          bool prefetch) {
  if (rows == R)
    multiply_tile<Weight, R>(g, x, j, out, prefetch);
  else if constexpr (R > 1)
    dispatch_rows<Weight, R - 1>(rows, g, x, j, out, prefetch);
}

template <class Weight>
void multiply(const FewRows& g) {
  const int64_t tiles = tiles_of(g.rows), depth = g.pairs ? (g.k + 1) / 2 : g.k;
  for (int64_t j = 0; j < g.n; j += W)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = g.rows * t / tiles, end = g.rows * (t + 1) / tiles;
      dispatch_rows<Weight>(end - first, g, g.x + first * depth, j, g.out + first * g.ld, t == 0);
    }
}

}  // namespace

void pack_few_rows(int64_t rows, int64_t depth, const float* words, float* out) {
  const int64_t tiles = tiles_of(rows);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = rows * t / tiles, n = rows * (t + 1) / tiles - first;
    transpose(n, depth, words + first * depth, depth, out + first * depth, n);
  }
}

void multiply_few_rows(const FewRows& g) {
  if (g.type == DType::f32)
    multiply<F32Weight>(g);
  else if (g.type == DType::f16)
    multiply<F16Weight>(g);
  else if (g.pairs)
    multiply<PairWeight>(g);
  else
    multiply<Bf16Weight>(g);
}

}  // namespace p2r::cpu::P2R_ISA
