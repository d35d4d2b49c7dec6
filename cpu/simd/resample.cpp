// Resampling of RGB bytes with 22-bit integer weights: exact, so that every instruction set gives
// the same bytes.
//
//   out = clamp8((2^21 + sum of pixel * weight) >> 22)
//
// The layout of weights: resample.h. A row of the image is first split into planes, so that the
// taps of a channel are contiguous; the pass along x stores a lane of four rows' bytes per column,
// which the pass along y multiplies, four rows a step.
#include "cpu/simd/resample.h"

#include "cpu/simd/simd.h"
#include "cpu/simd/vec.h"

namespace p2r::cpu::P2R_ISA {

namespace {

constexpr int kBits = 22;
constexpr int kOutputs = W / 4;  // of a block of pairs

typedef int32_t v4 __attribute__((vector_size(16)));

// Sums of the two products of 16-bit halves in each lane.
inline vu pair_products(vi a, vi b) {
#if defined(__AVX512F__)
  return (vu)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vu)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (vu)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return (vu)((a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16));
#endif
}

struct Sums {
  vu low, high;
  void add(vi v, const vi w[kPairWords]) {
    const vi even = v & 0x00FF00FF, odd = (vi)((vu)v >> 8) & 0x00FF00FF;
    low += pair_products(even, w[0]) + pair_products(odd, w[1]);
    high += pair_products(even, w[2]) + pair_products(odd, w[3]);
  }
  vu total() const { return low + (high << 12); }
};

// Rounded, shifted and saturated to bytes.
inline vb clamp8(vu sum) {
  vi v = (vi)(sum + (1u << (kBits - 1))) >> kBits;
  v = v < 0 ? vi{} : v;
  v = v > 255 ? vi{} + 255 : v;
  return __builtin_convertvector(v, vb);
}

// 16 bytes from each of kOutputs positions.
inline vi gather16(const uint8_t* p, const int32_t* at) {
#if defined(__AVX512F__)
  __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)(p + at[0])));
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(p + at[1])), 1);
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(p + at[2])), 2);
  return (vi)_mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(p + at[3])), 3);
#elif defined(__AVX2__)
  return (vi)_mm256_loadu2_m128i((const __m128i*)(p + at[1]), (const __m128i*)(p + at[0]));
#else
  return load<vi>(p + at[0]);
#endif
}

// In each group of 16 bytes: the horizontal sums of a's, b's, c's and d's four lanes.
inline vu sums_of_four(vu a, vu b, vu c, vu d) {
#if defined(__AVX512F__)
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32((__m512i)a, (__m512i)b),
                                      _mm512_unpackhi_epi32((__m512i)a, (__m512i)b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32((__m512i)c, (__m512i)d),
                                      _mm512_unpackhi_epi32((__m512i)c, (__m512i)d));
  return (vu)_mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
#elif defined(__AVX2__)
  return (vu)_mm256_hadd_epi32(_mm256_hadd_epi32((__m256i)a, (__m256i)b),
                               _mm256_hadd_epi32((__m256i)c, (__m256i)d));
#else
  const vu ab =
      __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const vu cd =
      __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
#endif
}

// Interleaved bytes to planes and back. 48 bytes, 16 pixels, are three pieces of 16; a vector holds
// the first, the second or the third pieces of W / 4 such blocks, so that one shuffle handles all.
#if defined(__AVX2__)
struct Shuffles {
  int8_t split[3][3][16], join[3][3][16];  // [piece][channel]
  constexpr Shuffles() : split(), join() {
    for (int piece = 0; piece < 3; ++piece)
      for (int c = 0; c < 3; ++c)
        for (int i = 0; i < 16; ++i) {
          const int at = 3 * i + c - 16 * piece, byte = 16 * piece + i;
          split[piece][c][i] = (int8_t)(at >= 0 && at < 16 ? at : -1);
          join[piece][c][i] = (int8_t)(byte % 3 == c ? byte / 3 : -1);
        }
  }
};
constexpr Shuffles kShuffles;
constexpr int kBlocks = W / 4;

