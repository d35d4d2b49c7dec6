// Words of matrix products, f32 or pairs of bf16 (kernels.def): loading and transposing them, and
// their product.
#pragma once
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of x that a product of a few rows multiplies at once: as many sums as fit the registers
// beside W vectors of the weight. The rows are cut into tiles of nearly that many.
constexpr int kTileRows = W == 8 ? 4 : 8;
inline int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// Words of pairs from two vectors of elements: of f32, which are rounded, or of bf16.
inline vf to_pairs(vf low, vf high) { return bf16_pairs(low, high); }
inline vf to_pairs(vh low, vh high) { return from_bits(widen(low) | widen(high) << 16); }

// The first n of 2 W contiguous elements as W pairs.
inline vf load_pairs(const float* x, int64_t n) {
  const int more = n < W ? 0 : static_cast<int>(min(n - W, W));
  return bf16_adjacent_pairs(load_first<vf>(x, static_cast<int>(min(n, W))),
                             load_first<vf>(x + (more ? W : 0), more));
}
inline vf load_pairs(const uint16_t* x, int64_t n) {
  return n < 2 * W ? load_first<vf>(x, static_cast<int>(n)) : load<vf>(x);
}

// Transposes a W x W block in place: for each distance d, the d x d blocks beside the diagonal are
// swapped (Eklundh, 1972).
template <int D>
inline void swap_blocks(vf* row) {
  vi from_right, from_left;
  for (int j = 0; j < W; ++j) {
    from_left[j] = j & D ? W + j - D : j;
    from_right[j] = j & D ? W + j : j + D;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & D)) {
      const vf a = row[i], b = row[i + D];
      row[i] = shuffle(a, b, from_left);
      row[i + D] = shuffle(a, b, from_right);
    }
}
inline void transpose(vf* row) {
  if constexpr (W == 16) swap_blocks<8>(row);
  if constexpr (W >= 8) swap_blocks<4>(row);
  swap_blocks<2>(row);
  swap_blocks<1>(row);
}

// The product of panel words: of f32 by FMAs, or of pairs of bf16. Out: the type of RowGemm::out.
struct F32Words {
  typedef float Out;
  static vf multiply_add(vf sum, vf x, vf y) { return sum + x * y; }
};
struct PairWords {
  typedef uint16_t Out;
  static vf multiply_add(vf sum, vf x, vf y) { return bf16_dot(sum, x, y); }
};

// How the elements of a row, of a weight or of keys, become words whose products with those of x
// are summed in the order of cpu/gemm.h. kSteps: words of x to a word of the row; kLoaded: elements
// loaded from a row for W words of it.
struct F32Weight {
  typedef float Element;
  static constexpr int kSteps = 1, kLoaded = W;
  static vf load(const float* p) { return loadf(p); }
  static vf load(const float* p, int64_t n) { return load_first<vf>(p, static_cast<int>(n)); }
};
struct F16Weight {
  typedef uint16_t Element;
  static constexpr int kSteps = 1, kLoaded = W;
  static vf load(const uint16_t* p) { return from_f16(p2r::cpu::P2R_ISA::load<vh>(p)); }
  static vf load(const uint16_t* p, int64_t n) {
    return from_f16(load_first<vh>(p, static_cast<int>(n)));
  }
};
struct Bf16Weight {
  typedef uint16_t Element;
  static constexpr int kSteps = 2, kLoaded = 2 * W;
  static vf load(const uint16_t* p) { return p2r::cpu::P2R_ISA::load<vf>(p); }
  static vf load(const uint16_t* p, int64_t n) { return load_pairs(p, n); }
};
struct PairWeight : Bf16Weight {
  static constexpr int kSteps = 1;
};

// acc[r] += x[r] * word, and with two steps the same for the second channel, if there is one.
template <class Weight, int R>
inline void multiply_word(vf (&acc)[R], vf word, const float* x, bool second) {
  const auto step = [&](vf w, const float* from) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if constexpr (Weight::kLoaded == W || Weight::kSteps == 2)
        acc[r] = F32Words::multiply_add(acc[r], set1(from[r]), w);
      else
        acc[r] = PairWords::multiply_add(acc[r], set1(from[r]), w);
    }
  };
  if constexpr (Weight::kSteps == 1) {
    step(word, x);
  } else {
    step(from_bits(bits(word) << 16), x);
    if (second) step(from_bits(bits(word) & 0xFFFF0000u), x + R);
  }
}

}  // namespace p2r::cpu::P2R_ISA
