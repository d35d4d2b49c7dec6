// Softmax attention over packed sequences, without ever holding a T x T matrix (Dao et al.,
// FlashAttention, 2022; the running maximum and sum are Milakov and Gimelshein's, 2018). For each
// sequence and head, over the keys that a query sees:
//
//   S = scale Q K^T        P = softmax(S), row by row
//   out = P V              lse = ln sum_keys exp(S)
//   mass[key] = sum_queries P
//
// and for a gradient dOut of out, with delta = rowsum(dOut * out):
//
//   dV = P^T dOut          dS = P * (dOut V^T - delta)
//   dQ = scale dS K        dK = scale dS^T Q
//
// q, k, v, out and their gradients are [T, H, D], f32 | f16 | bf16, D a multiple of 8 from 8 to
// 128, T below 2^31; or q, k, v are packed as one qkv [T, 3, H, D], read in place, and so are
// their gradients as one d_qkv. lse and mass are [H, T] f32. cu_seqlens: 0 = c_0 <= ... <= c_B = T;
// an empty sequence owns no rows. out may not overlap the inputs.
//
// Which keys a query sees: all of its sequence, unless the arguments below say otherwise, which can
// be combined.
//
// Grouped heads: k, v [Tk, Kv, D], where Kv divides H. Query head h reads key head h / (H / Kv)
// (Ainslie et al., GQA, 2023); dK and dV are summed over the query heads in order.
//
// cu_seqlens_k: sequence s has the rows cu_seqlens_k[s] .. cu_seqlens_k[s + 1] of k and v as its
// own keys. Empty: cu_seqlens.
//
// shared_keys: a range (start, length) of rows for each sequence, which come before its own keys.
// Any number of sequences may share it; it is outside of all own keys. Its dK and dV are summed
// over the sequences in order. Empty: none.
//
// causal: query i of n sees all shared keys and the first i + 1 + (own keys - n) of its own,
// aligned at the last query and key.
//
// A query that sees no key has out 0 and lse -inf and no gradient; a row of k and v that no
// sequence has gets a gradient of 0.
//
// rotary tables cos and sin [T, D] f32 (packed input only): q and k are rotated and rounded to
// their type first, exactly as by apply_rotary; d_qkv is rotated back before its one rounding.
//
// Intermediates are f32, except in the kernels on tensor cores (f16 and bf16 only) and the CPU's
// bf16 kernel with AVX512-BF16, which round P and dS to the inputs' type as operands of the next
// product. Sums are f32, in an order fixed by the lengths and D alone, so results do not depend on
// the number of threads and repeat bit for bit. On the CPU, for an instruction set, with any of the
// arguments above, a query's out and lse depend on nothing but its own q and the keys and values
// that it sees, in order: not on the number of queries, nor on where keys are stored. (Where it
// sees all keys of its own sequence and none of the arguments is given, sums may have another
// order.)
//
// Values that are not finite stay within their sequence and head (or those that share a key);
// forward, those of keys that a query does not see do not reach it. A logit of -inf has weight 0; a
// query without any other logit has lse -inf and a row of NaN; a logit of NaN or +inf makes out and
// lse of its query NaN. The backward and the mass take lse as the forward gave it; where it is not
// finite, that query's gradient and its whole sequence's dK, dV and mass of that head are NaN.
#pragma once
#include <algorithm>
#include <tuple>

#include "ops/tensor.h"

namespace p2r {

// A sequence's queries, a range of rows of q, and the rows of k and v that are its keys, in order:
// those that it shares, then its own.
struct AttentionSequence {
  int64_t query, queries;
  int64_t shared, shared_keys, own, own_keys;

  int64_t keys() const { return shared_keys + own_keys; }
  // How many keys query i sees, from the first on.
  int64_t visible(int64_t i, bool causal) const {
    if (!causal) return keys();
    return shared_keys + std::clamp<int64_t>(i + 1 + own_keys - queries, 0, own_keys);
  }
};

// Which keys queries see; the default is all of their own sequence.
struct AttentionKeys {
  Ints cu_seqlens_k, shared_keys;  // empty: cu_seqlens; none
  bool causal = false;

  size_t sequences(const Ints& cu_seqlens) const { return cu_seqlens.size() - 1; }
  AttentionSequence sequence(const Ints& cu_seqlens, size_t s) const {
    const Ints& cu_k = cu_seqlens_k.empty() ? cu_seqlens : cu_seqlens_k;
    const bool shares = !shared_keys.empty();
    return {cu_seqlens[s],
            cu_seqlens[s + 1] - cu_seqlens[s],
            shares ? shared_keys[2 * s] : 0,
            shares ? shared_keys[2 * s + 1] : 0,
            cu_k[s],
            cu_k[s + 1] - cu_k[s]};
  }
};

// The multiply-adds of one of attention's matrix products over x [T, ..., H, D].
inline double attention_product(const View& x, const Ints& cu_seqlens,
                                const AttentionKeys& keys = {}) {
  double pairs = 0;
  for (size_t s = 0; s + 1 < cu_seqlens.size(); ++s) {
    const AttentionSequence q = keys.sequence(cu_seqlens, s);
    pairs += static_cast<double>(q.queries) * static_cast<double>(q.keys());
  }
  return pairs * static_cast<double>(x.shape[-2] * x.shape[-1]);
}

// `kernel` is an index into kernel_choices("attention", device), of one that takes the input.
// Either qkv is given (with cos and sin or without), or q, k and v.
struct AttentionArgs {
  In q, k, v, qkv, cos, sin;
  Ints cu_seqlens;
  AttentionKeys keys;
  double scale = 1;
  int64_t kernel = 0;
  Out out, lse;
  auto fields() {
    return std::tie(q, k, v, qkv, cos, sin, cu_seqlens, keys.cu_seqlens_k, keys.shared_keys,
                    keys.causal, scale, kernel, out, lse);
  }
  double work() const { return 2 * attention_product(qkv ? qkv : q, cu_seqlens, keys); }
};

struct AttentionMassArgs {
  In q, k, qkv, cos, sin, lse;
  Ints cu_seqlens;
  double scale = 1;
  Out mass;
  auto fields() { return std::tie(q, k, qkv, cos, sin, lse, cu_seqlens, scale, mass); }
  double work() const { return attention_product(qkv ? qkv : q, cu_seqlens); }
};

// Where q, k and v (or their gradients) are stored: three tensors, or slices of a packed one. Head
// h of token t starts `t * row + h * head_dim` elements after the pointer, or `t * key_row + ...`.
struct AttentionLayout {
  char *q = nullptr, *k = nullptr, *v = nullptr;
  DType dtype = DType::f32;
  int64_t tokens = 0, heads = 0, head_dim = 0, row = 0;
  int64_t key_tokens = 0, key_heads = 0, key_row = 0;

