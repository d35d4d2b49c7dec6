// What all attention kernels share: the problem that a launcher passes to them, the tiles into
// which the sequences are divided, and the rotation of q and k beforehand.
#pragma once
#include <algorithm>
#include <vector>

#include "cuda/rotary.cuh"
#include "ops/attention.h"

namespace p2r::cuda {

// By the name of the kernel (attention.cu). The mass has no wgmma kernel.
void plain_attention(const AttentionArgs& a, Device& device);
void plain_attention_backward(const AttentionBackwardArgs& a, Device& device);
void plain_attention_mass(const AttentionMassArgs& a, Device& device);  // f32
void mma_attention(const AttentionArgs& a, Device& device);
void mma_attention_backward(const AttentionBackwardArgs& a, Device& device);
void mma_attention_mass(const AttentionMassArgs& a, Device& device);  // f16 and bf16
void wgmma_attention(const AttentionArgs& a, Device& device);
void wgmma_attention_backward(const AttentionBackwardArgs& a, Device& device);

// Consecutive tokens of a sequence, which one block processes.
struct AttentionTile {
  int32_t begin, length;  // of the sequence
  int32_t first;          // token of it
};

template <class T>
struct AttentionProblem {
  const T *q, *k, *v;
  int64_t qk_row, v_row;  // elements from token to token
  const AttentionTile* tiles;
  int64_t tokens;
  int heads, d;
  float scale;
  // Null without rotary. Only gradients are rotated by them: q and k are already.
  const float *cos, *sin;
};

// Calls f with a null pointer of a type of 16 bits.
template <class F>
void with_half_type(DType t, F&& f) {
  if (t == DType::f16)
    f(static_cast<__half*>(nullptr));
  else
    f(static_cast<__nv_bfloat16*>(nullptr));
}

// Calls f with the smallest of the Widths, which ascend, that holds d, as a constant.
template <int... Widths, class F>
void with_head_dim(int64_t d, F&& f) {
  static_cast<void>(((d <= Widths && (f(std::integral_constant<int, Widths>()), true)) || ...));
}

// Every `step` tokens of every sequence, the longest sequences first: a tile's work grows with the
// length of its sequence, and long tiles at the end would leave multiprocessors idle.
inline std::vector<AttentionTile> attention_tiles(const Ints& cu_seqlens, int64_t step) {
  std::vector<AttentionTile> tiles;
  for (size_t s = 1; s < cu_seqlens.size(); ++s) {
    const int64_t length = cu_seqlens[s] - cu_seqlens[s - 1];
    for (int64_t first = 0; first < length; first += step)
      tiles.push_back({static_cast<int32_t>(cu_seqlens[s - 1]), static_cast<int32_t>(length),
                       static_cast<int32_t>(first)});
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const AttentionTile& a, const AttentionTile& b) {
    return a.length > b.length;
  });
  return tiles;
}

// Kernels and TMA read 16 bytes at a time. During the lifetime of this, a view that begins between
// multiples of 16 is replaced by a copy.
class Aligned {
 public:
  Aligned(In& x, Device& device) : copy_(device, attention_alignment_copy(x)) {
    if (!copy_.as<void>()) return;
    device.copy(copy_.as<void>(), x.data, x.bytes());
    x.data = copy_.as<void>();
  }

 private:
  Scratch copy_;
};

// One call on the device, after rotating q and k if there are tables: into those of `rotated_into`,
// or else into scratch memory.
template <class T>
class AttentionOnDevice {
 public:
  AttentionOnDevice(const AttentionLayout& in, const View& cos, const View& sin, double scale,
                    Device& device, const AttentionLayout* rotated_into = nullptr)
      : device_(device),
        rotated_(device,
                 cos && !rotated_into ? 2 * in.tokens * in.heads * in.head_dim * sizeof(T) : 0) {
    p_.q = reinterpret_cast<const T*>(in.q);
    p_.k = reinterpret_cast<const T*>(in.k);
    p_.v = reinterpret_cast<const T*>(in.v);
    p_.qk_row = p_.v_row = in.row;
    p_.tokens = in.tokens;
    p_.heads = static_cast<int>(in.heads);
    p_.d = static_cast<int>(in.head_dim);
    p_.scale = static_cast<float>(scale);
    p_.cos = cos.as<const float>();
    p_.sin = sin.as<const float>();
    if (!cos) return;
    const int64_t inner = in.heads * in.head_dim, row = rotated_into ? rotated_into->row : inner;
    T* q = rotated_into ? reinterpret_cast<T*>(rotated_into->q) : rotated_.template as<T>();
    T* k = rotated_into ? reinterpret_cast<T*>(rotated_into->k) : q + in.tokens * inner;
    rotate_rows<T>(p_.q, in.row, p_.cos, p_.sin, q, row, in.tokens, in.heads, in.head_dim, false,
                   device);
    rotate_rows<T>(p_.k, in.row, p_.cos, p_.sin, k, row, in.tokens, in.heads, in.head_dim, false,
                   device);
    p_.q = q;
    p_.k = k;
    p_.qk_row = row;
  }

  const AttentionProblem<T>& problem() const { return p_; }
  Device& device() const { return device_; }

 private:
  Device& device_;
  Scratch rotated_;
  AttentionProblem<T> p_{};
};

// delta [H, T] = rowsum(dOut * out), which a backward pass needs first (delta.cu).
template <class T>
void attention_delta(const T* d_out, const T* out, float* delta, const AttentionLayout& in,
                     Device& device);

}  // namespace p2r::cuda