#if defined(__AVX512F__)
typedef __m512i Piece;
inline Piece shuffled(Piece v, const int8_t by[16]) {
  return _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)by)));
}
inline Piece any_of(Piece a, Piece b, Piece c) { return _mm512_ternarylogic_epi64(a, b, c, 0xFE); }
inline void load_pieces(const uint8_t* p, Piece v[3]) {
  const Piece a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 64),
              c = _mm512_loadu_si512(p + 128);
  v[0] = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 1, 6, 7, 12, 13, 0, 0), b);
  v[1] = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(2, 3, 8, 9, 14, 15, 0, 0), b);
  v[2] = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 5, 10, 11, 0, 0, 0, 0), b);
  v[0] = _mm512_mask_permutexvar_epi64(v[0], 0xC0, _mm512_setr_epi64(0, 0, 0, 0, 0, 0, 2, 3), c);
  v[1] = _mm512_mask_permutexvar_epi64(v[1], 0xC0, _mm512_setr_epi64(0, 0, 0, 0, 0, 0, 4, 5), c);
  v[2] = _mm512_mask_permutexvar_epi64(v[2], 0xF0, _mm512_setr_epi64(0, 0, 0, 0, 0, 1, 6, 7), c);
}
inline void store_pieces(uint8_t* p, const Piece v[3]) {
  Piece a = _mm512_permutex2var_epi64(v[0], _mm512_setr_epi64(0, 1, 8, 9, 0, 0, 2, 3), v[1]);
  Piece b = _mm512_permutex2var_epi64(v[0], _mm512_setr_epi64(10, 11, 0, 0, 4, 5, 12, 13), v[1]);
  Piece c = _mm512_permutex2var_epi64(v[0], _mm512_setr_epi64(0, 0, 6, 7, 14, 15, 0, 0), v[1]);
  a = _mm512_mask_permutexvar_epi64(a, 0x30, _mm512_setr_epi64(0, 0, 0, 0, 0, 1, 0, 0), v[2]);
  b = _mm512_mask_permutexvar_epi64(b, 0x0C, _mm512_setr_epi64(0, 0, 2, 3, 0, 0, 0, 0), v[2]);
  c = _mm512_mask_permutexvar_epi64(c, 0xC3, _mm512_setr_epi64(4, 5, 0, 0, 0, 0, 6, 7), v[2]);
  _mm512_storeu_si512(p, a);
  _mm512_storeu_si512(p + 64, b);
  _mm512_storeu_si512(p + 128, c);
}
#else
typedef __m256i Piece;
inline Piece shuffled(Piece v, const int8_t by[16]) {
  return _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)by)));
}
inline Piece any_of(Piece a, Piece b, Piece c) { return _mm256_or_si256(_mm256_or_si256(a, b), c); }
inline void load_pieces(const uint8_t* p, Piece v[3]) {
  const Piece a = _mm256_loadu_si256((const Piece*)p),
              b = _mm256_loadu_si256((const Piece*)(p + 32)),
              c = _mm256_loadu_si256((const Piece*)(p + 64));
  v[0] = _mm256_blend_epi32(a, b, 0xF0);
  v[1] = _mm256_permute2x128_si256(a, c, 0x21);
  v[2] = _mm256_blend_epi32(b, c, 0xF0);
}
inline void store_pieces(uint8_t* p, const Piece v[3]) {
  _mm256_storeu_si256((Piece*)p, _mm256_permute2x128_si256(v[0], v[1], 0x20));
  _mm256_storeu_si256((Piece*)(p + 32), _mm256_blend_epi32(v[2], v[0], 0xF0));
  _mm256_storeu_si256((Piece*)(p + 64), _mm256_permute2x128_si256(v[1], v[2], 0x31));
}
#endif

constexpr int kPixels = kBlocks * 16;  // at a time