  int64_t group() const { return key_heads ? heads / key_heads : 1; }
};

// Whether every query sees all keys of its own sequence, one head each.
inline bool sees_own_sequence(const AttentionLayout& in, const AttentionKeys& keys) {
  return !keys.causal && keys.cu_seqlens_k.empty() && keys.shared_keys.empty() &&
         in.key_heads == in.heads;
}

inline AttentionLayout attention_layout(const View& q, const View& k, const View& v,
                                        const View& qkv) {
  const View& x = qkv ? qkv : q;
  AttentionLayout l;
  l.dtype = x.dtype;
  l.tokens = x.shape[0];
  l.heads = x.shape[-2];
  l.head_dim = x.shape[-1];
  const int64_t inner = l.heads * l.head_dim;
  l.row = qkv ? 3 * inner : inner;
  l.key_tokens = qkv ? l.tokens : k.shape[0];
  l.key_heads = qkv ? l.heads : k.shape[1];
  l.key_row = qkv ? l.row : l.key_heads * l.head_dim;
  const auto part = [&](const View& own, int64_t i) {
    return qkv ? qkv.as<char>() + i * inner * static_cast<int64_t>(size_of(x.dtype))
               : own.as<char>();
  };
  l.q = part(q, 0);
  l.k = part(k, 1);
  l.v = part(v, 2);
  return l;
}

// Bytes of a GPU backward pass's workspace: for the rotated q and k, in their type, or for the sum
// of dQ, in f32. Where both are needed, the rotated rows are kept in d_qkv until the gradients
// overwrite them.
inline int64_t attention_workspace(const AttentionLayout& in, bool rotary, bool deterministic) {
  const int64_t entries = in.tokens * in.heads * in.head_dim;
  return std::max(rotary ? 2 * entries * static_cast<int64_t>(size_of(in.dtype)) : 0,
                  deterministic ? 0 : 4 * entries);
}

// Bytes of a GPU's copy of an input that begins at no multiple of 16 bytes, as a view can; else 0.
inline int64_t attention_alignment_copy(const View& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 ? static_cast<int64_t>(x.bytes()) : 0;
}

// Either d_qkv is given, or d_q, d_k and d_v, as in the input; none may overlap the inputs. Without
// `deterministic` a kernel may add in an order that changes from run to run. Only CUDA's "wgmma"
// does: it accumulates dQ in a workspace. The others ignore the flag.
struct AttentionBackwardArgs {
  In d_out, q, k, v, qkv, cos, sin, out, lse;
  Ints cu_seqlens;
  AttentionKeys keys;
  double scale = 1;
  bool deterministic = true;
  int64_t kernel = 0;
  Out d_q, d_k, d_v, d_qkv;
  auto fields() {
    return std::tie(d_out, q, k, v, qkv, cos, sin, out, lse, cu_seqlens, keys.cu_seqlens_k,
                    keys.shared_keys, keys.causal, scale, deterministic, kernel, d_q, d_k, d_v,
                    d_qkv);
  }
  // S and dP in each of the two passes, and the three gradients.
  double work() const { return 7 * attention_product(qkv ? qkv : q, cu_seqlens, keys); }
  // An upper bound of a GPU's scratch memory: the workspace, delta, the lists of tiles of at least
  // 32 tokens (with any keys also of who reads a tile of keys, which is cut where ranges end), and
  // copies of misaligned inputs.
  int64_t scratch() const {
    const AttentionLayout in = attention_layout(q, k, v, qkv);
    const int64_t sequences = static_cast<int64_t>(cu_seqlens.size());
    const int64_t tiles = in.tokens / 32 + sequences;
    int64_t lists = 12 * tiles + 16;
    if (!sees_own_sequence(in, keys)) {
      int64_t readers = 0;
      for (int64_t s = 0; s + 1 < sequences; ++s)
        readers += keys.sequence(cu_seqlens, static_cast<size_t>(s)).keys() / 32 + 4 * sequences;
      lists = 3 * 64 + 28 * sequences +
              std::max(8 * (in.tokens * in.group() / 32 + sequences),
                       16 * (in.key_tokens / 32 + 4 * sequences + 2) + 8 * readers);
    }
    return attention_workspace(in, static_cast<bool>(cos), deterministic) +
           4 * in.tokens * in.heads + lists + attention_alignment_copy(q) +
           attention_alignment_copy(k) + attention_alignment_copy(v) +
           attention_alignment_copy(qkv) + attention_alignment_copy(d_out) +
           attention_alignment_copy(out);
  }
};

}  // namespace p2r
