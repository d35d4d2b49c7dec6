// Faults: how a kernel tells that it found a value in a tensor that it must refuse, such as a
// target outside the vocabulary. One 64-bit word that the host can read, 0 until then:
//
//   bits 33..63   2^31 - 1 - index of the row, token or reward    bit 32   of the mask
//   bits 0..31    the value: an i32, or the bits of an f32
//
// The larger word is that of the earlier index, so that threads which raise several keep the first
// by one atomic maximum, on the CPU and on CUDA.
#pragma once
#include <cstdint>
#include <string>

namespace p2r {

enum class Invalid : uint8_t { target, shard_target, reward, logits, weight, aborted };

// What an operation may find at fault besides a mask, or that it was left out (aborted). extent: V
// of targets, K of rewards [B, K], whose sequences are B; an index of B K and beyond is that of a
// baseline.
struct FaultSource {
  Invalid what = Invalid::target;
  int64_t extent = 0;
  int64_t sequences = 0;
};

constexpr uint64_t fault_word(int64_t index, uint32_t value, bool of_mask) {
  constexpr int64_t kLast = 0x7ffffffe;
  return static_cast<uint64_t>(kLast + 1 - (index < kLast ? index : kLast)) << 33 |
         static_cast<uint64_t>(of_mask) << 32 | value;
}

// The word of one call, as kernels take it. first: the index, in the caller's tensors, of the
// call's row 0, where an operation is carried out in chunks of rows.
struct FaultFlag {
  uint64_t* word = nullptr;
  int64_t first = 0;

  FaultFlag from(int64_t row) const { return {word, first + row}; }
};

// On the host; kernels call ptx::raise. Several threads may raise a fault at once.
inline void raise(const FaultFlag& fault, int64_t index, uint32_t value, bool of_mask = false) {
  const uint64_t word = fault_word(fault.first + index, value, of_mask);
  uint64_t seen = __atomic_load_n(fault.word, __ATOMIC_RELAXED);
  while (seen < word && !__atomic_compare_exchange_n(fault.word, &seen, word, false,
                                                     __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// The first of n values of a mask, of which mask[0] has the index `index`, that is neither 0 nor 1.
inline void raise_invalid_mask(const FaultFlag& fault, const uint8_t* mask, int64_t index,
                               int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (mask[i] > 1) return raise(fault, index + i, mask[i], true);
}

// 'targets[17] = 151936 is not ...'.
std::string describe_fault(const FaultSource& source, uint64_t word);

}  // namespace p2r