inline void split_pixels(const uint8_t* rgb, uint8_t* planes, int64_t pitch) {
  Piece v[3];
  load_pieces(rgb, v);
  for (int c = 0; c < 3; ++c) {
    const Piece plane =
        any_of(shuffled(v[0], kShuffles.split[0][c]), shuffled(v[1], kShuffles.split[1][c]),
               shuffled(v[2], kShuffles.split[2][c]));
    memcpy(planes + c * pitch, &plane, sizeof plane);
  }
}

inline void join_pixels(const uint8_t* planes, int64_t pitch, uint8_t* rgb) {
  Piece channel[3], v[3];
  for (int c = 0; c < 3; ++c) memcpy(&channel[c], planes + c * pitch, sizeof(Piece));
  for (int piece = 0; piece < 3; ++piece)
    v[piece] = any_of(shuffled(channel[0], kShuffles.join[piece][0]),
                      shuffled(channel[1], kShuffles.join[piece][1]),
                      shuffled(channel[2], kShuffles.join[piece][2]));
  store_pieces(rgb, v);
}
#else
constexpr int kPixels = 1;

inline void split_pixels(const uint8_t* rgb, uint8_t* planes, int64_t pitch) {
  for (int c = 0; c < 3; ++c) planes[c * pitch] = rgb[c];
}
inline void join_pixels(const uint8_t* planes, int64_t pitch, uint8_t* rgb) {
  for (int c = 0; c < 3; ++c) rgb[c] = planes[c * pitch];
}
#endif

}  // namespace

void split_planes(const uint8_t* rgb, uint8_t* planes, int64_t pitch, int64_t n) {
  int64_t x = 0;
  for (; x + kPixels <= n; x += kPixels) split_pixels(rgb + x * 3, planes + x, pitch);
  if (x < n) {
    uint8_t rest[kPixels * 3];
    memcpy(rest, rgb + x * 3, (n - x) * 3);
    split_pixels(rest, planes + x, pitch);
  }
}

void join_planes(const uint8_t* planes, int64_t pitch, uint8_t* rgb, int64_t n) {
  int64_t x = 0;
  for (; x + kPixels <= n; x += kPixels) join_pixels(planes + x, pitch, rgb + x * 3);
  if (x < n) {
    uint8_t rest[kPixels * 3];
    join_pixels(planes + x, pitch, rest);
    memcpy(rgb + x * 3, rest, (n - x) * 3);
  }
}

namespace {

// Prefetches a block's share of the rows that are read next, to overlap memory and arithmetic.
// (Unless inlined, GCC 12 takes it for a function without effects and drops the call.)
__attribute__((always_inline)) inline void prefetch_share(const ResampleRows& a, int64_t block) {
  const int64_t lines = a.prefetch_bytes / 64 + 1;
  for (int64_t i = block * lines / a.blocks; i < (block + 1) * lines / a.blocks; ++i)
    for (int row = 0; row < 4; ++row)
      __builtin_prefetch(a.prefetch + row * a.prefetch_pitch + i * 64, 0, 2);
}

}  // namespace

// for each kOutputs outputs, channel: for each step: add 16 taps of four rows
void resample_rows(const ResampleRows* a) {
  const int32_t* first = a->first;
  const int32_t* weights = a->weights;
  for (int64_t b = 0; b < a->blocks; ++b, first += kOutputs, weights += a->steps * kPairWords * W) {
    if (a->prefetch) prefetch_share(*a, b);
    for (int c = 0; c < 3; ++c) {
      const uint8_t* p = a->planes + c * a->plane_pitch - a->origin;
      Sums sums[4] = {};
      for (int64_t s = 0; s < a->steps; ++s, p += 16) {
        vi w[kPairWords];
        for (int k = 0; k < kPairWords; ++k) w[k] = load<vi>(weights + (s * kPairWords + k) * W);
        for (int row = 0; row < 4; ++row) sums[row].add(gather16(p + row * a->row_pitch, first), w);
      }
      store(
          a->quads + c * a->quad_pitch + b * W,
          clamp8(sums_of_four(sums[0].total(), sums[1].total(), sums[2].total(), sums[3].total())));
    }
  }
}

