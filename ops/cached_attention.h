// Attention of new tokens of sequences to all that a paged cache holds of them, for decoding (one
// or a few tokens each) and for prefill in chunks (Kwon et al., PagedAttention, 2023). The keys and
// values of the new tokens are appended first; then
//
//   out, lse = attention(q, keys of the sequence, values of the sequence, causal)
//
// with ops/attention.h's formulas, types and rules: query i of n sees the first length + i + 1
// keys, query head h reads key head h / (H / Kv), and on the CPU the bits are those of attention
// over the same keys and values, whatever the page size and the chunks.
//
// q, out [T, H, D], k, v [T, Kv, D] of one float type, T = cu_seqlens.back(), lse [H, T] f32.
//
// pages [P, L, 2, Kv, S, D]: page p holds S consecutive tokens of a sequence, for each layer the
// keys of each head and then the values. A page with all layers is one block of memory, so that
// copying a page is one copy; a head's tokens of a page are contiguous. Slots that hold no token
// are never read.
//
// For sequence s with n = cu_seqlens[s + 1] - cu_seqlens[s] new tokens: lengths[s] are in this
// layer before, and its tokens stand in ceil((lengths[s] + n) / S) pages, listed in order in
// `tables`, one sequence after another. Pages that are written to are in no other sequence's list.
#pragma once
#include <tuple>

#include "ops/tensor.h"

namespace p2r {

struct CachedAttentionArgs {
  In q, k, v;
  InOut pages;
  Ints cu_seqlens, lengths, tables;
  int64_t layer = 0;
  double scale = 1;
  Out out, lse;
  auto fields() {
    return std::tie(q, k, v, pages, cu_seqlens, lengths, tables, layer, scale, out, lse);
  }

  int64_t page_size() const { return pages.shape[4]; }
  int64_t new_tokens(size_t s) const { return cu_seqlens[s + 1] - cu_seqlens[s]; }
  int64_t total(size_t s) const { return lengths[s] + new_tokens(s); }
  int64_t pages_of(size_t s) const { return (total(s) + page_size() - 1) / page_size(); }
  // Elements from a page to the next, and from a page's keys of the layer to its values.
  int64_t page_stride() const { return pages.shape[1] * 2 * value_offset(); }
  int64_t value_offset() const { return pages.shape[3] * pages.shape[4] * pages.shape[5]; }
  char* layer_keys() const { return pages.element(layer * 2 * value_offset()); }
  // The products' multiply-adds.
  double work() const {
    double pairs = 0;
    for (size_t s = 0; s < lengths.size(); ++s)
      pairs += static_cast<double>(new_tokens(s)) * static_cast<double>(total(s));
    return 2 * pairs * static_cast<double>(q.shape[1] * q.shape[2]);
  }
};

}  // namespace p2r
