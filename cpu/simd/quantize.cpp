// Products with a quantised weight, whose values become f32 or pairs of bf16 in registers, exactly:
//
//   for each panel of 16 features         in its own order in memory: one stream
//     for each tile of rows of x
//       for each group
//         acc[r] += x[r][k] * q[k]        for each row r, the group's channels in order
//         sum[r] += acc[r] * scale
//
// so that no product but the group's last is by a scale. Of an AVX-512 core with AVX512-BF16, 32
// weights of 4 bits take a shift and a table look-up of 32 words of 16 bits, those of 8 bits seven
// instructions; then each row takes one. A core of Zen 4 executes two such instructions a cycle and
// reads 8 bytes, 8 or 14 weights: with one row both formats are bound by memory. Many rows are not
// cut into blocks of k: a panel of 8 bits and 2048 channels has 36 KB, and stays in L2 for all
// rows.
// Measured on a core of Zen 5 that read 43 to 48 GB/s: 1 row at 38 GB/s of 8 bits, 40 of 4.
#include "cpu/simd/linear.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/words.h"

namespace p2r::cpu::P2R_ISA {

namespace {

constexpr int kPanel = 16, V = kPanel / W;  // vectors of a panel
constexpr int kAhead = 4096;                // bytes from a load to its prefetch

// W bytes in two's complement.
inline vf from_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)load<vb>(p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector((vi)(widen(load<vb>(p)) << 24) >> 24, vf);
#endif
}

// Pairs of bf16 of the integers in bits 4 n .. 4 n + 3 of each half of the words.
inline vf nibble_pairs(vu words, int n) {
#if defined(__AVX512BW__)
  // Bit 4 of an index is the next integer's: the table has all sixteen twice.
  const __m512i integers = _mm512_set_epi16(
      (short)0xbf80, (short)0xc000, (short)0xc040, (short)0xc080, (short)0xc0a0, (short)0xc0c0,
      (short)0xc0e0, (short)0xc100, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0,
      (short)0xbf80, (short)0xc000, (short)0xc040, (short)0xc080, (short)0xc0a0, (short)0xc0c0,
      (short)0xc0e0, (short)0xc100, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0);
  const __m512i index = n == 0 ? (__m512i)words : _mm512_srli_epi16((__m512i)words, 4 * n);
  return (vf)_mm512_permutexvar_epi16(index, integers);
#else
  const vf low = __builtin_convertvector((vi)(words << (28 - 4 * n)) >> 28, vf);
  const vf high = __builtin_convertvector((vi)(words << (12 - 4 * n)) >> 28, vf);
  return from_bits(bits(low) >> 16 | (bits(high) & 0xFFFF0000u));
#endif
}

// acc[r] += x[r] * word.
template <class Words, int R>
inline void multiply_word(vf (&acc)[R][V], int v, vf word, const float* x) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) acc[r][v] = Words::multiply_add(acc[r][v], set1(x[r]), word);
}

// Eight channels of a panel, and the words of x for them.
template <int kBits, bool kPairs, int R>
inline void multiply_eight(vf (&acc)[R][V], const uint8_t* q, const float* x) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    if constexpr (kBits == 4) {
      const vu words = load<vu>(q + 4 * W * v);
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        if constexpr (kPairs) {
          multiply_word<PairWords, R>(acc, v, nibble_pairs(words, n), x + n * R);
        } else {
          const vf low = __builtin_convertvector((vi)(words << (28 - 4 * n)) >> 28, vf);
          const vf high = __builtin_convertvector((vi)(words << (12 - 4 * n)) >> 28, vf);
          multiply_word<F32Words, R>(acc, v, low, x + 2 * n * R);
          multiply_word<F32Words, R>(acc, v, high, x + (2 * n + 1) * R);
        }
      }
    } else {
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
        const vf low = from_bytes(q + 2 * n * kPanel + v * W);
        const vf high = from_bytes(q + (2 * n + 1) * kPanel + v * W);
        if constexpr (kPairs) {
          const vf pairs = from_bits(bits(low) >> 16 | (bits(high) & 0xFFFF0000u));
          multiply_word<PairWords, R>(acc, v, pairs, x + n * R);
        } else {
          multiply_word<F32Words, R>(acc, v, low, x + 2 * n * R);
          multiply_word<F32Words, R>(acc, v, high, x + (2 * n + 1) * R);
        }
      }
    }
  }
}

template <int kBits, bool kPairs, int R>
void multiply_panel(const QuantizedRows& g, int64_t panel, const float* x, float* out) {
  constexpr int kBytes = kBits * kPanel;  // of eight channels
  constexpr int kWords = kPairs ? 4 : 8;
  const int64_t bytes = g.group / 8 * kBytes;
  const uint8_t* q = g.values + panel * g.groups * bytes;
  const uint16_t* scales = g.scales + panel * g.groups * kPanel;
  vf sum[R][V] = {};
  if (g.bias)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] = loadf(g.bias + panel * kPanel + v * W);
  for (int64_t i = 0; i < g.groups; ++i, scales += kPanel) {
    vf acc[R][V] = {};
    for (const uint8_t* end = q + bytes; q < end; q += kBytes, x += kWords * R) {
      for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(q + kAhead + line);
      multiply_eight<kBits, kPairs, R>(acc, q, x);
    }
    for (int v = 0; v < V; ++v) {
      const vf scale = from_f16(load<vh>(scales + v * W));
      for (int r = 0; r < R; ++r) sum[r][v] += acc[r][v] * scale;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(out + r * g.ld + panel * kPanel + v * W, sum[r][v]);
}

template <int kBits, bool kPairs, int R = kTileRows>
inline void dispatch_rows(int64_t rows, const QuantizedRows& g, int64_t panel, const float* x,
                          float* out) {
  if (rows == R)
    multiply_panel<kBits, kPairs, R>(g, panel, x, out);
  else if constexpr (R > 1)
    dispatch_rows<kBits, kPairs, R - 1>(rows, g, panel, x, out);
}

template <int kBits, bool kPairs>
void multiply(const QuantizedRows& g) {
  const int64_t tiles = tiles_of(g.rows), depth = g.groups * g.group / (kPairs ? 2 : 1);
  for (int64_t panel = 0; panel < g.panels; ++panel)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = g.rows * t / tiles, end = g.rows * (t + 1) / tiles;
      dispatch_rows<kBits, kPairs>(end - first, g, panel, g.x + first * depth,
                                   g.out + first * g.ld);
    }
}

}  // namespace

void multiply_quantized(const QuantizedRows& g) {
  if (g.bits == 4)
    (g.pairs ? multiply<4, true> : multiply<4, false>)(g);
  else
    (g.pairs ? multiply<8, true> : multiply<8, false>)(g);
}

}  // namespace p2r::cpu::P2R_ISA