// for each 4 W columns: for each four rows: add them
void resample_column(const uint8_t* const* quads, uint8_t* out, int64_t n, const int32_t* weights,
                     int64_t steps) {
  for (int64_t x = 0; x < n; x += 4 * W) {
    Sums sums[4] = {};
    for (int64_t s = 0; s < steps; ++s) {
      vi w[kPairWords];
      for (int k = 0; k < kPairWords; ++k) w[k] = weights[s * kPairWords + k] - vi{};
      for (int i = 0; i < 4; ++i) sums[i].add(load<vi>(quads[s] + (x + i * W) * 4), w);
    }
    for (int i = 0; i < 4; ++i) store(out + x + i * W, clamp8(sums[i].total()));
  }
}

#if defined(__AVX512F__)
namespace {

// Adds to each lane of a sum the products of its four bytes with four signed bytes. (GCC 12 moves
// every sum to another register and back around the intrinsic, at half the speed.)
inline void add_products(__m512i& sum, __m512i bytes, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(weights));
}

// The sums of four vectors as bytes: [vector][column] within each 16 bytes.
inline __m512i bytes_of(const __m512i sum[4][kByteWords]) {
  __m512i v[4];
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_add_epi32(_mm512_slli_epi32(sum[i][2], 16), _mm512_slli_epi32(sum[i][1], 8));
    v[i] = _mm512_srai_epi32(_mm512_add_epi32(v[i], sum[i][0]), kBits);
  }
  // Saturation to 16 bits with a sign and then to 8 without is the clamp.
  return _mm512_packus_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
}

}  // namespace

// for each 16 outputs, channel: for each step: add 4 taps of four rows
void resample_rows_vnni(const ResampleRows* a) {
  const __m512i half = _mm512_set1_epi32(1 << (kBits - 1)), one = _mm512_set1_epi32(1);
  // In each 16 bytes [row][column] to [column][row].
  const __m512i transpose = _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400);
  const int32_t* weights = a->weights;
  for (int64_t b = 0; b < a->blocks; ++b, weights += a->steps * kByteWords * W) {
    if (a->prefetch) prefetch_share(*a, b);
    for (int c = 0; c < 3; ++c) {
      const uint8_t* p = a->planes + c * a->plane_pitch + (a->first[b] - a->origin);
      __m512i index = _mm512_loadu_si512(a->index + b * W);
      __m512i low[4], high[4], sum[4][kByteWords];
      for (int row = 0; row < 4; ++row) {
        low[row] = _mm512_loadu_si512(p + row * a->row_pitch);
        high[row] = _mm512_loadu_si512(p + row * a->row_pitch + 64);
        sum[row][0] = half;
        sum[row][1] = sum[row][2] = _mm512_setzero_si512();
      }
      for (int64_t s = 0; s < a->steps; ++s) {
        __m512i w[kByteWords];
        for (int k = 0; k < kByteWords; ++k)
          w[k] = _mm512_loadu_si512(weights + (s * kByteWords + k) * W);
        for (int row = 0; row < 4; ++row) {
          const __m512i v = _mm512_permutex2var_epi32(low[row], index, high[row]);
          for (int k = 0; k < kByteWords; ++k) add_products(sum[row][k], v, w[k]);
        }
        index = _mm512_add_epi32(index, one);
      }
      _mm512_storeu_si512(a->quads + c * a->quad_pitch + b * W * 4,
                          _mm512_shuffle_epi8(bytes_of(sum), transpose));
    }
  }
}

