// Plain arguments of the SIMD kernels of resampling (resample.cpp), and how weights are laid out
// for them. Rows of an image are worked on as three planes, one a channel; the rows between the two
// passes as quads: the bytes of four neighbouring rows in one 32-bit lane a column.
//
// A weight k has 22 bits behind the point, and instructions multiply by 8 or 16 bits. So k is cut
// into parts, k = Σ k_p 2^(s p), each part's sum is taken over all taps, and the sums are shifted
// and added once at the end. All of this is arithmetic modulo 2^32, whose result is exact because
// the total, |2^21 + Σ pixel · k| < 2^31, fits; that sums in between may wrap does not matter.
//
//   pairs  low and high, k = high 2^12 + low, 0 <= low < 2^12: two products of 16 bits an
//          instruction. Of the four bytes of a lane, 0 and 2 are one pair and 1 and 3 the other:
//          four words (low of 0 and 2, low of 1 and 3, high of 0 and 2, high of 1 and 3).
//   bytes  three signed bytes, k = k2 2^16 + k1 2^8 + k0: four products an instruction
//          (AVX512-VNNI). Three words.
//
// Rows come in three layouts of weights, since a step always multiplies a whole vector of W lanes:
//
//   pairs  Lanes of 16 bytes, one output each: 16 of its taps a step, from where they lie.
//          weights [W / 4 outputs together][step][word][W].
//   bytes  W = 16 outputs, one a lane: 4 taps of each a step, picked by a permutation out of 128
//          bytes that hold the taps of all. For taps that lie so close. weights [outputs
//          together][step][word][W].
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
  int64_t origin;        // that is subtracted from them
  const int32_t* index;  // bytes: [block][W], the words of a block's window that lanes start at
  const int32_t* weights;
  uint8_t* quads;
  int64_t quad_pitch;    // bytes from channel to channel
  const uint8_t* ahead;  // what will be read next, four rows of ahead_bytes; null: nothing
  int64_t ahead_pitch, ahead_bytes;
};

// Rows of pixels, all of one row of patches, as values; see ops/crop_resample.h for the order.
struct PatchRow {
  const uint8_t* rows;  // [line][channel][x], from patch `first` on
  int64_t row_pitch, plane_pitch;
  int64_t lines, first, count;  // patches first .. first + count - 1
  int64_t patch, temporal, merge;
  const void* table;  // [3][256]
  int value_bytes;    // 2 or 4
  void* out;          // the first of the lines, in patch 0
  bool stream;        // past the caches
};

}  // namespace p2r::cpu
