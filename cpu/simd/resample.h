// Arguments of the SIMD kernels of resampling (resample.cpp) and the layout of their weights. Rows
// of an image are processed as three planes, one a channel; the rows between the two passes as
// quads: the bytes of four neighbouring rows in one 32-bit lane per column.
//
// A weight k has 22 fractional bits, and instructions multiply by 8 or 16 bits. So k is split into
// parts, k = Σ k_p 2^(s p), each part's sum is taken over all taps, and the sums are shifted
// and added once at the end. All of this is arithmetic modulo 2^32, whose result is exact because
// the total, |2^21 + Σ pixel · k| < 2^31, fits; intermediate sums may wrap.
//
//   pairs  low and high, k = high 2^12 + low, 0 <= low < 2^12: two products of 16 bits an
//          instruction. Of the four bytes of a lane, 0 and 2 are one pair and 1 and 3 the other:
//          four words (low of 0 and 2, low of 1 and 3, high of 0 and 2, high of 1 and 3).
//   bytes  three signed bytes, k = k2 2^16 + k1 2^8 + k0: four products an
//          instruction (AVX512-VNNI). Three words.
//
// The pass along x has two layouts of weights, since a step multiplies a whole vector of W lanes:
//
//   pairs  16 bytes per output: 16 of its taps a step, loaded from consecutive pixels.
//          weights [block of W / 4 outputs][step][word][W].
//   bytes  W = 16 outputs, one a lane: 4 taps of each a step, selected by a permutation of 128
//          bytes. Only for axes whose blocks read no more than that. weights [block of W
//          outputs][step][word][W].
#pragma once
#include <stdint.h>

namespace p2r::cpu {

constexpr int kPairWords = 4, kByteWords = 3;

// Four rows along x: quads[c][x] from planes[row][c], W outputs (bytes) or W / 4 (pairs) at a time.
struct ResampleRows {
  const uint8_t* planes;
  int64_t row_pitch, plane_pitch;  // bytes
  int64_t blocks, steps;
  const int32_t* first;  // pairs: of each output; bytes: of each block. Columns of the planes
  int64_t origin;        // subtracted from them
  const int32_t* index;  // bytes: [block][W], the word of the block's window that a lane starts at
  const int32_t* weights;
  uint8_t* quads;
  int64_t quad_pitch;       // bytes from channel to channel
  const uint8_t* prefetch;  // the rows read next, four of prefetch_bytes; null: none
  int64_t prefetch_pitch, prefetch_bytes;
};

// Rows of pixels within one row of patches, as values; see ops/crop_resample.h for the order.
struct PatchRow {
  const uint8_t* rows;  // [line][channel][x], from patch `first` on
  int64_t row_pitch, plane_pitch;
  int64_t lines, first, count;  // patches first .. first + count - 1
  int64_t patch, temporal, merge;
  const void* table;  // [3][256]; of bytes none
  int value_bytes;    // 1, 2 or 4
  void* out;          // the first of the lines, in patch 0
  bool nontemporal;   // non-temporal stores
};

// Bytes of patches as values.
struct PatchValues {
  const uint8_t* patches;  // [rows][3][run]
  int64_t rows, run;
  const void* table;  // [3][256]
  int value_bytes;    // 2 or 4
  void* out;          // [rows][3][run]
  bool nontemporal;   // non-temporal stores: run is a multiple of 32, out of 64 bytes
};

}  // namespace p2r::cpu