void resample_column_vnni(const uint8_t* const* quads, uint8_t* out, int64_t n,
                          const int32_t* weights, int64_t steps) {
  const __m512i half = _mm512_set1_epi32(1 << (kBits - 1));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t x = 0; x < n; x += 4 * W) {
    __m512i sum[4][kByteWords];
    for (int i = 0; i < 4; ++i) {
      sum[i][0] = half;
      sum[i][1] = sum[i][2] = _mm512_setzero_si512();
    }
    for (int64_t s = 0; s < steps; ++s) {
      __m512i w[kByteWords];
      for (int k = 0; k < kByteWords; ++k) w[k] = _mm512_set1_epi32(weights[s * kByteWords + k]);
      for (int i = 0; i < 4; ++i) {
        const __m512i v = _mm512_loadu_si512(quads[s] + (x + i * W) * 4);
        for (int k = 0; k < kByteWords; ++k) add_products(sum[i][k], v, w[k]);
      }
    }
    _mm512_storeu_si512(out + x, _mm512_permutexvar_epi32(order, bytes_of(sum)));
  }
}
#else
// Only with AVX-512, see SimdFeatures: never called.
void resample_rows_vnni(const ResampleRows*) { __builtin_trap(); }
void resample_column_vnni(const uint8_t* const*, uint8_t*, int64_t, const int32_t*, int64_t) {
  __builtin_trap();
}
#endif

namespace {

// Calls patch(from, to) for channel c of each patch: its first byte, and its address in the patch's
// first frame.
template <class T, class Patch>
inline void for_each_patch(const PatchRow& a, int c, Patch&& patch) {
  const int64_t plane = a.patch * a.patch, depth = 3 * a.temporal * plane;
  const uint8_t* from = a.rows + c * a.plane_pitch;
  for (int64_t px = a.first; px < a.first + a.count; ++px, from += a.patch)
    patch(from, (T*)a.out + (px / a.merge * a.merge * a.merge + px % a.merge) * depth +
                    c * a.temporal * plane);
}

template <class T>
void any_patches(const PatchRow& a) {
  const int64_t plane = a.patch * a.patch;
  for (int c = 0; c < 3; ++c) {
    const T* table = (const T*)a.table + c * 256;
    for_each_patch<T>(a, c, [&](const uint8_t* from, T* to) {
      for (int64_t line = 0; line < a.lines; ++line, from += a.row_pitch, to += a.patch) {
        for (int64_t x = 0; x < a.patch; ++x) to[x] = table[from[x]];
        if (a.temporal == 2) memcpy(to + plane, to, a.patch * sizeof(T));
      }
    });
  }
}

#if defined(__AVX512F__)
// A table of 256 16-bit entries in registers: 32 look-ups at a time, indices in 16-bit lanes.
struct Table {
  __m512i part[8];
  inline __m512i at(__m512i i, __mmask32 bit6, __mmask32 bit7) const {
    const __m512i a = _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(part[0], i, part[1]),
                                              _mm512_permutex2var_epi16(part[2], i, part[3]));
    const __m512i b = _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(part[4], i, part[5]),
                                              _mm512_permutex2var_epi16(part[6], i, part[7]));
    return _mm512_mask_blend_epi16(bit7, a, b);
  }
};

// The same for values of 16 or 32 bits; those of 32 are looked up as two of 16.
template <class T>
struct Values {
  Table low, high;
  explicit inline Values(const T* table) {
    uint16_t halves[2][256];
    for (int i = 0; i < 256; ++i) {
      halves[0][i] = (uint16_t)table[i];
      halves[1][i] = (uint16_t)((uint32_t)table[i] >> 16);
    }
    memcpy(&low, halves[0], sizeof low);
    memcpy(&high, halves[1], sizeof high);
  }
  // The values of 16 bytes of x, then of 16 of y.
  inline void at(__m128i x, __m128i y, __m512i out[sizeof(T) / 2]) const {
    constexpr bool wide = sizeof(T) == 4;
    const __m512i bit6 = _mm512_set1_epi16(64), bit7 = _mm512_set1_epi16(128);
    // 32-bit values: four bytes of both in each 16, as unpacking needs them.
    const __m512i i = _mm512_cvtepu8_epi16(
        wide ? _mm256_set_m128i(_mm_unpackhi_epi32(x, y), _mm_unpacklo_epi32(x, y))
             : _mm256_set_m128i(y, x));
    const __mmask32 is6 = _mm512_test_epi16_mask(i, bit6), is7 = _mm512_test_epi16_mask(i, bit7);
    const __m512i l = low.at(i, is6, is7);
    if constexpr (wide) {
      const __m512i h = high.at(i, is6, is7);
      out[0] = _mm512_unpacklo_epi16(l, h);
      out[1] = _mm512_unpackhi_epi16(l, h);
    } else {
      out[0] = l;
    }
  }
};

inline void store_vector(void* to, __m512i v, bool nontemporal) {
  if (nontemporal)
    _mm512_stream_si512((__m512i*)to, v);
  else
    _mm512_storeu_si512(to, v);
}

// Patches of 16 x 16, two lines a step. The table stays in registers.
template <class T>
void patches_of_16(const PatchRow& a) {
  constexpr int vectors = sizeof(T) / 2, width = 64 / sizeof(T);
  for (int c = 0; c < 3; ++c) {
    const Values<T> values((const T*)a.table + c * 256);
    const bool twice = a.temporal == 2, nontemporal = a.nontemporal;
    for_each_patch<T>(a, c, [&](const uint8_t* from, T* to) {
      for (int64_t line = 0; line < a.lines; line += 2, from += 2 * a.row_pitch, to += 32) {
        __m512i v[vectors];
        values.at(_mm_loadu_si128((const __m128i*)from),
                  _mm_loadu_si128((const __m128i*)(from + a.row_pitch)), v);
        for (int k = 0; k < vectors; ++k) {
          store_vector(to + k * width, v[k], nontemporal);
          if (twice) store_vector(to + 256 + k * width, v[k], nontemporal);
        }
      }
    });
  }
  if (a.nontemporal) _mm_sfence();
}
#endif

// Patches as bytes, without a table. kPatch: the side, if it is known.
template <int kPatch>
void byte_patches(const PatchRow& a) {
  const int64_t side = kPatch ? kPatch : a.patch, plane = side * side;
  for (int c = 0; c < 3; ++c)
    for_each_patch<uint8_t>(a, c, [&](const uint8_t* from, uint8_t* to) {
      for (int64_t line = 0; line < a.lines; ++line, from += a.row_pitch, to += side) {
        memcpy(to, from, kPatch ? kPatch : side);
        if (a.temporal == 2) memcpy(to + plane, from, kPatch ? kPatch : side);
      }
    });
}

template <class T>
void values_of_patches(const PatchValues& a) {
  for (int c = 0; c < 3; ++c) {
    const T* table = (const T*)a.table + c * 256;
#if defined(__AVX512F__)
    const Values<T> values(table);
#endif
    for (int64_t row = 0; row < a.rows; ++row) {
      const uint8_t* from = a.patches + (row * 3 + c) * a.run;
      T* to = (T*)a.out + (row * 3 + c) * a.run;
      int64_t i = 0;
#if defined(__AVX512F__)
      for (; i + 32 <= a.run; i += 32) {
        __m512i v[sizeof(T) / 2];
        values.at(_mm_loadu_si128((const __m128i*)(from + i)),
                  _mm_loadu_si128((const __m128i*)(from + i + 16)), v);
        for (int k = 0; k < (int)sizeof(T) / 2; ++k)
          store_vector(to + i + k * (64 / sizeof(T)), v[k], a.nontemporal);
      }
#endif
      for (; i < a.run; ++i) to[i] = table[from[i]];
    }
  }
#if defined(__AVX512F__)
  if (a.nontemporal) _mm_sfence();
#endif
}

}  // namespace

void patch_row(const PatchRow* a) {
  if (a->value_bytes == 1) return a->patch == 16 ? byte_patches<16>(*a) : byte_patches<0>(*a);
#if defined(__AVX512F__)
  if (a->patch == 16 && a->lines % 2 == 0)
    return a->value_bytes == 4 ? patches_of_16<uint32_t>(*a) : patches_of_16<uint16_t>(*a);
#endif
  return a->value_bytes == 4 ? any_patches<uint32_t>(*a) : any_patches<uint16_t>(*a);
}

void patch_values(const PatchValues* a) {
  return a->value_bytes == 4 ? values_of_patches<uint32_t>(*a) : values_of_patches<uint16_t>(*a);
}

}  // namespace p2r::cpu::P2R_ISA
